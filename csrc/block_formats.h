#ifndef GFL_BLOCK_FORMATS_H
#define GFL_BLOCK_FORMATS_H
#include <stdint.h>

/* The block of every quant type as it lies in a file, little endian; the layouts are ggml's (see NOTICE). `f16` fields
 * hold the bits of an IEEE half. Structs are packed, so that a block may lie at any address. In the diagrams w0, w1,
 * ... are the weights of the block in order, and a byte's bits are drawn from its high end. */

typedef uint16_t f16;

#define PACKED __attribute__((packed))

/* clang-format off */

typedef struct PACKED { float w; } block_f32;
typedef struct PACKED { f16 w; } block_f16;
typedef struct PACKED { uint16_t w; } block_bf16;

/* 32 weights; w = d * (q - 8); qs[j] = | q of w(j+16) : 4 | q of wj : 4 | */
typedef struct PACKED { f16 d; uint8_t qs[16]; } block_q4_0;

/* 32 weights; w = d * q + m; qs as in Q4_0 */
typedef struct PACKED { f16 d; f16 m; uint8_t qs[16]; } block_q4_1;

/* 32 weights; w = d * (q - 16); low four bits of q in qs as in Q4_0; bit j of qh (32 bits, little endian) is bit 4 of
 * wj's q */
typedef struct PACKED { f16 d; uint8_t qh[4]; uint8_t qs[16]; } block_q5_0;

/* 32 weights; w = d * q + m; q as in Q5_0 */
typedef struct PACKED { f16 d; f16 m; uint8_t qh[4]; uint8_t qs[16]; } block_q5_1;

/* 32 weights; w = d * q */
typedef struct PACKED { f16 d; int8_t qs[32]; } block_q8_0;

/* K-quants: super-blocks of 256 weights in 16 sub-blocks of 16 or 8 of 32, sub-block scales quantized in turn. */

/* 16 sub-blocks of 16; w = d * (s & 15) * q - dmin * (s >> 4) with s = scales[sub-block];
 * qs[32h + j] = | w(128h+96+j) : 2 | w(128h+64+j) : 2 | w(128h+32+j) : 2 | w(128h+j) : 2 | for j < 32 */
typedef struct PACKED { uint8_t scales[16]; uint8_t qs[64]; f16 d; f16 dmin; } block_q2_K;

/* 16 sub-blocks of 16; w = d * (s - 32) * (q - 4); low two bits of q in qs as in Q2_K; bit i of hmask[j] is bit 2 of
 * w(32i+j)'s q; six-bit s of sub-block j: low four bits in scales[j % 8] (low nibble if j < 8, else high), high two
 * bits at bit 2 * (j / 4) of scales[8 + j % 4] */
typedef struct PACKED { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; f16 d; } block_q3_K;

/* 8 sub-blocks of 32; w = d * s * q - dmin * m; qs[32p + j] = | w(64p+32+j) : 4 | w(64p+j) : 4 |; six-bit s and m:
 *   scales[j]     = | s(j+4) >> 4 : 2 | sj : 6 |        for j < 4
 *   scales[j + 4] = | m(j+4) >> 4 : 2 | mj : 6 |
 *   scales[j + 8] = | m(j+4) & 15 : 4 | s(j+4) & 15 : 4 | */
typedef struct PACKED { f16 d; f16 dmin; uint8_t scales[12]; uint8_t qs[128]; } block_q4_K;

/* as Q4_K; bit i of qh[j] is bit 4 of w(32i+j)'s q */
typedef struct PACKED { f16 d; f16 dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; } block_q5_K;

/* 16 sub-blocks of 16; w = d * s * (q - 32); for each half h and j < 32
 *   ql[64h + j]      = | w(128h+64+j) & 15 : 4 | w(128h+j) & 15 : 4 |
 *   ql[64h + 32 + j] = | w(128h+96+j) & 15 : 4 | w(128h+32+j) & 15 : 4 |
 *   qh[32h + j] = | w(128h+96+j) >> 4 : 2 | w(128h+64+j) >> 4 : 2 | w(128h+32+j) >> 4 : 2 | w(128h+j) >> 4 : 2 | */
