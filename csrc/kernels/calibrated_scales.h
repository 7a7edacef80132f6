#ifndef GFL_CALIBRATED_SCALES_H
#define GFL_CALIBRATED_SCALES_H
#include <math.h>

#include "../block_formats.h"
#include "../half.h"
#include "base.h"
#include "lanes.h"
#include "search_codes.h"
#include "table.h"

/* Calibrated rounding, the other half: the half-precision numbers of a row's blocks, d and in some types m, as
 * continuous unknowns. A half has 11 bits, so it can move a block's weights by a thousandth of their size, and no noise
 * is added where a code would have to jump by a whole step.
 *
 * A relative change of d by z moves the weights by z x, x = w (s * level where there is an m); of m, with x = -o.
 * With all x of the row as the rows of X, its best change solves (X H X^T) z = -X g / (1 + |u|^2), g being the gradient
 * (search_codes.h). H = V V^T + diag(d) makes that Y Y^T + B, Y = X V, and B has blocks of 2 x 2; so the system is one
 * of DIRECTIONS unknowns. It is solved in double, in one order of operations on every instruction set. */

/* What fitting a row needs: for up to n_units blocks, two unknowns each. */
typedef struct {
    float *y;        /* (n_units, 2, DIRECTIONS) */
    double *inverse; /* (n_units, 3): of B's blocks: dd, dm, mm */
    double *right;   /* (n_units, 2): X g */
    float *shift;    /* (n_in) */
} scale_fit;

/* x of d and of m of the weights of a group */
INLINE float x_of_d(const gfl_block_codec *codec, float s, float o, int code) {
    const float w = s * level_of(codec, code);
    return codec->halves == 1 ? w - o : w;
}

/* Y, B and X g of the unit of weights [j, j + n). */
static void sum_unit(const gfl_search_state *h, const gfl_search_row *row, const scale_fit *fit, const float *c,
                     int64_t unit, int64_t j, int n) {
    const gfl_block_codec *codec = h->codec;
    float *y = fit->y + unit * 2 * DIRECTIONS, *ym = y + DIRECTIONS;
    double dd = 0, dm = 0, mm = 0, right[2] = {0, 0};
    memset(y, 0, 2 * DIRECTIONS * sizeof *y);
    for (int i = 0; i < n; i++) {
        const int64_t at = j + i, g = at / codec->group;
        const float s = row->s[g], o = row->o[g], x = x_of_d(codec, s, o, row->codes[at]);
        float error = s * level_of(codec, row->codes[at]) - o - row->target[at];
        for (int q = 0; q < KEPT; q++) error += row->u[q] * h->q[q * h->n_in + at];
        const double d = h->d[at], pull = d * error;
        add_scaled(y, x, h->columns + at * DIRECTIONS, DIRECTIONS);
        dd += d * x * x, dm -= d * x * o, mm += d * o * o;
        right[0] += pull * x, right[1] -= pull * o;
    }
    if (codec->halves == 2)
        for (int i = 0; i < n; i += codec->group) {
            const int64_t g = (j + i) / codec->group;
            add_scaled(ym, -row->o[g], h->group_sums + g * DIRECTIONS, DIRECTIONS);
        }
    right[0] += dot_directions(c, y), right[1] += dot_directions(c, ym);
    /* a little more of the diagonal, for blocks whose weights are all alike */
    dd *= 1.001, mm *= 1.001;
    const double determinant = dd * mm - dm * dm;
    double *inverse = fit->inverse + 3 * unit;
    if (codec->halves == 2 && determinant > 0) {
        inverse[0] = mm / determinant, inverse[1] = -dm / determinant, inverse[2] = dd / determinant;
    } else {
        inverse[0] = dd > 0 ? 1 / dd : 0, inverse[1] = 0, inverse[2] = 0;
    }
    if (!isfinite(inverse[0]) || !isfinite(inverse[1]) || !isfinite(inverse[2]))
        memset(inverse, 0, 3 * sizeof *inverse);
    memcpy(fit->right + 2 * unit, right, sizeof right);
}

