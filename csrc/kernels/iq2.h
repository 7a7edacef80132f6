#ifndef GFL_IQ2_H
#define GFL_IQ2_H
#include "../block_formats.h"
#include "base.h"
#include "batch.h"
#include "codebook_search.h"
#include "k_quants.h"
#include "lanes.h"
#include "search_scale.h"

/* IQ2_XXS IQ2_XS IQ2_S: eights of weights in codebooks of three levels. */

/* Fits one run: codes, signs and scale; `even`: seven signs of eight. `start` is the scale from which IQ2_XXS tries
 * others; the other two begin with the peak, and for them it is what the peak must reach to count. Returns 0 and leaves
 * all alone if there is nothing in the run. */
INLINE int fit_IQ2(float *scale, uint32_t *codes, uint8_t *signs, const gfl_codebook *codebook, codebook_run *run,
                   int n, int even, float start) {
    if (n == 32) {
        const float top = start * 3.0f;
        if (top <= 0.0f) return 0;
        set_trials(run, 6, 5.0f, 0.1f, top);
        *scale = search_codebook(run, codebook, codes, (run_search){n, 8, 13, REFINE_ALL}, start,
                                 run_peak(run, n) < 1e5f * top);
    } else {
        const float peak = run_peak(run, n);
        if (peak < start) return 0;
        set_trials(run, 9, 5.0f, 0.1f, peak);
        *scale = search_codebook(run, codebook, codes, (run_search){n, 8, 19, REFINE_SOME}, peak / 5.0f, 1);
    }
    if (*scale < 0.0f) {
        *scale = -*scale;
        for (int k = 0; k < n / 8; k++) signs[k] = (uint8_t)(even ? ~signs[k] & 127 : ~signs[k]);
    }
    return 1;
}

/* Magnitudes, importances and signs of the runs of two super-blocks, from which IQ2_XXS finds the scales to start
 * from. */
typedef struct {
    float x[TILE], w[TILE];
    uint8_t signs[TILE / 8];
} tile_IQ2_XXS;

static void prepare_IQ2_XXS(tile_IQ2_XXS *tile, int at, const float *x, const float *imatrix, float sigma2) {
    for (int i = 0; i < SUPER; i += 32) {
        codebook_run run;
        uint8_t *signs = tile->signs + (at + i) / 8;
        take_magnitudes(&run, signs, x + i, 32);
        set_importances(&run, x + i, imatrix + i, 32, sigma2, 0.0f);
        make_signs_even(&run, signs, 32);
        memcpy(tile->x + at + i, run.x, 32 * sizeof *run.x);
        memcpy(tile->w + at + i, run.w, 32 * sizeof *run.w);
    }
}

static void super_IQ2_XXS(const float *x, const float *w, uint8_t *signs, const float *starts, block_iq2_xxs *y) {
    const gfl_codebook *codebook = gfl_codebook_of(CODEBOOK_IQ2_XXS);
    float scales[8] = {0};
    uint32_t words[16] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 8; s++) {
        codebook_run run;
        uint32_t codes[4];
        memcpy(run.x, x + 32 * s, 32 * sizeof *run.x);
        memcpy(run.w, w + 32 * s, 32 * sizeof *run.w);
        for (int i = 0; i < 32; i += LANES) vf_store(run.root + i, vf_sqrt(vf_load(run.w + i)));
        if (!fit_IQ2(scales + s, codes, signs + 4 * s, codebook, &run, 32, 1, starts[s])) continue;
        for (int k = 0; k < 4; k++) {
            words[2 * s] |= (uint32_t)point_number(codebook, codes[k], 8) << (8 * k);
            words[2 * s + 1] |= (uint32_t)signs[4 * s + k] << (7 * k);
        }
    }
    const float max = largest_scale(scales, 8), d = max / 31.0f;
    if (max == 0.0f) return;
    y->d = float_to_half(d);
    for (int s = 0; s < 8; s++) words[2 * s + 1] |= (uint32_t)nearest_level(1.0f / d * scales[s], 15) << 28;
    memcpy(y->qs, words, 64);
}

static void batch_IQ2_XXS(const float *x, const float *imatrix, block_iq2_xxs *y, int count) {
    float sigma2[BATCH_SUPERS];
    spread_mean_squares(sigma2, x, count, SUPER, 1.0f);
    for (int b = 0; b < count; b += 2) {
        tile_IQ2_XXS tile;
        float starts[TILE / 32];
        memset(&tile, 0, sizeof tile);
        for (int j = 0; j < 2 && b + j < count; j++)
            prepare_IQ2_XXS(&tile, SUPER * j, x + SUPER * (b + j), imatrix + SUPER * (b + j), sigma2[b + j]);
        for (int j = 0; j < TILE / 32; j += LANES) { /* the scale of five levels evenly spaced from 0 */
            vf lanes[32], w[32], start;
            vi q[32];
            load_lanes(lanes, tile.x + 32 * j, 32);
            load_lanes(w, tile.w + 32 * j, 32);
            fit_scales(&start, q, lanes, w, 32, 4);
            vf_store(starts + j, start);
        }
        for (int j = 0; j < 2 && b + j < count; j++)
            super_IQ2_XXS(tile.x + SUPER * j, tile.w + SUPER * j, tile.signs + SUPER / 8 * j, starts + 8 * j,
                          y + b + j);
    }
}

QUANTIZE_SUPERS(IQ2_XXS, block_iq2_xxs)

