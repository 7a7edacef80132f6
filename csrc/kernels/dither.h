#ifndef GFL_DITHER_H
#define GFL_DITHER_H
#include <float.h>

#include "../gguflora.h"
#include "base.h"
#include "lanes.h"
#include "table.h"

/* Stochastic rounding of `dq + delta` to levels w = s * q - o: on average nothing of delta is lost, where rounding to
 * the nearest level would lose every delta smaller than half a step. Dither is the random number that is added before
 * rounding down. All functions work on up to CHUNK weights at once ("a chunk"), through the codecs of codecs.h.
 *
 *   t = q + delta / s          under the block's own scales, q its code: where delta is 0 the code stays
 *   t = (dq + delta + o) / s   under other scales
 *   q' = floor(t) + (u < t - floor(t)), t limited to the range of levels before, u uniform in [0, 1)
 *
 * 1 / s is rounded, and multiplied by; it is 0 where s is less than the smallest normal float, so that a code stays, or
 * is 0. Groups whose delta is 0.35 steps or more (root mean square) are rounded to nearest; halves to even, among
 * uneven levels down.
 *
 * Sums over a group or chunk run in 16 lanes, weight i in lane i % 16, then lanes 8, 4, 2, 1 apart; so every ISA has
 * the same bits. */

enum { PARTS = 16 / LANES };

/* Deltas, steps and offsets below this cannot lead to infinities. */
#define SAFE 1e30f

typedef struct {
    float s[16], o[16], inverse[16];
} chunk_scales;

/* Returns whether no level can overflow in what follows. */
static int read_scales(chunk_scales *c, const gfl_block_codec *codec, const uint8_t *src, int n) {
    int safe = 1;
    codec->scales(src, n, c->s, c->o);
    for (int g = 0; g < n / codec->group; g++) {
        const float size = fabsf(c->s[g]);
        c->inverse[g] = size >= FLT_MIN ? 1.0f / c->s[g] : 0.0f;
        safe &= (size < SAFE) & (fabsf(c->o[g]) < SAFE);
    }
    return safe;
}

INLINE vf fold_parts(vf *parts) {
    for (int n = PARTS / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) parts[i] = vf_add(parts[i], parts[i + n]);
    return parts[0];
}

INLINE void add_part(vf *parts, int i, vf v) { parts[(i / LANES) % PARTS] = vf_add(parts[(i / LANES) % PARTS], v); }

INLINE void clear_parts(vf *parts) {
    for (int i = 0; i < PARTS; i++) parts[i] = vf_zero();
}

/* sums[0..n_rows) of rows of LANES floats, n_rows a multiple of LANES. */
INLINE void finish_rows(float *sums, const float *rows, int n_rows) {
    for (int r = 0; r < n_rows; r += LANES) vf_store(sums + r, vf_row_sums(rows + r * LANES));
}

/* Compares the sum of delta^2 with n (0.35 steps)^2: from there on the noise of stochastic rounding does more harm than
 * what rounding to nearest loses. */
static inline int rounds_to_nearest(float squares, float s, const gfl_block_codec *codec) {
    const float step = s * codec->step;
    return squares >= 0.1225f * (float)codec->group * (step * step);
}

INLINE vf limited(vf t, vf low, vf high) { return vf_max(vf_min(t, high), low); }

/* `leveled`: codes are places in codec->levels, and q, t, floor(t) + 1 above stand for levels and the next one. */

INLINE vf level_at(const gfl_block_codec *codec, const int8_t *codes, const int leveled) {
    const vi code = vi_load_i8(codes);
    return leveled ? vf_pick16(codec->levels, code) : vi_to_vf(code);
}

/* The place of the last level (but one) that is not above t, and the share of the gap to the next one that lies below
 * t. */
typedef struct {
    vi place;
    vf gap, share;
} cell;

