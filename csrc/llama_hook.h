#ifndef GFL_LLAMA_HOOK_H
#define GFL_LLAMA_HOOK_H
#include <stdbool.h>
#include <stdint.h>

/* A hook into llama.cpp's graph: the function that a llama_context calls for every node (cb_eval). cffi reads this file
 * as it reads gguflora.h.
 *
 * Nothing here is compiled against ggml's headers. Where the fields of a ggml_tensor lie, and how ggml numbers its
 * operations and types, is found at run time from ggml's public functions (runtime/tensor_layout.py) and handed in. A
 * hook belongs to one context; the calls below and llama_decode must not overlap.
 */

/* Byte offsets of fields of a ggml_tensor; ggml's numbers of operations and types. */
typedef struct {
    int32_t type;
    int32_t ne; /* int64_t [4] */
    int32_t nb; /* size_t [4] */
    int32_t op;
    int32_t src; /* pointers */
    int32_t data;
    int32_t name; /* text of less than 64 bytes, ended by 0 */
    int32_t mul_mat;
    int32_t mul_mat_id;
    int32_t get_rows;
    int32_t set_rows;
    int32_t f32;
    int32_t f16;
    int32_t i32;
    int32_t i64;
} gfl_tensor_layout;

typedef struct gfl_hook gfl_hook;

enum gfl_hook_mode {
    GFL_HOOK_FIND = 1,  /* note the factors of LoRAs that the graph has */
    GFL_HOOK_MASK = 2,  /* multiply the rank rows of every token by that token's weights */
    GFL_HOOK_CLEAN = 4, /* write 0 to KV cells in place of numbers that are not finite */
    GFL_HOOK_WATCH = 8  /* sum over the inputs of matrix products */
};

/* Why a batch was not computed as asked. */
enum gfl_hook_fault {
    GFL_HOOK_FINE,
    GFL_HOOK_TOKENS,  /* the graph's tokens are not those of the batch, in its order */
    GFL_HOOK_COLUMNS, /* a node's columns are neither all tokens nor those with outputs */
    GFL_HOOK_SHAPE,   /* a node has another type, rank or stride than a product of the stack */
    GFL_HOOK_FACTOR,  /* a factor that is not the stack's */
    GFL_HOOK_MEMORY,
    GFL_HOOK_INPUT,   /* a weight takes its inputs from elsewhere than in the ubatch before */
    GFL_HOOK_INFINITE /* an input is NaN or infinite */
};

enum { GFL_SKETCH = 64 }; /* columns of a sketch */

/* A weight whose inputs are watched: the columns x that products multiply it with. Buffers belong to the caller. */
typedef struct {
    char name[64];
    int64_t n_in;
    int64_t n_matrices; /* experts or heads; there are sums for each */
    double *squares;    /* (n_matrices, n_in): sums of x^2 */
    int64_t *counts;    /* (n_matrices): columns; without experts the first counts for all matrices */
    float *sketch;      /* (n_matrices, n_in, GFL_SKETCH): sums of x (x^T omega); or NULL */
    const float *omega; /* (n_in, GFL_SKETCH) */
    int32_t by_expert;  /* found: each column belongs to one matrix */
    int32_t same_as;    /* found: the watched weight that has the same inputs and holds their sums, or -1 */
    int32_t seen;       /* found: the graph has a product of this weight */
} gfl_watched;

/* A factor of a LoRA as llama.cpp holds it. Its `tensor` is a ggml_tensor *. */
typedef struct {
    const void *tensor;
    uint8_t *data;
    int64_t ne[4];
    int64_t nb[4];
    int32_t type;
    char name[64];
} gfl_factor;

/* What a batch came to. */
typedef struct {
    int64_t n_ubatches;
    int64_t n_masked;  /* nodes */
    int64_t n_cleaned; /* rows of KV cells */
    int64_t n_stopped; /* ubatches whose output matrix was left out */
    int32_t fault;     /* enum gfl_hook_fault; masked products are 0 from there on */
    char node[64];     /* name of the factor where it happened */
} gfl_hook_report;

/* NULL without memory. */
gfl_hook *gfl_hook_new(const gfl_tensor_layout *layout);
void gfl_hook_free(gfl_hook *hook);

/* The stack: LoRA factors A (or, of experts, stacks of A) whose rank rows are `n_bays` bays of `width` rows. A token's
 * weight of a bay is multiplied by factors[n_tensors][n_bays], which is what alpha / rank comes to in that tensor.
 * False without memory; the stack is empty then. */
bool gfl_hook_set_stack(gfl_hook *hook, int64_t n_tensors, const uintptr_t *tensors, int64_t n_bays, int64_t width,
                        const float *factors);

/* Watch these weights, sorted by name, in batches with GFL_HOOK_WATCH. Once a batch has shown that they all lie before
 * the output matrix, later batches end there and have no logits. The array belongs to the caller and must stay
 * where it is. False where this machine lacks the instruction set (see gguflora.h). */
bool gfl_hook_watch(gfl_hook *hook, int isa, gfl_watched *watched, int64_t n_watched);

/* Announce a batch: its tokens (NULL for embeddings), which of them have outputs, and the weights (n_tokens, n_bays) of
 * the bays of the stack (NULL without GFL_HOOK_MASK). `mode` is a sum of enum gfl_hook_mode. False without memory. */
bool gfl_hook_begin(gfl_hook *hook, int mode, int64_t n_tokens, const int32_t *tokens, const int8_t *outputs,
                    const float *weights);

/* The batch is over. diverged (n_tokens): where a token's masked products or KV cells were not finite. */
gfl_hook_report gfl_hook_end(gfl_hook *hook, uint8_t *diverged);

/* Factors noted by GFL_HOOK_FIND since the last call with clear. */
int64_t gfl_hook_n_found(const gfl_hook *hook);
gfl_factor gfl_hook_found(const gfl_hook *hook, int64_t index);
void gfl_hook_clear_found(gfl_hook *hook);

/* llama.cpp's ggml_backend_sched_eval_callback; user_data is the hook. */
bool gfl_hook_eval(void *tensor, bool ask, void *user_data);

/* llama.cpp's ggml_abort_callback; user_data is the hook. True while factors are looked for, and nothing else. */
bool gfl_hook_aborts(void *user_data);

/* Copy `n_rows` rows of `row_bytes` bytes that lie so many bytes apart; zeros if src is NULL. */
void gfl_copy_strided(uint8_t *dst, int64_t dst_stride, const uint8_t *src, int64_t src_stride, int64_t n_rows,
                      int64_t row_bytes);

/* Whether all of n numbers (2 bytes: F16, 4: F32) are finite. */
bool gfl_all_finite(const uint8_t *data, int64_t n, int bytes);

#endif
