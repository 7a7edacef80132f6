#ifndef GFL_K_QUANTS_H
#define GFL_K_QUANTS_H
#include "base.h"
#include "batch.h"
#include "lanes.h"
#include "search_scale.h"

/* K-quants: super-blocks, their sub-blocks fitted a batch at a time. */

enum { BATCH_SUPERS = BATCH / SUPER };

/* Defines quantize_NAME over batch_NAME(x, imatrix or NULL, blocks, number of blocks up to BATCH_SUPERS). An imatrix
 * belongs to one row, so with it batches end with the row. */
#define QUANTIZE_SUPERS(NAME, block)                                                                                \
    static void quantize_##NAME(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) { \
        const int64_t rows = imatrix ? n_rows : 1, n = imatrix ? n_in : n_rows * n_in;                              \
        block *y = (block *)out;                                                                                    \
        for (int64_t row = 0; row < rows; row++)                                                                    \
            for (int64_t i = 0; i < n; i += BATCH) {                                                                \
                const int count = (int)((n - i < BATCH ? n - i : BATCH) / SUPER);                                   \
                batch_##NAME(x + row * n + i, imatrix ? imatrix + i : NULL, y, count);                              \
                y += count;                                                                                         \
            }                                                                                                       \
    }

/* w = root mean square + |x|, ggml's importance of a weight without an imatrix. */
INLINE void default_importance(lanes_of_32 *w, const lanes_of_32 *x, int n) {
    vf sum[GROUPS];
    EACH_GROUP sum[g] = vf_zero();
    for (int i = 0; i < n; i++) EACH_GROUP sum[g] = vf_add(sum[g], vf_mul(x[g][i], x[g][i]));
    EACH_GROUP {
        const vf mean = vf_sqrt(vf_div(sum[g], vf_set1((float)n)));
        for (int i = 0; i < n; i++) w[g][i] = vf_add(mean, vf_abs(x[g][i]));
    }
}

/* sigma2[j] = factor * mean square of the super-block that sub-block j of a batch belongs to */
static inline void spread_mean_squares(float *sigma2, const float *x, int count, int sub, float factor) {
    float sums[BATCH_SUPERS];
    sums_of_squares(sums, x, count, SUPER);
    for (int j = 0; j < count * (SUPER / sub); j++) sigma2[j] = factor * sums[j * sub / SUPER] / (float)SUPER;
}

/* Codes of a super-block, clamp(nearest((x + offset) / d)) - low with d and offset (or NULL) of each sub-block. Where d
 * is 0 they mean nothing. */
INLINE void divide_codes(uint8_t *codes, const float *x, int sub, const float *offset, const float *d, int low,
                         int high) {
    for (int i = 0; i < SUPER; i += 4 * LANES) {
        vi q[4];
        for (int k = 0; k < 4; k++) {
            const int at = i + k * LANES;
            const vf v = offset ? vf_add(vf_load(x + at), vf_set1(offset[at / sub])) : vf_load(x + at);
            q[k] = vi_sub(vf_nearest(vf_div(v, vf_set1(d[at / sub]))), vi_set1(low));
        }
        vi_store_limited(codes + i, q, high - low);
    }
}

/* Codes of n values by the largest of them: nearest(v * q_max / max), a byte in ggml, at most `top`; scale is
 * max / q_max. */
INLINE void scales_by_largest(vf *scale, vi *q, const vf *v, int n, int q_max, int top) {
    const vf zero = vf_zero(), levels = vf_set1((float)q_max);
    vf max = zero;
    for (int i = 0; i < n; i++) max = vf_max(v[i], max);
    const vf inverse_max = vf_select(vf_gt(max, zero), vf_div(levels, max), zero);
    for (int i = 0; i < n; i++)
        q[i] = vi_min(vi_and(vf_nearest(vf_mul(inverse_max, v[i])), vi_set1(255)), vi_set1(top));
    *scale = vf_div(max, levels);
}

/* Quantizes the scales (or minima) of the super-blocks of a batch, `subs` each: codes and unit of each super-block.
 * With the importances w of the sub-blocks they are fitted; without (NULL) only the largest counts. */
INLINE void batch_units(uint8_t (*codes)[16], float *units, const float *v, const float *w, int count, int subs,
                        int q_max, int top) {
    for (int b = 0; b < count; b += LANES) {
        vf lanes[16], weights[16], scale;
        vi q[16];
        uint8_t q_lanes[16][LANES];
        float unit[LANES];
        load_lanes(lanes, v + b * subs, subs);
        if (w) {
            load_lanes(weights, w + b * subs, subs);
            fit_scales(&scale, q, lanes, weights, subs, q_max);
        } else {
            scales_by_largest(&scale, q, lanes, subs, q_max, top);
        }
        for (int j = 0; j < subs; j++) vi_store_u8(q_lanes[j], q[j]);
        vf_store(unit, scale);
        for (int l = 0; l < LANES && b + l < count; l++) {
            units[b + l] = unit[l];
            for (int j = 0; j < subs; j++) codes[b + l][j] = q_lanes[j][l];
        }
    }
}

static inline float largest_of(const float *v, int n) {
    float max = 0.0f;
    for (int j = 0; j < n; j++) max = v[j] > max ? v[j] : max;
    return max;
}

/* The value of largest magnitude, the first of equals. */
static inline float peak_of(const float *v, int n) {
    float peak = 0.0f, amax = 0.0f;
    for (int j = 0; j < n; j++)
        if (fabsf(v[j]) > amax) {
            amax = fabsf(v[j]);
            peak = v[j];
        }
    return peak;
}

/* Defines batch_NAME for QUANTIZE_SUPERS over super_NAME; sigma2 = factor * mean square of the super-block. */
#define BATCH_OF_SUPERS(NAME, block, factor)                                                     \
    static void batch_##NAME(const float *x, const float *imatrix, block *y, int count) {        \
        float sigma2[BATCH_SUPERS];                                                              \
        spread_mean_squares(sigma2, x, count, SUPER, factor);                                    \
        for (int b = 0; b < count; b++)                                                          \
            super_##NAME(x + SUPER * b, imatrix ? imatrix + SUPER * b : NULL, y + b, sigma2[b]); \
    }                                                                                            \
    QUANTIZE_SUPERS(NAME, block)

/* Two-bit codes as Q2_K and Q3_K store them. */
static inline void pack_pairs(uint8_t *qs, const uint8_t *codes) {
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 32; j++) {
            const uint8_t *c = codes + 128 * h + j;
            qs[32 * h + j] = (uint8_t)((c[0] & 3) | ((c[32] & 3) << 2) | ((c[64] & 3) << 4) | ((c[96] & 3) << 6));
        }
}

#endif
