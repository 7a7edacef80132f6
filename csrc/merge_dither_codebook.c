/* Adaptive dither of the types on grids, whose weights move in vectors of eight or four: which scales each block gets,
 * and its points and signs. The arithmetic is in kernels/dither_codebook.h.
 *
 * A block keeps the base's scales where its change is weak; elsewhere it gets those of its requantization if they can
 * be expected to cost less. Where the change is so strong that it would survive anyway, the requantization is taken as
 * it is. */
#include "merge_dither_codebook.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"

enum { GROUP_FLOATS = 64 * 1024, SAMPLED = 4 };

/* Root mean square of a change, in steps of the base's grid, from which other scales are tried, and from which the
 * change is rounded to nearest. */
static const double NOT_WEAK = 0.25, STRONG = 0.5;

typedef struct {
    const gfl_table *table;
    const gfl_codebook_codec *codec;
    const gfl_pair *type;
    int64_t n_in, row_bytes;
    int bytes; /* of a block */
    int needs_imatrix;
} job;

/* Room for a row. */
typedef struct {
    float *importance, *target;
    uint8_t *found;
} row_room;

int gfl_uses_codebook(int type_id) {
    const int type = gfl_index_of(type_id);
    return type >= 0 && gfl_scalar.codebook_codecs[type].pack;
}

static int begin(job *j, int isa, int type_id, int64_t n_in) {
    const int type = gfl_index_of(type_id);
    const gfl_table *table = gfl_table_of(isa);
    if (!table || type < 0 || !table->codebook_codecs[type].pack) return 0;
    const gfl_type t = gfl_type_at(type);
    *j = (job){table,          &table->codebook_codecs[type], &table->types[type],
               n_in,           n_in / SUPER * t.block_bytes,  t.block_bytes,
               t.needs_imatrix};
    return 1;
}

/* How strong the change of a block is: its mean square in units of the grid's steps; infinite where there are none. */
static double strength(const job *j, const uint8_t *block, const float *delta) {
    float s[16];
    double steps = 0.0, squares = 0.0;
    j->codec->scales(block, s);
    for (int g = 0; g < SUPER / j->codec->group; g++) steps += (double)s[g] * (double)s[g];
    steps *= (double)j->codec->step * (double)j->codec->step * (double)j->codec->group;
    for (int i = 0; i < SUPER; i++) squares += (double)delta[i] * (double)delta[i];
    return squares == 0.0 ? 0.0 : squares / steps;
}

static double squared_error(const float *x, const float *y) {
    double sum = 0.0;
    for (int i = 0; i < SUPER; i++) sum += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
    return sum;
}

static void subtract(float *out, const float *x, const float *y) {
    for (int i = 0; i < SUPER; i++) out[i] = x[i] - y[i];
}

/* Whether the requantized block is to be taken; what the chosen one loses is added to the row's sums. */
static int choose(const job *j, const uint8_t *base, const uint8_t *found, const float *delta, const float *target,
                  double strong, double *sums) {
    float rest[SUPER], back[SUPER];
    gfl_codebook_sums kept, new;
    j->table->measure_codebook(&kept, j->codec, base, delta, delta, 0, 1);
    j->type->dequantize(found, back, SUPER);
    const double error = squared_error(back, target); /* not less than anything if a scale has overflown */
    sums[GFL_WANTED] += kept.squares;
    if (strong >= STRONG * STRONG && error < 0.5 * kept.squares) {
        sums[GFL_REACHED] += kept.squares;
        return 1;
    }
    subtract(rest, target, back);
    j->table->measure_codebook(&new, j->codec, found, rest, delta, 0, 1);
    const int take = error < 1e30 && new.cost < kept.cost;
    sums[GFL_REACHED] += kept.squares - (take ? new.lost : kept.lost);
    return take;
}

static gfl_result fit_row(const job *j, const row_room *room, const uint8_t *src, uint8_t *dst, const float *delta,
                          const float *imatrix, int64_t row, double *sums, int64_t *n_new) {
    const int64_t blocks = j->n_in / SUPER;
    int searched = 0;
    memcpy(dst, src, (size_t)j->row_bytes);
    j->type->dequantize(src, room->target, j->n_in);
    j->table->add(room->target, room->target, delta, j->n_in);
    if (j->table->largest(room->target, j->n_in) >= 0x7f800000u)
        return gfl_first_not_finite(room->target, 1, j->n_in, row, GFL_NOT_FINITE);
    sums[GFL_REACHED] = sums[GFL_WANTED] = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *base = src + b * j->bytes;
        const float *x = delta + b * SUPER;
        const double strong = strength(j, base, x);
        if (!(strong >= NOT_WEAK * NOT_WEAK)) { /* a sample tells enough of what a tensor loses */
            gfl_codebook_sums some;
            j->table->measure_codebook(&some, j->codec, base, x, x, (int)(b % SAMPLED), SAMPLED);
            sums[GFL_REACHED] += SAMPLED * (some.squares - some.lost);
            sums[GFL_WANTED] += SAMPLED * some.squares;
            continue;
        }
        if (!searched) j->type->quantize(room->target, room->found, 1, j->n_in, imatrix ? imatrix : room->importance);
        searched = 1;
        if (!choose(j, base, room->found + b * j->bytes, x, room->target + b * SUPER, strong, sums)) continue;
        memcpy(dst + b * j->bytes, room->found + b * j->bytes, (size_t)j->bytes);
        ++*n_new;
    }
    return done;
}

