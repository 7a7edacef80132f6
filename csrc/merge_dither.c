/* Stochastic rounding over rows: which scales each block gets, and its codes. The arithmetic is in kernels/dither.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"
#include "merge_dither_codebook.h"
#include "rows.h"

enum { GROUP_FLOATS = 64 * 1024 };

/* A block keeps its scales without a search if in all of its groups delta is below 0.35 steps, and no more than this
 * share of the cost of rounding comes from beyond their range. On heavy-tailed weights with deltas of 0.5 to 20 % of
 * them, searching every block would lower the expected cost of those skipped here by 0.1 to 1 % (K-quants; by up to 4 %
 * for blocks of 32). */
static const double CLIPPED_SHARE = 0.1;

/* What a call works on. */
typedef struct {
    const gfl_table *table;
    const gfl_block_codec *codec;
    const gfl_pair *type;
    int64_t n_in, row_bytes;
    int weights, bytes, groups; /* of a block */
    const float *imatrix;       /* (n_in) or NULL */
} stochastic_call;

/* Returns whether this machine has the instruction set, and it the type. */
static int begin(stochastic_call *call, int isa, int type_id, int64_t n_in, const float *imatrix) {
    const int type = gfl_index_of(type_id);
    const gfl_table *table = gfl_table_of(isa);
    if (!table || type < 0 || !table->block_codecs[type].pack) return 0;
    const gfl_type t = gfl_type_at(type);
    *call = (stochastic_call){
        .table = table,
        .codec = &table->block_codecs[type],
        .type = &table->types[type],
        .n_in = n_in,
        .row_bytes = n_in / t.block_weights * t.block_bytes,
        .weights = t.block_weights,
        .bytes = t.block_bytes,
        .groups = t.block_weights / table->block_codecs[type].group,
        .imatrix = imatrix,
    };
    return 1;
}

static int weights_in_chunk(const stochastic_call *call, int64_t column) {
    return (int)(call->n_in - column < CHUNK ? call->n_in - column : CHUNK);
}

static int64_t bytes_before(const stochastic_call *call, int64_t column) {
    return column / call->weights * call->bytes;
}

/* The targets dq + delta of a chunk. */
static void find_target(float *target, const stochastic_call *call, const uint8_t *src, const float *delta, int n) {
    call->type->dequantize(src, target, n);
    call->table->add(target, target, delta, n);
}

/* The place of the first target of a chunk that is NaN or infinite, if there is one. */
static gfl_result check_targets(const stochastic_call *call, const uint8_t *src, const float *delta, int n, int64_t row,
                                int64_t column) {
    float target[CHUNK];
    find_target(target, call, src, delta, n);
    gfl_result result = gfl_first_not_finite(target, &(gfl_row_group){row, 1, n}, GFL_NOT_FINITE);
    if (result.status) result.column += column;
    return result;
}

static int same_scales(const gfl_block_codec *codec, const uint8_t *x, const uint8_t *y) {
    for (int i = 0; i < 2; i++)
        if (memcmp(x + codec->header[i].at, y + codec->header[i].at, codec->header[i].bytes)) return 0;
    return 1;
}

/* keeps[g] = whether the block of group g has the scales that it has in src */
static void compare_scales(uint8_t *keeps, const stochastic_call *call, const uint8_t *src, const uint8_t *dst, int n) {
    const int blocks = n / call->weights;
    memset(keeps, 1, (size_t)(blocks * call->groups));
    if (!memcmp(src, dst, (size_t)(blocks * call->bytes))) return;
    for (int b = 0; b < blocks; b++) {
        const int same = same_scales(call->codec, src + b * call->bytes, dst + b * call->bytes);
        memset(keeps + b * call->groups, same, (size_t)call->groups);
    }
}

/* Blocks that may get new scales, collected so that the search for them fills its vectors. */
enum { BATCH_FLOATS = 4096, BATCH_BLOCKS = BATCH_FLOATS / 32, MOST_BYTES = 64 };

typedef struct {
    uint8_t *dst[BATCH_BLOCKS], *dirty[BATCH_BLOCKS]; /* of each block: where it goes, and the mark of its chunk */
    double cost[BATCH_BLOCKS];                        /* under the base's scales */
    float target[BATCH_FLOATS], delta[BATCH_FLOATS], imatrix[BATCH_FLOATS], squares[BATCH_FLOATS / 16];
    uint8_t found[BATCH_BLOCKS * MOST_BYTES]; /* no type stores 32 weights in more than MOST_BYTES */
    int n, n_blocks;
    int64_t n_new; /* blocks that got new scales */
} block_batch;

