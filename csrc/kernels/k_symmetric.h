#ifndef GFL_K_SYMMETRIC_H
#define GFL_K_SYMMETRIC_H
#include "../block_formats.h"
#include "base.h"
#include "batch.h"
#include "k_quants.h"
#include "lanes.h"
#include "search_descent.h"
#include "search_scale.h"

/* Q3_K, Q6_K: sixteen sub-blocks of 16 with a signed scale and no minimum. */

/* The codes of a super-block; d and code_scale of each sub-block. */
INLINE void codes_symmetric(uint8_t *codes, const float *x, const float *d, const float *code_scale, int low,
                            int high) {
    divide_codes(codes, x, 16, NULL, d, low, high);
    for (int j = 0; j < 16; j++)
        if (d[j] == 0.0f) signed_search_codes(codes + 16 * j, x + 16 * j, 16, code_scale[j], low, high);
}

/* Q6_K: scales of eight bits */

static void fit_Q6_K(batch_fit *fits, const float *x, const float *imatrix, int count) {
    float x_copy[TILE], imatrix_copy[TILE];
    const int n = count * SUPER;
    for (int i = 0; i < n; i += TILE) {
        const float *tile = tile_of(x_copy, x + i, n - i);
        const float *tile_imatrix = imatrix ? tile_of(imatrix_copy, imatrix + i, n - i) : NULL;
        for (int j = 0; j < TILE / 16; j += AT_ONCE) {
            lanes_of_32 lanes[GROUPS], w[GROUPS];
            lane_fit fit[GROUPS];
            load_groups(lanes, tile + 16 * j, 16);
            if (imatrix) load_groups(w, tile_imatrix + 16 * j, 16);
            else EACH_GROUP
                    for (int k = 0; k < 16; k++) w[g][k] = vf_mul(lanes[g][k], lanes[g][k]);
            fit_symmetric(fit, lanes, w, 16, 32);
            store_fit(fits, i / 16 + j, fit);
        }
    }
}

static void pack_Q6_K(block_q6_K *y, const uint8_t *codes) {
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 32; j++) {
            const uint8_t *c = codes + 128 * h + j;
            y->ql[64 * h + j] = (uint8_t)((c[0] & 15) | (c[64] << 4));
            y->ql[64 * h + 32 + j] = (uint8_t)((c[32] & 15) | (c[96] << 4));
            y->qh[32 * h + j] = (uint8_t)((c[0] >> 4) | ((c[32] >> 4) << 2) | ((c[64] >> 4) << 4) |
                                          ((c[96] >> 4) << 6));
        }
}

static void finish_Q6_K(const float *x, block_q6_K *y, const float *scales, const float *code_scales) {
    const float peak = peak_of(scales, 16);
    if (fabsf(peak) < TINY) {
        memset(y, 0, sizeof *y);
        return;
    }
    const float inverse_d = -128.0f / peak;
    y->d = float_to_half(1.0f / inverse_d);
    const float d = half_to_float(y->d);
    uint8_t codes[SUPER];
    float dj[16];
    for (int j = 0; j < 16; j++) {
        const int s = nearest(inverse_d * scales[j]);
        y->scales[j] = (int8_t)(s < 127 ? s : 127);
        dj[j] = d * (float)y->scales[j];
    }
    codes_symmetric(codes, x, dj, code_scales, -32, 31);
    pack_Q6_K(y, codes);
}

static void batch_Q6_K(const float *x, const float *imatrix, block_q6_K *y, int count) {
    batch_fit fits;
    fit_Q6_K(&fits, x, imatrix, count);
    for (int b = 0; b < count; b++) finish_Q6_K(x + SUPER * b, y + b, fits.scale + 16 * b, fits.code_scale + 16 * b);
}
QUANTIZE_SUPERS(Q6_K, block_q6_K)

INLINE void values_Q6_K(float *out, vi low, vi high, float d) {
    const vi q = vi_sub(vi_or(low, vi_and(high, vi_set1(48))), vi_set1(32));
    vf_store(out, vf_mul(vf_set1(d), vi_to_vf(q)));
}

