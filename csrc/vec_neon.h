// vec.h for NEON with dot products: sixteen numbers are four vectors.
struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct D { float64x2_t v[8]; };
struct Bytes { uint8x16_t v[4]; };
struct Lanes { int n; };
#undef SL_EACH
#define SL_EACH(type, n, expression) type made; for (int i = 0; i < n; i++) made.v[i] = expression; return made

INL Lanes head(i64 left) { return {left >= 16 ? 16 : left <= 0 ? 0 : (int)left}; }
INL uint32x4_t four_of(Lanes m, int i) {   // all bits in lanes 4i.. that are among the first
    const int32_t c[4] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(c), vdupq_n_s32(m.n - 4*i));
}
INL F each(float x) { SL_EACH(F, 4, vdupq_n_f32(x)); }
INL F zero() { return each(0.f); }
INL F load(const float *p) { SL_EACH(F, 4, vld1q_f32(p + 4*i)); }
INL F load(const float *p, Lanes m) {
    if (m.n == 16) return load(p);
    float some[16] = {0};
    memcpy(some, p, 4*(size_t)m.n);
    return load(some);
}
INL void store(float *p, F x) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4*i, x.v[i]); }
INL void store(float *p, Lanes m, F x) {
    if (m.n == 16) { store(p, x); return; }
    float some[16];
    store(some, x);
    memcpy(p, some, 4*(size_t)m.n);
}
INL F operator+(F x, F y) { SL_EACH(F, 4, vaddq_f32(x.v[i], y.v[i])); }
INL F operator-(F x, F y) { SL_EACH(F, 4, vsubq_f32(x.v[i], y.v[i])); }
INL F operator*(F x, F y) { SL_EACH(F, 4, vmulq_f32(x.v[i], y.v[i])); }
INL F operator/(F x, F y) { SL_EACH(F, 4, vdivq_f32(x.v[i], y.v[i])); }
INL F fma(F x, F y, F z) { SL_EACH(F, 4, vfmaq_f32(z.v[i], x.v[i], y.v[i])); }    // x y + z
INL F fnma(F x, F y, F z) { SL_EACH(F, 4, vfmsq_f32(z.v[i], x.v[i], y.v[i])); }   // z - x y
INL F least(F x, F y) { SL_EACH(F, 4, vminnmq_f32(x.v[i], y.v[i])); }             // y where x is NaN
INL F most(F x, F y) { SL_EACH(F, 4, vmaxnmq_f32(x.v[i], y.v[i])); }
INL F pick(Lanes m, F yes, F no) { SL_EACH(F, 4, vbslq_f32(four_of(m, i), yes.v[i], no.v[i])); }
INL F keep(F x, Lanes m) { return pick(m, x, zero()); }                           // 0 elsewhere
INL F drop(F x, Lanes m) { return pick(m, zero(), x); }                           // 0 there
INL F nearest(F x) { SL_EACH(F, 4, vrndnq_f32(x.v[i])); }
INL float32x4_t two_to(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
INL float32x4_t times_two_to(float32x4_t x, float32x4_t n) {   // in two steps, since 2^128 is no number
    const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(x, two_to(half)), two_to(vsubq_s32(whole, half)));
}
INL F times_two_to(F x, F n) { SL_EACH(F, 4, times_two_to(x.v[i], n.v[i])); }     // whole n
INL float sum_of(F x) {
    const float32x4_t s = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    const float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}
