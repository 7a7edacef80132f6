#ifndef GFL_IQ1_H
#define GFL_IQ1_H
#include <float.h>

#include "../block_formats.h"
#include "base.h"
#include "batch.h"
#include "codebook_search.h"
#include "k_quants.h"
#include "lanes.h"

/* IQ1_S IQ1_M: eights of weights in a codebook of three levels -1, 0, 1, all moved by an eighth up or down.
 *
 * ggml sorts a run of 32 (16) weights, tries all ways to cut it into low, middle and high ones, and only then goes to
 * the codebook. The cuts are tried here for LANES runs at once. */

/* Levels by shift (0 up, 1 down), repeated as vectors want them. */
#define FOUR_TIMES(a, b, c) {a, b, c, 0, a, b, c, 0, a, b, c, 0, a, b, c, 0}
static const float shifted_levels[2][16] = {FOUR_TIMES(-0.875f, 0.125f, 1.125f), FOUR_TIMES(-1.125f, -0.125f, 0.875f)};

/* Runs in ascending order; equal weights keep their order. */
typedef struct {
    vf x[32], w[32];
    vi from[32]; /* place before sorting */
} sorted_runs;

INLINE void put_in_order(sorted_runs *s, int a, int b) {
    const vf xa = s->x[a], xb = s->x[b], wa = s->w[a], wb = s->w[b];
    const vi ia = s->from[a], ib = s->from[b];
    const vm swap = vm_or(vf_gt(xa, xb), vm_and(vf_eq(xa, xb), vi_gt(ia, ib)));
    s->x[a] = vf_select(swap, xb, xa);
    s->x[b] = vf_select(swap, xa, xb);
    s->w[a] = vf_select(swap, wb, wa);
    s->w[b] = vf_select(swap, wa, wb);
    s->from[a] = vi_select(swap, ib, ia);
    s->from[b] = vi_select(swap, ia, ib);
}

/* Batcher's odd-even merge sort */
INLINE void sort_runs(sorted_runs *s, int n) {
    for (int i = 0; i < n; i++) s->from[i] = vi_set1(i);
    for (int p = 1; p < n; p *= 2)
        for (int k = p; k >= 1; k /= 2)
            for (int j = k % p; j + k < n; j += 2 * k)
                for (int i = j; i < j + k && i + k < n; i++)
                    if (i / (2 * p) == (i + k) / (2 * p)) put_in_order(s, i, i + k);
}

/* The best cut so far, lane by lane: its scale and score, and where the middle and the high weights begin and which
 * shifts they have, as one number; -1 for none. */
typedef struct {
    vf scale, score;
    vi cut;
} best_cut;

INLINE void consider_cut(best_cut *best, vf qx, vf q2, int cut) {
    vm better = vf_gt(vf_mul(qx, qx), vf_mul(best->score, q2));
    if (!vm_any(better)) return;
    better = vm_and(better, vf_gt(q2, vf_zero()));
    const vf scale = vf_div(qx, q2);
    best->scale = vf_select(better, scale, best->scale);
    best->score = vf_select(better, vf_mul(scale, qx), best->score);
    best->cut = vi_select(better, vi_set1(cut), best->cut);
}

