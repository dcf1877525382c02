// Vectors of a level: W numbers each. Included in the namespace of the level, which defines one of SL_WIDE (AVX-512)
// and SL_HALF.
#ifdef SL_WIDE
enum { W = 16 };
typedef __m512 F; typedef __m512i I; typedef __mmask16 M;
struct Wide { __m512d l, h; };   // W numbers as double
INL M first(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (M)((1u << left) - 1); }
INL F all(float x) { return _mm512_set1_ps(x); }
INL I each(int32_t x) { return _mm512_set1_epi32(x); }
INL I loadi(const void* p) { return _mm512_loadu_si512(p); }
INL void storei(void* p, I v) { _mm512_storeu_si512(p, v); }
INL F loadf(const float* p) { return _mm512_loadu_ps(p); }
INL void storef(float* p, F v) { _mm512_storeu_ps(p, v); }
INL I bits_of(F v) { return _mm512_castps_si512(v); }
INL F least(F a, F b) { return _mm512_min_ps(a, b); }   // b where one is NaN
INL F most(F a, F b) { return _mm512_max_ps(a, b); }
INL F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INL F plus(F a, F b) { return _mm512_add_ps(a, b); }
INL F minus(F a, F b) { return _mm512_sub_ps(a, b); }
INL F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INL I rounded(F v) { return _mm512_cvtps_epi32(v); }
INL F to_float(I v) { return _mm512_cvtepi32_ps(v); }
INL F nearest(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INL M below(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INL M either(M a, M b) { return (M)(a | b); }
INL I plus(I a, I b) { return _mm512_add_epi32(a, b); }
INL I minus(I a, I b) { return _mm512_sub_epi32(a, b); }
INL I times(I a, I b) { return _mm512_mullo_epi32(a, b); }
INL I both(I a, I b) { return _mm512_and_si512(a, b); }
INL I larger(I a, I b) { return _mm512_max_epu32(a, b); }
INL I left_by(I a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
INL I right_by(I a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
INL F pick(M m, F yes, F no) { return _mm512_mask_mov_ps(no, m, yes); }
INL I pick(M m, I yes, I no) { return _mm512_mask_mov_epi32(no, m, yes); }
INL uint64_t equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
INL M unbits(const uint8_t* p) { uint16_t b; memcpy(&b, p, 2); return b; }
INL F load(const void* x, int type, int64_t i, int64_t left) {   // zero beyond
    const M k = first(left);
    if (type == F32) return _mm512_maskz_loadu_ps(k, (const float*)x + i);
    const __m256i half = _mm256_maskz_loadu_epi16(k, (const uint16_t*)x + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INL void store(void* y, int type, int64_t i, int64_t left, F v) {
    const M k = first(left);
    if (type == F32) return _mm512_mask_storeu_ps((float*)y + i, k, v);
    I b = bits_of(v);   // round half to even; NaN stays NaN
    b = plus(b, plus(each(0x7fff), both(_mm512_srli_epi32(b, 16), each(1))));
    b = pick(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), each(0x7fc0), _mm512_srli_epi32(b, 16));
    _mm256_mask_storeu_epi16((uint16_t*)y + i, k, _mm512_cvtepi32_epi16(b));
}
INL void store_bytes(uint8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
INL Wide widen(I v) {
    return {_mm512_cvtepi32_pd(_mm512_castsi512_si256(v)), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(v, 1))};
}
INL Wide fma(Wide a, double b, Wide c) {
    const __m512d s = _mm512_set1_pd(b);
    return {_mm512_fmadd_pd(a.l, s, c.l), _mm512_fmadd_pd(a.h, s, c.h)};
}
INL Wide plus(Wide a, Wide b) { return {_mm512_add_pd(a.l, b.l), _mm512_add_pd(a.h, b.h)}; }
INL F narrow(Wide v) {
    const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(v.l));
    return _mm512_insertf32x8(low, _mm512_cvtpd_ps(v.h), 1);
}
INL Wide loadw(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
INL void storew(double* p, Wide v) { _mm512_storeu_pd(p, v.l); _mm512_storeu_pd(p + 8, v.h); }
#else
enum { W = 8 };
typedef __m256 F; typedef __m256i I; typedef __m256i M;
struct Wide { __m256d l, h; };
INL M first(int64_t left) {
    const int n = left > 8 ? 8 : left < 0 ? 0 : (int)left;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INL F all(float x) { return _mm256_set1_ps(x); }
INL I each(int32_t x) { return _mm256_set1_epi32(x); }
INL I loadi(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INL void storei(void* p, I v) { _mm256_storeu_si256((__m256i*)p, v); }
INL F loadf(const float* p) { return _mm256_loadu_ps(p); }
INL void storef(float* p, F v) { _mm256_storeu_ps(p, v); }
INL I bits_of(F v) { return _mm256_castps_si256(v); }
INL F least(F a, F b) { return _mm256_min_ps(a, b); }
INL F most(F a, F b) { return _mm256_max_ps(a, b); }
INL F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INL F plus(F a, F b) { return _mm256_add_ps(a, b); }
INL F minus(F a, F b) { return _mm256_sub_ps(a, b); }
INL F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INL I rounded(F v) { return _mm256_cvtps_epi32(v); }
INL F to_float(I v) { return _mm256_cvtepi32_ps(v); }
INL F nearest(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INL M below(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INL M either(M a, M b) { return _mm256_or_si256(a, b); }
INL I plus(I a, I b) { return _mm256_add_epi32(a, b); }
INL I minus(I a, I b) { return _mm256_sub_epi32(a, b); }
INL I times(I a, I b) { return _mm256_mullo_epi32(a, b); }
INL I both(I a, I b) { return _mm256_and_si256(a, b); }
INL I larger(I a, I b) { return _mm256_max_epu32(a, b); }
INL I left_by(I a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
INL I right_by(I a, int n) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(n)); }
INL F pick(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }
INL I pick(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
INL uint64_t equal(I a, I b) { return (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b))); }
INL M unbits(const uint8_t* p) {
    const I one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(both(each(*p), one), one);
}
INL F load(const void* x, int type, int64_t i, int64_t left) {
    if (type == F32) {
        if (left >= 8) return loadf((const float*)x + i);
        return _mm256_maskload_ps((const float*)x + i, first(left));
    }
    __m128i half = _mm_setzero_si128();
    if (left >= 8) half = _mm_loadu_si128((const __m128i*)((const uint16_t*)x + i));
    else if (left > 0) {
        uint16_t some[8] = {0};
        memcpy(some, (const uint16_t*)x + i, left * 2);
        half = _mm_loadu_si128((const __m128i*)some);
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INL __m128i halves(I v) {   // the low 16 bits of each, which are at most 0xffff
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0xd8));
}
INL void store(void* y, int type, int64_t i, int64_t left, F v) {
    if (type == F32) {
        if (left >= 8) storef((float*)y + i, v);
        else _mm256_maskstore_ps((float*)y + i, first(left), v);
        return;
    }
    I b = bits_of(v);
    b = plus(b, plus(each(0x7fff), both(_mm256_srli_epi32(b, 16), each(1))));
    const M strange = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m128i h = halves(pick(strange, each(0x7fc0), _mm256_srli_epi32(b, 16)));
    if (left >= 8) { _mm_storeu_si128((__m128i*)((uint16_t*)y + i), h); return; }
    uint16_t some[8];
    _mm_storeu_si128((__m128i*)some, h);
    if (left > 0) memcpy((uint16_t*)y + i, some, left * 2);
}
INL void store_bytes(uint8_t* p, I v) {
    const __m128i h = halves(both(v, each(0xff)));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(h, h));
}
INL Wide widen(I v) {
    return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(v)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(v, 1))};
}
INL Wide fma(Wide a, double b, Wide c) {
    const __m256d s = _mm256_set1_pd(b);
    return {_mm256_fmadd_pd(a.l, s, c.l), _mm256_fmadd_pd(a.h, s, c.h)};
}
INL Wide plus(Wide a, Wide b) { return {_mm256_add_pd(a.l, b.l), _mm256_add_pd(a.h, b.h)}; }
INL F narrow(Wide v) { return _mm256_set_m128(_mm256_cvtpd_ps(v.h), _mm256_cvtpd_ps(v.l)); }
INL Wide loadw(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
INL void storew(double* p, Wide v) { _mm256_storeu_pd(p, v.l); _mm256_storeu_pd(p + 4, v.h); }
#endif
INL int64_t total_of(I v) {
    int32_t x[W]; storei(x, v);
    int64_t s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}
INL uint32_t largest_of(I v) {   // of unsigned numbers
    uint32_t x[W], m = 0; storei(x, v);
    for (int i = 0; i < W; i++) m = x[i] > m ? x[i] : m;
    return m;
}
INL float least_of(F v) {
    float x[W]; storef(x, v);
    for (int i = 1; i < W; i++) x[0] = x[i] < x[0] ? x[i] : x[0];
    return x[0];
}
INL float most_of(F v) {
    float x[W]; storef(x, v);
    for (int i = 1; i < W; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}
INL I magnitude(F v) { return both(bits_of(v), each(0x7fffffff)); }
