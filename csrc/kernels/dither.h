/* Adaptive dither: rounding `dq + delta` to a grid w = s * q - o so that on average nothing of delta is lost, where rounding to
 * the nearest level would lose all of a delta smaller than half a step. Works on up to 256 weights at once ("a chunk"), through
 * the views of views.h.
 *
 *   t = q + delta / s      under the block's own header, q its code: where delta is 0 the code stays
 *   t = (dq + delta + o) / s   under another header
 *   q' = floor(t) + (u < t - floor(t)), t limited to the grid before, u uniform in [0, 1)
 *
 * 1 / s is rounded, and multiplied by; it is 0 where s is less than the smallest normal float, so that a code stays, or is 0.
 * Groups whose delta is half a step or more (root mean square) are rounded to nearest, halves to even.
 *
 * Sums run over 16 lanes, weight i of a group in lane i % 16, then lanes 8, 4, 2, 1 apart; so every ISA has the same bits. */

enum { CHUNK = SUPER, GROUPS_ROOM = 16, PARTS = 16 / LANES };

typedef struct {
    float s[GROUPS_ROOM], o[GROUPS_ROOM], inverse[GROUPS_ROOM];
} chunk_scales;

static void read_scales(chunk_scales *c, const gfl_view *view, const uint8_t *src, int n) {
    view->scales(src, n, c->s, c->o);
    for (int g = 0; g < n / view->group; g++) c->inverse[g] = fabsf(c->s[g]) >= FLT_MIN ? 1.0f / c->s[g] : 0.0f;
}

/* One vector of sums per group, with which fold_parts begins and finish_sums ends. */
typedef struct {
    float lanes[GROUPS_ROOM][LANES];
} partial_sums;

INLINE void fold_parts(partial_sums *to, int group, vf *parts) {
    for (int n = PARTS / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) parts[i] = vf_add(parts[i], parts[i + n]);
    vf_store(to->lanes[group], parts[0]);
}

INLINE void finish_sums(float *sums, const partial_sums *from) {
    for (int g = 0; g < GROUPS_ROOM; g += LANES) {
        vf v[LANES];
        vf_transpose(v, from->lanes[g], LANES);
        for (int n = LANES / 2; n > 0; n /= 2)
            for (int i = 0; i < n; i++) v[i] = vf_add(v[i], v[i + n]);
        vf_store(sums + g, v[0]);
    }
}

INLINE void sum_squares(float *sums, const float *x, int n, int group) {
    partial_sums partial = {0};
    for (int g = 0; g < n / group; g++) {
        vf parts[PARTS];
        for (int v = 0; v < PARTS; v++) parts[v] = vf_zero();
        for (int i = 0; i < group; i += LANES) {
            const vf xi = vf_load(x + g * group + i);
            parts[i / LANES % PARTS] = vf_add(parts[i / LANES % PARTS], vf_mul(xi, xi));
        }
        fold_parts(&partial, g, parts);
    }
    finish_sums(sums, &partial);
}

/* sum of delta^2 against n (s / 2)^2 */
static inline int is_strong(float squares, float s, int group) { return squares >= 0.25f * (float)group * (s * s); }

INLINE vf limited(vf t, vf low, vf high) { return vf_max(vf_min(t, high), low); }

/* The expected squared error of a weight in steps, but for what the limits take: of unbiased rounding, or of nearest. */
INLINE vf rounding_error(vf t, int strong) {
    const vf p = vf_sub(t, vf_floor(t)), rest = vf_sub(vf_set1(1.0f), p);
    if (!strong) return vf_mul(p, rest);
    const vf least = vf_min(p, rest);
    return vf_mul(least, least);
}

/* Expected cost of every group: cost[g] in all, clip[g] what lies beyond the grid. t(x) as above, of one vector at weight i. */
typedef struct {
    partial_sums rounding, beyond;
} cost_sums;

INLINE void finish_costs(float *cost, float *clip, const cost_sums *sums, const chunk_scales *c, int n_groups) {
    float rounding[GROUPS_ROOM];
    finish_sums(rounding, &sums->rounding);
    finish_sums(clip, &sums->beyond);
    for (int g = 0; g < n_groups; g++) {
        if (c->inverse[g] != 0.0f) clip[g] = c->s[g] * c->s[g] * clip[g];
        cost[g] = c->inverse[g] != 0.0f ? c->s[g] * c->s[g] * rounding[g] + clip[g] : clip[g];
    }
}

