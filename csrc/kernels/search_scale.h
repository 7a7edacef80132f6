#ifndef GFL_SEARCH_SCALE_H
#define GFL_SEARCH_SCALE_H
#include "base.h"
#include "lanes.h"

/* Searches for the scale (and minimum) of a sub-block: ggml's search, run on LANES independent sub-blocks at once.
 *
 * Every lane does ggml's operations in ggml's order, so its result has ggml's bits. The order of the sums over a
 * sub-block's weights keeps a compiler from vectorizing the search, but not us from running LANES searches side by
 * side. `x[i]` holds weight i of every lane's sub-block (vf_transpose makes it so).
 *
 * The codes of a search are not kept: the formats quantize again with the rounded scales. Only where such a scale has
 * rounded to zero do ggml's files hold the codes of the search; they follow from `code_scale` and `code_min`.
 */

/* ggml rounds by adding 1.5 * 2^23 and reading the low bits of the mantissa. From |v| = 2^22 on the result is no longer
 * v rounded, but it is what ends up in the file. */
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
    vf sum_w;                /* sum of the weights' importances */
} lane_fit;

/* The code q as a float. `exact` rounds as ggml for any argument; otherwise arguments must be below ROUND_LIMIT. */
INLINE vf code_of(vf t, int low, int high, int exact) {
    if (exact) return vi_to_vf(vi_clamp(vf_nearest(t), low, high));
    return vf_round(vf_max(vf_min(t, vf_set1((float)high)), vf_set1((float)low)));
}

/* How code_from_0 rounds; constants. */
typedef struct {
    int exact;          /* as ggml, for any argument */
    int floor, ceiling; /* whether codes are limited; without, no t may be below -0.5 or above high + 0.5 */
} code_rounding;

/* The same for codes from 0 on. Floats are compared as integers, which competes less with the additions for execution
 * units. Without the floor a zero may be negative, which changes neither sums nor squares. */
INLINE vf code_from_0(vf t, int high, const code_rounding rounding) {
    if (rounding.exact) return vi_to_vf(vi_clamp(vf_nearest(t), 0, high));
    if (rounding.ceiling) t = vi_as_vf(vi_min(vf_as_vi(t), vf_as_vi(vf_set1((float)high))));
    if (rounding.floor) t = vi_as_vf(vi_max(vf_as_vi(t), vi_set1(0)));
    return vf_round(t);
}

/* Sums are chains of dependent additions, so GROUPS vectors of sub-blocks go through a search side by side: each fills
 * the waiting times of the others. The loops must be unrolled early, or gcc keeps some of the sums in memory. */
#define EACH_GROUP _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; g++)

typedef vf lanes_of_32[32];

/* v[g] = value for n groups, with no other operation in between. Zen hands operations to two schedulers in turn, each
 * with one unit for sums and one for products, so sums and products should come in pairs. Compilers would mix them
 * (measured: 2 to 6 % slower). */
#define TOGETHER(n, v, ...)                                     \
    do {                                                        \
        for (int g = 0; g < (n); g++) v[g] = __VA_ARGS__;       \
        for (int g = 0; (n) > 1 && g < (n); g++) vf_pin(&v[g]); \
    } while (0)

/* What the search of fit_min carries from trial to trial. */
typedef struct {
    vf sum_w[GROUPS], sum_x[GROUPS], lowest[GROUPS], max[GROUPS], least[GROUPS];
    vf sum_x2[GROUPS];              /* for rules_out alone, so in any order */
    vf iscale[GROUPS], min[GROUPS]; /* of this trial's codes */
    vf s[GROUPS], m[GROUPS];        /* its solution */
    vf q[GROUPS][32];               /* its codes */
    vm solved[GROUPS], safe[GROUPS], flat[GROUPS];
    int low, hopeless; /* see aim_min, rules_out */
} min_search;