static double sum_groups(const float *x, int n) {
    double sum = 0.0;
    for (int g = 0; g < n; g++) sum += (double)x[g];
    return sum;
}

/* Gives the blocks of a batch the scales of their quantized targets where those cost less, and empties the batch. */
static void flush_batch(block_batch *batch, const stochastic_call *call) {
    if (!batch->n) return;
    call->type->quantize(batch->target, batch->found, 1, batch->n, call->imatrix ? batch->imatrix : NULL);
    for (int i = 0; i < batch->n; i += CHUNK) {
        const int n = batch->n - i < CHUNK ? batch->n - i : CHUNK, n_groups = n / call->codec->group;
        const uint8_t *found = batch->found + bytes_before(call, i);
        gfl_measure m;
        memcpy(m.squares, batch->squares + i / call->codec->group, (size_t)n_groups * sizeof *m.squares);
        call->table->measure_target(&m, call->codec, found, batch->target + i, batch->delta + i, n);
        for (int b = 0; b < n / call->weights; b++) {
            const int block = i / call->weights + b;
            const uint8_t *new = found + b * call->bytes;
            if (!(sum_groups(m.cost + b * call->groups, call->groups) < batch->cost[block])) continue;
            if (same_scales(call->codec, new, batch->dst[block])) continue;
            memcpy(batch->dst[block], new, (size_t)call->bytes);
            *batch->dirty[block] = 1;
            batch->n_new++;
        }
    }
    batch->n = batch->n_blocks = 0;
}

/* A chunk of the base and what stochastic rounding would do to it. */
typedef struct {
    const uint8_t *src;
    uint8_t *dst, *dirty; /* where it goes; the mark of new scales in it */
    const float *delta, *imatrix;
    int n;
    const gfl_measure *m;
} measured_chunk;

/* Whether block b of a chunk may gain by new scales. */
static int may_gain(const stochastic_call *call, const gfl_measure *m, int b, double cost) {
    int small = 1;
    for (int g = b * call->groups; g < (b + 1) * call->groups; g++) small &= m->small[g];
    return cost > 0.0 && (!small || sum_groups(m->clip + b * call->groups, call->groups) > CLIPPED_SHARE * cost);
}

/* Puts block b of a chunk into the batch. */
static void add_block(block_batch *batch, const stochastic_call *call, const measured_chunk *chunk, const float *target,
                      int b, double cost) {
    const int at = b * call->weights;
    const size_t bytes = (size_t)call->weights * sizeof(float);
    memcpy(batch->target + batch->n, target + at, bytes);
    memcpy(batch->delta + batch->n, chunk->delta + at, bytes);
    if (chunk->imatrix) memcpy(batch->imatrix + batch->n, chunk->imatrix + at, bytes);
    memcpy(batch->squares + batch->n / call->codec->group, chunk->m->squares + b * call->groups,
           (size_t)call->groups * sizeof *batch->squares);
    batch->cost[batch->n_blocks] = cost;
    batch->dst[batch->n_blocks] = chunk->dst + b * call->bytes;
    batch->dirty[batch->n_blocks++] = chunk->dirty;
    batch->n += call->weights;
}

/* Puts the blocks of a chunk that may gain into the batch, which is flushed when it is full. */
static void add_chunk(block_batch *batch, const stochastic_call *call, const measured_chunk *chunk) {
    float target[CHUNK];
    int known = 0;
    for (int b = 0; b < chunk->n / call->weights; b++) {
        const double cost = sum_groups(chunk->m->cost + b * call->groups, call->groups);
        if (!may_gain(call, chunk->m, b, cost)) continue;
        if (!known) find_target(target, call, chunk->src, chunk->delta, chunk->n);
        known = 1;
        if (batch->n + call->weights > BATCH_FLOATS) flush_batch(batch, call);
        add_block(batch, call, chunk, target, b, cost);
    }
}

/* The columns of enum gfl_reach. */
static void sum_measure(double *sums, const gfl_measure *m, int n_groups) {
    sums[GFL_REACHED] = sums[GFL_WANTED] = 0.0;
    for (int g = 0; g < n_groups; g++) {
        sums[GFL_REACHED] += (double)m->squares[g] - (double)m->lost[g];
        sums[GFL_WANTED] += (double)m->squares[g];
    }
}

