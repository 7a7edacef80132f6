/* Runs kernels on requests from stdin, for builds that Python cannot load: other processors, sanitizers. A request is
 * eight int64 (operation, isa, type id, rows, n_in, bytes of the input, bytes of the output, rank), then the input and
 * for operation 1 an imatrix row (n_in floats), for operations 3 and 4 a (rank, n_in) and b (rows, rank), and for
 * operation 5 the arrays of gfl_search with `rank` limits. The answer is the status as int64, then the output. Every
 * buffer has its exact size, so that a sanitizer sees any step outside. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguflora.h"

enum { QUANTIZE, QUANTIZE_MEASURED, DEQUANTIZE, MERGE, DITHER, SEARCH };

static void *read_array(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p || fread(p, 1, bytes, stdin) != bytes) exit(2);
    return p;
}

/* Rounded to nearest, or by both passes of stochastic rounding (gain, key and row as in test_kernel_builds.py). */
static gfl_result change(int64_t operation, int isa, int type, const uint8_t *in, uint8_t *out,
                         const gfl_delta *delta) {
    double *sums = malloc((size_t)(GFL_N_SUMS * delta->n_rows) * sizeof *sums);
    const gfl_draw draw = {1.25f, 99, 7};
    int64_t n_new;
    gfl_result result;
    if (operation == MERGE) {
        result = gfl_merge_rows(isa, type, in, type, out, delta, NULL, sums);
    } else {
        result = gfl_choose_scales(isa, type, in, out, delta, NULL, sums, &n_new);
        if (!result.status) result = gfl_round_stochastic(isa, type, in, out, delta, &draw, sums);
    }
    free(sums);
    return result;
}

static float *read_floats(int64_t n) { return read_array((size_t)n * sizeof(float)); }

/* Calibrated rounding under the scales of `in`. */
static gfl_result search(int isa, int type, const uint8_t *in, uint8_t *out, int64_t n_rows, int64_t n_in,
                         int64_t n_limits) {
    float *target = read_floats(n_rows * n_in), *v = read_floats(GFL_DIRECTIONS * n_in), *d = read_floats(n_in),
          *u = read_floats(n_rows * GFL_KEPT);
    int32_t *order = read_array((size_t)n_rows * sizeof *order);
    float *limits = read_floats(n_limits);
    const gfl_search given = {n_rows, n_in, target, v, d, u, order, limits, n_limits};
    int64_t n_moves;
    const gfl_result result = gfl_search_codes(isa, type, in, out, &given, &n_moves);
    free(target);
    free(v);
    free(d);
    free(u);
    free(order);
    free(limits);
    return result;
}

int main(void) {
    int64_t r[8];
    while (fread(r, sizeof r, 1, stdin) == 1) {
        const int isa = (int)r[1], type = (int)r[2];
        const int64_t n_rows = r[3], n_in = r[4], rank = r[7];
        void *in = read_array((size_t)r[5]);
        uint8_t *out = malloc((size_t)r[6]);
        gfl_result result;
        if (r[0] == DEQUANTIZE) {
            result = gfl_dequantize_rows(isa, type, in, n_rows, n_in, (float *)out);
        } else if (r[0] == MERGE || r[0] == DITHER) {
            float *a = read_array((size_t)(rank * n_in) * sizeof *a),
                  *b = read_array((size_t)(n_rows * rank) * sizeof *b);
            result = change(r[0], isa, type, in, out, &(gfl_delta){n_rows, n_in, a, b, rank, NULL});
            free(a);
            free(b);
        } else if (r[0] == SEARCH) {
            memcpy(out, in, (size_t)r[6]);
            result = search(isa, type, in, out, n_rows, n_in, rank);
        } else {
            float *imatrix = r[0] == QUANTIZE_MEASURED ? read_array((size_t)n_in * sizeof *imatrix) : NULL;
            result = gfl_quantize_rows(isa, type, in, n_rows, n_in, imatrix, out);
            free(imatrix);
        }
        const int64_t status = result.status;
        fwrite(&status, sizeof status, 1, stdout);
        fwrite(out, 1, (size_t)r[6], stdout);
        free(in);
        free(out);
    }
    return 0;
}
