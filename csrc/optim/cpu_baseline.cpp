#include "core/level_baseline.h"
#include "optim/cpu.h"
