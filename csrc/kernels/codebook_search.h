#ifndef GFL_CODEBOOK_SEARCH_H
#define GFL_CODEBOOK_SEARCH_H
#include <float.h>

#include "../codebooks/codebooks.h"
#include "base.h"
#include "lanes.h"
#include "search_scale.h"

/* The search for points of a codebook (codebooks/codebooks.h): runs of 16 or 32 weights are scaled so that each eight
 * (or four) of their magnitudes lies near a point. ggml tries some scales; for each it rounds every weight to a level,
 * and where such a combination is no point it takes the best of the candidates listed for it. Here the trial scales
 * share vectors where they can, and the candidates do where they cannot. */

enum { MAX_TRIALS = 32 };

typedef struct {
    /* Magnitudes; IQ2_XXS, IQ2_XS and IQ3_XXS negate some to make signs even. Longer than a run, as vectors read on. */
    float x[40];
    float w[40];                                  /* importances */
    float root[40];                               /* their square roots, by which candidates are judged */
    float id[MAX_TRIALS], scale[MAX_TRIALS];      /* of each trial: 1 / scale and scale */
    float sum_qx[MAX_TRIALS], sum_q2[MAX_TRIALS]; /* of w q x and w q q */
    uint32_t codes[8][MAX_TRIALS];                /* packed combination by group and trial */
    uint32_t missed[8];                           /* by group, bit t: rounding did not meet a point in trial t */
    int failed;                                   /* no candidate had a finite error; ggml aborts */
} codebook_run;

static const float count_to_32[MAX_TRIALS] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                              16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

/* Twice a level plus one, repeated as often as vectors may want. */
static const float odd_8[16] = {1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15};
static const float odd_4[16] = {1, 3, 5, 7, 1, 3, 5, 7, 1, 3, 5, 7, 1, 3, 5, 7};

/* Magnitudes and signs (bit i of signs[k]: weight 8k + i is negative) of n weights. */
INLINE void take_magnitudes(codebook_run *run, uint8_t *signs, const float *x, int n) {
    uint32_t negative = 0;
    for (int i = 0; i < n; i += LANES) {
        const vf v = vf_load(x + i);
        const vm below = vf_lt(v, vf_zero());
        vf_store(run->x + i, vf_select(below, vf_neg(v), v));
        negative |= vm_to_bits(below) << i;
    }
    memcpy(signs, &negative, (size_t)n / 8);
}

/* Importances; without an imatrix floor + x^2. */
INLINE void set_importances(codebook_run *run, const float *x, const float *imatrix, int n, float sigma2, float floor) {
    for (int i = 0; i < n; i += LANES) {
        const vf v = vf_load(x + i), squared = vf_mul(v, v);
        const vf w = imatrix ? vf_mul(vf_load(imatrix + i), vf_sqrt(vf_add(vf_set1(sigma2), squared)))
                             : vf_add(vf_set1(floor), squared);
        vf_store(run->w + i, w);
        vf_store(run->root + i, vf_sqrt(w));
    }
}

/* Makes the number of negative signs of each eight even by flipping the weight that matters least; keeps seven of
 * them. */
INLINE void make_signs_even(codebook_run *run, uint8_t *signs, int n) {
    float cost[32];
    for (int i = 0; i < n; i += LANES) {
        const vf x = vf_load(run->x + i);
        vf_store(cost + i, vf_mul(vf_mul(vf_load(run->w + i), x), x));
    }
    for (int k = 0; k < n / 8; k++) {
        if (__builtin_parity(signs[k])) {
            int least = 0;
            for (int i = 1; i < 8; i++) least = cost[8 * k + i] < cost[8 * k + least] ? i : least;
            run->x[8 * k + least] = -run->x[8 * k + least];
            signs[k] ^= (uint8_t)(1 << least);
        }
        signs[k] &= 127;
    }
}

INLINE float run_peak(const codebook_run *run, int n) {
    vf high = vf_load(run->x);
    for (int i = LANES; i < n; i += LANES) high = vf_max(high, vf_load(run->x + i));
    return vf_hmax(high);
}

