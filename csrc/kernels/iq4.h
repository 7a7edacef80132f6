/* IQ4_NL IQ4_XS: sixteen uneven levels. ggml tries 16 scales for each run of 32 weights; here LANES runs share each vector. */

static const float iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* The middles of neighbouring levels as a binary search meets them: node i is followed by 2i, or by 2i + 1 from its value on.
 * ggml compares the distances to two levels; both are exact near their middle, and the middle belongs to the upper one. */
static const float iq4_middles[16] = {0, -4.5f, -57, 45.5f, -93.5f, -28.5f, 19, 79, -115.5f, -74, -42, -16, 7, 31.5f, 61, 101};

/* Number of the level nearest to v plus 16; 31 for NaN, as in ggml. */
INLINE vi iq4_search(vf v) {
    vi node = vi_count(vi_set1(2), vf_not_lt(v, vf_set1(iq4_middles[1])));
    node = vi_count(vi_shl(node, 1), vf_not_lt(v, vf_pick8(iq4_middles, node)));
    node = vi_count(vi_shl(node, 1), vf_not_lt(v, vf_pick8(iq4_middles, node)));
    return vi_count(vi_shl(node, 1), vf_not_lt(v, vf_pick8(iq4_middles + 8, node)));
}

/* sums of w q x and w q q over the levels q nearest to iscale * x */
INLINE void iq4_sums(vf *sum_qx, vf *sum_q2, const vf *x, const vf *w, vf iscale) {
    vf qx = vf_zero(), q2 = vf_zero();
    for (int i = 0; i < 32; i++) {
        const vf q = vf_pick16(iq4_levels, iq4_search(vf_mul(iscale, x[i]))), wq = vf_mul(w[i], q);
        qx = vf_add(qx, vf_mul(wq, x[i]));
        q2 = vf_add(q2, vf_mul(wq, q));
    }
    *sum_qx = qx;
    *sum_q2 = q2;
}

/* Scale of 32 weights w = scale * level: weighted least squares over the best of the trial scales, 0 for lanes of zeros. */
INLINE vf iq4_fit(const vf *x, const vf *w) {
    const vf zero = vf_zero();
    vf peak = zero, amax = zero, qx, q2;
    for (int i = 0; i < 32; i++) {
        const vf a = vf_abs(x[i]);
        const vm higher = vf_gt(a, amax);
        amax = vf_select(higher, a, amax);
        peak = vf_select(higher, x[i], peak);
    }
    iq4_sums(&qx, &q2, x, w, vf_div(vf_set1(1.0f), vf_div(vf_neg(peak), vf_set1(iq4_levels[0]))));
    vf scale = vf_select(vf_gt(q2, zero), vf_div(qx, q2), zero), best = vf_mul(scale, qx);
    for (int trial = -7; trial <= 7; trial++) {
        iq4_sums(&qx, &q2, x, w, vf_div(vf_set1((float)trial + iq4_levels[0]), peak));
        const vm better = vm_and(vf_gt(q2, zero), vf_gt(vf_mul(qx, qx), vf_mul(best, q2)));
        scale = vf_select(better, vf_div(qx, q2), scale);
        best = vf_select(better, vf_mul(scale, qx), best);
    }
    return vf_select(vf_lt(amax, vf_set1(TINY)), zero, scale);
}

/* w = importance * sqrt(sigma2 + x^2); x^2 without importances */
INLINE void iq4_weights(vf *w, const vf *x, const vf *importance, vf sigma2) {
    for (int i = 0; i < 32; i++) {
        const vf squared = vf_mul(x[i], x[i]);
        w[i] = importance ? vf_mul(importance[i], vf_sqrt(vf_add(sigma2, squared))) : squared;
    }
}

/* codes[0..n) of the levels nearest to inverse_scale * x */
INLINE void iq4_codes(uint8_t *codes, const float *x, int n, float inverse_scale) {
    const vf id = vf_set1(inverse_scale);
    for (int i = 0; i < n; i += LANES) vi_store_u8(codes + i, vi_and(iq4_search(vf_mul(id, vf_load(x + i))), vi_set1(15)));
}

/* scales[0..16) of 16 runs of 32 weights; sigma2: twice the mean square that counts for each run */
INLINE void iq4_fit_pair(float *scales, const float *x, const float *importance, const float *sigma2) {
    for (int j = 0; j < 16; j += LANES) {
        vf lanes[32], w[32], weights[32];
        load_lanes(lanes, x + 32 * j, 32);
        if (importance) load_lanes(w, importance + 32 * j, 32);
        iq4_weights(weights, lanes, importance ? w : NULL, vf_load(sigma2 + j));
        vf_store(scales + j, iq4_fit(lanes, weights));
    }
}

/* The importances of a pair that begins at weight `start` of rows of n_in: in place, or copied to `copy` if a row ends in it. */
static const float *importance_at(float *copy, const float *imatrix, int64_t start, int64_t n_in) {
    int64_t column = start % n_in;
    if (!imatrix) return NULL;
    if (column + PAIR <= n_in) return imatrix + column;
    for (int i = 0; i < PAIR; i++, column++) {
        if (column == n_in) column = 0;
        copy[i] = imatrix[column];
    }
    return copy;
}

