// The instruction-set levels a CPU kernel is compiled for, and the one this process uses.
#pragma once

namespace fusedstep {

enum class CpuLevel { baseline, avx2, avx512 };

// The highest level that the processor has and ATEN_CPU_CAPABILITY (default, avx2, avx512: the
// variable torch itself follows) allows. Decided once per process.
CpuLevel cpu_level();

// The level under the name that ATEN_CPU_CAPABILITY gives it.
const char* cpu_level_name(CpuLevel level);

}  // namespace fusedstep

// A room defines its kernels once per level, in the namespaces baseline, avx2 and avx512, behind
// one table of function pointers each. FUSEDSTEP_DECLARE_LEVELS(Kernels) declares the three tables
// and FUSEDSTEP_SELECT_LEVEL(kernels) is the one for this process.
#if defined(__x86_64__)
#define FUSEDSTEP_DECLARE_LEVELS(Table) \
    namespace baseline {                \
    extern const Table kernels;         \
    }                                   \
    namespace avx2 {                    \
    extern const Table kernels;         \
    }                                   \
    namespace avx512 {                  \
    extern const Table kernels;         \
    }
#define FUSEDSTEP_SELECT_LEVEL                                                   \
    (::fusedstep::cpu_level() == ::fusedstep::CpuLevel::avx512 ? avx512::kernels \
     : ::fusedstep::cpu_level() == ::fusedstep::CpuLevel::avx2 ? avx2::kernels   \
                                                               : baseline::kernels)
#else
#define FUSEDSTEP_DECLARE_LEVELS(Table) \
    namespace baseline {                \
    extern const Table kernels;         \
    }
#define FUSEDSTEP_SELECT_LEVEL (baseline::kernels)
#endif
