/* K-quants: super-blocks of 256 weights, fitted two at a time so that their sub-blocks fill any number of lanes. */

enum { SUPER = 256, PAIR = 2 * SUPER };

/* The fits of the sub-blocks of a pair of super-blocks, at most 32. */
typedef struct {
    float scale[32], min[32], code_scale[32], code_min[32];
} pair_fit;

INLINE void load_lanes(vf *out, const float *x, int n) {
    for (int i = 0; i < n; i += LANES) vf_transpose(out + i, x + i, n);
}

INLINE void store_fit(pair_fit *fits, int first, const lane_fit *fit) {
    vf_store(fits->scale + first, fit->scale);
    vf_store(fits->min + first, vf_sub(vf_zero(), fit->min));
    vf_store(fits->code_scale + first, fit->code_scale);
    vf_store(fits->code_min + first, fit->code_min);
}

/* root mean square + |x|, the importance ggml gives weights when it knows nothing else */
INLINE void default_importance(vf *w, const vf *x, int n) {
    vf sum = vf_zero();
    for (int i = 0; i < n; i++) sum = vf_add(sum, vf_mul(x[i], x[i]));
    const vf mean = vf_sqrt(vf_div(sum, vf_set1((float)n)));
    for (int i = 0; i < n; i++) w[i] = vf_add(mean, vf_abs(x[i]));
}

/* codes[0..n) = clamp(nearest((x + offset) / d)) - low */
INLINE void divide_codes(uint8_t *codes, const float *x, int n, float offset, float d, int low, int high) {
    for (int i = 0; i < n; i += LANES) {
        const vi q = vf_nearest(vf_div(vf_add(vf_load(x + i), vf_set1(offset)), vf_set1(d)));
        vi_store_u8(codes + i, vi_sub(vi_clamp(q, low, high), vi_set1(low)));
    }
}

/* the codes of the search itself */
static void search_codes(uint8_t *codes, const float *x, int n, float code_scale, float code_min, int low, int high) {
    for (int i = 0; i < n; i++) {
        const int q = nearest(code_scale * (x[i] - code_min));
        codes[i] = (uint8_t)((q < low ? low : q > high ? high : q) - low);
    }
}

/* Calls `pair(x, blocks, block, count)` for all super-blocks of n weights, two at a time; a last single one is followed by
 * zeros. */
#define FOR_PAIRS(x, n, y, pair)                                       \
    do {                                                               \
        int64_t done_ = 0;                                             \
        for (; done_ + PAIR <= (n); done_ += PAIR, (y) += 2) pair((x) + done_, (y), 2); \
        if (done_ < (n)) {                                             \
            float last_[PAIR] = {0};                                   \
            memcpy(last_, (x) + done_, SUPER * sizeof(float));         \
            pair(last_, (y), 1);                                       \
        }                                                              \
    } while (0)

/* Q4_K and Q5_K: eight sub-blocks of 32, scale and minimum of six bits each */

static inline void pack_scales_6(uint8_t *packed, const uint8_t *s, const uint8_t *m) {
    for (int j = 0; j < 4; j++) {
        packed[j] = (uint8_t)(s[j] | s[j + 4] >> 4 << 6);
        packed[j + 4] = (uint8_t)(m[j] | m[j + 4] >> 4 << 6);
        packed[j + 8] = (uint8_t)((s[j + 4] & 15) | (m[j + 4] & 15) << 4);
    }
}

static inline void unpack_scales_6(uint8_t *s, uint8_t *m, const uint8_t *packed) {
    for (int j = 0; j < 4; j++) {
        s[j] = packed[j] & 63;
        m[j] = packed[j + 4] & 63;
        s[j + 4] = (uint8_t)((packed[j + 8] & 15) | packed[j] >> 6 << 4);
        m[j + 4] = (uint8_t)(packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4);
    }
}

static inline float largest_of(const float *v, int n) {
    float max = 0.0f;
    for (int j = 0; j < n; j++) max = v[j] > max ? v[j] : max;
    return max;
}

/* codes = clamp(nearest(v * 63 / max)), returns max / 63 */
static inline float quantize_scales_6(uint8_t *codes, const float *v) {
    const float max = largest_of(v, 8), inverse_max = max > 0.0f ? 63.0f / max : 0.0f;
    for (int j = 0; j < 8; j++) {
        const uint8_t code = (uint8_t)nearest(inverse_max * v[j]);
        codes[j] = code < 63 ? code : 63;
    }
    return max / 63.0f;
}

/* codes of one super-block whose scales are settled; fits: its eight sub-blocks from `first` on */
INLINE void codes_45(uint8_t *codes, const float *x, f16 d, f16 dmin, const uint8_t *s, const uint8_t *m, const pair_fit *fits,
                     int first, int q_max) {
    const float scale = half_to_float(d), min = half_to_float(dmin);
    for (int j = 0; j < 8; j++) {
        const float dj = scale * (float)s[j];
        if (dj != 0.0f) divide_codes(codes + 32 * j, x + 32 * j, 32, min * (float)m[j], dj, 0, q_max);
        else search_codes(codes + 32 * j, x + 32 * j, 32, fits->code_scale[first + j], fits->code_min[first + j], 0, q_max);
    }
}

