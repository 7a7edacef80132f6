#ifndef GFL_NEIGHBOURS_H
#define GFL_NEIGHBOURS_H
#include <stdint.h>

#include "codebooks.h"

/* Where a vector, eight (or four) weights that lie on a point of a codebook, may go: the nearest other places, each a
 * point and a change of signs. Weights count as magnitudes here; those of IQ1, which has no signs, count as they are,
 * times eight, as its levels lie an eighth apart from the shifts. Built when first asked for, by one thread; constant
 * from then on. */

enum { N_NEIGHBOURS = 64 };

typedef struct {
    int8_t offset[8 * N_NEIGHBOURS];    /* by neighbour k, weight i changes by offset[i * N_NEIGHBOURS + k] */
    float inverse_square[N_NEIGHBOURS]; /* 1 / squared distance; 0 where there are no more */
    uint16_t point[N_NEIGHBOURS];       /* its number */
    uint8_t sign_flips[N_NEIGHBOURS];   /* bit i: weight i changes its sign */
} gfl_neighbours;

/* The neighbours of each point, by its number. At most two signs change at once; in codebooks of types that keep seven
 * signs of eight weights, two or none. */
const gfl_neighbours *gfl_neighbours_of(int which);

#endif
