// Tokens through a whole model in one call (nbs/serving/lean.ipynb): one, or all of a prompt.
// Included once for each level, after planes.h.
#include "kept.h"

// ---- one token ----
static inline F exp16(F x) {   // within 2 units in the last place
    x = least(most(x, each(-87.3f)), each(88.7f));
    const F n = nearest(x*each(1.44269504f));
    F r = fnma(n, each(0.693359375f), x);
    r = fnma(n, each(-2.12194440e-4f), r);
    F p = each(1.f/5040);
    const float c[] = {1.f/720, 1.f/120, 1.f/24, 1.f/6, .5f, 1.f, 1.f};
    for (int i = 0; i < 7; i++) p = fma(p, r, each(c[i]));
    return times_two_to(p, n);
}
static inline F sigmoid16(F x) {
    const F one = each(1.f);
    return one/(one + exp16(zero() - x));
}
static void activate(float *y, const float *gate, i64 a, i64 b, bool silu) {   // y = act(gate)*y, or act(y)
    for (i64 i = a; i < b; i += 16) {
        const Lanes m = head(b - i);
        const F up = load(y + i, m), g = gate ? load(gate + i, m) : up;
        F u = g;
        if (!silu) {                      // x/2 (1 + tanh v) = x sigmoid(2v)
            u = g*g*g;
            u = fma(u, each(0.044715f), g);
            u = u*each(2*0.7978845608028654f);
        }
        const F v = g*sigmoid16(u);
        store(y + i, m, gate ? v*up : v);
    }
}
static void normalize(const float *x, const float *w, const float *b, i64 n, bool rms, double eps, float *y) {
    F s = zero();
    float mean = 0;
    if (!rms) {
        for (i64 i = 0; i < n; i += 16) s = s + load(x + i, head(n - i));
        mean = sum_of(s)/(float)n; s = zero();
    }
    const F mu = each(mean);
    for (i64 i = 0; i < n; i += 16) {
        const Lanes m = head(n - i);
        const F v = keep(load(x + i, m) - mu, m);
        s = fma(v, v, s);
    }
    const F r = each(1.f/sqrtf(sum_of(s)/(float)n + (float)eps));
    for (i64 i = 0; i < n; i += 16) {
        const Lanes m = head(n - i);
        const F v = (load(x + i, m) - mu)*r;
        const F scale = w ? load(w + i, m) : each(1.f);
        const F c = b ? load(b + i, m) : zero();
        store(y + i, m, fma(v, scale, c));
    }
}
// y = rows[row], or y += rows[row].
static void add_row(const void *rows, int type, i64 row, i64 n, bool fresh, float *y) {
    for (i64 i = 0; i < n; i += 16) {
        const Lanes m = head(n - i);
        const F v = load16(rows, type, row*n + i, m);
        store(y + i, m, fresh ? v : v + load(y + i, m));
    }
}
static float number_at(const void *x, int type, i64 i) {
    if (type == 0) return ((const float*)x)[i];
    float some[16];
    store(some, load16(x, type, i, head(1)));
    return some[0];
}
static void embed_row(const SlLinear *d, i64 id, float *y) {   // row `id` of the weight
    if (d->dense) { add_row(d->dense, (int)d->dense_type, id, d->k, true, y); return; }
    const i64 units = d->kp >> 4, base = (id >> 4)*units, lane = (id & 15)*4;
    const i64 groups = d->group ? groups_of(d) : 0;
    float s = groups ? 0 : ((const float*)d->scale)[id];
    for (i64 i = 0; i < d->k; i++) {
        if (groups && i % d->group == 0) {
            const i64 step = ((id >> 4)*groups + i/d->group)*16 + (id & 15);
            s = number_at(d->scale, (int)d->step_type, step)*(float)(1 << (8 - d->bits));
        }
        const i64 u = base + (i >> 4), v = (i >> 2) & 3, at = lane + (i & 3);
        int c = (d->high[u*128 + (v >> 1)*64 + at] >> (v & 1)*4 & 15) << 4;
        if (d->bits > 4) c |= (d->middle[u*64 + at] >> 2*v & 3) << 2;
        if (d->bits > 6) c |= d->low[u*64 + at] >> 2*v & 3;
        y[i] = ((float)(c >> (8 - d->bits)) - (float)d->zero)*s;
    }
}
static void embed(const SlModel *M, i64 id, i64 pos, float *y) {
    embed_row(M->embedding, id, y);
    const float scale = (float)M->embedding_scale;
    if (scale != 1.f) for (i64 i = 0; i < M->dim; i++) y[i] *= scale;
    if (M->positions) add_row(M->positions, (int)M->positions_type, pos, M->dim, false, y);
}
struct Turn { const float *c, *s; i64 n; };   // cosines and sines of n numbers; c is null where nothing turns
static Turn turn_at(const SlModel *M, const SlLayer *L, const SlCache *C, i64 pos) {
    if (!L->angles) return {nullptr, nullptr, 0};
    const i64 at = ((L->angles - 1)*C->places + pos)*M->rotated;
    return {C->cos + at, C->sin + at, M->rotated};
}
// A head of hd numbers: halves of its first ones rotated, as Llama does, the others as they are.
static void rotate(const float *x, Turn t, i64 hd, float *y) {
    const i64 h = t.n/2;
    for (i64 i = 0; i < h; i++) {
        y[i] = x[i]*t.c[i] - x[i + h]*t.s[i];
        y[i + h] = x[i + h]*t.c[i + h] + x[i]*t.s[i + h];
    }
    if (t.n < hd) memcpy(y + t.n, x + t.n, (size_t)(hd - t.n)*4);
}
// Norms of queries and keys where they lie: of each head, or of all together, as the length of the weight says.
static void normalize_heads(const SlModel *M, const SlLayer *L, float *qkv, int me, int all) {
    const i64 hd = M->head_dim, H = M->heads, G = M->kv_heads;
    for (int i = 0; i < 2; i++) {
        if (!L->qk_norm[i]) continue;
        float *x = i ? qkv + H*hd : qkv;
        const i64 n = L->qk_norm_len[i], rows = (i ? G : H)*hd/n;
        for (i64 r = rows*me/all; r < rows*(me + 1)/all; r++)
            normalize(x + r*n, L->qk_norm[i], nullptr, n, true, M->eps, x + r*n);
    }
}
static bool has_head_norms(const SlLayer *L) { return L->qk_norm[0] || L->qk_norm[1]; }
// The first position that a token at `pos` sees.
static i64 first_seen(const SlLayer *L, i64 pos) {
    return L->window && pos >= L->window ? pos + 1 - L->window : 0;
}
// ---- attention: a query's result is the same bits whether it comes alone or with others ----
// A score adds the products of channels 0, 16, 32, ... in this order, those of 1, 17, 33, ... likewise, and then the
// sixteen sums as `sum_of` does. Positions lie in blocks of sixteen that begin at multiples of sixteen.

