// Compiles what follows for any processor: 16-byte vectors.
#include "core/level_system.h"
#define FUSEDSTEP_LEVEL baseline
#define FUSEDSTEP_VECTOR_BYTES 16
