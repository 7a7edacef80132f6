#ifndef GFL_NEIGHBOURS_H
#define GFL_NEIGHBOURS_H
#include <stdint.h>

#include "codebooks.h"

/* Where eight (or four) weights that lie on a point of a grid may move to: the nearest other places, which are points
 * and flips of signs. Weights count as magnitudes here, and those of IQ1 as they are, eightfold as its levels lie an
 * eighth apart from the shifts. Built when first asked for, by one thread; constant from then on. */

enum { N_MOVES = 64 };

typedef struct {
    int8_t by[8 * N_MOVES];  /* change of weight i by move k at i * N_MOVES + k */
    float inverse[N_MOVES];  /* 1 / squared length; 0 where there is no further move */
    uint16_t point[N_MOVES]; /* number of the point to move to */
    uint8_t flips[N_MOVES];  /* bit i: weight i changes its sign */
} gfl_moves;

/* Those from each point, by number. At most two weights flip at once; on the grids of types that keep seven signs of
 * eight weights two or none. */
const gfl_moves *gfl_moves_of(int which);

#endif
