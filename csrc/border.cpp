// What the processor can do, and what comes in: it is checked before anything is read through it.
#include "packed.h"
#include <algorithm>

#ifdef SL_HERE
#if defined(SL_X86)
extern const Calls calls_avx2, calls_avx_vnni, calls_avx512;
static const Calls *LEVELS[] = {nullptr, &calls_avx2, &calls_avx_vnni, &calls_avx512, &calls_avx512};
#else
extern const Calls calls_dot, calls_i8mm;
static const Calls *LEVELS[] = {nullptr, &calls_dot, &calls_i8mm};
#endif
const Calls *calls() { return LEVELS[isa_level()]; }

static const i64 CHECKED = 0x736c5f636865636b;
static i64 times(i64 a, i64 b) { i64 c; return __builtin_mul_overflow(a, b, &c) ? -1 : c; }
static inline bool holds(const void *p, i64 len, i64 need) { return p && need > 0 && len == need; }
static inline bool holds_or_none(const void *p, i64 len, i64 need) { return !p || holds(p, len, need); }

static int check_planes(const SlLinear *d) {
    if (!within(d->bits, 2, 8) || !within(d->group, 0, 65536) || d->group % 16) return RANGE;
    if (d->step_type != 0 && !(d->group && d->step_type == 2)) return RANGE;
    const i64 unit = times((d->n + 15) >> 4, d->kp >> 4)*64;
    if (!holds(d->high, d->len[HIGH], 2*unit)) return BUFFER;
    if (d->bits > 4 && !holds(d->middle, d->len[MIDDLE], unit)) return BUFFER;
    if (d->bits > 6 && !holds(d->low, d->len[LOW], unit)) return BUFFER;
    if (d->group) {
        const i64 steps = times(times((d->n + 15) >> 4, groups_of(d)), 16);
        if (!holds(d->scale, d->len[SCALE], steps)) return BUFFER;
        return d->act_mode && !holds(d->totals, d->len[TOTALS], d->n) ? BUFFER : FINE;
    }
    if (!holds(d->scale, d->len[SCALE], d->n)) return BUFFER;
    return d->act_mode && !holds(d->sums, d->len[SUMS], d->n) ? BUFFER : FINE;
}
static int check_dense(const SlLinear *d) {
    if (!within(d->dense_type, 0, 2) || !within(d->dense_columns, 0, 1)) return RANGE;
    return holds(d->dense, d->len[DENSE], times(d->n, d->k)) ? FINE : BUFFER;
}
static int check_activations(const SlLinear *d) {
    if (!within(d->act_mode, 0, 2)) return RANGE;
    if (!d->act_mode) return FINE;
    if (!within(d->act_bits, 2, 16) || !within(d->act_symmetric, 0, 1)) return RANGE;
    const i64 top = (i64)1 << (d->act_symmetric ? d->act_bits - 1 : d->act_bits);
    if (!within(d->act_zero, d->act_symmetric ? 1 - top : 0, top - 1)) return RANGE;
    return d->act_mode == 1 && !(d->act_scale > 0 && d->act_scale <= 3.4e38) ? RANGE : FINE;
}
static int check_rotation(const SlLinear *d) {
    if (!d->order) return FINE;
    if (d->dense || !within(d->order, 1, 1024) || !within(d->block, 4, d->k)) return RANGE;
    if (d->k % d->block || d->block % d->order || (d->order > 1 && d->order % 4)) return RANGE;
    const i64 width = d->block/d->order;
    if (width & (width - 1)) return RANGE;
    if (!holds(d->signs, d->len[SIGNS], d->k)) return BUFFER;
    return d->order == 1 || holds(d->matrix, d->len[MATRIX], d->order*d->order) ? FINE : BUFFER;
}
int check_linear(const SlLinear *d) {
    if (!d || d->size != (i64)sizeof *d) return STRUCT;
    if (!within(d->n, 1, MOST) || !within(d->k, 1, 65536) || !within(d->r, 0, 65536)) return RANGE;
    if (d->kp != ((d->k + 63) & ~(i64)63)) return RANGE;
    if (int fault = check_activations(d)) return fault;
    if (int fault = d->dense ? check_dense(d) : check_planes(d)) return fault;
    if (int fault = check_rotation(d)) return fault;
    if (!holds_or_none(d->bias, d->len[BIAS], d->n)) return BUFFER;
    if (!d->r) return FINE;
    if (!holds(d->lora_a, d->len[LORA_A], times(d->r, d->k))) return BUFFER;
    return holds(d->lora_bt, d->len[LORA_BT], times(d->r, d->n)) ? FINE : BUFFER;
}
static int check_shape(const SlLinear *d, i64 n, i64 k) {
    if (int fault = check_linear(d)) return fault;
    return d->n == n && d->k == k ? FINE : SHAPES;
}
static int check_norms(const SlModel *M, const SlLayer *L) {
    for (int i = 0; i < 4; i++) if (!holds_or_none(L->norm[i], L->norm_len[i], M->dim)) return BUFFER;
    for (int i = 0; i < 2; i++) {
        if (!holds_or_none(L->after[i], L->after_len[i], M->dim)) return BUFFER;
        const i64 one = M->head_dim, all = (i ? M->kv_heads : M->heads)*one, n = L->qk_norm_len[i] == one ? one : all;
        if (!holds_or_none(L->qk_norm[i], L->qk_norm_len[i], n)) return BUFFER;
    }
    return FINE;
}
static int check_layer(const SlModel *M, const SlLayer *L, i64 *part) {
    const i64 q = M->heads*M->head_dim, kv = M->kv_heads*M->head_dim, dim = M->dim;
    if (L->size != (i64)sizeof *L) return STRUCT;
    if (!within(L->before, 0, 1) || !within(L->angles, 0, M->angles) || !within(L->window, 0, MOST)) return RANGE;
    if (int fault = check_norms(M, L)) return fault;
    const bool three = L->qkv[1] || L->qkv[2];
    int fault = check_shape(L->qkv[*part = 0], three ? q : q + 2*kv, dim);
    for (i64 i = 1; three && i < 3 && !fault; i++) fault = check_shape(L->qkv[*part = i], kv, dim);
    if (!fault) *part = 3, fault = check_shape(L->out, dim, q);
    if (!fault && L->gate) *part = 4, fault = check_shape(L->gate, M->hidden, dim);
    if (!fault) *part = 5, fault = check_shape(L->up, M->hidden, dim);
    if (!fault) *part = 6, fault = check_shape(L->down, dim, M->hidden);
    return fault;
}
static int check_ends(const SlModel *M, i64 *part) {
    *part = 7;
    if (int fault = check_linear(M->embedding)) return fault;
    if (M->embedding->k != M->dim || M->embedding->dense_columns) return SHAPES;
    if (M->embedding->order) return RANGE;
    *part = 8;
    if (int fault = check_linear(M->head)) return fault;
    if (M->head->k != M->dim) return SHAPES;
    *part = 9;
    if (!holds_or_none(M->norm_w, M->norm_w_len, M->dim)) return BUFFER;
    if (!holds_or_none(M->norm_b, M->norm_b_len, M->dim)) return BUFFER;
    return holds_or_none(M->positions, M->positions_len, times(M->context, M->dim)) ? FINE : BUFFER;
}
// Notes the largest sizes of all layers, and whether all inside are planes.
static void note_size(SlModel *M, const SlLinear *d, bool inside) {
    if (!d) return;
    if (d->kp > M->max_kp) M->max_kp = d->kp;
    if (d->r > M->max_r) M->max_r = d->r;
    if (inside && d->dense) M->packed = 0;
}

