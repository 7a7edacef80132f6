#include "codebooks.h"

#include <string.h>

#include "codebook_points.h"

enum { MAX_POINTS = 2048, MAX_COMBINATIONS = 6561, MAX_DISTANCE = 196 };

/* How many runs of candidates each codebook has, in long and in short lists; tests/quants/test_codebooks.py counts
 * them. */
enum {
    RUNS_IQ2_XXS = 10071 + 4639,
    RUNS_IQ2_XS = 14410 + 5957,
    RUNS_IQ2_S = 6286,
    RUNS_IQ1 = 22647,
    RUNS_IQ3_XXS = 3902 + 594,
    RUNS_IQ3_S = 3706 + 1337
};

static int32_t places[N_CODEBOOKS][MAX_COMBINATIONS], short_places[N_CODEBOOKS][MAX_COMBINATIONS];
static uint32_t candidates_iq2_xxs[RUNS_IQ2_XXS * CANDIDATE_RUN], candidates_iq2_xs[RUNS_IQ2_XS * CANDIDATE_RUN],
    candidates_iq2_s[RUNS_IQ2_S * CANDIDATE_RUN], candidates_iq1[RUNS_IQ1 * CANDIDATE_RUN],
    candidates_iq3_xxs[RUNS_IQ3_XXS * CANDIDATE_RUN], candidates_iq3_s[RUNS_IQ3_S * CANDIDATE_RUN];
static int8_t values[N_CODEBOOKS][MAX_POINTS * 8];

static const struct {
    const uint16_t *raw_points; /* as in codebook_points.h */
    const int8_t *levels;
    uint32_t *candidates;
    int n_points, dims, n_levels, bits, distances; /* how many of the smallest distances count */
} codebooks[N_CODEBOOKS] = {
    [CODEBOOK_IQ2_XXS] = {iq2_xxs_points, iq2_xxs_levels, candidates_iq2_xxs, 256, 8, 3, 2, 2},
    [CODEBOOK_IQ2_XS] = {iq2_xs_points, iq2_xs_levels, candidates_iq2_xs, 512, 8, 3, 2, 2},
    [CODEBOOK_IQ2_S] = {iq2_s_points, iq2_s_levels, candidates_iq2_s, 1024, 8, 3, 2, 1},
    [CODEBOOK_IQ1] = {iq1_s_points, iq1_s_levels, candidates_iq1, 2048, 8, 3, 2, 3},
    [CODEBOOK_IQ3_XXS] = {iq3_xxs_points, iq3_xxs_levels, candidates_iq3_xxs, 256, 4, 8, 3, 2},
    [CODEBOOK_IQ3_S] = {iq3_s_points, iq3_s_levels, candidates_iq3_s, 512, 4, 8, 3, 3},
};

static uint32_t points[N_CODEBOOKS][MAX_POINTS];

static int level_of(int which, uint32_t packed, int k) {
    return (int)((packed >> (4 * k)) & ((1u << codebooks[which].bits) - 1));
}

static uint32_t packed_level(int which, int k, int level) {
    return (((unsigned)(k << codebooks[which].bits) & 15u) << (4 * k)) | ((uint32_t)level << (4 * k));
}

static int index_of(int which, uint32_t packed) {
    int index = 0;
    for (int k = 0; k < codebooks[which].dims; k++)
        index = index * codebooks[which].n_levels + level_of(which, packed, k);
    return index;
}

static uint32_t combination_at(int which, int index) {
    uint32_t packed = 0;
    for (int k = codebooks[which].dims; k-- > 0; index /= codebooks[which].n_levels)
        packed |= packed_level(which, k, index % codebooks[which].n_levels);
    return packed;
}

static uint32_t point_at(int which, int number) {
    uint32_t packed = 0;
    for (int k = 0; k < codebooks[which].dims; k++)
        packed |= packed_level(
            which, k,
            (codebooks[which].raw_points[number] >> (codebooks[which].bits * k)) & ((1 << codebooks[which].bits) - 1));
    return packed;
}

/* distances[p] = squared distance of point p to a combination. */
static void measure(int which, uint8_t *distances, const int8_t (*levels)[MAX_POINTS], uint32_t combination) {
    const int n = codebooks[which].n_points;
    memset(distances, 0, (size_t)n);
    for (int k = 0; k < codebooks[which].dims; k++) {
        const int level = level_of(which, combination, k);
        for (int p = 0; p < n; p++)
            distances[p] = (uint8_t)(distances[p] + (levels[k][p] - level) * (levels[k][p] - level));
    }
}

/* Appends the points at the smallest distances and returns how many there are. */
static int list_nearest(int which, uint32_t *list, const uint8_t *distances) {
    const int n = codebooks[which].n_points;
    int histogram[MAX_DISTANCE + 1] = {0}, count = 0;
    for (int p = 0; p < n; p++) histogram[distances[p]]++;
    for (int d = 0, left = codebooks[which].distances; left > 0 && d <= MAX_DISTANCE; d++) {
        if (!histogram[d]) continue;
        left--;
        for (int p = 0; p < n; p++)
            if (distances[p] == d) list[count++] = points[which][p];
    }
    return count;
}

/* Bits that say how far each level of a point lies above or below that of a combination: the fewer the nearer, and one
 * point is at least as near as another in every weight if its bits are among the other's. */
static uint64_t remoteness(int which, uint32_t point, uint32_t combination) {
    const int bits = codebooks[which].n_levels - 1;
    uint64_t result = 0;
    for (int k = 0; k < codebooks[which].dims; k++) {
        const int away = level_of(which, point, k) - level_of(which, combination, k);
        result = (result << (2 * bits)) | (away < 0 ? (1ull << -away) - 1 : ((1ull << away) - 1) << bits);
    }
    return result;
}

