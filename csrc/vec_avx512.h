// vec.h for AVX-512.
struct F { __m512 v; };
struct I { __m512i v; };
struct D { __m512d a, b; };
struct Bytes { __m512i v; };
typedef __mmask16 Lanes;

INL Lanes head(i64 left) { return left >= 16 ? (Lanes)0xffff : left <= 0 ? (Lanes)0 : (Lanes)((1u << left) - 1); }
INL F zero() { return {_mm512_setzero_ps()}; }
INL F each(float x) { return {_mm512_set1_ps(x)}; }
INL F load(const float *p) { return {_mm512_loadu_ps(p)}; }
INL F load(const float *p, Lanes m) { return {_mm512_maskz_loadu_ps(m, p)}; }
INL void store(float *p, F x) { _mm512_storeu_ps(p, x.v); }
INL void store(float *p, Lanes m, F x) { _mm512_mask_storeu_ps(p, m, x.v); }
INL F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INL F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INL F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INL F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INL F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }      // a b + c
INL F fnma(F a, F b, F c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }    // c - a b
INL F least(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }                // b where a is NaN
INL F most(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INL F keep(F a, Lanes m) { return {_mm512_maskz_mov_ps(m, a.v)}; }         // 0 elsewhere
INL F drop(F a, Lanes m) { return {_mm512_maskz_mov_ps(~m, a.v)}; }        // 0 there
INL F pick(Lanes m, F yes, F no) { return {_mm512_mask_mov_ps(no.v, m, yes.v)}; }
INL F nearest(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }
INL F times_two_to(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }      // whole n
INL float sum_of(F a) { return _mm512_reduce_add_ps(a.v); }
INL float largest_of(F a) { return _mm512_reduce_max_ps(a.v); }
INL float smallest_of(F a) { return _mm512_reduce_min_ps(a.v); }

INL I no_ints() { return {_mm512_setzero_si512()}; }
INL I all_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
INL I load(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
INL I load(const int32_t *p, Lanes m) { return {_mm512_maskz_loadu_epi32(m, p)}; }
INL void store(int32_t *p, I x) { _mm512_storeu_si512(p, x.v); }
INL I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
INL I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
INL I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
INL I operator^(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
INL I most(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
INL I keep(I a, Lanes m) { return {_mm512_maskz_mov_epi32(m, a.v)}; }
template<int N> INL I shift_left(I a) { return {_mm512_slli_epi32(a.v, N)}; }
INL I shift_left(I a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
template<int N> INL I shift_right(I a) { return {_mm512_srli_epi32(a.v, N)}; }             // zeros come in
template<int N> INL I shift_down(I a) { return {_mm512_srai_epi32(a.v, N)}; }              // signs come in
INL int32_t sum_of(I a) { return _mm512_reduce_add_epi32(a.v); }
INL int32_t largest_of(I a) { return _mm512_reduce_max_epi32(a.v); }
INL F floats(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
INL I ints(F a) { return {_mm512_cvtps_epi32(a.v)}; }                      // to the nearest
INL I bits_of(F a) { return {_mm512_castps_si512(a.v)}; }
INL I or_nan(I u, F x) {                                                   // the bfloat16 of NaN where x is NaN
    return {_mm512_mask_mov_epi32(u.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0))};
}
INL F load_bfloat(const uint16_t *p, Lanes m) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16))};
}
INL F load_half(const uint16_t *p, Lanes m) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p))}; }
INL void store_half(uint16_t *p, Lanes m, F x) {
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INL void store_low16(uint16_t *p, Lanes m, I x) { _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(x.v)); }
INL I load_bytes(const uint8_t *p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
INL I load_bytes(const uint8_t *p, Lanes m) { return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p))}; }
INL void store_bytes(int8_t *p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x.v)); }   // the lowest
// Eight bytes twice, the second time moved down by N bits.
template<int N> INL I load_8_twice(const uint8_t *p) {
    const __m128i b = _mm_loadl_epi64((const __m128i*)p);
    const __m512i by = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(N), 1);
    return {_mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(b, b)), by)};
}

INL D each(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
INL D operator+(D x, D y) { return {_mm512_add_pd(x.a, y.a), _mm512_add_pd(x.b, y.b)}; }
INL D operator*(D x, D y) { return {_mm512_mul_pd(x.a, y.a), _mm512_mul_pd(x.b, y.b)}; }
INL D fma(D x, D y, D z) { return {_mm512_fmadd_pd(x.a, y.a, z.a), _mm512_fmadd_pd(x.b, y.b, z.b)}; }
INL D fnma(D x, D y, D z) { return {_mm512_fnmadd_pd(x.a, y.a, z.a), _mm512_fnmadd_pd(x.b, y.b, z.b)}; }
INL D doubles(F x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))};
}
INL D doubles(I x) {
    return {_mm512_cvtepi32_pd(_mm512_castsi512_si256(x.v)), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x.v, 1))};
}
INL F floats(D x) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.a)), _mm512_cvtpd_ps(x.b), 1)};
}

INL Bytes all_bytes(int x) { return {_mm512_set1_epi8((char)x)}; }
INL Bytes load_64(const void *p) { return {_mm512_loadu_si512(p)}; }
INL void store_64(void *p, Bytes x) { _mm512_storeu_si512(p, x.v); }
INL Bytes operator&(Bytes a, Bytes b) { return {_mm512_and_si512(a.v, b.v)}; }
INL Bytes pick(Bytes mask, Bytes yes, Bytes no) { return {_mm512_ternarylogic_epi32(mask.v, yes.v, no.v, 0xca)}; }
template<int N> INL Bytes up(Bytes a) { return {_mm512_slli_epi16(a.v, N)}; }     // bits of neighbours may come in
template<int N> INL Bytes down(Bytes a) { return {_mm512_srli_epi16(a.v, N)}; }
INL int32_t sum_16(const int8_t *p) {
    const __m128i s = _mm_sad_epu8(_mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8((char)0x80)),
                                   _mm_setzero_si128());
    return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 2048;
}
INL float from_half(uint16_t h) { return _cvtsh_ss(h); }
INL uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

// Sums of products of B blocks of 16 channels with R rows of bytes, A of them side by side so that none waits for
// another. Codes come in TAKES vectors at a time.
#define SL_WHOLE_CODES 1
template<int P, int R, int A, int B> struct Sums {
    enum { TAKES = 1 };
    __m512i s[B][R][A];
    INL_MEMBER void clear() {
        for (int b = 0; b < B; b++) for (int r = 0; r < R; r++) for (int a = 0; a < A; a++) s[b][r][a] = _mm512_setzero_si512();
    }
    INL_MEMBER void add(int j, const Bytes w[B][TAKES], const int8_t *x, i64 far) {   // vector j of a unit, at x
        for (int r = 0; r < R; r++) {
            int32_t four; memcpy(&four, x + r*far + 4*j, 4);
            for (int b = 0; b < B; b++)
                s[b][r][j % A] = _mm512_dpbusd_epi32(s[b][r][j % A], w[b][0].v, _mm512_set1_epi32(four));
        }
    }
    INL_MEMBER I total(int b, int r) const {
        __m512i t = s[b][r][0];
        for (int a = 1; a < A; a++) t = _mm512_add_epi32(t, s[b][r][a]);
        return {t};
    }
};

// Rows of bytes for few tokens (of which up to half have SL_ASIDE sums side by side), tokens finished together, and for
// many tokens rows and blocks, so that sums and codes stay in registers.
enum { SL_ASIDE = 4, SL_FINISH = 8 };
#define SL_ROWS 8
#define SL_MANY 12
#define SL_BLOCKS 2
