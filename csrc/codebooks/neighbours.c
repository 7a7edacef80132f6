#include "neighbours.h"

#include <string.h>

enum { MAX_POINTS = 2048, FARTHEST = 8192 };

/* Which signs may change on the way: none, any, or an even number of each eight. */
typedef enum { SIGNS_STAY, SIGNS_FREE, SIGNS_EVEN } sign_rule;

static gfl_neighbours neighbours_iq2_xxs[256], neighbours_iq2_xs[512], neighbours_iq2_s[1024], neighbours_iq1[2048],
    neighbours_iq3_xxs[256], neighbours_iq3_s[512];

static const struct {
    gfl_neighbours *neighbours;
    int n_points, dims, unit; /* what a level of the codebook is worth */
    sign_rule signs;
} codebooks[N_CODEBOOKS] = {
    [CODEBOOK_IQ2_XXS] = {neighbours_iq2_xxs, 256, 8, 1, SIGNS_EVEN},
    [CODEBOOK_IQ2_XS] = {neighbours_iq2_xs, 512, 8, 1, SIGNS_EVEN},
    [CODEBOOK_IQ2_S] = {neighbours_iq2_s, 1024, 8, 1, SIGNS_FREE},
    [CODEBOOK_IQ1] = {neighbours_iq1, 2048, 8, 8, SIGNS_STAY},
    [CODEBOOK_IQ3_XXS] = {neighbours_iq3_xxs, 256, 4, 1, SIGNS_EVEN},
    [CODEBOOK_IQ3_S] = {neighbours_iq3_s, 512, 4, 1, SIGNS_FREE},
};

typedef struct {
    int16_t levels[8][MAX_POINTS]; /* by weight */
    int32_t distances[MAX_POINTS]; /* squared, from one of the points */
} point_levels;

static void read_levels(int which, point_levels *g) {
    const int dims = codebooks[which].dims;
    const int8_t *values = gfl_codebook_values(which);
    for (int p = 0; p < codebooks[which].n_points; p++)
        for (int i = 0; i < dims; i++) g->levels[i][p] = (int16_t)(values[p * dims + i] * codebooks[which].unit);
}

static void measure(int which, point_levels *g, int from) {
    memset(g->distances, 0, sizeof g->distances);
    for (int i = 0; i < codebooks[which].dims; i++)
        for (int p = 0; p < codebooks[which].n_points; p++) {
            const int away = g->levels[i][p] - g->levels[i][from];
            g->distances[p] += away * away;
        }
}

/* The distance within which a histogram counts N_NEIGHBOURS. */
static int reach(const int *histogram) {
    for (int d = 1, count = 0; d < FARTHEST; d++)
        if ((count += histogram[d]) >= N_NEIGHBOURS) return d;
    return FARTHEST - 1;
}

/* The changes of signs that are allowed between two points, none first, and what they add to the squared distance. */
typedef struct {
    uint8_t flipped[1 + 8 + 28];
    int more[1 + 8 + 28], count;
} flip_list;

static void list_flips(flip_list *list, int which, const point_levels *g, int from, int to) {
    const int dims = codebooks[which].dims;
    const sign_rule allowed = codebooks[which].signs;
    list->count = 1;
    list->flipped[0] = 0;
    list->more[0] = 0;
    for (int i = 0; i < dims && allowed != SIGNS_STAY; i++)
        for (int j = allowed == SIGNS_FREE ? i : i + 1; j < dims; j++) {
            list->flipped[list->count] = (uint8_t)((1 << i) | (1 << j));
            list->more[list->count++] = 4 * g->levels[i][from] * g->levels[i][to] +
                                        (i != j) * 4 * g->levels[j][from] * g->levels[j][to];
        }
}

/* Squared distance of the farthest neighbours: first of those needed without changes of signs, then of all. */
static int farthest(int which, const point_levels *g, int from) {
    int unflipped[FARTHEST] = {0}, all[FARTHEST] = {0};
    for (int p = 0; p < codebooks[which].n_points; p++)
        if (g->distances[p] < FARTHEST) unflipped[g->distances[p]]++;
    const int limit = reach(unflipped);
    for (int p = 0; p < codebooks[which].n_points; p++) {
        flip_list list;
        if (g->distances[p] > limit) continue;
        list_flips(&list, which, g, from, p);
        for (int f = 0; f < list.count; f++)
            if (g->distances[p] + list.more[f] <= limit) all[g->distances[p] + list.more[f]]++;
    }
    return reach(all);
}

static void add_neighbour(int which, gfl_neighbours *m, int k, const point_levels *g, int from, int to,
                          unsigned flipped, int distance) {
    for (int i = 0; i < codebooks[which].dims; i++) {
        const int level = g->levels[i][to];
        m->offset[i * N_NEIGHBOURS + k] = (int8_t)((((flipped >> i) & 1) ? -level : level) - g->levels[i][from]);
    }
    m->inverse_square[k] = 1.0f / (float)distance;
    m->point[k] = (uint16_t)to;
    m->sign_flips[k] = (uint8_t)flipped;
}

/* Adds neighbours of distances in [low, high]; returns how many there are then. */
static int add_neighbours(int which, int count, const point_levels *g, int from, int low, int high) {
    for (int p = 0; p < codebooks[which].n_points; p++) {
        flip_list list;
        if (g->distances[p] > high) continue;
        list_flips(&list, which, g, from, p);
        for (int f = 0; f < list.count && count < N_NEIGHBOURS; f++) {
            const int distance = g->distances[p] + list.more[f];
            if (distance >= low && distance <= high)
                add_neighbour(which, codebooks[which].neighbours + from, count++, g, from, p, list.flipped[f],
                              distance);
        }
    }
    return count;
}

static void build(int which) {
    static point_levels levels; /* too large for a stack; one codebook is built at a time */
    point_levels *g = &levels;
    read_levels(which, g);
    for (int p = 0; p < codebooks[which].n_points; p++) {
        measure(which, g, p);
        const int last = farthest(which, g, p);
        const int count = add_neighbours(which, 0, g, p, 1, last - 1);
        add_neighbours(which, count, g, p, last, last);
    }
}

const gfl_neighbours *gfl_neighbours_of(int which) {
    static gfl_built built = {.lock = GFL_UNLOCKED};
    gfl_build_once(&built, which, build);
    return codebooks[which].neighbours;
}