/* Keeps the points of a list that no other point of it beats. A point that beats another is nearer, so it comes
 * first. */
static int shorten(int which, uint32_t *list, int count, uint32_t combination) {
    uint64_t kept[MAX_POINTS];
    int left = 0;
    for (int p = 0; p < count; p++) {
        const uint64_t bits = remoteness(which, list[p], combination);
        int beaten = 0;
        for (int k = 0; k < left && !beaten; k++) beaten = !(kept[k] & ~bits);
        if (beaten) continue;
        kept[left] = bits;
        list[left++] = list[p];
    }
    return left;
}

/* Puts a list of candidates at the end of the table, where `runs` are taken, and returns its place. */
static int32_t append(int which, int *runs, uint32_t *list, int count) {
    const int eights = (count + 7) / 8, start = *runs;
    while (count % CANDIDATE_RUN) list[count] = list[count - 1], count++;
    memcpy(codebooks[which].candidates + start * CANDIDATE_RUN, list, (size_t)count * sizeof *list);
    *runs += count / CANDIDATE_RUN;
    return ~((start << 8) | eights);
}

static void build(int which) {
    static int8_t levels[8][MAX_POINTS]; /* too large for a stack; one codebook is built at a time */
    const int combinations = codebooks[which].dims == 8 ? 6561 : 4096;
    int32_t *place = places[which];
    memset(place, -1, sizeof places[which]);
    for (int p = 0; p < codebooks[which].n_points; p++) {
        points[which][p] = point_at(which, p);
        for (int k = 0; k < codebooks[which].dims; k++) levels[k][p] = (int8_t)level_of(which, points[which][p], k);
        place[index_of(which, points[which][p])] = p;
    }
    for (int index = 0, runs = 0; index < combinations; index++) {
        uint8_t distances[MAX_POINTS];
        uint32_t list[MAX_POINTS], shorter[MAX_POINTS];
        const uint32_t combination = combination_at(which, index);
        short_places[which][index] = place[index];
        if (place[index] >= 0) continue;
        measure(which, distances, levels, combination);
        const int count = list_nearest(which, list, distances);
        memcpy(shorter, list, (size_t)count * sizeof *list);
        const int left = which == CODEBOOK_IQ1 ? count : shorten(which, shorter, count, combination);
        place[index] = append(which, &runs, list, count);
        short_places[which][index] = left < count ? append(which, &runs, shorter, left) : place[index];
    }
}

static void build_values(int which) {
    for (int p = 0; p < codebooks[which].n_points; p++)
        for (int k = 0; k < codebooks[which].dims; k++)
            values[which][p * codebooks[which].dims + k] = codebooks[which]
                                                               .levels[level_of(which, point_at(which, p), k)];
}

void gfl_build_once(gfl_built *built, int which, void (*build)(int which)) {
    atomic_bool *is_built = built->is_built + which;
    if (atomic_load_explicit(is_built, memory_order_acquire)) return;
    gfl_take(&built->lock);
    if (!atomic_load_explicit(is_built, memory_order_relaxed)) {
        build(which);
        atomic_store_explicit(is_built, 1, memory_order_release);
    }
    gfl_give_back(&built->lock);
}

const gfl_codebook *gfl_codebook_of(int which) {
    static gfl_built built = {.lock = GFL_UNLOCKED};
    static const gfl_codebook all[N_CODEBOOKS] = {
        {points[CODEBOOK_IQ2_XXS], places[CODEBOOK_IQ2_XXS], short_places[CODEBOOK_IQ2_XXS], candidates_iq2_xxs},
        {points[CODEBOOK_IQ2_XS], places[CODEBOOK_IQ2_XS], short_places[CODEBOOK_IQ2_XS], candidates_iq2_xs},
        {points[CODEBOOK_IQ2_S], places[CODEBOOK_IQ2_S], short_places[CODEBOOK_IQ2_S], candidates_iq2_s},
        {points[CODEBOOK_IQ1], places[CODEBOOK_IQ1], short_places[CODEBOOK_IQ1], candidates_iq1},
        {points[CODEBOOK_IQ3_XXS], places[CODEBOOK_IQ3_XXS], short_places[CODEBOOK_IQ3_XXS], candidates_iq3_xxs},
        {points[CODEBOOK_IQ3_S], places[CODEBOOK_IQ3_S], short_places[CODEBOOK_IQ3_S], candidates_iq3_s},
    };
    gfl_build_once(&built, which, build);
    return &all[which];
}

const int8_t *gfl_codebook_values(int which) {
    static gfl_built built = {.lock = GFL_UNLOCKED};
    gfl_build_once(&built, which, build_values);
    return values[which];
}

enum { VALUES_IQ1 = 8 * 2048 };
static int8_t eighths_iq1[2 * VALUES_IQ1];

static void build_eighths(int which) {
    const int8_t *levels = gfl_codebook_values(which);
    for (int i = 0; i < VALUES_IQ1; i++) {
        eighths_iq1[i] = (int8_t)(8 * levels[i] + 1);
        eighths_iq1[VALUES_IQ1 + i] = (int8_t)(8 * levels[i] - 1);
    }
}

const int8_t *gfl_eighths_iq1(void) {
    static gfl_built built = {.lock = GFL_UNLOCKED};
    gfl_build_once(&built, CODEBOOK_IQ1, build_eighths);
    return eighths_iq1;
}
