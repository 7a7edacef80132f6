#ifndef GFL_ROWS_F32_H
#define GFL_ROWS_F32_H
#include "base.h"
#include "lanes.h"

/* Operations on rows of floats, the same for all quant types. */

static uint32_t largest(const float *x, int64_t n) {
    const vi no_sign = vi_set1(0x7fffffff);
    vi m[4] = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int u = 0; u < 4; u++) m[u] = vi_max(m[u], vi_and(vf_as_vi(vf_load(x + i + u * LANES)), no_sign));
    int32_t lanes[LANES];
    vi_store(lanes, vi_max(vi_max(m[0], m[1]), vi_max(m[2], m[3])));
    uint32_t result = 0;
    for (int l = 0; l < LANES; l++)
        if ((uint32_t)lanes[l] > result) result = (uint32_t)lanes[l];
    for (; i < n; i++) {
        const uint32_t u = bits_of(x[i]) & 0x7fffffffu;
        if (u > result) result = u;
    }
    return result;
}

INLINE float largest_magnitude(const float *x, int n) {
    vf high = vf_zero();
    for (int i = 0; i < n; i += LANES) high = vf_max(vf_abs(vf_load(x + i)), high);
    return vf_hmax(high);
}

/* Register block of the product: PRODUCT_ROWS rows by PRODUCT_VECTORS vectors of columns. */
enum { PRODUCT_ROWS = 4, PRODUCT_VECTORS = 4, PRODUCT_COLUMNS = PRODUCT_VECTORS * LANES };

static inline __attribute__((always_inline)) void product_block(float *out, const float *a, const float *b, int n_rows,
                                                                int n_vectors, int64_t n_in, int64_t stride,
                                                                int64_t rank) {
    vf sum[PRODUCT_ROWS][PRODUCT_VECTORS];
    for (int r = 0; r < n_rows; r++)
        for (int v = 0; v < n_vectors; v++) sum[r][v] = vf_zero();
    for (int64_t k = 0; k < rank; k++)
        for (int v = 0; v < n_vectors; v++) {
            const vf column = vf_load(a + k * stride + v * LANES);
            for (int r = 0; r < n_rows; r++) sum[r][v] = vf_add(sum[r][v], vf_mul(vf_set1(b[r * rank + k]), column));
        }
    for (int r = 0; r < n_rows; r++)
        for (int v = 0; v < n_vectors; v++) vf_store(out + r * n_in + v * LANES, sum[r][v]);
}

static void product_rows(float *out, const float *a, const float *b, int64_t n_rows, int64_t columns, int64_t n_in,
                         int64_t stride, int64_t rank) {
    int64_t r = 0;
    for (; r + PRODUCT_ROWS <= n_rows; r += PRODUCT_ROWS) {
        float *row = out + r * n_in;
        const float *br = b + r * rank;
        int64_t c = 0;
        for (; c + PRODUCT_COLUMNS <= columns; c += PRODUCT_COLUMNS)
            product_block(row + c, a + c, br, PRODUCT_ROWS, PRODUCT_VECTORS, n_in, stride, rank);
        for (; c + LANES <= columns; c += LANES) product_block(row + c, a + c, br, PRODUCT_ROWS, 1, n_in, stride, rank);
    }
    for (; r < n_rows; r++) {
        int64_t c = 0;
        for (; c + PRODUCT_COLUMNS <= columns; c += PRODUCT_COLUMNS)
            product_block(out + r * n_in + c, a + c, b + r * rank, 1, PRODUCT_VECTORS, n_in, stride, rank);
        for (; c + LANES <= columns; c += LANES)
            product_block(out + r * n_in + c, a + c, b + r * rank, 1, 1, n_in, stride, rank);
    }
    for (int64_t c = columns / LANES * LANES; c < columns; c++)
        for (r = 0; r < n_rows; r++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < rank; k++) sum += b[r * rank + k] * a[k * stride + c];
            out[r * n_in + c] = sum;
        }
}

/* Floats of a panel: columns whose part of `a` stays in the first-level cache while all rows use it. */
enum { PANEL = 6144 };

/* Panels are packed: their rows in `a` are n_in floats apart, often a power of two, which the cache would map to the
 * same lines (measured: 15 % for AVX2; with AVX-512 the copy costs more than it saves). */
static void product(float *out, const float *a, const float *b, int64_t n_rows, int64_t n_in, int64_t rank) {
    float packed[PANEL];
    int64_t panel = PANEL / (rank ? rank : 1) / PRODUCT_COLUMNS * PRODUCT_COLUMNS;
    const int copies = LANES < 16 && panel > 0 && n_rows >= PRODUCT_ROWS;
    if (panel < PRODUCT_COLUMNS) panel = PRODUCT_COLUMNS;
    for (int64_t c = 0; c < n_in; c += panel) {
        const int64_t columns = n_in - c < panel ? n_in - c : panel;
        for (int64_t k = 0; copies && k < rank; k++)
            memcpy(packed + k * columns, a + k * n_in + c, (size_t)columns * sizeof *a);
        product_rows(out + c, copies ? packed : a + c, b, n_rows, columns, n_in, copies ? columns : n_in, rank);
    }
}

static void add(float *out, const float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = x[i] + y[i];
}

#endif
