#ifndef GFL_ROWS_H
#define GFL_ROWS_H
#include "dispatch.h"

static const gfl_result done = {0, 0, GFL_DONE}, no_memory = {0, 0, GFL_NO_MEMORY}, unknown = {0, 0, GFL_UNKNOWN};

/* The bits of a magnitude above which a scale may leave half precision's range (65504): what was written is then read
 * back and checked. With unusual importances any magnitude may. */
uint32_t gfl_suspicious(const float *imatrix, int64_t n_in);

/* Rows that make up about `floats` weights, a multiple of four or all of them. */
int64_t gfl_rows_per_group(int64_t n_in, int64_t n_rows, int64_t floats);

/* The change of `n_rows` rows from `row` on; a product goes to `room`. */
const float *gfl_delta_rows(const gfl_table *table, const gfl_delta *delta, float *room, int64_t row, int64_t n_rows,
                            int64_t n_in);

/* the key of a row's random bits */
uint64_t gfl_row_key(uint64_t key, int64_t row);

gfl_result gfl_first_not_finite(const float *x, int64_t n_rows, int64_t n_in, int64_t row, int status);

/* Quantizes one group of rows; `row` is its first row's number in the call. */
gfl_result gfl_quantize_group(const gfl_table *table, int type, const float *x, int64_t n_rows, int64_t n_in,
                              const float *imatrix, uint8_t *out, int64_t row, uint32_t suspicious);

#endif
