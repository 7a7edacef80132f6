#ifndef GFL_SEARCH_CODES_H
#define GFL_SEARCH_CODES_H
#include <math.h>

#include "base.h"
#include "lanes.h"
#include "table.h"

/* Calibrated rounding: single codes move to lower tr(E H E^T) + |U^T E|_H^2, where E = W' - (W + delta), H = V V^T +
 * diag(d) are second moments of the inputs and U the few output directions in which delta matters.
 *
 * The gradient of row i is c V + d (e + u Q) with c = e V + u P, P = U^T E V and Q = U^T E. A move of one code adds to
 * all of them; each row sees the moves of the rows before it. A stripe of columns gets its gradient at once; a code
 * whose gradient asks for a move gets it again, with the moves before it, and decides. */

enum { STRIPE = 64 };

INLINE float level_of(const gfl_block_codec *codec, int code) {
    return codec->levels ? codec->levels[code & 15] : (float)code;
}

/* Sums in 16 parts and folds them, so that every compiler has the same bits. */
static float dot_directions(const float *a, const float *b) {
    float parts[16] = {0};
    for (int i = 0; i < DIRECTIONS; i += 16)
        for (int l = 0; l < 16; l++) parts[l] += a[i + l] * b[i + l];
    for (int n = 8; n > 0; n /= 2)
        for (int l = 0; l < n; l++) parts[l] += parts[l + n];
    return parts[0];
}

static void add_scaled(float *out, float factor, const float *x, int n) {
    for (int i = 0; i < n; i++) out[i] += factor * x[i];
}

/* moves (STRIPE) = what each weight of a stripe of n = LANES * n_vectors columns should move by, all others fixed */
INLINE void find_moves(float *moves, const gfl_search_state *h, const gfl_search_row *row, const float *c,
                       float inverse_u, int64_t j, const int n_vectors) {
    const gfl_block_codec *codec = h->codec;
    vf sums[STRIPE / LANES];
    for (int p = 0; p < n_vectors; p++) sums[p] = vf_zero();
    for (int k = 0; k < DIRECTIONS; k++) {
        const vf factor = vf_set1(c[k]);
        for (int p = 0; p < n_vectors; p++)
            sums[p] = vf_add(sums[p], vf_mul(factor, vf_load(h->v + k * h->n_in + j + p * LANES)));
    }
    for (int p = 0; p < n_vectors; p++) {
        const int64_t at = j + p * LANES, g = at / codec->group;
        const vi code = vi_load_i8(row->codes + at);
        const vf level = codec->levels ? vf_pick16(codec->levels, code) : vi_to_vf(code);
        const vf value = vf_sub(vf_mul(vf_set1(row->s[g]), level), vf_set1(row->o[g]));
        vf error = vf_sub(value, vf_load(row->target + at));
        for (int q = 0; q < KEPT; q++)
            error = vf_add(error, vf_mul(vf_set1(row->u[q]), vf_load(h->q + q * h->n_in + at)));
        const vf gradient = vf_add(sums[p], vf_mul(vf_load(h->d + at), error));
        vf_store(moves + p * LANES, vf_neg(vf_mul(vf_mul(gradient, vf_load(h->inverse + at)), vf_set1(inverse_u))));
    }
}

/* Moves the code of column j one level if that is worth it; returns whether. */
static int try_move(const gfl_search_state *h, const gfl_search_row *row, float *c, float uu, int64_t j, float limit) {
    const gfl_block_codec *codec = h->codec;
    const float s = row->s[j / codec->group], *vj = h->columns + j * DIRECTIONS;
    const int code = row->codes[j];
    float error = s * level_of(codec, code) - row->o[j / codec->group] - row->target[j];
    for (int q = 0; q < KEPT; q++) error += row->u[q] * h->q[q * h->n_in + j];
    const float gradient = dot_directions(c, vj) + h->d[j] * error;
    const float wanted = -(gradient * h->inverse[j] / uu);
    const int next = code + ((wanted > 0.0f) == (s > 0.0f) ? 1 : -1);
    const int low = codec->levels ? 0 : (int)codec->low, high = codec->levels ? codec->n_levels - 1 : (int)codec->high;
    if (next < low || next > high) return 0;
    const float step = s * (level_of(codec, next) - level_of(codec, code));
    if (!(fabsf(wanted) > limit * fabsf(step))) return 0;
    row->codes[j] = (int8_t)next;
    add_scaled(c, step * uu, vj, DIRECTIONS);
    add_scaled(row->ev, step, vj, DIRECTIONS);
    for (int q = 0; q < KEPT; q++) {
        add_scaled(h->p + q * DIRECTIONS, step * row->u[q], vj, DIRECTIONS);
        h->q[q * h->n_in + j] += step * row->u[q];
    }
    return 1;
}

/* One pass over a row: every code whose best move is more than `limit` steps may move by one. Returns the moves. */
static int64_t search_row(const gfl_search_state *h, const gfl_search_row *row, float limit) {
    float c[DIRECTIONS], moves[STRIPE], uu = 1.0f;
    int64_t made = 0;
    memcpy(c, row->ev, sizeof c);
    for (int q = 0; q < KEPT; q++) {
        add_scaled(c, row->u[q], h->p + q * DIRECTIONS, DIRECTIONS);
        uu += row->u[q] * row->u[q];
    }
    for (int64_t j = 0; j < h->n_in; j += STRIPE) {
        const int n = h->n_in - j < STRIPE ? 32 : STRIPE; /* rows are whole blocks of 32 weights */
        if (n == STRIPE) find_moves(moves, h, row, c, 1.0f / uu, j, STRIPE / LANES);
        else find_moves(moves, h, row, c, 1.0f / uu, j, 32 / LANES);
        for (int l = 0; l < n; l++) {
            const float s = fabsf(row->s[(j + l) / h->codec->group]);
            if (fabsf(moves[l]) > limit * s * h->least_step && s > 1e-30f)
                made += try_move(h, row, c, uu, j + l, limit);
        }
    }
    return made;
}

#endif
