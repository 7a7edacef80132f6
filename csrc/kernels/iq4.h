#ifndef GFL_IQ4_H
#define GFL_IQ4_H
#include "../block_formats.h"
#include "base.h"
#include "batch.h"
#include "k_quants.h"
#include "lanes.h"
#include "search_scale.h"

/* IQ4_NL IQ4_XS: sixteen uneven levels. ggml tries 16 scales for each run of 32 weights; here LANES runs share each
 * vector. */

static const float iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* The middles of neighbouring levels as a binary search meets them: node i is followed by 2i, or by 2i + 1 from its
 * value on. ggml compares the distances to two levels; both are exact near their middle, and the middle belongs to the
 * upper one. */
static const float iq4_middles[16] = {0,       -4.5f, -57, 45.5f, -93.5f, -28.5f, 19, 79,
                                      -115.5f, -74,   -42, -16,   7,      31.5f,  61, 101};

/* Number of the level nearest to v plus 16; 31 for NaN, as in ggml. */
INLINE vi iq4_search(vf v) {
    vi node = vi_count(vi_set1(2), vf_not_lt(v, vf_set1(iq4_middles[1])));
    node = vi_count(vi_shl(node, 1), vf_not_lt(v, vf_pick8(iq4_middles, node)));
    node = vi_count(vi_shl(node, 1), vf_not_lt(v, vf_pick8(iq4_middles, node)));
    return vi_count(vi_shl(node, 1), vf_not_lt(v, vf_pick8(iq4_middles + 8, node)));
}

/* Sums of w q x and w q q over the levels q nearest to iscale * x. */
INLINE void iq4_sums(vf *sum_qx, vf *sum_q2, const vf *x, const vf *w, vf iscale) {
    vf qx = vf_zero(), q2 = vf_zero();
    for (int i = 0; i < 32; i++) {
        const vf q = vf_pick16(iq4_levels, iq4_search(vf_mul(iscale, x[i]))), wq = vf_mul(w[i], q);
        qx = vf_add(qx, vf_mul(wq, x[i]));
        q2 = vf_add(q2, vf_mul(wq, q));
    }
    *sum_qx = qx;
    *sum_q2 = q2;
}

/* Scale of 32 weights w = scale * level: weighted least squares over the best of the trial scales, 0 for lanes of
 * zeros. */
INLINE vf iq4_fit(const vf *x, const vf *w) {
    const vf zero = vf_zero();
    vf peak = zero, amax = zero, qx, q2;
    for (int i = 0; i < 32; i++) {
        const vf a = vf_abs(x[i]);
        const vm higher = vf_gt(a, amax);
        amax = vf_select(higher, a, amax);
        peak = vf_select(higher, x[i], peak);
    }
    iq4_sums(&qx, &q2, x, w, vf_div(vf_set1(1.0f), vf_div(vf_neg(peak), vf_set1(iq4_levels[0]))));
    vf scale = vf_select(vf_gt(q2, zero), vf_div(qx, q2), zero), best = vf_mul(scale, qx);
    for (int trial = -7; trial <= 7; trial++) {
        iq4_sums(&qx, &q2, x, w, vf_div(vf_set1((float)trial + iq4_levels[0]), peak));
        const vm better = vm_and(vf_gt(q2, zero), vf_gt(vf_mul(qx, qx), vf_mul(best, q2)));
        scale = vf_select(better, vf_div(qx, q2), scale);
        best = vf_select(better, vf_mul(scale, qx), best);
    }
    return vf_select(vf_lt(amax, vf_set1(TINY)), zero, scale);
}

/* codes[0..n) of the levels nearest to inverse_scale * x */
INLINE void iq4_codes(uint8_t *codes, const float *x, int n, float inverse_scale) {
    const vf id = vf_set1(inverse_scale);
    for (int i = 0; i < n; i += LANES)
        vi_store_u8(codes + i, vi_and(iq4_search(vf_mul(id, vf_load(x + i))), vi_set1(15)));
}

/* scales[0..16) of the 16 runs of 32 weights of a tile; sigma2: twice the mean square that counts for each run */
INLINE void iq4_fit_tile(float *scales, const float *x, const float *imatrix, const float *sigma2) {
    for (int j = 0; j < TILE / 32; j += LANES) {
        vf lanes[32], w[32];
        load_lanes(lanes, x + 32 * j, 32);
        if (imatrix) importance_of_lanes(w, lanes, imatrix + 32 * j, vf_load(sigma2 + j), 32);
        else
            for (int i = 0; i < 32; i++) w[i] = vf_mul(lanes[i], lanes[i]);
        vf_store(scales + j, iq4_fit(lanes, w));
    }
}

