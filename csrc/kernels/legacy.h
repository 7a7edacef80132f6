#ifndef GFL_LEGACY_H
#define GFL_LEGACY_H
#include "../block_formats.h"
#include "base.h"
#include "batch.h"
#include "lanes.h"
#include "search_scale.h"

/* Q4_0 Q4_1 Q5_0 Q5_1 Q8_0: 32 weights, one scale; a search only with an imatrix (which Q8_0 ignores). */

static inline void block_extremes(const float *x, float *bottom, float *top) {
    vf high = vf_load(x), low = high;
    for (int i = LANES; i < LEGACY; i += LANES) {
        high = vf_max(vf_load(x + i), high);
        low = vf_min(vf_load(x + i), low);
    }
    vf_hrange(low, high, bottom, top);
}

/* The value of largest magnitude, the first one if two have it (ggml keeps its sign). */
static inline float signed_peak(const float *x) {
    float bottom, top;
    block_extremes(x, &bottom, &top);
    if (top > -bottom) return top;
    if (-bottom > top) return bottom;
    for (int i = 0; i < LEGACY; i++)
        if (x[i] == top || x[i] == bottom) return x[i] == 0.0f ? 0.0f : x[i];
    return 0.0f;
}

/* How a block of default_NAME makes codes: (x - offset) * id + half, truncated and limited. */
typedef struct {
    float offset, id, half;
    int top;
} legacy_scale;

/* INT32_MIN (from an infinite or NaN product) has a zero low byte, which is what ggml takes. */
INLINE vi legacy_code(const float *x, legacy_scale s) {
    const vf v = vf_mul(vf_sub(vf_load(x), vf_set1(s.offset)), vf_set1(s.id));
    return vi_min(vi_and(vf_truncate(vf_add(v, vf_set1(s.half))), vi_set1(0xff)), vi_set1(s.top));
}

/* Low four bits of the codes of weights j and j + 16 in byte j. */
INLINE void legacy_nibbles(uint8_t *qs, const float *x, legacy_scale s) {
    for (int i = 0; i < 16; i += LANES)
        vi_store_u8(qs + i, vi_or(legacy_code(x + i, s), vi_shl(legacy_code(x + 16 + i, s), 4)));
}

/* The same, and the fifth bits. */
INLINE void legacy_fives(uint8_t *qh, uint8_t *qs, const float *x, legacy_scale s) {
    const vi low = vi_set1(15);
    uint32_t high = 0;
    for (int i = 0; i < 16; i += LANES) {
        const vi a = legacy_code(x + i, s), b = legacy_code(x + 16 + i, s);
        vi_store_u8(qs + i, vi_or(vi_and(a, low), vi_shl(vi_and(b, low), 4)));
        high |= (vm_to_bits(vi_gt(vi_and(a, vi_set1(16)), low)) << i) |
                (vm_to_bits(vi_gt(vi_and(b, vi_set1(16)), low)) << (16 + i));
    }
    memcpy(qh, &high, 4);
}

/* Among several zeros the first one's sign counts. */
static inline float first_equal(const float *x, float v) {
    if (v != 0.0f) return v;
    while (*x != 0.0f) x++;
    return *x;
}

static inline void legacy_range(const float *x, float *low, float *high) {
    block_extremes(x, low, high);
    *high = first_equal(x, *high);
    *low = first_equal(x, *low);
}

/* The scales of up to LEGACY_BATCH blocks at once: a division for each would be most of the work. */
enum { LEGACY_BATCH = 16 };

typedef struct {
    float low[LEGACY_BATCH], range[LEGACY_BATCH], id[LEGACY_BATCH];
    f16 d[LEGACY_BATCH], m[LEGACY_BATCH];
} legacy_batch;

