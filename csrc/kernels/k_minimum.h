#ifndef GFL_K_MINIMUM_H
#define GFL_K_MINIMUM_H
#include "../block_formats.h"
#include "base.h"
#include "batch.h"
#include "k_quants.h"
#include "lanes.h"
#include "search_scale.h"

/* Q2_K, Q4_K, Q5_K: sub-blocks with a scale and a minimum. */

/* Fits all sub-blocks of `count` super-blocks. */
INLINE void fit_minimum(batch_fit *fits, const float *x, const float *imatrix, int count, int sub, int q_max,
                        float first, int last) {
    float sigma2[MAX_FITS + AT_ONCE], x_copy[TILE], imatrix_copy[TILE];
    const int n = count * SUPER;
    if (imatrix) spread_mean_squares(sigma2, x, count, sub, sub == 32 ? 2.0f : 1.0f);
    for (int i = 0; i < n; i += TILE) {
        const float *tile = tile_of(x_copy, x + i, n - i);
        const float *tile_imatrix = imatrix ? tile_of(imatrix_copy, imatrix + i, n - i) : NULL;
        for (int j = 0; j < TILE / sub; j += AT_ONCE) {
            lanes_of_32 lanes[GROUPS], w[GROUPS];
            lane_fit fit[GROUPS];
            load_groups(lanes, tile + sub * j, sub);
            if (imatrix) {
                measured_importance(w, lanes, tile_imatrix + sub * j, sigma2 + i / sub + j, sub);
                fit_min(fit, lanes, w, sub, (min_trials){q_max, -0.9f, 0.05f, 36, 0, 0});
            } else if (sub == 16) {
                EACH_GROUP
                    for (int k = 0; k < sub; k++) w[g][k] = vf_abs(lanes[g][k]);
                fit_min(fit, lanes, w, sub, (min_trials){q_max, first, 0.1f, last, 1, 0});
            } else {
                default_importance(w, lanes, sub);
                fit_min(fit, lanes, w, sub, (min_trials){q_max, first, 0.1f, last, 0, LANES >= 16});
            }
            store_fit(fits, i / sub + j, fit);
        }
    }
}

/* The scales and minima of one super-block: their units and codes. */
typedef struct {
    f16 d, dmin;
    const uint8_t *s, *m;
} super_scales;

/* The codes of one super-block under given scales; `first` is its first sub-block in fits. */
INLINE void codes_minimum(uint8_t *codes, const float *x, const super_scales scales, const batch_fit *fits, int first,
                          int sub, int q_max) {
    const float scale = half_to_float(scales.d), min = half_to_float(scales.dmin);
    float dj[16], offset[16];
    for (int j = 0; j < SUPER / sub; j++) {
        dj[j] = scale * (float)scales.s[j];
        offset[j] = min * (float)scales.m[j];
    }
    divide_codes(codes, x, sub, offset, dj, 0, q_max);
    for (int j = 0; j < SUPER / sub; j++)
        if (dj[j] == 0.0f)
            search_codes(codes + sub * j, x + sub * j, sub, fits->code_scale[first + j], fits->code_min[first + j], 0,
                         q_max);
}

/* Q4_K and Q5_K: eight sub-blocks of 32, scale and minimum of six bits each */

static inline void pack_scales_6(uint8_t *packed, const uint8_t *s, const uint8_t *m) {
    for (int j = 0; j < 4; j++) {
        packed[j] = (uint8_t)(s[j] | ((s[j + 4] >> 4) << 6));
        packed[j + 4] = (uint8_t)(m[j] | ((m[j + 4] >> 4) << 6));
        packed[j + 8] = (uint8_t)((s[j + 4] & 15) | ((m[j + 4] & 15) << 4));
    }
}

static inline void unpack_scales_6(uint8_t *s, uint8_t *m, const uint8_t *packed) {
    for (int j = 0; j < 4; j++) {
        s[j] = packed[j] & 63;
        m[j] = packed[j + 4] & 63;
        s[j + 4] = (uint8_t)((packed[j + 8] & 15) | ((packed[j] >> 6) << 4));
        m[j + 4] = (uint8_t)((packed[j + 8] >> 4) | ((packed[j + 4] >> 6) << 4));
    }
}

