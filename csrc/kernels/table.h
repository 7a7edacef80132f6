#ifndef GFL_TABLE_H
#define GFL_TABLE_H
#include <stdint.h>

#include "base.h"

/* What one instruction set offers: functions of every quant type. Quantizing works on whole rows because some searches
 * weigh by statistics of a row; dequantizing on a run of n weights, whole blocks. */

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

/* How a type's blocks hold codes and scales, see codecs.h. Types without stochastic rounding have no functions. */
typedef struct {
    void (*scales)(const uint8_t *src, int n, float *s, float *o);
    void (*codes)(const uint8_t *src, int n, int8_t *q);
    void (*pack)(uint8_t *dst, int n, const int8_t *q);
    int group;             /* weights under one s and o */
    float low, high, step; /* the lowest and the highest level, and the mean distance between levels */
    const float *levels;   /* 16 of them, ascending (the last may be unused); NULL where a code is its level */
    int n_levels;
    struct {
        uint8_t at, bytes;
    } header[2];        /* where a block's scales lie: up to two runs of bytes */
    int halves;         /* of them are in half precision, factors of all s, and of all o if there are two */
    uint8_t half_at[2]; /* where these lie */
} gfl_block_codec;

/* How the blocks of a codebook type hold points and signs, see codebook_codecs.h. Other types have no functions. */
typedef struct {
    void (*scales)(const uint8_t *src, float *s);
    void (*points)(const uint8_t *src, uint16_t *points, uint8_t *signs);
    void (*pack)(uint8_t *dst, const uint16_t *points, const uint8_t *signs);
    int codebook;         /* CODEBOOK_IQ2_XXS, ... */
    int dims, group;      /* weights in a vector; weights under one scale */
    float step, shortest; /* the mean distance between levels; the distance between the nearest points */
} gfl_codebook_codec;

/* What stochastic rounding does to vectors of a block: its expected squared error; the sum of delta times what is lost
 * of it on average; the sum of delta^2. */
typedef struct {
    double cost, lost, squares;
} gfl_codebook_sums;

/* What stochastic rounding does to up to CHUNK weights, by group: the sum of delta^2; the expected cost of rounding;
 * the part of it that comes from weights beyond the lowest or highest level; the sum of delta times what lies beyond;
 * and whether the delta is too small to round to nearest (or 0). */
typedef struct {
    float squares[CHUNK_GROUPS], cost[CHUNK_GROUPS], clip[CHUNK_GROUPS], lost[CHUNK_GROUPS];
    uint8_t small[CHUNK_GROUPS];
    int safe; /* no target can be infinite or NaN */
} gfl_measure;

typedef struct {
    float gain;   /* factor of delta */
    uint64_t key; /* of the row, see gfl_row_key */
} gfl_dither_key;

/* Part of a row that is to be rounded, at most CHUNK weights. */
typedef struct {
    const uint8_t *src; /* the base's blocks */
    uint8_t *dst;       /* blocks with the scales to write */
    const float *delta;
    const uint8_t *keeps_base_scales; /* by group: dst has the scales of src */
    int64_t column;                   /* of the first weight */
    int n;
} gfl_chunk;

/* Calibrated rounding (search_codes.h): DIRECTIONS of the inputs, and KEPT directions of the outputs. */
enum { DIRECTIONS = 64, KEPT = 4 };

typedef struct {
    const gfl_block_codec *codec;
    const float *v, *columns; /* (DIRECTIONS, n_in), and (n_in, DIRECTIONS) */
    const float *d, *inverse; /* (n_in): d, and 1 / (sum of v^2 + d) */
    float *p, *q;             /* U^T E V (KEPT, DIRECTIONS), U^T E (KEPT, n_in) */
    int64_t n_in;
    float least_step;        /* distance of the nearest levels */
    int weights, bytes;      /* of a block */
    const float *group_sums; /* (n_groups, DIRECTIONS): sums of columns */
    /* scratch of calibrated_scales.h for a row: see scale_fit; s and o by group; its blocks */
    float *fit_y, *fit_shift, *fit_scales;
    double *fit_inverse, *fit_right;
    uint8_t *fit_blocks;
} gfl_search_state;

typedef struct {
    int8_t *codes;       /* (n_in) */
    float *s, *o;        /* by group */
    const float *target; /* (n_in) */
    const float *u;      /* (KEPT) */
    float *ev;           /* (DIRECTIONS): e V */
} gfl_search_row;

/* The bits of infinity; those of a NaN are above them. */
#define GFL_INFINITE 0x7f800000u

typedef struct {
    /* The largest absolute value of x[0..n) as the bits of a float; at least GFL_INFINITE if any is NaN or infinite. */
    uint32_t (*largest)(const float *x, int64_t n);
    /* out (n_rows, n_in) = b (n_rows, rank) @ a (rank, n_in) */
    void (*product)(float *out, const float *a, const float *b, int64_t n_rows, int64_t n_in, int64_t rank);
    void (*add)(float *out, const float *x, const float *y, int64_t n);
    /* sketch (n_in, 64) += the sum over rows of x (x^T omega); n_in is a multiple of 8 */
    void (*add_to_sketch)(float *sketch, const float *const *rows, int64_t n_rows, const float *omega, int64_t n_in);
    /* Functions of dither.h, on n <= CHUNK weights. Under the blocks' own scales; and under those of new headers, given
     * the targets and the squares of m: */
    void (*measure)(gfl_measure *m, const gfl_block_codec *codec, const uint8_t *src, const float *delta, int n);
    void (*measure_target)(gfl_measure *m, const gfl_block_codec *codec, const uint8_t *header, const float *target,
                           const float *delta, int n);
    /* Writes dst's codes and adds to a row's sums (enum gfl_sum); returns whether no target can be infinite or NaN. */
    int (*dither)(double *sums, const gfl_block_codec *codec, const gfl_chunk *chunk, const gfl_dither_key *row);
    int64_t (*clipped)(const gfl_block_codec *codec, const uint8_t *dst, const float *target, int n);
    void (*four_dots)(double *sums, const float *dq, const float *delta, const float *target, const float *written,
                      int64_t n);
    /* Functions of dither_codebook.h, on one block; rest: the wanted weights less those that the block has. Of every
     * `step`th vector: */
    void (*measure_codebook)(gfl_codebook_sums *sums, const gfl_codebook_codec *codec, const uint8_t *block,
                             const float *rest, const float *delta, int first, int step);
    void (*dither_codebook)(const gfl_codebook_codec *codec, uint8_t *block, const float *rest, uint64_t row_key,
                            int64_t column);
    /* One pass of search_codes.h over a row; returns the moves made. */
    int64_t (*search_row)(const gfl_search_state *state, const gfl_search_row *row, float limit);
    /* Fits the halves of its blocks, calibrated_scales.h; returns how many moved. */
    int64_t (*search_scales)(const gfl_search_state *state, const gfl_search_row *row, uint8_t *blocks);
    gfl_pair types[GFL_N_TYPES];
    const gfl_block_codec *block_codecs;
    const gfl_codebook_codec *codebook_codecs;
} gfl_table;

extern const gfl_table gfl_scalar, gfl_avx2, gfl_avx512, gfl_neon;

#endif
