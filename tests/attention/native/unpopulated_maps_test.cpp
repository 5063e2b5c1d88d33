// A library of our own that maps a file as llama.cpp does: inside of sections nothing of it becomes resident, also
// where they are nested and where other threads are in sections of theirs, and outside all of it does.

#include "unpopulated_maps.h"

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

// How many pages of a map this process has, by the kernel's own table.
size_t num_resident(const void* map) {
    uint64_t entries[kNumPages];
    const int table = open("/proc/self/pagemap", O_RDONLY);
    const auto at = off_t(reinterpret_cast<uintptr_t>(map) / kPageBytes * sizeof entries[0]);
    require(table >= 0 && pread(table, entries, sizeof entries, at) == ssize_t(sizeof entries), "the table of pages cannot be read");
    close(table);
    size_t count = 0;
    for (uint64_t entry : entries) count += entry >> 63;
    return count;
}

void check_map(void* map, size_t wanted, const char* where) {
    require(map != MAP_FAILED, "%s nothing is mapped", where);
    require(num_resident(map) == wanted, "%s %zu pages are resident, %zu are wanted", where, num_resident(map), wanted);
    for (size_t page = 0; page < kNumPages && wanted == 0; ++page)
        require(static_cast<const char*>(map)[page * kPageBytes] == 7, "%s page %zu is not the file's", where, page);
    munmap(map, kNumPages * kPageBytes);
}

void check_file(int file, size_t wanted, const char* where) { check_map(map_file(file, kNumPages * kPageBytes), wanted, where); }

void check_sections(int file) {
    check_file(file, kNumPages, "before a section");
    require(lowtide_enter_unpopulated_maps(kLibrary) == 1, "no section can be entered");
    check_file(file, 0, "inside a section");
    require(lowtide_enter_unpopulated_maps(kLibrary) == 1, "no second section can be entered");
    check_file(file, 0, "inside two sections");
    lowtide_leave_unpopulated_maps();
    check_file(file, 0, "inside the outer section");
    check_map(map_memory(kNumPages * kPageBytes), kNumPages, "memory that is no file's, inside a section");
    lowtide_leave_unpopulated_maps();
    check_file(file, kNumPages, "after the section");
}

// While one thread is in a section, what another maps outside of one is filled, also once it has left its own.
void check_beside(int file) {
    require(lowtide_enter_unpopulated_maps(kLibrary) == 1, "no section can be entered");
    std::thread([&] {
        check_file(file, kNumPages, "on another thread, before its section,");
        require(lowtide_enter_unpopulated_maps(kLibrary) == 1, "no section can be entered on another thread");
        check_file(file, 0, "on another thread, inside its section,");
        lowtide_leave_unpopulated_maps();
        check_file(file, kNumPages, "on another thread, after its section,");
    }).join();
    check_file(file, 0, "inside a section that another's went by");
    lowtide_leave_unpopulated_maps();
}

// Each thread goes in and out on its own; what it maps outside is filled, whoever is inside meanwhile.
void check_threads(int file, int num_threads) {
    std::atomic<int> num_started{0};
    on_threads(num_threads, [&](int) {
        for (++num_started; num_started < num_threads;) std::this_thread::yield();
        for (int i = 0; i < 30; ++i) {
            require(lowtide_enter_unpopulated_maps(kLibrary) == 1, "no section can be entered beside others");
            check_file(file, 0, "inside a section beside others");
            lowtide_leave_unpopulated_maps();
            check_file(file, kNumPages, "outside of others' sections");
        }
    });
    check_file(file, kNumPages, "after the threads' sections");
}

void check_refused(int file) {
    const int outside_of_all = 0;
    double (*const maps_nothing)(double) = std::cos;
    require(lowtide_enter_unpopulated_maps(nullptr) == 0, "a library at no address has a section");
    require(lowtide_enter_unpopulated_maps(&outside_of_all) == 0, "a variable has a section");
    require(lowtide_enter_unpopulated_maps(reinterpret_cast<const void*>(maps_nothing)) == 0, "a library that maps nothing has a section");
    check_file(file, kNumPages, "after refused sections");
}

}  // namespace

int main() {
    const int file = open_file();
    check_sections(file);
    check_beside(file);
    for (int num_threads : {1, 2, 3}) check_threads(file, num_threads);
    check_refused(file);
    check_sections(file);
    std::printf("the maps agree\n");
    return 0;
}

#else

int main() {
    require(lowtide_enter_unpopulated_maps(reinterpret_cast<const void*>(&std::exit)) == 0, "a section can be entered here");
    std::printf("the maps agree\n");
    return 0;
}

#endif
