#include "core/level_baseline.h"
#include "pointwise_loss/cpu_elements.h"
