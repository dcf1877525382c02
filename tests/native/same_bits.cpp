// Runs layers and a whole small model through a library of kernels, and prints a hash of each result. The numbers that
// go in come from a generator, so programs for different processors can be compared line by line.
//
//     same_bits LIBRARY
#include "../../csrc/packed.h"
#include <cstdio>
#include <dlfcn.h>
#include <string>
#include <vector>

static uint64_t state = 88172645463325252ull;
static uint32_t random_bits() { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return (uint32_t)(state >> 32); }
static float uniform() { return (float)(random_bits() >> 8)*(2.f/(1 << 24)) - 1.f; }   // exact on every machine
template<class T> static uint64_t hash(const std::vector<T> &x) {
    uint64_t h = 1469598103934665603ull;
    const unsigned char *p = (const unsigned char*)x.data();
    for (size_t i = 0; i < x.size()*sizeof(T); i++) h = (h ^ p[i])*1099511628211ull;
    return h;
}
static std::vector<float> floats(i64 n, float scale) {
    std::vector<float> x(n);
    for (auto &v : x) v = uniform()*scale;
    return x;
}

struct Layer {                  // a layer with what it points to
    SlLinear d = {};
    std::vector<uint8_t> planes[3];
    std::vector<float> scale, bias, a, b, totals, dense;
    std::vector<uint16_t> halves;
    std::vector<int32_t> sums;
};
struct Kind { i64 bits, act_mode, act_bits, symmetric, group, rank; bool half_steps, dense; };
template<class T> static void give(SlLinear &d, int which, const void *&to, const std::vector<T> &x) {
    to = x.data(); d.len[which] = (i64)x.size();
}
#define GIVE(which, field, x) { const void *p_; give(L.d, which, p_, x); L.d.field = (decltype(L.d.field))p_; }
static void make(Layer &L, i64 n, i64 k, Kind kind) {
    SlLinear &d = L.d;
    d.size = sizeof d; d.n = n; d.k = k; d.kp = (k + 63) & ~63; d.bits = kind.bits; d.r = kind.rank;
    d.zero = 120./(1 << (8 - kind.bits)) - .5;
    d.act_mode = kind.act_mode; d.act_bits = kind.act_mode ? kind.act_bits : 0; d.act_symmetric = kind.symmetric;
    d.act_scale = .013; d.act_zero = kind.act_mode == 1 && !kind.symmetric ? 1 << (kind.act_bits - 1) : 0;
    if (!kind.act_mode) d.act_scale = 0;
    d.lora_scale = 1.5;
    if (kind.dense) {
        L.dense = floats(n*k, .1f);
        d.bits = 0; d.act_mode = d.act_bits = 0;
        GIVE(DENSE, dense, L.dense)
    } else {
        const i64 blocks = (n + 15)/16, units = d.kp/16, groups = kind.group ? (k + kind.group - 1)/kind.group : 0;
        for (int i = 0; i < 3; i++) {
            L.planes[i].resize(blocks*units*(i ? 64 : 128));
            for (auto &v : L.planes[i]) v = (uint8_t)random_bits();
        }
        GIVE(HIGH, high, L.planes[0]) GIVE(MIDDLE, middle, L.planes[1]) GIVE(LOW, low, L.planes[2])
        d.group = kind.group;
        const i64 steps = groups ? blocks*groups*16 : n;
        L.scale.resize(steps);
        for (auto &v : L.scale) v = (float)(1 + random_bits() % 1000)/(1 << 16);
        if (kind.half_steps) {
            d.step_type = 2;
            for (i64 i = 0; i < steps; i++) L.halves.push_back((uint16_t)(0x1400 + random_bits() % 0x800));
            GIVE(SCALE, scale, L.halves)
        } else GIVE(SCALE, scale, L.scale)
        if (kind.act_mode) {
            if (groups) { L.totals = floats(n, 1.f); GIVE(TOTALS, totals, L.totals) }
            else {
                for (i64 i = 0; i < n; i++) L.sums.push_back((int32_t)(random_bits() % 100000));
                GIVE(SUMS, sums, L.sums)
            }
        }
    }
    L.bias = floats(n, .1f); GIVE(BIAS, bias, L.bias)
    if (kind.rank) {
        L.a = floats(kind.rank*k, .1f); GIVE(LORA_A, lora_a, L.a)
        L.b = floats(kind.rank*n, .1f); GIVE(LORA_BT, lora_bt, L.b)
    }
}