/* d = range / levels, id = 1 / d or 0, m = low */
INLINE void finish_scales(legacy_batch *b, float levels) {
    for (int i = 0; i < LEGACY_BATCH; i += LANES) {
        const vf d = vf_div(vf_load(b->range + i), vf_set1(levels)), zero = vf_zero();
        vf_store_f16(b->d + i, d);
        vf_store_f16(b->m + i, vf_load(b->low + i));
        vf_store(b->id + i, vf_select(vf_eq(d, zero), zero, vf_div(vf_set1(1.0f), d)));
    }
}

INLINE void scales_from_peaks(legacy_batch *b, const float *x, int count, float levels) {
    *b = (legacy_batch){0};
    for (int i = 0; i < count; i++) b->range[i] = signed_peak(x + LEGACY * i);
    finish_scales(b, levels);
}

INLINE void scales_from_ranges(legacy_batch *b, const float *x, int count, float levels) {
    *b = (legacy_batch){0};
    for (int i = 0; i < count; i++) {
        float high;
        legacy_range(x + LEGACY * i, &b->low[i], &high);
        b->range[i] = high - b->low[i];
    }
    finish_scales(b, levels);
}

/* With an imatrix the blocks of a row are fitted like sub-blocks of K-quants, and keep the codes of the search. */
INLINE void fit_legacy(batch_fit *fits, const float *x, const float *imatrix, float mean_square, int64_t left,
                       int q_max, int with_min) {
    float x_copy[TILE], imatrix_copy[TILE];
    const float *tile = tile_of(x_copy, x, left), *tile_imatrix = tile_of(imatrix_copy, imatrix, left);
    float sigma2[AT_ONCE];
    for (int j = 0; j < AT_ONCE; j++) sigma2[j] = mean_square;
    for (int j = 0; j < TILE / LEGACY; j += AT_ONCE) {
        lanes_of_32 lanes[GROUPS], w[GROUPS];
        lane_fit fit[GROUPS];
        load_groups(lanes, tile + LEGACY * j, LEGACY);
        measured_importance(w, lanes, tile_imatrix + LEGACY * j, sigma2, LEGACY);
        if (with_min) fit_min(fit, lanes, w, LEGACY, (min_trials){q_max, -0.9f, 0.05f, 36, 0, 0});
        else fit_symmetric(fit, lanes, w, LEGACY, q_max);
        store_fit(fits, j, fit);
    }
}

#define IN_LEGACY_BATCHES(x, y, n, make)                                                                             \
    for (int64_t i_ = 0, left_; (left_ = ((n) - i_) / LEGACY) > 0; i_ += LEGACY * LEGACY_BATCH, (y) += LEGACY_BATCH) \
    make((x) + i_, (y), (int)(left_ < LEGACY_BATCH ? left_ : LEGACY_BATCH))

/* Mean squares of a few rows at a time. */
enum { LEGACY_ROWS = 16 };

/* Defines quantize_NAME from default_NAME(x, y, count), which makes up to LEGACY_BATCH blocks, and measured_NAME(x, y,
 * fits, index), which makes one. */
#define QUANTIZE_LEGACY(NAME, block, q_max, with_min)                                                                 \
    static void quantize_##NAME(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {   \
        block *y = (block *)out;                                                                                      \
        float sums[LEGACY_ROWS];                                                                                      \
        if (!imatrix) IN_LEGACY_BATCHES(x, y, n_rows * n_in, default_##NAME);                                         \
        for (int64_t row = 0; imatrix && row < n_rows; row++) {                                                       \
            if (row % LEGACY_ROWS == 0)                                                                               \
                sums_of_squares(sums, x + row * n_in, n_rows - row < LEGACY_ROWS ? n_rows - row : LEGACY_ROWS, n_in); \
            for (int64_t i = 0; i < n_in; i += TILE) {                                                                \
                const float *tile = x + row * n_in + i;                                                               \
                batch_fit fits;                                                                                       \
                fit_legacy(&fits, tile, imatrix + i, sums[row % LEGACY_ROWS] / (float)n_in, n_in - i, q_max,          \
                           with_min);                                                                                 \
                for (int j = 0; j < TILE / LEGACY && i + j * LEGACY < n_in; j++)                                      \
                    measured_##NAME(tile + j * LEGACY, y++, &fits, j);                                                \
            }                                                                                                         \
        }                                                                                                             \
    }