typedef struct PACKED { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; f16 d; } block_q6_K;

_Static_assert(sizeof(block_q4_0) == 18, "Q4_0");
_Static_assert(sizeof(block_q4_1) == 20, "Q4_1");
_Static_assert(sizeof(block_q5_0) == 22, "Q5_0");
_Static_assert(sizeof(block_q5_1) == 24, "Q5_1");
_Static_assert(sizeof(block_q8_0) == 34, "Q8_0");
_Static_assert(sizeof(block_q2_K) == 84, "Q2_K");
_Static_assert(sizeof(block_q3_K) == 110, "Q3_K");
_Static_assert(sizeof(block_q4_K) == 144, "Q4_K");
_Static_assert(sizeof(block_q5_K) == 176, "Q5_K");
_Static_assert(sizeof(block_q6_K) == 210, "Q6_K");

/* Signs, trits, FP4: a scale and nothing else. */

/* 128 weights; w = d where bit j % 8 of qs[j / 8] is set, else -d */
typedef struct PACKED { f16 d; uint8_t qs[16]; } block_q1_0;

/* 64 weights; w = d * (q - 1); qs[j] = | q of w(4j+3) : 2 | w(4j+2) : 2 | w(4j+1) : 2 | w(4j) : 2 | */
typedef struct PACKED { f16 d; uint8_t qs[16]; } block_q2_0;

/* 256 weights; w = d * (t - 1), trits t; a byte holds the fraction ceil(256 / 243 * (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4))
 * whose base-3 digits are its trits. For n < 5: qs[j] has w(32n+j) for j < 32; qs[32+j] has w(160+16n+j) for j < 16;
 * qh[j] has w(240+4n+j) for j < 4 and n < 4 */
typedef struct PACKED { uint8_t qs[48]; uint8_t qh[4]; f16 d; } block_tq1_0;

/* 256 weights; w = d * (q - 1);
 * qs[32h + j] = | w(128h+96+j) : 2 | w(128h+64+j) : 2 | w(128h+32+j) : 2 | w(128h+j) : 2 | */
typedef struct PACKED { uint8_t qs[64]; f16 d; } block_tq2_0;

/* 32 weights; w = 2^(e - 127) * e2m1(q), sign in bit 3 of q; qs as in Q4_0 */
typedef struct PACKED { uint8_t e; uint8_t qs[16]; } block_mxfp4;

/* 4 sub-blocks of 16; w = e4m3(d of its sub-block) * e2m1(q); qs[8s + j] = | w(16s+8+j) : 4 | w(16s+j) : 4 | */
typedef struct PACKED { uint8_t d[4]; uint8_t qs[32]; } block_nvfp4;

/* Uneven levels: a code is a place in a table of values. */

/* 32 weights; w = d * level[q]; qs as in Q4_0 */
typedef struct PACKED { f16 d; uint8_t qs[16]; } block_iq4_nl;

/* 8 sub-blocks of 32; w = d * (s - 32) * level[q]; qs[16 i + j] = | w(32i+16+j) : 4 | w(32i+j) : 4 |; six-bit s of
 * sub-block i: low four bits in nibble i of scales_l, high two bits at bit 2i of scales_h */
typedef struct PACKED { f16 d; uint16_t scales_h; uint8_t scales_l[4]; uint8_t qs[128]; } block_iq4_xs;

/* Codebook types (codebooks/codebooks.h): eight or four weights share the number of a point; signs are kept apart, bit
 * i of a byte for weight i of eight. Where seven sign bits are kept, the eighth makes the number of set bits even.
 * Blocks are super-blocks. */

/* 8 sub-blocks of 32; w = d / 4 * (2 s + 1) / 2 * sign * point; qs[8i .. 8i+3] = points of sub-block i's eights,
 * qs[8i+4 .. 8i+7] = | s : 4 | seven signs of eight 3 | of eight 2 | of eight 1 | of eight 0 |, little endian */