INLINE void measure(gfl_measure *m, const gfl_view *view, const uint8_t *src, const float *delta, int n, const int group) {
    const vf low = vf_set1((float)view->low), high = vf_set1((float)view->high);
    cost_sums sums = {0};
    chunk_scales c;
    int8_t codes[CHUNK];
    vi most = vi_set1(0);
    read_scales(&c, view, src, n);
    view->codes(src, n, codes);
    sum_squares(m->squares, delta, n, group);
    for (int g = 0; g < n / group; g++) {
        const vf s = vf_set1(c.s[g]), o = vf_set1(c.o[g]), inverse = vf_set1(c.inverse[g]);
        const int strong = is_strong(m->squares[g], c.s[g], group);
        vf rounding[PARTS], beyond[PARTS];
        m->weak[g] = !strong || m->squares[g] == 0.0f;
        for (int v = 0; v < PARTS; v++) rounding[v] = beyond[v] = vf_zero();
        for (int i = 0; i < group; i += LANES) {
            const int at = g * group + i, part = i / LANES % PARTS;
            const vf q = vi_to_vf(vi_load_i8(codes + at)), x = vf_load(delta + at), dq = vf_sub(vf_mul(s, q), o);
            const vf t = vf_add(q, vf_mul(x, inverse)), inside = limited(t, low, high), target = vf_add(dq, x);
            vf outside = vf_sub(t, inside);
            if (c.inverse[g] == 0.0f) outside = vf_add(target, o);
            rounding[part] = vf_add(rounding[part], rounding_error(inside, strong));
            beyond[part] = vf_add(beyond[part], vf_mul(outside, outside));
            most = vi_max(most, vi_and(vf_as_vi(target), vi_set1(0x7fffffff)));
            vf_store(m->target + at, target);
            vf_store(m->moved + at, vf_sub(vf_sub(vf_mul(s, inside), o), dq));
        }
        fold_parts(&sums.rounding, g, rounding);
        fold_parts(&sums.beyond, g, beyond);
    }
    finish_costs(m->cost, m->clip, &sums, &c, n / group);
    m->finite = !vm_any(vi_gt(most, vi_set1(0x7f7fffff)));
}

static void measure_chunk(gfl_measure *m, const gfl_view *view, const uint8_t *src, const float *delta, int n) {
    if (view->group == 16) measure(m, view, src, delta, n, 16);
    else measure(m, view, src, delta, n, 32);
}

INLINE void cost_of(float *cost, const gfl_view *view, const uint8_t *header, const float *target, const float *squares, int n,
                    const int group) {
    const vf low = vf_set1((float)view->low), high = vf_set1((float)view->high);
    cost_sums sums = {0};
    chunk_scales c;
    float clip[GROUPS_ROOM];
    read_scales(&c, view, header, n);
    for (int g = 0; g < n / group; g++) {
        const vf o = vf_set1(c.o[g]), inverse = vf_set1(c.inverse[g]);
        const int strong = is_strong(squares[g], c.s[g], group);
        vf rounding[PARTS], beyond[PARTS];
        for (int v = 0; v < PARTS; v++) rounding[v] = beyond[v] = vf_zero();
        for (int i = 0; i < group; i += LANES) {
            const int part = i / LANES % PARTS;
            const vf above = vf_add(vf_load(target + g * group + i), o), t = vf_mul(above, inverse);
            const vf inside = limited(t, low, high), outside = c.inverse[g] != 0.0f ? vf_sub(t, inside) : above;
            rounding[part] = vf_add(rounding[part], rounding_error(inside, strong));
            beyond[part] = vf_add(beyond[part], vf_mul(outside, outside));
        }
        fold_parts(&sums.rounding, g, rounding);
        fold_parts(&sums.beyond, g, beyond);
    }
    finish_costs(cost, clip, &sums, &c, n / group);
}

static void cost_chunk(float *cost, const gfl_view *view, const uint8_t *header, const float *target, const float *squares, int n) {
    if (view->group == 16) cost_of(cost, view, header, target, squares, n, 16);
    else cost_of(cost, view, header, target, squares, n, 32);
}

