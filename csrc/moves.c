#include "moves.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_POINTS = 2048, FARTHEST = 8192 };

typedef enum { NO_FLIPS, ANY_FLIPS, EVEN_FLIPS } flips;

static gfl_moves moves_iq2_xxs[256], moves_iq2_xs[512], moves_iq2_s[1024], moves_iq1[2048], moves_iq3_xxs[256], moves_iq3_s[512];

static const struct {
    gfl_moves *moves;
    int n_points, dims, unit; /* of the levels */
    flips flips;
} grids[N_GRIDS] = {
    [GRID_IQ2_XXS] = {moves_iq2_xxs, 256, 8, 1, EVEN_FLIPS}, [GRID_IQ2_XS] = {moves_iq2_xs, 512, 8, 1, EVEN_FLIPS},
    [GRID_IQ2_S] = {moves_iq2_s, 1024, 8, 1, ANY_FLIPS},     [GRID_IQ1] = {moves_iq1, 2048, 8, 8, NO_FLIPS},
    [GRID_IQ3_XXS] = {moves_iq3_xxs, 256, 4, 1, EVEN_FLIPS}, [GRID_IQ3_S] = {moves_iq3_s, 512, 4, 1, ANY_FLIPS},
};

/* A grid's levels by weight, and which weights of each point have the lowest one. */
typedef struct {
    int16_t levels[8][MAX_POINTS];
    uint8_t low[MAX_POINTS];
    int lowest;
} grid_levels;

static void read_levels(int which, grid_levels *g) {
    const int dims = grids[which].dims, n = grids[which].n_points;
    const int8_t *values = gfl_grid_values(which);
    g->lowest = 127;
    for (int p = 0; p < n; p++)
        for (int i = 0; i < dims; i++) {
            g->levels[i][p] = (int16_t)(values[p * dims + i] * grids[which].unit);
            if (g->levels[i][p] < g->lowest) g->lowest = g->levels[i][p];
        }
    for (int p = 0; p < n; p++) {
        g->low[p] = 0;
        for (int i = 0; i < dims; i++) g->low[p] |= (uint8_t)((g->levels[i][p] == g->lowest) << i);
    }
}

static void measure(int which, int32_t *distances, const grid_levels *g, int from) {
    memset(distances, 0, sizeof *distances * (size_t)grids[which].n_points);
    for (int i = 0; i < grids[which].dims; i++)
        for (int p = 0; p < grids[which].n_points; p++) {
            const int away = g->levels[i][p] - g->levels[i][from];
            distances[p] += away * away;
        }
}

/* ways to flip n = 0, 1, 2 of `low` weights */
static int ways(flips allowed, int n, int low) {
    if (n == 0) return 1;
    if (allowed == NO_FLIPS || (allowed == EVEN_FLIPS && n == 1)) return 0;
    return n == 1 ? low : low * (low - 1) / 2;
}

/* the distance within which there are at least N_MOVES places, or FARTHEST - 1 */
static int reach(int which, const int32_t *distances, const grid_levels *g, int from) {
    int histogram[FARTHEST] = {0}, flip = 4 * g->lowest * g->lowest;
    for (int p = 0; p < grids[which].n_points; p++)
        for (int n = 0, d = distances[p]; n <= 2 && d < FARTHEST; n++, d += flip)
            histogram[d] += ways(grids[which].flips, n, __builtin_popcount(g->low[p] & g->low[from]));
    histogram[0] = 0; /* itself */
    for (int d = 1, count = 0; d < FARTHEST; d++)
        if ((count += histogram[d]) >= N_MOVES) return d;
    return FARTHEST - 1;
}

static void add_move(int which, gfl_moves *m, int k, const grid_levels *g, int from, int to, unsigned flipped, int distance) {
    for (int i = 0; i < grids[which].dims; i++) {
        const int level = g->levels[i][to];
        m->by[i * N_MOVES + k] = (int8_t)((flipped >> i & 1 ? -level : level) - g->levels[i][from]);
    }
    m->inverse[k] = 1.0f / (float)distance;
    m->point[k] = (uint16_t)to;
    m->flips[k] = (uint8_t)flipped;
}

/* Adds moves of one length, or with `shorter` of all lengths below it; returns how many there are then. */
static int add_moves(int which, int count, const int32_t *distances, const grid_levels *g, int from, int length, int shorter) {
    const int flip = 4 * g->lowest * g->lowest;
    const flips allowed = grids[which].flips;
    for (int p = 0; p < grids[which].n_points; p++) {
        const unsigned low = g->low[p] & g->low[from];
        for (unsigned flipped = 0; flipped <= low && distances[p] <= length && count < N_MOVES; flipped = ((flipped | ~low) + 1) & low) {
            const int n = __builtin_popcount(flipped), d = distances[p] + n * flip;
            if (n <= 2 && d && (shorter ? d < length : d == length) && ways(allowed, n, 2))
                add_move(which, grids[which].moves + from, count++, g, from, p, flipped, d);
            if (flipped == low) break;
        }
    }
    return count;
}

static void build(int which) {
    static grid_levels levels[N_GRIDS];
    grid_levels *g = levels + which;
    read_levels(which, g);
    for (int p = 0; p < grids[which].n_points; p++) {
        int32_t distances[MAX_POINTS];
        measure(which, distances, g, p);
        const int length = reach(which, distances, g, p);
        const int count = add_moves(which, 0, distances, g, p, length, 1);
        add_moves(which, count, distances, g, p, length, 0);
    }
}

static void build_iq2_xxs(void) { build(GRID_IQ2_XXS); }
static void build_iq2_xs(void) { build(GRID_IQ2_XS); }
static void build_iq2_s(void) { build(GRID_IQ2_S); }
static void build_iq1(void) { build(GRID_IQ1); }
static void build_iq3_xxs(void) { build(GRID_IQ3_XXS); }
static void build_iq3_s(void) { build(GRID_IQ3_S); }

const gfl_moves *gfl_moves_of(int which) {
    static pthread_once_t once[N_GRIDS] = {PTHREAD_ONCE_INIT, PTHREAD_ONCE_INIT, PTHREAD_ONCE_INIT,
                                           PTHREAD_ONCE_INIT, PTHREAD_ONCE_INIT, PTHREAD_ONCE_INIT};
    static void (*const builders[N_GRIDS])(void) = {build_iq2_xxs, build_iq2_xs, build_iq2_s, build_iq1, build_iq3_xxs, build_iq3_s};
    pthread_once(&once[which], builders[which]);
    return grids[which].moves;
}
