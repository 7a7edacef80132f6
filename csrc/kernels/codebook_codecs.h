#ifndef GFL_CODEBOOK_CODECS_H
#define GFL_CODEBOOK_CODECS_H
#include "../block_formats.h"
#include "base.h"
#include "codebook_search.h"
#include "lanes.h"
#include "table.h"

/* Blocks of codebook types as points and signs, as dither_codebook.h works on them. Every type has `scales` (what a
 * level is worth, by group; levels as in codebooks/neighbours.h), `points` (their numbers, and eight signs in a byte)
 * and `pack` (both back into a block whose scales, and shifts of IQ1, stand). All of them work on one block. */

static void points_IQ2_XXS(const uint8_t *src, uint16_t *points, uint8_t *signs) {
    uint32_t words[16];
    memcpy(words, ((const block_iq2_xxs *)src)->qs, 64);
    for (int j = 0; j < 32; j++) {
        points[j] = (uint16_t)((words[j / 4 * 2] >> (8 * (j % 4))) & 255);
        signs[j] = (uint8_t)eight_signs((words[j / 4 * 2 + 1] >> (7 * (j % 4))) & 127);
    }
}
static void pack_IQ2_XXS(uint8_t *dst, const uint16_t *points, const uint8_t *signs) {
    block_iq2_xxs *y = (block_iq2_xxs *)dst;
    uint32_t words[16];
    memcpy(words, y->qs, 64);
    for (int s = 0; s < 8; s++) {
        words[2 * s] = 0;
        words[2 * s + 1] &= 15u << 28;
        for (int k = 0; k < 4; k++) {
            words[2 * s] |= (uint32_t)points[4 * s + k] << (8 * k);
            words[2 * s + 1] |= (uint32_t)(signs[4 * s + k] & 127) << (7 * k);
        }
    }
    memcpy(y->qs, words, 64);
}
static void codebook_scales_IQ2_XXS(const uint8_t *src, float *s) {
    const block_iq2_xxs *x = (const block_iq2_xxs *)src;
    const float d = half_to_float(x->d);
    for (int i = 0; i < 8; i++) s[i] = d * (0.5f + (float)(x->qs[8 * i + 7] >> 4)) * 0.25f;
}

INLINE void scales_of_sixteens(float *s, const uint8_t *scales, float d) {
    for (int i = 0; i < 16; i++) s[i] = d * (0.5f + (float)((scales[i / 2] >> (4 * (i % 2))) & 15)) * 0.25f;
}

static void points_IQ2_XS(const uint8_t *src, uint16_t *points, uint8_t *signs) {
    const block_iq2_xs *x = (const block_iq2_xs *)src;
    for (int j = 0; j < 32; j++) {
        points[j] = x->qs[j] & 511;
        signs[j] = (uint8_t)eight_signs(x->qs[j] >> 9);
    }
}
static void pack_IQ2_XS(uint8_t *dst, const uint16_t *points, const uint8_t *signs) {
    block_iq2_xs *y = (block_iq2_xs *)dst;
    for (int j = 0; j < 32; j++) y->qs[j] = (uint16_t)(points[j] | ((signs[j] & 127) << 9));
}
static void codebook_scales_IQ2_XS(const uint8_t *src, float *s) {
    const block_iq2_xs *x = (const block_iq2_xs *)src;
    scales_of_sixteens(s, x->scales, half_to_float(x->d));
}

static void points_IQ2_S(const uint8_t *src, uint16_t *points, uint8_t *signs) {
    const block_iq2_s *x = (const block_iq2_s *)src;
    for (int j = 0; j < 32; j++) points[j] = (uint16_t)(x->qs[j] | (((x->qh[j / 4] >> (2 * (j % 4))) & 3) << 8));
    memcpy(signs, x->signs, 32);
}
static void pack_IQ2_S(uint8_t *dst, const uint16_t *points, const uint8_t *signs) {
    block_iq2_s *y = (block_iq2_s *)dst;
    memset(y->qh, 0, sizeof y->qh);
    for (int j = 0; j < 32; j++) {
        y->qs[j] = (uint8_t)points[j];
        y->qh[j / 4] |= (uint8_t)((points[j] >> 8) << (2 * (j % 4)));
    }
    memcpy(y->signs, signs, 32);
}
static void codebook_scales_IQ2_S(const uint8_t *src, float *s) {
    const block_iq2_s *x = (const block_iq2_s *)src;
    scales_of_sixteens(s, x->scales, half_to_float(x->d));
}

static void points_IQ3_XXS(const uint8_t *src, uint16_t *points, uint8_t *signs) {
    const block_iq3_xxs *x = (const block_iq3_xxs *)src;
    uint32_t words[8];
    memcpy(words, x->signs, 32);
    for (int j = 0; j < 64; j++) points[j] = x->qs[j];
    for (int j = 0; j < 32; j++) signs[j] = (uint8_t)eight_signs((words[j / 4] >> (7 * (j % 4))) & 127);
}
static void pack_IQ3_XXS(uint8_t *dst, const uint16_t *points, const uint8_t *signs) {
    block_iq3_xxs *y = (block_iq3_xxs *)dst;
    uint32_t words[8];
    memcpy(words, y->signs, 32);
    for (int j = 0; j < 64; j++) y->qs[j] = (uint8_t)points[j];
    for (int s = 0; s < 8; s++) {
        words[s] &= 15u << 28;
        for (int k = 0; k < 4; k++) words[s] |= (uint32_t)(signs[4 * s + k] & 127) << (7 * k);
    }
    memcpy(y->signs, words, 32);
}
static void codebook_scales_IQ3_XXS(const uint8_t *src, float *s) {
    const block_iq3_xxs *x = (const block_iq3_xxs *)src;
    const float d = half_to_float(x->d);
    for (int i = 0; i < 8; i++) s[i] = d * (0.5f + (float)(x->signs[4 * i + 3] >> 4)) * 0.5f;
}