INLINE cell find_cell(const gfl_block_codec *codec, vf t) {
    vi place = vi_set1(0);
    for (int i = 1; i < codec->n_levels - 1; i++) place = vi_count(place, vf_le(vf_set1(codec->levels[i]), t));
    const vf below = vf_pick16(codec->levels, place);
    const vf gap = vf_sub(vf_pick16(codec->levels, vi_add(place, vi_set1(1))), below);
    return (cell){place, gap, vf_div(vf_sub(t, below), gap)};
}

/* Expected squared error of unbiased rounding, or of rounding to nearest. */
INLINE vf rounding_error(const gfl_block_codec *codec, vf t, const int to_nearest, const int leveled) {
    const cell c = leveled ? find_cell(codec, t) : (cell){vi_set1(0), vf_set1(1.0f), vf_sub(t, vf_floor(t))};
    const vf rest = vf_sub(vf_set1(1.0f), c.share), least = vf_min(c.share, rest);
    const vf error = to_nearest ? vf_mul(least, least) : vf_mul(c.share, rest);
    return leveled ? vf_mul(vf_mul(c.gap, c.gap), error) : error;
}

/* What is summed over every group: delta^2; the error of rounding; what lies beyond the range, squared; the same times
 * delta. */
enum { SQUARES, ROUNDING, BEYOND, LOST, N_SUMS };

/* From sums in steps to sums in weights. Without a step, what lies beyond the range is in weights already. */
INLINE void finish_costs(gfl_measure *m, const float *sums, const chunk_scales *c, int n_groups, int slots) {
    for (int g = 0; g < n_groups; g++) {
        const int flat = c->inverse[g] == 0.0f;
        const float s = flat ? 1.0f : c->s[g], rounding = flat ? 0.0f : s * s * sums[ROUNDING * slots + g];
        m->squares[g] = sums[SQUARES * slots + g];
        m->clip[g] = s * s * sums[BEYOND * slots + g];
        m->lost[g] = s * sums[LOST * slots + g];
        m->cost[g] = rounding + m->clip[g];
    }
}

/* Sums a group again that is rounded to nearest, or has no step. */
INLINE void measure_again(float *rows, const gfl_block_codec *codec, const int8_t *codes, const float *delta,
                          const chunk_scales *c, int g, const int group, const int leveled) {
    const vf low = vf_set1(codec->low), high = vf_set1(codec->high);
    const vf s = vf_set1(c->s[g]), o = vf_set1(c->o[g]), inverse = vf_set1(c->inverse[g]);
    vf rounding[PARTS], beyond[PARTS], lost[PARTS];
    const int flat = c->inverse[g] == 0.0f;
    clear_parts(rounding), clear_parts(beyond), clear_parts(lost);
    for (int i = 0; i < group; i += LANES) {
        const vf q = level_at(codec, codes + i, leveled), x = vf_load(delta + i);
        const vf t = vf_add(q, vf_mul(x, inverse)), inside = limited(t, low, high);
        const vf outside = flat ? vf_add(vf_add(vf_sub(vf_mul(s, q), o), x), o) : vf_sub(t, inside);
        add_part(rounding, i, rounding_error(codec, inside, 1, leveled));
        add_part(beyond, i, vf_mul(outside, outside));
        add_part(lost, i, vf_mul(outside, x));
    }
    const int slots = CHUNK / group;
    vf_store(rows + (ROUNDING * slots + g) * LANES, fold_parts(rounding));
    vf_store(rows + (BEYOND * slots + g) * LANES, fold_parts(beyond));
    vf_store(rows + (LOST * slots + g) * LANES, fold_parts(lost));
}

