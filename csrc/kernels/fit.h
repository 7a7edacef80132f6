/* Searches for the scale (and minimum) of a sub-block: ggml's search, run on LANES independent sub-blocks at once.
 *
 * Every lane does ggml's operations in ggml's order, so its result has ggml's bits; the order of the sums over a sub-block's
 * weights is what keeps a compiler from vectorising the search, not what keeps us from running LANES of them. `x[i]` holds
 * weight i of every lane's sub-block (vf_transpose makes it so).
 *
 * The codes themselves are not kept: the formats requantize with the rounded scales afterwards. Only where such a scale has
 * rounded to zero do ggml's files hold the codes of the search; they follow from `code_scale` and `code_min`.
 */

#define INLINE static inline __attribute__((always_inline))

/* ggml takes a sub-block whose values are smaller than this for zero. */
#define TINY 1e-15f

/* ggml's rounding adds 1.5 * 2^23 and reads the low mantissa bits. From |v| = 2^22 on that is not rounding any more, but it
 * is what ends up in the file. */
#define ROUND_MAGIC 12582912.0f
#define ROUND_LIMIT 4194303.0f

static inline int nearest(float v) { return (int)(bits_of(v + ROUND_MAGIC) & 0x7fffff) - 0x400000; }

static inline vi vf_nearest(vf v) {
    return vi_sub(vi_and(vf_as_vi(vf_add(v, vf_set1(ROUND_MAGIC))), vi_set1(0x7fffff)), vi_set1(0x400000));
}

static inline vi vi_clamp(vi v, int low, int high) { return vi_max(vi_min(v, vi_set1(high)), vi_set1(low)); }

typedef struct {
    vf scale, min;           /* w = scale * q + min */
    vf code_scale, code_min; /* q = clamp(nearest(code_scale * (w - code_min))) */
    vf sum_w;                /* of the weights' importances */
} lane_fit;

/* q as a float; `exact` is ggml's rounding for any argument, the other one for arguments below ROUND_LIMIT */
INLINE vf code_of(vf t, int low, int high, int exact) {
    if (exact) return vi_to_vf(vi_clamp(vf_nearest(t), low, high));
    return vf_round(vf_max(vf_min(t, vf_set1((float)high)), vf_set1((float)low)));
}

INLINE vf residual(vf scale, vf q, vf min, vf x, int absolute) {
    const vf diff = vf_sub(vf_add(vf_mul(scale, q), min), x);
    return absolute ? vf_abs(diff) : vf_mul(diff, diff);
}

/* Minimum and scale of n weights w = scale * q + min, 0 <= q <= q_max, min <= 0: the weighted least-squares solution of the
 * best of a series of trial scales (first + step * i + q_max) / (max - min), i = 0 ... last, where `min` is the best one
 * found so far. Errors are squares, or absolute values. Returns 0 if not `exact` and the fast rounding does not do. */
