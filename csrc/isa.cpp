// Which instructions may be used.
#include "isa.h"
#include <cstdlib>
#include <cstring>
#include <strings.h>

#if defined(SL_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
static const char *NAMES[] = {"none", "AVX2", "AVX_VNNI", "AVX512", "AMX"};
static int find() {
    unsigned a, b, c, d, a7, b7, c7, d7, lo, hi;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;   // bit 27: the system keeps vectors
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    if ((lo & 6) != 6 || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return 0;
    const bool fma = c >> 12 & 1, f16c = c >> 29 & 1, avx2 = b7 >> 5 & 1, bmi2 = b7 >> 8 & 1;
    if (!fma || !f16c || !avx2 || !bmi2) return 0;
    const bool avx512 = (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1) && (c7 >> 1 & 1) && (c7 >> 11 & 1);
    if (!avx512 || (lo & 0xe0) != 0xe0) {
        const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
        return vnni ? AVX_VNNI : AVX2;
    }
#if defined(__linux__)
    const bool tiles = (d7 >> 24 & 1) && (d7 >> 25 & 1) && (lo >> 17 & 3) == 3;
    if (tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return AMX;   // the system is asked for tiles, once
#endif
    return AVX512;
}
#elif defined(SL_ARM)
static const char *NAMES[] = {"none", "DOT", "I8MM"};
#if defined(__linux__)
#include <sys/auxv.h>
static int find() {
    if (!(getauxval(AT_HWCAP) >> 20 & 1)) return 0;            // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP2) >> 13 & 1 ? I8MM : DOT;        // HWCAP2_I8MM
}
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static bool has(const char *name) {
    int v = 0; size_t n = sizeof v;
    return sysctlbyname(name, &v, &n, nullptr, 0) == 0 && v;
}
static int find() {
    if (!has("hw.optional.arm.FEAT_DotProd")) return 0;
    return has("hw.optional.arm.FEAT_I8MM") ? I8MM : DOT;
}
#else
static int find() { return 0; }
#endif
#else
static const char *NAMES[] = {"none"};
static int find() { return 0; }
#endif

// A level leaves out instructions of one below it on some processors: with AVX-512, AVX_VNNI is a thing of its own.
static int at_most(int level) {
    const int f = isa_found();
    if (f <= level) return f;
#if defined(SL_X86)
    unsigned a, b, c, d;
    if (level == AVX_VNNI && !(__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1))) return AVX2;
#endif
    return level;
}

static const int COUNT = sizeof NAMES/sizeof *NAMES;
static int allowed() {   // -1: a name that is none of ours, which the caller of sl_isa reports
    const char *s = getenv("SWITCHABLE_LLM_MAX_ISA");
    if (!s || !*s) return COUNT - 1;
    for (int i = 0; i < COUNT; i++) if (!strcasecmp(s, NAMES[i])) return i;
    return -1;
}
int isa_found() { static const int f = find(); return f; }
int isa_level() {
    static const int most = allowed(), level = most < 0 ? 0 : at_most(most);
    return level;
}
#define SL_API extern "C" __attribute__((visibility("default")))
SL_API int sl_isa_found() { return isa_found(); }
SL_API int sl_isa() { static const int most = allowed(); return most < 0 ? -1 : isa_level(); }
SL_API const char *sl_isa_name(int level) { return level >= 0 && level < COUNT ? NAMES[level] : nullptr; }