/* cut = 128 * middle + 2 * high + shift */
INLINE void cut_IQ1_S(best_cut *best, const sorted_runs *s) {
    const vf eighth = vf_set1(0.125f), p0 = vf_set1(-0.875f), p2 = vf_set1(1.125f), m0 = vf_set1(-1.125f),
             m2 = vf_set1(0.875f);
    vf sum_x[33], sum_w[33], x_up[33], x_down[33], w_up[33], w_down[33];
    sum_x[0] = sum_w[0] = vf_zero();
    for (int j = 0; j < 32; j++) {
        sum_x[j + 1] = vf_add(sum_x[j], vf_mul(s->w[j], s->x[j]));
        sum_w[j + 1] = vf_add(sum_w[j], s->w[j]);
    }
    for (int j = 0; j <= 32; j++) { /* what the high weights from j on give */
        const vf x = vf_sub(sum_x[32], sum_x[j]), w = vf_sub(sum_w[32], sum_w[j]);
        x_up[j] = vf_mul(x, p2);
        x_down[j] = vf_mul(x, m2);
        w_up[j] = vf_mul(vf_mul(w, p2), p2);
        w_down[j] = vf_mul(vf_mul(w, m2), m2);
    }
    for (int i1 = 0; i1 <= 32; i1++) {
        const vf low_x_up = vf_mul(sum_x[i1], p0), low_w_up = vf_mul(vf_mul(sum_w[i1], p0), p0);
        const vf low_x_down = vf_mul(sum_x[i1], m0), low_w_down = vf_mul(vf_mul(sum_w[i1], m0), m0);
        for (int i2 = i1; i2 <= 32; i2++) {
            const vf x = vf_mul(vf_sub(sum_x[i2], sum_x[i1]), eighth);
            const vf w = vf_mul(vf_mul(vf_sub(sum_w[i2], sum_w[i1]), eighth), eighth);
            consider_cut(best, vf_add(vf_add(low_x_up, x), x_up[i2]), vf_add(vf_add(low_w_up, w), w_up[i2]),
                         128 * i1 + 2 * i2);
            consider_cut(best, vf_add(vf_sub(low_x_down, x), x_down[i2]), vf_add(vf_add(low_w_down, w), w_down[i2]),
                         128 * i1 + 2 * i2 + 1);
        }
    }
}

/* Sums for the two eights separately, as each may go up or down. cut = 128 * middle + 4 * high + 2 * shift of the first
 * eight + shift of the second. In ggml's words: the sum over three groups is T * top - sum(i1) - sum(i2), as
 * neighbouring levels differ by 1. */
INLINE void cut_IQ1_M(best_cut *best, const sorted_runs *s) {
    const vf p2 = vf_set1(1.125f), m2 = vf_set1(0.875f);
    vf px[2][17], pw[2][17], x_up[2], x_down[2], w_up[2], w_down[2], high_up[2][17], high_down[2][17];
    for (int h = 0; h < 2; h++) {
        px[h][0] = pw[h][0] = vf_zero();
        for (int j = 0; j < 16; j++) {
            const vm second = vi_gt(s->from[j], vi_set1(7));
            const vf x = vf_add(px[h][j], vf_mul(s->w[j], s->x[j])), w = vf_add(pw[h][j], s->w[j]);
            px[h][j + 1] = h ? vf_select(second, x, px[h][j]) : vf_select(second, px[h][j], x);
            pw[h][j + 1] = h ? vf_select(second, w, pw[h][j]) : vf_select(second, pw[h][j], w);
        }
        x_up[h] = vf_mul(px[h][16], p2);
        x_down[h] = vf_mul(px[h][16], m2);
        w_up[h] = vf_mul(vf_mul(pw[h][16], p2), p2);
        w_down[h] = vf_mul(vf_mul(pw[h][16], m2), m2);
        for (int j = 0; j <= 16; j++) {
            high_up[h][j] = vf_mul(pw[h][j], vf_set1(-1.25f));
            high_down[h][j] = vf_mul(pw[h][j], vf_set1(-0.75f));
        }
    }
    for (int i1 = 0; i1 <= 16; i1++) {
        vf low_up[2], low_down[2];
        for (int h = 0; h < 2; h++) {
            low_up[h] = vf_add(w_up[h], vf_mul(pw[h][i1], vf_set1(0.75f)));
            low_down[h] = vf_add(w_down[h], vf_mul(pw[h][i1], vf_set1(1.25f)));
        }
        for (int i2 = i1; i2 <= 16; i2++) {
            vf qx[2][2], q2[2][2]; /* by half and shift */
            for (int h = 0; h < 2; h++) {
                const vf sum = vf_add(px[h][i1], px[h][i2]);
                qx[h][0] = vf_sub(x_up[h], sum);
                qx[h][1] = vf_sub(x_down[h], sum);
                q2[h][0] = vf_add(low_up[h], high_up[h][i2]);
                q2[h][1] = vf_add(low_down[h], high_down[h][i2]);
            }
            for (int k = 0; k < 4; k++)
                consider_cut(best, vf_add(qx[0][k / 2], qx[1][k % 2]), vf_add(q2[0][k / 2], q2[1][k % 2]),
                             128 * i1 + 4 * i2 + k);
        }
    }
}

