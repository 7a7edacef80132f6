#ifndef GFL_GRIDS_H
#define GFL_GRIDS_H
#include <stdint.h>

/* The grids of the IQ1, IQ2 and IQ3 types: which combinations of levels eight (or four) weights may take together.
 *
 * A combination is packed as two (three) bits for each weight, the first in the low bits. Its index counts in base 3 (8), the
 * first weight the highest digit. Built when first asked for, by one thread; constant from then on. */

enum { GRID_IQ2_XXS, GRID_IQ2_XS, GRID_IQ2_S, GRID_IQ1, GRID_IQ3_XXS, GRID_IQ3_S, N_GRIDS };

/* Neighbours are listed in runs of this many, the last one repeated to fill them. */
enum { GRID_RUN = 16 };

typedef struct {
    const uint16_t *points; /* packed, by number */
    /* by index of a combination: the number of that point of the grid, or ~(first run << 8 | runs) of the neighbours it has */
    const int32_t *places;
    /* runs of packed points, those of a combination from near to far, at one distance by number. ggml considers the points at
     * the one, two or three smallest distances. */
    const uint16_t *neighbours;
} gfl_grid;

const gfl_grid *gfl_grid_of(int which);

/* The weights of every point: bytes, eight (four) for each number. */
const int8_t *gfl_grid_values(int which);

#endif
