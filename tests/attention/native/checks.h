#pragma once

// Random numbers, threads and assertions of the native tests.

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace {

std::mt19937 random_bits(7);

inline int pick(int least, int most) { return std::uniform_int_distribution<int>(least, most)(random_bits); }

// Ends the test with a message in printf's format if `holds` is false.
[[gnu::format(printf, 2, 3)]] inline void require(bool holds, const char* sentence, ...) {
    if (holds) return;
    va_list values;
    va_start(values, sentence);
    std::vprintf(sentence, values);
    va_end(values);
    std::printf("\n");
    std::exit(1);
}

// Runs `work(thread)` on that many threads at once.
template <class Work> void on_threads(int num_threads, Work work) {
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back([&work, i] { work(i); });
    work(0);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace
