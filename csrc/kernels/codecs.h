#ifndef GFL_CODECS_H
#define GFL_CODECS_H
#include "../block_formats.h"
#include "base.h"
#include "fp4.h"
#include "iq4.h"
#include "k_minimum.h"
#include "k_quants.h"
#include "k_symmetric.h"
#include "lanes.h"
#include "legacy.h"
#include "table.h"

/* Blocks as codes and scales, w = s * q - o with one s and o for each group of weights, as dither.h works on them.
 * Every type has `scales` (s and o of the groups of n weights), `codes` (q of n weights) and `pack` (q into blocks
 * whose scales stand). All of them work on n <= CHUNK weights, whole blocks. Codes count from the type's zero. */

INLINE void shift_codes(int8_t *q, int n, int by) {
    for (int i = 0; i < n; i++) q[i] = (int8_t)(q[i] + by);
}

/* out = q - low, as a file holds codes. */
INLINE void stored_codes(uint8_t *out, const int8_t *q, int n, int low) {
    for (int i = 0; i < n; i++) out[i] = (uint8_t)(q[i] - low);
}

/* Blocks of LEGACY weights with a scale d, and a minimum m or none: name, block, code of the lowest level, o, fifth
 * bits. */
#define LEGACY_CODEC(NAME, block, low, offset, fifth)                                            \
    static void scales_##NAME(const uint8_t *src, int n, float *s, float *o) {                   \
        const block *x = (const block *)src;                                                     \
        for (int b = 0; b < n / LEGACY; b++, x++) {                                              \
            s[b] = half_to_float(x->d);                                                          \
            o[b] = offset;                                                                       \
        }                                                                                        \
    }                                                                                            \
    static void codes_##NAME(const uint8_t *src, int n, int8_t *q) {                             \
        const block *x = (const block *)src;                                                     \
        for (int i = 0; i < n; i += LEGACY, x++) {                                               \
            unpack_nibbles((uint8_t *)q + i, x->qs);                                             \
            if (fifth) unpack_fifth_bits((uint8_t *)q + i, (const uint8_t *)x + sizeof *x - 20); \
        }                                                                                        \
        shift_codes(q, n, low);                                                                  \
    }                                                                                            \
    static void pack_##NAME(uint8_t *dst, int n, const int8_t *q) {                              \
        block *y = (block *)dst;                                                                 \
        uint8_t codes[SUPER];                                                                    \
        stored_codes(codes, q, n, low);                                                          \
        for (int i = 0; i < n; i += LEGACY, y++) {                                               \
            pack_nibbles(y->qs, codes + i);                                                      \
            if (fifth) pack_fifth_bits((uint8_t *)y + sizeof *y - 20, codes + i);                \
        }                                                                                        \
    }
LEGACY_CODEC(Q4_0, block_q4_0, -8, 0.0f, 0)
LEGACY_CODEC(Q4_1, block_q4_1, 0, -half_to_float(x->m), 0)
LEGACY_CODEC(Q5_0, block_q5_0, -16, 0.0f, 1)
LEGACY_CODEC(Q5_1, block_q5_1, 0, -half_to_float(x->m), 1)

static void scales_Q8_0(const uint8_t *src, int n, float *s, float *o) {
    for (int b = 0; b < n / LEGACY; b++) {
        s[b] = half_to_float(((const block_q8_0 *)src)[b].d);
        o[b] = 0.0f;
    }
}
static void codes_Q8_0(const uint8_t *src, int n, int8_t *q) {
    for (int i = 0; i < n; i += LEGACY) memcpy(q + i, ((const block_q8_0 *)src)[i / LEGACY].qs, LEGACY);
}
static void pack_Q8_0(uint8_t *dst, int n, const int8_t *q) {
    for (int i = 0; i < n; i += LEGACY) memcpy(((block_q8_0 *)dst)[i / LEGACY].qs, q + i, LEGACY);
}

/* Super-blocks: n is SUPER. */

INLINE void minimum_scales(float *s, float *o, f16 d, f16 dmin, const uint8_t *scales, const uint8_t *mins, int n) {
    const float scale = half_to_float(d), min = half_to_float(dmin);
    for (int j = 0; j < n; j++) {
        s[j] = scale * (float)scales[j];
        o[j] = min * (float)mins[j];
    }
}