typedef int (*linear_fn)(const SlLinear*, const void*, i64, i64, i64, int, void*, i64);
typedef int (*check_fn)(SlModel*, i64*);
typedef int (*decode_fn)(const SlModel*, const SlCache*, i64, i64, float*);
typedef int (*rows_fn)(const SlRow*, i64, float*, i64);
typedef int (*prompt_fn)(const SlModel*, const SlCache*, const i64*, i64, i64, float*);

static const Kind KINDS[] = {
    {8, 2, 8, 0, 0, 4, false, false}, {6, 1, 8, 0, 0, 0, false, false}, {4, 2, 4, 1, 0, 5, false, false},
    {8, 0, 0, 0, 0, 3, false, false}, {7, 2, 12, 0, 0, 0, false, false}, {5, 2, 6, 1, 0, 8, false, false},
    {3, 0, 0, 0, 0, 0, false, false}, {2, 2, 8, 0, 0, 0, false, false},
    {8, 2, 8, 0, 32, 2, true, false}, {4, 2, 8, 0, 32, 0, true, false}, {6, 0, 0, 0, 64, 0, false, false},
    {4, 0, 0, 0, 48, 3, false, false}, {7, 1, 8, 1, 16, 0, true, false}};

static int layers(linear_fn linear) {
    const i64 shapes[][2] = {{16, 64}, {40, 48}, {33, 200}, {96, 128}, {130, 576}}, counts[] = {1, 2, 3, 5, 13, 40};
    for (auto &shape : shapes) for (auto &kind : KINDS) for (i64 m : counts) for (int type = 0; type < 2; type++) {
        const i64 n = shape[0], k = shape[1];
        Layer L;
        make(L, n, k, kind);
        std::vector<float> x = floats(m*k, 3.f), y(m*n);
        std::vector<uint16_t> hx, hy(m*n);
        for (float v : x) { uint32_t u; memcpy(&u, &v, 4); hx.push_back((uint16_t)(u >> 16)); }
        const int fault = linear(&L.d, type ? (void*)hx.data() : (void*)x.data(), m, k, k, type, type ? (void*)hy.data() : (void*)y.data(), n);
        printf("%lld x %lld, %lld bits, activations %lld/%lld, group %lld, %lld tokens, type %d: %d %016llx\n", (long long)n,
               (long long)k, (long long)kind.bits, (long long)kind.act_mode, (long long)kind.act_bits, (long long)kind.group,
               (long long)m, type, fault, (unsigned long long)(type ? hash(hy) : hash(y)));
    }
    return 0;
}

// The pages of a text, for as many tokens as the model has room for.
struct Text {
    std::vector<uint8_t> room;
    std::vector<uint8_t*> pages;
    std::vector<SlKept> kept;
    std::vector<float> recent;
    SlCache cache = {};
    Text(const SlModel &M, i64 k_bits, i64 v_bits) {
        i64 at = 0, exact = 0;
        for (i64 i = 0; i < M.n_layers; i++) {
            const i64 values = at + round64(M.kv_heads*unit_bytes(M.head_dim, k_bits));
            kept.push_back({sizeof(SlKept), k_bits, v_bits, at, values, k_bits ? exact : 0});
            at = values + round64(M.kv_heads*GROUP*row_bytes(M.head_dim, v_bits));
            if (k_bits) exact += M.kv_heads*GROUP*M.head_dim;
        }
        room.resize(M.context/GROUP*at + 64);
        uint8_t *first = room.data() + (-(uintptr_t)room.data() & 63);   // pages begin at multiples of 64
        for (i64 i = 0; i < M.context/GROUP; i++) pages.push_back(first + i*at);
        recent.resize(exact);
        cache.size = sizeof cache; cache.capacity = cache.places = M.context; cache.page_len = at;
        cache.pages = pages.data(); cache.pages_len = (i64)pages.size();
        cache.recent = exact ? recent.data() : nullptr; cache.recent_len = exact;
        cache.kept = kept.data(); cache.kept_len = M.n_layers;
    }
};