static const float *pair_at(float *copy, const float *x, int64_t n) {
    if (n >= PAIR) return x;
    memcpy(copy, x, (size_t)n * sizeof *x);
    memset(copy + n, 0, (size_t)(PAIR - n) * sizeof *x);
    return copy;
}

static void sigmas_of_runs(float *sigma2, const float *x) {
    for (int j = 0; j < 16; j += LANES) {
        vf lanes[32], sum = vf_zero();
        load_lanes(lanes, x + 32 * j, 32);
        for (int i = 0; i < 32; i++) sum = vf_add(sum, vf_mul(lanes[i], lanes[i]));
        vf_store(sigma2 + j, vf_mul(sum, vf_set1(2.0f / 32)));
    }
}

static void quantize_IQ4_NL(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    block_iq4_nl *y = (block_iq4_nl *)out;
    const int64_t n = n_rows * n_in;
    for (int64_t i = 0; i < n; i += PAIR) {
        float copy[PAIR], weight_copy[PAIR], scales[16], sigma2[16] = {0};
        const int runs = n - i < PAIR ? (int)((n - i) / 32) : 16;
        const float *pair = pair_at(copy, x + i, n - i);
        if (imatrix) sigmas_of_runs(sigma2, pair);
        iq4_fit_pair(scales, pair, importance_at(weight_copy, imatrix, i, n_in), sigma2);
        for (int b = 0; b < runs; b++, y++) {
            uint8_t codes[32];
            y->d = float_to_half(scales[b]);
            iq4_codes(codes, pair + 32 * b, 32, inverse(scales[b]));
            pack_nibbles(y->qs, codes);
        }
    }
}

static void dequantize_IQ4_NL(const uint8_t *src, float *out, int64_t n) {
    const block_iq4_nl *x = (const block_iq4_nl *)src;
    for (int64_t i = 0; i < n; i += 32, x++) {
        const vf d = vf_set1(half_to_float(x->d));
        for (int j = 0; j < 16; j += LANES) {
            const vi q = vi_load_u8(x->qs + j);
            vf_store(out + i + j, vf_mul(d, vf_pick16(iq4_levels, q)));
            vf_store(out + i + 16 + j, vf_mul(d, vf_pick16(iq4_levels, vi_shr(q, 4))));
        }
    }
}

/* codes and scales of a super-block whose runs have been fitted */
static void finish_IQ4_XS(const float *x, block_iq4_xs *y, const float *scales) {
    float amax = 0.0f, peak = 0.0f;
    for (int j = 0; j < 8; j++)
        if (fabsf(scales[j]) > amax) {
            amax = fabsf(scales[j]);
            peak = scales[j];
        }
    const float d = -peak / 32, id = inverse(d);
    unsigned high = 0;
    y->d = float_to_half(d);
    memset(y->scales_l, 0, sizeof y->scales_l);
    for (int j = 0; j < 8; j++) {
        const int l = nearest(id * scales[j]), s = l < -32 ? -32 : l > 31 ? 31 : l;
        uint8_t codes[32];
        iq4_codes(codes, x + 32 * j, 32, inverse(d * (float)s));
        pack_nibbles(y->qs + 16 * j, codes);
        y->scales_l[j / 2] |= (uint8_t)(((s + 32) & 15) << 4 * (j % 2));
        high |= (unsigned)(s + 32) >> 4 << 2 * j;
    }
    y->scales_h = (uint16_t)high;
}

static float sum_of_squares(const float *x, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

static void quantize_IQ4_XS(const float *x, uint8_t *out, int64_t n_rows, int64_t n_in, const float *imatrix) {
    block_iq4_xs *y = (block_iq4_xs *)out;
    const int64_t n = n_rows * n_in;
    for (int64_t i = 0; i < n; i += PAIR) {
        float copy[PAIR], weight_copy[PAIR], scales[16], sigma2[16] = {0};
        const float *pair = pair_at(copy, x + i, n - i);
        if (imatrix)
            for (int j = 0; j < 16; j++) sigma2[j] = j % 8 ? sigma2[j - 1] : sum_of_squares(pair + 32 * j, SUPER) * (2.0f / SUPER);
        iq4_fit_pair(scales, pair, importance_at(weight_copy, imatrix, i, n_in), sigma2);
        for (int b = 0; b < 2 && i + SUPER * b < n; b++, y++) finish_IQ4_XS(pair + SUPER * b, y, scales + 8 * b);
    }
}

static void dequantize_IQ4_XS(const uint8_t *src, float *out, int64_t n) {
    const block_iq4_xs *x = (const block_iq4_xs *)src;
    for (int64_t i = 0; i < n; i += SUPER, x++) {
        const float d = half_to_float(x->d);
        for (int s = 0; s < 8; s++) {
            const int low = x->scales_l[s / 2] >> 4 * (s % 2) & 15, high = (x->scales_h >> 2 * s & 3) << 4;
            const vf dl = vf_set1(d * (float)((low | high) - 32));
            for (int j = 0; j < 16; j += LANES) {
                const vi q = vi_load_u8(x->qs + 16 * s + j);
                vf_store(out + i + 32 * s + j, vf_mul(dl, vf_pick16(iq4_levels, q)));
                vf_store(out + i + 32 * s + 16 + j, vf_mul(dl, vf_pick16(iq4_levels, vi_shr(q, 4))));
            }
        }
    }
}