INLINE void measure(gfl_measure *m, const gfl_block_codec *codec, const uint8_t *src, const float *delta, int n,
                    const int group, const int leveled) {
    const int slots = CHUNK / group, n_groups = n / group;
    const vf low = vf_set1(codec->low), high = vf_set1(codec->high);
    float rows[N_SUMS * CHUNK / 16 * LANES], sums[N_SUMS * CHUNK / 16];
    chunk_scales c;
    int8_t codes[CHUNK];
    int again = 0;
    m->safe = read_scales(&c, codec, src, n);
    codec->codes(src, n, codes);
    if (n < CHUNK) memset(rows, 0, sizeof rows);
    for (int g = 0; g < n_groups; g++) {
        const vf inverse = vf_set1(c.inverse[g]);
        vf squares[PARTS], rounding[PARTS], beyond[PARTS], lost[PARTS];
        clear_parts(squares), clear_parts(rounding), clear_parts(beyond), clear_parts(lost);
        for (int i = 0; i < group; i += LANES) {
            const vf q = level_at(codec, codes + g * group + i, leveled), x = vf_load(delta + g * group + i);
            const vf t = vf_add(q, vf_mul(x, inverse)), inside = limited(t, low, high), outside = vf_sub(t, inside);
            add_part(squares, i, vf_mul(x, x));
            add_part(rounding, i, rounding_error(codec, inside, 0, leveled));
            add_part(beyond, i, vf_mul(outside, outside));
            add_part(lost, i, vf_mul(outside, x));
        }
        vf_store(rows + (SQUARES * slots + g) * LANES, fold_parts(squares));
        vf_store(rows + (ROUNDING * slots + g) * LANES, fold_parts(rounding));
        vf_store(rows + (BEYOND * slots + g) * LANES, fold_parts(beyond));
        vf_store(rows + (LOST * slots + g) * LANES, fold_parts(lost));
    }
    finish_rows(sums, rows, N_SUMS * slots);
    for (int g = 0; g < n_groups; g++) {
        const int to_nearest = rounds_to_nearest(sums[g], c.s[g], codec);
        m->small[g] = !to_nearest || sums[g] == 0.0f;
        m->safe &= sums[g] < SAFE;
        if (!to_nearest && c.inverse[g] != 0.0f) continue;
        measure_again(rows, codec, codes + g * group, delta + g * group, &c, g, group, leveled);
        again = 1;
    }
    if (again) finish_rows(sums, rows, N_SUMS * slots);
    finish_costs(m, sums, &c, n_groups, slots);
}

static void measure_chunk(gfl_measure *m, const gfl_block_codec *codec, const uint8_t *src, const float *delta, int n) {
    const int leveled = codec->levels != NULL;
    if (codec->group == 16 && leveled) measure(m, codec, src, delta, n, 16, 1);
    else if (codec->group == 16) measure(m, codec, src, delta, n, 16, 0);
    else if (leveled) measure(m, codec, src, delta, n, 32, 1);
    else measure(m, codec, src, delta, n, 32, 0);
}

/* The same under new scales, from the targets dq + delta; squares are given. */
INLINE void measure_target(gfl_measure *m, const gfl_block_codec *codec, const uint8_t *header, const float *target,
                           const float *delta, int n, const int group, const int leveled) {
    const int slots = CHUNK / group, n_groups = n / group;
    const vf low = vf_set1(codec->low), high = vf_set1(codec->high);
    float rows[N_SUMS * CHUNK / 16 * LANES] = {0}, sums[N_SUMS * CHUNK / 16];
    chunk_scales c;
    read_scales(&c, codec, header, n);
    for (int g = 0; g < n_groups; g++) {
        const vf o = vf_set1(c.o[g]), inverse = vf_set1(c.inverse[g]);
        const int to_nearest = rounds_to_nearest(m->squares[g], c.s[g], codec), flat = c.inverse[g] == 0.0f;
        vf rounding[PARTS], beyond[PARTS], lost[PARTS];
        clear_parts(rounding), clear_parts(beyond), clear_parts(lost);
        for (int i = 0; i < group; i += LANES) {
            const vf above = vf_add(vf_load(target + g * group + i), o), t = vf_mul(above, inverse);
            const vf inside = limited(t, low, high), outside = flat ? above : vf_sub(t, inside);
            add_part(rounding, i, rounding_error(codec, inside, to_nearest, leveled));
            add_part(beyond, i, vf_mul(outside, outside));
            add_part(lost, i, vf_mul(outside, vf_load(delta + g * group + i)));
        }
        vf_store(rows + (ROUNDING * slots + g) * LANES, fold_parts(rounding));
        vf_store(rows + (BEYOND * slots + g) * LANES, fold_parts(beyond));
        vf_store(rows + (LOST * slots + g) * LANES, fold_parts(lost));
    }
    finish_rows(sums, rows, N_SUMS * slots);
    memcpy(sums + SQUARES * slots, m->squares, (size_t)n_groups * sizeof *sums);
    finish_costs(m, sums, &c, n_groups, slots);
}

