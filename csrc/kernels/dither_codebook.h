#ifndef GFL_DITHER_CODEBOOK_H
#define GFL_DITHER_CODEBOOK_H
#include <float.h>

#include "../codebooks/neighbours.h"
#include "base.h"
#include "dither.h"
#include "lanes.h"
#include "table.h"

/* Stochastic rounding of codebook types, where eight (or four) weights, a vector, share a code and move together. A
 * vector goes to one of the neighbours of its point (codebooks/neighbours.h), drawn with probabilities p_k that make
 * the expected move the wanted one, x, at the least variance. v_k is the way to neighbour k:
 *
 *   minimize sum p_k |v_k|^2  subject to  sum p_k v_k = x,  sum p_k <= 1,  p >= 0
 *
 * The simplex method with an explicit inverse solves it. It starts from "all is lost": one variable for each weight,
 * which costs `loss_price` for every unit of x_i that no move makes up for, and one for staying. So it may end after
 * any step, and where the neighbours cannot make up x because the levels end there, it loses as little as it can. A
 * vector that is to go far walks to the nearest point first.
 *
 * Lanes are neighbours, or rows of the inverse; nothing is summed across lanes, so every ISA has the same bits. */

enum { PROGRAM_ROWS = 16, MOST_STEPS = 24, MOST_WALKS = 8, PROGRAMS_AT_ONCE = 4 };

/* Losing a unit costs as much as going this many mean steps too far. Steps that gain less than WORTHWHILE promises are
 * not taken. */
static const float LOSS_PRICE = 8.0f, WORTHWHILE = 1.05f, LEAST_PIVOT = 1e-3f;

/* A vector stays if one of its weights is to move by more levels than this, far beyond all codebooks. */
static const float OUT_OF_REACH = 1e4f;

typedef struct {
    float inverse[9][PROGRAM_ROWS]; /* by column: the inverse of the basis */
    float amount[PROGRAM_ROWS];     /* of each variable in the basis */
    float price[9];                 /* of a unit of each row */
    int neighbour[PROGRAM_ROWS];    /* the variable of each row; -1: loss or staying */
} program;

/* The first k of the largest value of v[0..N_NEIGHBOURS). */
INLINE int first_largest(const float *v, float *largest) {
    vf high = vf_load(v);
    for (int k = LANES; k < N_NEIGHBOURS; k += LANES) high = vf_max(high, vf_load(v + k));
    *largest = vf_hmax(high);
    for (int k = 0; k < N_NEIGHBOURS; k += LANES) {
        const uint32_t same = vm_to_bits(vf_eq(vf_load(v + k), vf_set1(*largest)));
        if (same) return k + __builtin_ctz(same);
    }
    return 0;
}

/* The neighbour of the largest (price . v + base) / |v|^2. */
INLINE int best_neighbour(const gfl_neighbours *m, const float *price, float base, float *value, const int dims) {
    float values[N_NEIGHBOURS];
    for (int k = 0; k < N_NEIGHBOURS; k += LANES) {
        vf sum = vf_set1(base);
        for (int i = 0; i < dims; i++)
            sum = vf_add(sum, vf_mul(vf_set1(price[i]), vi_to_vf(vi_load_i8(m->offset + i * N_NEIGHBOURS + k))));
        vf_store(values + k, vf_mul(sum, vf_load(m->inverse_square + k)));
    }
    return first_largest(values, value);
}

INLINE void start_program(program *p, const float *x, float loss_price, const int dims) {
    memset(p, 0, sizeof *p);
    for (int i = 0; i <= PROGRAM_ROWS - 1; i++) p->neighbour[i] = -1;
    for (int i = 0; i < dims; i++) {
        const float sign = x[i] < 0.0f ? -1.0f : 1.0f;
        p->inverse[i][i] = sign;
        p->amount[i] = fabsf(x[i]);
        p->price[i] = sign * loss_price;
    }
    p->inverse[dims][dims] = p->amount[dims] = 1.0f;
}

