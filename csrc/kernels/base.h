#ifndef GFL_BASE_H
#define GFL_BASE_H
#include <stdint.h>
#include <string.h>

/* Sizes and bit fields that the kernels share; plain C without an instruction set. */

#define INLINE static inline __attribute__((always_inline))

enum {
    SUPER = 256,              /* weights of a super-block, ggml's QK_K */
    LEGACY = 32,              /* weights of a block of Q4_0 to Q8_0 */
    CHUNK = SUPER,            /* weights that a merge with dither works on at once */
    CHUNK_GROUPS = CHUNK / 16 /* the most groups (weights under one scale) in them */
};

/* ggml takes a sub-block whose values are smaller than this for zero. */
#define TINY 1e-15f

static inline float inverse(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

/* out[0..n) = (src >> shift) & mask for n = 8 k bytes */
INLINE void take_bits(int8_t *out, const uint8_t *src, int n, int shift, uint8_t mask) {
    for (int i = 0; i < n; i += 8) {
        uint64_t w;
        memcpy(&w, src + i, 8);
        w = (w >> shift) & (mask * 0x0101010101010101ull);
        memcpy(out + i, &w, 8);
    }
}

/* out[0..n) |= bit `from` of src, as bit `to` */
INLINE void add_bit(int8_t *out, const uint8_t *src, int n, int from, int to) {
    for (int i = 0; i < n; i += 8) {
        uint64_t w, q;
        memcpy(&w, src + i, 8);
        memcpy(&q, out + i, 8);
        q |= ((w >> from) & 0x0101010101010101ull) << to;
        memcpy(out + i, &q, 8);
    }
}

/* Low four bits of the codes of weights j and j + 16 in byte j. */
static inline void pack_nibbles(uint8_t *qs, const uint8_t *codes) {
    uint64_t low[2], high[2];
    memcpy(low, codes, 16);
    memcpy(high, codes + 16, 16);
    for (int i = 0; i < 2; i++) low[i] = (low[i] & 0x0f0f0f0f0f0f0f0full) | ((high[i] & 0x0f0f0f0f0f0f0f0full) << 4);
    memcpy(qs, low, 16);
}

static inline void unpack_nibbles(uint8_t *codes, const uint8_t *qs) {
    uint64_t q[2];
    memcpy(q, qs, 16);
    for (int i = 0; i < 2; i++) {
        const uint64_t low = q[i] & 0x0f0f0f0f0f0f0f0full, high = (q[i] >> 4) & 0x0f0f0f0f0f0f0f0full;
        memcpy(codes + 8 * i, &low, 8);
        memcpy(codes + 16 + 8 * i, &high, 8);
    }
}

/* Bit 4 of the codes of 32 weights, one after the other. */
static inline void pack_fifth_bits(uint8_t *qh, const uint8_t *codes) {
    for (int i = 0; i < 4; i++) {
        uint64_t c;
        memcpy(&c, codes + 8 * i, 8);
        /* gathers bit 4 of eight bytes into one: the multiplication adds shifted copies that do not meet */
        qh[i] = (uint8_t)((((c >> 4) & 0x0101010101010101ull) * 0x0102040810204080ull) >> 56);
    }
}

static inline void unpack_fifth_bits(uint8_t *codes, const uint8_t *qh) {
    for (int i = 0; i < 4; i++) { /* one bit to each of eight bytes, then to bit 4 */
        uint64_t c, bits = (qh[i] * 0x0101010101010101ull) & 0x8040201008040201ull;
        bits = (bits + 0x7f7f7f7f7f7f7f7full) & 0x8080808080808080ull;
        memcpy(&c, codes + 8 * i, 8);
        c |= bits >> 3;
        memcpy(codes + 8 * i, &c, 8);
    }
}

#endif