// Checks a table once, before its first use. Layer and part of the first fault go to `where` (2), -1 where there
// is none.
SL_API int sl_check_model(SlModel *M, i64 *where) {
    where[0] = where[1] = -1;
    if (!M || M->size != (i64)sizeof *M) return STRUCT;
    M->checked = 0;
    if (!within(M->n_layers, 1, 65536) || !within(M->dim, 1, 65536)) return RANGE;
    if (!within(M->hidden, 1, 65536) || !within(M->heads, 1, 65536)) return RANGE;
    if (!within(M->kv_heads, 1, M->heads) || M->heads % M->kv_heads) return RANGE;
    if (!within(M->head_dim, 1, 65536) || !within(M->angles, 0, 65536)) return RANGE;
    if (M->angles && (!within(M->rotated, 2, M->head_dim) || M->rotated % 2)) return RANGE;
    if (!within(M->context, 1, MOST) || !within(M->positions_type, 0, 2) || !M->layers) return RANGE;
    if (int fault = check_ends(M, where + 1)) return fault;
    M->packed = 1; M->max_kp = M->max_r = 0;
    for (i64 i = 0; i < M->n_layers; i++) {
        const SlLayer *L = M->layers + i;
        where[0] = i; where[1] = -1;
        if (int fault = check_layer(M, L, where + 1)) return fault;
        const SlLinear *all[7] = {L->qkv[0], L->qkv[1], L->qkv[2], L->out, L->gate, L->up, L->down};
        for (const SlLinear *d : all) note_size(M, d, true);
    }
    note_size(M, M->head, false);
    M->checked = CHECKED;
    return FINE;
}