/* moved = s * t - o - dq where t, within the limits, is that of a new header; groups of blocks without one keep what they have */
static void move_chunk(float *moved, const gfl_view *view, const uint8_t *src, const uint8_t *dst, const uint8_t *own,
                       const float *delta, int n) {
    const vf low = vf_set1((float)view->low), high = vf_set1((float)view->high);
    chunk_scales old, new;
    int8_t codes[CHUNK];
    read_scales(&old, view, src, n);
    read_scales(&new, view, dst, n);
    view->codes(src, n, codes);
    for (int i = 0; i < n; i += LANES) {
        const int g = i / view->group;
        if (own[g]) continue;
        const vf dq = vf_sub(vf_mul(vf_set1(old.s[g]), vi_to_vf(vi_load_i8(codes + i))), vf_set1(old.o[g]));
        const vf o = vf_set1(new.o[g]), target = vf_add(dq, vf_load(delta + i));
        const vf t = limited(vf_mul(vf_add(target, o), vf_set1(new.inverse[g])), low, high);
        vf_store(moved + i, vf_sub(vf_sub(vf_mul(vf_set1(new.s[g]), t), o), dq));
    }
}

/* How many targets lie beyond the limits of the grids of n written weights; without a step, how many are not met. */
static int64_t count_clipped(const gfl_view *view, const uint8_t *dst, const float *target, int n) {
    const vf low = vf_set1((float)view->low), high = vf_set1((float)view->high);
    chunk_scales c;
    vi count = vi_set1(0);
    int32_t counts[LANES];
    int64_t sum = 0;
    read_scales(&c, view, dst, n);
    for (int i = 0; i < n; i += LANES) {
        const int g = i / view->group;
        const vf above = vf_add(vf_load(target + i), vf_set1(c.o[g])), t = vf_mul(above, vf_set1(c.inverse[g]));
        if (c.inverse[g] != 0.0f) count = vi_count(count, vm_or(vf_lt(t, low), vf_gt(t, high)));
        else count = vi_count(count, vm_or(vf_lt(above, vf_zero()), vf_gt(above, vf_zero())));
    }
    vi_store(counts, count);
    for (int l = 0; l < LANES; l++) sum += counts[l];
    return sum;
}

/* 24 random bits as u in [0, 1): a hash of the column and the row's key (64 bits), of which every bit counts. Both
 * multiplications and the first shifts are those of a well-known 32-bit mixer; the last shift would only touch bits that u does
 * not keep or need. */
INLINE vf uniform(vi column, vi key_low, vi key_high) {
    vi x = vi_xor(column, key_low);
    x = vi_mul(vi_xor(x, vi_shr(x, 16)), vi_set1(0x7feb352d));
    x = vi_xor(vi_xor(x, vi_shr(x, 15)), key_high);
    x = vi_mul(x, vi_set1((int)0x846ca68bu));
    return vf_mul(vi_to_vf(vi_shr(x, 8)), vf_set1(0x1p-24f));
}

static const int32_t lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE void dither(gfl_dithered *d, const gfl_view *view, const uint8_t *src, uint8_t *dst, const float *delta,
                   const uint8_t *own, const gfl_dither_key *key, int64_t column, int n, const int group) {
    const vf low = vf_set1((float)view->low), high = vf_set1((float)view->high), gain = vf_set1(key->gain);
    const vf one = vf_set1(1.0f), zero = vf_zero();
    const vi key_low = vi_set1((int)(uint32_t)key->row), key_high = vi_set1((int)(uint32_t)(key->row >> 32));
    const vi lanes = vi_load(lane_numbers);
    chunk_scales base, c;
    int8_t codes[CHUNK];
    float squares[GROUPS_ROOM];
    vi most = vi_set1(0), clipped = vi_set1(0);
    read_scales(&base, view, src, n);
    read_scales(&c, view, dst, n);
    view->codes(src, n, codes);
    sum_squares(squares, delta, n, group);
    for (int g = 0; g < n / group; g++) {
        const vf s = vf_set1(c.s[g]), o = vf_set1(c.o[g]), inverse = vf_set1(c.inverse[g]);
        const vf s0 = vf_set1(base.s[g]), o0 = vf_set1(base.o[g]);
        const int strong = is_strong(squares[g], c.s[g], group);
        for (int i = g * group; i < (g + 1) * group; i += LANES) {
            const vf q = vi_to_vf(vi_load_i8(codes + i)), x = vf_load(delta + i), change = vf_mul(gain, x);
            const vf dq = vf_sub(vf_mul(s0, q), o0), target = vf_add(dq, x), above = vf_add(vf_add(dq, change), o);
            const vf t = own[g] ? vf_add(q, vf_mul(change, inverse)) : vf_mul(above, inverse);
            const vf inside = limited(t, low, high);
            vf level;
            if (strong) {
                level = vf_round(inside);
            } else {
                const vf u = uniform(vi_add(vi_set1((int)(uint32_t)(column + i)), lanes), key_low, key_high);
                const vf floor = vf_floor(inside);
                level = vf_add(floor, vf_select(vf_lt(u, vf_sub(inside, floor)), one, zero));
            }
            if (c.inverse[g] != 0.0f) clipped = vi_count(clipped, vm_or(vf_lt(t, low), vf_gt(t, high)));
            else clipped = vi_count(clipped, vm_or(vf_lt(own[g] ? change : above, zero), vf_gt(own[g] ? change : above, zero)));
            most = vi_max(most, vi_and(vf_as_vi(target), vi_set1(0x7fffffff)));
            if (own[g]) level = vf_select(vf_eq(x, zero), q, level); /* even a code that ggml would not have written */
            vi_store_u8(codes + i, vf_truncate(level));
            vf_store(d->dq + i, dq);
            vf_store(d->target + i, target);
            vf_store(d->written + i, vf_sub(vf_mul(s, level), o));
        }
    }
    view->pack(dst, n, codes);
    int32_t counts[LANES];
    vi_store(counts, clipped);
    d->clipped = 0;
    for (int l = 0; l < LANES; l++) d->clipped += counts[l];
    d->finite = !vm_any(vi_gt(most, vi_set1(0x7f7fffff)));
}