// p (count) = scale q k of keys in rows.
static void score_rows(const float *q, const float *keys, i64 count, i64 n, float scale, float *p) {
    for (i64 t = 0; t < count;) {
        const int some = count - t < 4 ? 1 : 4;
        F s[4];
        for (int j = 0; j < 4; j++) s[j] = zero();
        for (i64 i = 0; i < n; i += 16) {
            const Lanes m = head(n - i);
            const F x = load(q + i, m);
            for (int j = 0; j < some; j++) s[j] = fma(x, load(keys + (t + j)*n + i, m), s[j]);
        }
        for (int j = 0; j < some; j++) p[t + j] = scale*sum_of(s[j]);
        t += some;
    }
}
// The sums of channels l, l+16, ... of Q queries `far` apart, for sixteen keys that lie in columns `wide` apart.
template<int Q> INL void add_channels(const float *q, i64 far, const float *kt, i64 wide, i64 n, i64 l, F *s) {
    for (int i = 0; i < Q; i++) s[i] = zero();
    for (i64 j = l; j < n; j += 16) {
        const F v = load(kt + j*wide);
        for (int i = 0; i < Q; i++) s[i] = fma(each(q[i*far + j]), v, s[i]);
    }
}
// The same scores, of Q queries for sixteen keys in columns.
template<int Q> static void score_columns(const float *q, i64 far, const float *kt, i64 wide, i64 n, F *p) {
    F s[Q], t[Q], two[Q];
    for (i64 odd = 0; odd < 2; odd++) {
        for (i64 l = odd; l < 4; l += 2) {
            F four[Q];
            add_channels<Q>(q, far, kt, wide, n, l, four); add_channels<Q>(q, far, kt, wide, n, l + 8, s);
            add_channels<Q>(q, far, kt, wide, n, l + 4, t);
            for (int i = 0; i < Q; i++) four[i] = four[i] + s[i];
            add_channels<Q>(q, far, kt, wide, n, l + 12, s);
            for (int i = 0; i < Q; i++) {
                four[i] = four[i] + (t[i] + s[i]);
                two[i] = l == odd ? four[i] : two[i] + four[i];
            }
        }
        for (int i = 0; i < Q; i++) p[i] = odd ? p[i] + two[i] : two[i];
    }
}
// p = exp(p - largest) from `from` (less than 16) to n, 0 before; returns 1/sum.
static float soften(float *p, i64 from, i64 n) {
    F top = each(-INFINITY), sum = zero();
    for (i64 t = 0; t < from; t++) p[t] = -INFINITY;
    for (i64 t = 0; t < n; t += 16) top = pick(head(n - t), most(load(p + t, head(n - t)), top), top);
    top = each(largest_of(top));
    for (i64 t = 0; t < n; t += 16) {
        const Lanes m = head(n - t);
        const F e = drop(keep(exp16(load(p + t, m) - top), m), head(from - t));
        store(p + t, m, e); sum = sum + e;
    }
    return 1.f/sum_of(sum);
}
// Values in float: in pages, or in rows from position 0 on.
struct Rows {
    const Head *h; const float *flat;
    const float *at(i64 t, i64 n) const { return flat ? flat + t*n : (const float*)h->values_at(t); }
};
// y (n) = inv sum p v over rows a..b in pages, and `last` after them.
static void mix_floats(const float *p, const Head &h, i64 begin, i64 end, const float *last, i64 n, float inv, float *y) {
    for (i64 i = 0; i < n; i += 64) {
        F a[4]; Lanes m[4];
        for (int j = 0; j < 4; j++) { m[j] = head(n - i - 16*j); a[j] = zero(); }
        for (i64 t = begin; t <= end;) {
            const float *row = (t < end ? (const float*)h.values_at(t) : last) + i;
            for (const i64 stop = t < end ? page_end(t, end) : t + 1; t < stop; t++, row += n) {
                const F w = each(p[t - begin]);
                for (int j = 0; j < 4; j++) a[j] = fma(w, load(row + 16*j, m[j]), a[j]);
            }
        }
        for (int j = 0; j < 4; j++) store(y + i + 16*j, m[j], a[j]*each(inv));
    }
}
// One head: q (n) against the cached keys from `first` to `pos`, and the new one; y = softmax(scale q k) v. Keys of complete
// groups in few bits are unpacked to `spare` (n,32); `last` is the new value's row, where rows are in few bits.
static void attend(const Head &h, const float *q, const float *k, const float *v, const uint8_t *last, i64 first, i64 pos,
                   i64 n, float scale, float *spare, float *p, float *y) {
    const i64 own = h.k_bits ? pos - pos % GROUP : 0, begin = first < own ? first - first % GROUP : first & ~(i64)15;
    i64 t = begin;
    for (; t < own; t += GROUP) {
        unpack_units(h, n, t, t + GROUP, spare - t, GROUP);
        for (i64 i = 0; i < GROUP; i += 16) {
            F s[1];
            score_columns<1>(q, 0, spare + i, GROUP, n, s);
            store(p + t + i - begin, s[0]*each(scale));
        }
    }
    if (t < first) t = first;
    while (t < pos) {
        const i64 stop = page_end(t, pos);
        score_rows(q, h.k_bits ? h.recent + (t - own)*n : key_at(h, t, n), stop - t, n, scale, p + t - begin);
        t = stop;
    }
    score_rows(q, k, 1, n, scale, p + pos - begin);
    for (i64 i = begin; i < first; i++) p[i - begin] = -INFINITY;
    const i64 skip = (first - begin) & ~(i64)15;
    p += skip;
    const float inv = soften(p, first - begin - skip, pos + 1 - begin - skip);
    p += first - begin - skip;
    if (h.v_bits == 8) mix_rows<8>(p, h, first, pos, last, n, inv, y);
    else if (h.v_bits == 4) mix_rows<4>(p, h, first, pos, last, n, inv, y);
    else if (h.v_bits == 2) mix_rows<2>(p, h, first, pos, last, n, inv, y);
    else mix_floats(p, h, first, pos, v, n, inv, y);
}
static void attention(const SlModel *M, const SlCache *C, i64 layer, i64 pos, const float *qkv, float *out,
                      const Own *o, int me, int all) {
    const SlLayer *L = M->layers + layer;
    const i64 hd = M->head_dim, H = M->heads, G = M->kv_heads, each = H/G, first = first_seen(L, pos);
    const Turn turn = turn_at(M, L, C, pos);
    const float *k_new = qkv + H*hd, *v_new = k_new + G*hd;
    uint8_t *last = (uint8_t*)(o->spare + round64(GROUP*hd));
    for (i64 i = H*me/all, g = -1; i < H*(me + 1)/all; i++) {
        const Head h = head_at(M, C, layer, i/each);
        if (g != i/each) {
            g = i/each;
            rotate(k_new + g*hd, turn, hd, o->k);
            if (h.v_bits) put_row(v_new + g*hd, hd, h.v_bits, last);
        }
        rotate(qkv + i*hd, turn, hd, o->q);
        attend(h, o->q, o->k, v_new + g*hd, last, first, pos, hd, (float)M->attention_scale, o->spare, o->scores, out + i*hd);
        if (i % each == 0) {   // others read what is before `pos`, and of recent keys those of its group
            put_value(h, hd, pos, v_new + g*hd);
            put_key(h, hd, pos, o->k);
        }
    }
}
// x += product, or x += norm(product) where there is such a norm; y holds a product meanwhile.
static void add_product(const SlModel *M, const SlLinear *d, const float *in, const float *w, float *x, float *y,
                        const Own *o, int me, int all) {
    o->of = nullptr;
    share(d, in, w ? y : x, !w, o, me, all);
    #pragma omp barrier
    if (!w) return;
    normalize(y, w, nullptr, M->dim, true, M->eps, o->norm);
    for (i64 i = M->dim*me/all; i < M->dim*(me + 1)/all; i++) x[i] += o->norm[i];
    #pragma omp barrier
}
static const float *before(const SlModel *M, const SlLayer *L, int which, const float *x, const Own *o) {
    o->of = nullptr;
    if (!L->before) return x;
    normalize(x, L->norm[2*which], L->norm[2*which + 1], M->dim, M->rms, M->eps, o->norm);
    return o->norm;
}
struct Room { float *x, *y, *qkv, *att, *mid; };   // of all threads: a token on its way
static void run_layer(const SlModel *M, const SlCache *C, i64 i, i64 pos, const Room *r, const Own *o, int me,
                      int all) {
    const SlLayer *L = M->layers + i;
    const float *in = before(M, L, 0, r->x, o);
    for (i64 j = 0, at = 0; j < 3 && L->qkv[j]; at += L->qkv[j++]->n)
        share(L->qkv[j], in, r->qkv + at, false, o, me, all);
    #pragma omp barrier
    if (has_head_norms(L)) {
        normalize_heads(M, L, r->qkv, me, all);
        #pragma omp barrier
    }
    attention(M, C, i, pos, r->qkv, r->att, o, me, all);
    #pragma omp barrier
    add_product(M, L->out, r->att, L->after[0], r->x, r->y, o, me, all);
    in = before(M, L, 1, r->x, o);
    const i64 blocks = (M->hidden + 15) >> 4, a = blocks*me/all*16, b = blocks*(me + 1)/all*16;
    float *gate = L->gate ? r->mid + round64(M->hidden) : nullptr;
    if (gate) share(L->gate, in, gate, false, o, me, all);
    share(L->up, in, r->mid, false, o, me, all);
    activate(r->mid, gate, a, b < M->hidden ? b : M->hidden, M->silu);
    #pragma omp barrier
    add_product(M, L->down, r->mid, L->after[1], r->x, r->y, o, me, all);
}