/* Adds the errors of weight i with codes q, times its importances. */
INLINE void add_errors(vf *error, const vf *q, const vf *s, const vf *m, const lanes_of_32 *x, const lanes_of_32 *w,
                       int i, int absolute) {
    vf diff[GROUPS];
    TOGETHER(GROUPS, diff, vf_mul(s[g], q[g]));
    TOGETHER(GROUPS, diff, vf_add(diff[g], m[g]));
    TOGETHER(GROUPS, diff, vf_sub(diff[g], x[g][i]));
    TOGETHER(GROUPS, diff, absolute ? vf_abs(diff[g]) : vf_mul(diff[g], diff[g]));
    TOGETHER(GROUPS, diff, vf_mul(w[g][i], diff[g]));
    TOGETHER(GROUPS, error, vf_add(error[g], diff[g]));
}

/* Extremes, sums, and the error of the plain scale (max - min) / q_max. */
INLINE void begin_min(lane_fit *fit, min_search *at, const lanes_of_32 *x, const lanes_of_32 *w, int n, int q_max,
                      int absolute, int exact) {
    EACH_GROUP {
        at->lowest[g] = at->max[g] = x[g][0];
        at->sum_w[g] = w[g][0];
        at->sum_x[g] = vf_mul(w[g][0], x[g][0]);
        at->sum_x2[g] = vf_mul(at->sum_x[g], x[g][0]);
    }
    for (int i = 1; i < n; i++) {
        vf wx[GROUPS];
        TOGETHER(GROUPS, wx, vf_mul(w[g][i], x[g][i]));
        TOGETHER(GROUPS, at->lowest, vf_min(x[g][i], at->lowest[g]));
        TOGETHER(GROUPS, at->max, vf_max(x[g][i], at->max[g]));
        TOGETHER(GROUPS, at->sum_x2, vf_estimate(wx[g], x[g][i], at->sum_x2[g]));
        TOGETHER(GROUPS, at->sum_w, vf_add(at->sum_w[g], w[g][i]));
        TOGETHER(GROUPS, at->sum_x, vf_add(at->sum_x[g], wx[g]));
    }
    vf scale[GROUPS], min[GROUPS], iscale[GROUPS];
    EACH_GROUP {
        const vf max = at->max[g];
        min[g] = vf_min(vf_zero(), at->lowest[g]); /* in this order a -0 stays */
        const vf range = vf_sub(max, min[g]);
        iscale[g] = vf_div(vf_set1((float)q_max), range);
        scale[g] = vf_div(vf_set1(1.0f), iscale[g]);
        fit[g] = (lane_fit){scale[g], min[g], iscale[g], min[g], at->sum_w[g]};
        at->flat[g] = vf_eq(max, min[g]);
        at->safe[g] = vf_le(vf_abs(vf_mul(iscale[g], range)), vf_set1(ROUND_LIMIT));
        at->least[g] = vf_zero();
    }
    for (int i = 0; i < n; i++) {
        vf t[GROUPS];
        TOGETHER(GROUPS, t, vf_sub(x[g][i], min[g]));
        TOGETHER(GROUPS, t, vf_mul(iscale[g], t[g]));
        TOGETHER(GROUPS, t, code_from_0(t[g], q_max, (code_rounding){exact, 0, 0}));
        add_errors(at->least, t, scale, min, x, w, i, absolute);
    }
}

/* The next trial, in which the range from min to max is `codes` codes long. A lane is `low` if codes may be below 0, or
 * if its range is very narrow or very wide; only then can codes lie beyond what fast rounding handles. */
INLINE void aim_min(min_search *at, const lane_fit *fit, float codes) {
    const vf half = vf_set1(-0.5f), narrow = vf_set1(1e-35f), wide = vf_set1(3e38f), limit = vf_set1(ROUND_LIMIT);
    vf range[GROUPS], lowest_t[GROUPS];
    vm low[GROUPS];
    EACH_GROUP {
        const vf min = fit[g].min;
        range[g] = vf_sub(at->max[g], min);
        at->min[g] = min;
        at->iscale[g] = vf_div(vf_set1(codes), range[g]);
        lowest_t[g] = vf_mul(at->iscale[g], vf_sub(at->lowest[g], min));
        low[g] = vm_or(vf_not_lt(narrow, range[g]), vm_or(vf_not_lt(range[g], wide), vf_not_lt(half, lowest_t[g])));
    }
    at->low = 0;
    EACH_GROUP at->low |= vm_any(low[g]);
    if (at->low) {
        EACH_GROUP {
            const vm within = vm_and(vf_le(vf_abs(vf_mul(at->iscale[g], range[g])), limit),
                                     vf_le(vf_abs(lowest_t[g]), limit));
            at->safe[g] = vm_and(at->safe[g], within);
        }
    }
}

