// Calls mmap through the relocation table of this library.

#include "mapping_library.h"

#include <sys/mman.h>

extern "C" void* map_file(int file, size_t num_bytes) {
    return mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
}

extern "C" void* map_memory(size_t num_bytes) {
    return mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
}
