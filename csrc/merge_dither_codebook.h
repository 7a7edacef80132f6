#ifndef GFL_MERGE_DITHER_CODEBOOK_H
#define GFL_MERGE_DITHER_CODEBOOK_H
#include "rows.h"

/* gfl_choose_scales and gfl_round_stochastic of codebook types (IQ1, IQ2, IQ3). */

int gfl_uses_codebook(int type_id);

gfl_result gfl_choose_codebook_scales(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                                      const float *imatrix, double *sums, int64_t *n_new);

gfl_result gfl_round_codebook_stochastic(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                                         const gfl_draw *draw, double *sums);

#endif