static void dequantize_Q6_K(const uint8_t *src, float *out, int64_t n) {
    const block_q6_K *x = (const block_q6_K *)src;
    const vi nibble = vi_set1(15);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        for (int h = 0; h < 2; h++)
            for (int j = 0; j < 32; j += LANES) {
                const int8_t *s = x->scales + 8 * h + j / 16;
                const vi low = vi_load_u8(x->ql + 64 * h + j), low2 = vi_load_u8(x->ql + 64 * h + 32 + j);
                const vi high = vi_load_u8(x->qh + 32 * h + j);
                float *y = out + i + 128 * h + j;
                values_Q6_K(y, vi_and(low, nibble), vi_shl(high, 4), d * (float)s[0]);
                values_Q6_K(y + 32, vi_and(low2, nibble), vi_shl(high, 2), d * (float)s[2]);
                values_Q6_K(y + 64, vi_shr(low, 4), high, d * (float)s[4]);
                values_Q6_K(y + 96, vi_shr(low2, 4), vi_shr(high, 2), d * (float)s[6]);
            }
    }
}

/* Q3_K: scales of six bits, stored as s + 32 */

static inline void pack_scales_3(uint8_t *packed, const uint8_t *s) {
    for (int j = 0; j < 8; j++) packed[j] = (uint8_t)((s[j] & 15) | ((s[j + 8] & 15) << 4));
    for (int j = 0; j < 4; j++)
        packed[8 + j] = (uint8_t)((s[j] >> 4) | ((s[j + 4] >> 4) << 2) | ((s[j + 8] >> 4) << 4) |
                                  ((s[j + 12] >> 4) << 6));
}

static inline void unpack_scales_3(uint8_t *s, const uint8_t *packed) {
    for (int j = 0; j < 16; j++)
        s[j] = (uint8_t)((j < 8 ? packed[j] & 15 : packed[j - 8] >> 4) |
                         (((packed[8 + j % 4] >> (2 * (j / 4))) & 3) << 4));
}

/* The scale of each sub-block. */
static inline void scales_3(float *dj, f16 unit, const uint8_t *s) {
    const float d = half_to_float(unit);
    for (int j = 0; j < 16; j++) dj[j] = d * (float)(s[j] - 32);
}

static void pack_Q3_K(block_q3_K *y, const uint8_t *codes) {
    pack_pairs(y->qs, codes);
    for (int j = 0; j < 32; j++) {
        unsigned high = 0;
        for (int i = 0; i < 8; i++) high |= (unsigned)(codes[32 * i + j] >> 2) << i;
        y->hmask[j] = (uint8_t)high;
    }
}

/* Without an imatrix the codes come from coordinate descent, and are kept for sub-blocks whose scale rounds to zero. */
static void default_Q3_K(const float *x, block_q3_K *y, int count) {
    float scales[MAX_FITS], copy[TILE];
    uint8_t found[MAX_FITS / LANES][16][LANES];
    const int n = count * SUPER;
    for (int i = 0; i < n; i += TILE) {
        const float *tile = tile_of(copy, x + i, n - i);
        for (int j = 0; j < TILE / 16; j += DESCENTS * LANES) {
            lanes_of_32 lanes[DESCENTS];
            vf scale[DESCENTS];
            vi q[DESCENTS][16];
            for (int d = 0; d < DESCENTS; d++) load_lanes(lanes[d], tile + 16 * (j + d * LANES), 16);
            fit_descent_3(scale, q, lanes);
            for (int d = 0; d < DESCENTS; d++) {
                vf_store(scales + i / 16 + j + d * LANES, scale[d]);
                for (int k = 0; k < 16; k++) vi_store_u8(found[(i / 16 + j) / LANES + d][k], q[d][k]);
            }
        }
    }
    for (int b = 0; b < count; b++) {
        const float peak = peak_of(scales + 16 * b, 16), inverse_d = -32.0f / peak;
        uint8_t codes[SUPER], s[16];
        float dj[16];
        for (int j = 0; j < 16; j++) {
            const int code = (int8_t)nearest(inverse_d * scales[16 * b + j]);
            s[j] = peak != 0.0f ? (uint8_t)((code < -32 ? -32 : code > 31 ? 31 : code) + 32) : 0;
        }
        y[b].d = float_to_half(peak != 0.0f ? 1.0f / inverse_d : 0.0f);
        pack_scales_3(y[b].scales, s);
        scales_3(dj, y[b].d, s);
        divide_codes(codes, x + SUPER * b, 16, NULL, dj, -4, 3);
        for (int j = 0; j < 16; j++)
            if (dj[j] == 0.0f) {
                const int lane = 16 * b + j;
                for (int k = 0; k < 16; k++) codes[16 * j + k] = found[lane / LANES][k][lane % LANES];
            }
        pack_Q3_K(y + b, codes);
    }
}