static int check_angles(const SlModel *M, const SlCache *C) {
    if (!M->angles) return FINE;
    if (!within(C->places, C->capacity, MOST)) return RANGE;
    const i64 need = times(times(M->angles, C->places), M->rotated);
    return holds(C->cos, C->cos_len, need) && holds(C->sin, C->sin_len, need) ? FINE : BUFFER;
}

static bool is_width(i64 bits) { return !bits || bits == 2 || bits == 4 || bits == 8; }
// Every block lies in a page where the model and its bits say, and so do its exact keys; pages are as long as all together.
static int check_layout(const SlModel *M, const SlCache *C) {
    const i64 heads = M->kv_heads, hd = M->head_dim;
    i64 at = 0, recent = 0;
    if (!C->kept || C->kept_len != M->n_layers) return BUFFER;
    for (const SlKept *S = C->kept; S < C->kept + M->n_layers; S++) {
        if (S->size != (i64)sizeof *S) return STRUCT;
        if (!is_width(S->k_bits) || !is_width(S->v_bits)) return RANGE;
        if (S->keys != at || S->values != (at += round64(heads*unit_bytes(hd, S->k_bits)))) return RANGE;
        if (S->recent != (S->k_bits ? recent : 0)) return RANGE;
        at += round64(heads*GROUP*row_bytes(hd, S->v_bits));
        if (S->k_bits) recent += heads*GROUP*hd;
    }
    if (C->page_len != at || C->recent_len != recent) return BUFFER;
    return !C->recent == !recent ? FINE : BUFFER;
}
static int check_pages(const SlModel *M, const SlCache *C) {
    if (!within(C->capacity, 1, MOST) || C->capacity % GROUP) return RANGE;
    if (!holds(C->pages, C->pages_len, C->capacity/GROUP)) return BUFFER;
    for (i64 i = 0; i < C->pages_len; i++) if (!C->pages[i] || (uintptr_t)C->pages[i] % 64) return BUFFER;
    if ((uintptr_t)C->recent % 4) return BUFFER;
    if (int fault = check_layout(M, C)) return fault;
    return check_angles(M, C);
}

// Checks a pass before it begins: tokens ids (m) at position pos.
int check_pass(const SlModel *M, const SlCache *C, const i64 *ids, i64 m, i64 pos) {
    if (!M || !C || M->size != (i64)sizeof *M || C->size != (i64)sizeof *C) return STRUCT;
    if (M->checked != CHECKED) return UNCHECKED;
    if (int fault = check_pages(M, C)) return fault;
    if (m < 1 || pos < 0 || m > C->capacity - pos || m > M->context - pos) return POSITION;
    for (i64 t = 0; t < m; t++) if (ids[t] < 0 || ids[t] >= M->embedding->n) return TOKEN;
    return FINE;
}
// Texts may share pages that all of them only read: what one writes is no other's, and in no other place of its own.
static int check_apart(const SlRow *rows, i64 n) {
    static thread_local Arena arena;
    i64 most = 0, count = 0;
    for (const SlRow *R = rows; R < rows + n; R++) most += (R->m - 1)/GROUP + 3;
    uintptr_t *written = (uintptr_t*)arena.get(most*sizeof *written);
    if (!written) return NO_MEMORY;
    for (const SlRow *R = rows; R < rows + n; R++) {
        for (i64 j = R->pos/GROUP; j <= (R->pos + R->m - 1)/GROUP; j++) written[count++] = (uintptr_t)R->cache->pages[j];
        if (R->cache->recent) written[count++] = (uintptr_t)R->cache->recent;
    }
    std::sort(written, written + count);
    for (i64 i = 1; i < count; i++) if (written[i] == written[i - 1]) return RANGE;
    for (const SlRow *R = rows; R < rows + n; R++) for (i64 j = 0; j < R->pos/GROUP; j++)
        if (std::binary_search(written, written + count, (uintptr_t)R->cache->pages[j])) return RANGE;
    return FINE;
}
// ---- the calls: checks first, then the kernels of the level ----

