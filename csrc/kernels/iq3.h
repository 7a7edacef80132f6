#ifndef GFL_IQ3_H
#define GFL_IQ3_H
#include "../block_formats.h"
#include "base.h"
#include "codebook_search.h"
#include "k_quants.h"
#include "lanes.h"

/* IQ3_XXS IQ3_S: fours of weights in codebooks of eight levels, runs of 32 with a scale of four bits. */

/* Fits one run: codes, signs (seven bits if `even`, which is IQ3_XXS) and scale. Returns 0 and leaves all alone if
 * there is nothing in the run. */
INLINE int fit_IQ3(float *scale, uint32_t *codes, uint8_t *signs, const gfl_codebook *codebook, const float *x,
                   const float *imatrix, float sigma2, int even) {
    codebook_run run;
    take_magnitudes(&run, signs, x, 32);
    set_importances(&run, x, imatrix, 32, sigma2, 0.0f);
    if (even) make_signs_even(&run, signs, 32);
    const float peak = run_peak(&run, 32);
    if (even ? peak < 1e-8f : peak == 0.0f) return 0;
    const int half = even ? 15 : 9;
    set_trials(&run, half, 15.0f, 0.2f, peak);
    const run_search search = {32, 4, 2 * half + 1, even ? REFINE_SOME : REFINE_ALL_OR_NONE};
    *scale = search_codebook(&run, codebook, codes, search, peak / 15.0f, peak > 1e-30f);
    if (*scale < 0.0f) {
        *scale = -*scale;
        for (int k = 0; k < 4; k++) signs[k] = (uint8_t)(even ? ~signs[k] & 127 : ~signs[k]);
    }
    return 1;
}

static void super_IQ3_XXS(const float *x, const float *imatrix, block_iq3_xxs *y, float sigma2) {
    const gfl_codebook *codebook = gfl_codebook_of(CODEBOOK_IQ3_XXS);
    float scales[8] = {0};
    uint32_t words[8] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 8; s++) {
        uint32_t codes[8];
        uint8_t signs[4];
        if (!fit_IQ3(scales + s, codes, signs, codebook, x + 32 * s, imatrix ? imatrix + 32 * s : NULL, sigma2, 1))
            continue;
        for (int g = 0; g < 8; g++) y->qs[8 * s + g] = (uint8_t)point_number(codebook, codes[g], 4);
        for (int k = 0; k < 4; k++) words[s] |= (uint32_t)signs[k] << (7 * k);
    }
    const float max = largest_scale(scales, 8), d = max / 31.0f;
    if (max == 0.0f) {
        memset(y, 0, sizeof *y);
        return;
    }
    y->d = float_to_half(d * 1.0125f);
    for (int s = 0; s < 8; s++) words[s] |= (uint32_t)nearest_level(1.0f / d * scales[s], 15) << 28;
    memcpy(y->signs, words, 32);
}

static void super_IQ3_S(const float *x, const float *imatrix, block_iq3_s *y, float sigma2) {
    const gfl_codebook *codebook = gfl_codebook_of(CODEBOOK_IQ3_S);
    float scales[8] = {0};
    int place =
        0; /* where a run's points and signs go: in ggml a run of zeros takes no place, and the next one moves up */
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 8; s++) {
        uint32_t codes[8];
        if (!fit_IQ3(scales + s, codes, y->signs + 4 * place, codebook, x + 32 * s, imatrix ? imatrix + 32 * s : NULL,
                     sigma2, 0))
            continue;
        for (int g = 0; g < 8; g++) {
            const unsigned point = point_number(codebook, codes[g], 4);
            y->qs[8 * place + g] = (uint8_t)point;
            y->qh[s] |= (uint8_t)((point >> 8) << g);
        }
        place++;
    }
    memset(y->signs + 4 * place, 0, (size_t)(32 - 4 * place));
    const float max = largest_scale(scales, 8), d = max / 31.0f;
    if (max == 0.0f) return;
    y->d = float_to_half(d * 1.033f);
    for (int s = 0; s < 8; s++) y->scales[s / 2] |= (uint8_t)(nearest_level(1.0f / d * scales[s], 15) << (4 * (s % 2)));
}

BATCH_OF_SUPERS(IQ3_XXS, block_iq3_xxs, 2.0f)
BATCH_OF_SUPERS(IQ3_S, block_iq3_s, 2.0f)

static void dequantize_IQ3_XXS(const uint8_t *src, float *out, int64_t n) {
    const block_iq3_xxs *x = (const block_iq3_xxs *)src;
    const int8_t *values = gfl_codebook_values(CODEBOOK_IQ3_XXS);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        int8_t bytes[SUPER];
        uint32_t words[8];
        memcpy(words, x->signs, 32);
        for (int j = 0; j < 32; j++)
            signed_bytes(bytes + 8 * j, four_values_twice(values, x->qs[2 * j], x->qs[2 * j + 1]),
                         eight_signs((words[j / 4] >> (7 * (j % 4))) & 127));
        for (int s = 0; s < 8; s++)
            scaled_bytes(out + i + 32 * s, bytes + 32 * s, 32, d * (0.5f + (float)(words[s] >> 28)) * 0.5f);
    }
}

static void dequantize_IQ3_S(const uint8_t *src, float *out, int64_t n) {
    const block_iq3_s *x = (const block_iq3_s *)src;
    const int8_t *values = gfl_codebook_values(CODEBOOK_IQ3_S);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        int8_t bytes[SUPER];
        for (int j = 0; j < 32; j++) {
            const unsigned high = (unsigned)x->qh[j / 4] >> (2 * (j % 4));
            const unsigned p0 = x->qs[2 * j] | ((high & 1) << 8), p1 = x->qs[2 * j + 1] | ((high & 2) << 7);
            signed_bytes(bytes + 8 * j, four_values_twice(values, p0, p1), x->signs[j]);
        }
        for (int s = 0; s < 8; s++)
            scaled_bytes(out + i + 32 * s, bytes + 32 * s, 32,
                         d * (float)(1 + 2 * ((x->scales[s / 2] >> (4 * (s % 2))) & 15)));
    }
}

#endif