/* Trials -half ... half: 1 / scale = (top + trial * step) / peak. */
INLINE void set_trials(codebook_run *run, int half, float top, float step, float peak) {
    for (int t = 0; t < MAX_TRIALS; t += LANES) {
        const vf trial = vf_sub(vf_load(count_to_32 + t), vf_set1((float)half));
        const vf id = vf_div(vf_add(vf_set1(top), vf_mul(trial, vf_set1(step))), vf_set1(peak));
        vf_store(run->id + t, id);
        vf_store(run->scale + t, vf_div(vf_set1(1.0f), id));
    }
}

/* The level of a weight divided by its scale: (y - 1) / 2 rounded and limited, ties to even. */
static inline int nearest_level(float y, int top) {
    const int l = nearest(0.5f * (y - 1.0f));
    return l < 0 ? 0 : l > top ? top : l;
}

/* The index of the combination that a group is rounded to, for one scale of any size. */
INLINE int combination_index(const float *x, float id, int dims) {
    int index = 0;
    for (int i = 0; i < dims; i++) index = index * (dims == 8 ? 3 : 8) + nearest_level(id * x[i], dims == 8 ? 2 : 7);
    return index;
}

/* The same for all trials, if all |id * x| < 2^20. Bit t of the result: no weight is near the middle of two levels in
 * trial t, so short lists of candidates do. */
INLINE uint32_t combination_indices(int32_t *index, const float *x, const float *id, int dims, int trials) {
    uint32_t clear = 0;
    for (int t = 0; t < trials; t += LANES) {
        const vf inverse_scale = vf_load(id + t);
        if (dims == 8) { /* (y - 1) / 2 goes to 1 from above y = 2, to 2 from y = 4 on */
            vi sum = vi_set1(0);
            vf margin = vf_set1(1.0f);
            for (int i = 0; i < 8; i++) {
                const vf y = vf_mul(inverse_scale, vf_set1(x[i]));
                sum = vi_count(vi_add(sum, vi_shl(sum, 1)), vf_gt(y, vf_set1(2.0f)));
                sum = vi_count(sum, vf_le(vf_set1(4.0f), y));
                margin = vf_min(margin, vf_abs(vf_sub(vf_abs(vf_sub(y, vf_set1(3.0f))), vf_set1(1.0f))));
            }
            vi_store(index + t, sum);
            clear |= vm_to_bits(vf_gt(margin, vf_set1(4e-5f))) << t;
        } else {
            vf sum = vf_zero(), off = vf_zero();
            for (int i = 0; i < 4; i++) {
                const vf v = vf_mul(vf_set1(0.5f), vf_sub(vf_mul(inverse_scale, vf_set1(x[i])), vf_set1(1.0f)));
                const vf limited = vf_max(vf_min(v, vf_set1(7.0f)), vf_zero()), level = vf_round(limited);
                sum = vf_add(vf_mul(sum, vf_set1(8.0f)), level);
                off = vf_max(off, vf_abs(vf_sub(limited, level)));
            }
            vi_store(index + t, vf_truncate(sum));
            clear |= vm_to_bits(vf_lt(off, vf_set1(0.5f - 2e-5f))) << t;
        }
    }
    return clear;
}

static const int32_t eight_each_four_times[32] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                                  4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7};
static const int32_t four_each_eight_times[32] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                                  2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3};

/* Eight (or four) values, each repeated for all levels: four (eight) times. Eight are read in any case. */
INLINE void spread_values(float *out, const float *v, int dims) {
    const int32_t *places = dims == 8 ? eight_each_four_times : four_each_eight_times;
    for (int i = 0; i < 32; i += LANES) vf_store(out + i, vf_pick8(v, vi_load(places + i)));
}

/* Terms w (scale q - x)^2 of a group's sum by weight and level, four (eight) levels for each weight; x and w spread
 * likewise. levels: q by level, repeated. */
