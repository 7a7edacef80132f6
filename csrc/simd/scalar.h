#ifndef GFL_SIMD_H
#define GFL_SIMD_H
/* One lane: the vocabulary of simd/, in plain C. vf = floats, vi = 32-bit integers, vm = a condition per lane.
 * The meaning of every name is fixed here; the other headers of this directory do the same thing on more lanes. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../half.h"

#define LANES 1
#define GROUPS 2 /* vectors that a search works on at once, see kernels/search_scale.h */
typedef float vf;
typedef int32_t vi;
typedef int vm;

static inline float half_to_float(uint16_t h) { return portable_f16_to_f32(h); }
static inline uint16_t float_to_half(float f) { return portable_f32_to_f16(f); }

static inline vf vf_load(const float *p) {
    float v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf vf_set1(float x) { return x; }
static inline vf vf_zero(void) { return 0.0f; }
/* keeps the compiler from moving the computation of v past this point, see TOGETHER in kernels/search_scale.h */
static inline void vf_pin(vf *v) { (void)v; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
/* a * b + c, rounded once or twice: not for bytes */
static inline vf vf_estimate(vf a, vf b, vf c) { return a * b + c; }
/* a - b, on a unit for multiplications if such units do not add and subtract */
static inline vf vf_sub_fused(vf a, vf b) { return a - b; }
static inline vf vf_sqrt(vf a) { return sqrtf(a); }
static inline vf vf_abs(vf a) { return float_of(bits_of(a) & 0x7fffffffu); }
static inline vf vf_neg(vf a) { return float_of(bits_of(a) ^ 0x80000000u); }
static inline vf vf_min(vf a, vf b) { return a < b ? a : b; } /* b if either is NaN */
static inline vf vf_max(vf a, vf b) { return a > b ? a : b; } /* b if either is NaN */
static inline vm vf_lt(vf a, vf b) { return a < b; }
static inline vm vf_le(vf a, vf b) { return a <= b; }
static inline vm vf_gt(vf a, vf b) { return a > b; }
static inline vm vf_eq(vf a, vf b) { return a == b; }
static inline vm vf_ne(vf a, vf b) { return a != b; }       /* true if either is NaN */
static inline vm vf_not_lt(vf a, vf b) { return !(a < b); } /* true if either is NaN */
static inline vf vf_select(vm m, vf a, vf b) { return m ? a : b; }
static inline void vf_update(vf *v, vm m, vf a) { *v = vf_select(m, a, *v); } /* *v = a where m */
static inline vf vf_add_1(vf a, vm m) { return m ? a + 1.0f : a; }            /* a + 1 where m */
static inline vm vm_and(vm a, vm b) { return a & b; }
static inline vm vm_or(vm a, vm b) { return a | b; }
static inline vm vm_andnot(vm a, vm b) { return a & !b; } /* a and not b */
static inline int vm_any(vm m) { return m; }
static inline float vf_hmax(vf a) { return a; }
static inline float vf_hmin(vf a) { return a; }
static inline void vf_hrange(vf low, vf high, float *min, float *max) { *min = low, *max = high; }

static inline vi vi_set1(int x) { return x; }
static inline vi vi_load(const int32_t *p) { return *p; }
static inline void vi_store(int32_t *p, vi v) { *p = v; }
static inline vi vi_add(vi a, vi b) { return (vi)((uint32_t)a + (uint32_t)b); }
static inline vi vi_sub(vi a, vi b) { return (vi)((uint32_t)a - (uint32_t)b); }
static inline vi vi_and(vi a, vi b) { return a & b; }
static inline vi vi_or(vi a, vi b) { return a | b; }
static inline vi vi_xor(vi a, vi b) { return a ^ b; }
static inline vi vi_mul(vi a, vi b) { return (vi)((uint32_t)a * (uint32_t)b); } /* low 32 bits */
static inline vi vi_min(vi a, vi b) { return a < b ? a : b; }
static inline vi vi_max(vi a, vi b) { return a > b ? a : b; }
static inline vm vi_gt(vi a, vi b) { return a > b; }
static inline vi vi_select(vm m, vi a, vi b) { return m ? a : b; }
#define vi_shl(a, n) ((vi)((uint32_t)(a) << (n)))
#define vi_shr(a, n) ((vi)((uint32_t)(a) >> (n)))
static inline vf vi_to_vf(vi a) { return (float)a; }
/* toward zero; what does not fit becomes INT32_MIN, as in ggml's x86 code */
static inline vi vf_truncate(vf a) { return a > -2147483648.0f && a < 2147483648.0f ? (vi)a : INT32_MIN; }
/* to nearest, ties to even, for |a| < 2^22 */
static inline vf vf_round(vf a) { return (a + 12582912.0f) - 12582912.0f; }
/* for |a| < 2^31 */
static inline vf vf_floor(vf a) {
    const float whole = (float)(int32_t)a;
    return whole > a ? whole - 1.0f : whole;
}
/* a + 1 where m */
static inline vi vi_count(vi a, vm m) { return a + m; }
/* table[i % 8], table[i % 16] */
static inline vf vf_pick8(const float *table, vi i) { return table[i & 7]; }
static inline vf vf_pick16(const float *table, vi i) { return table[i & 15]; }
/* the same as vf_pick8 if table[8..15] repeats table[0..7], and quicker on some */
static inline vf vf_pick8_twice(const float *table, vi i) { return table[i & 7]; }
static inline vi vf_as_vi(vf a) { return (vi)bits_of(a); }
static inline vf vi_as_vf(vi a) { return float_of((uint32_t)a); }

/* the low byte of each lane; bytes, halves and bfloats widened into lanes */
static inline void vi_store_u8(void *p, vi v) { *(uint8_t *)p = (uint8_t)v; }
/* four vectors as 4 * LANES bytes, each limited to 0 ... high */
static inline void vi_store_limited(uint8_t *p, const vi *v, int high) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)vi_max(vi_min(v[i], high), 0);
}
static inline vi vi_load_u8(const void *p) { return *(const uint8_t *)p; }
static inline vi vi_load_i8(const void *p) { return *(const int8_t *)p; }
static inline vf vf_load_f16(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return half_to_float(h);
}
static inline void vf_store_f16(void *p, vf v) {
    const uint16_t h = float_to_half(v);
    memcpy(p, &h, 2);
}
static inline vi vi_load_u16(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}
static inline void vi_store_u16(void *p, vi v) {
    const uint16_t h = (uint16_t)v;
    memcpy(p, &h, 2);
}

