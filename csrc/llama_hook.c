#include "llama_hook.h"

#include "graph_node.h"
#include "watch_inputs.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The scheduler asks for every node before it computes it (ask = true); a node that is wanted ends a part of the graph
 * and is shown again once it is computed. The graph is computed once for each ubatch, which begins with the lookup of
 * the token embeddings. */

typedef struct {
    const void *tensor;
    const float *factors; /* [n_bays] */
} stacked;

struct gfl_hook {
    gfl_tensor_layout at;
    int mode;
    /* the batch */
    int64_t n_tokens;
    int32_t *tokens;
    int8_t *wanted;
    uint8_t *diverged;
    int64_t *outputs; /* of the ubatch: tokens of the batch */
    float *weights;
    bool has_tokens;
    /* the ubatch: tokens begin ... begin + n_here of the batch */
    int64_t begin, n_here, n_outputs;
    bool started;
    /* the stack, sorted by address */
    stacked *stack;
    float *factors;
    int64_t n_stack, n_bays, width;
    /* what was found */
    gfl_factor *found;
    int64_t n_found, found_capacity;
    gfl_watch watch;
    bool past_layers;  /* of this ubatch: all that the layers compute has been asked for */
    bool needs_output; /* an input beyond the layers is watched */
    bool stops;        /* a batch has shown that no watched input lies beyond the layers */
    gfl_hook_report report;
};

static void set_fault(gfl_hook *hook, int fault, node t) {
    if (hook->report.fault) return;
    hook->report.fault = fault;
    if (t.self) {
        memcpy(hook->report.node, name_of(t), NAME_BYTES);
        hook->report.node[NAME_BYTES - 1] = 0;
    }
}

/* ---- asked for a node: note where a ubatch begins and what LoRAs the graph has; whether to see the node's numbers */

static void start_ubatch(gfl_hook *hook, node lookup) {
    int64_t begin = hook->started ? hook->begin + hook->n_here : 0, n_here = ne_of(lookup, 1);
    node ids = src_of(lookup, 1);
    hook->report.n_ubatches++;
    hook->watch.n_inputs = 0;
    if (!hook->has_tokens) return;
    hook->started = true;
    hook->begin = begin;
    hook->n_here = hook->n_outputs = 0;
    hook->past_layers = false;
    if (n_here < 0 || n_here > hook->n_tokens - begin) {
        set_fault(hook, GFL_HOOK_TOKENS, lookup);
        return;
    }
    if (n_here) {
        bool is_same = type_of(ids) == ids.at->i32 && ne_of(ids, 0) == n_here && data_of(ids) &&
                       !memcmp(data_of(ids), hook->tokens + begin, (size_t)n_here * sizeof(int32_t));
        if (!is_same) {
            set_fault(hook, GFL_HOOK_TOKENS, lookup);
            return;
        }
    }
    hook->n_here = n_here;
    for (int64_t i = begin; i < begin + n_here; i++)
        if (hook->wanted[i]) hook->outputs[hook->n_outputs++] = i;
}

static void note_factor(gfl_hook *hook, node t) {
    for (int64_t i = 0; i < hook->n_found; i++)
        if (hook->found[i].tensor == t.self) return;
    if (hook->n_found == hook->found_capacity) {
        int64_t more = 2 * hook->found_capacity + 64;
        gfl_factor *grown = realloc(hook->found, (size_t)more * sizeof *grown);
        if (!grown) {
            set_fault(hook, GFL_HOOK_MEMORY, t);
            return;
        }
        hook->found = grown, hook->found_capacity = more;
    }
    gfl_factor *factor = &hook->found[hook->n_found++];
    *factor = (gfl_factor){.tensor = t.self, .data = data_of(t), .type = type_of(t)};
    for (int axis = 0; axis < 4; axis++) factor->ne[axis] = ne_of(t, axis), factor->nb[axis] = nb_of(t, axis);
    memcpy(factor->name, name_of(t), NAME_BYTES - 1);
}

/* The last node before the output matrix, whose product with many tokens costs much and has no use for who watches. */
static bool ends_layers(const gfl_hook *hook, node t) {
    return (hook->mode & GFL_HOOK_WATCH) && !strcmp(name_of(t), "result_norm");
}

