#ifndef GFL_TABLE_H
#define GFL_TABLE_H
#include <stdint.h>

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

/* A type's blocks as codes on grids, see views.h. Types that cannot be rounded with dither have no functions. */
typedef struct {
    void (*scales)(const uint8_t *src, int n, float *s, float *o);
    void (*codes)(const uint8_t *src, int n, int8_t *q);
    void (*pack)(uint8_t *dst, int n, const int8_t *q);
    int group, low, high; /* weights under one s and o; the lowest and the highest code */
    struct {
        uint8_t at, bytes;
    } header[2];
} gfl_view;

/* What dither.h finds out about up to 256 weights; per group of them the sum of delta^2, the expected cost of rounding on the
 * base's grid, the part of it that lies beyond that grid, and whether dither is the way there (or there is no delta). */
typedef struct {
    float target[256], moved[256]; /* dq + delta; s * t - o - dq with t within the limits */
    float squares[16], cost[16], clip[16];
    uint8_t weak[16];
    int finite; /* all targets are */
} gfl_measure;

typedef struct {
    float gain;
    uint64_t row; /* the row's key */
} gfl_dither_key;

typedef struct {
    float dq[256], target[256], written[256];
    int64_t clipped;
    int finite;
} gfl_dithered;

typedef struct {
    /* largest absolute value of x[0..n) as the bits of a float; >= 0x7f800000 if any is NaN or infinite */
    uint32_t (*largest)(const float *x, int64_t n);
    /* out (n_rows, n_in) = b (n_rows, rank) @ a (rank, n_in) */
    void (*product)(float *out, const float *a, const float *b, int64_t n_rows, int64_t n_in, int64_t rank);
    void (*add)(float *out, const float *x, const float *y, int64_t n);
    /* the functions of dither.h that end in these names */
    void (*measure)(gfl_measure *m, const gfl_view *view, const uint8_t *src, const float *delta, int n);
    void (*cost)(float *cost, const gfl_view *view, const uint8_t *header, const float *target, const float *squares, int n);
    void (*move)(float *moved, const gfl_view *view, const uint8_t *src, const uint8_t *dst, const uint8_t *own,
                 const float *delta, int n);
    void (*dither)(gfl_dithered *d, const gfl_view *view, const uint8_t *src, uint8_t *dst, const float *delta,
                   const uint8_t *own, const gfl_dither_key *key, int64_t column, int n);
    int64_t (*clipped)(const gfl_view *view, const uint8_t *dst, const float *target, int n);
    void (*two_dots)(double *sums, const float *x, const float *y, int n);
    void (*four_dots)(double *sums, const float *dq, const float *delta, const float *target, const float *written, int64_t n);
    gfl_pair types[GFL_N_TYPES];
    const gfl_view *views;
} gfl_table;

extern const gfl_table gfl_scalar, gfl_avx2, gfl_avx512, gfl_neon;

#endif
