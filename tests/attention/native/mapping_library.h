#pragma once

#include <cstddef>

// A library that maps a file as llama.cpp does: shared, and filled at once.
extern "C" void* map_file(int file, size_t num_bytes);

// As much memory that is no file's, filled at once.
extern "C" void* map_memory(size_t num_bytes);
