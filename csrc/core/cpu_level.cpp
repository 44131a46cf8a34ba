#include "core/cpu_level.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fusedstep {
namespace {

CpuLevel supported_level() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return CpuLevel::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::avx2;
#endif
    return CpuLevel::baseline;
}

CpuLevel decide_level() {
    CpuLevel const supported = supported_level();
    char const* const wanted = std::getenv("ATEN_CPU_CAPABILITY");
    if (wanted == nullptr) return supported;
    for (CpuLevel level : {CpuLevel::baseline, CpuLevel::avx2}) {
        if (std::strcmp(wanted, cpu_level_name(level)) == 0) {
            return level < supported ? level : supported;
        }
    }
    return supported;
}

}  // namespace

CpuLevel cpu_level() {
    static CpuLevel const level = decide_level();
    return level;
}

const char* cpu_level_name(CpuLevel level) {
    switch (level) {
        case CpuLevel::avx512:
            return "avx512";
        case CpuLevel::avx2:
            return "avx2";
        case CpuLevel::baseline:
            break;
    }
    return "default";
}

}  // namespace fusedstep
