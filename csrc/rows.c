#include <stdlib.h>

#include "dispatch.h"

enum { DONE, NOT_FINITE, OVERFLOWS, UNKNOWN, NO_MEMORY };

static const gfl_result done = {0, 0, DONE};

/* Blocks of rows that stay in the second-level cache while they are checked and worked on. */
enum { CACHE_FLOATS = 64 * 1024 };

/* Above this a scale may leave half precision's range (65504), so what was written is read back and checked. */
static const uint32_t SUSPICIOUS = 0x44800000; /* 1024.0f */
static const uint32_t INFINITE = 0x7f800000;

/* From here on, and below zero, importances may lead a search to no result or an infinite one (kernels then write a NaN). */
static const float LARGE_IMPORTANCE = 1e9f;

static int is_unusual(const float *imatrix, int64_t n_in) {
    int unusual = 0;
    for (int64_t i = 0; i < n_in; i++) unusual |= !(imatrix[i] >= 0.0f && imatrix[i] < LARGE_IMPORTANCE);
    return unusual;
}

static gfl_result first_not_finite(const float *x, int64_t n_rows, int64_t n_in, int64_t row, int status) {
    for (int64_t i = 0; i < n_rows * n_in; i++)
        if (!(x[i] - x[i] == 0.0f)) return (gfl_result){row + i / n_in, i % n_in, status};
    return done;
}

static int64_t rows_per_group(int64_t n_in, int64_t n_rows) {
    int64_t rows = CACHE_FLOATS / n_in / 4 * 4;
    if (rows < 4) rows = 4;
    return rows < n_rows ? rows : n_rows;
}

/* Quantizes one group of rows; `row` is its first row's number in the call. If any magnitude is `suspicious` (the bits of a
 * float) the result is checked. */
static gfl_result quantize_group(const gfl_table *table, int type, const float *x, int64_t n_rows, int64_t n_in,
                                 const float *imatrix, uint8_t *out, int64_t row, uint32_t suspicious) {
    const uint32_t largest = table->largest(x, n_rows * n_in);
    if (largest >= INFINITE) return first_not_finite(x, n_rows, n_in, row, NOT_FINITE);
    table->types[type].quantize(x, out, n_rows, n_in, imatrix);
    if (largest < suspicious) return done;
    float *back = malloc((size_t)(n_rows * n_in) * sizeof *back);
    if (!back) return (gfl_result){0, 0, NO_MEMORY};
    table->types[type].dequantize(out, back, n_rows * n_in);
    gfl_result result = done;
    if (table->largest(back, n_rows * n_in) >= INFINITE) result = first_not_finite(back, n_rows, n_in, row, OVERFLOWS);
    free(back);
    return result;
}

gfl_result gfl_quantize_rows(int isa, int type_id, const float *x, int64_t n_rows, int64_t n_in, const float *imatrix,
                             uint8_t *out) {
    const gfl_table *table = gfl_table_of(isa);
    const int type = gfl_index_of(type_id);
    if (!table || type < 0) return (gfl_result){0, 0, UNKNOWN};
    if (n_rows <= 0 || n_in <= 0) return done;
    const gfl_type t = gfl_type_at(type);
    const int64_t row_bytes = n_in / t.block_weights * t.block_bytes, group = rows_per_group(n_in, n_rows);
    const uint32_t suspicious = imatrix && is_unusual(imatrix, n_in) ? 0 : SUSPICIOUS;
    for (int64_t row = 0; row < n_rows; row += group) {
        const int64_t rows = n_rows - row < group ? n_rows - row : group;
        const gfl_result result =
            quantize_group(table, type, x + row * n_in, rows, n_in, imatrix, out + row * row_bytes, row, suspicious);
        if (result.status) return result;
    }
    return done;
}

gfl_result gfl_dequantize_rows(int isa, int type_id, const uint8_t *src, int64_t n_rows, int64_t n_in, float *out) {
    const gfl_table *table = gfl_table_of(isa);
    const int type = gfl_index_of(type_id);
    if (!table || type < 0) return (gfl_result){0, 0, UNKNOWN};
    if (n_rows > 0 && n_in > 0) table->types[type].dequantize(src, out, n_rows * n_in);
    return done;
}

gfl_result gfl_merge_rows(int isa, int src_type_id, const uint8_t *src, int dst_type_id, uint8_t *dst, int64_t n_rows,
                          int64_t n_in, const float *a, const float *b, int64_t rank) {
    const gfl_table *table = gfl_table_of(isa);
    const int from = gfl_index_of(src_type_id), to = gfl_index_of(dst_type_id);
    if (!table || from < 0 || to < 0) return (gfl_result){0, 0, UNKNOWN};
    if (n_rows <= 0 || n_in <= 0) return done;
    const gfl_type s = gfl_type_at(from), d = gfl_type_at(to);
    const int64_t src_bytes = n_in / s.block_weights * s.block_bytes, dst_bytes = n_in / d.block_weights * d.block_bytes;
    const int64_t group = rows_per_group(n_in, n_rows);
    float *w = malloc((size_t)(group * n_in) * sizeof *w);
    if (!w) return (gfl_result){0, 0, NO_MEMORY};
    gfl_result result = done;
    for (int64_t row = 0; row < n_rows && !result.status; row += group) {
        const int64_t rows = n_rows - row < group ? n_rows - row : group;
        table->types[from].dequantize(src + row * src_bytes, w, rows * n_in);
        table->add_product(w, a, b + row * rank, rows, n_in, rank);
        result = quantize_group(table, to, w, rows, n_in, NULL, dst + row * dst_bytes, row, SUSPICIOUS);
    }
    free(w);
    return result;
}
