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

/* The same from 0 on. Floats are compared as integers here, which compete less with the additions for execution units. Without
 * `floor` no t may be below -0.5, without `ceiling` none above high + 0.5; the floor's absence may make a zero negative, which
 * changes neither sums nor squares. */
INLINE vf code_from_0(vf t, int high, int exact, int floor, int ceiling) {
    if (exact) return vi_to_vf(vi_clamp(vf_nearest(t), 0, high));
    if (ceiling) t = vi_as_vf(vi_min(vf_as_vi(t), vf_as_vi(vf_set1((float)high))));
    if (floor) t = vi_as_vf(vi_max(vf_as_vi(t), vi_set1(0)));
    return vf_round(t);
}

INLINE vf residual(vf scale, vf q, vf min, vf x, int absolute) {
    const vf diff = vf_sub(vf_add(vf_mul(scale, q), min), x);
    return absolute ? vf_abs(diff) : vf_mul(diff, diff);
}

/* Sums are chains of dependent additions, so GROUPS vectors of sub-blocks go through a search side by side: their chains fill
 * each other's waiting times. */
#define EACH_GROUP for (int g = 0; g < GROUPS; g++)

typedef vf lanes_of_32[32];

/* fit_min works on units of SIDE vectors, as many as it takes for their sums not to wait for each other, and the units take
 * turns. Smaller ones are skipped more often. */
enum { SIDE = LANES < 16 ? GROUPS : 1, UNITS = GROUPS / SIDE };
#define EACH_SIDE for (int g = 0; g < SIDE; g++)

/* What the search of fit_min carries from trial to trial. */
typedef struct {
    vf sum_w[SIDE], sum_x[SIDE], lowest[SIDE], max[SIDE], least[SIDE];
    vf sum_x2[SIDE];            /* for rules_out alone, so in any order */
    vf iscale[SIDE], min[SIDE]; /* of this trial's codes */
    vf s[SIDE], m[SIDE];        /* its solution */
    vf q[SIDE][32];             /* its codes */
    vm solved[SIDE], safe[SIDE], flat[SIDE];
    int low, hopeless; /* see aim_min, rules_out */
} min_search;

/* Extremes, sums, and the error of the plain scale (max - min) / q_max. */
INLINE void begin_min(lane_fit *fit, min_search *at, const lanes_of_32 *x, const lanes_of_32 *w, int n, int q_max, int absolute,
                      int exact) {
    EACH_SIDE {
        vf lowest = x[g][0], max = lowest, sum_w = w[g][0], sum_x = vf_mul(sum_w, lowest), sum_x2 = vf_mul(sum_x, lowest);
        for (int i = 1; i < n; i++) {
            const vf wx = vf_mul(w[g][i], x[g][i]);
            lowest = vf_min(x[g][i], lowest);
            max = vf_max(x[g][i], max);
            sum_w = vf_add(sum_w, w[g][i]);
            sum_x = vf_add(sum_x, wx);
            sum_x2 = vf_estimate(wx, x[g][i], sum_x2);
        }
        const vf min = vf_min(vf_zero(), lowest); /* in this order a -0 stays */
        const vf range = vf_sub(max, min), iscale = vf_div(vf_set1((float)q_max), range);
        fit[g] = (lane_fit){vf_div(vf_set1(1.0f), iscale), min, iscale, min, sum_w};
        at->sum_w[g] = sum_w, at->sum_x[g] = sum_x, at->lowest[g] = lowest, at->max[g] = max;
        at->sum_x2[g] = sum_x2;
        at->flat[g] = vf_eq(max, min);
        at->safe[g] = vf_le(vf_abs(vf_mul(iscale, range)), vf_set1(ROUND_LIMIT));
        at->least[g] = vf_zero();
    }
    for (int i = 0; i < n; i++) EACH_SIDE {
        const vf l = code_from_0(vf_mul(fit[g].code_scale, vf_sub(x[g][i], fit[g].min)), q_max, exact, 0, 0);
        const vf error = residual(fit[g].scale, l, fit[g].min, x[g][i], absolute);
        at->least[g] = vf_add(at->least[g], vf_mul(w[g][i], error));
    }
}

/* The next trial: the range from min to max is to be `codes` codes long. A lane is `low` if codes may be below 0, or if anything
 * about its range is unusual; only then its codes can be beyond what fast rounding does. */