static void dither_chunk(gfl_dithered *d, const gfl_view *view, const uint8_t *src, uint8_t *dst, const float *delta,
                         const uint8_t *own, const gfl_dither_key *key, int64_t column, int n) {
    if (view->group == 16) dither(d, view, src, dst, delta, own, key, column, n, 16);
    else dither(d, view, src, dst, delta, own, key, column, n, 32);
}

/* Sums in double, of products that are exact in it: weight i goes to lane i % 8. */
typedef double doubles __attribute__((vector_size(64), aligned(8)));
typedef float floats __attribute__((vector_size(32), aligned(4)));

INLINE void add_products(doubles *sum, const float *x, const float *y) {
    floats a, b;
    memcpy(&a, x, sizeof a);
    memcpy(&b, y, sizeof b);
    *sum += __builtin_convertvector(a, doubles) * __builtin_convertvector(b, doubles);
}

static double fold_doubles(const double *lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* sums[0] = x . y, sums[1] = y . y over n = 8 k floats */
static void two_dots(double *sums, const float *x, const float *y, int n) {
    doubles xy = {0}, yy = {0};
    double lanes[8];
    for (int i = 0; i < n; i += 8) {
        add_products(&xy, x + i, y + i);
        add_products(&yy, y + i, y + i);
    }
    memcpy(lanes, &xy, sizeof lanes);
    sums[0] = fold_doubles(lanes);
    memcpy(lanes, &yy, sizeof lanes);
    sums[1] = fold_doubles(lanes);
}

/* sums[0..4) += dq . dq, delta . delta, (written - dq) . delta, (written - target) . (written - target) */
static void four_dots(double *sums, const float *dq, const float *delta, const float *target, const float *written, int64_t n) {
    doubles ww = {0}, dd = {0}, md = {0}, ee = {0};
    double lanes[4][8];
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        float moved[8], error[8];
        for (int l = 0; l < 8; l++) {
            moved[l] = written[i + l] - dq[i + l];
            error[l] = written[i + l] - target[i + l];
        }
        add_products(&ww, dq + i, dq + i);
        add_products(&dd, delta + i, delta + i);
        add_products(&md, moved, delta + i);
        add_products(&ee, error, error);
    }
    memcpy(lanes[0], &ww, sizeof ww);
    memcpy(lanes[1], &dd, sizeof dd);
    memcpy(lanes[2], &md, sizeof md);
    memcpy(lanes[3], &ee, sizeof ee);
    for (; i < n; i++) {
        const double moved = (double)(written[i] - dq[i]), error = (double)(written[i] - target[i]);
        lanes[0][i % 8] += (double)dq[i] * (double)dq[i];
        lanes[1][i % 8] += (double)delta[i] * (double)delta[i];
        lanes[2][i % 8] += moved * (double)delta[i];
        lanes[3][i % 8] += error * error;
    }
    for (int k = 0; k < 4; k++) sums[k] += fold_doubles(lanes[k]);
}
