#include "core/level_baseline.h"
#include "sgd/cpu_update.h"
