#ifndef GFL_CODEBOOKS_H
#define GFL_CODEBOOKS_H
#include <stdatomic.h>
#include <stdint.h>

#include "../lock.h"

/* The codebooks of the IQ1, IQ2 and IQ3 types: which combinations of levels eight (or four) weights may take together.
 * ggml calls them grids, and a combination that is in one a point.
 *
 * A combination is packed in four bits for each weight, the first weight's lowest: the weight's level, and above it the
 * low bits of the weight's number, so that the four bits are a place in a table of 16 with a part for each of four
 * (two) weights. The index of a combination counts in base 3 (8), the first weight the highest digit. Tables are built
 * when first asked for, by one thread, and constant from then on. */

enum { CODEBOOK_IQ2_XXS, CODEBOOK_IQ2_XS, CODEBOOK_IQ2_S, CODEBOOK_IQ1, CODEBOOK_IQ3_XXS, CODEBOOK_IQ3_S, N_CODEBOOKS };

/* Lists of candidates are filled up to a multiple of this by repeating the last one. */
enum { CANDIDATE_RUN = 16 };

typedef struct {
    const uint32_t *points; /* packed, by number */
    /* By index of a combination: the number of its point, or ~(start / CANDIDATE_RUN << 8 | eights) of its list of
     * candidates, which is that many eights long, rounded up. */
    const int32_t *places;
    /* The same with shorter lists for weights that, divided by their scale, are each at least 4e-5 away from the middle
     * of two levels: without the points that another one on the list beats or equals in every weight, which cannot be
     * the best then. Not for IQ1. */
    const int32_t *short_places;
    /* Packed points that ggml considers for a combination that is no point: those at the one, two or three smallest
     * distances, from near to far, at one distance by number. */
    const uint32_t *candidates;
} gfl_codebook;

const gfl_codebook *gfl_codebook_of(int which);

/* Which tables of one kind are built, one for each codebook. */
typedef struct {
    gfl_lock lock;
    atomic_bool is_built[N_CODEBOOKS];
} gfl_built;

/* Builds the table of a codebook unless it is built, one at a time; returns when it is, whichever thread builds it. */
void gfl_build_once(gfl_built *built, int which, void (*build)(int which));

/* The weights of every point as bytes, eight (four) for each number. */
const int8_t *gfl_codebook_values(int which);

/* For each point of IQ1's codebook, and after those for each again: its eight levels p as 8 p + 1, then as 8 p - 1. */
const int8_t *gfl_eighths_iq1(void);

#endif
