#pragma once

#include "api.h"

// llama.cpp asks the system to read a whole file when it maps it. Inside a section of a thread its call of mmap
// goes through here and leaves that out, so that only what is read becomes resident. `function` is the address
// of any function of the library that maps. Returns 0 where the library's table of imports is not as we
// know it: then nothing was changed, and there is no section to leave.
LOWTIDE_API int lowtide_enter_unpopulated_maps(const void* function);
LOWTIDE_API void lowtide_leave_unpopulated_maps();