static void scales_Q2_K(const uint8_t *src, int n, float *s, float *o) {
    const block_q2_K *x = (const block_q2_K *)src;
    uint8_t scales[16], mins[16];
    (void)n;
    for (int j = 0; j < 16; j++) {
        scales[j] = x->scales[j] & 15;
        mins[j] = x->scales[j] >> 4;
    }
    minimum_scales(s, o, x->d, x->dmin, scales, mins, 16);
}
INLINE void unpack_pairs(int8_t *q, const uint8_t *qs) {
    for (int h = 0; h < 2; h++)
        for (int p = 0; p < 4; p++) take_bits(q + 128 * h + 32 * p, qs + 32 * h, 32, 2 * p, 3);
}
static void codes_Q2_K(const uint8_t *src, int n, int8_t *q) {
    (void)n;
    unpack_pairs(q, ((const block_q2_K *)src)->qs);
}
static void repack_Q2_K(uint8_t *dst, int n, const int8_t *q) {
    (void)n;
    pack_pairs(((block_q2_K *)dst)->qs, (const uint8_t *)q);
}

static void scales_Q3_K(const uint8_t *src, int n, float *s, float *o) {
    const block_q3_K *x = (const block_q3_K *)src;
    const float d = half_to_float(x->d);
    uint8_t scales[16];
    (void)n;
    unpack_scales_3(scales, x->scales);
    for (int j = 0; j < 16; j++) {
        s[j] = d * (float)(scales[j] - 32);
        o[j] = 0.0f;
    }
}
static void codes_Q3_K(const uint8_t *src, int n, int8_t *q) {
    const block_q3_K *x = (const block_q3_K *)src;
    unpack_pairs(q, x->qs);
    for (int i = 0; i < 8; i++) add_bit(q + 32 * i, x->hmask, 32, i, 2);
    shift_codes(q, n, -4);
}
static void repack_Q3_K(uint8_t *dst, int n, const int8_t *q) {
    uint8_t codes[SUPER];
    stored_codes(codes, q, n, -4);
    pack_Q3_K((block_q3_K *)dst, codes);
}

static void scales_Q4_K(const uint8_t *src, int n, float *s, float *o) {
    const block_q4_K *x = (const block_q4_K *)src;
    uint8_t scales[8], mins[8];
    (void)n;
    unpack_scales_6(scales, mins, x->scales);
    minimum_scales(s, o, x->d, x->dmin, scales, mins, 8);
}
INLINE void unpack_nibble_rows(int8_t *q, const uint8_t *qs) {
    for (int p = 0; p < 4; p++) {
        take_bits(q + 64 * p, qs + 32 * p, 32, 0, 15);
        take_bits(q + 64 * p + 32, qs + 32 * p, 32, 4, 15);
    }
}
static void codes_Q4_K(const uint8_t *src, int n, int8_t *q) {
    (void)n;
    unpack_nibble_rows(q, ((const block_q4_K *)src)->qs);
}
static void repack_Q4_K(uint8_t *dst, int n, const int8_t *q) {
    (void)n;
    pack_nibble_rows(((block_q4_K *)dst)->qs, (const uint8_t *)q);
}

static void scales_Q5_K(const uint8_t *src, int n, float *s, float *o) { scales_Q4_K(src, n, s, o); }
static void codes_Q5_K(const uint8_t *src, int n, int8_t *q) {
    const block_q5_K *x = (const block_q5_K *)src;
    (void)n;
    unpack_nibble_rows(q, x->qs);
    for (int i = 0; i < 8; i++) add_bit(q + 32 * i, x->qh, 32, i, 4);
}
static void repack_Q5_K(uint8_t *dst, int n, const int8_t *q) {
    (void)n;
    pack_codes_Q5_K((block_q5_K *)dst, (const uint8_t *)q);
}

