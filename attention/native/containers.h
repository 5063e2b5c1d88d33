#pragma once

// Helpers for buffers and handles.

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

// Makes a buffer at least `size` long and allocates no more than that. Throws std::bad_alloc.
template <class T> void ensure_size(std::vector<T>& buffer, size_t size) {
    if (buffer.size() >= size) return;
    buffer.reserve(size);
    buffer.resize(size);
}

// A table of handles: an object of a derived class gets a number under which graph nodes find it. A number is never
// used twice, so it is safe to look up an object that is gone.
template <class T> class WithHandle {
public:
    WithHandle() {
        const std::lock_guard<std::mutex> lock(all().mutex);
        handle = ++all().last;
        all().objects[handle] = static_cast<T*>(this);
    }
    ~WithHandle() {
        const std::lock_guard<std::mutex> lock(all().mutex);
        all().objects.erase(handle);
    }
    WithHandle(const WithHandle&) = delete;
    WithHandle& operator=(const WithHandle&) = delete;

    // The object of that handle; null if it is gone.
    static T* find(int64_t handle) {
        const std::lock_guard<std::mutex> lock(all().mutex);
        const auto found = all().objects.find(handle);
        return found == all().objects.end() ? nullptr : found->second;
    }

    int64_t handle;

private:
    struct All {
        std::mutex mutex;
        int64_t last = 0;
        std::map<int64_t, T*> objects;
    };
    static All& all() {
        static All objects;
        return objects;
    }
};