/* The sums of a chunk some of whose blocks have new scales. */
static void sum_changed(double *sums, const stochastic_call *call, const uint8_t *src, const uint8_t *dst,
                        const float *delta, int n) {
    uint8_t keeps_base_scales[CHUNK_GROUPS];
    float target[CHUNK];
    gfl_measure old, new;
    compare_scales(keeps_base_scales, call, src, dst, n);
    find_target(target, call, src, delta, n);
    call->table->measure(&old, call->codec, src, delta, n);
    memcpy(new.squares, old.squares, sizeof new.squares);
    call->table->measure_target(&new, call->codec, dst, target, delta, n);
    for (int g = 0; g < n / call->codec->group; g++)
        if (!keeps_base_scales[g]) old.lost[g] = new.lost[g];
    sum_measure(sums, &old, n / call->codec->group);
}

typedef struct {
    float *delta;
    double *sums;   /* (chunks of a group of rows, GFL_N_REACH) */
    uint8_t *dirty; /* of each chunk: a block of it has new scales */
    block_batch batch;
} choose_scratch;

/* Measures all chunks of a row and collects the blocks that may gain. */
static gfl_result measure_row(const stochastic_call *call, choose_scratch *scratch, const gfl_row_group *group,
                              int64_t r, const uint8_t *src, uint8_t *dst, const float *delta) {
    const int64_t chunks = (call->n_in + CHUNK - 1) / CHUNK;
    for (int64_t c = 0, k = r * chunks; c < chunks; c++, k++) {
        const int64_t column = c * CHUNK, at = r * call->row_bytes + bytes_before(call, column);
        gfl_measure m;
        const measured_chunk chunk = {
            .src = src + at,
            .dst = dst + at,
            .dirty = scratch->dirty + k,
            .delta = delta + r * call->n_in + column,
            .imatrix = call->imatrix ? call->imatrix + column : NULL,
            .n = weights_in_chunk(call, column),
            .m = &m,
        };
        call->table->measure(&m, call->codec, chunk.src, chunk.delta, chunk.n);
        if (!m.safe) {
            const gfl_result result = check_targets(call, chunk.src, chunk.delta, chunk.n, group->start + r, column);
            if (result.status) return result;
        }
        sum_measure(scratch->sums + GFL_N_REACH * k, &m, chunk.n / call->codec->group);
        add_chunk(&scratch->batch, call, &chunk);
    }
    return done;
}

static gfl_result choose_group(const stochastic_call *call, choose_scratch *scratch, const gfl_row_group *group,
                               const uint8_t *src, uint8_t *dst, const float *delta, double *sums) {
    const int64_t chunks = (call->n_in + CHUNK - 1) / CHUNK;
    memcpy(dst, src, (size_t)(group->n_rows * call->row_bytes));
    memset(scratch->dirty, 0, (size_t)(group->n_rows * chunks));
    for (int64_t r = 0; r < group->n_rows; r++) {
        const gfl_result result = measure_row(call, scratch, group, r, src, dst, delta);
        if (result.status) return result;
        if (call->imatrix) flush_batch(&scratch->batch, call); /* some searches weigh by means over the row they get */
    }
    flush_batch(&scratch->batch, call);
    for (int64_t r = 0; r < group->n_rows; r++) {
        double *row_sums = sums + GFL_N_REACH * r;
        row_sums[GFL_REACHED] = row_sums[GFL_WANTED] = 0.0;
        for (int64_t c = 0, k = r * chunks; c < chunks; c++, k++) {
            const int64_t column = c * CHUNK, at = r * call->row_bytes + bytes_before(call, column);
            double *chunk_sums = scratch->sums + GFL_N_REACH * k;
            if (scratch->dirty[k])
                sum_changed(chunk_sums, call, src + at, dst + at, delta + r * call->n_in + column,
                            weights_in_chunk(call, column));
            row_sums[GFL_REACHED] += chunk_sums[GFL_REACHED];
            row_sums[GFL_WANTED] += chunk_sums[GFL_WANTED];
        }
    }
    return done;
}

