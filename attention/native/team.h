#pragma once

// Threads that help the thread which computes a graph, when they have a core.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "sleep.h"
#include "threads.h"

// The calling thread and its helpers. Work is a row of items, of which threads take ranges from a counter. The caller
// waits for no helper that lost its core: helpers that have not begun take nothing, and a range that a helper does not
// finish in time is computed again by the caller. So a helper computes into memory of its own, and its result is copied
// into place only while the caller still wants it. Whoever computes an item, the result is the same.
//
// Helpers spin between two pieces of work for kSpinTime, then sleep. They are started with the first work.
class Team {
public:
    Team();
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Reserves `aside_bytes` for each of `num_threads - 1` helpers. Call it, like the others, on one thread at a time.
    // Throws std::bad_alloc.
    void reserve(int num_threads, size_t aside_bytes);

    // How many of the reserved threads take part from now on, at least 1.
    void set_active(int num_threads);

    int num_active() const { return num_active_; }
    size_t aside_bytes() const { return aside_bytes_; }
    size_t num_bytes() const { return num_helpers_ * aside_bytes_; }

    // Waits until no helper reads memory of earlier work, so that it can be freed.
    void settle();

    // Memory that later work reads: helpers prefetch it, in this order, while they wait for the next work. It is never
    // read, and may be unmapped.
    struct Span {
        const char* begin;
        size_t num_bytes;
    };
    static constexpr int kMaxUpcoming = 4;
    void set_upcoming(const Span* spans, int count) {
        for (int i = 0; i < kMaxUpcoming; ++i) upcoming_[i] = i < count ? spans[i] : Span{nullptr, 0};
    }

    // Computes items 0 to `num_items`, in ranges of `min_range` to `max_range` items. `Work` is copied to helpers byte
    // by byte, and what it points to must stay readable until `settle`. It has
    //     void compute(int begin, int end) const                     into place,
    //     void compute_aside(int begin, int end, char* aside) const  into `aside_bytes` of a helper's own, and
    //     void put(int begin, int end, const char* aside) const      from there into place.
    template <class Work> void share(const Work& work, int num_items, int min_range, int max_range) {
        static_assert(std::is_trivially_copyable_v<Work> && sizeof(Work) <= sizeof(Job::work), "helpers copy it");
        if (num_active_ == 1 || num_items <= min_range) {
            for (int begin = 0; begin < num_items; begin += max_range) work.compute(begin, std::min(begin + max_range, num_items));
            return;
        }
        Job job;
        std::memcpy(job.work, &work, sizeof work);
        job.compute = [](const void* w, int begin, int end) { static_cast<const Work*>(w)->compute(begin, end); };
        job.compute_aside = [](const void* w, int begin, int end, char* aside) { static_cast<const Work*>(w)->compute_aside(begin, end, aside); };
        job.put = [](const void* w, int begin, int end, const char* aside) { static_cast<const Work*>(w)->put(begin, end, aside); };
        job.num_items = num_items, job.min_range = min_range, job.max_range = max_range;
        run(job);
    }

    // Calls `work(i)` for each i below `count`, on any thread. A helper that loses its core in the middle is waited for.
    template <class Work> void for_each(int count, const Work& work) {
        if (num_active_ == 1 || count == 1) {
            for (int i = 0; i < count; ++i) work(i);
            return;
        }
        Job job;
        const Work* pointer = &work;
        std::memcpy(job.work, &pointer, sizeof pointer);
        job.compute = [](const void* w, int begin, int end) {
            for (int i = begin; i < end; ++i) (**static_cast<const Work* const*>(w))(i);
        };
        job.compute_aside = nullptr, job.put = nullptr;
        job.num_items = count, job.min_range = job.max_range = 1;
        run(job);
    }

    // Ranges that the caller computed again, because a helper had lost its core.
    int64_t num_taken_back() const { return num_taken_back_; }

private:
    struct Job {
        alignas(16) char work[256];
        void (*compute)(const void* work, int begin, int end);
        void (*compute_aside)(const void* work, int begin, int end, char* aside);
        void (*put)(const void* work, int begin, int end, const char* aside);
        int num_items, min_range, max_range, num_workers;
        Span upcoming[kMaxUpcoming];
    };
    static_assert(sizeof(Job) % sizeof(uint64_t) == 0 && std::is_trivially_copyable_v<Job>, "it is copied word by word");
    struct CacheLine;
    struct Helper;

    void run(Job& job);
    void start();
    void stop();
    bool take(const Job& job, uint32_t number, std::atomic<uint64_t>* claim, int* begin, int* end);
    bool help(Helper& helper, uint32_t number);
    void prefetch(const Job& job, uint32_t number) const;
    void finish(const Job& job, Helper& helper, int64_t started);
    void live(Helper& helper);

    std::unique_ptr<Helper[]> helpers_;
    int num_helpers_ = 0, num_active_ = 1;
    Span upcoming_[kMaxUpcoming] = {};
    size_t aside_bytes_ = 0;
    bool is_started_ = false;
    uint64_t num_forks_ = 0;
    static constexpr size_t kJobWords = sizeof(Job) / sizeof(uint64_t);
    std::atomic<uint64_t> job_[kJobWords] = {};  // read while it is written, and then read again
    alignas(64) std::atomic<uint64_t> next_{0};  // the number of the job, and its first item that nobody has taken
    alignas(64) WaitableNumber job_number_;
    WaitableNumber activity_;  // changes with num_helping_
    std::atomic<bool> ends_{false};
    std::atomic<int> num_helping_{0};
    int64_t num_taken_back_ = 0;
};

// The threads of a team, for work that is split by thread.
class TeamThreadGroup : public ThreadGroup {
public:
    explicit TeamThreadGroup(Team& team, bool alone = false) : ThreadGroup(alone ? 1 : team.num_active()), team_(team) {}

protected:
    void do_parallel_for(Work work, Call then) override {
        team_.for_each(num_threads, work);
        then();
    }
    void do_single(Call then) override { then(); }

private:
    Team& team_;
};
