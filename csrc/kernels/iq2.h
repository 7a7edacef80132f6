/* IQ2_XXS IQ2_XS IQ2_S: eights of weights on grids of three levels. */

/* scale from which IQ2_XXS tries others: that of five levels evenly spaced from 0 */
INLINE float even_scale(const grid_run *run, int n) {
    float scale[LANES], x[32 * LANES], w[32 * LANES];
    vf lanes[32], weights[32], fitted;
    vi q[32];
    for (int l = 0; l < LANES; l++) {
        memcpy(x + n * l, run->x, (size_t)n * sizeof *x);
        memcpy(w + n * l, run->w, (size_t)n * sizeof *w);
    }
    load_lanes(lanes, x, n);
    load_lanes(weights, w, n);
    fit_scales(&fitted, q, lanes, weights, n, 4);
    vf_store(scale, fitted);
    return scale[0];
}

/* One run: codes, signs and scale. Returns 0, leaving all alone, if there is nothing in it. */
INLINE int fit_IQ2(float *scale, uint32_t *codes, uint8_t *signs, const gfl_grid *grid, const float *x, const float *imatrix,
                   float sigma2, int n, int even, float tiny) {
    grid_run run;
    grid_magnitudes(&run, signs, x, n);
    grid_importances(&run, x, imatrix, n, sigma2, 0.25f * sigma2);
    if (even) grid_even_signs(&run, signs, n);
    const float peak = grid_peak(&run, n);
    if (peak < tiny) return 0;
    if (n == 32) {
        const float start = even_scale(&run, n), top = start * 3.0f;
        if (!(top > 0.0f)) return 0;
        grid_trials(&run, 6, 5.0f, 0.1f, top);
        *scale = grid_fit(&run, grid, codes, n, 8, 13, start, REFINE_ALL, peak < 1e5f * top);
    } else {
        grid_trials(&run, 9, 5.0f, 0.1f, peak);
        *scale = grid_fit(&run, grid, codes, n, 8, 19, peak / 5.0f, REFINE_SOME, 1);
    }
    if (*scale < 0.0f) {
        *scale = -*scale;
        for (int k = 0; k < n / 8; k++) signs[k] = (uint8_t)(even ? ~signs[k] & 127 : ~signs[k]);
    }
    return 1;
}

static void super_IQ2_XXS(const float *x, const float *imatrix, block_iq2_xxs *y, float sigma2) {
    const gfl_grid *grid = gfl_grid_of(GRID_IQ2_XXS);
    float scales[8] = {0};
    uint32_t words[16] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 8; s++) {
        uint32_t codes[4];
        uint8_t signs[4];
        if (!fit_IQ2(scales + s, codes, signs, grid, x + 32 * s, imatrix + 32 * s, sigma2, 32, 1, TINY)) continue;
        for (int k = 0; k < 4; k++) {
            words[2 * s] |= (uint32_t)grid_number(grid, codes[k], 8) << 8 * k;
            words[2 * s + 1] |= (uint32_t)signs[k] << 7 * k;
        }
    }
    const float max = largest_scale(scales, 8), d = max / 31.0f;
    if (max == 0.0f) return;
    y->d = float_to_half(d);
    for (int s = 0; s < 8; s++) words[2 * s + 1] |= (uint32_t)grid_level(1.0f / d * scales[s], 15) << 28;
    memcpy(y->qs, words, 64);
}

/* scale codes of 16 runs */
static inline void scales_IQ2(uint8_t *codes, const float *scales, float d) {
    for (int s = 0; s < 16; s++) codes[s / 2] |= (uint8_t)(grid_level(1.0f / d * scales[s], 15) << 4 * (s % 2));
}