INLINE int fit_min_once(lane_fit *fit, const vf *x, const vf *w, int n, int q_max, float first, float step, int last,
                        int absolute, int exact) {
    vf q[32];
    vf min = x[0], max = x[0], sum_w = w[0], sum_x = vf_mul(w[0], x[0]);
    for (int i = 1; i < n; i++) {
        min = vf_min(x[i], min);
        max = vf_max(x[i], max);
        sum_w = vf_add(sum_w, w[i]);
        sum_x = vf_add(sum_x, vf_mul(w[i], x[i]));
    }
    const vf lowest = min, zero = vf_zero();
    min = vf_min(zero, min); /* in this order a -0 stays */
    const vm flat = vf_eq(max, min);
    const vf range = vf_sub(max, min);
    vf code_scale = vf_div(vf_set1((float)q_max), range), code_min = min, scale = vf_div(vf_set1(1.0f), code_scale);
    vf least = zero;
    vm safe = vf_le(vf_abs(vf_mul(code_scale, range)), vf_set1(ROUND_LIMIT));
    for (int i = 0; i < n; i++) {
        const vf l = code_of(vf_mul(code_scale, vf_sub(x[i], min)), 0, q_max, exact);
        least = vf_add(least, vf_mul(w[i], residual(scale, l, min, x[i], absolute)));
    }
    for (int trial = 0; trial <= last; trial++) {
        const vf iscale = vf_div(vf_set1(first + step * (float)trial + (float)q_max), vf_sub(max, min));
        const vf limit = vf_set1(ROUND_LIMIT);
        safe = vm_and(safe, vm_and(vf_le(vf_abs(vf_mul(iscale, vf_sub(max, min))), limit),
                                   vf_le(vf_abs(vf_mul(iscale, vf_sub(lowest, min))), limit)));
        vf sum_l = zero, sum_l2 = zero, sum_xl = zero;
        for (int i = 0; i < n; i++) {
            const vf l = code_of(vf_mul(iscale, vf_sub(x[i], min)), 0, q_max, exact);
            const vf wl = vf_mul(w[i], l);
            q[i] = l;
            sum_l = vf_add(sum_l, wl);
            sum_l2 = vf_add(sum_l2, vf_mul(wl, l));
            sum_xl = vf_add(sum_xl, vf_mul(wl, x[i]));
        }
        const vf det = vf_sub(vf_mul(sum_w, sum_l2), vf_mul(sum_l, sum_l));
        vf s = vf_div(vf_sub(vf_mul(sum_w, sum_xl), vf_mul(sum_x, sum_l)), det);
        vf m = vf_div(vf_sub(vf_mul(sum_l2, sum_x), vf_mul(sum_l, sum_xl)), det);
        const vm above = vf_gt(m, zero);
        s = vf_select(above, vf_div(sum_xl, sum_l2), s);
        m = vf_select(above, zero, m);
        vf error = zero;
        for (int i = 0; i < n; i++) error = vf_add(error, vf_mul(w[i], residual(s, q[i], m, x[i], absolute)));
        const vm better = vm_and(vf_gt(det, zero), vf_lt(error, least));
        least = vf_select(better, error, least);
        code_scale = vf_select(better, iscale, code_scale);
        code_min = vf_select(better, min, code_min);
        scale = vf_select(better, s, scale);
        min = vf_select(better, m, min);
    }
    if (!exact && vm_any(vm_andnot(vf_eq(zero, zero), vm_or(safe, flat)))) return 0;
    fit->scale = vf_select(flat, zero, scale);
    fit->min = vf_select(flat, vf_min(zero, lowest), min);
    fit->code_scale = vf_select(flat, zero, code_scale);
    fit->code_min = vf_select(flat, zero, code_min);
    fit->sum_w = sum_w;
    return 1;
}

INLINE void fit_min(lane_fit *fit, const vf *x, const vf *w, int n, int q_max, float first, float step, int last, int absolute) {
    if (!fit_min_once(fit, x, w, n, q_max, first, step, last, absolute, 0))
        fit_min_once(fit, x, w, n, q_max, first, step, last, absolute, 1);
}

/* Scale of n weights w = scale * q, -q_max <= q < q_max, weighted least squares: best of 19 trial scales around the one that
 * gives the peak (first value of largest magnitude) the code -q_max. Lanes of zeros: all of `fit` is 0. */