static int decode_step(const SlModel *M, const SlCache *C, i64 id, i64 pos, float *logits) {
    const i64 kp = M->max_kp, r = M->max_r, wide = (M->heads + 2*M->kv_heads)*M->head_dim;
    const size_t dim = round64(M->dim), head_dim = round64(M->head_dim), hidden = round64(M->hidden);
    const size_t score = round64(pos + 17 + GROUP);
    const size_t spare = round64(GROUP*M->head_dim) + head_dim + 64;   // unpacked keys, and a row of values
    const size_t own = input_bytes(kp) + 4*(round64(r) + dim + score + 2*head_dim + spare) + round64(turned_room(kp));
    const size_t common = 4*(2*dim + round64(wide) + round64(M->heads*M->head_dim) + 2*hidden);
    int threads = max_threads();
    char *p = arena.get(common + own*threads + 64);
    if (!p) return NO_MEMORY;
    float *x = (float*)p, *y = x + dim, *qkv = y + dim, *att = qkv + round64(wide);
    const Room room = {x, y, qkv, att, att + round64(M->heads*M->head_dim)};
    embed(M, id, pos, x);
    #pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
#else
        const int me = 0, all = 1;
#endif
        char *q = p + common + own*me;
        Own o;
        o.bytes = (int8_t*)q; o.h = (float*)(q + input_bytes(kp));
        o.norm = o.h + round64(r); o.scores = o.norm + dim;
        o.q = o.scores + score; o.k = o.q + head_dim; o.spare = o.k + head_dim; o.turned = o.spare + spare;
        for (i64 i = 0; i < M->n_layers; i++) run_layer(M, C, i, pos, &room, &o, me, all);
        if (logits) {
            normalize(x, M->norm_w, M->norm_b, M->dim, M->rms, M->eps, o.norm);
            o.of = nullptr;
            share(M->head, o.norm, logits, false, &o, me, all);
        }
    }
    return 0;
}

