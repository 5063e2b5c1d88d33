#pragma once

#include <cstddef>
#include <vector>

// Makes a buffer `size` long where it is shorter, and no longer than that; throws std::bad_alloc.
template <class T> void grow(std::vector<T>& buffer, size_t size) {
    if (buffer.size() >= size) return;
    buffer.reserve(size);
    buffer.resize(size);
}
