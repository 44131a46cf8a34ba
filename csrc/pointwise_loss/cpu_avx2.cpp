#if defined(__x86_64__)
#include "core/level_avx2.h"
#include "pointwise_loss/cpu_elements.h"
#include "core/level_end.h"
#endif
