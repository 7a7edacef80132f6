#ifndef GFL_TABLE_H
#define GFL_TABLE_H
#include <stdint.h>

/* What one instruction set offers. Quantize works on whole rows because some searches weigh by row statistics;
 * dequantize on a run of n weights (a whole number of blocks). */

typedef void quantize_fn(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix);
typedef void dequantize_fn(const uint8_t *src, float *out, int64_t n);

typedef struct {
    quantize_fn *quantize;
    dequantize_fn *dequantize;
} gfl_pair;

enum {
#define GFL_TYPE(name, id, weights, block, needs_imatrix) GFL_##name,
#include "../types.def"
#undef GFL_TYPE
    GFL_N_TYPES
};

typedef struct {
    /* largest absolute value of x[0..n) as the bits of a float; >= 0x7f800000 if any is NaN or infinite */
    uint32_t (*largest)(const float *x, int64_t n);
    /* w (n_rows, n_in) += b (n_rows, rank) @ a (rank, n_in) */
    void (*add_product)(float *w, const float *a, const float *b, int64_t n_rows, int64_t n_in, int64_t rank);
    gfl_pair types[GFL_N_TYPES];
} gfl_table;

extern const gfl_table gfl_scalar, gfl_avx2, gfl_avx512, gfl_neon;

#endif