static void measure_target_chunk(gfl_measure *m, const gfl_block_codec *codec, const uint8_t *header,
                                 const float *target, const float *delta, int n) {
    const int leveled = codec->levels != NULL;
    if (codec->group == 16 && leveled) measure_target(m, codec, header, target, delta, n, 16, 1);
    else if (codec->group == 16) measure_target(m, codec, header, target, delta, n, 16, 0);
    else if (leveled) measure_target(m, codec, header, target, delta, n, 32, 1);
    else measure_target(m, codec, header, target, delta, n, 32, 0);
}

/* How many targets lie beyond the range of the scales of n written weights; without a step, how many are not met. */
static int64_t count_clipped(const gfl_block_codec *codec, const uint8_t *dst, const float *target, int n) {
    const vf low = vf_set1(codec->low), high = vf_set1(codec->high);
    chunk_scales c;
    vi count = vi_set1(0);
    int32_t counts[LANES];
    int64_t sum = 0;
    read_scales(&c, codec, dst, n);
    for (int i = 0; i < n; i += LANES) {
        const int g = i / codec->group;
        const vf above = vf_add(vf_load(target + i), vf_set1(c.o[g])), t = vf_mul(above, vf_set1(c.inverse[g]));
        const int flat = c.inverse[g] == 0.0f;
        count = vi_count(count, flat ? vf_ne(above, vf_zero()) : vf_ne(t, limited(t, low, high)));
    }
    vi_store(counts, count);
    for (int l = 0; l < LANES; l++) sum += counts[l];
    return sum;
}

/* 24 random bits as u in [0, 1): a hash of the column and the row's key, every one of its 64 bits counting. Both
 * multiplications and the first shifts are those of a well-known 32-bit mixer; its last shift would only touch bits
 * that u drops. */
INLINE vf uniform(vi column, vi key_low, vi key_high) {
    vi x = vi_xor(column, key_low);
    x = vi_mul(vi_xor(x, vi_shr(x, 16)), vi_set1(0x7feb352d));
    x = vi_xor(vi_xor(x, vi_shr(x, 15)), key_high);
    x = vi_mul(x, vi_set1((int)0x846ca68bu));
    return vf_mul(vi_to_vf(vi_shr(x, 8)), vf_set1(0x1p-24f));
}

static const int32_t lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Sums of a chunk: weights^2, moved * delta, (moved - delta)^2; and how many weights are clipped. */
typedef struct {
    vf weights[PARTS], moved[PARTS], error[PARTS];
    vi clipped;
} dither_sums;

/* What is the same for all groups of a chunk. */
typedef struct {
    const gfl_block_codec *codec;
    vf gain;
    vi low, high;
} dither_key;

/* The scales of the base and those to write. */
typedef struct {
    chunk_scales base, new;
} scale_pair;

/* Which kind of group dither_group rounds; constants, so that each kind is compiled by itself. */
typedef struct {
    int keeps_scales, to_nearest, group, leveled;
} group_kind;

