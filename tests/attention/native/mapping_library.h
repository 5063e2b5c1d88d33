#pragma once

// A library that maps memory like llama.cpp, for mmap_hook_test.cpp.

#include <cstddef>

// Maps a file like llama.cpp: shared, and populated at once.
extern "C" void* map_file(int file, size_t num_bytes);

// Maps anonymous memory, populated at once.
extern "C" void* map_memory(size_t num_bytes);