/* Takes a neighbour into the basis in place of the variable that reaches zero first; returns whether there was one. */
INLINE int enter(program *p, const gfl_neighbours *m, int k, float gain, const int dims) {
    const int rows = (dims + LANES) / LANES * LANES;
    float column[PROGRAM_ROWS], way[8];
    vf ratios[PROGRAM_ROWS / LANES];
    int row = 0;
    for (int j = 0; j < dims; j++) way[j] = (float)m->offset[j * N_NEIGHBOURS + k];
    vf low = vf_set1(FLT_MAX);
    for (int i = 0; i < rows; i += LANES) {
        vf sum = vf_load(p->inverse[dims] + i);
        for (int j = 0; j < dims; j++) sum = vf_add(sum, vf_mul(vf_load(p->inverse[j] + i), vf_set1(way[j])));
        const vf left = vf_select(vf_gt(sum, vf_set1(LEAST_PIVOT)), vf_div(vf_load(p->amount + i), sum),
                                  vf_set1(FLT_MAX));
        vf_store(column + i, sum);
        ratios[i / LANES] = left;
        low = vf_min(low, left);
    }
    const float least = vf_hmin(low);
    if (least == FLT_MAX) return 0;
    for (int i = rows - LANES; i >= 0; i -= LANES) {
        const uint32_t same = vm_to_bits(vf_eq(ratios[i / LANES], vf_set1(least)));
        if (same) row = i + __builtin_ctz(same);
    }
    const float pivot = column[row], over_pivot = 1.0f / pivot;
    for (int i = 0; i < rows; i += LANES) {
        const vf rest = vf_sub(vf_load(p->amount + i), vf_mul(vf_load(column + i), vf_set1(least)));
        vf_store(p->amount + i, vf_max(rest, vf_zero()));
    }
    p->amount[row] = least;
    p->neighbour[row] = k;
    column[row] = pivot - 1.0f;
    for (int j = 0; j <= dims; j++) {
        const float share = p->inverse[j][row] * over_pivot;
        p->price[j] -= gain * share;
        for (int i = 0; i < rows; i += LANES) {
            const vf changed = vf_sub(vf_load(p->inverse[j] + i), vf_mul(vf_load(column + i), vf_set1(share)));
            vf_store(p->inverse[j] + i, changed);
        }
    }
    return 1;
}

/* Solves several programs, a step of each in turn, since the steps of one wait for each other. */
INLINE void solve_programs(program *programs, const gfl_neighbours *const *neighbours, int count, const int dims) {
    unsigned left = (1u << count) - 1;
    for (int step = 0; step < MOST_STEPS && left; step++) {
        int best[PROGRAMS_AT_ONCE];
        float gain[PROGRAMS_AT_ONCE];
        for (int i = 0; i < count; i++) {
            float value;
            if (!((left >> i) & 1)) continue;
            best[i] = best_neighbour(neighbours[i], programs[i].price, programs[i].price[dims], &value, dims);
            gain[i] = (value - 1.0f) / neighbours[i]->inverse_square[best[i]];
            if (value < WORTHWHILE) left &= ~(1u << i);
        }
        for (int i = 0; i < count; i++)
            if (((left >> i) & 1) && !enter(programs + i, neighbours[i], best[i], gain[i], dims)) left &= ~(1u << i);
    }
}

/* A point and signs that a vector is at, and the move x that is still wanted, as if all signs were positive. */
typedef struct {
    unsigned point, signs;
    float x[8];
} vector_place;

INLINE void move_to(vector_place *at, const gfl_neighbours *m, int k) {
    at->point = m->point[k];
    at->signs ^= m->sign_flips[k];
}

/* Walks from neighbour to neighbour as long as that comes nearer to what is wanted. */
INLINE void walk(vector_place *at, const gfl_neighbours *neighbours, float shortest, const int dims) {
    for (int step = 0; step < MOST_WALKS; step++) {
        const gfl_neighbours *m = neighbours + at->point;
        float squares = 0.0f, twice[8], value;
        for (int i = 0; i < dims; i++) squares += at->x[i] * at->x[i], twice[i] = 2.0f * at->x[i];
        if (4.0f * squares <= shortest * shortest) return; /* |x| at most half a move */
        const int k = best_neighbour(m, twice, 0.0f, &value, dims);
        if (!(value > 1.0f)) return;
        for (int i = 0; i < dims; i++) {
            const float rest = at->x[i] - (float)m->offset[i * N_NEIGHBOURS + k];
            at->x[i] = ((m->sign_flips[k] >> i) & 1) ? -rest : rest;
        }
        move_to(at, m, k);
    }
}