static void default_Q4_0(const float *x, block_q4_0 *y, int count) {
    legacy_batch b;
    scales_from_peaks(&b, x, count, -8.0f);
    for (int i = 0; i < count; i++) {
        y[i].d = b.d[i];
        legacy_nibbles(y[i].qs, x + LEGACY * i, (legacy_scale){0.0f, b.id[i], 8.5f, 15});
    }
}

static inline void measured_Q4_0(const float *x, block_q4_0 *y, const batch_fit *fits, int j) {
    uint8_t codes[LEGACY];
    signed_search_codes(codes, x, LEGACY, fits->code_scale[j], -8, 7);
    y->d = float_to_half(fits->scale[j]);
    pack_nibbles(y->qs, codes);
}
QUANTIZE_LEGACY(Q4_0, block_q4_0, 8, 0)

static void default_Q4_1(const float *x, block_q4_1 *y, int count) {
    legacy_batch b;
    scales_from_ranges(&b, x, count, 15.0f);
    for (int i = 0; i < count; i++) {
        y[i].d = b.d[i];
        y[i].m = b.m[i];
        legacy_nibbles(y[i].qs, x + LEGACY * i, (legacy_scale){b.low[i], b.id[i], 0.5f, 15});
    }
}

static inline void measured_Q4_1(const float *x, block_q4_1 *y, const batch_fit *fits, int j) {
    uint8_t codes[LEGACY];
    search_codes(codes, x, LEGACY, fits->code_scale[j], fits->code_min[j], 0, 15);
    y->d = float_to_half(fits->scale[j]);
    y->m = float_to_half(-fits->min[j]);
    pack_nibbles(y->qs, codes);
}
QUANTIZE_LEGACY(Q4_1, block_q4_1, 15, 1)

static void default_Q5_0(const float *x, block_q5_0 *y, int count) {
    legacy_batch b;
    scales_from_peaks(&b, x, count, -16.0f);
    for (int i = 0; i < count; i++) {
        y[i].d = b.d[i];
        legacy_fives(y[i].qh, y[i].qs, x + LEGACY * i, (legacy_scale){0.0f, b.id[i], 16.5f, 31});
    }
}

static inline void measured_Q5_0(const float *x, block_q5_0 *y, const batch_fit *fits, int j) {
    uint8_t codes[LEGACY];
    signed_search_codes(codes, x, LEGACY, fits->code_scale[j], -16, 15);
    y->d = float_to_half(fits->scale[j]);
    pack_fifth_bits(y->qh, codes);
    pack_nibbles(y->qs, codes);
}
QUANTIZE_LEGACY(Q5_0, block_q5_0, 16, 0)

static void default_Q5_1(const float *x, block_q5_1 *y, int count) {
    legacy_batch b;
    scales_from_ranges(&b, x, count, 31.0f);
    for (int i = 0; i < count; i++) {
        y[i].d = b.d[i];
        y[i].m = b.m[i];
        legacy_fives(y[i].qh, y[i].qs, x + LEGACY * i, (legacy_scale){b.low[i], b.id[i], 0.5f, 255});
    }
}

static inline void measured_Q5_1(const float *x, block_q5_1 *y, const batch_fit *fits, int j) {
    uint8_t codes[LEGACY];
    search_codes(codes, x, LEGACY, fits->code_scale[j], fits->code_min[j], 0, 31);
    y->d = float_to_half(fits->scale[j]);
    y->m = float_to_half(-fits->min[j]);
    pack_fifth_bits(y->qh, codes);
    pack_nibbles(y->qs, codes);
}
QUANTIZE_LEGACY(Q5_1, block_q5_1, 31, 1)

