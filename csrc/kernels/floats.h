#ifndef GFL_FLOATS_H
#define GFL_FLOATS_H
#include "lanes.h"

/* F32, F16, BF16: one weight per block, no search. */

static void quantize_F32(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    memcpy(out, x, (size_t)(n_rows * n_in) * sizeof *x);
}

static void dequantize_F32(const uint8_t *src, float *out, int64_t n) { memcpy(out, src, (size_t)n * sizeof *out); }

static void quantize_F16(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    const int64_t n = n_rows * n_in;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store_f16(out + 2 * i, vf_load(x + i));
    for (; i < n; i++) {
        const uint16_t h = float_to_half(x[i]);
        memcpy(out + 2 * i, &h, 2);
    }
}

static void dequantize_F16(const uint8_t *src, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(out + i, vf_load_f16(src + 2 * i));
    for (; i < n; i++) {
        uint16_t h;
        memcpy(&h, src + 2 * i, 2);
        out[i] = half_to_float(h);
    }
}

/* Inputs are finite here (quantize_rows.c checks), so no NaN can round up to an infinity. */
static void quantize_BF16(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    const int64_t n = n_rows * n_in;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vi u = vf_as_vi(vf_load(x + i)), odd = vi_and(vi_shr(u, 16), vi_set1(1));
        vi_store_u16(out + 2 * i, vi_shr(vi_add(u, vi_add(odd, vi_set1(0x7fff))), 16));
    }
    for (; i < n; i++) {
        const uint16_t h = f32_to_bf16(x[i]);
        memcpy(out + 2 * i, &h, 2);
    }
}

static void dequantize_BF16(const uint8_t *src, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(out + i, vi_as_vf(vi_shl(vi_load_u16(src + 2 * i), 16)));
    for (; i < n; i++) {
        uint16_t h;
        memcpy(&h, src + 2 * i, 2);
        out[i] = bf16_to_f32(h);
    }
}

#endif