INL float largest_of(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
INL float smallest_of(F x) { return vminvq_f32(vminq_f32(vminq_f32(x.v[0], x.v[1]), vminq_f32(x.v[2], x.v[3]))); }

INL I all_ints(int32_t x) { SL_EACH(I, 4, vdupq_n_s32(x)); }
INL I no_ints() { return all_ints(0); }
INL I load(const int32_t *p) { SL_EACH(I, 4, vld1q_s32(p + 4*i)); }
INL I load(const int32_t *p, Lanes m) {
    if (m.n == 16) return load(p);
    int32_t some[16] = {0};
    memcpy(some, p, 4*(size_t)m.n);
    return load(some);
}
INL void store(int32_t *p, I x) { for (int i = 0; i < 4; i++) vst1q_s32(p + 4*i, x.v[i]); }
INL I operator+(I x, I y) { SL_EACH(I, 4, vaddq_s32(x.v[i], y.v[i])); }
INL I operator-(I x, I y) { SL_EACH(I, 4, vsubq_s32(x.v[i], y.v[i])); }
INL I operator&(I x, I y) { SL_EACH(I, 4, vandq_s32(x.v[i], y.v[i])); }
INL I operator^(I x, I y) { SL_EACH(I, 4, veorq_s32(x.v[i], y.v[i])); }
INL I most(I x, I y) { SL_EACH(I, 4, vmaxq_s32(x.v[i], y.v[i])); }
INL I keep(I x, Lanes m) { SL_EACH(I, 4, vandq_s32(x.v[i], vreinterpretq_s32_u32(four_of(m, i)))); }
template<int N> INL I shift_left(I x) { SL_EACH(I, 4, vshlq_n_s32(x.v[i], N)); }
INL I shift_left(I x, int n) { SL_EACH(I, 4, vshlq_s32(x.v[i], vdupq_n_s32(n))); }
template<int N> INL I shift_right(I x) {   // zeros come in
    SL_EACH(I, 4, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.v[i]), N)));
}
template<int N> INL I shift_down(I x) { SL_EACH(I, 4, vshrq_n_s32(x.v[i], N)); }   // signs come in
INL int32_t sum_of(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
INL int32_t largest_of(I x) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3]))); }
INL F floats(I x) { SL_EACH(F, 4, vcvtq_f32_s32(x.v[i])); }
INL I ints(F x) { SL_EACH(I, 4, vcvtnq_s32_f32(x.v[i])); }                        // to the nearest
INL I bits_of(F x) { SL_EACH(I, 4, vreinterpretq_s32_f32(x.v[i])); }
INL I or_nan(I u, F x) {                                                          // the bfloat16 of NaN where x is NaN
    SL_EACH(I, 4, vbslq_s32(vceqq_f32(x.v[i], x.v[i]), u.v[i], vdupq_n_s32(0x7fc0)));
}
struct Sixteen { uint16x8_t a, b; };                                              // numbers of 16 bits
INL Sixteen load_16(const uint16_t *p, Lanes m) {
    if (m.n == 16) return {vld1q_u16(p), vld1q_u16(p + 8)};
    uint16_t some[16] = {0};
    memcpy(some, p, 2*(size_t)m.n);
    return {vld1q_u16(some), vld1q_u16(some + 8)};
}
INL void store_16(uint16_t *p, Lanes m, Sixteen x) {
    if (m.n == 16) { vst1q_u16(p, x.a); vst1q_u16(p + 8, x.b); return; }
    uint16_t some[16];
    vst1q_u16(some, x.a); vst1q_u16(some + 8, x.b);
    memcpy(p, some, 2*(size_t)m.n);
}
INL float32x4_t from_bfloat(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
INL F load_bfloat(const uint16_t *p, Lanes m) {
    const Sixteen x = load_16(p, m);
    return {{from_bfloat(vget_low_u16(x.a)), from_bfloat(vget_high_u16(x.a)),
             from_bfloat(vget_low_u16(x.b)), from_bfloat(vget_high_u16(x.b))}};
}
INL float32x4_t from_half(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
INL F load_half(const uint16_t *p, Lanes m) {
    const Sixteen x = load_16(p, m);
    return {{from_half(vget_low_u16(x.a)), from_half(vget_high_u16(x.a)),
             from_half(vget_low_u16(x.b)), from_half(vget_high_u16(x.b))}};
}
INL uint16x8_t to_half(float32x4_t a, float32x4_t b) {
    return vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(a), vcvt_f16_f32(b)));
}
INL void store_half(uint16_t *p, Lanes m, F x) { store_16(p, m, {to_half(x.v[0], x.v[1]), to_half(x.v[2], x.v[3])}); }
INL uint16x4_t low16(int32x4_t x) { return vmovn_u32(vreinterpretq_u32_s32(x)); }
INL void store_low16(uint16_t *p, Lanes m, I x) {
    store_16(p, m, {vcombine_u16(low16(x.v[0]), low16(x.v[1])), vcombine_u16(low16(x.v[2]), low16(x.v[3]))});
}
INL I from_bytes(uint8x16_t b) {
    const uint16x8_t l = vmovl_u8(vget_low_u8(b)), h = vmovl_u8(vget_high_u8(b));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(l))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(l))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(h))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(h)))}};
}
INL I load_bytes(const uint8_t *p) { return from_bytes(vld1q_u8(p)); }
INL I load_bytes(const uint8_t *p, Lanes m) {
    if (m.n == 16) return load_bytes(p);
    uint8_t some[16] = {0};
    memcpy(some, p, (size_t)m.n);
    return load_bytes(some);
}
INL void store_bytes(int8_t *p, I x) {                                            // the lowest
    const uint16x8_t l = vcombine_u16(low16(x.v[0]), low16(x.v[1])), h = vcombine_u16(low16(x.v[2]), low16(x.v[3]));
    vst1q_u8((uint8_t*)p, vcombine_u8(vmovn_u16(l), vmovn_u16(h)));
}
// Eight bytes twice, the second time moved down by N bits.
template<int N> INL I load_8_twice(const uint8_t *p) {
    const uint8x8_t b = vld1_u8(p);
    return from_bytes(vcombine_u8(b, vshr_n_u8(b, N)));
}