static bool is_wanted(gfl_hook *hook, node t) {
    int32_t op = op_of(t);
    if (ends_layers(hook, t)) {
        hook->past_layers = true;
        return hook->stops;
    }
    if (op == t.at->set_rows) return hook->mode & GFL_HOOK_CLEAN;
    if (op != t.at->mul_mat && op != t.at->mul_mat_id && op != t.at->get_rows) return false;
    node factor = src_of(t, 0);
    if (!factor.self) return false;
    if (op == t.at->get_rows && !strcmp(name_of(factor), "token_embd.weight") && src_of(t, 1).self)
        start_ubatch(hook, t);
    if ((hook->mode & GFL_HOOK_WATCH) && op != t.at->get_rows) {
        int fault = GFL_HOOK_FINE;
        if (gfl_wants_input(&hook->watch, t, &fault)) {
            hook->needs_output |= hook->past_layers;
            return true;
        }
        if (fault) set_fault(hook, fault, factor);
    }
    bool is_a = name_ends_with(factor, ".lora_a");
    if ((hook->mode & GFL_HOOK_FIND) && (is_a || name_ends_with(factor, ".lora_b"))) note_factor(hook, factor);
    return is_a && (hook->mode & GFL_HOOK_MASK);
}

/* ---- shown a node: mask it, or clean what it wrote */

static const stacked *find_stacked(const gfl_hook *hook, const void *tensor) {
    int64_t low = 0, high = hook->n_stack;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if ((uintptr_t)hook->stack[middle].tensor < (uintptr_t)tensor) low = middle + 1;
        else high = middle;
    }
    return low < hook->n_stack && hook->stack[low].tensor == tensor ? &hook->stack[low] : NULL;
}

/* How many columns belong to one token, and which tokens the columns are of: all of the ubatch (*outputs NULL) or those
 * with outputs. 0 if they are neither. */
static int64_t columns_per_token(const gfl_hook *hook, node t, const int64_t **outputs) {
    int64_t all = hook->n_here, some = hook->n_outputs, ne1 = ne_of(t, 1), rest = ne_of(t, 2) * ne_of(t, 3);
    bool by_expert = op_of(t) == t.at->mul_mat_id;
    *outputs = NULL;
    if (!by_expert && ne1 * rest == all) return 1;
    if (by_expert && rest == all) return ne1;
    *outputs = hook->outputs;
    if (!by_expert && ne1 * rest == some) return 1;
    if (by_expert && rest == some) return ne1;
    *outputs = NULL;
    if (!by_expert && rest == all) /* heads of a token side by side */
        return ne1;
    return 0;
}

static void mask_column(const gfl_hook *hook, float *column, const float *weights, const float *factors,
                        uint8_t *diverged) {
    for (int64_t bay = 0; bay < hook->n_bays; bay++, column += hook->width) {
        float weight = weights[bay] * factors[bay];
        if (weight == 0.0f) { /* not by a multiplication: 0 * NaN is NaN */
            memset(column, 0, (size_t)hook->width * sizeof *column);
            continue;
        }
        for (int64_t i = 0; i < hook->width; i++) {
            column[i] *= weight;
            if (!isfinite(column[i])) *diverged = 1;
        }
    }
}

static void mask(gfl_hook *hook, node t) {
    node factor = src_of(t, 0);
    const stacked *entry = find_stacked(hook, factor.self);
    float *column = data_of(t);
    int64_t rank = ne_of(t, 0), n_columns = ne_of(t, 1) * ne_of(t, 2) * ne_of(t, 3);
    if (n_columns <= 0 || rank <= 0) return;
    if (!is_contiguous_f32(t) || !column) {
        set_fault(hook, GFL_HOOK_SHAPE, factor);
        return;
    }
    const int64_t *outputs = NULL;
    int64_t per_token = hook->started ? columns_per_token(hook, t, &outputs) : 0;
    if (!entry) set_fault(hook, GFL_HOOK_FACTOR, factor);
    else if (rank != hook->n_bays * hook->width) set_fault(hook, GFL_HOOK_SHAPE, factor);
    else if (!per_token) set_fault(hook, GFL_HOOK_COLUMNS, factor);
    if (hook->report.fault) {
        memset(column, 0, (size_t)(n_columns * rank) * sizeof *column);
        return;
    }
    for (int64_t i = 0; i < n_columns; i++, column += rank) {
        int64_t token = outputs ? outputs[i / per_token] : hook->begin + i / per_token;
        mask_column(hook, column, hook->weights + token * hook->n_bays, entry->factors, &hook->diverged[token]);
    }
    hook->report.n_masked++;
}

/* Whether row t of a matrix of floats would be finite in cells of this type. */
static bool is_row_finite(const float *row, int64_t n, float most) {
    for (int64_t i = 0; i < n; i++)
        if (!(fabsf(row[i]) <= most)) /* also of NaN */
            return false;
    return true;
}