/* codes[0..group): in, the base's; out, those to write. `column` is that of each lane's first weight. */
INLINE void dither_group(int8_t *codes, dither_sums *sums, const dither_key *key, const float *delta,
                         const scale_pair *scales, int g, vi column, const group_kind kind) {
    const gfl_block_codec *codec = key->codec;
    const vf low = vf_set1(codec->low), high = vf_set1(codec->high);
    const vf s = vf_set1(scales->new.s[g]), o = vf_set1(scales->new.o[g]), inverse = vf_set1(scales->new.inverse[g]);
    const vf s0 = vf_set1(scales->base.s[g]), o0 = vf_set1(scales->base.o[g]), slope = vf_mul(key->gain, inverse);
    const int flat = scales->new.inverse[g] == 0.0f;
    for (int i = 0; i < kind.group; i += LANES, column = vi_add(column, vi_set1(LANES))) {
        const vf q = level_at(codec, codes + i, kind.leveled), x = vf_load(delta + i), dq = vf_sub(vf_mul(s0, q), o0);
        const vf above = kind.keeps_scales ? x : vf_add(vf_add(dq, vf_mul(key->gain, x)), o);
        const vf t = kind.keeps_scales ? vf_add(q, vf_mul(x, slope)) : vf_mul(above, inverse),
                 inside = limited(t, low, high);
        const vf u = kind.to_nearest ? vf_set1(0.5f) : uniform(column, key->low, key->high);
        vf level;
        if (kind.leveled) {
            const cell c = find_cell(codec, inside);
            const vi place = vi_count(c.place, vf_lt(u, c.share));
            level = vf_pick16(codec->levels, place);
            vi_store_u8(codes + i, place);
        } else {
            const vf whole = kind.to_nearest ? vf_round(inside) : vf_floor(inside);
            level = kind.to_nearest ? whole : vf_add_1(whole, vf_lt(u, vf_sub(inside, whole)));
            vi_store_u8(codes + i, vf_truncate(level));
        }
        const vf moved = kind.keeps_scales ? vf_mul(s, vf_sub(level, q)) : vf_sub(vf_sub(vf_mul(s, level), o), dq),
                 error = vf_sub(moved, x);
        sums->clipped = vi_count(sums->clipped, flat ? vf_ne(above, vf_zero()) : vf_ne(t, inside));
        add_part(sums->weights, i, vf_mul(dq, dq));
        add_part(sums->moved, i, vf_mul(moved, x));
        add_part(sums->error, i, vf_mul(error, error));
    }
}

INLINE void sum_squares(float *sums, const float *x, int n, const int group) {
    float rows[16 * LANES];
    if (n / group < 16) memset(rows, 0, sizeof rows);
    for (int g = 0; g < n / group; g++) {
        vf parts[PARTS];
        clear_parts(parts);
        for (int i = 0; i < group; i += LANES) {
            const vf xi = vf_load(x + g * group + i);
            add_part(parts, i, vf_mul(xi, xi));
        }
        vf_store(rows + g * LANES, fold_parts(parts));
    }
    finish_rows(sums, rows, 16);
}

INLINE int finish_dither(double *sums, dither_sums *all, const float *squares, int n_groups) {
    float rows[16 * LANES] = {0}, totals[16];
    int32_t counts[LANES];
    int safe = 1;
    vf_store(rows, fold_parts(all->weights));
    vf_store(rows + LANES, fold_parts(all->moved));
    vf_store(rows + 2 * LANES, fold_parts(all->error));
    finish_rows(totals, rows, LANES < 4 ? 4 : LANES);
    sums[GFL_WEIGHT2] += (double)totals[0];
    for (int g = 0; g < n_groups; g++) sums[GFL_DELTA2] += (double)squares[g];
    for (int g = 0; g < n_groups; g++) safe &= squares[g] < SAFE;
    sums[GFL_MOVED] += (double)totals[1];
    sums[GFL_ERROR2] += (double)totals[2];
    vi_store(counts, all->clipped);
    for (int l = 0; l < LANES; l++) sums[GFL_CLIPPED] += (double)counts[l];
    return safe;
}