/* Sums over a sub-block: w l, w l^2, w x l, w, w x, w x^2. */
typedef struct {
    vf l, l2, xl, w, x, x2;
} min_sums;

/* Whether ggml's error of a solution cannot be less than the least one, found without summing the error. Exactly, it is
 *   e = sum w (s q + m - x)^2 = s (s L2 + 2 (m L1 - XL)) + m (m W - 2 X1) + X2,
 * L2 = sum w q^2 and so on. Let T = sum w (|s| q + |m| + |x|)^2 and u = 2^-24. Each of the sums, w >= 0, carries at
 * most 33 roundings in each of its terms, and the formula at most 6, so its value is within 40 u T of e. ggml's
 *   s q + m - x
 * are within 2.01 u (|s| q + |m| + |x|), so its sum is at least e (1 - 33.1 u) - 4.02 u sqrt(e T), and
 *   4.02 sqrt(e T) <= 129 e + T / 32.
 * Altogether ggml's error >= (formula) (1 - 163 u) - 41 u T, and T <= 3 (s^2 L2 + m^2 W + X2). The limits keep
 * underflow and overflow out of it; a NaN rules nothing out. */
INLINE vm rules_out(vf s, vf m, const min_sums sums, vf least) {
    const vf two = vf_set1(2.0f), s_l2 = vf_mul(s, sums.l2), m_w = vf_mul(m, sums.w);
    const vf by_s = vf_estimate(two, vf_estimate(m, sums.l, vf_neg(sums.xl)), s_l2),
             by_m = vf_estimate(vf_neg(two), sums.x, m_w);
    const vf error = vf_estimate(m, by_m, vf_estimate(s, by_s, sums.x2));
    const vf all = vf_estimate(m, m_w, vf_estimate(s, s_l2, sums.x2));
    const vf below = vf_estimate(error, vf_set1(1.0f - 0x1p-16f), vf_set1(-1e-30f));
    const vm limits = vm_and(vf_lt(vf_set1(1e-6f), sums.l), vf_lt(all, vf_set1(1e30f)));
    return vm_and(vf_le(least, vf_estimate(all, vf_set1(-3 * 42 * 0x1p-24f), below)), limits);
}

/* Codes of a trial, and the least-squares solution for them. */
INLINE void solve_min(min_search *at, const lanes_of_32 *x, const lanes_of_32 *w, int n, int q_max,
                      const code_rounding rounding, int closed) {
    const vf zero = vf_zero();
    vf sum_l[GROUPS], sum_l2[GROUPS], sum_xl[GROUPS], iscale[GROUPS], min[GROUPS];
    vm hopeless[GROUPS];
    EACH_GROUP {
        sum_l[g] = sum_l2[g] = sum_xl[g] = zero;
        iscale[g] = at->iscale[g];
        min[g] = at->min[g];
    }
    /* Every other subtraction goes to the multipliers, as there are more additions than multiplications. */
    for (int i = 0; i < n; i += 2)
        for (int k = i; k < i + 2; k++) {
            vf t[GROUPS], wl[GROUPS], product[GROUPS];
            TOGETHER(GROUPS, t, k == i ? vf_sub(x[g][k], min[g]) : vf_sub_fused(x[g][k], min[g]));
            TOGETHER(GROUPS, t, vf_mul(iscale[g], t[g]));
            TOGETHER(GROUPS, t, code_from_0(t[g], q_max, rounding));
            EACH_GROUP at->q[g][k] = t[g];
            TOGETHER(GROUPS, wl, vf_mul(w[g][k], t[g]));
            TOGETHER(GROUPS, sum_l, vf_add(sum_l[g], wl[g]));
            TOGETHER(GROUPS, product, vf_mul(wl[g], t[g]));
            TOGETHER(GROUPS, sum_l2, vf_add(sum_l2[g], product[g]));
            TOGETHER(GROUPS, product, vf_mul(wl[g], x[g][k]));
            TOGETHER(GROUPS, sum_xl, vf_add(sum_xl[g], product[g]));
        }
    EACH_GROUP {
        const vf sum_w = at->sum_w[g], sum_x = at->sum_x[g];
        const vf det = vf_sub(vf_mul(sum_w, sum_l2[g]), vf_mul(sum_l[g], sum_l[g]));
        vf s = vf_div(vf_sub(vf_mul(sum_w, sum_xl[g]), vf_mul(sum_x, sum_l[g])), det);
        vf m = vf_div(vf_sub(vf_mul(sum_l2[g], sum_x), vf_mul(sum_l[g], sum_xl[g])), det);
        const vm above = vf_gt(m, zero);
        if (vm_any(above)) {
            s = vf_select(above, vf_div(sum_xl[g], sum_l2[g]), s);
            m = vf_select(above, zero, m);
        }
        at->s[g] = s, at->m[g] = m, at->solved[g] = vf_gt(det, zero);
        if (closed)
            hopeless[g] = rules_out(s, m, (min_sums){sum_l[g], sum_l2[g], sum_xl[g], sum_w, sum_x, at->sum_x2[g]},
                                    at->least[g]);
    }
    at->hopeless = closed;
    EACH_GROUP
        if (closed && vm_any(vm_andnot(vm_andnot(at->solved[g], at->flat[g]), hopeless[g]))) at->hopeless = 0;
}

