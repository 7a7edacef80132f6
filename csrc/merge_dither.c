/* Adaptive dither over rows: which grid each block gets, and its codes. The arithmetic is in kernels/dither.h. */
#include <stdlib.h>
#include <string.h>

#include "kernels/base.h"
#include "rows.h"
#include "merge_dither_codebook.h"

enum { GROUP_FLOATS = 64 * 1024 };

/* A block keeps its grid without a search if in all of its groups delta is below 0.35 steps, and no more than this
 * share of the cost of rounding lies beyond the grid. On heavy-tailed weights with changes of 0.5 to 20 % of them,
 * searching every block would lower the expected cost of those skipped here by 0.1 to 1 % (K-quants; to 4 % for blocks
 * of 32). */
static const double CLIPPED_SHARE = 0.1;

/* What a call works on. */
typedef struct {
    const gfl_table *table;
    const gfl_block_codec *codec;
    quantize_fn *quantize;
    dequantize_fn *dequantize;
    int64_t n_in, row_bytes;
    int weights, bytes; /* of a block */
} job;

static int begin(job *j, int isa, int type_id, int64_t n_in) {
    const int type = gfl_index_of(type_id);
    const gfl_table *table = gfl_table_of(isa);
    if (!table || type < 0 || !table->block_codecs[type].pack) return 0;
    const gfl_type t = gfl_type_at(type);
    *j = (job){table,
               &table->block_codecs[type],
               table->types[type].quantize,
               table->types[type].dequantize,
               n_in,
               n_in / t.block_weights * t.block_bytes,
               t.block_weights,
               t.block_bytes};
    return 1;
}

static int chunk_at(const job *j, int64_t column) { return (int)(j->n_in - column < CHUNK ? j->n_in - column : CHUNK); }

/* The targets dq + delta of a chunk. */
static void find_target(float *target, const job *j, const uint8_t *src, const float *delta, int n) {
    j->dequantize(src, target, n);
    j->table->add(target, target, delta, n);
}

static gfl_result first_not_finite(const job *j, const uint8_t *src, const float *delta, int n, int64_t row,
                                   int64_t column) {
    float target[CHUNK];
    find_target(target, j, src, delta, n);
    gfl_result result = gfl_first_not_finite(target, 1, n, row, GFL_NOT_FINITE);
    if (result.status) result.column += column;
    return result;
}

static int same_header(const gfl_block_codec *codec, const uint8_t *x, const uint8_t *y) {
    for (int i = 0; i < 2; i++)
        if (memcmp(x + codec->header[i].at, y + codec->header[i].at, codec->header[i].bytes)) return 0;
    return 1;
}

/* own[g] = whether the block of group g has src's header; returns how many blocks do not */
static int find_own(uint8_t *own, const job *j, const uint8_t *src, const uint8_t *dst, int n) {
    const int groups = j->weights / j->codec->group, blocks = n / j->weights;
    int foreign = 0;
    memset(own, 1, (size_t)(blocks * groups));
    if (!memcmp(src, dst, (size_t)(blocks * j->bytes))) return 0;
    for (int b = 0; b < blocks; b++) {
        const int same = same_header(j->codec, src + b * j->bytes, dst + b * j->bytes);
        memset(own + b * groups, same, (size_t)groups);
        foreign += !same;
    }
    return foreign;
}

/* Blocks that may get a new header, gathered so that the search for it fills its vectors. */
enum { GATHERED = 4096 };

typedef struct {
    uint8_t *dst[GATHERED / 32], *dirty[GATHERED / 32]; /* of each block: where it goes, and the mark of its chunk */
    double cost[GATHERED / 32];                         /* on the base's grid */
    float target[GATHERED], delta[GATHERED], imatrix[GATHERED], squares[GATHERED / 16];
    uint8_t found[GATHERED / 32 * 64];
    int n, n_blocks;
} gathered;

static double sum_groups(const float *x, int n) {
    double sum = 0.0;
    for (int g = 0; g < n; g++) sum += (double)x[g];
    return sum;
}