static void scales_Q6_K(const uint8_t *src, int n, float *s, float *o) {
    const block_q6_K *x = (const block_q6_K *)src;
    const float d = half_to_float(x->d);
    (void)n;
    for (int j = 0; j < 16; j++) {
        s[j] = d * (float)x->scales[j];
        o[j] = 0.0f;
    }
}
static void codes_Q6_K(const uint8_t *src, int n, int8_t *q) {
    const block_q6_K *x = (const block_q6_K *)src;
    for (int h = 0; h < 2; h++)
        for (int p = 0; p < 4; p++) {
            int8_t *qp = q + 128 * h + 32 * p;
            take_bits(qp, x->ql + 64 * h + 32 * (p % 2), 32, 4 * (p / 2), 15);
            add_bit(qp, x->qh + 32 * h, 32, 2 * p, 4);
            add_bit(qp, x->qh + 32 * h, 32, 2 * p + 1, 5);
        }
    shift_codes(q, n, -32);
}
static void repack_Q6_K(uint8_t *dst, int n, const int8_t *q) {
    uint8_t codes[SUPER];
    stored_codes(codes, q, n, -32);
    pack_Q6_K((block_q6_K *)dst, codes);
}

/* One scale for many weights: every 32 of them are a group here. */
#define ONE_SCALE(NAME, block, weights, scale, offset)                               \
    static void scales_##NAME(const uint8_t *src, int n, float *s, float *o) {       \
        for (int j = 0; j < n / 32; j++) {                                           \
            const float d = half_to_float(((const block *)src)[32 * j / weights].d); \
            s[j] = scale;                                                            \
            o[j] = offset;                                                           \
        }                                                                            \
    }
ONE_SCALE(TQ1_0, block_tq1_0, SUPER, d, 0.0f)
ONE_SCALE(TQ2_0, block_tq2_0, SUPER, d, 0.0f)
ONE_SCALE(Q2_0, block_q2_0, 64, d, 0.0f)
ONE_SCALE(Q1_0, block_q1_0, 128, d + d, d) /* the codes 0 and 1 */

static void codes_TQ2_0(const uint8_t *src, int n, int8_t *q) {
    unpack_pairs(q, ((const block_tq2_0 *)src)->qs);
    shift_codes(q, n, -1);
}
static void repack_TQ2_0(uint8_t *dst, int n, const int8_t *q) {
    uint8_t codes[SUPER];
    stored_codes(codes, q, n, -1);
    pack_pairs(((block_tq2_0 *)dst)->qs, codes);
}

/* The digits of n bytes, as values_of_trits has them. */
INLINE void unpack_trits(int8_t *q, const uint8_t *src, int n, int digits) {
    for (int j = 0; j < n; j++)
        for (unsigned k = 0, v = src[j]; k < (unsigned)digits; k++) {
            q[(int)k * n + j] = (int8_t)((int)((v * 3) >> 8) - 1);
            v = (v * 3) & 255;
        }
}
INLINE void pack_trits(uint8_t *dst, const int8_t *q, int n, int digits) {
    for (int j = 0; j < n; j++) {
        int sum = 0;
        for (int k = 0; k < 5; k++) sum = 3 * sum + (k < digits ? q[k * n + j] + 1 : 0);
        dst[j] = (uint8_t)((sum * 256 + 242) / 243);
    }
}
static void codes_TQ1_0(const uint8_t *src, int n, int8_t *q) {
    const block_tq1_0 *x = (const block_tq1_0 *)src;
    (void)n;
    unpack_trits(q, x->qs, 32, 5);
    unpack_trits(q + 160, x->qs + 32, 16, 5);
    unpack_trits(q + 240, x->qh, 4, 4);
}
static void repack_TQ1_0(uint8_t *dst, int n, const int8_t *q) {
    block_tq1_0 *y = (block_tq1_0 *)dst;
    (void)n;
    pack_trits(y->qs, q, 32, 5);
    pack_trits(y->qs + 32, q + 160, 16, 5);
    pack_trits(y->qh, q + 240, 4, 4);
}

static void codes_Q2_0(const uint8_t *src, int n, int8_t *q) {
    const block_q2_0 *x = (const block_q2_0 *)src;
    for (int i = 0; i < n; i++) q[i] = (int8_t)(((x[i / 64].qs[(i % 64) / 4] >> (2 * (i % 4))) & 3) - 1);
}
static void repack_Q2_0(uint8_t *dst, int n, const int8_t *q) {
    block_q2_0 *y = (block_q2_0 *)dst;
    for (int i = 0; i < n; i += 4) {
        const int low = (q[i] + 1) | ((q[i + 1] + 1) << 2), high = (q[i + 2] + 1) | ((q[i + 3] + 1) << 2);
        y[i / 64].qs[(i % 64) / 4] = (uint8_t)(low | (high << 4));
    }
}