INLINE int dither(double *sums, const gfl_block_codec *codec, const gfl_chunk *chunk, const gfl_dither_key *row,
                  const int group, const int leveled) {
    const dither_key key = {codec, vf_set1(row->gain), vi_set1((int)(uint32_t)row->key),
                            vi_set1((int)(uint32_t)(row->key >> 32))};
    const vi lanes = vi_load(lane_numbers);
    const uint8_t *keeps_base_scales = chunk->keeps_base_scales;
    const float *delta = chunk->delta;
    const int64_t column = chunk->column;
    const int n = chunk->n;
    dither_sums all;
    scale_pair scales;
    int8_t codes[CHUNK];
    float squares[CHUNK_GROUPS];
    int safe = read_scales(&scales.base, codec, chunk->src, n);
    safe &= read_scales(&scales.new, codec, chunk->dst, n);
    codec->codes(chunk->src, n, codes);
    sum_squares(squares, delta, n, group);
    clear_parts(all.weights), clear_parts(all.moved), clear_parts(all.error);
    all.clipped = vi_set1(0);
    for (int g = 0; g < n / group; g++) {
        const vi at = vi_add(vi_set1((int)(uint32_t)(column + g * group)), lanes);
        const float *x = delta + g * group;
        int8_t *q = codes + g * group;
        const int to_nearest = rounds_to_nearest(squares[g], scales.new.s[g], codec), keeps = keeps_base_scales[g];
        if (keeps && !to_nearest) dither_group(q, &all, &key, x, &scales, g, at, (group_kind){1, 0, group, leveled});
        else if (keeps) dither_group(q, &all, &key, x, &scales, g, at, (group_kind){1, 1, group, leveled});
        else if (!to_nearest) dither_group(q, &all, &key, x, &scales, g, at, (group_kind){0, 0, group, leveled});
        else dither_group(q, &all, &key, x, &scales, g, at, (group_kind){0, 1, group, leveled});
    }
    codec->pack(chunk->dst, n, codes);
    return finish_dither(sums, &all, squares, n / group) & safe;
}

static int dither_chunk(double *sums, const gfl_block_codec *codec, const gfl_chunk *chunk, const gfl_dither_key *row) {
    const int leveled = codec->levels != NULL;
    if (codec->group == 16 && leveled) return dither(sums, codec, chunk, row, 16, 1);
    if (codec->group == 16) return dither(sums, codec, chunk, row, 16, 0);
    if (leveled) return dither(sums, codec, chunk, row, 32, 1);
    return dither(sums, codec, chunk, row, 32, 0);
}

/* Sums in double, of products that are exact in it: weight i goes to lane i % 8 (simd/: vd). */

static double fold_doubles(const double *lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

INLINE double fold_sum(vd sum) {
    double lanes[8];
    vd_store(lanes, sum);
    return fold_doubles(lanes);
}

/* Adds to all sums of a row but GFL_CLIPPED. */
static void four_dots(double *sums, const float *dq, const float *delta, const float *target, const float *written,
                      int64_t n) {
    vd ww = vd_zero(), dd = vd_zero(), md = vd_zero(), ee = vd_zero();
    double lanes[GFL_CLIPPED][8];
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const vd w = vd_load(dq + i), x = vd_load(delta + i), error = vd_load_difference(written + i, target + i);
        ww = vd_add_product(ww, w, w);
        dd = vd_add_product(dd, x, x);
        md = vd_add_product(md, vd_load_difference(written + i, dq + i), x);
        ee = vd_add_product(ee, error, error);
    }
    vd_store(lanes[GFL_WEIGHT2], ww);
    vd_store(lanes[GFL_DELTA2], dd);
    vd_store(lanes[GFL_MOVED], md);
    vd_store(lanes[GFL_ERROR2], ee);
    for (; i < n; i++) {
        const double moved = (double)(written[i] - dq[i]), error = (double)(written[i] - target[i]);
        lanes[GFL_WEIGHT2][i % 8] += (double)dq[i] * (double)dq[i];
        lanes[GFL_DELTA2][i % 8] += (double)delta[i] * (double)delta[i];
        lanes[GFL_MOVED][i % 8] += moved * (double)delta[i];
        lanes[GFL_ERROR2][i % 8] += error * error;
    }
    for (int k = 0; k < GFL_CLIPPED; k++) sums[k] += fold_doubles(lanes[k]);
}

#endif
