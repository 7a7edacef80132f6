/* Rows of weights changed and rounded to nearest, as ggml does. */
#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"
#include "rows.h"

/* Floats of a group of rows; some buffers of this size stay in the second-level cache together. */
enum { GROUP_FLOATS = 32 * 1024 };

static double clipped_weights(const gfl_table *table, int type, const uint8_t *dst, const float *target, int64_t n_in) {
    const gfl_block_codec *codec = &table->block_codecs[type];
    const gfl_type t = gfl_type_at(type);
    int64_t count = 0;
    for (int64_t i = 0; codec->pack && i < n_in; i += CHUNK)
        count += table->clipped(codec, dst + i / t.block_weights * t.block_bytes, target + i,
                                (int)(n_in - i < CHUNK ? n_in - i : CHUNK));
    return (double)count;
}

/* Buffers for one group of rows each. */
typedef struct {
    float *delta, *before, *target, *after;
} merge_room;

static gfl_result merge_group(const gfl_table *table, int from, const uint8_t *src, int to, uint8_t *dst,
                              int64_t n_rows, int64_t n_in, const float *delta, const float *imatrix,
                              const merge_room *room, int64_t row, uint32_t suspicious, double *sums) {
    const gfl_type d = gfl_type_at(to);
    const int64_t dst_bytes = n_in / d.block_weights * d.block_bytes;
    table->types[from].dequantize(src, room->before, n_rows * n_in);
    table->add(room->target, room->before, delta, n_rows * n_in);
    const gfl_result result = gfl_quantize_group(table, to, room->target, n_rows, n_in, imatrix, dst, row, suspicious);
    if (result.status) return result;
    table->types[to].dequantize(dst, room->after, n_rows * n_in);
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t at = r * n_in;
        double *row_sums = sums + GFL_N_SUMS * r;
        memset(row_sums, 0, GFL_N_SUMS * sizeof *row_sums);
        table->four_dots(row_sums, room->before + at, delta + at, room->target + at, room->after + at, n_in);
        row_sums[GFL_CLIPPED] = clipped_weights(table, to, dst + r * dst_bytes, room->target + at, n_in);
    }
    return result;
}

gfl_result gfl_merge_rows(int isa, int src_type_id, const uint8_t *src, int dst_type_id, uint8_t *dst, int64_t n_rows,
                          int64_t n_in, const gfl_delta *delta, const float *imatrix, double *sums) {
    const gfl_table *table = gfl_table_of(isa);
    const int from = gfl_index_of(src_type_id), to = gfl_index_of(dst_type_id);
    if (!table || from < 0 || to < 0) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const gfl_type s = gfl_type_at(from), d = gfl_type_at(to);
    const int64_t src_bytes = n_in / s.block_weights * s.block_bytes,
                  dst_bytes = n_in / d.block_weights * d.block_bytes;
    const int64_t group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS), n = group * n_in;
    float *room = malloc((size_t)(4 * n) * sizeof *room);
    if (!room) return no_memory;
    const merge_room rooms = {room, room + n, room + 2 * n, room + 3 * n};
    const uint32_t suspicious = gfl_suspicious(imatrix, n_in);
    gfl_result result = done;
    for (int64_t row = 0; row < n_rows && !result.status; row += group) {
        const int64_t rows = n_rows - row < group ? n_rows - row : group;
        const float *change = gfl_delta_rows(table, delta, rooms.delta, row, rows, n_in);
        result = merge_group(table, from, src + row * src_bytes, to, dst + row * dst_bytes, rows, n_in, change, imatrix,
                             &rooms, row, suspicious, sums + GFL_N_SUMS * row);
    }
    free(room);
    return result;
}
