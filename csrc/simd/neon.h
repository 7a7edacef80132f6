#ifndef GFL_SIMD_H
#define GFL_SIMD_H
/* Four lanes (AArch64). The meaning of the names is in scalar.h. */
#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../half.h"

#define LANES 4
#define GROUPS 2
typedef float32x4_t vf;
typedef int32x4_t vi;
typedef uint32x4_t vm;

static inline float half_to_float(uint16_t h) { return portable_f16_to_f32(h); }
static inline uint16_t float_to_half(float f) { return portable_f32_to_f16(f); }

static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf v) { vst1q_f32(p, v); }
static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline vf vf_zero(void) { return vdupq_n_f32(0.0f); }
static inline void vf_pin(vf *v) { __asm__ volatile("" : "+w"(*v)); }
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf vf_estimate(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_sub_fused(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_sqrt(vf a) { return vsqrtq_f32(a); }
static inline vf vf_abs(vf a) { return vabsq_f32(a); }
static inline vf vf_neg(vf a) { return vnegq_f32(a); }
/* not vminq and vmaxq, which order zeros by sign and return NaN */
static inline vf vf_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline vf vf_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vm vf_lt(vf a, vf b) { return vcltq_f32(a, b); }
static inline vm vf_le(vf a, vf b) { return vcleq_f32(a, b); }
static inline vm vf_gt(vf a, vf b) { return vcgtq_f32(a, b); }
static inline vm vf_eq(vf a, vf b) { return vceqq_f32(a, b); }
static inline vm vf_ne(vf a, vf b) { return vmvnq_u32(vceqq_f32(a, b)); }
static inline vm vf_not_lt(vf a, vf b) { return vmvnq_u32(vcltq_f32(a, b)); }
static inline vf vf_select(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }
static inline void vf_update(vf *v, vm m, vf a) { *v = vf_select(m, a, *v); }
static inline vf vf_add_1(vf a, vm m) {
    return vaddq_f32(a, vreinterpretq_f32_u32(vandq_u32(m, vreinterpretq_u32_f32(vdupq_n_f32(1.0f)))));
}
static inline vm vm_and(vm a, vm b) { return vandq_u32(a, b); }
static inline vm vm_or(vm a, vm b) { return vorrq_u32(a, b); }
static inline vm vm_andnot(vm a, vm b) { return vbicq_u32(a, b); }
static inline int vm_any(vm m) { return vmaxvq_u32(m) != 0; }
static inline float vf_hmax(vf a) { return vmaxvq_f32(a); }
static inline float vf_hmin(vf a) { return vminvq_f32(a); }
static inline void vf_hrange(vf low, vf high, float *min, float *max) {
    *min = vminvq_f32(low), *max = vmaxvq_f32(high);
}

static inline vi vi_set1(int x) { return vdupq_n_s32(x); }
static inline vi vi_load(const int32_t *p) { return vld1q_s32(p); }
static inline void vi_store(int32_t *p, vi v) { vst1q_s32(p, v); }
static inline vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
static inline vi vi_sub(vi a, vi b) { return vsubq_s32(a, b); }
static inline vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
static inline vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
static inline vi vi_xor(vi a, vi b) { return veorq_s32(a, b); }
static inline vi vi_mul(vi a, vi b) { return vmulq_s32(a, b); }
static inline vi vi_min(vi a, vi b) { return vminq_s32(a, b); }
static inline vi vi_max(vi a, vi b) { return vmaxq_s32(a, b); }
static inline vm vi_gt(vi a, vi b) { return vcgtq_s32(a, b); }
static inline vi vi_select(vm m, vi a, vi b) { return vbslq_s32(m, a, b); }
static inline vi vi_shl(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
static inline vi vi_shr(vi a, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n)));
}
static inline vf vi_to_vf(vi a) { return vcvtq_f32_s32(a); }
static inline vi vf_truncate(vf a) {
    const vm fits = vandq_u32(vcgtq_f32(a, vdupq_n_f32(-2147483648.0f)), vcltq_f32(a, vdupq_n_f32(2147483648.0f)));
    return vbslq_s32(fits, vcvtq_s32_f32(a), vdupq_n_s32(INT32_MIN));
}
static inline vf vf_round(vf a) { return vrndnq_f32(a); }
static inline vf vf_floor(vf a) { return vrndmq_f32(a); }
static inline vi vi_count(vi a, vm m) { return vsubq_s32(a, vreinterpretq_s32_u32(m)); }
/* table bytes 4 i ... 4 i + 3 */
static inline uint8x16_t bytes_of_index(vi i, int mask) {
    const uint32x4_t index = vandq_u32(vreinterpretq_u32_s32(i), vdupq_n_u32((uint32_t)mask));
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404));
}
static inline vf vf_pick8(const float *table, vi i) {
    const uint8_t *t = (const uint8_t *)table;
    const uint8x16x2_t all = {{vld1q_u8(t), vld1q_u8(t + 16)}};
    return vreinterpretq_f32_u8(vqtbl2q_u8(all, bytes_of_index(i, 7)));
}
static inline vf vf_pick16(const float *table, vi i) {
    const uint8_t *t = (const uint8_t *)table;
    const uint8x16x4_t all = {{vld1q_u8(t), vld1q_u8(t + 16), vld1q_u8(t + 32), vld1q_u8(t + 48)}};
    return vreinterpretq_f32_u8(vqtbl4q_u8(all, bytes_of_index(i, 15)));
}
static inline vf vf_pick8_twice(const float *table, vi i) { return vf_pick8(table, i); }
static inline vi vf_as_vi(vf a) { return vreinterpretq_s32_f32(a); }
static inline vf vi_as_vf(vi a) { return vreinterpretq_f32_s32(a); }