// A model whose layers are those of another at so many bits: the same planes.
struct Narrow { std::vector<SlLinear> layers; std::vector<SlLayer> blocks; SlModel model; };
static void narrow(Narrow &to, const SlModel &from, i64 bits) {
    to.model = from; to.blocks.assign(from.layers, from.layers + from.n_layers);
    to.layers.reserve(7*from.n_layers);
    auto change = [&](const SlLinear *&d) {
        if (!d) return;
        to.layers.push_back(*d);
        d = &to.layers.back();
        to.layers.back().bits = bits; to.layers.back().zero = 120./(1 << (8 - bits)) - .5;
    };
    for (auto &L : to.blocks) {
        for (auto &d : L.qkv) change(d);
        change(L.out); change(L.gate); change(L.up); change(L.down);
    }
    to.model.layers = to.blocks.data(); to.model.checked = to.model.packed = 0;
}
// Passes of up to eight texts, of all numbers at 4, 6 and 8 bits.
static void company(check_fn check, rows_fn rows, const SlModel &M, const SlCache &like, const char *name) {
    Narrow models[3];
    i64 where[2];
    int faults = 0;
    for (int i = 0; i < 3; i++) { narrow(models[i], M, 4 + 2*i); faults |= check(&models[i].model, where); }
    const i64 id = 7, vocabulary = M.head->n;
    std::vector<float> logits(8*vocabulary), all;
    std::vector<Text> texts;
    texts.reserve(8);
    for (int i = 0; i < 8; i++) {
        texts.emplace_back(M, 0, 0);
        SlCache &C = texts[i].cache;
        C.cos = like.cos; C.sin = like.sin; C.cos_len = like.cos_len; C.sin_len = like.sin_len;
    }
    for (int a = 0; a <= 8; a++) for (int b = 0; a + b <= 8; b++) for (int c = 0; a + b + c <= 8; c++) {
        SlRow some[8];
        const int n = a + b + c;
        for (int i = 0; i < n; i++)
            some[i] = {sizeof(SlRow), &models[i < a ? 0 : i < a + b ? 1 : 2].model, &texts[i].cache, &id, 1, 0, 1};
        if (n) faults |= rows(some, n, logits.data(), n*vocabulary);
        all.insert(all.end(), logits.begin(), logits.begin() + n*vocabulary);
    }
    printf("%s, rows of 4, 6 and 8 bits: %d %016llx\n", name, faults, (unsigned long long)hash(all));
}