/* Gives the gathered blocks the header of their quantized target where that costs less; returns how many. */
static int64_t settle(gathered *all, const job *j, const float *imatrix) {
    const int groups = j->weights / j->codec->group;
    int64_t n_new = 0;
    if (!all->n) return 0;
    j->quantize(all->target, all->found, 1, all->n, imatrix ? all->imatrix : NULL);
    for (int i = 0; i < all->n; i += CHUNK) {
        const int n = all->n - i < CHUNK ? all->n - i : CHUNK;
        const uint8_t *found = all->found + i / j->weights * j->bytes;
        gfl_measure m;
        memcpy(m.squares, all->squares + i / j->codec->group, (size_t)(n / j->codec->group) * sizeof *m.squares);
        j->table->measure_target(&m, j->codec, found, all->target + i, all->delta + i, n);
        for (int b = 0; b < n / j->weights; b++) {
            const int block = i / j->weights + b;
            if (!(sum_groups(m.cost + b * groups, groups) < all->cost[block])) continue;
            if (same_header(j->codec, found + b * j->bytes, all->dst[block])) continue;
            memcpy(all->dst[block], found + b * j->bytes, (size_t)j->bytes);
            *all->dirty[block] = 1;
            n_new++;
        }
    }
    all->n = all->n_blocks = 0;
    return n_new;
}

/* Whether the block whose first group is g may gain by a new grid. */
static int may_gain(const gfl_measure *m, int g, int groups, double cost) {
    int weak = 1;
    for (int i = g; i < g + groups; i++) weak &= m->small[i];
    return cost > 0.0 && (!weak || sum_groups(m->clip + g, groups) > CLIPPED_SHARE * cost);
}

static void gather(gathered *all, const job *j, const gfl_measure *m, const float *target, const float *delta,
                   const float *imatrix, int block, double cost, uint8_t *dst, uint8_t *dirty) {
    const int groups = j->weights / j->codec->group, at = block * j->weights;
    memcpy(all->target + all->n, target + at, (size_t)j->weights * sizeof *all->target);
    memcpy(all->delta + all->n, delta + at, (size_t)j->weights * sizeof *all->delta);
    if (imatrix) memcpy(all->imatrix + all->n, imatrix + at, (size_t)j->weights * sizeof *imatrix);
    memcpy(all->squares + all->n / j->codec->group, m->squares + block * groups, (size_t)groups * sizeof *all->squares);
    all->cost[all->n_blocks] = cost;
    all->dst[all->n_blocks] = dst;
    all->dirty[all->n_blocks++] = dirty;
    all->n += j->weights;
}

/* The columns of enum gfl_reach. */
static void sum_measure(double *sums, const gfl_measure *m, int n_groups) {
    sums[GFL_REACHED] = sums[GFL_WANTED] = 0.0;
    for (int g = 0; g < n_groups; g++) {
        sums[GFL_REACHED] += (double)m->squares[g] - (double)m->lost[g];
        sums[GFL_WANTED] += (double)m->squares[g];
    }
}

/* Gathers the measured blocks of a chunk that may gain; returns how many got a new header because the gathered ones
 * were full. */
static int64_t gather_chunk(gathered *all, const job *j, const gfl_measure *m, const uint8_t *src, uint8_t *dst,
                            const float *delta, const float *imatrix, int n, uint8_t *dirty) {
    const int groups = j->weights / j->codec->group;
    float target[CHUNK];
    int64_t n_new = 0;
    int known = 0;
    for (int b = 0; b < n / j->weights; b++) {
        const double cost = sum_groups(m->cost + b * groups, groups);
        if (!may_gain(m, b * groups, groups, cost)) continue;
        if (!known) find_target(target, j, src, delta, n);
        known = 1;
        if (all->n + j->weights > GATHERED) n_new += settle(all, j, imatrix);
        gather(all, j, m, target, delta, imatrix, b, cost, dst + b * j->bytes, dirty);
    }
    return n_new;
}

