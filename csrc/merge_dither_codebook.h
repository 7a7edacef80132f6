#ifndef GFL_MERGE_DITHER_CODEBOOK_H
#define GFL_MERGE_DITHER_CODEBOOK_H
#include "rows.h"

/* gfl_fit_grids and gfl_dither_rows of the types on grids (IQ1, IQ2, IQ3). */

int gfl_is_vector_type(int type_id);

gfl_result gfl_fit_vectors(int isa, int type_id, const uint8_t *src, uint8_t *dst, int64_t n_rows, int64_t n_in,
                           const gfl_delta *delta, const float *imatrix, double *sums, int64_t *n_new);

gfl_result gfl_dither_vector_rows(int isa, int type_id, const uint8_t *src, uint8_t *dst, int64_t n_rows, int64_t n_in,
                                  const gfl_delta *delta, float gain, uint64_t key, int64_t first_row, double *sums);

#endif
