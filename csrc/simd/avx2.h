#ifndef GFL_SIMD_H
#define GFL_SIMD_H
#if !defined(__clang__) /* there isa/avx2.c does it */
#pragma GCC target("avx2,f16c,fma")
#endif
/* Eight lanes. The meaning of the names is in scalar.h. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../half.h"

#define LANES 8
#define GROUPS 2
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;

static inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
static inline uint16_t float_to_half(float f) { return _cvtss_sh(f, 0); }

static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_zero(void) { return _mm256_setzero_ps(); }
static inline void vf_pin(vf *v) { __asm__ volatile("" : "+x"(*v)); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_estimate(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_sub_fused(vf a, vf b) { return _mm256_fmsub_ps(a, _mm256_set1_ps(1.0f), b); }
static inline vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vf_neg(vf a) { return _mm256_xor_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vm vf_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vm vf_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline vm vf_gt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vm vf_ne(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
static inline vm vf_not_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
static inline void vf_update(vf *v, vm m, vf a) { *v = vf_select(m, a, *v); }
static inline vf vf_add_1(vf a, vm m) { return _mm256_add_ps(a, _mm256_and_ps(m, _mm256_set1_ps(1.0f))); }
static inline vm vm_and(vm a, vm b) { return _mm256_and_ps(a, b); }
static inline vm vm_or(vm a, vm b) { return _mm256_or_ps(a, b); }
static inline vm vm_andnot(vm a, vm b) { return _mm256_andnot_ps(b, a); }
static inline int vm_any(vm m) { return _mm256_movemask_ps(m); }

static inline float vf_hmax(vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline float vf_hmin(vf a) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

/* both at once, as two maxima in the halves of a register */
static inline void vf_hrange(vf low, vf high, float *min, float *max) {
    const __m256 negated = _mm256_xor_ps(_mm256_set1_ps(-0.0f), low);
    __m256 m = _mm256_max_ps(_mm256_permute2f128_ps(high, negated, 0x20), _mm256_permute2f128_ps(high, negated, 0x31));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0x4e));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0xb1));
    *max = _mm256_cvtss_f32(m);
    *min = -_mm_cvtss_f32(_mm256_extractf128_ps(m, 1));
}

static inline vi vi_set1(int x) { return _mm256_set1_epi32(x); }
static inline vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void vi_store(int32_t *p, vi v) { _mm256_storeu_si256((__m256i *)p, v); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
static inline vm vi_gt(vi a, vi b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
static inline vi vi_select(vm m, vi a, vi b) { return _mm256_blendv_epi8(b, a, _mm256_castps_si256(m)); }
#define vi_shl(a, n) _mm256_slli_epi32(a, n)
#define vi_shr(a, n) _mm256_srli_epi32(a, n)
static inline vf vi_to_vf(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vi vf_truncate(vf a) { return _mm256_cvttps_epi32(a); }
static inline vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vf_floor(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
static inline vi vi_count(vi a, vm m) { return _mm256_sub_epi32(a, _mm256_castps_si256(m)); }
static inline vf vf_pick8(const float *table, vi i) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i); }
static inline vf vf_pick8_twice(const float *table, vi i) { return vf_pick8(table, i); }
static inline vf vf_pick16(const float *table, vi i) {
    const vf high = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(vf_pick8(table, i), vf_pick8(table + 8, i), high);
}
static inline vi vf_as_vi(vf a) { return _mm256_castps_si256(a); }
static inline vf vi_as_vf(vi a) { return _mm256_castsi256_ps(a); }

static inline void vi_store_u8(void *p, vi v) {
    const __m256i low = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0c080400));
    _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
static inline void vi_store_limited(uint8_t *p, const vi *v, int high) {
    const __m256i low = _mm256_packs_epi32(v[0], v[1]), top = _mm256_packs_epi32(v[2], v[3]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, top),
                                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)p, _mm256_min_epu8(bytes, _mm256_set1_epi8((char)high)));
}
static inline vi vi_load_u8(const void *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline vi vi_load_i8(const void *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline vf vf_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void vf_store_f16(void *p, vf v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, 0)); }
static inline vi vi_load_u16(const void *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline void vi_store_u16(void *p, vi v) {
    const __m256i low = _mm256_shuffle_epi8(v, _mm256_set1_epi64x(0x0d0c090805040100));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(low, low), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}

static inline vm vm_from_bits(uint32_t bits) {
    const __m256i one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), one), one));
}
static inline uint32_t vm_to_bits(vm m) { return (uint32_t)_mm256_movemask_ps(m); }

static inline void vf_transpose(vf *out, const float *src, int64_t stride) {
    __m256 r[8], s[8];
    for (int i = 0; i < 4; i++) { /* halves of two rows, so that only in-lane shuffles remain */
        const float *low = src + i * stride, *high = src + (i + 4) * stride;
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
    }
    for (int i = 0; i < 8; i += 4) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        s[i + 2] = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
        s[i + 3] = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        out[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        out[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        out[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        out[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
}

typedef struct {
    __m256d low, high;
} vd;
static inline vd vd_zero(void) { return (vd){_mm256_setzero_pd(), _mm256_setzero_pd()}; }
static inline vd vd_load(const float *p) {
    return (vd){_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
static inline vd vd_load_difference(const float *p, const float *q) {
    const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(q));
    return (vd){_mm256_cvtps_pd(_mm256_castps256_ps128(d)), _mm256_cvtps_pd(_mm256_extractf128_ps(d, 1))};
}
static inline vd vd_add_product(vd sum, vd a, vd b) {
    return (vd){_mm256_add_pd(sum.low, _mm256_mul_pd(a.low, b.low)),
                _mm256_add_pd(sum.high, _mm256_mul_pd(a.high, b.high))};
}
static inline void vd_store(double *p, vd v) {
    _mm256_storeu_pd(p, v.low);
    _mm256_storeu_pd(p + 4, v.high);
}

static inline vf vf_row_sums(const float *rows) {
    static const int order[8] = {0, 2, 1, 3, 4, 6, 5, 7}; /* where a row must be for its sum to come out in place */
    __m256 r[8], s[4];
    for (int i = 0; i < 8; i++) r[order[i]] = _mm256_loadu_ps(rows + 8 * i);
    for (int i = 0; i < 4; i++)
        s[i] = _mm256_add_ps(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20),
                             _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    for (int i = 0; i < 2; i++)
        r[i] = _mm256_add_ps(_mm256_shuffle_ps(s[i], s[i + 2], 0x44), _mm256_shuffle_ps(s[i], s[i + 2], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(r[0], r[1], 0x88), _mm256_shuffle_ps(r[0], r[1], 0xdd));
}

#endif
