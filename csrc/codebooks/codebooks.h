#ifndef GFL_CODEBOOKS_H
#define GFL_CODEBOOKS_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

/* The grids of the IQ1, IQ2 and IQ3 types: which combinations of levels eight (or four) weights may take together.
 *
 * A combination is packed as four bits for each weight, the first one's in the low bits: the level of weight i, and
 * above it the low bits of i, so that the four bits are a place in a table of 16 with a part for each of four (two)
 * weights. The index of a combination counts in base 3 (8), the first weight the highest digit. Built when first asked
 * for, by one thread; constant from then on. */

enum { GRID_IQ2_XXS, GRID_IQ2_XS, GRID_IQ2_S, GRID_IQ1, GRID_IQ3_XXS, GRID_IQ3_S, N_GRIDS };

/* Lists of neighbours are filled up to a multiple of this by repeating the last one. */
enum { GRID_RUN = 16 };

typedef struct {
    const uint32_t *points; /* packed, by number */
    /* by index of a combination: the number of that point of the grid, or ~(start / GRID_RUN << 8 | eights) of the list
     * of neighbours it has, where `eights` is the length in eights, rounded up */
    const int32_t *places;
    /* The same with shorter lists, which leave out what cannot be the best neighbour where every weight divided by its
     * scale is at least 4e-5 away from the middle of two levels: points that another one on the list beats or equals in
     * every weight. Not for IQ1. */
    const int32_t *short_places;
    /* packed points, those of a combination from near to far, at one distance by number. ggml considers the points at
     * the one, two or three smallest distances. */
    const uint32_t *neighbours;
} gfl_grid;

const gfl_grid *gfl_grid_of(int which);

/* Which of some tables, one a grid, are built. */
typedef struct {
    pthread_mutex_t lock;
    atomic_bool is_built[N_GRIDS];
} gfl_built;

/* Have the table of a grid built, unless it is, one at a time; returns when it is, whichever thread builds it. */
void gfl_build_once(gfl_built *built, int which, void (*build)(int which));

/* The weights of every point: bytes, eight (four) for each number. */
const int8_t *gfl_grid_values(int which);

#endif