INL D each(double x) { SL_EACH(D, 8, vdupq_n_f64(x)); }
INL D operator+(D x, D y) { SL_EACH(D, 8, vaddq_f64(x.v[i], y.v[i])); }
INL D operator*(D x, D y) { SL_EACH(D, 8, vmulq_f64(x.v[i], y.v[i])); }
INL D fma(D x, D y, D z) { SL_EACH(D, 8, vfmaq_f64(z.v[i], x.v[i], y.v[i])); }
INL D fnma(D x, D y, D z) { SL_EACH(D, 8, vfmsq_f64(z.v[i], x.v[i], y.v[i])); }
INL float64x2_t half_of(float32x4_t x, int i) { return i & 1 ? vcvt_high_f64_f32(x) : vcvt_f64_f32(vget_low_f32(x)); }
INL float64x2_t half_of(int32x4_t x, int i) {
    return vcvtq_f64_s64(vmovl_s32(i & 1 ? vget_high_s32(x) : vget_low_s32(x)));
}
INL D doubles(F x) { SL_EACH(D, 8, half_of(x.v[i/2], i)); }
INL D doubles(I x) { SL_EACH(D, 8, half_of(x.v[i/2], i)); }
INL F floats(D x) { SL_EACH(F, 4, vcombine_f32(vcvt_f32_f64(x.v[2*i]), vcvt_f32_f64(x.v[2*i + 1]))); }

INL Bytes all_bytes(int x) { SL_EACH(Bytes, 4, vdupq_n_u8((uint8_t)x)); }
INL Bytes load_64(const void *p) { SL_EACH(Bytes, 4, vld1q_u8((const uint8_t*)p + 16*i)); }
INL void store_64(void *p, Bytes x) { for (int i = 0; i < 4; i++) vst1q_u8((uint8_t*)p + 16*i, x.v[i]); }
INL Bytes operator&(Bytes x, Bytes y) { SL_EACH(Bytes, 4, vandq_u8(x.v[i], y.v[i])); }
INL Bytes operator|(Bytes x, Bytes y) { SL_EACH(Bytes, 4, vorrq_u8(x.v[i], y.v[i])); }
INL Bytes pick(Bytes m, Bytes yes, Bytes no) { SL_EACH(Bytes, 4, vbslq_u8(m.v[i], yes.v[i], no.v[i])); }
template<int N> INL Bytes up(Bytes x) { SL_EACH(Bytes, 4, vshlq_n_u8(x.v[i], N)); }
template<int N> INL Bytes down(Bytes x) { SL_EACH(Bytes, 4, vshrq_n_u8(x.v[i], N)); }
INL int32_t sum_16(const int8_t *p) { return vaddlvq_s8(vld1q_s8(p)); }
INL float from_half(uint16_t h) { __fp16 x; memcpy(&x, &h, 2); return (float)x; }
INL uint16_t to_half(float x) { const __fp16 y = (__fp16)x; uint16_t h; memcpy(&h, &y, 2); return h; }

INL int8x16_t four_bytes(const int8_t *x) { int32_t b; memcpy(&b, x, 4); return vreinterpretq_s8_s32(vdupq_n_s32(b)); }
// Sums of products of B blocks of 16 channels with R rows of bytes. Codes come in TAKES vectors at a time.
#if SL_LEVEL >= 2
#define SL_WHOLE_CODES 1
#else
#define SL_WHOLE_CODES 0   // both factors have a sign: upper and lower four bits of a code each fit a signed byte
#endif
template<int P, int R, int A, int B> struct Sums {
    enum { TAKES = 1, PARTS = SL_WHOLE_CODES || P == 1 ? 1 : 2 };
    I s[B][R][PARTS];
    INL_MEMBER void clear() {
        for (int b = 0; b < B; b++) for (int r = 0; r < R; r++) for (int p = 0; p < PARTS; p++) s[b][r][p] = no_ints();
    }
    INL_MEMBER void add(int first, const Bytes w[B][TAKES], const int8_t *x, i64 far) {
        for (int r = 0; r < R; r++) {
            const int8x16_t four = four_bytes(x + r*far + first % 4*4);
            for (int b = 0; b < B; b++) for (int q = 0; q < 4; q++) {
                int32x4_t &t = s[b][r][first/4].v[q];
#if SL_WHOLE_CODES
                t = vusdotq_s32(t, w[b][0].v[q], four);
#else
                t = vdotq_s32(t, vreinterpretq_s8_u8(w[b][0].v[q]), four);
#endif
            }
        }
    }
    INL_MEMBER I total(int b, int r) const {
        if (SL_WHOLE_CODES) return s[b][r][0];
        const I t = shift_left<4>(s[b][r][0]);
        return PARTS > 1 ? t + s[b][r][PARTS - 1] : t;
    }
};

// Rows of bytes for few tokens (of which up to half have SL_ASIDE sums side by side), tokens finished together, and for
// many tokens rows and blocks, so that sums and codes stay in registers.
enum { SL_ASIDE = 2, SL_FINISH = 4 };
#define SL_ROWS 4
#define SL_MANY 6
#define SL_BLOCKS 1