/* The sums of a chunk some of whose blocks have a new header. */
static void sum_changed(double *sums, const job *j, const uint8_t *src, const uint8_t *dst, const float *delta, int n) {
    uint8_t own[CHUNK_GROUPS];
    float target[CHUNK];
    gfl_measure old, new;
    find_own(own, j, src, dst, n);
    find_target(target, j, src, delta, n);
    j->table->measure(&old, j->codec, src, delta, n);
    memcpy(new.squares, old.squares, sizeof new.squares);
    j->table->measure_target(&new, j->codec, dst, target, delta, n);
    for (int g = 0; g < n / j->codec->group; g++)
        if (!own[g]) old.lost[g] = new.lost[g];
    sum_measure(sums, &old, n / j->codec->group);
}

typedef struct {
    float *delta;
    double *sums;   /* (chunks of a group of rows, GFL_N_REACH) */
    uint8_t *dirty; /* of each chunk: a block of it has a new header */
    gathered all;
} fit_room;

static gfl_result fit_group(const job *j, fit_room *room, const uint8_t *src, uint8_t *dst, int64_t n_rows,
                            const float *delta, const float *imatrix, int64_t row, double *sums, int64_t *n_new) {
    const int64_t chunks = (j->n_in + CHUNK - 1) / CHUNK;
    memcpy(dst, src, (size_t)(n_rows * j->row_bytes));
    memset(room->dirty, 0, (size_t)(n_rows * chunks));
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t c = 0; c < chunks; c++) {
            const int64_t column = c * CHUNK, at = r * j->row_bytes + column / j->weights * j->bytes,
                          k = r * chunks + c;
            const float *x = delta + r * j->n_in + column;
            const int n = chunk_at(j, column);
            gfl_measure m;
            j->table->measure(&m, j->codec, src + at, x, n);
            if (!m.safe) {
                const gfl_result result = first_not_finite(j, src + at, x, n, row + r, column);
                if (result.status) return result;
            }
            sum_measure(room->sums + GFL_N_REACH * k, &m, n / j->codec->group);
            *n_new += gather_chunk(&room->all, j, &m, src + at, dst + at, x, imatrix ? imatrix + column : NULL, n,
                                   room->dirty + k);
        }
        if (imatrix)
            *n_new += settle(&room->all, j, imatrix); /* some searches weigh by means over the row they are given */
    }
    *n_new += settle(&room->all, j, imatrix);
    for (int64_t r = 0; r < n_rows; r++) {
        double *row_sums = sums + GFL_N_REACH * r;
        row_sums[GFL_REACHED] = row_sums[GFL_WANTED] = 0.0;
        for (int64_t c = 0; c < chunks; c++) {
            const int64_t column = c * CHUNK, at = r * j->row_bytes + column / j->weights * j->bytes,
                          k = r * chunks + c;
            if (room->dirty[k])
                sum_changed(room->sums + GFL_N_REACH * k, j, src + at, dst + at, delta + r * j->n_in + column,
                            chunk_at(j, column));
            row_sums[GFL_REACHED] += room->sums[GFL_N_REACH * k + GFL_REACHED];
            row_sums[GFL_WANTED] += room->sums[GFL_N_REACH * k + GFL_WANTED];
        }
    }
    return done;
}