INLINE void fit_pair_45(pair_fit *fits, const float *x, int q_max, float first, int last) {
    for (int j = 0; j < PAIR / 32; j += LANES) {
        vf lanes[32], w[32];
        lane_fit fit;
        load_lanes(lanes, x + 32 * j, 32);
        default_importance(w, lanes, 32);
        fit_min(&fit, lanes, w, 32, q_max, first, 0.1f, last, 0);
        store_fit(fits, j, &fit);
    }
}

static inline void pack_nibble_rows(uint8_t *qs, const uint8_t *codes) {
    for (int p = 0; p < 4; p++)
        for (int j = 0; j < 32; j++) qs[32 * p + j] = (uint8_t)((codes[64 * p + j] & 15) | codes[64 * p + 32 + j] << 4);
}

static void quantize_pair_Q4_K(const float *x, block_q4_K *y, int count) {
    pair_fit fits;
    fit_pair_45(&fits, x, 15, -1.0f, 20);
    for (int b = 0; b < count; b++) {
        uint8_t codes[SUPER], s[8], m[8];
        y[b].d = float_to_half(quantize_scales_6(s, fits.scale + 8 * b));
        y[b].dmin = float_to_half(quantize_scales_6(m, fits.min + 8 * b));
        pack_scales_6(y[b].scales, s, m);
        codes_45(codes, x + SUPER * b, y[b].d, y[b].dmin, s, m, &fits, 8 * b, 15);
        pack_nibble_rows(y[b].qs, codes);
    }
}

static void quantize_Q4_K(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_q4_K *y = (block_q4_K *)out;
    FOR_PAIRS(x, n_rows * n_in, y, quantize_pair_Q4_K);
}

static void quantize_pair_Q5_K(const float *x, block_q5_K *y, int count) {
    pair_fit fits;
    fit_pair_45(&fits, x, 31, -0.5f, 15);
    for (int b = 0; b < count; b++) {
        uint8_t codes[SUPER], s[8], m[8];
        y[b].d = float_to_half(quantize_scales_6(s, fits.scale + 8 * b));
        y[b].dmin = float_to_half(quantize_scales_6(m, fits.min + 8 * b));
        pack_scales_6(y[b].scales, s, m);
        codes_45(codes, x + SUPER * b, y[b].d, y[b].dmin, s, m, &fits, 8 * b, 31);
        pack_nibble_rows(y[b].qs, codes);
        for (int j = 0; j < 32; j++) {
            unsigned high = 0;
            for (int i = 0; i < 8; i++) high |= (unsigned)(codes[32 * i + j] >> 4) << i;
            y[b].qh[j] = (uint8_t)high;
        }
    }
}

static void quantize_Q5_K(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_q5_K *y = (block_q5_K *)out;
    FOR_PAIRS(x, n_rows * n_in, y, quantize_pair_Q5_K);
}

static void dequantize_Q4_K(const uint8_t *src, float *out, int64_t n) {
    const block_q4_K *x = (const block_q4_K *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d), dmin = half_to_float(x->dmin);
        uint8_t s[8], m[8];
        unpack_scales_6(s, m, x->scales);
        for (int p = 0; p < 4; p++) {
            const vf d0 = vf_set1(d * (float)s[2 * p]), m0 = vf_set1(dmin * (float)m[2 * p]);
            const vf d1 = vf_set1(d * (float)s[2 * p + 1]), m1 = vf_set1(dmin * (float)m[2 * p + 1]);
            float *y = out + i + 64 * p;
            for (int j = 0; j < 32; j += LANES) {
                const vi q = vi_load_u8(x->qs + 32 * p + j);
                vf_store(y + j, vf_sub(vf_mul(d0, vi_to_vf(vi_and(q, vi_set1(15)))), m0));
                vf_store(y + 32 + j, vf_sub(vf_mul(d1, vi_to_vf(vi_shr(q, 4))), m1));
            }
        }
    }
}

static void dequantize_Q5_K(const uint8_t *src, float *out, int64_t n) {
    const block_q5_K *x = (const block_q5_K *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d), dmin = half_to_float(x->dmin);
        uint8_t s[8], m[8];
        unpack_scales_6(s, m, x->scales);
        for (int j = 0; j < 32; j += LANES) {
            vi high = vi_load_u8(x->qh + j); /* bit 0 is the next sub-block's fifth bit */
            for (int p = 0; p < 4; p++) {
                const vf d0 = vf_set1(d * (float)s[2 * p]), m0 = vf_set1(dmin * (float)m[2 * p]);
                const vf d1 = vf_set1(d * (float)s[2 * p + 1]), m1 = vf_set1(dmin * (float)m[2 * p + 1]);
                float *y = out + i + 64 * p + j;
                const vi q = vi_load_u8(x->qs + 32 * p + j);
                const vi q0 = vi_or(vi_and(q, vi_set1(15)), vi_and(vi_shl(high, 4), vi_set1(16)));
                const vi q1 = vi_or(vi_shr(q, 4), vi_and(vi_shl(high, 3), vi_set1(16)));
                vf_store(y, vf_sub(vf_mul(d0, vi_to_vf(q0)), m0));
                vf_store(y + 32, vf_sub(vf_mul(d1, vi_to_vf(q1)), m1));
                high = vi_shr(high, 2);
            }
        }
    }
}

