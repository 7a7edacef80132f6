#ifndef GFL_TERNARY_H
#define GFL_TERNARY_H
#include "../block_formats.h"
#include "base.h"
#include "lanes.h"
#include "rows_f32.h"

/* Q1_0 Q2_0 TQ1_0 TQ2_0: one scale, the largest or the mean magnitude, and one sign, trit or two bits for each
 * weight. */

/* Lane l: the sum of |x| over the n weights of run l, one after the other; LANES runs that follow each other. */
INLINE vf sums_of_magnitudes(const float *x, int n) {
    vf sum = vf_zero(), lanes[LANES];
    for (int i = 0; i < n; i += LANES) {
        vf_transpose(lanes, x + i, n);
        for (int j = 0; j < LANES; j++) sum = vf_add(sum, vf_abs(lanes[j]));
    }
    return sum;
}

static inline void signs_Q1_0(uint8_t *qs, const float *x) {
    uint64_t word[2] = {0, 0};
    for (int j = 0; j < 128; j += LANES)
        word[j / 64] |= (uint64_t)vm_to_bits(vf_le(vf_zero(), vf_load(x + j))) << (j % 64);
    memcpy(qs, word, 16);
}

static void quantize_Q1_0(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_q1_0 *y = (block_q1_0 *)out;
    for (int64_t left = n_rows * n_in / 128; left > 0; left -= LANES, y += LANES, x += 128 * LANES) {
        const int count = left < LANES ? (int)left : LANES;
        float padded[128 * LANES], sums[LANES];
        if (count < LANES) memcpy(padded, x, (size_t)count * 128 * sizeof *x);
        if (count < LANES) memset(padded + count * 128, 0, (size_t)(LANES - count) * 128 * sizeof *x);
        vf_store(sums, sums_of_magnitudes(count < LANES ? padded : x, 128));
        for (int b = 0; b < count; b++) {
            y[b].d = float_to_half(sums[b] / 128.0f);
            signs_Q1_0(y[b].qs, x + 128 * b);
        }
    }
}

static void dequantize_Q1_0(const uint8_t *src, float *out, int64_t n) {
    const block_q1_0 *x = (const block_q1_0 *)src;
    for (int64_t i = 0; i < n; i += 128, x++) {
        const vf d = vf_set1(half_to_float(x->d)), minus_d = vf_neg(d);
        uint64_t word[2];
        memcpy(word, x->qs, 16);
        for (int j = 0; j < 128; j += LANES)
            vf_store(out + i + j, vf_select(vm_from_bits((uint32_t)(word[j / 64] >> (j % 64))), d, minus_d));
    }
}

/* round(x * id) + 1, halves away from zero. Where id is infinite that is INT32_MIN + 1, as in ggml. */
INLINE vi trit(vf x, vf id) {
    const vf v = vf_mul(x, id), below_half = vf_set1(0x1.fffffep-2f);
    const vi sign = vi_and(vf_as_vi(v), vi_set1(INT32_MIN));
    return vi_add(vf_truncate(vf_add(v, vi_as_vf(vi_or(sign, vf_as_vi(below_half))))), vi_set1(1));
}

static void quantize_Q2_0(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_q2_0 *y = (block_q2_0 *)out;
    for (int64_t i = 0; i < n_rows * n_in; i += 64, y++) {
        const float d = largest_magnitude(x + i, 64);
        const vf id = vf_set1(inverse(d));
        uint8_t codes[64];
        for (int j = 0; j < 64; j += LANES)
            vi_store_u8(codes + j, vi_max(vi_min(trit(vf_load(x + i + j), id), vi_set1(3)), vi_set1(0)));
        y->d = float_to_half(d);
        for (int j = 0; j < 16; j++)
            y->qs[j] = (uint8_t)(codes[4 * j] | (codes[4 * j + 1] << 2) | (codes[4 * j + 2] << 4) |
                                 (codes[4 * j + 3] << 6));
    }
}

static void dequantize_Q2_0(const uint8_t *src, float *out, int64_t n) {
    const block_q2_0 *x = (const block_q2_0 *)src;
    for (int64_t i = 0; i < n; i += 64, x++) {
        const vf d = vf_set1(half_to_float(x->d));
        uint8_t codes[64];
        for (int j = 0; j < 16; j++) { /* two bits to each of four bytes */
            const uint32_t q = x->qs[j], spread = (q | (q << 6) | (q << 12) | (q << 18)) & 0x03030303u;
            memcpy(codes + 4 * j, &spread, 4);
        }
        for (int j = 0; j < 64; j += LANES)
            vf_store(out + i + j, vf_mul(vi_to_vf(vi_sub(vi_load_u8(codes + j), vi_set1(1))), d));
    }
}