/* The node has written rows of src[0] to the rows of a cache that src[1] names: of keys by token, of values by token
 * or, where they lie transposed, one number each. */
static void clean(gfl_hook *hook, node t) {
    node rows = src_of(t, 0), ids = src_of(t, 1);
    bool is_half = type_of(t) == t.at->f16;
    if (!rows.self || !ids.self || !hook->started || !hook->n_here) return;
    int64_t n_rows = ne_of(rows, 1), width = ne_of(rows, 0), row_bytes = width * (is_half ? 2 : 4);
    bool is_wide = type_of(ids) == ids.at->i64;
    bool is_known = type_of(rows) == rows.at->f32 && (is_half || type_of(t) == t.at->f32) &&
                    (is_wide || type_of(ids) == ids.at->i32) && ne_of(rows, 2) * ne_of(rows, 3) == 1 &&
                    ne_of(ids, 0) == n_rows && ne_of(ids, 1) * ne_of(ids, 2) * ne_of(ids, 3) == 1 &&
                    ne_of(t, 0) == width && ne_of(t, 2) * ne_of(t, 3) == 1 && nb_of(rows, 0) == sizeof(float) &&
                    data_of(rows) && data_of(ids) && data_of(t);
    if (!is_known || n_rows % hook->n_here) return;
    float most = is_half ? 65504.0f : 3.402823466e38f;
    for (int64_t i = 0; i < n_rows; i++) {
        const char *row = (const char *)data_of(rows) + i * nb_of(rows, 1);
        if (is_row_finite((const float *)row, width, most)) continue;
        int64_t at;
        if (is_wide) memcpy(&at, (const char *)data_of(ids) + i * 8, sizeof at);
        else at = ((const int32_t *)data_of(ids))[i];
        if (at < 0 || at >= ne_of(t, 1)) continue;
        memset((char *)data_of(t) + at * nb_of(t, 1), 0, (size_t)row_bytes);
        hook->diverged[hook->begin + i / (n_rows / hook->n_here)] = 1;
        hook->report.n_cleaned++;
    }
}

bool gfl_hook_eval(void *tensor, bool ask, void *user_data) {
    gfl_hook *hook = user_data;
    if (!hook || !hook->mode || !tensor) return !ask; /* false ends the graph's part when it is no question */
    node t = {tensor, &hook->at};
    if (ask) return is_wanted(hook, t);
    if (ends_layers(hook, t)) {
        hook->report.n_stopped++;
        return false; /* the rest of the graph is not computed */
    }
    if (op_of(t) == t.at->set_rows) clean(hook, t);
    else if ((hook->mode & GFL_HOOK_WATCH) && !name_ends_with(src_of(t, 0), ".lora_a")) {
        int fault = gfl_add_input(&hook->watch, t);
        if (fault) set_fault(hook, fault, src_of(t, 0));
    } else mask(hook, t);
    return true;
}

bool gfl_hook_aborts(void *user_data) {
    const gfl_hook *hook = user_data;
    return hook && hook->mode == GFL_HOOK_FIND;
}

/* ---- set up by Python */

gfl_hook *gfl_hook_new(const gfl_tensor_layout *layout) {
    gfl_hook *hook = calloc(1, sizeof *hook);
    if (hook) hook->at = *layout;
    return hook;
}

static void drop_stack(gfl_hook *hook) {
    free(hook->stack);
    free(hook->factors);
    hook->stack = NULL, hook->factors = NULL;
    hook->n_stack = hook->n_bays = hook->width = 0;
}

void gfl_hook_free(gfl_hook *hook) {
    if (!hook) return;
    drop_stack(hook);
    free(hook->tokens);
    free(hook->wanted);
    free(hook->diverged);
    free(hook->outputs);
    free(hook->weights);
    free(hook->found);
    gfl_stop_watch(&hook->watch);
    free(hook);
}

static int by_address(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)((const stacked *)a)->tensor, y = (uintptr_t)((const stacked *)b)->tensor;
    return (x > y) - (x < y);
}

