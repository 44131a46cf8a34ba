#include "core/cpu_level.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedstep {
namespace {

#if defined(__x86_64__)
// Older compilers' __builtin_cpu_supports() does not know it. (Processors with AVX2 have it, but a
// hypervisor may hide it.)
bool supports_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// The highest level whose instructions (level_*.h) the processor has.
CpuLevel supported_level() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !supports_f16c()) {
        return CpuLevel::baseline;
    }
    bool const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? CpuLevel::avx512 : CpuLevel::avx2;
#else
    return CpuLevel::baseline;
#endif
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