INLINE void fit_symmetric(lane_fit *fit, const vf *x, const vf *w, int n, int q_max) {
    vf peak = vf_zero(), amax = vf_zero(), wx[32];
    const vf zero = vf_zero();
    for (int i = 0; i < n; i++) {
        const vf a = vf_abs(x[i]);
        const vm higher = vf_gt(a, amax);
        amax = vf_select(higher, a, amax);
        peak = vf_select(higher, x[i], peak);
        wx[i] = vf_mul(w[i], x[i]);
    }
    vf sum_w = w[0];
    for (int i = 1; i < n; i++) sum_w = vf_add(sum_w, w[i]);
    const vm none = vf_lt(amax, vf_set1(TINY));
    vf scale = zero, best = zero, code_scale = zero;
    for (int trial = 0; trial <= 18; trial++) {
        const int offset = trial == 0 ? 0 : trial <= 9 ? trial - 10 : trial - 9; /* 0, -9 ... -1, 1 ... 9 */
        const vf iscale = vf_div(vf_set1(-((float)q_max + 0.1f * (float)offset)), peak);
        vf sum_xl = zero, sum_l2 = zero;
        for (int i = 0; i < n; i++) {
            const vf l = code_of(vf_mul(iscale, x[i]), -q_max, q_max - 1, 0);
            sum_xl = vf_add(sum_xl, vf_mul(wx[i], l));
            sum_l2 = vf_add(sum_l2, vf_mul(vf_mul(w[i], l), l));
        }
        const vf s = vf_div(sum_xl, sum_l2);
        vm better = vf_gt(sum_l2, zero);
        if (trial == 0) code_scale = iscale; /* kept even where the weights are all zero */
        else better = vm_and(better, vf_gt(vf_mul(sum_xl, sum_xl), vf_mul(best, sum_l2)));
        scale = vf_select(better, s, scale);
        best = vf_select(better, vf_mul(s, sum_xl), best);
        code_scale = vf_select(better, iscale, code_scale);
    }
    fit->scale = vf_select(none, zero, scale);
    fit->code_scale = vf_select(none, zero, code_scale);
    fit->min = fit->code_min = zero;
    fit->sum_w = sum_w;
}

/* Scale and codes of 16 weights w = scale * (q - 4), each importance the square of its weight: coordinate descent, at most five
 * rounds, from the code -4 for the peak. Lanes of zeros get scale and codes 0. */
INLINE void fit_descent_3(vf *scale, vi *q, const vf *x) {
    const vf zero = vf_zero();
    vf peak = zero, amax = zero, sum_xl = zero, sum_l2 = zero, w[16], wx[16], l[16];
    for (int i = 0; i < 16; i++) {
        const vf a = vf_abs(x[i]);
        const vm higher = vf_gt(a, amax);
        amax = vf_select(higher, a, amax);
        peak = vf_select(higher, x[i], peak);
        w[i] = vf_mul(x[i], x[i]);
        wx[i] = vf_mul(w[i], x[i]);
    }
    const vm none = vf_lt(amax, vf_set1(TINY));
    const vf iscale = vf_div(vf_set1(-4.0f), peak);
    for (int i = 0; i < 16; i++) {
        l[i] = code_of(vf_mul(iscale, x[i]), -4, 3, 0);
        sum_xl = vf_add(sum_xl, vf_mul(wx[i], l[i]));
        sum_l2 = vf_add(sum_l2, vf_mul(vf_mul(w[i], l[i]), l[i]));
    }
    for (int round = 0; round < 5; round++) {
        vm changed = vf_lt(zero, zero);
        for (int i = 0; i < 16; i++) {
            vf sxl = vf_sub(sum_xl, vf_mul(wx[i], l[i])), sl2 = vf_sub(sum_l2, vf_mul(vf_mul(w[i], l[i]), l[i]));
            vm better = vf_gt(sxl, zero);
            const vf fresh = code_of(vf_div(vf_mul(x[i], sl2), sxl), -4, 3, 1);
            better = vm_andnot(better, vf_eq(fresh, l[i]));
            sxl = vf_add(sxl, vf_mul(wx[i], fresh));
            sl2 = vf_add(sl2, vf_mul(vf_mul(w[i], fresh), fresh));
            better = vm_and(better, vm_and(vf_gt(sl2, zero), vf_gt(vf_mul(vf_mul(sxl, sxl), sum_l2),
                                                                  vf_mul(vf_mul(sum_xl, sum_xl), sl2))));
            l[i] = vf_select(better, fresh, l[i]);
            sum_xl = vf_select(better, sxl, sum_xl);
            sum_l2 = vf_select(better, sl2, sum_l2);
            changed = vm_or(changed, better);
        }
        if (!vm_any(vm_andnot(changed, none))) break;
    }
    *scale = vf_select(vm_andnot(vf_gt(sum_l2, zero), none), vf_div(sum_xl, sum_l2), zero);
    for (int i = 0; i < 16; i++) q[i] = vf_truncate(vf_select(none, zero, vf_add(l[i], vf_set1(4.0f))));
}