INLINE void candidate_terms(float *terms, const float *levels, const float *x, const float *w, float scale) {
    for (int j = 0; j < 32; j += LANES) {
        const vf diff = vf_sub(vf_mul(vf_set1(scale), vf_load(levels + j % 16)), vf_load(x + j));
        vf_store(terms + j, vf_mul(vf_mul(vf_load(w + j), diff), diff));
    }
}

/* Sums of the terms that packed combinations pick, first weight first. */
INLINE vf candidate_sums(const float *terms, vi code, int dims) {
    vf sum = vf_zero();
    for (int i = 0; i < dims; i++) {
        const int place = 32 / dims * i;
        const vf term = LANES >= 16 ? vf_pick16(terms + place / 16 * 16, code) : vf_pick8(terms + place / 8 * 8, code);
        sum = i ? vf_add(sum, term) : term;
        code = vi_shr(code, 4);
    }
    return sum;
}

/* The candidate of least sum w (scale q - x)^2, the first of equals, on a list of `eights`; x, w and levels as
 * candidate_terms wants them. *failed is set if no sum is finite. A term depends on one weight's level only, so a small
 * table of terms serves many candidates. */
INLINE uint32_t nearest_candidate(const uint32_t *list, int eights, const float *levels, const float *x, const float *w,
                                  float scale, int dims, int *failed) {
    float terms[32], least[LANES];
    int32_t place[LANES], lanes[LANES];
    candidate_terms(terms, levels, x, w, scale);
    if (8 * eights <= LANES) {
        const vf sums = candidate_sums(terms, vi_load((const int32_t *)list), dims);
        const float minimum = vf_hmin(sums);
        if (minimum < FLT_MAX) return list[__builtin_ctz(vm_to_bits(vf_eq(sums, vf_set1(minimum))))];
    }
    for (int l = 0; l < LANES; l++) lanes[l] = l;
    vf best = vf_set1(FLT_MAX);
    vi at = vi_load(lanes), best_at = at;
    for (int r = 0; r < eights * 8; r += LANES, at = vi_add(at, vi_set1(LANES))) {
        const vf sums = candidate_sums(terms, vi_load((const int32_t *)list + r), dims);
        const vm better = vf_lt(sums, best);
        best = vf_select(better, sums, best);
        best_at = vi_select(better, at, best_at);
    }
    vf_store(least, best);
    vi_store(place, best_at);
    const float minimum = vf_hmin(best);
    if (minimum == FLT_MAX) *failed = 1;
    const uint32_t winners = vm_to_bits(vf_eq(best, vf_set1(minimum)));
    int first = place[__builtin_ctz(winners)];
    for (uint32_t rest = winners & (winners - 1); rest; rest &= rest - 1)
        if (place[__builtin_ctz(rest)] < first) first = place[__builtin_ctz(rest)];
    return list[first];
}

static uint32_t nearest_of_eights(const uint32_t *list, int eights, const float *levels, const float *x, const float *w,
                                  float scale, int *failed) {
    return nearest_candidate(list, eights, levels, x, w, scale, 8, failed);
}

static uint32_t nearest_of_fours(const uint32_t *list, int eights, const float *x, const float *w, float scale,
                                 int *failed) {
    return nearest_candidate(list, eights, odd_8, x, w, scale, 4, failed);
}

/* The best candidate for this scale in place of a combination that is no point. */
INLINE uint32_t candidate_at(const gfl_codebook *codebook, int place, const float *x, const float *root, float scale,
                             int dims, int *failed) {
    const uint32_t *list = codebook->candidates + (~place >> 8) * CANDIDATE_RUN;
    return dims == 8 ? nearest_of_eights(list, ~place & 255, odd_4, x, root, scale, failed)
                     : nearest_of_fours(list, ~place & 255, x, root, scale, failed);
}

