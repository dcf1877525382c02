// vec.h for AVX2, with or without VNNI: sixteen numbers are two vectors.
struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct D { __m256d v[4]; };
struct Bytes { __m256i a, b; };
struct Lanes { int n; };

INL Lanes head(i64 left) { return {left >= 16 ? 16 : left <= 0 ? 0 : (int)left}; }
INL __m256i eight_of(int n) {   // all bits in the first n of eight
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INL __m256 low(Lanes m) { return _mm256_castsi256_ps(eight_of(m.n)); }
INL __m256 high(Lanes m) { return _mm256_castsi256_ps(eight_of(m.n - 8)); }
INL F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INL F each(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INL F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INL F load(const float *p, Lanes m) {
    if (m.n == 16) return load(p);
    return {_mm256_maskload_ps(p, eight_of(m.n)), m.n > 8 ? _mm256_maskload_ps(p + 8, eight_of(m.n - 8)) : _mm256_setzero_ps()};
}
INL void store(float *p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INL void store(float *p, Lanes m, F x) {
    if (m.n == 16) { store(p, x); return; }
    _mm256_maskstore_ps(p, eight_of(m.n), x.a);
    if (m.n > 8) _mm256_maskstore_ps(p + 8, eight_of(m.n - 8), x.b);
}
INL F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INL F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INL F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INL F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INL F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }      // x y + z
INL F fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }   // z - x y
INL F least(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }                       // y where x is NaN
INL F most(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INL F keep(F x, Lanes m) { return {_mm256_and_ps(low(m), x.a), _mm256_and_ps(high(m), x.b)}; }             // 0 elsewhere
INL F drop(F x, Lanes m) { return {_mm256_andnot_ps(low(m), x.a), _mm256_andnot_ps(high(m), x.b)}; }       // 0 there
INL F pick(Lanes m, F yes, F no) {
    return {_mm256_blendv_ps(no.a, yes.a, low(m)), _mm256_blendv_ps(no.b, yes.b, high(m))};
}
INL F nearest(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
INL __m256 times_two_to(__m256 x, __m256 n) {   // in two steps, since 2^128 is no number
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    const __m256i bias = _mm256_set1_epi32(127);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
INL F times_two_to(F x, F n) { return {times_two_to(x.a, n.a), times_two_to(x.b, n.b)}; }                  // whole n
INL float sum_of(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
INL float largest_of(F x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
INL float smallest_of(F x) { return -largest_of(zero() - x); }

INL I no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INL I all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INL I load(const int32_t *p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}; }
INL I load(const int32_t *p, Lanes m) {
    if (m.n == 16) return load(p);
    return {_mm256_maskload_epi32(p, eight_of(m.n)),
            m.n > 8 ? _mm256_maskload_epi32(p + 8, eight_of(m.n - 8)) : _mm256_setzero_si256()};
}
INL void store(int32_t *p, I x) { _mm256_storeu_si256((__m256i*)p, x.a); _mm256_storeu_si256((__m256i*)(p + 8), x.b); }
INL I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INL I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INL I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
INL I operator^(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
INL I most(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
INL I keep(I x, Lanes m) { return {_mm256_and_si256(eight_of(m.n), x.a), _mm256_and_si256(eight_of(m.n - 8), x.b)}; }
template<int N> INL I shift_left(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
INL I shift_left(I x, int n) {
    const __m128i by = _mm_cvtsi32_si128(n);
    return {_mm256_sll_epi32(x.a, by), _mm256_sll_epi32(x.b, by)};
}
template<int N> INL I shift_right(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }   // zeros come in
template<int N> INL I shift_down(I x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }    // signs come in
INL int32_t sum_of(I x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
INL int32_t largest_of(I x) {
    const __m256i s = _mm256_max_epi32(x.a, x.b);
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
INL F floats(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INL I ints(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }                             // to the nearest
INL I bits_of(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INL __m256i or_nan(__m256i u, __m256 x) {
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc0), is_nan);
}
INL I or_nan(I u, F x) { return {or_nan(u.a, x.a), or_nan(u.b, x.b)}; }     // the bfloat16 of NaN where x is NaN
struct Sixteen { __m128i a, b; };                                          // numbers of 16 bits
INL Sixteen load_16(const uint16_t *p, Lanes m) {
    if (m.n == 16) return {_mm_loadu_si128((const __m128i*)p), _mm_loadu_si128((const __m128i*)(p + 8))};
    uint16_t some[16] = {0};
    memcpy(some, p, 2*(size_t)m.n);
    return {_mm_loadu_si128((const __m128i*)some), _mm_loadu_si128((const __m128i*)(some + 8))};
}
INL void store_16(uint16_t *p, Lanes m, Sixteen x) {
    if (m.n == 16) { _mm_storeu_si128((__m128i*)p, x.a); _mm_storeu_si128((__m128i*)(p + 8), x.b); return; }
    uint16_t some[16];
    _mm_storeu_si128((__m128i*)some, x.a); _mm_storeu_si128((__m128i*)(some + 8), x.b);
    memcpy(p, some, 2*(size_t)m.n);
}
INL F load_bfloat(const uint16_t *p, Lanes m) {
    const Sixteen x = load_16(p, m);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x.a), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x.b), 16))};
}
INL F load_half(const uint16_t *p, Lanes m) {
    const Sixteen x = load_16(p, m);
    return {_mm256_cvtph_ps(x.a), _mm256_cvtph_ps(x.b)};
}
INL void store_half(uint16_t *p, Lanes m, F x) {
    store_16(p, m, {_mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT)});
}
INL __m128i low16(__m256i x) {
    x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
INL void store_low16(uint16_t *p, Lanes m, I x) { store_16(p, m, {low16(x.a), low16(x.b)}); }
INL I load_bytes(const uint8_t *p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
INL I load_bytes(const uint8_t *p, Lanes m) {
    if (m.n == 16) return load_bytes(p);
    uint8_t some[16] = {0};
    memcpy(some, p, (size_t)m.n);
    return load_bytes(some);
}
INL void store_bytes(int8_t *p, I x) {                                      // the lowest
    const __m256i one = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i a = _mm256_shuffle_epi8(x.a, one), b = _mm256_shuffle_epi8(x.b, one);
    const __m128i l = _mm_unpacklo_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i h = _mm_unpacklo_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    _mm_storeu_si128((__m128i*)p, _mm_unpacklo_epi64(l, h));
}
// Eight bytes twice, the second time moved down by N bits.
template<int N> INL I load_8_twice(const uint8_t *p) {
    const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    return {v, _mm256_srli_epi32(v, N)};
}

INL D each(double x) { const __m256d v = _mm256_set1_pd(x); return {{v, v, v, v}}; }
INL D operator+(D x, D y) { for (int i = 0; i < 4; i++) x.v[i] = _mm256_add_pd(x.v[i], y.v[i]); return x; }
INL D operator*(D x, D y) { for (int i = 0; i < 4; i++) x.v[i] = _mm256_mul_pd(x.v[i], y.v[i]); return x; }
INL D fma(D x, D y, D z) { for (int i = 0; i < 4; i++) x.v[i] = _mm256_fmadd_pd(x.v[i], y.v[i], z.v[i]); return x; }
INL D fnma(D x, D y, D z) { for (int i = 0; i < 4; i++) x.v[i] = _mm256_fnmadd_pd(x.v[i], y.v[i], z.v[i]); return x; }
INL D doubles(F x) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)),
             _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1))}};
}
INL D doubles(I x) {
    return {{_mm256_cvtepi32_pd(_mm256_castsi256_si128(x.a)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(x.a, 1)),
             _mm256_cvtepi32_pd(_mm256_castsi256_si128(x.b)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(x.b, 1))}};
}
INL F floats(D x) {
    return {_mm256_set_m128(_mm256_cvtpd_ps(x.v[1]), _mm256_cvtpd_ps(x.v[0])),
            _mm256_set_m128(_mm256_cvtpd_ps(x.v[3]), _mm256_cvtpd_ps(x.v[2]))};
}