// y (m,n) = x (m,k) times the weight. n and k are those of the caller's x and y, type is of both, xstride counts
// the numbers from one token to the next.
SL_API int sl_linear(const SlLinear *d, const void *x, i64 m, i64 k, i64 xstride, int type, void *y, i64 n) {
    if (!calls()) return CANNOT;
    if (int fault = check_linear(d)) return fault;
    if (d->n != n || d->k != k) return SHAPES;
    if (d->dense || !within(m, 0, MOST) || !within(type, 0, 2) || xstride < 0) return RANGE;
    if (m == 0) return FINE;
    return x && y ? calls()->linear(d, x, m, xstride, type, y, n) : BUFFER;
}
// Token `id` at position `pos`: its keys and values go into the cache, the logits of the next token to `logits` (if
// not null).
SL_API int sl_decode_step(const SlModel *M, const SlCache *C, i64 id, i64 pos, float *logits) {
    if (!calls()) return CANNOT;
    if (int fault = check_pass(M, C, &id, 1, pos)) return fault;
    return calls()->decode(M, C, id, pos, logits);
}
// Tokens ids (m) at positions pos, pos+1, ...: like m decoding steps, of which only the last makes logits (if not
// null). Layers must be packed.
SL_API int sl_prompt(const SlModel *M, const SlCache *C, const i64 *ids, i64 m, i64 pos, float *logits) {
    if (!calls()) return CANNOT;
    if (!ids) return BUFFER;
    if (int fault = check_pass(M, C, ids, m, pos)) return fault;
    return M->packed ? calls()->prompt(M, C, ids, m, pos, logits) : SHAPES;
}
// Models through which tokens can go together: of one shape, and all inside packed.
static bool same_shape(const SlModel *a, const SlModel *b) {
    if (a == b) return true;
    if (a->n_layers != b->n_layers || a->dim != b->dim || a->heads != b->heads || a->kv_heads != b->kv_heads) return false;
    if (a->head_dim != b->head_dim || a->hidden != b->hidden || a->rms != b->rms || a->silu != b->silu) return false;
    if (a->head->n != b->head->n || a->head->dense != b->head->dense) return false;
    for (i64 i = 0; i < a->n_layers; i++) {
        const SlLayer *x = a->layers + i, *y = b->layers + i;
        if (!x->gate != !y->gate || !x->qkv[1] != !y->qkv[1] || x->before != y->before || x->window != y->window) return false;
    }
    return true;
}
// Tokens of n texts at once, each at its own precision, as `sl_prompt` runs those of one. No text writes what another
// reads. The logits (wanted,vocabulary) are those after the last tokens, of the texts that want them.
SL_API int sl_rows(const SlRow *rows, i64 n, float *logits, i64 logits_len) {
    if (!calls()) return CANNOT;
    if (!rows || !within(n, 1, 65536)) return RANGE;
    i64 tokens = 0, wanted = 0;
    for (i64 r = 0; r < n; r++) {
        const SlRow *R = rows + r;
        if (R->size != (i64)sizeof *R) return STRUCT;
        if (!R->ids) return BUFFER;
        if (int fault = check_pass(R->model, R->cache, R->ids, R->m, R->pos)) return fault;
        if (!R->model->packed || !same_shape(rows->model, R->model)) return SHAPES;
        if ((tokens += R->m) > MOST) return RANGE;
        wanted += R->wanted != 0;
    }
    if (int fault = check_apart(rows, n)) return fault;
    if (wanted && (!logits || logits_len != times(wanted, rows->model->head->n))) return BUFFER;
    return calls()->rows(rows, n, logits);
}
#else
SL_API int sl_check_model(SlModel*, i64*) { return 1; }
SL_API int sl_linear(const SlLinear*, const void*, i64, i64, i64, int, void*, i64) { return 1; }
SL_API int sl_decode_step(const SlModel*, const SlCache*, i64, i64, float*) { return 1; }
SL_API int sl_prompt(const SlModel*, const SlCache*, const i64*, i64, i64, float*) { return 1; }
SL_API int sl_rows(const SlRow*, i64, float*, i64) { return 1; }
#endif