/* out[0..n) += factor * x */
static void add_scaled_double(double *out, double factor, const double *x, int n) {
    for (int i = 0; i < n; i++) out[i] += factor * x[i];
}

/* The Cholesky factor of m in its upper triangle, m = R^T R; returns whether m is positive. */
static int factor_upper(double *m) {
    for (int k = 0; k < DIRECTIONS; k++) {
        double *top = m + k * DIRECTIONS;
        if (!(top[k] > 0)) return 0;
        const double root = 1 / sqrt(top[k]);
        for (int l = k; l < DIRECTIONS; l++) top[l] *= root;
        for (int l = k + 1; l < DIRECTIONS; l++)
            add_scaled_double(m + l * DIRECTIONS + l, -top[l], top + l, DIRECTIONS - l);
    }
    return 1;
}

/* x = (R^T R)^-1 x */
static void solve_upper(const double *r, double *x) {
    for (int k = 0; k < DIRECTIONS; k++) {
        x[k] /= r[k * DIRECTIONS + k];
        add_scaled_double(x + k + 1, -x[k], r + k * DIRECTIONS + k + 1, DIRECTIONS - k - 1);
    }
    for (int k = DIRECTIONS - 1; k >= 0; k--) {
        for (int l = k + 1; l < DIRECTIONS; l++) x[k] -= r[k * DIRECTIONS + l] * x[l];
        x[k] /= r[k * DIRECTIONS + k];
    }
}

/* Replaces X g by (Y Y^T + B)^-1 X g = t - B^-1 Y (1 + Y^T B^-1 Y)^-1 Y^T t with t = B^-1 X g. */
static int solve_fit(const scale_fit *fit, int64_t n_units) {
    double m[DIRECTIONS * DIRECTIONS] = {0}, x[DIRECTIONS] = {0};
    for (int k = 0; k < DIRECTIONS; k++) m[k * DIRECTIONS + k] = 1;
    for (int64_t unit = 0; unit < n_units; unit++) {
        const float *yd = fit->y + unit * 2 * DIRECTIONS, *ym = yd + DIRECTIONS;
        const double *b = fit->inverse + 3 * unit;
        double *t = fit->right + 2 * unit, y[2][DIRECTIONS], by[2][DIRECTIONS];
        const double t0 = b[0] * t[0] + b[1] * t[1], t1 = b[1] * t[0] + b[2] * t[1];
        t[0] = t0, t[1] = t1;
        for (int k = 0; k < DIRECTIONS; k++) {
            y[0][k] = yd[k], y[1][k] = ym[k];
            by[0][k] = b[0] * y[0][k] + b[1] * y[1][k];
            by[1][k] = b[1] * y[0][k] + b[2] * y[1][k];
            x[k] += y[0][k] * t0 + y[1][k] * t1;
        }
        for (int k = 0; k < DIRECTIONS; k++) {
            double *row = m + k * DIRECTIONS;
            for (int l = k & ~7; l < DIRECTIONS; l++) row[l] += by[0][k] * y[0][l] + by[1][k] * y[1][l];
        }
    }
    if (!factor_upper(m)) return 0;
    solve_upper(m, x);
    for (int64_t unit = 0; unit < n_units; unit++) {
        const float *yd = fit->y + unit * 2 * DIRECTIONS, *ym = yd + DIRECTIONS;
        const double *b = fit->inverse + 3 * unit;
        double sums[2] = {0, 0};
        for (int k = 0; k < DIRECTIONS; k++) sums[0] += yd[k] * x[k], sums[1] += ym[k] * x[k];
        fit->right[2 * unit] -= b[0] * sums[0] + b[1] * sums[1];
        fit->right[2 * unit + 1] -= b[1] * sums[0] + b[2] * sums[1];
    }
    return 1;
}