/* Keeps the solution where its error is the least so far. */
INLINE void judge_min(lane_fit *fit, min_search *at, const lanes_of_32 *x, const lanes_of_32 *w, int n, int absolute) {
    vf error[GROUPS], s[GROUPS], m[GROUPS];
    EACH_GROUP {
        error[g] = vf_zero();
        s[g] = at->s[g], m[g] = at->m[g];
    }
    for (int i = 0; i < n; i++) {
        vf q[GROUPS];
        EACH_GROUP q[g] = at->q[g][i];
        add_errors(error, q, s, m, x, w, i, absolute);
    }
    EACH_GROUP {
        const vm better = vm_and(at->solved[g], vf_lt(error[g], at->least[g]));
        vf_update(&at->least[g], better, error[g]);
        vf_update(&fit[g].code_scale, better, at->iscale[g]);
        vf_update(&fit[g].code_min, better, at->min[g]);
        vf_update(&fit[g].scale, better, s[g]);
        vf_update(&fit[g].min, better, m[g]);
    }
}

/* The trials of fit_min and how it judges them; constants, so that each kind of search is compiled by itself. */
typedef struct {
    int q_max;
    float first, step; /* trial i takes the scale (first + step * i + q_max) / (max - min) */
    int last;
    int absolute; /* errors are absolute values instead of squares */
    int closed;   /* for squares, no importance negative: use rules_out where it often does */
} min_trials;

/* Minimum and scale of n weights w = scale * q + min, 0 <= q <= q_max, min <= 0: the weighted least-squares solution of
 * the best of a series of trial scales, where `min` is the best one found so far. Returns 0 if it rounded fast (not
 * `exact`) and should not have. */
INLINE int fit_min_once(lane_fit *fit, const lanes_of_32 *x, const lanes_of_32 *w, int n, const min_trials trials,
                        int exact) {
    const vf zero = vf_zero();
    const int q_max = trials.q_max, absolute = trials.absolute, closed = trials.closed;
    const float first = trials.first, step = trials.step;
    min_search at;
    int safe = 1;
    begin_min(fit, &at, x, w, n, q_max, absolute, exact);
    aim_min(&at, fit, first + (float)q_max);
    for (int trial = 0; trial <= trials.last; trial++) {
        const int ceiling = first + step * (float)trial > 0.49f; /* codes beyond q_max: seldom the best trial */
        if (exact || at.low) solve_min(&at, x, w, n, q_max, (code_rounding){exact, 1, 1}, closed && !exact);
        else if (ceiling) solve_min(&at, x, w, n, q_max, (code_rounding){0, 0, 1}, closed);
        else solve_min(&at, x, w, n, q_max, (code_rounding){0, 0, 0}, 0);
        if (!at.hopeless) judge_min(fit, &at, x, w, n, absolute);
        aim_min(&at, fit, first + step * (float)(trial + 1) + (float)q_max);
    }
    EACH_GROUP {
        const vf low = vf_min(zero, at.lowest[g]);
        const vm flat = at.flat[g];
        if (vm_any(vm_andnot(vf_eq(zero, zero), vm_or(at.safe[g], flat)))) safe = 0;
        fit[g].scale = vf_select(flat, zero, fit[g].scale);
        fit[g].min = vf_select(flat, low, fit[g].min);
        fit[g].code_scale = vf_select(flat, zero, fit[g].code_scale);
        fit[g].code_min = vf_select(flat, zero, fit[g].code_min);
    }
    return safe || exact;
}

