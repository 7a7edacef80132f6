#ifndef GFL_ROWS_H
#define GFL_ROWS_H
#include "dispatch.h"

/* What all functions on rows share. They take rows in groups that stay in the second-level cache while they are worked
 * on. */

static const gfl_result done = {0, 0, GFL_DONE}, no_memory = {0, 0, GFL_NO_MEMORY}, unknown = {0, 0, GFL_UNKNOWN};

/* Rows that are worked on together. */
typedef struct {
    int64_t start; /* number of the first one in the call */
    int64_t n_rows, n_in;
} gfl_row_group;

/* How many rows make up about `floats` weights: a multiple of four, or all of them. */
int64_t gfl_rows_per_group(int64_t n_in, int64_t n_rows, int64_t floats);

/* The group of at most `rows_per_group` rows from row `start` on. */
gfl_row_group gfl_group_at(int64_t start, int64_t rows_per_group, int64_t n_rows, int64_t n_in);

/* The delta of a group of rows; a product goes to `scratch`. */
const float *gfl_delta_rows(const gfl_table *table, const gfl_delta *delta, float *scratch, const gfl_row_group *group);

/* The place of the first weight of a group that is NaN or infinite, with this status; done if there is none. */
gfl_result gfl_first_not_finite(const float *x, const gfl_row_group *group, int status);

/* What a search for scales weighs columns by. */
typedef struct {
    const float *imatrix; /* (n_in) or NULL */
    /* The bits of a magnitude from which on a scale may leave the range of halves (65504), so that what is written must
     * be read back and checked. With unusual importances any magnitude may. */
    uint32_t may_overflow;
} gfl_importance;

gfl_importance gfl_importance_of(const float *imatrix, int64_t n_in);

/* Quantizes one group of rows. */
gfl_result gfl_quantize_group(const gfl_table *table, int type, const float *x, uint8_t *out,
                              const gfl_row_group *group, const gfl_importance *importance);

/* The key of a row's random bits. */
uint64_t gfl_row_key(uint64_t key, int64_t row);

#endif