/* A half times 1 + z; as it is if that is no finite half or changes it by more than half of it. */
static f16 moved_half(f16 half, double z) {
    if (!(fabs(z) < 0.5)) return half;
    const f16 moved = portable_f32_to_f16((float)(portable_f16_to_f32(half) * (1 + z)));
    return (moved & 0x7fff) < 0x7c00 ? moved : half;
}

/* Reads the scales of whole blocks of a row. */
static void scales_of_row(const gfl_search_state *h, const uint8_t *blocks, float *s, float *o) {
    for (int64_t j = 0; j < h->n_in; j += CHUNK) {
        const int n = (int)(h->n_in - j < CHUNK ? h->n_in - j : CHUNK);
        h->codec->scales(blocks + j / h->weights * h->bytes, n, s + j / h->codec->group, o + j / h->codec->group);
    }
}

/* Fits the halves of a row's blocks if that lowers the objective; returns the number of halves that moved. */
static int64_t search_scales(const gfl_search_state *h, const gfl_search_row *row, uint8_t *blocks) {
    const gfl_block_codec *codec = h->codec;
    const int64_t n_units = h->n_in / h->weights, n_groups = h->n_in / codec->group;
    const scale_fit fit = {h->fit_y, h->fit_inverse, h->fit_right, h->fit_shift};
    float c[DIRECTIONS], moved[DIRECTIONS] = {0}, uu = 1.0f;
    float *s = h->fit_scales, *o = s + n_groups;
    int64_t made = 0;
    if (!codec->halves) return 0;
    memcpy(c, row->ev, sizeof c);
    for (int q = 0; q < KEPT; q++) {
        add_scaled(c, row->u[q], h->p + q * DIRECTIONS, DIRECTIONS);
        uu += row->u[q] * row->u[q];
    }
    for (int64_t unit = 0; unit < n_units; unit++) sum_unit(h, row, &fit, c, unit, unit * h->weights, h->weights);
    if (!solve_fit(&fit, n_units)) return 0;
    memcpy(h->fit_blocks, blocks, (size_t)(n_units * h->bytes));
    for (int64_t unit = 0; unit < n_units; unit++)
        for (int i = 0; i < codec->halves; i++) {
            uint8_t *at = h->fit_blocks + unit * h->bytes + codec->half_at[i];
            f16 half, next;
            memcpy(&half, at, sizeof half);
            next = moved_half(half, -fit.right[2 * unit + i] / uu);
            made += next != half;
            memcpy(at, &next, sizeof next);
        }
    if (!made) return 0;
    scales_of_row(h, h->fit_blocks, s, o);
    double gain = 0;
    for (int64_t j = 0; j < h->n_in; j++) {
        const int64_t g = j / codec->group;
        const float level = level_of(codec, row->codes[j]), before = row->s[g] * level - row->o[g];
        const float shift = (s[g] * level - o[g]) - before;
        float error = before - row->target[j];
        for (int q = 0; q < KEPT; q++) error += row->u[q] * h->q[q * h->n_in + j];
        fit.shift[j] = shift;
        gain += (double)h->d[j] * shift * ((double)uu * shift + 2.0 * error);
        add_scaled(moved, shift, h->columns + j * DIRECTIONS, DIRECTIONS);
    }
    gain += (double)uu * dot_directions(moved, moved) + 2.0 * dot_directions(c, moved);
    if (!(gain < 0)) return 0;
    memcpy(blocks, h->fit_blocks, (size_t)(n_units * h->bytes));
    memcpy(row->s, s, (size_t)n_groups * sizeof *s);
    memcpy(row->o, o, (size_t)n_groups * sizeof *o);
    add_scaled(row->ev, 1.0f, moved, DIRECTIONS);
    for (int q = 0; q < KEPT; q++) {
        add_scaled(h->p + q * DIRECTIONS, row->u[q], moved, DIRECTIONS);
        add_scaled(h->q + q * h->n_in, row->u[q], fit.shift, (int)h->n_in);
    }
    return made;
}

#endif
