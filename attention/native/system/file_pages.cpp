#include "system/file_pages.h"

#if defined(_WIN32)

#include <windows.h>

bool release_file_pages(char* begin, size_t num_bytes) {
    // Pages that are not locked leave the working set, and the call says that they were not locked.
    return VirtualUnlock(begin, num_bytes) != 0 || GetLastError() == ERROR_NOT_LOCKED;
}

#else

#include <sys/mman.h>

bool release_file_pages(char* begin, size_t num_bytes) { return madvise(begin, num_bytes, MADV_DONTNEED) == 0; }

#endif