/* The result of a run: a scale that is not negative, its sign having gone into the levels; the packed levels of its
 * eights, and which of those go down. `found` is 0 if no cut was better than nothing. */
typedef struct {
    float scale;
    int found, down[4];
    uint32_t codes[4];
} run_IQ1;

/* Eight levels of two bits as a combination (codebooks.h). */
static inline uint32_t pack_eight_levels(unsigned levels) {
    uint32_t code = levels & 0xffff;
    code = (code | (code << 8)) & 0x00ff00ff;
    code = (code | (code << 4)) & 0x0f0f0f0f;
    code = (code | (code << 2)) & 0x33333333;
    return code | 0xc840c840;
}

/* Cuts of the runs of n weights in a tile; w: importances as they lie in memory. */
INLINE void cut_tile_IQ1(run_IQ1 *runs, const float *x, const float *w, int n, float tiny) {
    for (int j = 0; j < TILE / n; j += LANES) {
        sorted_runs s;
        vf peak = vf_zero();
        load_lanes(s.x, x + n * j, n);
        load_lanes(s.w, w + n * j, n);
        for (int i = 0; i < n; i++) peak = vf_max(vf_abs(s.x[i]), peak);
        sort_runs(&s, n);
        best_cut best = {vf_zero(), vf_set1(-FLT_MAX), vi_set1(-1)};
        if (n == 32) cut_IQ1_S(&best, &s);
        else cut_IQ1_M(&best, &s);
        best.cut = vi_select(vf_lt(peak, vf_set1(tiny)), vi_set1(-1), best.cut);
        float scale[LANES];
        int32_t cut[LANES], from[32][LANES];
        vf_store(scale, best.scale);
        vi_store(cut, best.cut);
        for (int i = 0; i < n; i++) vi_store(from[i], s.from[i]);
        for (int l = 0; l < LANES; l++) {
            run_IQ1 *run = runs + j + l;
            const int shift_bits = n == 32 ? 1 : 2, shifts = cut[l] & ((1 << shift_bits) - 1);
            const int middle = cut[l] >> 7, high = (cut[l] & 127) >> shift_bits, turn = scale[l] < 0.0f;
            run->found = cut[l] >= 0;
            run->scale = run->found ? fabsf(scale[l]) : 0.0f;
            uint64_t levels = 0; /* two bits each */
            for (int i = 0; i < n; i++) {
                const int level = (i >= middle) + (i >= high);
                levels |= (uint64_t)(turn ? 2 - level : level) << (2 * from[i][l]);
            }
            for (int k = 0; k < n / 8; k++) run->codes[k] = pack_eight_levels((unsigned)(levels >> (16 * k)));
            for (int k = 0; k < n / 8; k++) run->down[k] = (n == 32 ? shifts : (shifts >> (1 - k)) & 1) ^ turn;
        }
    }
}

/* Moves the eights of a run that are no points to their best candidates, and fits the scale again if there were any;
 * returns the numbers of the points. */
INLINE void points_IQ1(unsigned *points, run_IQ1 *run, const gfl_codebook *codebook, const float *x, const float *w,
                       int n) {
    int moved = 0;
    for (int k = 0; k < n / 8; k++) {
        int index = 0;
        for (int i = 0; i < 8; i++) index = 3 * index + (int)((run->codes[k] >> (4 * i)) & 3);
        const int place = codebook->places[index];
        points[k] = (unsigned)place;
        if (place >= 0) continue;
        int failed = 0;
        float x_spread[32], w_spread[32];
        spread_values(x_spread, x + 8 * k, 8);
        spread_values(w_spread, w + 8 * k, 8);
        moved = 1;
        run->codes[k] = nearest_of_eights(codebook->candidates + (~place >> 8) * CANDIDATE_RUN, ~place & 255,
                                          shifted_levels[run->down[k]], x_spread, w_spread, run->scale, &failed);
        if (failed) run->scale = NAN;
        points[k] = point_number(codebook, run->codes[k], 8);
    }
    if (!moved || !(run->scale >= 0.0f)) return;
    float qx = 0.0f, q2 = 0.0f;
    for (int i = 0; i < n; i++) {
        const float q = shifted_levels[run->down[i / 8]][(run->codes[i / 8] >> (4 * (i % 8))) & 3];
        qx += w[i] * q * x[i];
        q2 += w[i] * q * q;
    }
    if (qx > 0.0f && q2 > 0.0f) run->scale = qx / q2;
}