gfl_result gfl_choose_scales(int isa, int type_id, const uint8_t *src, uint8_t *dst, int64_t n_rows, int64_t n_in,
                             const gfl_delta *delta, const float *imatrix, double *sums, int64_t *n_new) {
    job j;
    *n_new = 0;
    if (gfl_uses_codebook(type_id))
        return gfl_choose_codebook_scales(isa, type_id, src, dst, n_rows, n_in, delta, imatrix, sums, n_new);
    if (!begin(&j, isa, type_id, n_in)) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS), chunks = group * ((n_in + CHUNK - 1) / CHUNK);
    fit_room *room = malloc(sizeof *room);
    float *floats = malloc((size_t)(group * n_in) * sizeof *floats);
    double *doubles = malloc((size_t)(GFL_N_REACH * chunks) * sizeof *doubles);
    uint8_t *dirty = malloc((size_t)chunks);
    gfl_result result = room && floats && doubles && dirty ? done : no_memory;
    if (!result.status) {
        room->delta = floats;
        room->sums = doubles;
        room->dirty = dirty;
        room->all.n = room->all.n_blocks = 0;
    }
    for (int64_t row = 0; row < n_rows && !result.status; row += group) {
        const int64_t rows = n_rows - row < group ? n_rows - row : group;
        const float *change = gfl_delta_rows(j.table, delta, floats, row, rows, n_in);
        result = fit_group(&j, room, src + row * j.row_bytes, dst + row * j.row_bytes, rows, change, imatrix, row,
                           sums + GFL_N_REACH * row, n_new);
    }
    free(dirty);
    free(doubles);
    free(floats);
    free(room);
    return result;
}

static int is_zero(const float *x, int n) {
    for (int i = 0; i < n; i++)
        if (x[i] != 0.0f) return 0;
    return 1;
}

/* Blocks without a change are the base's own; returns whether there are any. */
static int restore_unchanged(const job *j, const uint8_t *src, uint8_t *dst, const float *delta, int n) {
    int any = 0;
    for (int b = 0; b < n / j->weights; b++) {
        if (!is_zero(delta + b * j->weights, j->weights)) continue;
        memcpy(dst + b * j->bytes, src + b * j->bytes, (size_t)j->bytes);
        any = 1;
    }
    return any;
}

static gfl_result dither_row(const job *j, const uint8_t *src, uint8_t *dst, const float *delta,
                             const gfl_dither_key *key, int64_t row, double *sums) {
    memset(sums, 0, GFL_N_SUMS * sizeof *sums);
    for (int64_t column = 0; column < j->n_in; column += CHUNK) {
        const int n = chunk_at(j, column);
        const int64_t at = column / j->weights * j->bytes;
        const float *x = delta + column;
        uint8_t own[CHUNK_GROUPS];
        const int unchanged = restore_unchanged(j, src + at, dst + at, x, n);
        find_own(own, j, src + at, dst + at, n);
        if (!j->table->dither(sums, j->codec, src + at, dst + at, x, own, key, column, n)) {
            const gfl_result result = first_not_finite(j, src + at, x, n, row, column);
            if (result.status) return result;
        }
        if (unchanged) restore_unchanged(j, src + at, dst + at, x, n);
    }
    return done;
}

gfl_result gfl_round_stochastic(int isa, int type_id, const uint8_t *src, uint8_t *dst, int64_t n_rows, int64_t n_in,
                                const gfl_delta *delta, float gain, uint64_t key, int64_t first_row, double *sums) {
    job j;
    if (gfl_uses_codebook(type_id))
        return gfl_round_codebook_stochastic(isa, type_id, src, dst, n_rows, n_in, delta, gain, key, first_row, sums);
    if (!begin(&j, isa, type_id, n_in)) return unknown;
    if (n_rows <= 0 || n_in <= 0) return done;
    const int64_t group = gfl_rows_per_group(n_in, n_rows, GROUP_FLOATS);
    float *room = malloc((size_t)(group * n_in) * sizeof *room);
    if (!room) return no_memory;
    gfl_result result = done;
    for (int64_t first = 0; first < n_rows && !result.status; first += group) {
        const int64_t last = n_rows - first < group ? n_rows : first + group;
        const float *change = gfl_delta_rows(j.table, delta, room, first, last - first, n_in);
        for (int64_t row = first; row < last && !result.status; row++) {
            const gfl_dither_key row_key = {gain, gfl_row_key(key, first_row + row)};
            result = dither_row(&j, src + row * j.row_bytes, dst + row * j.row_bytes, change + (row - first) * n_in,
                                &row_key, row, sums + GFL_N_SUMS * row);
        }
    }
    free(room);
    return result;
}
