#include "core/level_baseline.h"
#include "cross_entropy/cpu_rows.h"