/* Codes and units of scales and minima of all super-blocks of a batch. */
typedef struct {
    uint8_t s[BATCH_SUPERS][16], m[BATCH_SUPERS][16];
    float d[BATCH_SUPERS], dmin[BATCH_SUPERS];
} batch_scales;

INLINE void quantize_scales(batch_scales *scales, const batch_fit *fits, int count, int subs, int q_max, int top,
                            int measured) {
    const float *importance = measured ? fits->sum_w : NULL;
    batch_units(scales->s, scales->d, fits->scale, importance, count, subs, q_max, top);
    batch_units(scales->m, scales->dmin, fits->min, importance, count, subs, q_max, top);
}

static inline void pack_nibble_rows(uint8_t *qs, const uint8_t *codes) {
    for (int p = 0; p < 4; p++)
        for (int j = 0; j < 32; j++)
            qs[32 * p + j] = (uint8_t)((codes[64 * p + j] & 15) | (codes[64 * p + 32 + j] << 4));
}

static void batch_Q4_K(const float *x, const float *imatrix, block_q4_K *y, int count) {
    batch_fit fits;
    batch_scales scales;
    fit_minimum(&fits, x, imatrix, count, 32, 15, -1.0f, 20);
    quantize_scales(&scales, &fits, count, 8, 63, 63, imatrix != NULL);
    for (int b = 0; b < count; b++) {
        uint8_t codes[SUPER];
        y[b].d = float_to_half(scales.d[b]);
        y[b].dmin = float_to_half(scales.dmin[b]);
        pack_scales_6(y[b].scales, scales.s[b], scales.m[b]);
        codes_minimum(codes, x + SUPER * b, (super_scales){y[b].d, y[b].dmin, scales.s[b], scales.m[b]}, &fits, 8 * b,
                      32, 15);
        pack_nibble_rows(y[b].qs, codes);
    }
}
QUANTIZE_SUPERS(Q4_K, block_q4_K)

static void pack_codes_Q5_K(block_q5_K *y, const uint8_t *codes) {
    pack_nibble_rows(y->qs, codes);
    for (int j = 0; j < 32; j++) {
        unsigned high = 0;
        for (int i = 0; i < 8; i++) high |= (unsigned)(codes[32 * i + j] >> 4) << i;
        y->qh[j] = (uint8_t)high;
    }
}

static void batch_Q5_K(const float *x, const float *imatrix, block_q5_K *y, int count) {
    batch_fit fits;
    batch_scales scales;
    fit_minimum(&fits, x, imatrix, count, 32, 31, -0.5f, 15);
    quantize_scales(&scales, &fits, count, 8, 63, 63, imatrix != NULL);
    for (int b = 0; b < count; b++) {
        uint8_t codes[SUPER];
        y[b].d = float_to_half(scales.d[b]);
        y[b].dmin = float_to_half(scales.dmin[b]);
        pack_scales_6(y[b].scales, scales.s[b], scales.m[b]);
        codes_minimum(codes, x + SUPER * b, (super_scales){y[b].d, y[b].dmin, scales.s[b], scales.m[b]}, &fits, 8 * b,
                      32, 31);
        pack_codes_Q5_K(y + b, codes);
    }
}
QUANTIZE_SUPERS(Q5_K, block_q5_K)

static void dequantize_Q4_K(const uint8_t *src, float *out, int64_t n) {
    const block_q4_K *x = (const block_q4_K *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d), dmin = half_to_float(x->dmin);
        uint8_t s[8], m[8];
        unpack_scales_6(s, m, x->scales);
        for (int p = 0; p < 4; p++) {
            const vf d0 = vf_set1(d * (float)s[2 * p]), m0 = vf_set1(dmin * (float)m[2 * p]);
            const vf d1 = vf_set1(d * (float)s[2 * p + 1]), m1 = vf_set1(dmin * (float)m[2 * p + 1]);
            float *y = out + i + 64 * p;
            for (int j = 0; j < 32; j += LANES) {
                const vi q = vi_load_u8(x->qs + 32 * p + j);
                vf_store(y + j, vf_sub(vf_mul(d0, vi_to_vf(vi_and(q, vi_set1(15)))), m0));
                vf_store(y + 32 + j, vf_sub(vf_mul(d1, vi_to_vf(vi_shr(q, 4))), m1));
            }
        }
    }
}

