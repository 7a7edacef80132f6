/* Sums over the inputs of matrix products, as llama.cpp's imatrix has them, and sketches of their second moments. */
#include "watch_inputs.h"

#include <math.h>
#include <stdlib.h>

#include "dispatch.h"

/* llama.cpp's imatrix ignores products of fewer columns (tools/imatrix/imatrix.cpp), so that counts agree. */
enum { FEWEST_COLUMNS = 16 };

bool gfl_start_watch(gfl_watch *watch, int isa, gfl_watched *watched, int64_t n_watched) {
    watch->table = gfl_table_of(isa);
    watch->watched = watched;
    watch->n_watched = watch->table ? n_watched : 0;
    watch->n_inputs = 0;
    return watch->table != NULL;
}

void gfl_stop_watch(gfl_watch *watch) {
    free(watch->rows);
    watch->rows = NULL;
    watch->rows_capacity = 0;
}

static gfl_watched *find_watched(const gfl_watch *watch, node weight) {
    int64_t low = 0, high = watch->n_watched;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strncmp(watch->watched[middle].name, name_of(weight), NAME_BYTES);
        if (order == 0) return &watch->watched[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

static const void *ids_of(node t) { return op_of(t) == t.at->mul_mat_id ? src_of(t, 2).self : NULL; }

/* The weight before this one that had the same inputs in this ubatch, or NULL. */
static const gfl_input *find_input(const gfl_watch *watch, node t) {
    const void *columns = src_of(t, 1).self, *ids = ids_of(t);
    int64_t first = watch->n_inputs > RECENT_INPUTS ? watch->n_inputs - RECENT_INPUTS : 0;
    for (int64_t i = first; i < watch->n_inputs; i++) {
        const gfl_input *input = &watch->inputs[i % RECENT_INPUTS];
        if (input->columns == columns && input->ids == ids) return input;
    }
    return NULL;
}

bool gfl_wants_input(gfl_watch *watch, node t, int *fault) {
    node columns = src_of(t, 1);
    if (!columns.self) return false;
    gfl_watched *weight = find_watched(watch, src_of(t, 0));
    if (!weight) return false;
    bool by_expert = op_of(t) == t.at->mul_mat_id;
    if (!by_expert && (ne_of(columns, 1) < FEWEST_COLUMNS || type_of(columns) != t.at->f32)) return false;
    const gfl_input *input = find_input(watch, t);
    int64_t same_as = input ? input->number : -1;
    if (input && watch->watched[same_as].n_matrices != weight->n_matrices) same_as = -1;
    if (weight->seen && weight->same_as != same_as) {
        *fault = GFL_HOOK_INPUT;
        return false;
    }
    weight->seen = 1;
    weight->by_expert = by_expert;
    weight->same_as = (int32_t)same_as;
    return same_as < 0;
}

/* Adds the first n of watch->rows to the sums of a matrix; false if a number is not finite. */
static bool add_rows(gfl_watch *watch, gfl_watched *weight, int64_t matrix, int64_t n) {
    int64_t n_in = weight->n_in;
    double *squares = weight->squares + matrix * n_in;
    for (int64_t i = 0; i < n; i++)
        if (watch->table->largest(watch->rows[i], n_in) >= GFL_INFINITE) return false;
    for (int64_t i = 0; i < n; i++) {
        const float *x = watch->rows[i];
        for (int64_t j = 0; j < n_in; j++) squares[j] += (double)x[j] * (double)x[j];
    }
    if (weight->sketch)
        watch->table->add_to_sketch(weight->sketch + matrix * n_in * GFL_SKETCH, watch->rows, n, weight->omega, n_in);
    return true;
}

static bool has_room(gfl_watch *watch, int64_t n) {
    if (n <= watch->rows_capacity) return true;
    const float **grown = realloc(watch->rows, (size_t)n * sizeof *grown);
    if (!grown) return false;
    watch->rows = grown;
    watch->rows_capacity = n;
    return true;
}

static const float *row_at(node columns, int64_t i1, int64_t i2, int64_t i3) {
    return (const float *)((const char *)data_of(columns) + i1 * nb_of(columns, 1) + i2 * nb_of(columns, 2) +
                           i3 * nb_of(columns, 3));
}

/* Each matrix of a stack takes its own slice of the inputs; slices beyond the stack begin again at its start. */
static int add_product(gfl_watch *watch, gfl_watched *weight, node t) {
    node matrices = src_of(t, 0), columns = src_of(t, 1);
    int64_t n_rows = ne_of(columns, 1), ne2 = ne_of(matrices, 2), ne3 = ne_of(matrices, 3);
    if (weight->n_matrices != ne2 * ne3) return GFL_HOOK_SHAPE;
    if (!has_room(watch, n_rows)) return GFL_HOOK_MEMORY;
    for (int64_t i3 = 0; i3 < ne_of(columns, 3); i3++)
        for (int64_t i2 = 0; i2 < ne_of(columns, 2); i2++) {
            for (int64_t i1 = 0; i1 < n_rows; i1++) watch->rows[i1] = row_at(columns, i1, i2, i3);
            if (!add_rows(watch, weight, i3 % ne3 * ne2 + i2 % ne2, n_rows)) return GFL_HOOK_INFINITE;
        }
    weight->counts[0] += n_rows * ne_of(columns, 2) * ne_of(columns, 3) / weight->n_matrices;
    return GFL_HOOK_FINE;
}

/* ids (n_used, n_tokens) say which experts a token uses; an expert's input is one for all of them, or its own. */
static int add_expert_product(gfl_watch *watch, gfl_watched *weight, node t) {
    node columns = src_of(t, 1), ids = src_of(t, 2);
    int64_t n_used = ne_of(ids, 0), n_tokens = ne_of(ids, 1), n_columns = ne_of(columns, 1);
    bool is_known = weight->n_matrices == ne_of(src_of(t, 0), 2) && type_of(ids) == t.at->i32 && data_of(ids) &&
                    ne_of(columns, 2) == n_tokens && n_columns > 0 && ne_of(columns, 3) == 1;
    if (!is_known) return GFL_HOOK_SHAPE;
    if (!has_room(watch, n_used * n_tokens)) return GFL_HOOK_MEMORY;
    for (int64_t expert = 0; expert < weight->n_matrices; expert++) {
        int64_t n = 0;
        for (int64_t token = 0; token < n_tokens; token++)
            for (int64_t k = 0; k < n_used; k++) {
                int32_t chosen;
                memcpy(&chosen, (const char *)data_of(ids) + token * nb_of(ids, 1) + k * nb_of(ids, 0), sizeof chosen);
                if (chosen == expert) watch->rows[n++] = row_at(columns, k % n_columns, token, 0);
            }
        if (!add_rows(watch, weight, expert, n)) return GFL_HOOK_INFINITE;
        weight->counts[expert] += n;
    }
    return GFL_HOOK_FINE;
}

int gfl_add_input(gfl_watch *watch, node t) {
    node columns = src_of(t, 1);
    gfl_watched *weight = find_watched(watch, src_of(t, 0));
    if (!weight) return GFL_HOOK_INPUT;
    if (type_of(columns) != t.at->f32 || nb_of(columns, 0) != sizeof(float) || !data_of(columns) ||
        ne_of(columns, 0) != weight->n_in)
        return GFL_HOOK_SHAPE;
    int fault = weight->by_expert ? add_expert_product(watch, weight, t) : add_product(watch, weight, t);
    if (fault) return fault;
    watch->inputs[watch->n_inputs++ % RECENT_INPUTS] = (gfl_input){columns.self, ids_of(t), weight - watch->watched};
    return GFL_HOOK_FINE;
}