gfl_result gfl_choose_scales(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                             const float *imatrix, double *sums, int64_t *n_new) {
    const int64_t n_rows = delta->n_rows, n_in = delta->n_in;
    stochastic_call call;
    *n_new = 0;
    if (gfl_uses_codebook(type_id))
        return gfl_choose_codebook_scales(isa, type_id, src, dst, delta, imatrix, sums, n_new);
    if (!begin(&call, isa, type_id, n_in, imatrix)) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t rows_per_group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS);
    const int64_t chunks = rows_per_group * ((n_in + CHUNK - 1) / CHUNK);
    choose_scratch *scratch = malloc(sizeof *scratch);
    float *floats = malloc((size_t)(rows_per_group * n_in) * sizeof *floats);
    double *doubles = malloc((size_t)(GFL_N_REACH * chunks) * sizeof *doubles);
    uint8_t *dirty = malloc((size_t)chunks);
    gfl_result result = scratch && floats && doubles && dirty ? done : no_memory;
    if (!result.status) {
        scratch->delta = floats;
        scratch->sums = doubles;
        scratch->dirty = dirty;
        scratch->batch.n = scratch->batch.n_blocks = 0;
        scratch->batch.n_new = 0;
    }
    for (int64_t row = 0; row < n_rows && !result.status; row += rows_per_group) {
        const gfl_row_group group = gfl_group_at(row, rows_per_group, n_rows, n_in);
        const float *rows = gfl_delta_rows(call.table, delta, scratch->delta, &group);
        result = choose_group(&call, scratch, &group, src + row * call.row_bytes, dst + row * call.row_bytes, rows,
                              sums + GFL_N_REACH * row);
    }
    if (scratch) *n_new = scratch->batch.n_new;
    free(dirty);
    free(doubles);
    free(floats);
    free(scratch);
    return result;
}

static int is_zero(const float *x, int n) {
    for (int i = 0; i < n; i++)
        if (x[i] != 0.0f) return 0;
    return 1;
}

/* Copies blocks without a delta from the base; returns whether there are any. */
static int restore_unchanged(const stochastic_call *call, const uint8_t *src, uint8_t *dst, const float *delta, int n) {
    int any = 0;
    for (int b = 0; b < n / call->weights; b++) {
        if (!is_zero(delta + b * call->weights, call->weights)) continue;
        memcpy(dst + b * call->bytes, src + b * call->bytes, (size_t)call->bytes);
        any = 1;
    }
    return any;
}

static gfl_result round_row(const stochastic_call *call, const uint8_t *src, uint8_t *dst, const float *delta,
                            const gfl_dither_key *key, int64_t row, double *sums) {
    memset(sums, 0, GFL_N_SUMS * sizeof *sums);
    for (int64_t column = 0; column < call->n_in; column += CHUNK) {
        uint8_t keeps_base_scales[CHUNK_GROUPS];
        const int64_t at = bytes_before(call, column);
        const gfl_chunk chunk = {
            .src = src + at,
            .dst = dst + at,
            .delta = delta + column,
            .keeps_base_scales = keeps_base_scales,
            .column = column,
            .n = weights_in_chunk(call, column),
        };
        const int unchanged = restore_unchanged(call, chunk.src, chunk.dst, chunk.delta, chunk.n);
        compare_scales(keeps_base_scales, call, chunk.src, chunk.dst, chunk.n);
        if (!call->table->dither(sums, call->codec, &chunk, key)) {
            const gfl_result result = check_targets(call, chunk.src, chunk.delta, chunk.n, row, column);
            if (result.status) return result;
        }
        if (unchanged) restore_unchanged(call, chunk.src, chunk.dst, chunk.delta, chunk.n);
    }
    return done;
}

gfl_result gfl_round_stochastic(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                                const gfl_draw *draw, double *sums) {
    const int64_t n_rows = delta->n_rows, n_in = delta->n_in;
    stochastic_call call;
    if (gfl_uses_codebook(type_id)) return gfl_round_codebook_stochastic(isa, type_id, src, dst, delta, draw, sums);
    if (!begin(&call, isa, type_id, n_in, NULL)) return unknown;
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
            result = round_row(&call, src + row * call.row_bytes, dst + row * call.row_bytes, rows + r * n_in, &key,
                               row, sums + GFL_N_SUMS * row);
        }
    }
    free(scratch);
    return result;
}

gfl_result gfl_mean_step(int isa, int type_id, const uint8_t *src, int64_t n_rows, int64_t n_in, double *mean) {
    stochastic_call call;
    double sum = 0.0;
    *mean = 0.0;
    if (!begin(&call, isa, type_id, n_in, NULL)) return unknown;
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t column = 0; column < n_in; column += CHUNK) {
            float s[CHUNK_GROUPS], o[CHUNK_GROUPS];
            const int n = weights_in_chunk(&call, column);
            call.codec->scales(src + r * call.row_bytes + bytes_before(&call, column), n, s, o);
            for (int g = 0; g < n / call.codec->group; g++) sum += (double)fabsf(s[g]) * (double)call.codec->step;
        }
    if (n_rows > 0 && n_in > 0) *mean = sum * call.codec->group / (double)(n_rows * n_in);
    return done;
}
