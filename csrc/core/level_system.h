// Every header that level-compiled code needs from outside its level: included before the target
// pragma, so that no shared inline function is ever compiled for a newer processor.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/cpu_level.h"
#include "core/dtype.h"
