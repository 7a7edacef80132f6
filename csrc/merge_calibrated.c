/* Calibrated rounding of a whole matrix: where its codes start, and the passes over its rows. The arithmetic of a row
 * is in kernels/search_codes.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"
#include "rows.h"

enum { ROWS_TOGETHER = 16 };

/* What a call works on; arrays of the whole matrix. */
typedef struct {
    gfl_search_state state;
    int64_t n_rows, n_in, n_groups, row_bytes;
    int weights, bytes; /* of a block */
    int8_t *codes;      /* (n_rows, n_in) */
    float *s, *o;       /* (n_rows, n_groups) */
    float *ev;          /* (n_rows, DIRECTIONS) */
    float *columns, *inverse, *errors, *group_sums;
} search_call;

static void free_call(search_call *call) {
    free(call->codes);
    free(call->s);
    free(call->o);
    free(call->ev);
    free(call->columns);
    free(call->inverse);
    free(call->errors);
    free(call->group_sums);
    free(call->state.fit_y);
    free(call->state.fit_shift);
    free(call->state.fit_scales);
    free(call->state.fit_inverse);
    free(call->state.fit_right);
    free(call->state.fit_blocks);
    free(call->state.p);
    free(call->state.q);
}

static float *floats(int64_t n) { return calloc((size_t)n, sizeof(float)); }

/* Scratch of the fit of a row's scales. */
static int allocate_fit(search_call *call) {
    gfl_search_state *state = &call->state;
    const int64_t n_units = call->n_in / call->weights;
    call->group_sums = floats(call->n_groups * DIRECTIONS);
    state->fit_y = floats(n_units * 2 * DIRECTIONS), state->fit_shift = floats(call->n_in);
    state->fit_scales = floats(2 * call->n_groups);
    state->fit_inverse = calloc((size_t)n_units, 3 * sizeof(double));
    state->fit_right = calloc((size_t)n_units, 2 * sizeof(double));
    state->fit_blocks = malloc((size_t)call->row_bytes);
    return call->group_sums && state->fit_y && state->fit_shift && state->fit_scales && state->fit_inverse &&
           state->fit_right && state->fit_blocks;
}

static int allocate(search_call *call) {
    const int64_t n = call->n_rows * call->n_groups;
    call->codes = malloc((size_t)(call->n_rows * call->n_in));
    call->s = floats(n), call->o = floats(n);
    call->ev = floats(call->n_rows * DIRECTIONS);
    call->columns = floats(call->n_in * DIRECTIONS), call->inverse = floats(call->n_in);
    call->errors = floats(ROWS_TOGETHER * call->n_in);
    call->state.p = floats(KEPT * DIRECTIONS), call->state.q = floats(KEPT * call->n_in);
    if (!allocate_fit(call)) return 0;
    return call->codes && call->s && call->o && call->ev && call->columns && call->inverse && call->errors &&
           call->state.p && call->state.q;
}

/* The moments by column, and the inverse of their diagonal. */
static void prepare_moments(search_call *call, const gfl_search *search) {
    for (int64_t j = 0; j < call->n_in; j++) {
        float sum = search->d[j];
        for (int k = 0; k < DIRECTIONS; k++) {
            const float v = search->v[k * call->n_in + j];
            call->columns[j * DIRECTIONS + k] = v;
            sum += v * v;
        }
        call->inverse[j] = sum > 0.0f ? 1.0f / sum : 0.0f;
        float *sums = call->group_sums + j / call->state.codec->group * DIRECTIONS;
        for (int k = 0; k < DIRECTIONS; k++) sums[k] += call->columns[j * DIRECTIONS + k];
    }
}

/* The lowest code for NaN, which an infinite scale makes. */
static int nearest_code(const gfl_block_codec *codec, float t) {
    if (!codec->levels) {
        const float inside = t > codec->low ? (t < codec->high ? t : codec->high) : codec->low;
        return (int)rintf(inside);
    }
    int code = 0;
    while (code + 1 < codec->n_levels && t > 0.5f * (codec->levels[code] + codec->levels[code + 1])) code++;
    return code;
}

/* Codes of a group start at the base's where its scale is the base's and delta is below 0.35 steps, else at the nearest
 * to the target. */
static void start_group(const gfl_block_codec *codec, int8_t *codes, const int8_t *base, const float *s, const float *o,
                        float s0, float o0, const float *target) {
    float squares = 0.0f;
    const int same = *s == s0 && *o == o0;
    for (int i = 0; i < codec->group; i++) {
        const float level = codec->levels ? codec->levels[base[i] & 15] : (float)base[i];
        const float delta = target[i] - (s0 * level - o0);
        squares += delta * delta;
    }
    const float step = *s * codec->step;
    const int strong = squares >= 0.1225f * (float)codec->group * (step * step);
    for (int i = 0; i < codec->group; i++)
        codes[i] = same && (!strong || *s == 0.0f)
                       ? base[i]
                       : (int8_t)(*s == 0.0f ? nearest_code(codec, 0.0f) : nearest_code(codec, (target[i] + *o) / *s));
}