// ---- a prompt: all its tokens through the same kernels ----
// Queries t..t+g-1 (g <= 8) of one head at positions pos+t..; kt holds the keys input by input, `wide` positions
// apart. Each sees `window` keys, its own the last, or all (0).
static void attend_some(const float *q, i64 qstride, const float *kt, const Rows &values, i64 pos, int g, i64 n,
                        i64 wide, i64 window, float scale, float *p, float *y, i64 ystride) {
    const i64 last = pos + g;   // keys that the last query sees
    const i64 start = window && pos >= window ? (pos + 1 - window) & ~(i64)15 : 0;   // nobody sees what is before
    float inv[8];
    for (i64 k = start; k < last; k += 16) for (int i = 0; i < g;) {
        F a[4];
        const int some = g - i < 4 ? 1 : 4;
        (some == 4 ? score_columns<4> : score_columns<1>)(q + i*qstride, qstride, kt + k, wide, n, a);
        for (int j = 0; j < some; j++) store(p + (i + j)*wide + k, a[j]*each(scale));
        i += some;
    }
    for (int i = 0; i < g; i++) {
        float *s = p + i*wide;
        const i64 sees = pos + i + 1, from = window && sees > window ? sees - window : 0, at = from & ~(i64)15;
        for (i64 k = start; k < at; k++) s[k] = 0;
        inv[i] = soften(s + at, from - at, sees - at);
        for (i64 k = sees; k < last; k++) s[k] = 0;
    }
    for (int i0 = 0; i0 < g; i0 += 4) for (i64 c = 0; c < n; c += 64) {
        F a[4][4]; Lanes m[4];
        for (int j = 0; j < 4; j++) {
            m[j] = head(n - c - 16*j);
            for (int i = 0; i < 4; i++) a[i][j] = zero();
        }
        const float *of[4];
        for (int i = 0; i < 4; i++) of[i] = p + (i0 + i < g ? i0 + i : 0)*wide;
        for (i64 k = start; k < last;) {
            const float *row = values.at(k, n) + c;
            for (const i64 stop = page_end(k, last); k < stop; k++, row += n) {
                F v[4];
                for (int j = 0; j < 4; j++) v[j] = load(row + 16*j, m[j]);
                for (int i = 0; i < 4; i++) {
                    const F w = each(of[i][k]);
                    for (int j = 0; j < 4; j++) a[i][j] = fma(w, v[j], a[i][j]);
                }
            }
        }
        for (int i = 0; i < 4 && i0 + i < g; i++)
            for (int j = 0; j < 4; j++) store(y + (i0 + i)*ystride + c + 16*j, m[j], a[i][j]*each(inv[i0 + i]));
    }
}
// Normalizes and rotates queries and keys where they lie, and puts keys and values into the cache. Where keys are in few
// bits, `held` (kv_heads,32,head_dim) gets the exact ones of the group that the first token is in.
static void cache_tokens(const SlModel *M, const SlCache *C, i64 layer, i64 pos, i64 m, float *qkv, i64 wide, float *spare,
                         float *held) {
    const SlLayer *L = M->layers + layer;
    const i64 hd = M->head_dim, H = M->heads, G = M->kv_heads;
    if (C->kept[layer].k_bits) memcpy(held, C->recent + C->kept[layer].recent, (size_t)(G*GROUP*hd)*4);
    for (i64 t = 0; t < m; t++) {
        const Turn turn = turn_at(M, L, C, pos + t);
        float *q = qkv + t*wide;
        normalize_heads(M, L, q, 0, 1);
        if (turn.n) for (i64 i = 0; i < H + G; i++) {
            memcpy(spare, q + i*hd, (size_t)hd*4);
            rotate(spare, turn, hd, q + i*hd);
        }
    }
    for (i64 g = 0; g < G; g++) {
        const Head h = head_at(M, C, layer, g);
        const float *k = qkv + (H + g)*hd;
        for (i64 t = 0; t < m; t++, k += wide) {
            put_key(h, hd, pos + t, k);
            put_value(h, hd, pos + t, k + G*hd);
        }
    }
}
// Columns begin..keys of kt (hd,keys): the keys of the tokens from `pos` on are in `fresh`, those before in `held` (exact, from
// `begin` on) or in pages; behind the last there are zeros.
static void keys_in_columns(const Head &h, const float *held, const float *fresh, i64 wide, i64 begin, i64 pos, i64 m, i64 hd,
                            i64 keys, float *kt) {
    for (i64 k = begin; k < keys; k++) {
        const float *key = k >= pos ? fresh + (k - pos)*wide : h.k_bits ? held + (k - begin)*hd : key_at(h, k, hd);
        for (i64 j = 0; j < hd; j++) kt[j*keys + k] = k < pos + m ? key[j] : 0.f;
    }
}
// x += y, or x += norm(y) where there is such a norm; then `norm` = what the next layer reads, if that is not x.
static void join(const SlModel *M, const float *after, const SlLayer *next, int which, i64 m, float *x, float *y,
                 float *norm, int threads) {
    const i64 dim = M->dim;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < m; t++) {
        float *row = x + t*dim, *add = y + t*dim;
        if (after) normalize(add, after, nullptr, dim, true, M->eps, add);
        for (i64 i = 0; i < dim; i++) row[i] += add[i];
        if (next && next->before)
            normalize(row, next->norm[2*which], next->norm[2*which + 1], dim, M->rms, M->eps, norm + t*dim);
    }
}
static thread_local Arena rows_arena;