/* Codes of all groups in all trials. */
INLINE void round_trials(codebook_run *run, const gfl_codebook *codebook, int n, int dims, int trials, int in_range) {
    const uint32_t every = (uint32_t)((1ull << trials) - 1);
    run->failed = 0;
    for (int g = 0; g < n / dims; g++) {
        int32_t index[MAX_TRIALS], place[MAX_TRIALS];
        uint8_t off[MAX_TRIALS];
        uint32_t clear = 0, missed = 0;
        int n_off = 0;
        float x[32], root[32];
        if (in_range) clear = combination_indices(index, run->x + g * dims, run->id, dims, trials);
        else
            for (int t = 0; t < trials; t++) index[t] = combination_index(run->x + g * dims, run->id[t], dims);
        const int32_t *places = (clear & every) == every ? codebook->short_places : codebook->places;
        for (int t = 0; t < trials; t++) { /* no branches: what is a point is hard to foresee */
            const int32_t p = places[index[t]];
            const uint32_t is_off = (uint32_t)p >> 31;
            off[n_off] = (uint8_t)t;
            place[n_off] = p;
            n_off += (int)is_off;
            missed |= is_off << t;
            run->codes[g][t] = codebook->points[p & (int32_t)(is_off - 1)];
        }
        run->missed[g] = missed;
        spread_values(x, run->x + g * dims, dims);
        spread_values(root, run->root + g * dims, dims);
        for (int k = 0; k < n_off; k++)
            run->codes[g][off[k]] = candidate_at(codebook, place[k], x, root, run->scale[off[k]], dims, &run->failed);
    }
}

INLINE void sum_trials(codebook_run *run, int n, int dims, int trials) {
    for (int t = 0; t < trials; t += LANES) {
        vf qx = vf_zero(), q2 = vf_zero();
        for (int g = 0; g < n / dims; g++) {
            vi code = vi_load((const int32_t *)run->codes[g] + t);
            for (int i = g * dims; i < (g + 1) * dims; i++) {
                const vf q = vf_pick16(dims == 8 ? odd_4 : odd_8, code), w = vf_set1(run->w[i]);
                qx = vf_add(qx, vf_mul(vf_set1(run->w[i] * run->x[i]), q));
                q2 = vf_add(q2, vf_mul(vf_mul(w, q), q));
                code = vi_shr(code, 4);
            }
        }
        vf_store(run->sum_qx + t, qx);
        vf_store(run->sum_q2 + t, q2);
    }
}

/* The best trial, -1 if none is better than nothing; *scale is set to its least-squares scale. */
static inline int find_best_trial(const codebook_run *run, float *scale, int trials) {
    float best = 0.0f;
    int best_trial = -1;
    for (int t = 0; t < trials; t++) {
        const float qx = run->sum_qx[t], q2 = run->sum_q2[t];
        if (q2 > 0.0f && qx * qx > best * q2) {
            *scale = qx / q2;
            best = *scale * qx;
            best_trial = t;
        }
    }
    return best_trial;
}

/* Least-squares scale of n weights for given codes; `scale` if that is not defined. */
INLINE float fit_scale(const codebook_run *run, const uint32_t *codes, int n, int dims, float scale) {
    float qx = 0.0f, q2 = 0.0f;
    for (int g = 0; g < n / dims; g++)
        for (int i = 0; i < dims; i++) {
            const float w = run->w[g * dims + i], q = (dims == 8 ? odd_4 : odd_8)[(codes[g] >> (4 * i)) & 15];
            qx += w * run->x[g * dims + i] * q;
            q2 += w * q * q;
        }
    return q2 > 0.0f ? qx / q2 : scale;
}

/* Rounds the groups of `which` (one bit each) again for a positive scale and returns the scale that is best then. */
INLINE float refine_codes(codebook_run *run, const gfl_codebook *codebook, uint32_t *codes, uint32_t which, int n,
                          int dims, float scale) {
    if (!which || !(scale > 0.0f)) return scale;
    const float id = 1.0f / scale;
    for (int g = 0; g < n / dims; g++) {
        if (!((which >> g) & 1)) continue;
        float x[32], root[32];
        const int place = codebook->places[combination_index(run->x + g * dims, id, dims)];
        spread_values(x, run->x + g * dims, dims);
        spread_values(root, run->root + g * dims, dims);
        codes[g] = place < 0 ? candidate_at(codebook, place, x, root, scale, dims, &run->failed)
                             : codebook->points[place];
    }
    return fit_scale(run, codes, n, dims, scale);
}