static void codes_Q1_0(const uint8_t *src, int n, int8_t *q) {
    const block_q1_0 *x = (const block_q1_0 *)src;
    for (int i = 0; i < n; i++) q[i] = (x[i / 128].qs[(i % 128) / 8] >> (i % 8)) & 1;
}
static void repack_Q1_0(uint8_t *dst, int n, const int8_t *q) {
    block_q1_0 *y = (block_q1_0 *)dst;
    for (int i = 0; i < n; i += 8) {
        int byte = 0;
        for (int k = 0; k < 8; k++) byte |= q[i + k] << k;
        y[i / 128].qs[(i % 128) / 8] = (uint8_t)byte;
    }
}

/* Uneven levels: codes are the places of their levels, from the lowest up. */

static void scales_IQ4_NL(const uint8_t *src, int n, float *s, float *o) {
    for (int b = 0; b < n / 32; b++) {
        s[b] = half_to_float(((const block_iq4_nl *)src)[b].d);
        o[b] = 0.0f;
    }
}
static void codes_IQ4_NL(const uint8_t *src, int n, int8_t *q) {
    for (int i = 0; i < n; i += 32) unpack_nibbles((uint8_t *)q + i, ((const block_iq4_nl *)src)[i / 32].qs);
}
static void repack_IQ4_NL(uint8_t *dst, int n, const int8_t *q) {
    for (int i = 0; i < n; i += 32) pack_nibbles(((block_iq4_nl *)dst)[i / 32].qs, (const uint8_t *)q + i);
}

static void scales_IQ4_XS(const uint8_t *src, int n, float *s, float *o) {
    const block_iq4_xs *x = (const block_iq4_xs *)src;
    const float d = half_to_float(x->d);
    (void)n;
    for (int j = 0; j < 8; j++) {
        const int low = (x->scales_l[j / 2] >> (4 * (j % 2))) & 15, high = ((x->scales_h >> (2 * j)) & 3) << 4;
        s[j] = d * (float)((low | high) - 32);
        o[j] = 0.0f;
    }
}
static void codes_IQ4_XS(const uint8_t *src, int n, int8_t *q) {
    for (int i = 0; i < n; i += 32) unpack_nibbles((uint8_t *)q + i, ((const block_iq4_xs *)src)->qs + i / 2);
}
static void repack_IQ4_XS(uint8_t *dst, int n, const int8_t *q) {
    for (int i = 0; i < n; i += 32) pack_nibbles(((block_iq4_xs *)dst)->qs + i / 2, (const uint8_t *)q + i);
}

/* fp4_levels in order; both zeros are place 7 */
static const float fp4_ascending[16] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};

INLINE void places_of_fp4(int8_t *q, int n) {
    for (int i = 0; i < n; i++) q[i] = (int8_t)(q[i] < 8 ? 7 + q[i] : 15 - q[i]);
}
INLINE void fp4_of_places(uint8_t *codes, const int8_t *q, int n) {
    for (int i = 0; i < n; i++) codes[i] = (uint8_t)(q[i] < 7 ? 15 - q[i] : q[i] - 7);
}

static void scales_MXFP4(const uint8_t *src, int n, float *s, float *o) {
    for (int b = 0; b < n / 32; b++) {
        s[b] = half_e8m0_to_float(((const block_mxfp4 *)src)[b].e);
        o[b] = 0.0f;
    }
}
static void codes_MXFP4(const uint8_t *src, int n, int8_t *q) {
    for (int i = 0; i < n; i += 32) unpack_nibbles((uint8_t *)q + i, ((const block_mxfp4 *)src)[i / 32].qs);
    places_of_fp4(q, n);
}
static void repack_MXFP4(uint8_t *dst, int n, const int8_t *q) {
    uint8_t codes[SUPER];
    fp4_of_places(codes, q, n);
    for (int i = 0; i < n; i += 32) pack_nibbles(((block_mxfp4 *)dst)[i / 32].qs, codes + i);
}

