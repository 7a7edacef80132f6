#ifndef GFL_WATCH_INPUTS_H
#define GFL_WATCH_INPUTS_H
#include "graph_node.h"
#include "kernels/table.h"
#include "llama_hook.h"

/* The part of the hook that sums over the inputs of matrix products. */

enum { RECENT_INPUTS = 16 };

typedef struct {
    const void *columns, *ids; /* the tensors that a product took: its inputs and, with experts, its choice of them */
    int64_t number;            /* of the watched weight that holds their sums */
} gfl_input;

typedef struct {
    const gfl_table *table;
    gfl_watched *watched; /* the caller's, sorted by name */
    int64_t n_watched;
    const float **rows; /* columns that are added at once */
    int64_t rows_capacity;
    gfl_input inputs[RECENT_INPUTS]; /* of this ubatch; n_inputs is how many there were */
    int64_t n_inputs;
} gfl_watch;

/* False where this machine lacks the instruction set. */
bool gfl_start_watch(gfl_watch *watch, int isa, gfl_watched *watched, int64_t n_watched);
void gfl_stop_watch(gfl_watch *watch);

/* Whether to see a product once it is computed: its weight is watched, and its inputs are no other weight's. */
bool gfl_wants_input(gfl_watch *watch, node t, int *fault);

/* Adds the inputs of a computed product to its weight's sums; returns the fault (enum gfl_hook_fault). */
int gfl_add_input(gfl_watch *watch, node t);

#endif