/* Q6_K: sixteen sub-blocks of 16, signed scales of eight bits */

static void pack_Q6_K(block_q6_K *y, const uint8_t *codes) {
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 32; j++) {
            const uint8_t *c = codes + 128 * h + j;
            y->ql[64 * h + j] = (uint8_t)((c[0] & 15) | c[64] << 4);
            y->ql[64 * h + 32 + j] = (uint8_t)((c[32] & 15) | c[96] << 4);
            y->qh[32 * h + j] = (uint8_t)(c[0] >> 4 | c[32] >> 4 << 2 | c[64] >> 4 << 4 | c[96] >> 4 << 6);
        }
}

/* the scale of largest magnitude, the first of equals */
static inline float peak_scale(const float *scales) {
    float peak = 0.0f, amax = 0.0f;
    for (int j = 0; j < 16; j++)
        if (fabsf(scales[j]) > amax) {
            amax = fabsf(scales[j]);
            peak = scales[j];
        }
    return peak;
}

static void finish_Q6_K(const float *x, block_q6_K *y, const float *scales, const float *code_scales) {
    const float peak = peak_scale(scales);
    if (fabsf(peak) < TINY) {
        memset(y, 0, sizeof *y);
        return;
    }
    const float inverse_d = -128.0f / peak;
    y->d = float_to_half(1.0f / inverse_d);
    const float d = half_to_float(y->d);
    uint8_t codes[SUPER];
    for (int j = 0; j < 16; j++) {
        const int s = nearest(inverse_d * scales[j]);
        y->scales[j] = (int8_t)(s < 127 ? s : 127);
        const float dj = d * (float)y->scales[j];
        if (dj != 0.0f) divide_codes(codes + 16 * j, x + 16 * j, 16, 0.0f, dj, -32, 31);
        else if (code_scales[j] != 0.0f) search_codes(codes + 16 * j, x + 16 * j, 16, code_scales[j], 0.0f, -32, 31);
        else memset(codes + 16 * j, 0, 16);
    }
    pack_Q6_K(y, codes);
}

static void quantize_pair_Q6_K(const float *x, block_q6_K *y, int count) {
    pair_fit fits;
    for (int j = 0; j < PAIR / 16; j += LANES) {
        vf lanes[16], w[16];
        lane_fit fit;
        load_lanes(lanes, x + 16 * j, 16);
        for (int i = 0; i < 16; i++) w[i] = vf_mul(lanes[i], lanes[i]);
        fit_symmetric(&fit, lanes, w, 16, 32);
        store_fit(&fits, j, &fit);
    }
    for (int b = 0; b < count; b++) finish_Q6_K(x + SUPER * b, y + b, fits.scale + 16 * b, fits.code_scale + 16 * b);
}

static void quantize_Q6_K(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_q6_K *y = (block_q6_K *)out;
    FOR_PAIRS(x, n_rows * n_in, y, quantize_pair_Q6_K);
}

INLINE void values_Q6_K(float *out, vi low, vi high, float d) {
    const vi q = vi_sub(vi_or(low, vi_and(high, vi_set1(48))), vi_set1(32));
    vf_store(out, vf_mul(vf_set1(d), vi_to_vf(q)));
}

static void dequantize_Q6_K(const uint8_t *src, float *out, int64_t n) {
    const block_q6_K *x = (const block_q6_K *)src;
    const vi nibble = vi_set1(15);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        for (int h = 0; h < 2; h++)
            for (int j = 0; j < 32; j += LANES) {
                const int8_t *s = x->scales + 8 * h + j / 16;
                const vi low = vi_load_u8(x->ql + 64 * h + j), low2 = vi_load_u8(x->ql + 64 * h + 32 + j);
                const vi high = vi_load_u8(x->qh + 32 * h + j);
                float *y = out + i + 128 * h + j;
                values_Q6_K(y, vi_and(low, nibble), vi_shl(high, 4), d * (float)s[0]);
                values_Q6_K(y + 32, vi_and(low2, nibble), vi_shl(high, 2), d * (float)s[2]);
                values_Q6_K(y + 64, vi_shr(low, 4), high, d * (float)s[4]);
                values_Q6_K(y + 96, vi_shr(low2, 4), vi_shr(high, 2), d * (float)s[6]);
            }
    }
}
