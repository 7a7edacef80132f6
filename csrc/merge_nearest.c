/* Rows of weights changed and rounded to nearest, as ggml does. */
#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"
#include "rows.h"

/* Floats of a group of rows; the buffers of a merge stay in the second-level cache together. */
enum { GROUP_FLOATS = 32 * 1024 };

/* What a call works on. */
typedef struct {
    const gfl_table *table;
    int from, to;                       /* quant types by their places in types.def */
    int64_t n_in, src_bytes, dst_bytes; /* of a row */
    gfl_importance importance;
    float *delta, *before, *target, *after; /* buffers for a group of rows each */
} merge_call;

static int64_t row_bytes(int type, int64_t n_in) {
    const gfl_type t = gfl_type_at(type);
    return n_in / t.block_weights * t.block_bytes;
}

/* How many weights of a row lie outside of the range of the written scales. */
static double count_clipped(const merge_call *call, const uint8_t *dst, const float *target) {
    const gfl_block_codec *codec = &call->table->block_codecs[call->to];
    const gfl_type t = gfl_type_at(call->to);
    int64_t count = 0;
    for (int64_t i = 0; codec->pack && i < call->n_in; i += CHUNK)
        count += call->table->clipped(codec, dst + i / t.block_weights * t.block_bytes, target + i,
                                      (int)(call->n_in - i < CHUNK ? call->n_in - i : CHUNK));
    return (double)count;
}

static gfl_result merge_group(const merge_call *call, const gfl_row_group *group, const uint8_t *src, uint8_t *dst,
                              const float *delta, double *sums) {
    const gfl_table *table = call->table;
    const int64_t n = group->n_rows * call->n_in;
    table->types[call->from].dequantize(src, call->before, n);
    table->add(call->target, call->before, delta, n);
    const gfl_result result = gfl_quantize_group(table, call->to, call->target, dst, group, &call->importance);
    if (result.status) return result;
    table->types[call->to].dequantize(dst, call->after, n);
    for (int64_t r = 0; r < group->n_rows; r++) {
        const int64_t at = r * call->n_in;
        double *row_sums = sums + GFL_N_SUMS * r;
        memset(row_sums, 0, GFL_N_SUMS * sizeof *row_sums);
        table->four_dots(row_sums, call->before + at, delta + at, call->target + at, call->after + at, call->n_in);
        row_sums[GFL_CLIPPED] = count_clipped(call, dst + r * call->dst_bytes, call->target + at);
    }
    return result;
}

gfl_result gfl_merge_rows(int isa, int src_type_id, const uint8_t *src, int dst_type_id, uint8_t *dst,
                          const gfl_delta *delta, const float *imatrix, double *sums) {
    const gfl_table *table = gfl_table_of(isa);
    const int from = gfl_index_of(src_type_id), to = gfl_index_of(dst_type_id);
    const int64_t n_rows = delta->n_rows, n_in = delta->n_in;
    if (!table || from < 0 || to < 0) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t rows_per_group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS), n = rows_per_group * n_in;
    float *scratch = malloc((size_t)(4 * n) * sizeof *scratch);
    if (!scratch) return no_memory;
    const merge_call call = {
        .table = table,
        .from = from,
        .to = to,
        .n_in = n_in,
        .src_bytes = row_bytes(from, n_in),
        .dst_bytes = row_bytes(to, n_in),
        .importance = gfl_importance_of(imatrix, n_in),
        .delta = scratch,
        .before = scratch + n,
        .target = scratch + 2 * n,
        .after = scratch + 3 * n,
    };
    gfl_result result = done;
    for (int64_t row = 0; row < n_rows && !result.status; row += rows_per_group) {
        const gfl_row_group group = gfl_group_at(row, rows_per_group, n_rows, n_in);
        const float *rows = gfl_delta_rows(table, delta, call.delta, &group);
        result = merge_group(&call, &group, src + row * call.src_bytes, dst + row * call.dst_bytes, rows,
                             sums + GFL_N_SUMS * row);
    }
    free(scratch);
    return result;
}
