#include "neighbours.h"

#include <string.h>

enum { MAX_POINTS = 2048, FARTHEST = 8192 };

typedef enum { NO_FLIPS, ANY_FLIPS, EVEN_FLIPS } flips;

static gfl_moves moves_iq2_xxs[256], moves_iq2_xs[512], moves_iq2_s[1024], moves_iq1[2048], moves_iq3_xxs[256],
    moves_iq3_s[512];

static const struct {
    gfl_moves *moves;
    int n_points, dims, unit; /* of the levels */
    flips flips;
} grids[N_GRIDS] = {
    [GRID_IQ2_XXS] = {moves_iq2_xxs, 256, 8, 1, EVEN_FLIPS}, [GRID_IQ2_XS] = {moves_iq2_xs, 512, 8, 1, EVEN_FLIPS},
    [GRID_IQ2_S] = {moves_iq2_s, 1024, 8, 1, ANY_FLIPS},     [GRID_IQ1] = {moves_iq1, 2048, 8, 8, NO_FLIPS},
    [GRID_IQ3_XXS] = {moves_iq3_xxs, 256, 4, 1, EVEN_FLIPS}, [GRID_IQ3_S] = {moves_iq3_s, 512, 4, 1, ANY_FLIPS},
};

typedef struct {
    int16_t levels[8][MAX_POINTS]; /* by weight */
    int32_t distances[MAX_POINTS]; /* squared, from one of the points */
} grid_levels;

static void read_levels(int which, grid_levels *g) {
    const int dims = grids[which].dims;
    const int8_t *values = gfl_grid_values(which);
    for (int p = 0; p < grids[which].n_points; p++)
        for (int i = 0; i < dims; i++) g->levels[i][p] = (int16_t)(values[p * dims + i] * grids[which].unit);
}

static void measure(int which, grid_levels *g, int from) {
    memset(g->distances, 0, sizeof g->distances);
    for (int i = 0; i < grids[which].dims; i++)
        for (int p = 0; p < grids[which].n_points; p++) {
            const int away = g->levels[i][p] - g->levels[i][from];
            g->distances[p] += away * away;
        }
}

/* the distance within which a histogram counts N_MOVES */
static int reach(const int *histogram) {
    for (int d = 1, count = 0; d < FARTHEST; d++)
        if ((count += histogram[d]) >= N_MOVES) return d;
    return FARTHEST - 1;
}

/* The flips of a point's weights that are allowed, none first, and what they add to its squared distance. */
typedef struct {
    uint8_t flipped[1 + 8 + 28];
    int more[1 + 8 + 28], count;
} flip_list;

static void list_flips(flip_list *list, int which, const grid_levels *g, int from, int to) {
    const int dims = grids[which].dims;
    const flips allowed = grids[which].flips;
    list->count = 1;
    list->flipped[0] = 0;
    list->more[0] = 0;
    for (int i = 0; i < dims && allowed != NO_FLIPS; i++)
        for (int j = allowed == ANY_FLIPS ? i : i + 1; j < dims; j++) {
            list->flipped[list->count] = (uint8_t)(1 << i | 1 << j);
            list->more[list->count++] = 4 * g->levels[i][from] * g->levels[i][to] +
                                        (i != j) * 4 * g->levels[j][from] * g->levels[j][to];
        }
}

/* Squared distance of the farthest moves: that of the last that are needed without flips, then that of the last of
 * all. */
static int farthest(int which, const grid_levels *g, int from) {
    int plain[FARTHEST] = {0}, all[FARTHEST] = {0};
    for (int p = 0; p < grids[which].n_points; p++)
        if (g->distances[p] < FARTHEST) plain[g->distances[p]]++;
    const int limit = reach(plain);
    for (int p = 0; p < grids[which].n_points; p++) {
        flip_list list;
        if (g->distances[p] > limit) continue;
        list_flips(&list, which, g, from, p);
        for (int f = 0; f < list.count; f++)
            if (g->distances[p] + list.more[f] <= limit) all[g->distances[p] + list.more[f]]++;
    }
    return reach(all);
}

static void add_move(int which, gfl_moves *m, int k, const grid_levels *g, int from, int to, unsigned flipped,
                     int distance) {
    for (int i = 0; i < grids[which].dims; i++) {
        const int level = g->levels[i][to];
        m->by[i * N_MOVES + k] = (int8_t)((flipped >> i & 1 ? -level : level) - g->levels[i][from]);
    }
    m->inverse[k] = 1.0f / (float)distance;
    m->point[k] = (uint16_t)to;
    m->flips[k] = (uint8_t)flipped;
}

/* Adds moves of distances in [low, high]; returns how many there are then. */
static int add_moves(int which, int count, const grid_levels *g, int from, int low, int high) {
    for (int p = 0; p < grids[which].n_points; p++) {
        flip_list list;
        if (g->distances[p] > high) continue;
        list_flips(&list, which, g, from, p);
        for (int f = 0; f < list.count && count < N_MOVES; f++) {
            const int distance = g->distances[p] + list.more[f];
            if (distance >= low && distance <= high)
                add_move(which, grids[which].moves + from, count++, g, from, p, list.flipped[f], distance);
        }
    }
    return count;
}

static void build(int which) {
    static grid_levels levels; /* too large for a stack; one grid is built at a time */
    grid_levels *g = &levels;
    read_levels(which, g);
    for (int p = 0; p < grids[which].n_points; p++) {
        measure(which, g, p);
        const int last = farthest(which, g, p);
        const int count = add_moves(which, 0, g, p, 1, last - 1);
        add_moves(which, count, g, p, last, last);
    }
}

const gfl_moves *gfl_moves_of(int which) {
    static gfl_built built = {.lock = PTHREAD_MUTEX_INITIALIZER};
    gfl_build_once(&built, which, build);
    return grids[which].moves;
}
