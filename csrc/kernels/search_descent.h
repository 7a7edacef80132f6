#ifndef GFL_SEARCH_DESCENT_H
#define GFL_SEARCH_DESCENT_H
#include "base.h"
#include "lanes.h"
#include "search_scale.h"

/* ggml's search for the scale and codes of a sub-block of Q3_K, by coordinate descent, on many sub-blocks at once. */

/* A weight's parts in the sums of fit_descent_3, and the bounds within which x * sl2 / sxl must round to its code. */
typedef struct {
    vf wxl, wll, low, high;
} descent_weight;

INLINE void set_bounds(descent_weight *v, vf x, vf l) {
    const vf w = vf_mul(x, x), slack = vf_set1(0.4999f), far = vf_set1(1e30f);
    v->wxl = vf_mul(vf_mul(w, x), l);
    v->wll = vf_mul(vf_mul(w, l), l);
    v->low = vf_select(vf_gt(l, vf_set1(-4.0f)), vf_sub(l, slack), vf_neg(far));
    v->high = vf_select(vf_lt(l, vf_set1(3.0f)), vf_add(l, slack), far);
}

/* Sums w x l and w l^2 of several groups. */
typedef struct {
    vf *xl, *l2;
} descent_sums;

/* Gives one weight of each of n groups, x with code l, the code that fits the others best, in the lanes where that is
 * an improvement; `others` are the sums without it. `farthest` tells whether fast rounding was right, see code_of.
 * Returns where codes have changed. */
INLINE vm descend(int n, vf *l, const vf *x, const descent_sums others, const descent_sums all, vf *farthest,
                  int exact) {
    const vf zero = vf_zero();
    vf code[GROUPS], wl[GROUPS], found[GROUPS], so_far[GROUPS];
    vm changed = vf_lt(zero, zero), better[GROUPS];
    TOGETHER(n, code, vf_mul(x[g], others.l2[g]));
    TOGETHER(n, code, vf_div(code[g], others.xl[g]));
    for (int g = 0; g < n; g++) {
        better[g] = vf_gt(others.xl[g], zero);
        *farthest = vf_max(vf_abs(code[g]), *farthest);
    }
    TOGETHER(n, code, code_of(code[g], -4, 3, exact));
    TOGETHER(n, wl, vf_mul(vf_mul(x[g], x[g]), code[g]));
    TOGETHER(n, found, vf_mul(vf_mul(vf_mul(x[g], x[g]), x[g]), code[g]));
    TOGETHER(n, others.xl, vf_add(others.xl[g], found[g]));
    TOGETHER(n, wl, vf_mul(wl[g], code[g]));
    TOGETHER(n, others.l2, vf_add(others.l2[g], wl[g]));
    TOGETHER(n, found, vf_mul(vf_mul(others.xl[g], others.xl[g]), all.l2[g]));
    TOGETHER(n, so_far, vf_mul(vf_mul(all.xl[g], all.xl[g]), others.l2[g]));
    for (int g = 0; g < n; g++) {
        better[g] = vm_and(vm_andnot(better[g], vf_eq(code[g], l[g])), vf_gt(others.l2[g], zero));
        better[g] = vm_and(better[g], vf_gt(found[g], so_far[g]));
        l[g] = vf_select(better[g], code[g], l[g]);
        all.xl[g] = vf_select(better[g], others.xl[g], all.xl[g]);
        all.l2[g] = vf_select(better[g], others.l2[g], all.l2[g]);
        changed = vm_or(changed, better[g]);
    }
    return changed;
}

/* One round of the descent of a vector, over the weights whose code may be wrong: two comparisons for each weight
 * instead of a division that the next weight would have to wait for. */
INLINE int descend_where_unsure(descent_weight *v, const vf *x, vf *l, vf *sum_xl, vf *sum_l2, vf *farthest, vm none,
                                int exact) {
    int changed = 0;
    for (int i = 0; i < 16; i++) {
        vf sxl = vf_sub(*sum_xl, v[i].wxl), sl2 = vf_sub(*sum_l2, v[i].wll);
        const vf p = vf_mul(x[i], sl2);
        const vm within = vm_and(vf_le(vf_mul(v[i].low, sxl), p), vf_le(p, vf_mul(v[i].high, sxl)));
        const vm sure = vm_and(within, vf_gt(sxl, vf_set1(1e-36f))); /* bounds of denormals would be too coarse */
        if (vm_any(vm_andnot(vm_andnot(vf_gt(sxl, vf_zero()), sure), none))) {
            changed |= vm_any(vm_andnot(
                descend(1, &l[i], &x[i], (descent_sums){&sxl, &sl2}, (descent_sums){sum_xl, sum_l2}, farthest, exact),
                none));
            set_bounds(&v[i], x[i], l[i]);
        }
    }
    return changed;
}