INLINE void aim_min(min_search *at, const lane_fit *fit, float codes) {
    const vf half = vf_set1(-0.5f), narrow = vf_set1(1e-35f), wide = vf_set1(3e38f), limit = vf_set1(ROUND_LIMIT);
    vf range[SIDE], lowest_t[SIDE];
    vm low[SIDE];
    EACH_SIDE {
        const vf min = fit[g].min;
        range[g] = vf_sub(at->max[g], min);
        at->min[g] = min;
        at->iscale[g] = vf_div(vf_set1(codes), range[g]);
        lowest_t[g] = vf_mul(at->iscale[g], vf_sub(at->lowest[g], min));
        low[g] = vm_or(vf_not_lt(narrow, range[g]), vm_or(vf_not_lt(range[g], wide), vf_not_lt(half, lowest_t[g])));
    }
    at->low = 0;
    EACH_SIDE at->low |= vm_any(low[g]);
    if (at->low)
        EACH_SIDE {
            const vm within = vm_and(vf_le(vf_abs(vf_mul(at->iscale[g], range[g])), limit), vf_le(vf_abs(lowest_t[g]), limit));
            at->safe[g] = vm_and(at->safe[g], within);
        }
}

/* Whether ggml's error of a solution cannot be less than the least one, found out without summing it. Exactly, the error is
 *   e = sum w (s q + m - x)^2 = s (s L2 + 2 (m L1 - XL)) + m (m W - 2 X1) + X2,
 * L2 = sum w q^2 and so on. Let T = sum w (|s| q + |m| + |x|)^2, u = 2^-24. Each of the sums, w >= 0, carries at most 33
 * roundings in each of its terms, and the formula at most 6, so that its value is within 40 u T of e. ggml's s q + m - x are
 * within 2.01 u (|s| q + |m| + |x|), so its sum is at least e (1 - 33.1 u) - 4.02 u sqrt(e T), and
 * 4.02 sqrt(e T) <= 129 e + T / 32. Altogether: ggml's error >= (formula) (1 - 163 u) - 41 u T, and T <= 3 (s^2 L2 + m^2 W + X2).
 * The limits keep underflow and overflow out of it, and what is no number rules nothing out. */
INLINE vm rules_out(vf s, vf m, vf sum_l, vf sum_l2, vf sum_xl, vf sum_w, vf sum_x, vf sum_x2, vf least) {
    const vf two = vf_set1(2.0f), s_l2 = vf_mul(s, sum_l2), m_w = vf_mul(m, sum_w);
    const vf by_s = vf_estimate(two, vf_estimate(m, sum_l, vf_neg(sum_xl)), s_l2), by_m = vf_estimate(vf_neg(two), sum_x, m_w);
    const vf error = vf_estimate(m, by_m, vf_estimate(s, by_s, sum_x2));
    const vf all = vf_estimate(m, m_w, vf_estimate(s, s_l2, sum_x2));
    const vf below = vf_estimate(error, vf_set1(1.0f - 0x1p-16f), vf_set1(-1e-30f));
    const vm limits = vm_and(vf_lt(vf_set1(1e-6f), sum_l), vf_lt(all, vf_set1(1e30f)));
    return vm_and(vf_le(least, vf_estimate(all, vf_set1(-3 * 42 * 0x1p-24f), below)), limits);
}

/* Codes of a trial, and the least-squares solution for them. */
INLINE void solve_min(min_search *at, const lanes_of_32 *x, const lanes_of_32 *w, int n, int q_max, int exact, int floor,
                      int ceiling, int closed) {
    const vf zero = vf_zero();
    vf sum_l[SIDE], sum_l2[SIDE], sum_xl[SIDE], iscale[SIDE], min[SIDE];
    vm hopeless[SIDE];
    EACH_SIDE {
        sum_l[g] = sum_l2[g] = sum_xl[g] = zero;
        iscale[g] = at->iscale[g];
        min[g] = at->min[g];
    }
    for (int i = 0; i < n; i += 2) /* half of the subtractions elsewhere: there are more additions than multiplications */
        for (int k = i; k < i + 2; k++) EACH_SIDE {
            const vf v = x[g][k], above = k == i ? vf_sub(v, min[g]) : vf_sub_fused(v, min[g]);
            const vf l = code_from_0(vf_mul(iscale[g], above), q_max, exact, floor, ceiling), wl = vf_mul(w[g][k], l);
            at->q[g][k] = l;
            sum_l[g] = vf_add(sum_l[g], wl);
            sum_l2[g] = vf_add(sum_l2[g], vf_mul(wl, l));
            sum_xl[g] = vf_add(sum_xl[g], vf_mul(wl, v));
        }
    EACH_SIDE {
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
            hopeless[g] = rules_out(s, m, sum_l[g], sum_l2[g], sum_xl[g], sum_w, sum_x, at->sum_x2[g], at->least[g]);
    }
    at->hopeless = closed;
    EACH_SIDE if (closed && vm_any(vm_andnot(vm_andnot(at->solved[g], at->flat[g]), hopeless[g]))) at->hopeless = 0;
}

