// Compiles what follows, up to level_end.h, for AVX2 with FMA and F16C.
#include "core/level_system.h"
#define FUSEDSTEP_LEVEL avx2
#define FUSEDSTEP_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