/* Vectors that fit_descent_3 works on at once: enough to fill the time that a step waits for the one before. */
enum { DESCENTS = 2 * GROUPS };

/* Scale and codes of 16 weights w = scale * (q - 4), each importance the square of its weight: coordinate descent, at
 * most five rounds, from the code -4 for the peak. Lanes of zeros get scale and codes 0. Returns 0 if it rounded fast
 * (not `exact`) and should not have. */
INLINE int fit_descent_once(vf *scale, vi (*q)[16], const lanes_of_32 *x, int exact) {
    const vf zero = vf_zero();
    vf l[DESCENTS][16], amax[DESCENTS], sum_xl[DESCENTS], sum_l2[DESCENTS], farthest = zero;
    for (int d = 0; d < DESCENTS; d++) {
        vf peak = zero;
        amax[d] = sum_xl[d] = sum_l2[d] = zero;
        for (int i = 0; i < 16; i++) {
            const vf a = vf_abs(x[d][i]);
            const vm higher = vf_gt(a, amax[d]);
            amax[d] = vf_select(higher, a, amax[d]);
            peak = vf_select(higher, x[d][i], peak);
        }
        const vf iscale = vf_div(vf_set1(-4.0f), peak);
        for (int i = 0; i < 16; i++) {
            const vf w = vf_mul(x[d][i], x[d][i]);
            l[d][i] = code_of(vf_mul(iscale, x[d][i]), -4, 3, 0);
            sum_xl[d] = vf_add(sum_xl[d], vf_mul(vf_mul(w, x[d][i]), l[d][i]));
            sum_l2[d] = vf_add(sum_l2[d], vf_mul(vf_mul(w, l[d][i]), l[d][i]));
        }
    }
    /* A third of the first round's steps change something in one of 16 lanes. No branch could be predicted there. */
    const int first = LANES < 16 ? 0 : 1;
    for (int i = 0; i < 16 * first; i++)
        for (int d = 0; d < DESCENTS; d += GROUPS) {
            vf code[GROUPS], at[GROUPS], w[GROUPS], sxl[GROUPS], sl2[GROUPS];
            EACH_GROUP {
                at[g] = x[d + g][i];
                code[g] = l[d + g][i];
            }
            TOGETHER(GROUPS, w, vf_mul(at[g], at[g]));
            TOGETHER(GROUPS, sl2, vf_mul(vf_mul(w[g], code[g]), code[g]));
            TOGETHER(GROUPS, sxl, vf_mul(vf_mul(w[g], at[g]), code[g]));
            TOGETHER(GROUPS, sl2, vf_sub(sum_l2[d + g], sl2[g]));
            TOGETHER(GROUPS, sxl, vf_sub(sum_xl[d + g], sxl[g]));
            descend(GROUPS, code, at, (descent_sums){sxl, sl2}, (descent_sums){sum_xl + d, sum_l2 + d}, &farthest,
                    exact);
            EACH_GROUP l[d + g][i] = code[g];
        }
    for (int d = 0; d < DESCENTS; d++) {
        const vm none = vf_lt(amax[d], vf_set1(TINY));
        descent_weight v[16];
        for (int i = 0; i < 16; i++) set_bounds(&v[i], x[d][i], l[d][i]);
        for (int round = first, changed = 1; round < 5 && changed; round++)
            changed = descend_where_unsure(v, x[d], l[d], &sum_xl[d], &sum_l2[d], &farthest, none, exact);
        scale[d] = vf_select(vm_andnot(vf_gt(sum_l2[d], zero), none), vf_div(sum_xl[d], sum_l2[d]), zero);
        for (int i = 0; i < 16; i++) q[d][i] = vf_truncate(vf_select(none, zero, vf_add(l[d][i], vf_set1(4.0f))));
    }
    return exact || !vm_any(vf_gt(farthest, vf_set1(ROUND_LIMIT)));
}

INLINE void fit_descent_3(vf *scale, vi (*q)[16], const lanes_of_32 *x) {
    if (!fit_descent_once(scale, q, x, 0)) fit_descent_once(scale, q, x, 1);
}

#endif