typedef struct PACKED { f16 d; uint8_t qs[64]; } block_iq2_xxs;

/* 16 sub-blocks of 16; w as in IQ2_XXS; qs[j] = | seven signs : 7 | point of eight j : 9 |;
 * scales[i] = | s of sub-block 2i+1 : 4 | s of 2i : 4 | */
typedef struct PACKED { f16 d; uint16_t qs[32]; uint8_t scales[8]; } block_iq2_xs;

/* 16 sub-blocks of 16; w and scales as in IQ2_XS; of eight j: low eight bits of the point in qs[j], signs in signs[j],
 * high two bits at bit 2 (j % 4) of qh[j / 4] */
typedef struct PACKED { f16 d; uint8_t qs[32]; uint8_t signs[32]; uint8_t qh[8]; uint8_t scales[8]; } block_iq2_s;

/* 8 sub-blocks of 32; w = d / 2 * (2 s + 1) / 2 * sign * point; qs[j] = point of four j;
 * signs[4i .. 4i+3] = | s of sub-block i : 4 | seven signs of its eight 3 | 2 | 1 | 0 |, little endian */
typedef struct PACKED { f16 d; uint8_t qs[64]; uint8_t signs[32]; } block_iq3_xxs;

/* 8 sub-blocks of 32; w = d * (2 s + 1) * sign * point; of four j: low eight bits of the point in qs[j], the ninth at
 * bit j % 8 of qh[j / 8]; signs[j] of eight j; scales[i] = | s of sub-block 2i+1 : 4 | s of 2i : 4 | */
typedef struct PACKED { f16 d; uint8_t qs[64]; uint8_t qh[8]; uint8_t signs[32]; uint8_t scales[4]; } block_iq3_s;

/* 8 sub-blocks of 32; w = d * (2 s + 1) * (point +- 1/8); low eight bits of eight j's point in qs[j];
 * qh[i] = | minus an eighth : 1 | s : 3 | high three bits of the points of eights 4i+3 : 3 | 4i+2 : 3 | 4i+1 : 3 |
 * 4i : 3 | */
typedef struct PACKED { f16 d; uint8_t qs[32]; uint16_t qh[8]; } block_iq1_s;

/* 16 sub-blocks of 16; w as in IQ1_S, but each eight chooses its eighth; low eight bits of eight j's point in qs[j];
 * qh[i] = | minus an eighth : 1 | high three bits of the point : 3 | of eight 2i+1, then the same of eight 2i;
 * scales[i] = | a quarter of d's bits : 4 | s of sub-block 4i+3 : 3 | 4i+2 : 3 | 4i+1 : 3 | 4i : 3 |, low bits of d
 * first */
typedef struct PACKED { uint8_t qs[32]; uint8_t qh[16]; uint16_t scales[4]; } block_iq1_m;

_Static_assert(sizeof(block_iq1_s) == 50, "IQ1_S");
_Static_assert(sizeof(block_iq1_m) == 56, "IQ1_M");
_Static_assert(sizeof(block_iq2_xxs) == 66, "IQ2_XXS");
_Static_assert(sizeof(block_iq2_xs) == 74, "IQ2_XS");
_Static_assert(sizeof(block_iq2_s) == 82, "IQ2_S");
_Static_assert(sizeof(block_iq3_xxs) == 98, "IQ3_XXS");
_Static_assert(sizeof(block_iq3_s) == 110, "IQ3_S");
_Static_assert(sizeof(block_q1_0) == 18, "Q1_0");
_Static_assert(sizeof(block_q2_0) == 18, "Q2_0");
_Static_assert(sizeof(block_tq1_0) == 54, "TQ1_0");
_Static_assert(sizeof(block_tq2_0) == 66, "TQ2_0");
_Static_assert(sizeof(block_mxfp4) == 17, "MXFP4");
_Static_assert(sizeof(block_nvfp4) == 36, "NVFP4");
_Static_assert(sizeof(block_iq4_nl) == 18, "IQ4_NL");
_Static_assert(sizeof(block_iq4_xs) == 136, "IQ4_XS");

/* clang-format on */

#endif