static void scales_NVFP4(const uint8_t *src, int n, float *s, float *o) {
    for (int j = 0; j < n / 16; j++) {
        s[j] = half_e4m3_to_float(((const block_nvfp4 *)src)[j / 4].d[j % 4]);
        o[j] = 0.0f;
    }
}
static void codes_NVFP4(const uint8_t *src, int n, int8_t *q) {
    for (int j = 0; j < n / 16; j++) {
        const uint8_t *qs = ((const block_nvfp4 *)src)[j / 4].qs + 8 * (j % 4);
        take_bits(q + 16 * j, qs, 8, 0, 15);
        take_bits(q + 16 * j + 8, qs, 8, 4, 15);
    }
    places_of_fp4(q, n);
}
static void repack_NVFP4(uint8_t *dst, int n, const int8_t *q) {
    uint8_t codes[SUPER];
    fp4_of_places(codes, q, n);
    for (int j = 0; j < n / 16; j++) pack_nvfp4(((block_nvfp4 *)dst)[j / 4].qs + 8 * (j % 4), codes + 16 * j);
}

/* functions | weights per group | lowest and highest level, levels | where the scales lie: two runs of bytes | halves
 * among them, and where they lie */
#define BLOCK_CODEC(NAME, pack, group, low, high, header, halves, ...) \
    [GFL_##NAME] = {scales_##NAME, codes_##NAME, pack, group, low, high, 1, NULL, 0, header, halves, {__VA_ARGS__}}
#define RUNS(...) {__VA_ARGS__}
#define LEVELS_CODEC(NAME, group, low, high, levels, n_levels, bytes, halves)                                        \
    [GFL_##NAME] = {scales_##NAME, codes_##NAME, repack_##NAME, group,  low, high, (high - low) / (n_levels - 1.0f), \
                    levels,        n_levels,     {{0, bytes}},  halves, {0}}

/* clang-format off */
static const gfl_block_codec block_codecs[GFL_N_TYPES] = {
    BLOCK_CODEC(Q4_0, pack_Q4_0, 32, -8, 7, RUNS({0, 2}), 1, 0),
    BLOCK_CODEC(Q4_1, pack_Q4_1, 32, 0, 15, RUNS({0, 4}), 2, 0, 2),
    BLOCK_CODEC(Q5_0, pack_Q5_0, 32, -16, 15, RUNS({0, 2}), 1, 0),
    BLOCK_CODEC(Q5_1, pack_Q5_1, 32, 0, 31, RUNS({0, 4}), 2, 0, 2),
    BLOCK_CODEC(Q8_0, pack_Q8_0, 32, -127, 127, RUNS({0, 2}), 1, 0),
    BLOCK_CODEC(Q2_K, repack_Q2_K, 16, 0, 3, RUNS({0, 16}, {80, 4}), 2, 80, 82),
    BLOCK_CODEC(Q3_K, repack_Q3_K, 16, -4, 3, RUNS({96, 14}), 1, 108),
    BLOCK_CODEC(Q4_K, repack_Q4_K, 32, 0, 15, RUNS({0, 16}), 2, 0, 2),
    BLOCK_CODEC(Q5_K, repack_Q5_K, 32, 0, 31, RUNS({0, 16}), 2, 0, 2),
    BLOCK_CODEC(Q6_K, repack_Q6_K, 16, -32, 31, RUNS({192, 18}), 1, 208),
    BLOCK_CODEC(TQ1_0, repack_TQ1_0, 32, -1, 1, RUNS({52, 2}), 1, 52),
    BLOCK_CODEC(TQ2_0, repack_TQ2_0, 32, -1, 1, RUNS({64, 2}), 1, 64),
    BLOCK_CODEC(Q2_0, repack_Q2_0, 32, -1, 2, RUNS({0, 2}), 1, 0),
    BLOCK_CODEC(Q1_0, repack_Q1_0, 32, 0, 1, RUNS({0, 2}), 1, 0),
    LEVELS_CODEC(IQ4_NL, 32, -127, 113, iq4_levels, 16, 2, 1),
    LEVELS_CODEC(IQ4_XS, 32, -127, 113, iq4_levels, 16, 8, 1),
    LEVELS_CODEC(MXFP4, 32, -12, 12, fp4_ascending, 15, 1, 0),
    LEVELS_CODEC(NVFP4, 16, -12, 12, fp4_ascending, 15, 4, 0),
};
/* clang-format on */

#endif