/* Reads the scales of dst, and the codes to start from: those of dst if there is no src. */
static void start_row(search_call *call, const uint8_t *src, const uint8_t *dst, const float *target, int64_t row) {
    const gfl_block_codec *codec = call->state.codec;
    float *s = call->s + row * call->n_groups, *o = call->o + row * call->n_groups;
    int8_t *codes = call->codes + row * call->n_in;
    for (int64_t j = 0; j < call->n_in; j += CHUNK) {
        const int n = (int)(call->n_in - j < CHUNK ? call->n_in - j : CHUNK);
        const int64_t at = row * call->row_bytes + j / call->weights * call->bytes, g = j / codec->group;
        codec->scales(dst + at, n, s + g, o + g);
        if (!src) {
            codec->codes(dst + at, n, codes + j);
            continue;
        }
        float s0[CHUNK_GROUPS], o0[CHUNK_GROUPS];
        int8_t base[CHUNK];
        codec->scales(src + at, n, s0, o0);
        codec->codes(src + at, n, base);
        for (int i = 0; i < n / codec->group; i++)
            start_group(codec, codes + j + i * codec->group, base + i * codec->group, s + g + i, o + g + i, s0[i],
                        o0[i], target + row * call->n_in + j + i * codec->group);
    }
}

static void find_errors(const search_call *call, float *errors, const float *target, int64_t row) {
    const gfl_block_codec *codec = call->state.codec;
    for (int64_t j = 0; j < call->n_in; j++) {
        const int64_t g = row * call->n_groups + j / codec->group, at = row * call->n_in + j;
        const float level = codec->levels ? codec->levels[call->codes[at] & 15] : (float)call->codes[at];
        errors[j] = call->s[g] * level - call->o[g] - target[at];
    }
}

/* e V of every row, and U^T E V and U^T E. */
static void sum_errors(search_call *call, const gfl_table *table, const gfl_search *search) {
    for (int64_t start = 0; start < call->n_rows; start += ROWS_TOGETHER) {
        const int64_t n = call->n_rows - start < ROWS_TOGETHER ? call->n_rows - start : ROWS_TOGETHER;
        for (int64_t r = 0; r < n; r++) find_errors(call, call->errors + r * call->n_in, search->target, start + r);
        table->product(call->ev + start * DIRECTIONS, call->columns, call->errors, n, DIRECTIONS, call->n_in);
        for (int64_t r = 0; r < n; r++)
            for (int q = 0; q < KEPT; q++) {
                const float u = search->u[(start + r) * KEPT + q];
                float *p = call->state.p + q * DIRECTIONS, *sums = call->state.q + q * call->n_in;
                for (int k = 0; k < DIRECTIONS; k++) p[k] += u * call->ev[(start + r) * DIRECTIONS + k];
                for (int64_t j = 0; j < call->n_in; j++) sums[j] += u * call->errors[r * call->n_in + j];
            }
    }
}

static void pack_row(const search_call *call, uint8_t *dst, int64_t row) {
    for (int64_t j = 0; j < call->n_in; j += CHUNK) {
        const int n = (int)(call->n_in - j < CHUNK ? call->n_in - j : CHUNK);
        call->state.codec->pack(dst + row * call->row_bytes + j / call->weights * call->bytes, n,
                                call->codes + row * call->n_in + j);
    }
}

static float least_step(const gfl_block_codec *codec) {
    float least = codec->levels ? INFINITY : 1.0f;
    for (int i = 0; codec->levels && i + 1 < codec->n_levels; i++)
        least = fminf(least, codec->levels[i + 1] - codec->levels[i]);
    return least;
}

gfl_result gfl_search_codes(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_search *search,
                            int64_t *n_moves) {
    const int type = gfl_index_of(type_id);
    const gfl_table *table = gfl_table_of(isa);
    *n_moves = 0;
    if (!table || type < 0 || !table->block_codecs[type].pack) return unknown;
    if (search->n_rows <= 0 || search->n_in <= 0) return done;
    const gfl_type t = gfl_type_at(type);
    if (search->n_in % t.block_weights) return unknown;
    const gfl_block_codec *codec = &table->block_codecs[type];
    search_call call = {
        .state =
            {
                .codec = codec,
                .v = search->v,
                .d = search->d,
                .n_in = search->n_in,
                .least_step = least_step(codec),
                .weights = t.block_weights,
                .bytes = t.block_bytes,
            },
        .n_rows = search->n_rows,
        .n_in = search->n_in,
        .n_groups = search->n_in / codec->group,
        .row_bytes = search->n_in / t.block_weights * t.block_bytes,
        .weights = t.block_weights,
        .bytes = t.block_bytes,
    };
    const gfl_row_group all = {0, search->n_rows, search->n_in};
    gfl_result result = gfl_first_not_finite(search->target, &all, GFL_NOT_FINITE);
    if (result.status) return result;
    if (!allocate(&call)) {
        free_call(&call);
        return no_memory;
    }
    prepare_moments(&call, search);
    call.state.columns = call.columns, call.state.inverse = call.inverse, call.state.group_sums = call.group_sums;
    for (int64_t row = 0; row < call.n_rows; row++) start_row(&call, src, dst, search->target, row);
    sum_errors(&call, table, search);
    for (int64_t pass = 0; pass < search->n_limits; pass++)
        for (int64_t i = 0; i < call.n_rows; i++) {
            const int64_t row = search->order[i];
            const gfl_search_row here = {
                .codes = call.codes + row * call.n_in,
                .s = call.s + row * call.n_groups,
                .o = call.o + row * call.n_groups,
                .target = search->target + row * call.n_in,
                .u = search->u + row * KEPT,
                .ev = call.ev + row * DIRECTIONS,
            };
            const float limit = search->limits[pass];
            *n_moves += limit > 0.0f ? table->search_row(&call.state, &here, limit)
                                     : table->search_scales(&call.state, &here, dst + row * call.row_bytes);
        }
    for (int64_t row = 0; row < call.n_rows; row++) pack_row(&call, dst, row);
    free_call(&call);
    return done;
}
