/* Stochastic rounding of codebook types over rows, whose weights move in vectors of eight or four: which scales each
 * block gets, and its points and signs. The arithmetic is in kernels/dither_codebook.h.
 *
 * A block keeps the base's scales where its delta is small; elsewhere it gets those of its requantization if they can
 * be expected to cost less. Where the delta is so large that rounding to nearest keeps it, the requantization is taken
 * as it is. */
#include "merge_dither_codebook.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"

/* SAMPLED: one of this many vectors tells what a small delta loses. */
enum { GROUP_FLOATS = 64 * 1024, SAMPLED = 4 };

/* The root mean square of a block's delta, in steps under the base's scales, from which on other scales are tried, and
 * from which on it is rounded to nearest. */
static const double TRY_SCALES = 0.25, TO_NEAREST = 0.5;

/* What a call works on. */
typedef struct {
    const gfl_table *table;
    const gfl_codebook_codec *codec;
    const gfl_pair *type;
    int64_t n_in, row_bytes;
    int bytes;            /* of a block */
    const float *imatrix; /* (n_in) or NULL */
    int64_t n_new;        /* blocks that got new scales */
} codebook_call;

int gfl_uses_codebook(int type_id) {
    const int type = gfl_index_of(type_id);
    return type >= 0 && gfl_scalar.codebook_codecs[type].pack;
}

/* Returns whether this machine has the instruction set, and it the type. */
static int begin(codebook_call *call, int isa, int type_id, int64_t n_in) {
    const int type = gfl_index_of(type_id);
    const gfl_table *table = gfl_table_of(isa);
    if (!table || type < 0 || !table->codebook_codecs[type].pack) return 0;
    const int bytes = gfl_type_at(type).block_bytes;
    *call = (codebook_call){
        .table = table,
        .codec = &table->codebook_codecs[type],
        .type = &table->types[type],
        .n_in = n_in,
        .row_bytes = n_in / SUPER * bytes,
        .bytes = bytes,
    };
    return 1;
}

/* The mean square of a block's delta, in steps; infinite where there are none. */
static double strength_of(const codebook_call *call, const uint8_t *block, const float *delta) {
    float s[16];
    double steps = 0.0, squares = 0.0;
    call->codec->scales(block, s);
    for (int g = 0; g < SUPER / call->codec->group; g++) steps += (double)s[g] * (double)s[g];
    steps *= (double)call->codec->step * (double)call->codec->step * (double)call->codec->group;
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

/* Whether to take the requantized block; what the chosen one loses is added to the row's sums. */
static int prefers_requantized(const codebook_call *call, const uint8_t *base, const uint8_t *requantized,
                               const float *delta, const float *target, double strength, double *sums) {
    float rest[SUPER], back[SUPER];
    gfl_codebook_sums kept, new;
    call->table->measure_codebook(&kept, call->codec, base, delta, delta, 0, 1);
    call->type->dequantize(requantized, back, SUPER);
    const double error = squared_error(back, target); /* not less than anything if a scale has overflown */
    sums[GFL_WANTED] += kept.squares;
    if (strength >= TO_NEAREST * TO_NEAREST && error < 0.5 * kept.squares) {
        sums[GFL_REACHED] += kept.squares;
        return 1;
    }
    subtract(rest, target, back);
    call->table->measure_codebook(&new, call->codec, requantized, rest, delta, 0, 1);
    const int take = error < 1e30 && new.cost < kept.cost;
    sums[GFL_REACHED] += kept.squares - (take ? new.lost : kept.lost);
    return take;
}

/* Room for a row. */
typedef struct {
    float *target;
    uint8_t *requantized;
} row_scratch;

static gfl_result choose_row(codebook_call *call, const row_scratch *scratch, const uint8_t *src, uint8_t *dst,
                             const float *delta, int64_t row, double *sums) {
    int searched = 0;
    memcpy(dst, src, (size_t)call->row_bytes);
    call->type->dequantize(src, scratch->target, call->n_in);
    call->table->add(scratch->target, scratch->target, delta, call->n_in);
    if (call->table->largest(scratch->target, call->n_in) >= GFL_INFINITE)
        return gfl_first_not_finite(scratch->target, &(gfl_row_group){row, 1, call->n_in}, GFL_NOT_FINITE);
    sums[GFL_REACHED] = sums[GFL_WANTED] = 0.0;
    for (int64_t b = 0; b < call->n_in / SUPER; b++) {
        const uint8_t *base = src + b * call->bytes, *requantized = scratch->requantized + b * call->bytes;
        const float *x = delta + b * SUPER;
        const double strength = strength_of(call, base, x);
        if (!(strength >= TRY_SCALES * TRY_SCALES)) { /* a sample tells enough of what a tensor loses */
            gfl_codebook_sums sample;
            call->table->measure_codebook(&sample, call->codec, base, x, x, (int)(b % SAMPLED), SAMPLED);
            sums[GFL_REACHED] += (double)SAMPLED * (sample.squares - sample.lost);
            sums[GFL_WANTED] += (double)SAMPLED * sample.squares;
            continue;
        }
        if (!searched) call->type->quantize(scratch->target, scratch->requantized, 1, call->n_in, call->imatrix);
        searched = 1;
        if (!prefers_requantized(call, base, requantized, x, scratch->target + b * SUPER, strength, sums)) continue;
        memcpy(dst + b * call->bytes, requantized, (size_t)call->bytes);
        call->n_new++;
    }
    return done;
}

gfl_result gfl_choose_codebook_scales(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                                      const float *imatrix, double *sums, int64_t *n_new) {
    const int64_t n_rows = delta->n_rows, n_in = delta->n_in;
    codebook_call call;
    if (!begin(&call, isa, type_id, n_in)) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t rows_per_group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS);
    float *floats = malloc((size_t)((rows_per_group + 2) * n_in) * sizeof *floats);
    uint8_t *requantized = malloc((size_t)call.row_bytes);
    gfl_result result = floats && requantized ? done : no_memory;
    const row_scratch scratch = {floats + n_in, requantized};
    for (int64_t i = 0; i < n_in && !result.status; i++) floats[i] = 1.0f;
    call.imatrix = !imatrix && gfl_type_at(gfl_index_of(type_id)).needs_imatrix ? floats : imatrix;
    for (int64_t start = 0; start < n_rows && !result.status; start += rows_per_group) {
        const gfl_row_group group = gfl_group_at(start, rows_per_group, n_rows, n_in);
        const float *rows = gfl_delta_rows(call.table, delta, floats + 2 * n_in, &group);
        for (int64_t r = 0; r < group.n_rows && !result.status; r++) {
            const int64_t row = start + r;
            result = choose_row(&call, &scratch, src + row * call.row_bytes, dst + row * call.row_bytes,
                                rows + r * n_in, row, sums + GFL_N_REACH * row);
        }
    }
    *n_new = call.n_new;
    free(requantized);
    free(floats);
    return result;
}

