// Instruction sets: what the processor has, what the user allows, and how a part of a file is compiled for one of them.
//
// A level has all of those before it, but that AVX512 need not have the short vectors of AVX_VNNI. A kernel is written
// once, for the vectors of the level that it is compiled for, and compiled for each level in a namespace of its own;
// `isa_level()` says which of them may be called.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define SL_X86 1
#elif defined(__aarch64__) && defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 16)
#define SL_ARM 1                // older clangs know its instructions only where the whole file may use them
#endif

// Names, in this order, in nbs/system/native.ipynb. 0: none of them.
#ifdef SL_ARM
enum { DOT = 1, I8MM = 2 };                         // NEON with dot products; with byte matrix products
#else
enum { AVX2 = 1, AVX_VNNI = 2, AVX512 = 3, AMX = 4 };  // AVX2, FMA, F16C; with VNNI; F, BW, VL, DQ, VBMI, VNNI; byte tiles
#endif

int isa_found();   // what processor and system have
int isa_level();   // the same, or less where SWITCHABLE_LLM_MAX_ISA names a lower level

// Functions between SL_TARGET_ON("...") and SL_TARGET_OFF are compiled for these instructions, whatever the compiler is told.
#define SL_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define SL_TARGET_ON(names) SL_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define SL_TARGET_OFF SL_PRAGMA(clang attribute pop)
#else
#define SL_TARGET_ON(names) SL_PRAGMA(GCC push_options) SL_PRAGMA(GCC target names)
#define SL_TARGET_OFF SL_PRAGMA(GCC pop_options)
#endif
#define SL_AVX2 "avx2,fma,f16c,bmi2"
#define SL_AVX_VNNI "avx2,fma,f16c,bmi2,avxvnni"
#define SL_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,avx2,f16c,bmi2"
#define SL_AMX SL_AVX512 ",amx-tile,amx-int8"
#define SL_DOT "arch=armv8.2-a+dotprod"
#define SL_I8MM "arch=armv8.2-a+dotprod+i8mm"