/* Scale and codes of n non-negative values v = scale * q, q <= q_max, with importances w: the best of nine trial scales by
 * squared error, then coordinate descent, at most five rounds. ggml stores codes as bytes, so a negative one counts as 256
 * more where it is read back. */
INLINE void fit_scales(vf *scale, vi *q, const vf *v, const vf *w, int n, int q_max) {
    const vf zero = vf_zero();
    const vi byte = vi_set1(255), top = vi_set1(q_max);
    vf max = zero;
    for (int i = 0; i < n; i++) max = vf_max(v[i], max);
    const vm none = vf_lt(max, vf_set1(TINY));
    vf best_iscale = zero, least = zero;
    for (int trial = 0; trial <= 8; trial++) {
        const int offset = trial == 0 ? 0 : trial <= 4 ? trial - 5 : trial - 4; /* 0, -4 ... -1, 1 ... 4 */
        const vf iscale = vf_div(vf_set1(0.1f * (float)offset + (float)q_max), max);
        const vf s = vf_div(vf_set1(1.0f), iscale);
        vf error = zero;
        for (int i = 0; i < n; i++) {
            const vi code = vf_nearest(vf_mul(iscale, v[i]));
            const vf l = vi_to_vf(trial == 0 ? vi_and(code, byte) : vi_min(code, top));
            const vf diff = vf_sub(v[i], vf_mul(s, l));
            error = vf_add(error, vf_mul(vf_mul(w[i], diff), diff));
        }
        const vm better = vf_lt(error, least);
        best_iscale = trial == 0 ? iscale : vf_select(better, iscale, best_iscale);
        least = trial == 0 ? error : vf_select(better, error, least);
    }
    vf sum_xl = zero, sum_l2 = zero;
    for (int i = 0; i < n; i++) {
        const vi code = vi_min(vf_nearest(vf_mul(best_iscale, v[i])), top);
        const vf l = vi_to_vf(code);
        q[i] = vi_and(code, byte);
        sum_xl = vf_add(sum_xl, vf_mul(vf_mul(w[i], v[i]), l));
        sum_l2 = vf_add(sum_l2, vf_mul(vf_mul(w[i], l), l));
    }
    for (int round = 0; round < 5; round++) {
        vm changed = vf_lt(zero, zero);
        for (int i = 0; i < n; i++) {
            const vf old = vi_to_vf(q[i]), wv = vf_mul(w[i], v[i]);
            vf sxl = vf_sub(sum_xl, vf_mul(wv, old)), sl2 = vf_sub(sum_l2, vf_mul(vf_mul(w[i], old), old));
            vm better = vm_and(vf_gt(sxl, zero), vf_gt(sl2, zero));
            const vi code = vi_min(vf_nearest(vf_div(vf_mul(v[i], sl2), sxl)), top);
            const vf l = vi_to_vf(code);
            better = vm_andnot(better, vf_eq(l, old));
            sxl = vf_add(sxl, vf_mul(wv, l));
            sl2 = vf_add(sl2, vf_mul(vf_mul(w[i], l), l));
            better = vm_and(better, vf_gt(vf_mul(vf_mul(sxl, sxl), sum_l2), vf_mul(vf_mul(sum_xl, sum_xl), sl2)));
            q[i] = vi_select(better, vi_and(code, byte), q[i]);
            sum_xl = vf_select(better, sxl, sum_xl);
            sum_l2 = vf_select(better, sl2, sum_l2);
            changed = vm_or(changed, better);
        }
        if (!vm_any(vm_andnot(changed, none))) break;
    }
    *scale = vf_select(vm_andnot(vf_gt(sum_l2, zero), none), vf_div(sum_xl, sum_l2), zero);
    for (int i = 0; i < n; i++) q[i] = vi_select(none, vi_set1(0), q[i]);
}
