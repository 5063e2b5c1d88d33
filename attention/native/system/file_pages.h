#pragma once

// Gives memory-mapped pages of a file back to the system.

#include <cstddef>

// Releases the pages [begin, begin + num_bytes) of a read-only mapping; they are read again when they are needed.
// Returns whether the system took them.
bool release_file_pages(char* begin, size_t num_bytes);