static void super_IQ2_XS(const float *x, const float *imatrix, block_iq2_xs *y, float sigma2) {
    const gfl_grid *grid = gfl_grid_of(GRID_IQ2_XS);
    float scales[16] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 16; s++) {
        uint32_t codes[2];
        uint8_t signs[2];
        if (!fit_IQ2(scales + s, codes, signs, grid, x + 16 * s, imatrix + 16 * s, sigma2, 16, 1, TINY)) continue;
        for (int k = 0; k < 2; k++) y->qs[2 * s + k] = (uint16_t)(grid_number(grid, codes[k], 8) | (unsigned)signs[k] << 9);
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
    const gfl_grid *grid = gfl_grid_of(GRID_IQ2_S);
    float scales[16] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 16; s++) {
        uint32_t codes[2];
        uint8_t signs[2];
        if (!fit_IQ2(scales + s, codes, signs, grid, x + 16 * s, imatrix ? imatrix + 16 * s : NULL, sigma2, 16, 0, 1e-8f)) continue;
        for (int k = 0; k < 2; k++) {
            const unsigned point = grid_number(grid, codes[k], 8);
            y->qs[2 * s + k] = (uint8_t)point;
            y->qh[s / 2] |= (uint8_t)(point >> 8 << (4 * (s % 2) + 2 * k));
            y->signs[2 * s + k] = signs[k];
        }
    }
    const float max = largest_scale(scales, 16), d = max / 31.0f;
    if (max == 0.0f) return;
    y->d = float_to_half(d * 0.9875f);
    scales_IQ2(y->scales, scales, d);
}

BATCH_OF_SUPERS(IQ2_XXS, block_iq2_xxs, 1.0f)
BATCH_OF_SUPERS(IQ2_XS, block_iq2_xs, 1.0f)
BATCH_OF_SUPERS(IQ2_S, block_iq2_s, 2.0f)

static void dequantize_IQ2_XXS(const uint8_t *src, float *out, int64_t n) {
    const block_iq2_xxs *x = (const block_iq2_xxs *)src;
    const int8_t *values = gfl_grid_values(GRID_IQ2_XXS);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        int8_t bytes[SUPER];
        uint32_t words[16];
        memcpy(words, x->qs, 64);
        for (int j = 0; j < 32; j++) {
            const unsigned point = words[j / 4 * 2] >> 8 * (j % 4) & 255, signs = words[j / 4 * 2 + 1] >> 7 * (j % 4) & 127;
            signed_bytes(bytes + 8 * j, eight_values(values, point), eight_signs(signs));
        }
        for (int s = 0; s < 8; s++)
            scaled_bytes(out + i + 32 * s, bytes + 32 * s, 32, d * (0.5f + (float)(words[2 * s + 1] >> 28)) * 0.25f);
    }
}

INLINE void values_of_sixteens(float *out, const int8_t *bytes, const uint8_t *scales, float d) {
    for (int s = 0; s < 16; s++)
        scaled_bytes(out + 16 * s, bytes + 16 * s, 16, d * (0.5f + (float)(scales[s / 2] >> 4 * (s % 2) & 15)) * 0.25f);
}

static void dequantize_IQ2_XS(const uint8_t *src, float *out, int64_t n) {
    const block_iq2_xs *x = (const block_iq2_xs *)src;
    const int8_t *values = gfl_grid_values(GRID_IQ2_XS);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        int8_t bytes[SUPER];
        for (int j = 0; j < 32; j++)
            signed_bytes(bytes + 8 * j, eight_values(values, x->qs[j] & 511u), eight_signs(x->qs[j] >> 9));
        values_of_sixteens(out + i, bytes, x->scales, half_to_float(x->d));
    }
}

static void dequantize_IQ2_S(const uint8_t *src, float *out, int64_t n) {
    const block_iq2_s *x = (const block_iq2_s *)src;
    const int8_t *values = gfl_grid_values(GRID_IQ2_S);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        int8_t bytes[SUPER];
        for (int j = 0; j < 32; j++) {
            const unsigned point = x->qs[j] | ((unsigned)x->qh[j / 4] >> 2 * (j % 4) & 3) << 8;
            signed_bytes(bytes + 8 * j, eight_values(values, point), x->signs[j]);
        }
        values_of_sixteens(out + i, bytes, x->scales, half_to_float(x->d));
    }
}
