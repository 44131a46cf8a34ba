#if defined(__x86_64__)
#include "core/level_avx2.h"
#include "optim/cpu.h"
#include "core/level_end.h"
#endif
