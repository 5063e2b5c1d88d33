// A library that maps a file like llama.cpp: inside of sections nothing of it becomes resident, also if they are
// nested or other threads have sections; outside all of it does.

#include "llama/weights/mmap_hook.h"

#include <cmath>
#include <cstdio>

#include "checks.h"

#if defined(__linux__) && defined(__LP64__)

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>

#include "mapping_library.h"

namespace {

constexpr size_t kNumPages = 40;
const size_t kPageBytes = size_t(sysconf(_SC_PAGESIZE));
const void* const kLibrary = reinterpret_cast<const void*>(map_file);

int open_file() {
    char name[] = "/tmp/lowtide-test-XXXXXX";
    const int file = mkstemp(name);
    const std::vector<char> data(kNumPages * kPageBytes, 7);
    require(file >= 0 && unlink(name) == 0 && write(file, data.data(), data.size()) == ssize_t(data.size()), "no file can be written");
    return file;
}

// How many pages of a map this process has, by /proc/self/pagemap.
size_t num_resident(const void* map) {
    uint64_t entries[kNumPages];
    const int table = open("/proc/self/pagemap", O_RDONLY);
    const auto at = off_t(reinterpret_cast<uintptr_t>(map) / kPageBytes * sizeof entries[0]);
    require(table >= 0 && pread(table, entries, sizeof entries, at) == ssize_t(sizeof entries), "/proc/self/pagemap cannot be read");
    close(table);
    size_t count = 0;
    for (uint64_t entry : entries) count += entry >> 63;
    return count;
}

void check_map(void* map, size_t expected, const char* where) {
    require(map != MAP_FAILED, "%s nothing is mapped", where);
    require(num_resident(map) == expected, "%s %zu pages are resident, expected %zu", where, num_resident(map), expected);
    for (size_t page = 0; page < kNumPages && expected == 0; ++page)
        require(static_cast<const char*>(map)[page * kPageBytes] == 7, "%s page %zu does not have the file's data", where, page);
    munmap(map, kNumPages * kPageBytes);
}

void check_file(int file, size_t expected, const char* where) { check_map(map_file(file, kNumPages * kPageBytes), expected, where); }

void check_sections(int file) {
    check_file(file, kNumPages, "before a section");
    require(lowtide_enter_unpopulated_mmap(kLibrary) == 1, "no section can be entered");
    check_file(file, 0, "inside a section");
    require(lowtide_enter_unpopulated_mmap(kLibrary) == 1, "no second section can be entered");
    check_file(file, 0, "inside two sections");
    lowtide_leave_unpopulated_mmap();
    check_file(file, 0, "inside the outer section");
    check_map(map_memory(kNumPages * kPageBytes), kNumPages, "anonymous memory, inside a section");
    lowtide_leave_unpopulated_mmap();
    check_file(file, kNumPages, "after the section");
}

// While one thread is in a section, a map of another thread outside of one is populated, also after that thread has
// left a section.
void check_other_thread(int file) {
    require(lowtide_enter_unpopulated_mmap(kLibrary) == 1, "no section can be entered");
    std::thread([&] {
        check_file(file, kNumPages, "on another thread, before its section,");
        require(lowtide_enter_unpopulated_mmap(kLibrary) == 1, "no section can be entered on another thread");
        check_file(file, 0, "on another thread, inside its section,");
        lowtide_leave_unpopulated_mmap();
        check_file(file, kNumPages, "on another thread, after its section,");
    }).join();
    check_file(file, 0, "inside a section after another thread's section");
    lowtide_leave_unpopulated_mmap();
}

// Threads enter and leave sections independently. What they map outside is populated, whoever is inside meanwhile.
void check_threads(int file, int num_threads) {
    std::atomic<int> num_started{0};
    on_threads(num_threads, [&](int) {
        for (++num_started; num_started < num_threads;) std::this_thread::yield();
        for (int i = 0; i < 30; ++i) {
            require(lowtide_enter_unpopulated_mmap(kLibrary) == 1, "no section can be entered beside others");
            check_file(file, 0, "inside a section beside others");
            lowtide_leave_unpopulated_mmap();
            check_file(file, kNumPages, "outside of others' sections");
        }
    });
    check_file(file, kNumPages, "after the threads' sections");
}

void check_refused(int file) {
    const int outside_of_all = 0;
    double (*const maps_nothing)(double) = std::cos;
    require(lowtide_enter_unpopulated_mmap(nullptr) == 0, "a library at no address has a section");
    require(lowtide_enter_unpopulated_mmap(&outside_of_all) == 0, "a variable has a section");
    require(lowtide_enter_unpopulated_mmap(reinterpret_cast<const void*>(maps_nothing)) == 0, "a library that maps nothing has a section");
    check_file(file, kNumPages, "after refused sections");
}

}  // namespace

int main() {
    const int file = open_file();
    check_sections(file);
    check_other_thread(file);
    for (int num_threads : {1, 2, 3}) check_threads(file, num_threads);
    check_refused(file);
    check_sections(file);
    std::printf("the maps agree\n");
    return 0;
}

#else

int main() {
    require(lowtide_enter_unpopulated_mmap(reinterpret_cast<const void*>(&std::exit)) == 0, "a section can be entered on this platform");
    std::printf("the maps agree\n");
    return 0;
}

#endif