/* one bit per lane, the lane's number counted from the low end of `bits` */
static inline vm vm_from_bits(uint32_t bits) { return (int)(bits & 1); }
static inline uint32_t vm_to_bits(vm m) { return (uint32_t)m; }

/* out[i] lane l = src[l * stride + i] for i in [0, LANES) */
static inline void vf_transpose(vf *out, const float *src, int64_t stride) {
    (void)stride;
    out[0] = src[0];
}
/* lane i = the sum of rows[i * LANES .. (i + 1) * LANES): halves of a row added, halves of that, ... */
static inline vf vf_row_sums(const float *rows) { return rows[0]; }

/* eight doubles, made from eight floats (or from their differences as floats) */
typedef struct {
    double lane[8];
} vd;
static inline vd vd_zero(void) { return (vd){{0}}; }
static inline vd vd_load(const float *p) {
    vd v;
    for (int i = 0; i < 8; i++) v.lane[i] = (double)p[i];
    return v;
}
static inline vd vd_load_difference(const float *p, const float *q) {
    vd v;
    for (int i = 0; i < 8; i++) v.lane[i] = (double)(p[i] - q[i]);
    return v;
}
static inline vd vd_add_product(vd sum, vd a, vd b) {
    for (int i = 0; i < 8; i++) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
}
static inline void vd_store(double *p, vd v) { memcpy(p, v.lane, sizeof v.lane); }

#endif
