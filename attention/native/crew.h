#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

// Threads that sleep until there is work for all of them; the caller is the first of them.
class Crew {
public:
    // Throws std::system_error where there can be no such threads.
    explicit Crew(int num_threads);
    ~Crew();
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    int num_threads() const { return int(threads_.size()) + 1; }

    // Calls `work(thread)` on every thread and returns when all of them are done.
    void run(const std::function<void(int)>& work);

private:
    void serve(int thread);
    void dismiss();

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int)>* work_ = nullptr;
    int round_ = 0, num_busy_ = 0;
    bool is_over_ = false;
};