/* Scale codes of 16 runs. */
static inline void scales_IQ2(uint8_t *codes, const float *scales, float d) {
    for (int s = 0; s < 16; s++) codes[s / 2] |= (uint8_t)(nearest_level(1.0f / d * scales[s], 15) << (4 * (s % 2)));
}

static void super_IQ2_XS(const float *x, const float *imatrix, block_iq2_xs *y, float sigma2) {
    const gfl_codebook *codebook = gfl_codebook_of(CODEBOOK_IQ2_XS);
    float scales[16] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 16; s++) {
        uint32_t codes[2];
        uint8_t signs[2];
        codebook_run run;
        take_magnitudes(&run, signs, x + 16 * s, 16);
        set_importances(&run, x + 16 * s, imatrix + 16 * s, 16, sigma2, 0.0f);
        make_signs_even(&run, signs, 16);
        if (!fit_IQ2(scales + s, codes, signs, codebook, &run, 16, 1, TINY)) continue;
        for (int k = 0; k < 2; k++)
            y->qs[2 * s + k] = (uint16_t)(point_number(codebook, codes[k], 8) | ((unsigned)signs[k] << 9));
    }
    const float max = largest_scale(scales, 16), d = max / 31.0f;
    if (max == 0.0f) {
        memset(y, 0, sizeof *y);
        return;
    }
    y->d = float_to_half(d);
    scales_IQ2(y->scales, scales, d);
}

static void super_IQ2_S(const float *x, const float *imatrix, block_iq2_s *y, float sigma2) {
    const gfl_codebook *codebook = gfl_codebook_of(CODEBOOK_IQ2_S);
    float scales[16] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 16; s++) {
        uint32_t codes[2];
        uint8_t signs[2];
        codebook_run run;
        take_magnitudes(&run, signs, x + 16 * s, 16);
        set_importances(&run, x + 16 * s, imatrix ? imatrix + 16 * s : NULL, 16, sigma2, 0.25f * sigma2);
        if (!fit_IQ2(scales + s, codes, signs, codebook, &run, 16, 0, 1e-8f)) continue;
        for (int k = 0; k < 2; k++) {
            const unsigned point = point_number(codebook, codes[k], 8);
            y->qs[2 * s + k] = (uint8_t)point;
            y->qh[s / 2] |= (uint8_t)((point >> 8) << (4 * (s % 2) + 2 * k));
            y->signs[2 * s + k] = signs[k];
        }
    }
    const float max = largest_scale(scales, 16), d = max / 31.0f;
    if (max == 0.0f) return;
    y->d = float_to_half(d * 0.9875f);
    scales_IQ2(y->scales, scales, d);
}

BATCH_OF_SUPERS(IQ2_XS, block_iq2_xs, 1.0f)
BATCH_OF_SUPERS(IQ2_S, block_iq2_s, 2.0f)

static void dequantize_IQ2_XXS(const uint8_t *src, float *out, int64_t n) {
    const block_iq2_xxs *x = (const block_iq2_xxs *)src;
    const int8_t *values = gfl_codebook_values(CODEBOOK_IQ2_XXS);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        int8_t bytes[SUPER];
        uint32_t words[16];
        memcpy(words, x->qs, 64);
        for (int j = 0; j < 32; j++) {
            const unsigned point = (words[j / 4 * 2] >> (8 * (j % 4))) & 255,
                           signs = (words[j / 4 * 2 + 1] >> (7 * (j % 4))) & 127;
            signed_bytes(bytes + 8 * j, eight_values(values, point), eight_signs(signs));
        }
        for (int s = 0; s < 8; s++)
            scaled_bytes(out + i + 32 * s, bytes + 32 * s, 32, d * (0.5f + (float)(words[2 * s + 1] >> 28)) * 0.25f);
    }
}

INLINE void values_of_sixteens(float *out, const int8_t *bytes, const uint8_t *scales, float d) {
    for (int s = 0; s < 16; s++)
        scaled_bytes(out + 16 * s, bytes + 16 * s, 16,
                     d * (0.5f + (float)((scales[s / 2] >> (4 * (s % 2))) & 15)) * 0.25f);
}

static void dequantize_IQ2_XS(const uint8_t *src, float *out, int64_t n) {
    const block_iq2_xs *x = (const block_iq2_xs *)src;
    const int8_t *values = gfl_codebook_values(CODEBOOK_IQ2_XS);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        int8_t bytes[SUPER];
        for (int j = 0; j < 32; j++)
            signed_bytes(bytes + 8 * j, eight_values(values, x->qs[j] & 511u), eight_signs(x->qs[j] >> 9));
        values_of_sixteens(out + i, bytes, x->scales, half_to_float(x->d));
    }
}

static void dequantize_IQ2_S(const uint8_t *src, float *out, int64_t n) {
    const block_iq2_s *x = (const block_iq2_s *)src;
    const int8_t *values = gfl_codebook_values(CODEBOOK_IQ2_S);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        int8_t bytes[SUPER];
        for (int j = 0; j < 32; j++) {
            const unsigned point = x->qs[j] | ((((unsigned)x->qh[j / 4] >> (2 * (j % 4))) & 3) << 8);
            signed_bytes(bytes + 8 * j, eight_values(values, point), x->signs[j]);
        }
        values_of_sixteens(out + i, bytes, x->scales, half_to_float(x->d));
    }
}

#endif