bool gfl_hook_set_stack(gfl_hook *hook, int64_t n_tensors, const uintptr_t *tensors, int64_t n_bays, int64_t width,
                        const float *factors) {
    drop_stack(hook);
    if (n_tensors <= 0 || n_bays <= 0 || width <= 0) return true;
    hook->stack = malloc((size_t)n_tensors * sizeof *hook->stack);
    hook->factors = malloc((size_t)(n_tensors * n_bays) * sizeof *hook->factors);
    if (!hook->stack || !hook->factors) {
        drop_stack(hook);
        return false;
    }
    memcpy(hook->factors, factors, (size_t)(n_tensors * n_bays) * sizeof *factors);
    for (int64_t i = 0; i < n_tensors; i++)
        hook->stack[i] = (stacked){(const void *)tensors[i], hook->factors + i * n_bays};
    qsort(hook->stack, (size_t)n_tensors, sizeof *hook->stack, by_address);
    hook->n_stack = n_tensors, hook->n_bays = n_bays, hook->width = width;
    return true;
}

bool gfl_hook_watch(gfl_hook *hook, int isa, gfl_watched *watched, int64_t n_watched) {
    hook->past_layers = hook->needs_output = hook->stops = false;
    return gfl_start_watch(&hook->watch, isa, watched, n_watched);
}

/* Let *buffer hold so many bytes, and fill it: with `content`, or zeros if that is NULL. */
static bool fill(void **buffer, const void *content, int64_t bytes) {
    void *grown = realloc(*buffer, (size_t)(bytes ? bytes : 1));
    if (!grown) return false;
    *buffer = grown;
    if (content) memcpy(grown, content, (size_t)bytes);
    else memset(grown, 0, (size_t)bytes);
    return true;
}

bool gfl_hook_begin(gfl_hook *hook, int mode, int64_t n_tokens, const int32_t *tokens, const int8_t *outputs,
                    const float *weights) {
    hook->mode = 0;
    hook->report = (gfl_hook_report){0};
    hook->started = false;
    hook->begin = hook->n_here = hook->n_outputs = 0;
    hook->n_tokens = hook->watch.n_inputs = 0;
    if (n_tokens < 0) return false;
    bool has_room = fill((void **)&hook->tokens, tokens, n_tokens * (int64_t)sizeof *tokens) &&
                    fill((void **)&hook->wanted, outputs, n_tokens) && fill((void **)&hook->diverged, NULL, n_tokens) &&
                    fill((void **)&hook->outputs, NULL, n_tokens * (int64_t)sizeof *hook->outputs) &&
                    fill((void **)&hook->weights, weights, n_tokens * hook->n_bays * (int64_t)sizeof *weights);
    if (!has_room) return false;
    hook->has_tokens = tokens != NULL;
    hook->n_tokens = n_tokens;
    if (!tokens) { /* embeddings are looked up nowhere: the caller gives no more than one ubatch */
        hook->started = true;
        hook->n_here = n_tokens;
        for (int64_t i = 0; i < n_tokens; i++)
            if (outputs[i]) hook->outputs[hook->n_outputs++] = i;
    }
    hook->mode = mode;
    return true;
}

gfl_hook_report gfl_hook_end(gfl_hook *hook, uint8_t *diverged) {
    if (hook->mode & GFL_HOOK_WATCH) hook->stops = hook->past_layers && !hook->needs_output;
    hook->mode = 0;
    if (diverged && hook->n_tokens) memcpy(diverged, hook->diverged, (size_t)hook->n_tokens);
    return hook->report;
}

int64_t gfl_hook_n_found(const gfl_hook *hook) { return hook->n_found; }

gfl_factor gfl_hook_found(const gfl_hook *hook, int64_t index) {
    return index >= 0 && index < hook->n_found ? hook->found[index] : (gfl_factor){0};
}

void gfl_hook_clear_found(gfl_hook *hook) { hook->n_found = 0; }

void gfl_copy_strided(uint8_t *dst, int64_t dst_stride, const uint8_t *src, int64_t src_stride, int64_t n_rows,
                      int64_t row_bytes) {
    for (int64_t i = 0; i < n_rows; i++, dst += dst_stride) {
        if (src) memcpy(dst, src + i * src_stride, (size_t)row_bytes);
        else memset(dst, 0, (size_t)row_bytes);
    }
}

bool gfl_all_finite(const uint8_t *data, int64_t n, int bytes) {
    uint32_t worst = 0; /* exponent with all bits set: infinite or NaN */
    if (bytes == 2) {
        for (int64_t i = 0; i < n; i++) {
            uint16_t bits;
            memcpy(&bits, data + 2 * i, sizeof bits);
            worst |= (bits & 0x7c00u) == 0x7c00u;
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, data + 4 * i, sizeof bits);
            worst |= (bits & 0x7f800000u) == 0x7f800000u;
        }
    }
    return !worst;
}
