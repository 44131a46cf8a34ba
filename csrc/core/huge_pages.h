// Fresh memory of many megabytes is faulted in page by page; 2 MiB pages make that cheap.
#pragma once

#include <cstddef>

namespace fusedstep {

// Asks the system for huge pages in [memory, memory + bytes) where that is worth a system call; a
// hint: nothing depends on the answer. (Linux gives them unasked only where transparent_hugepage is
// "always"; a 65 MB gradient costs 16,000 page faults without, and they cost more than the loss.)
void prefer_huge_pages(void* memory, std::size_t bytes);

}  // namespace fusedstep
