#if defined(__x86_64__)
#include "core/level_avx512.h"
#include "pointwise_loss/cpu_elements.h"
#include "core/level_end.h"
#endif