static void points_IQ3_S(const uint8_t *src, uint16_t *points, uint8_t *signs) {
    const block_iq3_s *x = (const block_iq3_s *)src;
    for (int j = 0; j < 64; j++) points[j] = (uint16_t)(x->qs[j] | (((x->qh[j / 8] >> (j % 8)) & 1) << 8));
    memcpy(signs, x->signs, 32);
}
static void pack_IQ3_S(uint8_t *dst, const uint16_t *points, const uint8_t *signs) {
    block_iq3_s *y = (block_iq3_s *)dst;
    memset(y->qh, 0, sizeof y->qh);
    for (int j = 0; j < 64; j++) {
        y->qs[j] = (uint8_t)points[j];
        y->qh[j / 8] |= (uint8_t)((points[j] >> 8) << (j % 8));
    }
    memcpy(y->signs, signs, 32);
}
static void codebook_scales_IQ3_S(const uint8_t *src, float *s) {
    const block_iq3_s *x = (const block_iq3_s *)src;
    const float d = half_to_float(x->d);
    for (int i = 0; i < 8; i++) s[i] = d * (float)(1 + 2 * ((x->scales[i / 2] >> (4 * (i % 2))) & 15));
}

/* IQ1 has no signs, and its shifts stay. */

static void points_IQ1_S(const uint8_t *src, uint16_t *points, uint8_t *signs) {
    const block_iq1_s *x = (const block_iq1_s *)src;
    for (int j = 0; j < 32; j++) points[j] = (uint16_t)(x->qs[j] | (((x->qh[j / 4] >> (3 * (j % 4))) & 7) << 8));
    memset(signs, 0, 32);
}
static void pack_IQ1_S(uint8_t *dst, const uint16_t *points, const uint8_t *signs) {
    block_iq1_s *y = (block_iq1_s *)dst;
    (void)signs;
    for (int s = 0; s < 8; s++) {
        unsigned high = y->qh[s] & 0xf000u;
        for (int k = 0; k < 4; k++) {
            y->qs[4 * s + k] = (uint8_t)points[4 * s + k];
            high |= ((unsigned)points[4 * s + k] >> 8) << (3 * k);
        }
        y->qh[s] = (uint16_t)high;
    }
}
static void codebook_scales_IQ1_S(const uint8_t *src, float *s) {
    const block_iq1_s *x = (const block_iq1_s *)src;
    const float d = half_to_float(x->d);
    for (int i = 0; i < 8; i++) s[i] = d * (float)(2 * ((x->qh[i] >> 12) & 7) + 1) * 0.125f;
}

static void points_IQ1_M(const uint8_t *src, uint16_t *points, uint8_t *signs) {
    const block_iq1_m *x = (const block_iq1_m *)src;
    for (int j = 0; j < 32; j++) points[j] = (uint16_t)(x->qs[j] | (((x->qh[j / 2] >> (4 * (j % 2))) & 7) << 8));
    memset(signs, 0, 32);
}
static void pack_IQ1_M(uint8_t *dst, const uint16_t *points, const uint8_t *signs) {
    block_iq1_m *y = (block_iq1_m *)dst;
    (void)signs;
    for (int j = 0; j < 32; j += 2) {
        y->qs[j] = (uint8_t)points[j];
        y->qs[j + 1] = (uint8_t)points[j + 1];
        y->qh[j / 2] = (uint8_t)((y->qh[j / 2] & 0x88) | (points[j] >> 8) | ((points[j + 1] >> 8) << 4));
    }
}
static void codebook_scales_IQ1_M(const uint8_t *src, float *s) {
    const block_iq1_m *x = (const block_iq1_m *)src;
    unsigned bits = 0;
    for (int j = 0; j < 4; j++) bits |= (unsigned)(x->scales[j] >> 12) << (4 * j);
    const float d = half_to_float((uint16_t)bits) * 0.125f;
    for (int i = 0; i < 16; i++) s[i] = d * (float)(2 * ((x->scales[i / 4] >> (3 * (i % 4))) & 7) + 1);
}

/* functions | codebook | weights in a vector, in a group | mean distance of levels, distance of the nearest points */
#define CODEBOOK_CODEC(NAME, codebook, dims, group, step, shortest) \
    [GFL_##NAME] = {codebook_scales_##NAME, points_##NAME, pack_##NAME, codebook, dims, group, step, shortest}

static const gfl_codebook_codec codebook_codecs[GFL_N_TYPES] = {
    CODEBOOK_CODEC(IQ3_XXS, CODEBOOK_IQ3_XXS, 4, 32, 8.0f, 8.0f),
    CODEBOOK_CODEC(IQ3_S, CODEBOOK_IQ3_S, 4, 32, 2.0f, 2.0f),
    CODEBOOK_CODEC(IQ2_XXS, CODEBOOK_IQ2_XXS, 8, 32, 17.0f, 16.0f),
    CODEBOOK_CODEC(IQ2_XS, CODEBOOK_IQ2_XS, 8, 16, 17.0f, 16.0f),
    CODEBOOK_CODEC(IQ2_S, CODEBOOK_IQ2_S, 8, 16, 17.0f, 16.0f),
    CODEBOOK_CODEC(IQ1_S, CODEBOOK_IQ1, 8, 32, 8.0f, 8.0f),
    CODEBOOK_CODEC(IQ1_M, CODEBOOK_IQ1, 8, 16, 8.0f, 8.0f),
};

#endif