INLINE void fit_min(lane_fit *fit, const lanes_of_32 *x, const lanes_of_32 *w, int n, const min_trials trials) {
    if (!fit_min_once(fit, x, w, n, trials, 0)) fit_min_once(fit, x, w, n, trials, 1);
}

/* Scale of n weights w = scale * q, -q_max <= q < q_max, weighted least squares: best of 19 trial scales around the one
 * that gives the peak (first value of largest magnitude) the code -q_max. Lanes of zeros: all of `fit` but sum_w is
 * 0. */
INLINE void fit_symmetric(lane_fit *fit, const lanes_of_32 *x, const lanes_of_32 *w, int n, int q_max) {
    const vf zero = vf_zero();
    vf peak[GROUPS], amax[GROUPS], best[GROUPS], wx[GROUPS][32];
    EACH_GROUP {
        peak[g] = amax[g] = best[g] = zero;
        fit[g] = (lane_fit){zero, zero, zero, zero, w[g][0]};
        for (int i = 1; i < n; i++) fit[g].sum_w = vf_add(fit[g].sum_w, w[g][i]);
        for (int i = 0; i < n; i++) {
            const vf a = vf_abs(x[g][i]);
            const vm higher = vf_gt(a, amax[g]);
            amax[g] = vf_select(higher, a, amax[g]);
            peak[g] = vf_select(higher, x[g][i], peak[g]);
            wx[g][i] = vf_mul(w[g][i], x[g][i]);
        }
    }
    for (int trial = 0; trial <= 18; trial++) {
        const int offset = trial == 0 ? 0 : trial <= 9 ? trial - 10 : trial - 9; /* 0, -9 ... -1, 1 ... 9 */
        vf iscale[GROUPS], sum_xl[GROUPS], sum_l2[GROUPS];
        EACH_GROUP {
            iscale[g] = vf_div(vf_set1(-((float)q_max + 0.1f * (float)offset)), peak[g]);
            sum_xl[g] = sum_l2[g] = zero;
        }
        for (int i = 0; i < n; i++) {
            EACH_GROUP {
                const vf l = code_of(vf_mul(iscale[g], x[g][i]), -q_max, q_max - 1, 0);
                sum_xl[g] = vf_add(sum_xl[g], vf_mul(wx[g][i], l));
                sum_l2[g] = vf_add(sum_l2[g], vf_mul(vf_mul(w[g][i], l), l));
            }
        }
        EACH_GROUP {
            const vf s = vf_div(sum_xl[g], sum_l2[g]);
            vm better = vf_gt(sum_l2[g], zero);
            if (trial == 0) fit[g].code_scale = iscale[g]; /* kept even where the weights are all zero */
            else better = vm_and(better, vf_gt(vf_mul(sum_xl[g], sum_xl[g]), vf_mul(best[g], sum_l2[g])));
            fit[g].scale = vf_select(better, s, fit[g].scale);
            best[g] = vf_select(better, vf_mul(s, sum_xl[g]), best[g]);
            fit[g].code_scale = vf_select(better, iscale[g], fit[g].code_scale);
        }
    }
    EACH_GROUP {
        const vm none = vf_lt(amax[g], vf_set1(TINY));
        fit[g].scale = vf_select(none, zero, fit[g].scale);
        fit[g].code_scale = vf_select(none, zero, fit[g].code_scale);
    }
}

/* Scale and codes of n non-negative values v = scale * q, q <= q_max, with importances w: the best of nine trial scales
 * by squared error, then coordinate descent, at most five rounds. ggml stores codes as bytes, so a negative one counts
 * as 256 more where it is read back. */
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

#endif
