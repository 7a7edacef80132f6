#ifndef GFL_SKETCH_H
#define GFL_SKETCH_H
#include "base.h"
#include "lanes.h"

/* Sketches of second moments: Y = sum of x (x^T omega) over columns x, with SKETCH random columns in omega. */

enum { SKETCH = 64, SKETCH_STRIPE = 16, SKETCH_PARTS = SKETCH_STRIPE / LANES, SKETCH_TOGETHER = 8, SKETCH_ROWS = 64 };

/* Adds to the sums of each of SKETCH_TOGETHER numbers left[r][offset] its product with a stripe of `right`. */
INLINE void add_outer(vf sums[SKETCH_TOGETHER][SKETCH_PARTS], const float *const *left, int64_t offset,
                      const float *right) {
    vf row[SKETCH_PARTS];
    for (int p = 0; p < SKETCH_PARTS; p++) row[p] = vf_load(right + p * LANES);
    for (int r = 0; r < SKETCH_TOGETHER; r++) {
        const vf factor = vf_set1(left[r][offset]);
        for (int p = 0; p < SKETCH_PARTS; p++) sums[r][p] = vf_add(sums[r][p], vf_mul(factor, row[p]));
    }
}

/* out (n_rows, SKETCH) = rows (n_rows, n_in) @ omega (n_in, SKETCH); n_rows a multiple of SKETCH_TOGETHER */
static void project_rows(float *out, const float *const *rows, int64_t n_rows, const float *omega, int64_t n_in) {
    for (int64_t r = 0; r < n_rows; r += SKETCH_TOGETHER)
        for (int k = 0; k < SKETCH; k += SKETCH_STRIPE) {
            vf sums[SKETCH_TOGETHER][SKETCH_PARTS];
            for (int i = 0; i < SKETCH_TOGETHER; i++)
                for (int p = 0; p < SKETCH_PARTS; p++) sums[i][p] = vf_zero();
            for (int64_t j = 0; j < n_in; j++) add_outer(sums, rows + r, j, omega + j * SKETCH + k);
            for (int i = 0; i < SKETCH_TOGETHER; i++)
                for (int p = 0; p < SKETCH_PARTS; p++) vf_store(out + (r + i) * SKETCH + k + p * LANES, sums[i][p]);
        }
}

/* sketch (n_in, SKETCH) += rows^T @ projected (n_rows, SKETCH); of the columns first ... first + SKETCH_TOGETHER */
INLINE void add_columns(float *sketch, const float *const *rows, int64_t n_rows, const float *projected, int64_t first,
                        int k) {
    vf sums[SKETCH_TOGETHER][SKETCH_PARTS];
    for (int i = 0; i < SKETCH_TOGETHER; i++)
        for (int p = 0; p < SKETCH_PARTS; p++) sums[i][p] = vf_load(sketch + (first + i) * SKETCH + k + p * LANES);
    for (int64_t r = 0; r < n_rows; r++) {
        const float *columns[SKETCH_TOGETHER];
        for (int i = 0; i < SKETCH_TOGETHER; i++) columns[i] = rows[r] + first + i;
        add_outer(sums, columns, 0, projected + r * SKETCH + k);
    }
    for (int i = 0; i < SKETCH_TOGETHER; i++)
        for (int p = 0; p < SKETCH_PARTS; p++) vf_store(sketch + (first + i) * SKETCH + k + p * LANES, sums[i][p]);
}

/* sketch (n_in, SKETCH) += sum over rows of x (x^T omega). n_in is a multiple of 8. */
static void add_to_sketch(float *sketch, const float *const *rows, int64_t n_rows, const float *omega, int64_t n_in) {
    float projected[SKETCH_ROWS * SKETCH];
    for (int64_t start = 0; start < n_rows; start += SKETCH_ROWS) {
        const float *some[SKETCH_ROWS];
        const int64_t n = n_rows - start < SKETCH_ROWS ? n_rows - start : SKETCH_ROWS;
        const int64_t padded = (n + SKETCH_TOGETHER - 1) / SKETCH_TOGETHER * SKETCH_TOGETHER;
        for (int64_t r = 0; r < padded; r++) some[r] = rows[start + (r < n ? r : n - 1)];
        project_rows(projected, some, padded, omega, n_in);
        for (int64_t j = 0; j + SKETCH_TOGETHER <= n_in; j += SKETCH_TOGETHER)
            for (int k = 0; k < SKETCH; k += SKETCH_STRIPE) add_columns(sketch, some, n, projected, j, k);
    }
}

#endif