static gfl_result round_block(const codebook_call *call, const uint8_t *src, uint8_t *dst, const float *delta,
                              const gfl_dither_key *key, int64_t row, int64_t column, double *sums) {
    float before[SUPER], target[SUPER], rest[SUPER], after[SUPER];
    call->type->dequantize(src, before, SUPER);
    call->table->add(target, before, delta, SUPER);
    if (call->table->largest(target, SUPER) >= GFL_INFINITE) {
        gfl_result result = gfl_first_not_finite(target, &(gfl_row_group){row, 1, SUPER}, GFL_NOT_FINITE);
        result.column += column;
        return result;
    }
    const double strength = strength_of(call, src, delta);
    if (strength == 0.0) {
        memcpy(dst, src, (size_t)call->bytes);
    } else if (strength < TO_NEAREST * TO_NEAREST || !memcmp(dst, src, (size_t)call->bytes)) {
        call->type->dequantize(dst, after, SUPER);
        for (int i = 0; i < SUPER; i++) rest[i] = (before[i] - after[i]) + key->gain * delta[i];
        call->table->dither_codebook(call->codec, dst, rest, key->key, column);
    }
    call->type->dequantize(dst, after, SUPER);
    call->table->four_dots(sums, before, delta, target, after, SUPER);
    return done;
}

gfl_result gfl_round_codebook_stochastic(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                                         const gfl_draw *draw, double *sums) {
    const int64_t n_rows = delta->n_rows, n_in = delta->n_in;
    codebook_call call;
    if (!begin(&call, isa, type_id, n_in)) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t rows_per_group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS);
    float *scratch = malloc((size_t)(rows_per_group * n_in) * sizeof *scratch);
    if (!scratch) return no_memory;
    gfl_result result = done;
    for (int64_t start = 0; start < n_rows && !result.status; start += rows_per_group) {
        const gfl_row_group group = gfl_group_at(start, rows_per_group, n_rows, n_in);
        const float *rows = gfl_delta_rows(call.table, delta, scratch, &group);
        for (int64_t r = 0; r < group.n_rows && !result.status; r++) {
            const int64_t row = start + r;
            const gfl_dither_key key = {draw->gain, gfl_row_key(draw->key, draw->first_row + row)};
            memset(sums + GFL_N_SUMS * row, 0, GFL_N_SUMS * sizeof *sums);
            for (int64_t b = 0; b < n_in / SUPER && !result.status; b++) {
                const int64_t at = row * call.row_bytes + b * call.bytes;
                result = round_block(&call, src + at, dst + at, rows + r * n_in + b * SUPER, &key, row, b * SUPER,
                                     sums + GFL_N_SUMS * row);
            }
        }
    }
    free(scratch);
    return result;
}
