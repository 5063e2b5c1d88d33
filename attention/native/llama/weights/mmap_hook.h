#pragma once

// Takes MAP_POPULATE out of llama.cpp's calls of mmap.

#include "c_api.h"

// llama.cpp maps a model with MAP_POPULATE, which reads the whole file. Inside a section of a thread, its calls of
// mmap drop that flag, so that only what is used becomes resident. `function` is the address of any function of the
// library that maps. Returns 0 if the library's relocation table is not as expected: then nothing is changed and
// there is no section to leave.
LOWTIDE_API int lowtide_enter_unpopulated_mmap(const void* function);
LOWTIDE_API void lowtide_leave_unpopulated_mmap();
