#ifndef GFL_GRAPH_NODE_H
#define GFL_GRAPH_NODE_H
#include <string.h>

#include "llama_hook.h"

#define NAME_BYTES 64

/* A node of the graph, its fields read by their offsets. */
typedef struct {
    const char *self;
    const gfl_tensor_layout *at;
} node;

static inline int32_t int_at(node t, int32_t offset) {
    int32_t value;
    memcpy(&value, t.self + offset, sizeof value);
    return value;
}

static inline void *pointer_at(node t, int32_t offset) {
    void *value;
    memcpy(&value, t.self + offset, sizeof value);
    return value;
}

static inline int32_t op_of(node t) { return int_at(t, t.at->op); }
static inline int32_t type_of(node t) { return int_at(t, t.at->type); }
static inline void *data_of(node t) { return pointer_at(t, t.at->data); }
static inline const char *name_of(node t) { return t.self + t.at->name; }

static inline int64_t ne_of(node t, int axis) {
    int64_t value;
    memcpy(&value, t.self + t.at->ne + axis * (int)sizeof value, sizeof value);
    return value;
}

static inline int64_t nb_of(node t, int axis) {
    size_t value;
    memcpy(&value, t.self + t.at->nb + axis * (int)sizeof value, sizeof value);
    return (int64_t)value;
}

static inline node src_of(node t, int index) {
    return (node){pointer_at(t, t.at->src + index * (int)sizeof(void *)), t.at};
}

static inline bool name_ends_with(node t, const char *ending) {
    const char *name = name_of(t);
    size_t length = strnlen(name, NAME_BYTES), wanted = strlen(ending);
    return length < NAME_BYTES && length > wanted && !memcmp(name + length - wanted, ending, wanted);
}

static inline bool is_contiguous_f32(node t) {
    int64_t bytes = sizeof(float);
    for (int axis = 0; axis < 4; axis++) {
        if (ne_of(t, axis) != 1 && nb_of(t, axis) != bytes) return false;
        bytes *= ne_of(t, axis);
    }
    return type_of(t) == t.at->f32;
}

#endif