/* Which groups are rounded again for the best trial's scale: those that met no point, all of them if one met none,
 * all. */
enum { REFINE_SOME, REFINE_ALL_OR_NONE, REFINE_ALL };

/* What is searched: a run of n weights in groups of dims. Constants, so that each kind of search is compiled by
 * itself. */
typedef struct {
    int n, dims, trials, refine;
} run_search;

/* The search from given trials on: codes of all groups, and the scale. `in_range`: all |id * x| < 2^20. Without a trial
 * better than nothing `scale` stays and the codes are those of point 0, which has the lowest levels. NaN where ggml
 * would abort. */
INLINE float search_codebook(codebook_run *run, const gfl_codebook *codebook, uint32_t *codes, const run_search search,
                             float scale, int in_range) {
    const int n = search.n, dims = search.dims, trials = search.trials, refine = search.refine;
    round_trials(run, codebook, n, dims, trials, in_range);
    sum_trials(run, n, dims, trials);
    const int best = find_best_trial(run, &scale, trials);
    const uint32_t every = (uint32_t)((1ull << (n / dims)) - 1);
    uint32_t again = best < 0 && refine != REFINE_SOME ? every : 0;
    for (int g = 0; g < n / dims && best >= 0; g++) again |= ((run->missed[g] >> best) & 1) << g;
    if (refine == REFINE_ALL || (refine == REFINE_ALL_OR_NONE && again)) again = every;
    for (int g = 0; g < n / dims; g++) codes[g] = best < 0 ? codebook->points[0] : run->codes[g][best];
    scale = refine_codes(run, codebook, codes, again, n, dims, scale);
    return run->failed ? NAN : scale;
}

/* The number of the point that a packed combination is. */
INLINE unsigned point_number(const gfl_codebook *codebook, uint32_t code, int dims) {
    int index = 0;
    for (int i = 0; i < dims; i++) index = index * (dims == 8 ? 3 : 8) + (int)((code >> (4 * i)) & (dims == 8 ? 3 : 7));
    return (unsigned)codebook->places[index];
}

/* The largest of n scales; NaN, which then makes the block's scale one, if any is NaN. */
static inline float largest_scale(const float *scales, int n) {
    float max = 0.0f;
    for (int j = 0; j < n; j++) max = scales[j] <= max ? max : scales[j];
    for (int j = 0; j < n; j++) max = scales[j] == scales[j] ? max : NAN;
    return max;
}

/* Dequantizing */

/* Sign bits of eight weights as bytes 0 or -1. */
static inline uint64_t sign_bytes(unsigned signs) {
    const uint64_t bits = (signs * 0x0101010101010101ull) & 0x8040201008040201ull;
    return (((bits + 0x7f7f7f7f7f7f7f7full) >> 7) & 0x0101010101010101ull) * 0xff;
}

/* The eighth sign makes the number of negative ones even. */
static inline unsigned eight_signs(unsigned seven) { return seven | ((unsigned)__builtin_parity(seven) << 7); }

/* out = magnitudes (none of them 0) with signs, in bytes. */
static inline void signed_bytes(int8_t *out, uint64_t magnitudes, unsigned signs) {
    const uint64_t mask = sign_bytes(signs), bytes = (magnitudes ^ mask) + (mask & 0x0101010101010101ull);
    memcpy(out, &bytes, 8);
}

INLINE void scaled_bytes(float *out, const int8_t *bytes, int n, float d) {
    for (int i = 0; i < n; i += LANES) vf_store(out + i, vf_mul(vf_set1(d), vi_to_vf(vi_load_i8(bytes + i))));
}

static inline uint64_t eight_values(const int8_t *values, unsigned point) {
    uint64_t bytes;
    memcpy(&bytes, values + 8 * point, 8);
    return bytes;
}

static inline uint64_t four_values_twice(const int8_t *values, unsigned low, unsigned high) {
    uint32_t a, b;
    memcpy(&a, values + 4 * low, 4);
    memcpy(&b, values + 4 * high, 4);
    return a | ((uint64_t)b << 32);
}

#endif