// Two blocks of grouped attention; GELU and layer norm, or SiLU and RMS norm with rotary angles.
static void model(check_fn check, decode_fn decode, prompt_fn prompt, rows_fn rows, bool llama, const Kind &kind, i64 k_bits, i64 v_bits) {
    const i64 dim = 48, heads = 4, kv = 2, hd = 12, hidden = 80, vocabulary = 50, context = 96, depth = 2;
    std::vector<Layer> parts(depth*7 + 2);
    std::vector<SlLayer> blocks(depth);
    std::vector<std::vector<float>> norms;
    norms.reserve(64);
    auto norm = [&](bool with) -> const float* {
        if (!with) return nullptr;
        norms.push_back(floats(dim, 1.f));
        return norms.back().data();
    };
    for (i64 i = 0; i < depth; i++) {
        Layer *p = &parts[i*7];
        make(p[0], heads*hd, dim, kind); make(p[1], kv*hd, dim, kind); make(p[2], kv*hd, dim, kind);
        make(p[3], dim, heads*hd, kind); make(p[4], hidden, dim, kind); make(p[5], hidden, dim, kind); make(p[6], dim, hidden, kind);
        SlLayer &L = blocks[i];
        L = {};
        L.size = sizeof L; L.before = 1; L.angles = llama; L.window = llama && i ? 20 : 0;
        for (int j = 0; j < 4; j++) { L.norm[j] = norm(!llama || j % 2 == 0); L.norm_len[j] = L.norm[j] ? dim : 0; }
        for (int j = 0; j < 3; j++) L.qkv[j] = &p[j].d;
        L.out = &p[3].d; L.gate = llama ? &p[4].d : nullptr; L.up = &p[5].d; L.down = &p[6].d;
    }
    make(parts[depth*7], vocabulary, dim, {8, 0, 0, 0, 0, 0, false, false});
    make(parts[depth*7 + 1], vocabulary, dim, {0, 0, 0, 0, 0, 0, false, true});
    SlModel M = {};
    M.size = sizeof M; M.layers = blocks.data(); M.embedding = &parts[depth*7].d; M.head = &parts[depth*7 + 1].d;
    std::vector<float> positions = floats(context*dim, .3f);
    if (!llama) { M.positions = positions.data(); M.positions_len = context*dim; }
    M.norm_w = norm(true); M.norm_w_len = dim;
    if (!llama) { M.norm_b = norm(true); M.norm_b_len = dim; }
    M.n_layers = depth; M.dim = dim; M.heads = heads; M.kv_heads = kv; M.head_dim = hd; M.hidden = hidden; M.context = context;
    M.rms = M.silu = llama; M.angles = llama; M.rotated = llama ? 8 : 0;
    M.eps = 1e-5; M.attention_scale = .29; M.embedding_scale = 1;
    i64 where[2];
    const int fault = check(&M, where);
    std::vector<float> angles(2*context*8);
    for (auto &v : angles) v = uniform();
    Text text(M, k_bits, v_bits);
    SlCache &C = text.cache;
    if (llama) { C.cos = angles.data(); C.sin = angles.data() + context*8; C.cos_len = C.sin_len = context*8; }
    std::vector<float> logits(vocabulary), all;
    std::vector<i64> ids;
    for (int i = 0; i < 45; i++) ids.push_back(random_bits() % vocabulary);
    int faults = fault;
    faults |= prompt(&M, &C, ids.data(), 40, 0, logits.data());
    all.insert(all.end(), logits.begin(), logits.end());
    for (i64 t = 40; t < 45; t++) {
        faults |= decode(&M, &C, ids[t], t, logits.data());
        all.insert(all.end(), logits.begin(), logits.end());
    }
    for (float v : all) if (v != v) faults |= 64;
    printf("%s, %lld bits, group %lld, cache %lld/%lld: %d %016llx\n", llama ? "llama" : "gpt2", (long long)kind.bits,
           (long long)kind.group, (long long)k_bits, (long long)v_bits, faults, (unsigned long long)hash(all));
    if (!k_bits && !v_bits && !kind.group) company(check, rows, M, C, llama ? "llama" : "gpt2");
}

int main(int argc, char **argv) {
    void *lib = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (!lib) { fprintf(stderr, "%s\n", argc > 1 ? dlerror() : "which library?"); return 2; }
    auto level = (int (*)())dlsym(lib, "sl_isa");
    auto name = (const char *(*)(int))dlsym(lib, "sl_isa_name");
    const char *said = name(level());
    fprintf(stderr, "%s\n", said ? said : "a name of no level here");
    layers((linear_fn)dlsym(lib, "sl_linear"));
    const i64 caches[][2] = {{0, 0}, {8, 8}, {4, 4}, {4, 2}, {2, 8}};
    for (int llama = 0; llama < 2; llama++) for (int i = 0; i < 13; i += 3) for (auto &c : caches)
        model((check_fn)dlsym(lib, "sl_check_model"), (decode_fn)dlsym(lib, "sl_decode_step"), (prompt_fn)dlsym(lib, "sl_prompt"),
              (rows_fn)dlsym(lib, "sl_rows"), llama, KINDS[i], c[0], c[1]);
    return 0;
}