static void default_Q8_0(const float *x, block_q8_0 *y, int count) {
    const vi sign = vi_set1(INT32_MIN), below_half = vf_as_vi(vf_set1(0x1.fffffep-2f));
    legacy_batch b = {0};
    for (int i = 0; i < count; i++) {
        vf peak = vf_zero();
        for (int j = 0; j < LEGACY; j += LANES) peak = vf_max(vf_abs(vf_load(x + LEGACY * i + j)), peak);
        b.range[i] = vf_hmax(peak);
    }
    finish_scales(&b, 127.0f);
    for (int i = 0; i < count; i++) {
        y[i].d = b.d[i];
        for (int j = 0; j < LEGACY; j += LANES) { /* halves go away from zero: add the float below 0.5, then truncate */
            const vf v = vf_mul(vf_load(x + LEGACY * i + j), vf_set1(b.id[i]));
            const vf bump = vi_as_vf(vi_or(vi_and(vf_as_vi(v), sign), below_half));
            vi_store_u8(y[i].qs + j, vf_truncate(vf_add(v, bump)));
        }
    }
}

static void quantize_Q8_0(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    (void)imatrix;
    block_q8_0 *y = (block_q8_0 *)out;
    IN_LEGACY_BATCHES(x, y, n_rows * n_in, default_Q8_0);
}

/* out[0..32) = codes * d + m; codes * d alone if there is no m */
static inline void legacy_values(float *out, const uint8_t *codes, int offset, float d) {
    for (int i = 0; i < LEGACY; i += LANES)
        vf_store(out + i, vf_mul(vi_to_vf(vi_sub(vi_load_u8(codes + i), vi_set1(offset))), vf_set1(d)));
}

static inline void legacy_values_min(float *out, const uint8_t *codes, float d, float m) {
    for (int i = 0; i < LEGACY; i += LANES)
        vf_store(out + i, vf_add(vf_mul(vi_to_vf(vi_load_u8(codes + i)), vf_set1(d)), vf_set1(m)));
}

static void dequantize_Q4_0(const uint8_t *src, float *out, int64_t n) {
    const block_q4_0 *x = (const block_q4_0 *)src;
    for (int64_t i = 0; i < n; i += LEGACY, x++) {
        uint8_t codes[LEGACY];
        unpack_nibbles(codes, x->qs);
        legacy_values(out + i, codes, 8, half_to_float(x->d));
    }
}

static void dequantize_Q4_1(const uint8_t *src, float *out, int64_t n) {
    const block_q4_1 *x = (const block_q4_1 *)src;
    for (int64_t i = 0; i < n; i += LEGACY, x++) {
        uint8_t codes[LEGACY];
        unpack_nibbles(codes, x->qs);
        legacy_values_min(out + i, codes, half_to_float(x->d), half_to_float(x->m));
    }
}

static void dequantize_Q5_0(const uint8_t *src, float *out, int64_t n) {
    const block_q5_0 *x = (const block_q5_0 *)src;
    for (int64_t i = 0; i < n; i += LEGACY, x++) {
        uint8_t codes[LEGACY];
        unpack_nibbles(codes, x->qs);
        unpack_fifth_bits(codes, x->qh);
        legacy_values(out + i, codes, 16, half_to_float(x->d));
    }
}

static void dequantize_Q5_1(const uint8_t *src, float *out, int64_t n) {
    const block_q5_1 *x = (const block_q5_1 *)src;
    for (int64_t i = 0; i < n; i += LEGACY, x++) {
        uint8_t codes[LEGACY];
        unpack_nibbles(codes, x->qs);
        unpack_fifth_bits(codes, x->qh);
        legacy_values_min(out + i, codes, half_to_float(x->d), half_to_float(x->m));
    }
}

static void dequantize_Q8_0(const uint8_t *src, float *out, int64_t n) {
    const block_q8_0 *x = (const block_q8_0 *)src;
    for (int64_t i = 0; i < n; i += LEGACY, x++) {
        const vf d = vf_set1(half_to_float(x->d));
        for (int j = 0; j < LEGACY; j += LANES) vf_store(out + i + j, vf_mul(vi_to_vf(vi_load_i8(x->qs + j)), d));
    }
}

#endif
