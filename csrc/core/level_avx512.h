// Compiles what follows, up to level_end.h, for AVX-512 (F, BW, DQ, VL).
#include "core/level_system.h"
#define FUSEDSTEP_LEVEL avx512
#define FUSEDSTEP_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC 12's own intrinsics pass an operand they leave undefined on purpose; GCC warns of it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