/* The vectors of one block and what is wanted of them. */
typedef struct {
    float s[16], inverse[16]; /* by group; both are 0 where s is less than the smallest normal float */
    uint16_t points[64];
    uint8_t signs[SUPER / 8];
    const float *rest; /* wanted changes */
    const gfl_neighbours *neighbours;
    float loss_price, shortest;
} vector_block;

INLINE void read_vectors(vector_block *v, const gfl_codebook_codec *codec, const uint8_t *block, const float *rest) {
    codec->scales(block, v->s);
    codec->points(block, v->points, v->signs);
    for (int g = 0; g < SUPER / codec->group; g++) {
        const int flat = !(fabsf(v->s[g]) >= FLT_MIN);
        v->inverse[g] = flat ? 0.0f : 1.0f / v->s[g];
        if (flat) v->s[g] = 0.0f;
    }
    v->rest = rest;
    v->neighbours = gfl_neighbours_of(codec->codebook);
    v->loss_price = LOSS_PRICE * codec->step;
    v->shortest = codec->shortest;
}

/* Where vector j is and what is wanted of it; returns whether that is anything, and can be done. */
enum { NOTHING, SOMETHING, IMPOSSIBLE };

INLINE int place_of_vector(vector_place *at, const vector_block *v, int j, int group, const int dims) {
    const float *rest = v->rest + j * dims, inverse = v->inverse[j * dims / group];
    int any = 0, far = 0;
    at->point = v->points[j];
    at->signs = (v->signs[j * dims / 8] >> ((j * dims) % 8)) & ((1u << dims) - 1);
    for (int i = 0; i < dims; i++) {
        const float x = rest[i] * inverse;
        at->x[i] = ((at->signs >> i) & 1) ? -x : x;
        any |= rest[i] != 0.0f;
        far |= !(fabsf(x) <= OUT_OF_REACH);
    }
    return !any ? NOTHING : far || inverse == 0.0f ? IMPOSSIBLE : SOMETHING;
}

/* Vectors of a block whose programs are solved together. */
typedef struct {
    int j[PROGRAMS_AT_ONCE]; /* their numbers */
    int count;
    vector_place at[PROGRAMS_AT_ONCE];
    const gfl_neighbours *neighbours[PROGRAMS_AT_ONCE];
    program programs[PROGRAMS_AT_ONCE];
} vector_batch;

/* Solves for the next vectors from j on that are to move; returns where to go on. */
INLINE int next_vectors(vector_batch *batch, const vector_block *v, int j, int step, int group, const int dims) {
    batch->count = 0;
    for (; j < SUPER / dims && batch->count < PROGRAMS_AT_ONCE; j += step) {
        vector_place *at = batch->at + batch->count;
        if (place_of_vector(at, v, j, group, dims) != SOMETHING) continue;
        walk(at, v->neighbours, v->shortest, dims);
        batch->j[batch->count] = j;
        batch->neighbours[batch->count] = v->neighbours + at->point;
        start_program(batch->programs + batch->count++, at->x, v->loss_price, dims);
    }
    solve_programs(batch->programs, batch->neighbours, batch->count, dims);
    return j;
}

/* lost = what the program's neighbours do not make up of x; returns the expected squared error. */
INLINE float finish_program(float *lost, const program *p, const gfl_neighbours *m, const float *x, const int dims) {
    float variance = 0.0f, error = 0.0f;
    for (int i = 0; i < dims; i++) lost[i] = x[i];
    for (int r = 0; r <= dims; r++) {
        if (p->neighbour[r] < 0) continue;
        variance += p->amount[r] / m->inverse_square[p->neighbour[r]];
        for (int i = 0; i < dims; i++) lost[i] -= p->amount[r] * (float)m->offset[i * N_NEIGHBOURS + p->neighbour[r]];
    }
    for (int i = 0; i < dims; i++) error += lost[i] * lost[i] - (x[i] - lost[i]) * (x[i] - lost[i]);
    return variance + error;
}

