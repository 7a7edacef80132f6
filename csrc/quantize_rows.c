/* Rows quantized and dequantized, and what all functions on rows share. */
#include <stdlib.h>

#include "rows.h"

/* Floats of a group of rows. */
enum { GROUP_FLOATS = 64 * 1024 };

static const uint32_t MAY_OVERFLOW = 0x44800000; /* 1024.0f */

/* From here on, and below zero, importances may lead a search to no result or an infinite one (kernels then write a
 * NaN). */
static const float LARGE_IMPORTANCE = 1e9f;

static int is_unusual(const float *imatrix, int64_t n_in) {
    int unusual = 0;
    for (int64_t i = 0; i < n_in; i++) unusual |= !(imatrix[i] >= 0.0f && imatrix[i] < LARGE_IMPORTANCE);
    return unusual;
}

gfl_importance gfl_importance_of(const float *imatrix, int64_t n_in) {
    return (gfl_importance){imatrix, imatrix && is_unusual(imatrix, n_in) ? 0 : MAY_OVERFLOW};
}

gfl_result gfl_first_not_finite(const float *x, const gfl_row_group *group, int status) {
    for (int64_t i = 0; i < group->n_rows * group->n_in; i++)
        if (!(x[i] - x[i] == 0.0f)) return (gfl_result){group->start + i / group->n_in, i % group->n_in, status};
    return done;
}

const float *gfl_delta_rows(const gfl_table *table, const gfl_delta *delta, float *scratch,
                            const gfl_row_group *group) {
    if (delta->dense) return delta->dense + group->start * delta->n_in;
    table->product(scratch, delta->a, delta->b + group->start * delta->rank, group->n_rows, delta->n_in, delta->rank);
    return scratch;
}

/* The next number of the generator splitmix64 from state `x` on. */
static uint64_t splitmix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t gfl_row_key(uint64_t key, int64_t row) { return splitmix64(key + (uint64_t)row * 0x9e3779b97f4a7c15u); }

int64_t gfl_rows_per_group(int64_t n_in, int64_t n_rows, int64_t floats) {
    int64_t rows = floats / n_in / 4 * 4;
    if (rows < 4) rows = 4;
    return rows < n_rows ? rows : n_rows;
}

gfl_row_group gfl_group_at(int64_t start, int64_t rows_per_group, int64_t n_rows, int64_t n_in) {
    return (gfl_row_group){start, n_rows - start < rows_per_group ? n_rows - start : rows_per_group, n_in};
}

gfl_result gfl_quantize_group(const gfl_table *table, int type, const float *x, uint8_t *out,
                              const gfl_row_group *group, const gfl_importance *importance) {
    const int64_t n = group->n_rows * group->n_in;
    const uint32_t largest = table->largest(x, n);
    if (largest >= GFL_INFINITE) return gfl_first_not_finite(x, group, GFL_NOT_FINITE);
    table->types[type].quantize(x, out, group->n_rows, group->n_in, importance->imatrix);
    if (largest < importance->may_overflow) return done;
    float *back = malloc((size_t)n * sizeof *back);
    if (!back) return no_memory;
    table->types[type].dequantize(out, back, n);
    gfl_result result = done;
    if (table->largest(back, n) >= GFL_INFINITE) result = gfl_first_not_finite(back, group, GFL_OVERFLOWS);
    free(back);
    return result;
}

gfl_result gfl_quantize_rows(int isa, int type_id, const float *x, int64_t n_rows, int64_t n_in, const float *imatrix,
                             uint8_t *out) {
    const gfl_table *table = gfl_table_of(isa);
    const int type = gfl_index_of(type_id);
    if (!table || type < 0) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const gfl_type t = gfl_type_at(type);
    const int64_t row_bytes = n_in / t.block_weights * t.block_bytes;
    const int64_t rows_per_group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS);
    const gfl_importance importance = gfl_importance_of(imatrix, n_in);
    for (int64_t row = 0; row < n_rows; row += rows_per_group) {
        const gfl_row_group group = gfl_group_at(row, rows_per_group, n_rows, n_in);
        const gfl_result result = gfl_quantize_group(table, type, x + row * n_in, out + row * row_bytes, &group,
                                                     &importance);
        if (result.status) return result;
    }
    return done;
}

gfl_result gfl_dequantize_rows(int isa, int type_id, const uint8_t *src, int64_t n_rows, int64_t n_in, float *out) {
    const gfl_table *table = gfl_table_of(isa);
    const int type = gfl_index_of(type_id);
    if (!table || type < 0) return unknown;
    if (n_rows > 0 && n_in > 0) table->types[type].dequantize(src, out, n_rows * n_in);
    return done;
}
