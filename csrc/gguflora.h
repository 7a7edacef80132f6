#ifndef GGUFLORA_H
#define GGUFLORA_H
#include <stdint.h>

/* The whole C interface. cffi reads this file as it stands, without the lines that begin with #, so it holds plain
 * declarations only.
 *
 * Every function is pure and thread-safe: the instruction set and the quant type are arguments, buffers belong to the
 * caller, and a call works on one range of rows. Arrays are C-contiguous; quantized data may lie at any address.
 */

/* One quant type. A row is a whole number of blocks, each `block_weights` weights in `block_bytes` bytes. */
typedef struct {
    int id; /* ggml's number of the type */
    int block_weights;
    int block_bytes;
    int needs_imatrix;       /* ggml refuses to quantize to this type without an importance matrix */
    int supports_stochastic; /* gfl_choose_scales and gfl_round_stochastic know it */
    const char *name;
} gfl_type;

enum gfl_status {
    GFL_DONE,
    GFL_NOT_FINITE, /* an input is NaN or infinite */
    GFL_OVERFLOWS,  /* the result does not fit the type */
    GFL_UNKNOWN,    /* no such type or instruction set here */
    GFL_NO_MEMORY
};

/* What a call came to. */
typedef struct {
    int64_t row; /* place of the offending weight in the call, for GFL_NOT_FINITE and GFL_OVERFLOWS */
    int64_t column;
    int status; /* enum gfl_status */
} gfl_result;

int gfl_type_count(void);
gfl_type gfl_type_at(int index);

/* Instruction sets are numbered from 0; names and numbers are the same on every machine, availability is not. */
int gfl_isa_count(void);
const char *gfl_isa_name(int isa);
int gfl_isa_available(int isa);

/* float (n_rows, n_in) -> blocks; imatrix is float (n_in) or NULL. */
gfl_result gfl_quantize_rows(int isa, int type_id, const float *x, int64_t n_rows, int64_t n_in, const float *imatrix,
                             uint8_t *out);

/* blocks -> float (n_rows, n_in). */
gfl_result gfl_dequantize_rows(int isa, int type_id, const uint8_t *src, int64_t n_rows, int64_t n_in, float *out);

/* What is added to rows (n_rows, n_in): b @ a, or `dense` unless that is NULL. The product is summed over rank in
 * ascending order, one multiplication and one addition at a time; neither it nor anything made from it depends on the
 * instruction set or on how rows are grouped. */
typedef struct {
    int64_t n_rows;
    int64_t n_in;
    const float *a; /* (rank, n_in) */
    const float *b; /* (n_rows, rank) */
    int64_t rank;
    const float *dense; /* (n_rows, n_in) */
} gfl_delta;

/* Below, W = dequantize(src), W' = dequantize(dst), and sums are one row's in double, summed in a fixed order. */

/* Columns of the sums of written rows. */
enum gfl_sum {
    GFL_WEIGHT2, /* |W|^2 */
    GFL_DELTA2,  /* |delta|^2 */
    GFL_MOVED,   /* <W' - W, delta> */
    GFL_ERROR2,  /* |W' - (W + delta)|^2 */
    GFL_CLIPPED, /* weights of W + delta outside of the range of the written scales; 0 for floats and codebook types */
    GFL_N_SUMS
};

/* Columns of the sums of gfl_choose_scales, X being W + delta limited to the range of the scales. */
enum gfl_reach {
    GFL_REACHED, /* <X - W, delta> */
    GFL_WANTED,  /* |delta|^2 */
    GFL_N_REACH
};

/* dst = quantize(W + delta), ggml's bytes; dst may be src; sums (n_rows, GFL_N_SUMS). */
gfl_result gfl_merge_rows(int isa, int src_type_id, const uint8_t *src, int dst_type_id, uint8_t *dst,
                          const gfl_delta *delta, const float *imatrix, double *sums);

/* Stochastic rounding, first pass: choose the scales of every block. dst = src, but blocks that can be expected to lose
 * less of W + delta under the scales of quantize(W + delta) get those. Their codes mean nothing yet; those of codebook
 * types (IQ1, IQ2, IQ3) are the codes of quantize(W + delta). Where ggml needs an imatrix and has none, all columns are
 * alike. sums (n_rows, GFL_N_REACH) are estimated from a sample for codebook types; n_new: blocks with new scales. */
gfl_result gfl_choose_scales(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                             const float *imatrix, double *sums, int64_t *n_new);

/* What decides between up and down. Rows are numbered from first_row: that number, the key and the column make the
 * random bits of a weight. */
typedef struct {
    float gain; /* factor of delta */
    uint64_t key;
    int64_t first_row;
} gfl_draw;

/* Stochastic rounding, second pass: dst has its scales (of codebook types also the codes to start from) and gets its
 * codes, such that the expectation of W' over all keys is W + gain * delta as far as the scales reach. sums
 * (n_rows, GFL_N_SUMS). */
gfl_result gfl_round_stochastic(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_delta *delta,
                                const gfl_draw *draw, double *sums);

/* The mean over weights of |s| times the distance of neighbouring levels. Unknown for types without levels. */
gfl_result gfl_mean_step(int isa, int type_id, const uint8_t *src, int64_t n_rows, int64_t n_in, double *mean);

enum { GFL_DIRECTIONS = 64, GFL_KEPT = 4 };

/* Calibrated rounding of a whole matrix: codes that lower tr(E H E^T) + |U^T E|_H^2 for E = W' - target, with second
 * moments H = V^T V + diag(d) of the inputs. */
typedef struct {
    int64_t n_rows;
    int64_t n_in;
    const float *target;  /* (n_rows, n_in) */
    const float *v;       /* (GFL_DIRECTIONS, n_in) */
    const float *d;       /* (n_in) */
    const float *u;       /* (n_rows, GFL_KEPT) */
    const int32_t *order; /* of the rows; each sees the moves of those before it */
    const float *limits;  /* of each pass: only moves that are this many steps or more from their optimum; in a pass
                             of 0 no code moves, but the half-precision numbers of the blocks do */
    int64_t n_limits;
} gfl_search;

/* dst has its scales, which only a pass of 0 changes, and gets its codes. They start from those of src, rounded to
 * nearest where scales are new or delta is 0.35 steps or more; without src from those of dst. Types with uniform or
 * uneven levels only. */
gfl_result gfl_search_codes(int isa, int type_id, const uint8_t *src, uint8_t *dst, const gfl_search *search,
                            int64_t *n_moves);

#endif