/* Keeps the solution where its error is the least so far. */
INLINE void judge_min(lane_fit *fit, min_search *at, const lanes_of_32 *x, const lanes_of_32 *w, int n, int absolute) {
    vf error[SIDE], s[SIDE], m[SIDE];
    EACH_SIDE {
        error[g] = vf_zero();
        s[g] = at->s[g], m[g] = at->m[g];
    }
    _Pragma("GCC unroll 4")
    for (int i = 0; i < n; i++) EACH_SIDE
        error[g] = vf_add(error[g], vf_mul(w[g][i], residual(s[g], at->q[g][i], m[g], x[g][i], absolute)));
    EACH_SIDE {
        const vm better = vm_and(at->solved[g], vf_lt(error[g], at->least[g]));
        vf_update(&at->least[g], better, error[g]);
        vf_update(&fit[g].code_scale, better, at->iscale[g]);
        vf_update(&fit[g].code_min, better, at->min[g]);
        vf_update(&fit[g].scale, better, s[g]);
        vf_update(&fit[g].min, better, m[g]);
    }
}

/* Minimum and scale of n weights w = scale * q + min, 0 <= q <= q_max, min <= 0: the weighted least-squares solution of the
 * best of a series of trial scales (first + step * i + q_max) / (max - min), i = 0 ... last, where `min` is the best one
 * found so far. Errors are squares, or absolute values. `closed` (for squares, no importance negative): use rules_out where
 * it often does. Returns 0 if not `exact` and the fast rounding does not do. */
INLINE int fit_min_once(lane_fit *fit, const lanes_of_32 *x, const lanes_of_32 *w, int n, int q_max, float first, float step,
                        int last, int absolute, int closed, int exact) {
    const vf zero = vf_zero();
    min_search at[UNITS];
    int safe = 1;
    for (int u = 0; u < UNITS; u++) {
        begin_min(fit + u * SIDE, &at[u], x + u * SIDE, w + u * SIDE, n, q_max, absolute, exact);
        aim_min(&at[u], fit + u * SIDE, first + (float)q_max);
    }
    for (int trial = 0; trial <= last; trial++) {
        const int ceiling = first + step * (float)trial > 0.49f; /* codes beyond q_max: seldom the best trial */
        for (int u = 0; u < UNITS; u++) {
            const lanes_of_32 *ux = x + u * SIDE, *uw = w + u * SIDE;
            if (exact || at[u].low) solve_min(&at[u], ux, uw, n, q_max, exact, 1, 1, closed && !exact);
            else if (ceiling) solve_min(&at[u], ux, uw, n, q_max, 0, 0, 1, closed);
            else solve_min(&at[u], ux, uw, n, q_max, 0, 0, 0, 0);
        }
        for (int u = 0; u < UNITS; u++) {
            if (!at[u].hopeless) judge_min(fit + u * SIDE, &at[u], x + u * SIDE, w + u * SIDE, n, absolute);
            aim_min(&at[u], fit + u * SIDE, first + step * (float)(trial + 1) + (float)q_max);
        }
    }
    EACH_GROUP {
        const vf low = vf_min(zero, at[g / SIDE].lowest[g % SIDE]);
        const vm flat = at[g / SIDE].flat[g % SIDE];
        if (vm_any(vm_andnot(vf_eq(zero, zero), vm_or(at[g / SIDE].safe[g % SIDE], flat)))) safe = 0;
        fit[g].scale = vf_select(flat, zero, fit[g].scale);
        fit[g].min = vf_select(flat, low, fit[g].min);
        fit[g].code_scale = vf_select(flat, zero, fit[g].code_scale);
        fit[g].code_min = vf_select(flat, zero, fit[g].code_min);
    }
    return safe || exact;
}

INLINE void fit_min(lane_fit *fit, const lanes_of_32 *x, const lanes_of_32 *w, int n, int q_max, float first, float step, int last,
                    int absolute, int closed) {
    if (!fit_min_once(fit, x, w, n, q_max, first, step, last, absolute, closed, 0))
        fit_min_once(fit, x, w, n, q_max, first, step, last, absolute, closed, 1);
}