// ---- tokens of several texts, each at a precision of its own ----
// y = the weight times x (tokens,k), whatever the precisions; where a precision has many tokens they go by themselves.
// `few` is room for n pieces.
static int pieces_linear(const Piece *P, i64 n, const float *x, float *y, i64 stride, Piece *few) {
    i64 some = 0;
    for (i64 i = 0; i < n; i++) {
        const SlLinear *d = P[i].d;
        if (n > 1 && P[i].count*digits_of(d) < 2*SL_MANY) { few[some++] = P[i]; continue; }
        if (int fault = tokens_linear(d, x + P[i].first*d->k, P[i].count, y + P[i].first*stride, stride)) return fault;
    }
    return some ? linear_few(few, some, (const char*)x, few->d->k, 0, (char*)y, stride) : FINE;
}
// The same with a float weight: a block is read once for all tokens.
static int dense_rows(const SlLinear *d, const float *x, i64 m, float *y, int threads) {
    float *h = (float*)arena.get(4*m*d->r + 64);
    if (!h) return NO_MEMORY;
    for (i64 t = 0; t < m; t++) adapter_row(d, x + t*d->k, 0, h + t*d->r);
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 nb = 0; nb < (d->n + 15) >> 4; nb++)
        for (i64 t = 0; t < m; t++) put_block(d, dense_block(d, x + t*d->k, nb), h + t*d->r, nb, y + t*d->n, false);
    return FINE;
}

