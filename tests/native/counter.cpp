// Switches callgrind's counting on and off: what lies between is one measurement.
#include <valgrind/callgrind.h>

#pragma GCC visibility push(default)
extern "C" {

void start_counting() {
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}

// Writes what was counted since under this name.
void stop_counting(const char* name) {
    CALLGRIND_DUMP_STATS_AT(name);
    CALLGRIND_STOP_INSTRUMENTATION;
}
}