static void quantize_TQ2_0(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_tq2_0 *y = (block_tq2_0 *)out;
    for (int64_t i = 0; i < n_rows * n_in; i += SUPER, y++) {
        const float d = largest_magnitude(x + i, SUPER);
        const vf id = vf_set1(inverse(d));
        const vi low = vi_set1(3);
        y->d = float_to_half(d);
        for (int j = 0; j < 64; j += LANES) {
            const float *xj = x + i + 128 * (j / 32) + j % 32;
            const vi q0 = vi_and(trit(vf_load(xj), id), low), q1 = vi_and(trit(vf_load(xj + 32), id), low);
            const vi q2 = vi_and(trit(vf_load(xj + 64), id), low), q3 = vi_and(trit(vf_load(xj + 96), id), low);
            vi_store_u8(y->qs + j, vi_or(vi_or(q0, vi_shl(q1, 2)), vi_or(vi_shl(q2, 4), vi_shl(q3, 6))));
        }
    }
}

static void dequantize_TQ2_0(const uint8_t *src, float *out, int64_t n) {
    const block_tq2_0 *x = (const block_tq2_0 *)src;
    const vi low = vi_set1(3), one = vi_set1(1);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const vf d = vf_set1(half_to_float(x->d));
        for (int j = 0; j < 64; j += LANES) {
            float *y = out + i + 128 * (j / 32) + j % 32;
            const vi q = vi_load_u8(x->qs + j);
            vf_store(y, vf_mul(vi_to_vf(vi_sub(vi_and(q, low), one)), d));
            vf_store(y + 32, vf_mul(vi_to_vf(vi_sub(vi_and(vi_shr(q, 2), low), one)), d));
            vf_store(y + 64, vf_mul(vi_to_vf(vi_sub(vi_and(vi_shr(q, 4), low), one)), d));
            vf_store(y + 96, vf_mul(vi_to_vf(vi_sub(vi_shr(q, 6), one)), d));
        }
    }
}

/* sums[0..n) of 5 trits, the first one the highest: weight k of byte j is x[k * n + j] */
INLINE void trits_of(uint8_t *sums, const float *x, int n, vf id) {
    for (int j = 0; j < n; j += LANES) {
        vi sum = vi_set1(0);
        for (int k = 0; k < 5; k++) sum = vi_add(vi_add(sum, vi_shl(sum, 1)), trit(vf_load(x + k * n + j), id));
        vi_store_u8(sums + j, sum);
    }
}

static void quantize_TQ1_0(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_tq1_0 *y = (block_tq1_0 *)out;
    for (int64_t i = 0; i < n_rows * n_in; i += SUPER, y++) {
        const float d = largest_magnitude(x + i, SUPER);
        const vf id = vf_set1(inverse(d));
        uint8_t sums[52], last[16];
        trits_of(sums, x + i, 32, id);
        trits_of(sums + 32, x + i + 160, 16, id);
        for (int j = 0; j < 16; j += LANES) vi_store_u8(last + j, trit(vf_load(x + i + 240 + j), id));
        for (int j = 0; j < 4; j++)
            sums[48 + j] = (uint8_t)(81 * last[j] + 27 * last[4 + j] + 9 * last[8 + j] + 3 * last[12 + j]);
        for (int j = 0; j < 52; j++) sums[j] = (uint8_t)((sums[j] * 256 + 242) / 243);
        memcpy(y->qs, sums, 48);
        memcpy(y->qh, sums + 48, 4);
        y->d = float_to_half(d);
    }
}

/* The digits of n bytes, first ones first: out[k * n + j] for byte j. */
INLINE void values_of_trits(float *out, const uint8_t *src, int n, vf d) {
    for (int j = 0; j < n; j += LANES) {
        vi q = vi_load_u8(src + j);
        for (int k = 0; k < 5; k++) {
            const vi three = vi_add(q, vi_shl(q, 1));
            vf_store(out + k * n + j, vf_mul(vi_to_vf(vi_sub(vi_shr(three, 8), vi_set1(1))), d));
            q = vi_and(three, vi_set1(255));
        }
    }
}

static void dequantize_TQ1_0(const uint8_t *src, float *out, int64_t n) {
    const block_tq1_0 *x = (const block_tq1_0 *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        values_of_trits(out + i, x->qs, 32, vf_set1(d));
        values_of_trits(out + i + 160, x->qs + 32, 16, vf_set1(d));
        for (int j = 0; j < 4; j++)
            for (unsigned k = 0, q = x->qh[j]; k < 4; k++) {
                out[i + 240 + 4 * k + j] = (float)((int)((q * 3) >> 8) - 1) * d;
                q = (q * 3) & 255;
            }
    }
}

#endif