struct Pass {                   // what is on its way
    const SlRow *R; i64 n;
    i64 *first;                 // (n+1) of each text's tokens
    Piece *pieces, *few;        // (n)
    float *x, *norm, *y, *qkv, *att, *up, *gate;
};
// All tokens through the weights that `of` finds.
template<class Of> static int through(const Pass &p, Of of, const float *in, float *out, i64 stride) {
    i64 n = 0;
    for (i64 r = 0; r < p.n; r++) {
        if (r && p.R[r].model == p.R[r - 1].model) p.pieces[n - 1].count += p.R[r].m;
        else p.pieces[n++] = {of(p.R[r].model), p.first[r], p.R[r].m};
    }
    return pieces_linear(p.pieces, n, in, out, stride, p.few);
}
// Logits of the last tokens that are wanted, one after the other.
static int finish_rows(const Pass &p, float *logits, int threads) {
    i64 n = 0, rows = 0;
    for (i64 r = 0; r < p.n; r++) {
        const SlModel *M = p.R[r].model;
        if (!p.R[r].wanted) continue;
        normalize(p.x + (p.first[r + 1] - 1)*M->dim, M->norm_w, M->norm_b, M->dim, M->rms, M->eps, p.norm + rows*M->dim);
        if (n && p.pieces[n - 1].d == M->head) p.pieces[n - 1].count++;
        else p.pieces[n++] = {M->head, rows, 1};
        rows++;
    }
    const SlLinear *d = n ? p.pieces->d : nullptr;
    if (!n) return FINE;
    return d->dense ? dense_rows(d, p.norm, rows, logits, threads) : pieces_linear(p.pieces, n, p.norm, logits, d->n, p.few);
}
// Attention of the query heads that share the keys and values of head g of one text; kt, p and vs are scratch.
static void attend_head(const SlRow *r, i64 layer, i64 g, const float *qkv, i64 wide, const float *held, i64 keys, float *kt,
                        float *p, float *vs, float *att) {
    const SlModel *M = r->model;
    const SlLayer *L = M->layers + layer;
    const Head h = head_at(M, r->cache, layer, g);
    const i64 hd = M->head_dim, H = M->heads, each = H/M->kv_heads, pos = r->pos, m = r->m, first = first_seen(L, pos);
    const float *fresh = qkv + (H + g)*hd, scale = (float)M->attention_scale;
    held += g*GROUP*hd;
    if (m == 1) {
        Head before = h;   // the group that this token is in may be complete now
        before.recent = (float*)held;
        for (i64 i = g*each; i < (g + 1)*each; i++)
            attend(before, qkv + i*hd, fresh, fresh + M->kv_heads*hd, h.values_at(pos), first, pos, hd, scale, kt, p, att + i*hd);
        return;
    }
    const i64 begin = first - first % GROUP, own = h.k_bits ? pos - pos % GROUP : begin;
    if (h.v_bits) unpack_rows(h, hd, begin, pos + m, vs);
    if (h.k_bits) unpack_units(h, hd, begin, own, kt, keys);
    const Rows values = {&h, h.v_bits ? vs : nullptr};
    for (i64 i = g*each; i < (g + 1)*each; i++) {
        if (h.k_bits || i == g*each) keys_in_columns(h, held, fresh, wide, own, pos, m, hd, keys, kt);
        for (i64 t = 0; t < m;) {   // keys are exact until their group is complete
            const i64 left = h.k_bits ? GROUP - (pos + t) % GROUP : 8, some = left < 8 ? left : 8;
            const int n = (int)(m - t < some ? m - t : some);
            attend_some(qkv + t*wide + i*hd, wide, kt, values, pos + t, n, hd, keys, L->window, scale, p, att + t*H*hd + i*hd, H*hd);
            t += n;
            if (h.k_bits && (pos + t) % GROUP == 0) unpack_units(h, hd, pos + t - GROUP, pos + t, kt, keys);
        }
    }
}
static i64 keys_of(const SlRow *r) { return ((r->pos + r->m + 15) & ~(i64)15) + 16; }
static bool in_few_bits(const SlRow *r) {   // some keys or values
    for (i64 l = 0; l < r->model->n_layers; l++) if (r->cache->kept[l].k_bits || r->cache->kept[l].v_bits) return true;
    return false;
}