static void fit_Q3_K(batch_fit *fits, const float *x, const float *imatrix, int count) {
    float sigma2[MAX_FITS + AT_ONCE], x_copy[TILE], imatrix_copy[TILE];
    const int n = count * SUPER;
    spread_mean_squares(sigma2, x, count, 16, 2.0f);
    for (int i = 0; i < n; i += TILE) {
        const float *tile = tile_of(x_copy, x + i, n - i), *tile_imatrix = tile_of(imatrix_copy, imatrix + i, n - i);
        for (int j = 0; j < TILE / 16; j += AT_ONCE) {
            lanes_of_32 lanes[GROUPS], w[GROUPS];
            lane_fit fit[GROUPS];
            load_groups(lanes, tile + 16 * j, 16);
            measured_importance(w, lanes, tile_imatrix + 16 * j, sigma2 + i / 16 + j, 16);
            fit_symmetric(fit, lanes, w, 16, 4);
            store_fit(fits, i / 16 + j, fit);
        }
    }
}

static void measured_Q3_K(const float *x, const float *imatrix, block_q3_K *y, int count) {
    batch_fit fits;
    batch_fit of_scales;
    fit_Q3_K(&fits, x, imatrix, count);
    for (int b = 0; b < count; b += AT_ONCE) {
        lanes_of_32 lanes[GROUPS], w[GROUPS];
        lane_fit fit[GROUPS];
        load_groups(lanes, fits.scale + 16 * b, 16);
        load_groups(w, fits.sum_w + 16 * b, 16);
        fit_symmetric(fit, lanes, w, 16, 32);
        store_fit(&of_scales, b, fit);
    }
    for (int b = 0; b < count; b++) {
        uint8_t codes[SUPER], s[16];
        float dj[16];
        signed_search_codes(s, fits.scale + 16 * b, 16, of_scales.code_scale[b], -32, 31);
        pack_scales_3(y[b].scales, s);
        y[b].d = float_to_half(of_scales.scale[b]);
        scales_3(dj, y[b].d, s);
        codes_symmetric(codes, x + SUPER * b, dj, fits.code_scale + 16 * b, -4, 3);
        pack_Q3_K(y + b, codes);
    }
}

static void batch_Q3_K(const float *x, const float *imatrix, block_q3_K *y, int count) {
    if (imatrix) measured_Q3_K(x, imatrix, y, count);
    else default_Q3_K(x, y, count);
}
QUANTIZE_SUPERS(Q3_K, block_q3_K)

static void dequantize_Q3_K(const uint8_t *src, float *out, int64_t n) {
    const block_q3_K *x = (const block_q3_K *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        uint8_t s[16];
        unpack_scales_3(s, x->scales);
        for (int j = 0; j < 32; j += LANES) {
            vi high = vi_load_u8(x->hmask + j);
            for (int h = 0; h < 2; h++) {
                vi low = vi_load_u8(x->qs + 32 * h + j);
                for (int p = 0; p < 4; p++) {
                    const vf dp = vf_set1(d * (float)(s[8 * h + 2 * p + j / 16] - 32));
                    const vi q = vi_or(vi_and(low, vi_set1(3)), vi_and(vi_shl(high, 2), vi_set1(4)));
                    vf_store(out + i + 128 * h + 32 * p + j, vf_mul(dp, vi_to_vf(vi_sub(q, vi_set1(4)))));
                    low = vi_shr(low, 2);
                    high = vi_shr(high, 1);
                }
            }
        }
    }
}

#endif
