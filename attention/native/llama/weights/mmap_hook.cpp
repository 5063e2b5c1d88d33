// Finds the relocation slots through which a loaded library calls mmap, in the tables of the dynamic linker (ELF,
// System V ABI, chapter 5), and redirects them while any thread is inside a section.

#include "llama/weights/mmap_hook.h"

#if defined(__linux__) && defined(__LP64__)

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <mutex>

namespace {

using Map = void* (*)(void*, size_t, int, int, int, off_t);

constexpr int kMaxSlots = 4;

struct Slots {
    void** at[kMaxSlots];
    void* before[kMaxSlots];
    int count;
};

std::mutex mutex;
int sections = 0;
Slots slots;
thread_local int own_sections = 0;

void* map_unpopulated(void* address, size_t length, int protection, int flags, int file, off_t offset) {
    if (own_sections > 0 && file >= 0) flags &= ~MAP_POPULATE;
    return mmap(address, length, protection, flags, file, offset);
}

struct Image {
    uintptr_t base, begin, end;
    const ElfW(Dyn) * dynamic;
};

// Looks only at the library at `base`: reading the headers of other libraries would make their pages resident.
int find_image(dl_phdr_info* info, size_t, void* data) {
    auto& image = *static_cast<Image*>(data);
    if (info->dlpi_addr != image.base) return 0;
    image.begin = UINTPTR_MAX, image.end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        const uintptr_t at = image.base + header.p_vaddr;
        if (header.p_type == PT_DYNAMIC) image.dynamic = reinterpret_cast<const ElfW(Dyn)*>(at);
        if (header.p_type != PT_LOAD) continue;
        image.begin = at < image.begin ? at : image.begin;
        image.end = at + header.p_memsz > image.end ? at + header.p_memsz : image.end;
    }
    return 1;
}

bool find_image_of(const void* function, Image& image) {
    Dl_info info;
    if (dladdr(function, &info) == 0) return false;
    image.base = reinterpret_cast<uintptr_t>(info.dli_fbase);
    const auto address_of_function = reinterpret_cast<uintptr_t>(function);
    return dl_iterate_phdr(find_image, &image) != 0 && image.dynamic != nullptr && address_of_function >= image.begin &&
           address_of_function < image.end;
}

struct Tables {
    const ElfW(Sym) * symbols;
    const char* names;
    const ElfW(Rela) * relocations[2];
    size_t counts[2];
};

Tables tables_of(const Image& image) {
    Tables tables{};
    // Some C libraries leave these addresses relative to the image.
    const auto at = [&](uintptr_t value) { return value < image.base ? image.base + value : value; };
    bool with_addends = true;
    for (const ElfW(Dyn)* entry = image.dynamic; entry->d_tag != DT_NULL; ++entry) {
        const uintptr_t value = entry->d_un.d_val;
        switch (entry->d_tag) {
            case DT_SYMTAB: tables.symbols = reinterpret_cast<const ElfW(Sym)*>(at(value)); break;
            case DT_STRTAB: tables.names = reinterpret_cast<const char*>(at(value)); break;
            case DT_JMPREL: tables.relocations[0] = reinterpret_cast<const ElfW(Rela)*>(at(value)); break;
            case DT_PLTRELSZ: tables.counts[0] = value / sizeof(ElfW(Rela)); break;
            case DT_RELA: tables.relocations[1] = reinterpret_cast<const ElfW(Rela)*>(at(value)); break;
            case DT_RELASZ: tables.counts[1] = value / sizeof(ElfW(Rela)); break;
            case DT_PLTREL: with_addends = value == DT_RELA; break;
        }
    }
    if (!with_addends || tables.symbols == nullptr || tables.names == nullptr) tables.counts[0] = tables.counts[1] = 0;
    for (int i = 0; i < 2; ++i)
        if (tables.relocations[i] == nullptr) tables.counts[i] = 0;
    return tables;
}

// A slot has the address of mmap, or points back into the image until the first call.
bool is_expected(const Image& image, const void* value) {
    const auto address = reinterpret_cast<uintptr_t>(value);
    return value == dlsym(RTLD_DEFAULT, "mmap") || value == dlsym(RTLD_DEFAULT, "mmap64") ||
           (address >= image.begin && address < image.end);
}

bool find_slots(const void* function, Slots& found) {
    Image image{};
    found.count = 0;
    if (!find_image_of(function, image)) return false;
    const Tables tables = tables_of(image);
    for (int table = 0; table < 2; ++table)
        for (size_t i = 0; i < tables.counts[table]; ++i) {
            const ElfW(Rela)& relocation = tables.relocations[table][i];
            const size_t symbol = ELF64_R_SYM(relocation.r_info);
            if (symbol == 0) continue;
            const char* name = tables.names + tables.symbols[symbol].st_name;
            if (std::strcmp(name, "mmap") != 0 && std::strcmp(name, "mmap64") != 0) continue;
            const uintptr_t at = image.base + relocation.r_offset;
            if (found.count == kMaxSlots || at < image.begin || at + sizeof(void*) > image.end) return false;
            void** slot = reinterpret_cast<void**>(at);
            if (!is_expected(image, *slot)) return false;
            found.at[found.count] = slot, found.before[found.count] = *slot;
            ++found.count;
        }
    return found.count > 0;
}

bool write_slot(void** slot, void* value) {
    const auto page_bytes = uintptr_t(sysconf(_SC_PAGESIZE));
    void* page = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(slot) / page_bytes * page_bytes);
    if (mprotect(page, page_bytes, PROT_READ | PROT_WRITE) != 0) return false;
    *slot = value;  // the page stays writable: it may have other slots
    return true;
}

void restore() {
    for (int i = 0; i < slots.count; ++i)
        if (*slots.at[i] == reinterpret_cast<void*>(map_unpopulated)) write_slot(slots.at[i], slots.before[i]);
}

}  // namespace

extern "C" int lowtide_enter_unpopulated_mmap(const void* function) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (sections == 0) {
        if (!find_slots(function, slots)) return 0;
        for (int i = 0; i < slots.count; ++i)
            if (!write_slot(slots.at[i], reinterpret_cast<void*>(map_unpopulated))) {
                restore();
                return 0;
            }
    }
    ++sections;
    ++own_sections;
    return 1;
}

extern "C" void lowtide_leave_unpopulated_mmap() {
    const std::lock_guard<std::mutex> lock(mutex);
    --own_sections;
    if (--sections == 0) restore();
}

#else

extern "C" int lowtide_enter_unpopulated_mmap(const void*) { return 0; }
extern "C" void lowtide_leave_unpopulated_mmap() {}

#endif