static inline void vi_store_u8(void *p, vi v) {
    const uint16x4_t halves = vmovn_u32(vreinterpretq_u32_s32(v));
    const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
    memcpy(p, &bytes, 4);
}
static inline uint8x8_t load_4(const void *p) {
    uint32_t bytes;
    memcpy(&bytes, p, 4);
    return vreinterpret_u8_u32(vdup_n_u32(bytes));
}
static inline void vi_store_limited(uint8_t *p, const vi *v, int high) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(v[0]), vqmovn_s32(v[1])),
                    top = vcombine_s16(vqmovn_s32(v[2]), vqmovn_s32(v[3]));
    vst1q_u8(p, vminq_u8(vcombine_u8(vqmovun_s16(low), vqmovun_s16(top)), vdupq_n_u8((uint8_t)high)));
}
static inline vi vi_load_u8(const void *p) {
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_4(p)))));
}
static inline vi vi_load_i8(const void *p) { return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_4(p))))); }
static inline uint16x4_t load_4_halves(const void *p) {
    uint64_t halves;
    memcpy(&halves, p, 8);
    return vcreate_u16(halves);
}
static inline void store_4_halves(void *p, uint16x4_t v) {
    const uint64_t halves = vget_lane_u64(vreinterpret_u64_u16(v), 0);
    memcpy(p, &halves, 8);
}
static inline vf vf_load_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_4_halves(p))); }
static inline void vf_store_f16(void *p, vf v) { store_4_halves(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
static inline vi vi_load_u16(const void *p) { return vreinterpretq_s32_u32(vmovl_u16(load_4_halves(p))); }
static inline void vi_store_u16(void *p, vi v) { store_4_halves(p, vmovn_u32(vreinterpretq_u32_s32(v))); }

static inline uint32x4_t lane_bits(void) {
    static const uint32_t bits[4] = {1, 2, 4, 8};
    return vld1q_u32(bits);
}
static inline vm vm_from_bits(uint32_t bits) { return vtstq_u32(vdupq_n_u32(bits), lane_bits()); }
static inline uint32_t vm_to_bits(vm m) { return vaddvq_u32(vandq_u32(m, lane_bits())); }

static inline void vf_transpose(vf *out, const float *src, int64_t stride) {
    const vf r0 = vld1q_f32(src), r1 = vld1q_f32(src + stride), r2 = vld1q_f32(src + 2 * stride),
             r3 = vld1q_f32(src + 3 * stride);
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)), b = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)), d = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
    out[0] = vreinterpretq_f32_f64(vzip1q_f64(a, c));
    out[1] = vreinterpretq_f32_f64(vzip1q_f64(b, d));
    out[2] = vreinterpretq_f32_f64(vzip2q_f64(a, c));
    out[3] = vreinterpretq_f32_f64(vzip2q_f64(b, d));
}

typedef struct {
    float64x2_t part[4];
} vd;
static inline vd vd_of(float32x4_t low, float32x4_t high) {
    return (vd){{vcvt_f64_f32(vget_low_f32(low)), vcvt_high_f64_f32(low), vcvt_f64_f32(vget_low_f32(high)),
                 vcvt_high_f64_f32(high)}};
}
static inline vd vd_zero(void) { return (vd){{vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0)}}; }
static inline vd vd_load(const float *p) { return vd_of(vld1q_f32(p), vld1q_f32(p + 4)); }
static inline vd vd_load_difference(const float *p, const float *q) {
    return vd_of(vsubq_f32(vld1q_f32(p), vld1q_f32(q)), vsubq_f32(vld1q_f32(p + 4), vld1q_f32(q + 4)));
}
static inline vd vd_add_product(vd sum, vd a, vd b) {
    for (int i = 0; i < 4; i++) sum.part[i] = vaddq_f64(sum.part[i], vmulq_f64(a.part[i], b.part[i]));
    return sum;
}
static inline void vd_store(double *p, vd v) {
    for (int i = 0; i < 4; i++) vst1q_f64(p + 2 * i, v.part[i]);
}

static inline vf vf_row_sums(const float *rows) {
    const vf r0 = vld1q_f32(rows), r1 = vld1q_f32(rows + 4), r2 = vld1q_f32(rows + 8), r3 = vld1q_f32(rows + 12);
    const vf a = vaddq_f32(vcombine_f32(vget_low_f32(r0), vget_low_f32(r1)),
                           vcombine_f32(vget_high_f32(r0), vget_high_f32(r1)));
    const vf b = vaddq_f32(vcombine_f32(vget_low_f32(r2), vget_low_f32(r3)),
                           vcombine_f32(vget_high_f32(r2), vget_high_f32(r3)));
    return vaddq_f32(vuzp1q_f32(a, b), vuzp2q_f32(a, b));
}

#endif