/* Importances of n weights of one super-block as they lie in memory: ggml's, and x^2 without an imatrix. */
INLINE void importances_IQ1(float *w, const float *x, const float *imatrix, int n, float sigma2) {
    for (int i = 0; i < n; i += LANES) {
        const vf v = vf_load(x + i), squared = vf_mul(v, v);
        vf_store(w + i, imatrix ? vf_mul(vf_load(imatrix + i), vf_sqrt(vf_add(vf_set1(sigma2), squared))) : squared);
    }
}

static void super_IQ1_S(const float *x, const float *w, run_IQ1 *runs, block_iq1_s *y) {
    const gfl_codebook *codebook = gfl_codebook_of(CODEBOOK_IQ1);
    float scales[8] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 8; s++) {
        unsigned points[4];
        if (!runs[s].found) continue;
        points_IQ1(points, runs + s, codebook, x + 32 * s, w + 32 * s, 32);
        for (int k = 0; k < 4; k++) {
            y->qs[4 * s + k] = (uint8_t)points[k];
            y->qh[s] |= (uint16_t)((points[k] >> 8) << (3 * k));
        }
        scales[s] = runs[s].scale;
    }
    const float max = largest_scale(scales, 8), d = max / 15.0f;
    if (max == 0.0f) return;
    y->d = float_to_half(d * 1.125f);
    for (int s = 0; s < 8; s++) {
        const int down = runs[s].found && runs[s].down[0];
        y->qh[s] |= (uint16_t)((nearest_level(1.0f / d * scales[s], 7) | (down << 3)) << 12);
    }
}

static void super_IQ1_M(const float *x, const float *w, run_IQ1 *runs, block_iq1_m *y) {
    const gfl_codebook *codebook = gfl_codebook_of(CODEBOOK_IQ1);
    float scales[16] = {0};
    memset(y, 0, sizeof *y);
    for (int s = 0; s < 16; s++) {
        unsigned points[2];
        if (!runs[s].found) {
            memset(runs + s, 0, sizeof *runs);
            runs[s].codes[0] = runs[s].codes[1] = codebook->points[0]; /* going up */
            continue;
        }
        points_IQ1(points, runs + s, codebook, x + 16 * s, w + 16 * s, 16);
        y->qs[2 * s] = (uint8_t)points[0];
        y->qs[2 * s + 1] = (uint8_t)points[1];
        y->qh[s] = (uint8_t)((points[0] >> 8) | ((points[1] >> 8) << 4));
        scales[s] = runs[s].scale;
    }
    const float max = largest_scale(scales, 16);
    float d = max / 15.0f, qx = 0.0f, q2 = 0.0f;
    if (max == 0.0f) return;
    const float id = 1.0f / d;
    for (int s = 0; s < 16; s++) {
        const int l = nearest_level(id * scales[s], 7);
        y->scales[s / 4] |= (uint16_t)(l << (3 * (s % 4)));
        y->qh[s] |= (uint8_t)((runs[s].down[0] << 3) | (runs[s].down[1] << 7));
        for (int i = 0; i < 16; i++) {
            const int k = i / 8;
            const float q = shifted_levels[runs[s].down[k]][(runs[s].codes[k] >> (4 * (i % 8))) & 3] *
                            (float)(2 * l + 1);
            qx += w[16 * s + i] * q * x[16 * s + i];
            q2 += w[16 * s + i] * q * q;
        }
    }
    if (q2 > 0.0f) d = qx / q2;
    const unsigned bits = float_to_half(d * 1.1125f);
    for (int i = 0; i < 4; i++) y->scales[i] |= (uint16_t)(((bits >> (4 * i)) & 15) << 12);
}