gfl_result gfl_choose_codebook_scales(int isa, int type_id, const uint8_t *src, uint8_t *dst, int64_t n_rows,
                                      int64_t n_in, const gfl_delta *delta, const float *imatrix, double *sums,
                                      int64_t *n_new) {
    job j;
    if (!begin(&j, isa, type_id, n_in)) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS);
    float *floats = malloc((size_t)((group + 2) * n_in) * sizeof *floats);
    uint8_t *found = malloc((size_t)j.row_bytes);
    gfl_result result = floats && found ? done : no_memory;
    const row_room room = {j.needs_imatrix ? floats : NULL, floats + n_in, found};
    for (int64_t i = 0; i < n_in && !result.status; i++) floats[i] = 1.0f;
    for (int64_t first = 0; first < n_rows && !result.status; first += group) {
        const int64_t last = n_rows - first < group ? n_rows : first + group;
        const float *change = gfl_delta_rows(j.table, delta, floats + 2 * n_in, first, last - first, n_in);
        for (int64_t row = first; row < last && !result.status; row++)
            result = fit_row(&j, &room, src + row * j.row_bytes, dst + row * j.row_bytes, change + (row - first) * n_in,
                             imatrix, row, sums + GFL_N_REACH * row, n_new);
    }
    free(found);
    free(floats);
    return result;
}

static gfl_result dither_block(const job *j, const uint8_t *src, uint8_t *dst, const float *delta, float gain,
                               uint64_t key, int64_t row, int64_t column, double *sums) {
    float before[SUPER], target[SUPER], rest[SUPER], after[SUPER];
    j->type->dequantize(src, before, SUPER);
    j->table->add(target, before, delta, SUPER);
    if (j->table->largest(target, SUPER) >= 0x7f800000u) {
        gfl_result result = gfl_first_not_finite(target, 1, SUPER, row, GFL_NOT_FINITE);
        result.column += column;
        return result;
    }
    const double strong = strength(j, src, delta);
    if (strong == 0.0) {
        memcpy(dst, src, (size_t)j->bytes);
    } else if (strong < STRONG * STRONG || !memcmp(dst, src, (size_t)j->bytes)) {
        j->type->dequantize(dst, after, SUPER);
        for (int i = 0; i < SUPER; i++) rest[i] = (before[i] - after[i]) + gain * delta[i];
        j->table->dither_codebook(j->codec, dst, rest, key, column);
    }
    j->type->dequantize(dst, after, SUPER);
    j->table->four_dots(sums, before, delta, target, after, SUPER);
    return done;
}

gfl_result gfl_round_codebook_stochastic(int isa, int type_id, const uint8_t *src, uint8_t *dst, int64_t n_rows,
                                         int64_t n_in, const gfl_delta *delta, float gain, uint64_t key,
                                         int64_t first_row, double *sums) {
    job j;
    if (!begin(&j, isa, type_id, n_in)) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS);
    float *room = malloc((size_t)(group * n_in) * sizeof *room);
    if (!room) return no_memory;
    gfl_result result = done;
    for (int64_t first = 0; first < n_rows && !result.status; first += group) {
        const int64_t last = n_rows - first < group ? n_rows : first + group;
        const float *change = gfl_delta_rows(j.table, delta, room, first, last - first, n_in);
        for (int64_t row = first; row < last && !result.status; row++) {
            memset(sums + GFL_N_SUMS * row, 0, GFL_N_SUMS * sizeof *sums);
            for (int64_t b = 0; b < n_in / SUPER && !result.status; b++) {
                const int64_t at = row * j.row_bytes + b * j.bytes;
                result = dither_block(&j, src + at, dst + at, change + (row - first) * n_in + b * SUPER, gain,
                                      gfl_row_key(key, first_row + row), row, b * SUPER, sums + GFL_N_SUMS * row);
            }
        }
    }
    free(room);
    return result;
}