/* Where nothing can be done all is lost. */
INLINE void measure_impossible(gfl_codebook_sums *sums, const vector_block *v, const float *delta, int j, int group,
                               const int dims) {
    vector_place at;
    if (place_of_vector(&at, v, j, group, dims) != IMPOSSIBLE) return;
    for (int i = j * dims; i < (j + 1) * dims; i++) {
        sums->cost += (double)v->rest[i] * (double)v->rest[i];
        sums->lost += (double)v->rest[i] * (double)delta[i];
    }
}

INLINE void measure_block(gfl_codebook_sums *sums, const gfl_codebook_codec *codec, const uint8_t *block,
                          const float *rest, const float *delta, int first, int step, const int dims) {
    vector_block v;
    vector_batch batch;
    read_vectors(&v, codec, block, rest);
    *sums = (gfl_codebook_sums){0.0, 0.0, 0.0};
    for (int j = first; j < SUPER / dims; j += step) {
        for (int i = j * dims; i < (j + 1) * dims; i++) sums->squares += (double)delta[i] * (double)delta[i];
        measure_impossible(sums, &v, delta, j, codec->group, dims);
    }
    for (int j = first; j < SUPER / dims;) {
        j = next_vectors(&batch, &v, j, step, codec->group, dims);
        for (int b = 0; b < batch.count; b++) {
            const float *x = delta + batch.j[b] * dims, s = v.s[batch.j[b] * dims / codec->group];
            const vector_place *at = batch.at + b;
            float lost[8];
            const float cost = finish_program(lost, batch.programs + b, batch.neighbours[b], at->x, dims);
            sums->cost += (double)(s * s) * (double)cost;
            for (int i = 0; i < dims; i++)
                sums->lost += (double)(s * (((at->signs >> i) & 1) ? -lost[i] : lost[i])) * (double)x[i];
        }
    }
}

static void measure_codebook(gfl_codebook_sums *sums, const gfl_codebook_codec *codec, const uint8_t *block,
                             const float *rest, const float *delta, int first, int step) {
    if (codec->dims == 8) measure_block(sums, codec, block, rest, delta, first, step, 8);
    else measure_block(sums, codec, block, rest, delta, first, step, 4);
}

/* Goes to one of a program's neighbours, or stays, as u in [0, 1) says. */
INLINE void draw_neighbour(vector_place *at, const program *p, const gfl_neighbours *m, float u, const int dims) {
    float sum = 0.0f;
    for (int r = 0; r <= dims; r++) {
        if (p->neighbour[r] < 0) continue;
        sum += p->amount[r];
        if (!(u < sum)) continue;
        move_to(at, m, p->neighbour[r]);
        return;
    }
}

INLINE void draw_block(const gfl_codebook_codec *codec, uint8_t *block, const float *rest, uint64_t row_key,
                       int64_t column, const int dims) {
    const vi key_low = vi_set1((int)(uint32_t)row_key), key_high = vi_set1((int)(uint32_t)(row_key >> 32));
    float u[SUPER / 4];
    vector_block v;
    vector_batch batch;
    read_vectors(&v, codec, block, rest);
    for (int j = 0; j < SUPER / dims; j += LANES) {
        const vi number = vi_add(vi_load(lane_numbers), vi_set1(j)),
                 offset = dims == 8 ? vi_shl(number, 3) : vi_shl(number, 2);
        vf_store(u + j, uniform(vi_add(vi_set1((int)(uint32_t)column), offset), key_low, key_high));
    }
    for (int j = 0; j < SUPER / dims;) {
        j = next_vectors(&batch, &v, j, 1, codec->group, dims);
        for (int b = 0; b < batch.count; b++) {
            const int k = batch.j[b], shift = (k * dims) % 8;
            vector_place *at = batch.at + b;
            draw_neighbour(at, batch.programs + b, batch.neighbours[b], u[k], dims);
            v.points[k] = (uint16_t)at->point;
            v.signs[k * dims / 8] = (uint8_t)((v.signs[k * dims / 8] & ~(((1u << dims) - 1) << shift)) |
                                              (at->signs << shift));
        }
    }
    codec->pack(block, v.points, v.signs);
}

static void dither_codebook(const gfl_codebook_codec *codec, uint8_t *block, const float *rest, uint64_t row_key,
                            int64_t column) {
    if (codec->dims == 8) draw_block(codec, block, rest, row_key, column, 8);
    else draw_block(codec, block, rest, row_key, column, 4);
}

#endif