/* Defines batch_NAME for QUANTIZE_SUPERS over super_NAME; runs of n weights. */
#define BATCH_IQ1(NAME, block, n, tiny)                                                                                \
    static void batch_##NAME(const float *x, const float *imatrix, block *y, int count) {                              \
        float sigma2[BATCH_SUPERS], copy[TILE], w[TILE];                                                               \
        run_IQ1 runs[TILE / n];                                                                                        \
        spread_mean_squares(sigma2, x, count, SUPER, 2.0f);                                                            \
        for (int b = 0; b < count; b += 2) {                                                                           \
            const int supers = count - b < 2 ? 1 : 2;                                                                  \
            memset(w, 0, sizeof w);                                                                                    \
            for (int j = 0; j < supers; j++)                                                                           \
                importances_IQ1(w + SUPER * j, x + SUPER * (b + j), imatrix ? imatrix + SUPER * (b + j) : NULL, SUPER, \
                                sigma2[b + j]);                                                                        \
            cut_tile_IQ1(runs, tile_of(copy, x + SUPER * b, supers * SUPER), w, n, tiny);                              \
            for (int j = 0; j < supers; j++)                                                                           \
                super_##NAME(x + SUPER * (b + j), w + SUPER * j, runs + SUPER / n * j, y + b + j);                     \
        }                                                                                                              \
    }                                                                                                                  \
    QUANTIZE_SUPERS(NAME, block)

BATCH_IQ1(IQ1_S, block_iq1_s, 32, 1e-12f)
BATCH_IQ1(IQ1_M, block_iq1_m, 16, 1e-7f)

/* out = (point +- 1/8) * d for eights of weights */
INLINE void values_IQ1(float *out, const int8_t *bytes, int n, float d, float delta) {
    for (int i = 0; i < n; i += LANES)
        vf_store(out + i, vf_mul(vf_set1(d), vf_add(vi_to_vf(vi_load_i8(bytes + i)), vf_set1(delta))));
}

static void dequantize_IQ1_S(const uint8_t *src, float *out, int64_t n) {
    const block_iq1_s *x = (const block_iq1_s *)src;
    const int8_t *values = gfl_codebook_values(CODEBOOK_IQ1);
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        int8_t bytes[SUPER];
        for (int j = 0; j < 32; j++) {
            const unsigned point = x->qs[j] | ((((unsigned)x->qh[j / 4] >> (3 * (j % 4))) & 7) << 8);
            memcpy(bytes + 8 * j, values + 8 * point, 8);
        }
        for (int s = 0; s < 8; s++)
            values_IQ1(out + i + 32 * s, bytes + 32 * s, 32, d * (float)(2 * ((x->qh[s] >> 12) & 7) + 1),
                       (x->qh[s] & 0x8000) ? -0.125f : 0.125f);
    }
}

static void dequantize_IQ1_M(const uint8_t *src, float *out, int64_t n) {
    const block_iq1_m *x = (const block_iq1_m *)src;
    const int8_t *eighths = gfl_eighths_iq1();
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        unsigned bits = 0;
        int8_t bytes[SUPER];
        for (int j = 0; j < 4; j++) bits |= (unsigned)(x->scales[j] >> 12) << (4 * j);
        const float d = half_to_float((uint16_t)bits) * 0.125f; /* exact, so the products are those with p +- 1/8 */
        for (int j = 0; j < 32; j++) {
            /* the point's highest bits, and the sign of 1/8 */
            const unsigned high = ((unsigned)x->qh[j / 2] >> (4 * (j % 2))) & 15;
            memcpy(bytes + 8 * j, eighths + 8 * (x->qs[j] | (high << 8)), 8);
        }
        for (int s = 0; s < 16; s++)
            scaled_bytes(out + i + 16 * s, bytes + 16 * s, 16,
                         d * (float)(2 * ((x->scales[s / 4] >> (3 * (s % 4))) & 7) + 1));
    }
}

#endif
