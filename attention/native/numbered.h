#pragma once

#include <cstdint>
#include <map>
#include <mutex>

// Objects that a graph's nodes name by number: a number is never that of another, and safe where the object is gone.
template <class T> class Numbered {
public:
    Numbered() {
        const std::lock_guard<std::mutex> lock(all().mutex);
        number = ++all().last;
        all().objects[number] = static_cast<T*>(this);
    }
    ~Numbered() {
        const std::lock_guard<std::mutex> lock(all().mutex);
        all().objects.erase(number);
    }
    Numbered(const Numbered&) = delete;
    Numbered& operator=(const Numbered&) = delete;

    // The object of that number; null where there is none.
    static T* find(int64_t number) {
        const std::lock_guard<std::mutex> lock(all().mutex);
        const auto found = all().objects.find(number);
        return found == all().objects.end() ? nullptr : found->second;
    }

    int64_t number;

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
