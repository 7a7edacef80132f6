#ifndef GFL_FP4_H
#define GFL_FP4_H
#include "../block_formats.h"
#include "base.h"
#include "lanes.h"
#include "rows_f32.h"

/* MXFP4 NVFP4: four-bit floats (sign, two bits of exponent, one of mantissa) under a power of two or an eight-bit
 * float. Levels here are twice the float's value, and scales half of theirs: 0 1 2 3 4 6 8 12. */

static const float fp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* Above this, differences to different levels may round to the same float. */
#define FP4_HUGE 0x1p30f

/* The first of the levels nearest to x / d, by ggml's rounded differences. */
static uint8_t fp4_code_of_huge(float x, float d) {
    int best = 0;
    for (int k = 1; k < 16; k++)
        if (fabsf(fp4_levels[k] * d - x) < fabsf(fp4_levels[best] * d - x)) best = k;
    return (uint8_t)best;
}

/* codes[0..n): differences to neighbouring levels are exact near their middle, so counting the middles below |x| finds
 * the nearest level; on a middle the smaller one is the first. */
INLINE void fp4_codes(uint8_t *codes, const float *x, int n, float d, float amax) {
    if (d == 0.0f) {
        memset(codes, 0, (size_t)n);
        return;
    }
    if (amax >= FP4_HUGE) {
        for (int j = 0; j < n; j++) codes[j] = fp4_code_of_huge(x[j], d);
        return;
    }
    const vf middles[7] = {vf_set1(0.5f * d), vf_set1(1.5f * d), vf_set1(2.5f * d), vf_set1(3.5f * d),
                           vf_set1(5.0f * d), vf_set1(7.0f * d), vf_set1(10.0f * d)};
    for (int j = 0; j < n; j += LANES) {
        const vf v = vf_load(x + j), a = vf_abs(v);
        vi code = vi_set1(0);
        for (int k = 0; k < 7; k++) code = vi_count(code, vf_gt(a, middles[k]));
        const vm negative = vf_lt(v, vf_neg(middles[0]));
        vi_store_u8(codes + j, vi_select(negative, vi_or(code, vi_set1(8)), code));
    }
}

/* floor(log2f(a)) for a > 0, where log2f may round up to the next whole number */
static inline int floor_log2(float a) {
    const uint32_t u = bits_of(a);
    if (u < 0x800000u || (u & 0x7fffffu) >= 0x7fff00u) return (int)floorf(log2f(a));
    return (int)(u >> 23) - 127;
}

/* 2^(e - 128) */
static inline float half_e8m0_to_float(uint8_t e) { return float_of(e < 2 ? 0x200000u << e : (uint32_t)(e - 1) << 23); }

static void quantize_MXFP4(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_mxfp4 *y = (block_mxfp4 *)out;
    for (int64_t i = 0; i < n_rows * n_in; i += 32, y++) {
        const float amax = largest_magnitude(x + i, 32);
        uint8_t codes[32];
        y->e = amax > 0.0f ? (uint8_t)(floor_log2(amax) - 2 + 127) : 0; /* below 2^-125 it wraps, in ggml too */
        fp4_codes(codes, x + i, 32, half_e8m0_to_float(y->e), amax);
        pack_nibbles(y->qs, codes);
    }
}

static void dequantize_MXFP4(const uint8_t *src, float *out, int64_t n) {
    const block_mxfp4 *x = (const block_mxfp4 *)src;
    for (int64_t i = 0; i < n; i += 32, x++) {
        const vf d = vf_set1(half_e8m0_to_float(x->e));
        for (int j = 0; j < 16; j += LANES) {
            const vi q = vi_load_u8(x->qs + j);
            vf_store(out + i + j, vf_mul(vf_pick16(fp4_levels, q), d));
            vf_store(out + i + 16 + j, vf_mul(vf_pick16(fp4_levels, vi_shr(q, 4)), d));
        }
    }
}

/* Eight-bit float without sign: four bits of exponent (bias 7), three of mantissa; rounded half up. From 248 on all
 * become 448. */
static inline uint8_t float_to_e4m3(float x) {
    if (!(x > 0.0f)) return 0;
    const uint32_t u = bits_of(x < 448.0f ? x : 448.0f);
    if (u < 0x3c800000u)
        return (uint8_t)(x * 512.0f + 0.5f) < 7 ? (uint8_t)(x * 512.0f + 0.5f) : 7; /* below 2^-6: denormal */
    const uint32_t code = (u + 0x80000u - 0x3c000000u) >> 20;
    return code < 0x78 ? (uint8_t)code : 0x7e;
}

/* Half of its value; 0x7f, elsewhere a NaN, is 0 in ggml. */
static inline float half_e4m3_to_float(uint8_t x) {
    const uint32_t rest = x & 0x7fu;
    if (x == 0x7f) return 0.0f;
    if (rest < 8) return (float)rest * 0x1p-10f;
    return float_of((rest << 20) + 0x3b800000u);
}

INLINE void pack_nvfp4(uint8_t *qs, const uint8_t *codes) {
    uint64_t low, high;
    memcpy(&low, codes, 8);
    memcpy(&high, codes + 8, 8);
    low |= high << 4;
    memcpy(qs, &low, 8);
}

static void quantize_NVFP4(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_nvfp4 *y = (block_nvfp4 *)out;
    for (int64_t i = 0; i < n_rows * n_in; i += 64, y++)
        for (int s = 0; s < 4; s++) {
            const float *xs = x + i + 16 * s, amax = largest_magnitude(xs, 16);
            uint8_t codes[16];
            y->d[s] = float_to_e4m3(amax / 6.0f);
            fp4_codes(codes, xs, 16, half_e4m3_to_float(y->d[s]), amax);
            pack_nvfp4(y->qs + 8 * s, codes);
        }
}

static void dequantize_NVFP4(const uint8_t *src, float *out, int64_t n) {
    const block_nvfp4 *x = (const block_nvfp4 *)src;
    for (int64_t i = 0; i < n; i += 64, x++) {
        uint8_t codes[64];
        for (int s = 0; s < 4; s++) {
            uint64_t q, high;
            memcpy(&q, x->qs + 8 * s, 8);
            high = q >> 4;
            memcpy(codes + 16 * s, &q, 8);
            memcpy(codes + 16 * s + 8, &high, 8);
        }
        for (int s = 0; s < 4; s++) {
            const vf d = vf_set1(half_e4m3_to_float(x->d[s]));
            for (int j = 16 * s; j < 16 * s + 16; j += LANES)
                vf_store(out + i + j, vf_mul(vf_pick16(fp4_levels, vi_load_u8(codes + j)), d));
        }
    }
}

#endif