static void tile_IQ4_NL(const float *x, const float *imatrix, block_iq4_nl *y, int count) {
    float scales[TILE / 32], sigma2[TILE / 32] = {0};
    if (imatrix) sums_of_squares(sigma2, x, count, 32);
    for (int j = 0; j < count; j++) sigma2[j] *= 2.0f / 32;
    iq4_fit_tile(scales, x, imatrix, sigma2);
    for (int b = 0; b < count; b++) {
        uint8_t codes[32];
        y[b].d = float_to_half(scales[b]);
        iq4_codes(codes, x + 32 * b, 32, inverse(scales[b]));
        pack_nibbles(y[b].qs, codes);
    }
}

static void quantize_IQ4_NL(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    const int64_t rows = imatrix ? n_rows : 1, n = imatrix ? n_in : n_rows * n_in;
    block_iq4_nl *y = (block_iq4_nl *)out;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < n; i += TILE) {
            float copy[TILE], imatrix_copy[TILE];
            const int count = (int)((n - i < TILE ? n - i : TILE) / 32);
            const float *importance = imatrix ? tile_of(imatrix_copy, imatrix + i, n - i) : NULL;
            tile_IQ4_NL(tile_of(copy, x + row * n + i, n - i), importance, y, count);
            y += count;
        }
}

static void dequantize_IQ4_NL(const uint8_t *src, float *out, int64_t n) {
    const block_iq4_nl *x = (const block_iq4_nl *)src;
    for (int64_t i = 0; i < n; i += 32, x++) {
        const vf d = vf_set1(half_to_float(x->d));
        for (int j = 0; j < 16; j += LANES) {
            const vi q = vi_load_u8(x->qs + j);
            vf_store(out + i + j, vf_mul(d, vf_pick16(iq4_levels, q)));
            vf_store(out + i + 16 + j, vf_mul(d, vf_pick16(iq4_levels, vi_shr(q, 4))));
        }
    }
}

/* Codes and scales of a super-block whose runs have been fitted. */
static void finish_IQ4_XS(const float *x, block_iq4_xs *y, const float *scales) {
    const float d = -peak_of(scales, 8) / 32, id = inverse(d);
    unsigned high = 0;
    y->d = float_to_half(d);
    memset(y->scales_l, 0, sizeof y->scales_l);
    for (int j = 0; j < 8; j++) {
        const int l = nearest(id * scales[j]), s = l < -32 ? -32 : l > 31 ? 31 : l;
        uint8_t codes[32];
        iq4_codes(codes, x + 32 * j, 32, inverse(d * (float)s));
        pack_nibbles(y->qs + 16 * j, codes);
        y->scales_l[j / 2] |= (uint8_t)(((s + 32) & 15) << (4 * (j % 2)));
        high |= ((unsigned)(s + 32) >> 4) << (2 * j);
    }
    y->scales_h = (uint16_t)high;
}

static void batch_IQ4_XS(const float *x, const float *imatrix, block_iq4_xs *y, int count) {
    float sigma2[BATCH / 32 + 16], scales[BATCH / 32 + 16];
    if (imatrix) spread_mean_squares(sigma2, x, count, 32, 2.0f);
    for (int i = 0; i < count * SUPER; i += TILE) {
        float copy[TILE], imatrix_copy[TILE];
        const float *importance = imatrix ? tile_of(imatrix_copy, imatrix + i, count * SUPER - i) : NULL;
        iq4_fit_tile(scales + i / 32, tile_of(copy, x + i, count * SUPER - i), importance, sigma2 + i / 32);
    }
    for (int b = 0; b < count; b++) finish_IQ4_XS(x + SUPER * b, y + b, scales + 8 * b);
}

QUANTIZE_SUPERS(IQ4_XS, block_iq4_xs)

static void dequantize_IQ4_XS(const uint8_t *src, float *out, int64_t n) {
    const block_iq4_xs *x = (const block_iq4_xs *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        for (int s = 0; s < 8; s++) {
            const int low = (x->scales_l[s / 2] >> (4 * (s % 2))) & 15, high = ((x->scales_h >> (2 * s)) & 3) << 4;
            const vf dl = vf_set1(d * (float)((low | high) - 32));
            for (int j = 0; j < 16; j += LANES) {
                const vi q = vi_load_u8(x->qs + 16 * s + j);
                vf_store(out + i + 32 * s + j, vf_mul(dl, vf_pick16(iq4_levels, q)));
                vf_store(out + i + 32 * s + 16 + j, vf_mul(dl, vf_pick16(iq4_levels, vi_shr(q, 4))));
            }
        }
    }
}

#endif
