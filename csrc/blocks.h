#ifndef GFL_BLOCKS_H
#define GFL_BLOCKS_H
#include <stdint.h>

/* The block of every quant type as it lies in a file (little endian). `f16` fields hold IEEE half bits.
 * Packed, so that a block may lie at any address. In the diagrams w0, w1, ... are the weights of the block in order, bits are drawn from the high end of a byte. */

typedef uint16_t f16;

typedef struct __attribute__((packed)) { float w; } block_f32;
typedef struct __attribute__((packed)) { f16 w; } block_f16;
typedef struct __attribute__((packed)) { uint16_t w; } block_bf16;

/* 32 weights; w = d * (q - 8); qs[j] = | q of w(j+16) : 4 | q of wj : 4 | */
typedef struct __attribute__((packed)) { f16 d; uint8_t qs[16]; } block_q4_0;

/* 32 weights; w = d * q + m; qs as in Q4_0 */
typedef struct __attribute__((packed)) { f16 d; f16 m; uint8_t qs[16]; } block_q4_1;

/* 32 weights; w = d * (q - 16); low four bits of q in qs as in Q4_0; bit j of qh (32 bits, little endian) is bit 4 of wj's q */
typedef struct __attribute__((packed)) { f16 d; uint8_t qh[4]; uint8_t qs[16]; } block_q5_0;

/* 32 weights; w = d * q + m; q as in Q5_0 */
typedef struct __attribute__((packed)) { f16 d; f16 m; uint8_t qh[4]; uint8_t qs[16]; } block_q5_1;

/* 32 weights; w = d * q */
typedef struct __attribute__((packed)) { f16 d; int8_t qs[32]; } block_q8_0;

_Static_assert(sizeof(block_q4_0) == 18, "Q4_0");
_Static_assert(sizeof(block_q4_1) == 20, "Q4_1");
_Static_assert(sizeof(block_q5_0) == 22, "Q5_0");
_Static_assert(sizeof(block_q5_1) == 24, "Q5_1");
_Static_assert(sizeof(block_q8_0) == 34, "Q8_0");

#endif