/* Scale of n weights w = scale * q, -q_max <= q < q_max, weighted least squares: best of 19 trial scales around the one that
 * gives the peak (first value of largest magnitude) the code -q_max. Lanes of zeros: all of `fit` but sum_w is 0. */
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
        for (int i = 0; i < n; i++) EACH_GROUP {
            const vf l = code_of(vf_mul(iscale[g], x[g][i]), -q_max, q_max - 1, 0);
            sum_xl[g] = vf_add(sum_xl[g], vf_mul(wx[g][i], l));
            sum_l2[g] = vf_add(sum_l2[g], vf_mul(vf_mul(w[g][i], l), l));
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

/* One weight's part in the sums of fit_descent_3, and the bounds within which x * sl2 / sxl surely rounds to its code. */
typedef struct {
    vf x, l, wxl, wll, low, high;
} descent_weight;

INLINE void settle_descent(descent_weight *v, vf l) {
    const vf w = vf_mul(v->x, v->x), slack = vf_set1(0.4999f), far = vf_set1(1e30f);
    v->l = l;
    v->wxl = vf_mul(vf_mul(w, v->x), l);
    v->wll = vf_mul(vf_mul(w, l), l);
    v->low = vf_select(vf_gt(l, vf_set1(-4.0f)), vf_sub(l, slack), vf_neg(far));
    v->high = vf_select(vf_lt(l, vf_set1(3.0f)), vf_add(l, slack), far);
}

/* Gives weight v the code that fits the others best, in the lanes where that is an improvement. */
INLINE vm descend(descent_weight *v, vf *sum_xl, vf *sum_l2) {
    const vf zero = vf_zero();
    const vf w = vf_mul(v->x, v->x);
    vf sxl = vf_sub(*sum_xl, v->wxl), sl2 = vf_sub(*sum_l2, v->wll);
    vm better = vf_gt(sxl, zero);
    const vf l = code_of(vf_div(vf_mul(v->x, sl2), sxl), -4, 3, 1);
    better = vm_andnot(better, vf_eq(l, v->l));
    sxl = vf_add(sxl, vf_mul(vf_mul(w, v->x), l));
    sl2 = vf_add(sl2, vf_mul(vf_mul(w, l), l));
    better = vm_and(better, vf_gt(sl2, zero));
    better = vm_and(better, vf_gt(vf_mul(vf_mul(sxl, sxl), *sum_l2), vf_mul(vf_mul(*sum_xl, *sum_xl), sl2)));
    settle_descent(v, vf_select(better, l, v->l));
    *sum_xl = vf_select(better, sxl, *sum_xl);
    *sum_l2 = vf_select(better, sl2, *sum_l2);
    return better;
}

/* Scale and codes of 16 weights w = scale * (q - 4), each importance the square of its weight: coordinate descent, at most five
 * rounds, from the code -4 for the peak. Lanes of zeros get scale and codes 0. Most steps change nothing, and are seen to by
 * two comparisons instead of a division that the next step would have to wait for. */
INLINE void fit_descent_3(vf *scale, vi (*q)[16], const lanes_of_32 *x) {
    const vf zero = vf_zero();
    descent_weight v[GROUPS][16];
    vf amax[GROUPS], sum_xl[GROUPS], sum_l2[GROUPS];
    vm none[GROUPS];
    EACH_GROUP {
        vf peak = zero;
        amax[g] = sum_xl[g] = sum_l2[g] = zero;
        for (int i = 0; i < 16; i++) {
            const vf a = vf_abs(x[g][i]);
            const vm higher = vf_gt(a, amax[g]);
            amax[g] = vf_select(higher, a, amax[g]);
            peak = vf_select(higher, x[g][i], peak);
        }
        none[g] = vf_lt(amax[g], vf_set1(TINY));
        const vf iscale = vf_div(vf_set1(-4.0f), peak);
        for (int i = 0; i < 16; i++) {
            v[g][i].x = x[g][i];
            settle_descent(&v[g][i], code_of(vf_mul(iscale, x[g][i]), -4, 3, 0));
            sum_xl[g] = vf_add(sum_xl[g], v[g][i].wxl);
            sum_l2[g] = vf_add(sum_l2[g], v[g][i].wll);
        }
    }
    for (int round = 0, changed = 1; round < 5 && changed; round++) {
        changed = 0;
        for (int i = 0; i < 16; i++) EACH_GROUP {
            descent_weight *at = &v[g][i];
            const vf sxl = vf_sub(sum_xl[g], at->wxl), p = vf_mul(at->x, vf_sub(sum_l2[g], at->wll));
            const vm within = vm_and(vf_le(vf_mul(at->low, sxl), p), vf_le(p, vf_mul(at->high, sxl)));
            const vm sure = vm_and(within, vf_gt(sxl, vf_set1(1e-36f))); /* bounds of denormals would be too coarse */
            if (vm_any(vm_andnot(vm_andnot(vf_gt(sxl, zero), sure), none[g])))
                changed |= vm_any(vm_andnot(descend(at, &sum_xl[g], &sum_l2[g]), none[g]));
        }
    }
    EACH_GROUP {
        scale[g] = vf_select(vm_andnot(vf_gt(sum_l2[g], zero), none[g]), vf_div(sum_xl[g], sum_l2[g]), zero);
        for (int i = 0; i < 16; i++) q[g][i] = vf_truncate(vf_select(none[g], zero, vf_add(v[g][i].l, vf_set1(4.0f))));
    }
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
