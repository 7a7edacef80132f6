#ifndef GGUFLORA_H
#define GGUFLORA_H
#include <stdint.h>

/* The whole C interface. cffi reads this file as it stands (without the # lines), so it holds plain declarations only.
 *
 * Every function is pure and thread-safe: the instruction set and the quant type are arguments, buffers are the caller's,
 * and a call works on one range of rows. Arrays are C-contiguous; quantized data may lie at any address.
 */

/* One quant type; rows are whole blocks of `block_weights` weights stored in `block_bytes` bytes. */
typedef struct {
    int id; /* ggml's number of the type */
    int block_weights;
    int block_bytes;
    int needs_imatrix; /* ggml refuses to quantize to this type without an importance matrix */
    const char *name;
} gfl_type;

/* What a call came to. `row` and `column` of the offending weight (relative to the call) are set unless all went well. */
typedef struct {
    int64_t row;
    int64_t column;
    int status; /* 0 done, 1 an input is NaN or infinite, 2 the result does not fit the type, 3 unknown type or ISA, 4 no memory */
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

/* dst = quantize(dequantize(src) + b @ a): a is (rank, n_in), b is (n_rows, rank).
 * The product is summed over rank in ascending order, one multiplication and one addition at a time, and then added to the
 * weight; the result depends neither on the instruction set nor on how rows are grouped. */
gfl_result gfl_merge_rows(int isa, int src_type_id, const uint8_t *src, int dst_type_id, uint8_t *dst, int64_t n_rows,
                          int64_t n_in, const float *a, const float *b, int64_t rank);

#endif