// Tokens of n texts. Models of one shape; those at one precision lie together.
static int rows(const SlRow *R, i64 n, float *logits) {
    const SlModel *M = R->model;
    const i64 hd = M->head_dim, H = M->heads, G = M->kv_heads, wide = (H + 2*G)*hd, dim = M->dim, hidden = M->hidden;
    const int threads = max_threads();
    i64 m = 0, keys = 0;
    bool few = false;
    for (i64 r = 0; r < n; r++) {
        m += R[r].m; few = few || in_few_bits(R + r);
        if (keys_of(R + r) > keys) keys = keys_of(R + r);
    }
    const size_t columns = round64(hd*(keys > GROUP ? keys : GROUP)), scores = round64(8*keys);
    const size_t own = columns + scores + (few ? round64(hd*keys) : 0);
    const size_t held_size = few ? round64(G*GROUP*hd) : 0, lists = round64(8*(n + 1)) + 2*round64(n*sizeof(Piece));
    const size_t numbers = round64(3*m*dim) + round64(m*wide) + round64(m*H*hd) + round64(2*m*hidden) + held_size*n + own*threads;
    char *mem = rows_arena.get(lists + 4*numbers + 64);
    if (!mem) return NO_MEMORY;
    Pass p = {};
    p.R = R; p.n = n;
    p.first = (i64*)mem; p.pieces = (Piece*)(mem + round64(8*(n + 1)));
    p.few = (Piece*)((char*)p.pieces + round64(n*sizeof(Piece)));
    p.x = (float*)(mem + lists); p.norm = p.x + m*dim; p.y = p.norm + m*dim; p.qkv = p.x + round64(3*m*dim);
    p.att = p.qkv + round64(m*wide); p.up = p.att + round64(m*H*hd); p.gate = p.up + m*hidden;
    float *held = p.up + round64(2*m*hidden), *scratch = held + held_size*n;
    p.first[0] = 0;
    for (i64 r = 0; r < n; r++) {
        p.first[r + 1] = p.first[r] + R[r].m;
        for (i64 t = 0; t < R[r].m; t++) embed(R[r].model, R[r].ids[t], R[r].pos + t, p.x + (p.first[r] + t)*dim);
    }
    for (i64 l = 0; l < M->n_layers; l++) {
        const SlLayer *L = M->layers + l;   // norms and shape are those of all precisions
        const float *in = L->before ? p.norm : p.x;
        int fault = FINE;
        if (L->before) {
            #pragma omp parallel for schedule(static) num_threads(threads)
            for (i64 t = 0; t < m; t++)
                normalize(p.x + t*dim, L->norm[0], L->norm[1], dim, M->rms, M->eps, p.norm + t*dim);
        }
        for (i64 j = 0, at = 0; j < 3 && L->qkv[j]; at += L->qkv[j++]->n)
            if ((fault = through(p, [&](const SlModel *of) { return of->layers[l].qkv[j]; }, in, p.qkv + at, wide))) return fault;
        #pragma omp parallel num_threads(threads)
        {
            float *kt = scratch + own*thread_id(), *scored = kt + columns, *values = scored + scores;
            #pragma omp for schedule(dynamic)
            for (i64 r = 0; r < n; r++) {
                float *qkv = p.qkv + p.first[r]*wide;
                cache_tokens(R[r].model, R[r].cache, l, R[r].pos, R[r].m, qkv, wide, kt, held + r*held_size);
            }
            #pragma omp for schedule(dynamic)
            for (i64 q = 0; q < n*G; q++) {
                const i64 r = q/G;
                attend_head(R + r, l, q % G, p.qkv + p.first[r]*wide, wide, held + r*held_size, keys_of(R + r), kt,
                            scored, values, p.att + p.first[r]*H*hd);
            }
        }
        if ((fault = through(p, [&](const SlModel *of) { return of->layers[l].out; }, p.att, p.y, dim))) return fault;
        join(M, L->after[0], L, 1, m, p.x, p.y, p.norm, threads);
        if (L->gate && (fault = through(p, [&](const SlModel *of) { return of->layers[l].gate; }, in, p.gate, hidden))) return fault;
        if ((fault = through(p, [&](const SlModel *of) { return of->layers[l].up; }, in, p.up, hidden))) return fault;
        #pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 t = 0; t < m; t++)
            activate(p.up + t*hidden, L->gate ? p.gate + t*hidden : nullptr, 0, hidden, M->silu);
        if ((fault = through(p, [&](const SlModel *of) { return of->layers[l].down; }, p.up, p.y, dim))) return fault;
        join(M, L->after[1], nullptr, 0, m, p.x, p.y, p.norm, threads);
    }
    return finish_rows(p, logits, threads);
}
static int prompt(const SlModel *M, const SlCache *C, const i64 *ids, i64 m, i64 pos, float *logits) {
    const SlRow r = {sizeof r, M, C, ids, m, pos, logits != nullptr};
    return rows(&r, 1, logits);
}
