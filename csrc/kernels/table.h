#ifndef GFL_TABLE_H
#define GFL_TABLE_H
#include <stdint.h>

#include "base.h"

/* What one instruction set offers. Quantize works on whole rows because some searches weigh by row statistics;
 * dequantize on a run of n weights (a whole number of blocks). */

typedef void quantize_fn(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix);
typedef void dequantize_fn(const uint8_t *src, float *out, int64_t n);

typedef struct {
    quantize_fn *quantize;
    dequantize_fn *dequantize;
} gfl_pair;

enum {
#define GFL_TYPE(name, id, weights, block, needs_imatrix) GFL_##name,
#include "../types.def"
#undef GFL_TYPE
    GFL_N_TYPES
};

/* A type's blocks as codes on grids, see codecs.h. Types that cannot be rounded with dither have no functions. */
typedef struct {
    void (*scales)(const uint8_t *src, int n, float *s, float *o);
    void (*codes)(const uint8_t *src, int n, int8_t *q);
    void (*pack)(uint8_t *dst, int n, const int8_t *q);
    int group;             /* weights under one s and o */
    float low, high, step; /* the lowest and the highest level, and the mean distance between neighbours */
    const float *levels;   /* 16 of them, ascending (the last may be unused); NULL where a code is its level */
    int n_levels;
    struct {
        uint8_t at, bytes;
    } header[2];
} gfl_view;

/* The blocks of a grid type as points and signs, see codebook_codecs.h. Other types have no functions. */
typedef struct {
    void (*scales)(const uint8_t *src, float *s);
    void (*points)(const uint8_t *src, uint16_t *points, uint8_t *signs);
    void (*put)(uint8_t *dst, const uint16_t *points, const uint8_t *signs);
    int grid, dims, group; /* weights in a vector; weights under one scale */
    float step, shortest;  /* the mean distance between neighbouring levels; length of the shortest move */
} gfl_vector_view;

/* What dither_codebook.h finds out about vectors of a block: their expected squared error; the sum of delta times what
 * they lose of the change on average; and of delta^2. */
typedef struct {
    double cost, lost, squares;
} gfl_vector_sums;

/* What dither.h finds out about up to CHUNK weights: per group of them the sum of delta^2; the expected cost of
 * rounding; the part of it that lies beyond the grid; the sum of delta times what lies beyond; and whether dither is
 * the way there (or delta is 0). */
typedef struct {
    float squares[CHUNK_GROUPS], cost[CHUNK_GROUPS], clip[CHUNK_GROUPS], lost[CHUNK_GROUPS];
    uint8_t weak[CHUNK_GROUPS];
    int safe; /* no target can be infinite or NaN */
} gfl_measure;

typedef struct {
    float gain;
    uint64_t key; /* of the row */
} gfl_dither_key;

typedef struct {
    /* largest absolute value of x[0..n) as the bits of a float; >= 0x7f800000 if any is NaN or infinite */
    uint32_t (*largest)(const float *x, int64_t n);
    /* out (n_rows, n_in) = b (n_rows, rank) @ a (rank, n_in) */
    void (*product)(float *out, const float *a, const float *b, int64_t n_rows, int64_t n_in, int64_t rank);
    void (*add)(float *out, const float *x, const float *y, int64_t n);
    /* Functions of dither.h on n <= CHUNK weights. Of blocks on their own grids, and on those of new headers (given
     * their targets and m's squares): */
    void (*measure)(gfl_measure *m, const gfl_view *view, const uint8_t *src, const float *delta, int n);
    void (*measure_target)(gfl_measure *m, const gfl_view *view, const uint8_t *header, const float *target,
                           const float *delta, int n);
    /* writes dst's codes and adds to a row's sums (enum gfl_sum); returns whether no target can be infinite or NaN */
    int (*dither)(double *sums, const gfl_view *view, const uint8_t *src, uint8_t *dst, const float *delta,
                  const uint8_t *own, const gfl_dither_key *row, int64_t column, int n);
    int64_t (*clipped)(const gfl_view *view, const uint8_t *dst, const float *target, int n);
    void (*four_dots)(double *sums, const float *dq, const float *delta, const float *target, const float *written,
                      int64_t n);
    /* Functions of dither_codebook.h on one block; rest: the wanted weights less those that the block has. Of every
     * `step`th vector: */
    void (*measure_vectors)(gfl_vector_sums *sums, const gfl_vector_view *view, const uint8_t *block, const float *rest,
                            const float *delta, int first, int step);
    void (*dither_vectors)(const gfl_vector_view *view, uint8_t *block, const float *rest, uint64_t row_key,
                           int64_t column);
    gfl_pair types[GFL_N_TYPES];
    const gfl_view *views;
    const gfl_vector_view *vector_views;
} gfl_table;

extern const gfl_table gfl_scalar, gfl_avx2, gfl_avx512, gfl_neon;

#endif