static void dequantize_Q5_K(const uint8_t *src, float *out, int64_t n) {
    const block_q5_K *x = (const block_q5_K *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d), dmin = half_to_float(x->dmin);
        uint8_t s[8], m[8];
        unpack_scales_6(s, m, x->scales);
        for (int j = 0; j < 32; j += LANES) {
            vi high = vi_load_u8(x->qh + j); /* bit 0 is the next sub-block's fifth bit */
            for (int p = 0; p < 4; p++) {
                const vf d0 = vf_set1(d * (float)s[2 * p]), m0 = vf_set1(dmin * (float)m[2 * p]);
                const vf d1 = vf_set1(d * (float)s[2 * p + 1]), m1 = vf_set1(dmin * (float)m[2 * p + 1]);
                float *y = out + i + 64 * p + j;
                const vi q = vi_load_u8(x->qs + 32 * p + j);
                const vi q0 = vi_or(vi_and(q, vi_set1(15)), vi_and(vi_shl(high, 4), vi_set1(16)));
                const vi q1 = vi_or(vi_shr(q, 4), vi_and(vi_shl(high, 3), vi_set1(16)));
                vf_store(y, vf_sub(vf_mul(d0, vi_to_vf(q0)), m0));
                vf_store(y + 32, vf_sub(vf_mul(d1, vi_to_vf(q1)), m1));
                high = vi_shr(high, 2);
            }
        }
    }
}

/* Q2_K: sixteen sub-blocks of 16, scale and minimum of four bits each */

static void batch_Q2_K(const float *x, const float *imatrix, block_q2_K *y, int count) {
    batch_fit fits;
    batch_scales scales;
    fit_minimum(&fits, x, imatrix, count, 16, 3, -0.5f, 15);
    quantize_scales(&scales, &fits, count, 16, 15, 255, imatrix != NULL);
    for (int b = 0; b < count; b++) {
        uint8_t codes[SUPER], s[16], m[16];
        y[b].d = float_to_half(scales.d[b]);
        y[b].dmin = float_to_half(scales.dmin[b]);
        for (int j = 0; j < 16; j++) {
            y[b].scales[j] = (uint8_t)(scales.s[b][j] | (scales.m[b][j] << 4));
            s[j] = y[b].scales[j] & 15;
            m[j] = y[b].scales[j] >> 4;
        }
        codes_minimum(codes, x + SUPER * b, (super_scales){y[b].d, y[b].dmin, s, m}, &fits, 16 * b, 16, 3);
        pack_pairs(y[b].qs, codes);
    }
}
QUANTIZE_SUPERS(Q2_K, block_q2_K)

static void dequantize_Q2_K(const uint8_t *src, float *out, int64_t n) {
    const block_q2_K *x = (const block_q2_K *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d), dmin = half_to_float(x->dmin);
        for (int h = 0; h < 2; h++)
            for (int j = 0; j < 32; j += LANES) {
                const uint8_t *s = x->scales + 8 * h + j / 16;
                vi q = vi_load_u8(x->qs + 32 * h + j);
                for (int p = 0; p < 4; p++) {
                    const vf dp = vf_set1(d * (float)(s[2 * p] & 15)), mp = vf_set1(dmin * (float)(s[2 * p] >> 4));
                    vf_store(out + i + 128 * h + 32 * p + j, vf_sub(vf_mul(dp, vi_to_vf(vi_and(q, vi_set1(3)))), mp));
                    q = vi_shr(q, 2);
                }
            }
    }
}

#endif