INL Bytes all_bytes(int x) { return {_mm256_set1_epi8((char)x), _mm256_set1_epi8((char)x)}; }
INL Bytes load_64(const void *p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
INL void store_64(void *p, Bytes x) { _mm256_storeu_si256((__m256i*)p, x.a); _mm256_storeu_si256((__m256i*)p + 1, x.b); }
INL Bytes operator&(Bytes x, Bytes y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
INL Bytes operator|(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
INL __m256i pick(__m256i mask, __m256i yes, __m256i no) {
    return _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no));
}
INL Bytes pick(Bytes mask, Bytes yes, Bytes no) { return {pick(mask.a, yes.a, no.a), pick(mask.b, yes.b, no.b)}; }
template<int N> INL Bytes up(Bytes x) { return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)}; }     // bits of neighbours
template<int N> INL Bytes down(Bytes x) { return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)}; }   // may come in
INL int32_t sum_16(const int8_t *p) {
    const __m128i s = _mm_sad_epu8(_mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8((char)0x80)),
                                   _mm_setzero_si128());
    return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 2048;
}
INL float from_half(uint16_t h) { return _cvtsh_ss(h); }
INL uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

INL __m256i four_bytes(const int8_t *x) { int32_t b; memcpy(&b, x, 4); return _mm256_set1_epi32(b); }
// Sums of products of B blocks of 16 channels with R rows of bytes, A of them side by side so that none waits for
// another. Codes come in TAKES vectors at a time.
#if SL_LEVEL >= 2
#define SL_WHOLE_CODES 1
template<int P, int R, int A, int B> struct Sums {
    enum { TAKES = 1 };
    I s[B][R][A];
    INL_MEMBER void clear() {
        for (int b = 0; b < B; b++) for (int r = 0; r < R; r++) for (int a = 0; a < A; a++) s[b][r][a] = no_ints();
    }
    INL_MEMBER void add(int j, const Bytes w[B][TAKES], const int8_t *x, i64 far) {   // vector j of a unit, at x
        for (int r = 0; r < R; r++) {
            const __m256i four = four_bytes(x + r*far + 4*j);
            for (int b = 0; b < B; b++) {
                I &t = s[b][r][j % A];
                t.a = _mm256_dpbusd_avx_epi32(t.a, w[b][0].a, four); t.b = _mm256_dpbusd_avx_epi32(t.b, w[b][0].b, four);
            }
        }
    }
    INL_MEMBER I total(int b, int r) const {
        I t = s[b][r][0];
        for (int a = 1; a < A; a++) t = t + s[b][r][a];
        return t;
    }
};
#else
// Without VNNI, products of whole codes would not fit 16 bits in pairs; those of four bits do, and four of them. Upper
// bits count sixteen times when they come to 32 bits.
#define SL_WHOLE_CODES 0
INL __m256i nibbles(__m256i w0, __m256i w1, __m256i w2, __m256i w3, const __m256i x[4], __m256i worth) {
    const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(w0, x[0]), _mm256_maddubs_epi16(w1, x[1]));
    const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(w2, x[2]), _mm256_maddubs_epi16(w3, x[3]));
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), worth);
}
template<int P, int R, int A, int B> struct Sums {
    enum { TAKES = 4 };
    I s[B][R];
    INL_MEMBER void clear() { for (int b = 0; b < B; b++) for (int r = 0; r < R; r++) s[b][r] = no_ints(); }
    INL_MEMBER void add(int first, const Bytes w[B][TAKES], const int8_t *x, i64 far) {
        const __m256i worth = _mm256_set1_epi16(first < 4 ? 16 : 1);
        for (int r = 0; r < R; r++) {
            __m256i four[4];
            for (int j = 0; j < 4; j++) four[j] = four_bytes(x + r*far + 4*j);
            for (int b = 0; b < B; b++) {
                I &t = s[b][r];
                const Bytes *v = w[b];
                t.a = _mm256_add_epi32(t.a, nibbles(v[0].a, v[1].a, v[2].a, v[3].a, four, worth));
                t.b = _mm256_add_epi32(t.b, nibbles(v[0].b, v[1].b, v[2].b, v[3].b, four, worth));
            }
        }
    }
    INL_MEMBER I total(int b, int r) const { return s[b][r]; }
};
#endif

// Rows of bytes for few tokens (of which up to half have SL_ASIDE sums side by side), tokens finished together, and for
// many tokens rows and blocks, so that sums and codes stay in registers.
enum { SL_ASIDE = 2, SL_FINISH = 4 };
#define SL_ROWS 4
#define SL_MANY 6
#define SL_BLOCKS 1
