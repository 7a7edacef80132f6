#ifndef GFL_BATCH_H
#define GFL_BATCH_H
#include "base.h"
#include "lanes.h"
#include "search_scale.h"

/* Fitting many sub-blocks: stretches of weights cut into tiles whose sub-blocks fill any number of lanes. */

enum {
    AT_ONCE = LANES * GROUPS,
    TILE = 1024,
    BATCH = 4096,
    MAX_FITS = BATCH / 16,
    FITS_CAPACITY = MAX_FITS + 16 * AT_ONCE
};

/* Fits of the sub-blocks of up to BATCH weights; `min` is negated as the K-quants store it. The space behind them is
 * for lanes without a sub-block, and for loading 16 fits into each lane. */
typedef struct {
    float scale[FITS_CAPACITY], min[FITS_CAPACITY], code_scale[FITS_CAPACITY], code_min[FITS_CAPACITY],
        sum_w[FITS_CAPACITY];
} batch_fit;

/* The TILE weights from x on; if there are fewer than that, a copy followed by zeros. */
static inline const float *tile_of(float *copy, const float *x, int64_t left) {
    if (left >= TILE) return x;
    memcpy(copy, x, (size_t)left * sizeof *x);
    memset(copy + left, 0, (size_t)(TILE - left) * sizeof *x);
    return copy;
}

/* out[i] lane l = weight i of sub-block l */
INLINE void load_lanes(vf *out, const float *x, int n) {
    for (int i = 0; i < n; i += LANES) vf_transpose(out + i, x + i, n);
}

INLINE void load_groups(lanes_of_32 *out, const float *x, int n) {
    EACH_GROUP load_lanes(out[g], x + g * LANES * n, n);
}

INLINE void store_fit(batch_fit *fits, int first, const lane_fit *fit) {
    EACH_GROUP {
        vf_store(fits->scale + first + g * LANES, fit[g].scale);
        vf_store(fits->min + first + g * LANES, vf_neg(fit[g].min));
        vf_store(fits->code_scale + first + g * LANES, fit[g].code_scale);
        vf_store(fits->code_min + first + g * LANES, fit[g].code_min);
        vf_store(fits->sum_w + first + g * LANES, fit[g].sum_w);
    }
}

/* sums[i] = the squares of x[i * n .. (i + 1) * n) summed in order. One sum takes the latency of its additions, so
 * several run side by side. */
static void sums_of_squares(float *sums, const float *x, int64_t count, int64_t n) {
    int64_t i = 0;
    for (; LANES > 1 && n % LANES == 0 && i + LANES <= count; i += LANES) {
        vf sum = vf_zero();
        for (int64_t j = 0; j < n; j += LANES) {
            vf v[LANES];
            vf_transpose(v, x + i * n + j, n);
            for (int l = 0; l < LANES; l++) sum = vf_add(sum, vf_mul(v[l], v[l]));
        }
        vf_store(sums + i, sum);
    }
    for (; i + 4 <= count; i += 4) {
        const float *p = x + i * n;
        float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
        for (int64_t j = 0; j < n; j++) {
            a += p[j] * p[j];
            b += p[j + n] * p[j + n];
            c += p[j + 2 * n] * p[j + 2 * n];
            d += p[j + 3 * n] * p[j + 3 * n];
        }
        sums[i] = a, sums[i + 1] = b, sums[i + 2] = c, sums[i + 3] = d;
    }
    for (; i < count; i++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < n; j++) sum += x[i * n + j] * x[i * n + j];
        sums[i] = sum;
    }
}

/* w = imatrix * sqrt(sigma2 + x^2), ggml's importance of a weight; imatrix as it lies in memory, sigma2 of every lane's
 * sub-block. */
INLINE void importance_of_lanes(vf *w, const vf *x, const float *imatrix, vf sigma2, int n) {
    load_lanes(w, imatrix, n);
    for (int i = 0; i < n; i++) w[i] = vf_mul(w[i], vf_sqrt(vf_add(sigma2, vf_mul(x[i], x[i]))));
}

/* The same for all groups; sigma2 of every sub-block. */
INLINE void measured_importance(lanes_of_32 *w, const lanes_of_32 *x, const float *imatrix, const float *sigma2,
                                int n) {
    EACH_GROUP importance_of_lanes(w[g], x[g], imatrix + g * LANES * n, vf_load(sigma2 + g * LANES), n);
}

/* codes = clamp(nearest(code_scale * (x - code_min))) - low, those of the search itself. */
INLINE void search_codes(uint8_t *codes, const float *x, int n, float code_scale, float code_min, int low, int high) {
    for (int i = 0; i < n; i += LANES) {
        const vi q = vf_nearest(vf_mul(vf_set1(code_scale), vf_sub(vf_load(x + i), vf_set1(code_min))));
        vi_store_u8(codes + i, vi_sub(vi_clamp(q, low, high), vi_set1(low)));
    }
}

/* The same where the code -low stands for zero; a sub-block of zeros has codes 0 nevertheless, as in ggml. */
INLINE void signed_search_codes(uint8_t *codes, const float *x, int n, float code_scale, int low, int high) {
    if (code_scale != 0.0f) search_codes(codes, x, n, code_scale, 0.0f, low, high);
    else memset(codes, 0, (size_t)n);
}

#endif
