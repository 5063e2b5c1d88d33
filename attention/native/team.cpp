// A job's number stands in the counter of its items and in every claim, so that a helper which was away for long finds
// that its job is over. A claim is written before the counter is changed: there is no moment in which a range is taken
// and nobody can see by whom.

#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <new>

namespace {

// A helper's claim: what it does (2 bits), with which items (20 bits for the first, 20 for the end), of which job (22).
enum State : uint64_t { kIdle = 0, kTaken = 1, kPutting = 2, kTakenBack = 3 };

constexpr int kItemBits = 20, kJobBits = 64 - 2 - 2 * kItemBits;
constexpr int kMaxItems = (1 << kItemBits) - 1;

uint64_t claim_of(State state, int begin, int end, uint32_t number) {
    return state | uint64_t(begin) << 2 | uint64_t(end) << (2 + kItemBits) | uint64_t(number) << (2 + 2 * kItemBits);
}

State state_of(uint64_t claim) { return State(claim & 3); }
int begin_of(uint64_t claim) { return int(claim >> 2 & kMaxItems); }
int end_of(uint64_t claim) { return int(claim >> (2 + kItemBits) & kMaxItems); }
bool is_of_job(uint64_t claim, uint32_t number) {
    return state_of(claim) != kIdle && claim >> (64 - kJobBits) == (number & ((1u << kJobBits) - 1));
}

uint64_t counter_of(uint32_t number, int item) { return uint64_t(number) << 32 | uint32_t(item); }

int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

// The least and the most that a caller waits for a helper's range before it computes it again.
constexpr int64_t kMinPatience = 3000, kMaxPatience = 100000;

// About half of a core's second-level cache.
constexpr size_t kPrefetchedBytes = 384 << 10;

// Threads do not follow a process into its fork.
std::atomic<uint64_t> num_forks{0};

void watch_forks() {
    static const int installed = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
    (void)installed;
}

}  // namespace

struct alignas(64) Team::CacheLine {
    char bytes[64];
};

struct alignas(64) Team::Helper {
    std::atomic<uint64_t> claim{kIdle};
    std::vector<CacheLine> aside;
    std::thread thread;
    int index = 0;
    Job job;
};

Team::Team() = default;
Team::~Team() { stop(); }

void Team::reserve(int num_threads, size_t aside_bytes) {
    if (num_threads - 1 == num_helpers_ && aside_bytes <= aside_bytes_) return;
    stop();
    num_helpers_ = 0, num_active_ = 1;
    aside_bytes_ = std::max((aside_bytes + sizeof(CacheLine) - 1) / sizeof(CacheLine) * sizeof(CacheLine), aside_bytes_);
    helpers_.reset(num_threads > 1 ? new Helper[num_threads - 1] : nullptr);
    for (int i = 0; i < num_threads - 1; ++i) helpers_[i].index = i, helpers_[i].aside.resize(aside_bytes_ / sizeof(CacheLine));
    num_helpers_ = num_threads - 1, num_active_ = std::max(num_threads, 1);
}

void Team::set_active(int num_threads) {
    num_active_ = std::clamp(num_threads, 1, num_helpers_ + 1);
    num_helping_.store(num_active_ - 1, std::memory_order_seq_cst);
    activity_.advance();
}

void Team::start() {
    watch_forks();
    if (is_started_ && num_forks_ == num_forks.load()) return;
    if (is_started_) {  // in a forked process: the threads are not here, only what they left
        for (int i = 0; i < num_helpers_; ++i) {
            new (&helpers_[i].thread) std::thread;
            helpers_[i].claim.store(kIdle);
        }
    }
    num_forks_ = num_forks.load(), is_started_ = true, ends_ = false, num_helping_ = num_active_ - 1;
    for (int i = 0; i < num_helpers_; ++i) {
        Helper& helper = helpers_[i];
        try {
            helper.thread = std::thread([this, &helper] { live(helper); });
        } catch (const std::exception&) {  // no more threads: the others do the work
            return;
        }
    }
}

void Team::stop() {
    if (!is_started_) return;
    is_started_ = false;
    const bool is_child = num_forks_ != num_forks.load();
    ends_ = true;
    job_number_.advance();
    activity_.advance();
    for (int i = 0; i < num_helpers_; ++i) {
        if (is_child)
            new (&helpers_[i].thread) std::thread;
        else if (helpers_[i].thread.joinable())
            helpers_[i].thread.join();
    }
}

void Team::settle() {
    if (!is_started_ || num_forks_ != num_forks.load()) return;
    for (int i = 0; i < num_helpers_; ++i)
        while (helpers_[i].claim.load(std::memory_order_acquire) != kIdle) std::this_thread::yield();
}

void Team::live(Helper& helper) {
    for (uint32_t seen = 0;;) {
        // `stop` sets ends_ and then changes both numbers: who read a number before sees it change, who reads it later
        // sees ends_.
        const uint32_t activity = activity_.load(), number = job_number_.load();
        if (ends_) return;
        if (helper.index >= num_helping_.load(std::memory_order_seq_cst)) {
            activity_.wait_for_change(activity);
            continue;
        }
        if (number != seen && help(helper, number) && helper.index == 0) prefetch(helper.job, number);
        seen = number;
        job_number_.wait_for_change(seen);
    }
}

// Takes a range of items. Ranges become smaller towards the end, so that no thread is left with a large one.
bool Team::take(const Job& job, uint32_t number, std::atomic<uint64_t>* claim, int* begin, int* end) {
    uint64_t next = next_.load(std::memory_order_acquire);
    for (;;) {
        const int first = int(uint32_t(next)), left = job.num_items - first;
        if (uint32_t(next >> 32) != number || left <= 0) return false;
        const int count = std::min({std::max(left / (2 * job.num_workers), job.min_range), left, job.max_range});
        if (claim != nullptr) claim->store(claim_of(kTaken, first, first + count, number), std::memory_order_seq_cst);
        if (next_.compare_exchange_weak(next, counter_of(number, first + count), std::memory_order_seq_cst)) {
            *begin = first, *end = first + count;
            return true;
        }
    }
}

// Returns whether the job was still there; the helper has a copy of it then.
bool Team::help(Helper& helper, uint32_t number) {
    // The copy is torn if the next job is written meanwhile; then the number is no longer in the counter.
    if (uint32_t(next_.load(std::memory_order_acquire) >> 32) != number) return false;
    Job& job = helper.job;
    uint64_t words[kJobWords];
    for (size_t i = 0; i < kJobWords; ++i) words[i] = job_[i].load(std::memory_order_relaxed);
    std::memcpy(static_cast<void*>(&job), words, sizeof job);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (uint32_t(next_.load(std::memory_order_acquire) >> 32) != number) return false;
    for (int begin, end;;) {
        if (!take(job, number, &helper.claim, &begin, &end)) {
            helper.claim.store(kIdle, std::memory_order_release);
            return true;
        }
        if (job.compute_aside == nullptr) {
            job.compute(job.work, begin, end);
        } else {
            job.compute_aside(job.work, begin, end, helper.aside.data()->bytes);
            uint64_t taken = claim_of(kTaken, begin, end, number);
            if (helper.claim.compare_exchange_strong(taken, claim_of(kPutting, begin, end, number), std::memory_order_seq_cst))
                job.put(job.work, begin, end, helper.aside.data()->bytes);
        }
        helper.claim.store(kIdle, std::memory_order_release);
    }
}

// Memory would rest while the caller works alone between two jobs.
void Team::prefetch(const Job& job, uint32_t number) const {
    constexpr size_t kLine = 64, kLinesAtOnce = 16;
    size_t left = kPrefetchedBytes;
    for (const Span& span : job.upcoming) {
        const size_t num_bytes = std::min(span.num_bytes, left);
        left -= num_bytes;
        for (size_t at = 0; at < num_bytes; at += kLine) {
            if (at % (kLine * kLinesAtOnce) == 0 && job_number_.load() != number) return;
            __builtin_prefetch(span.begin + at, 0, 2);
        }
    }
}

void Team::run(Job& job) {
    start();
    job.num_workers = num_active_;
    std::copy(std::begin(upcoming_), std::end(upcoming_), job.upcoming);
    job.num_items = std::min(job.num_items, kMaxItems);
    const uint32_t number = job_number_.load() + 1;
    next_.store(0, std::memory_order_relaxed);  // no job's number
    std::atomic_thread_fence(std::memory_order_release);
    uint64_t words[kJobWords];
    std::memcpy(words, &job, sizeof job);
    for (size_t i = 0; i < kJobWords; ++i) job_[i].store(words[i], std::memory_order_relaxed);
    next_.store(counter_of(number, 0), std::memory_order_seq_cst);
    job_number_.advance();
    const int64_t started = now();
    for (int begin, end; take(job, number, nullptr, &begin, &end);) job.compute(job.work, begin, end);
    for (int i = 0; i < num_helpers_; ++i) finish(job, helpers_[i], started);
}

// Waits for what the helper has taken, or computes it again.
void Team::finish(const Job& job, Helper& helper, int64_t started) {
    const uint32_t number = job_number_.load();
    uint64_t claim = helper.claim.load(std::memory_order_acquire);
    if (!is_of_job(claim, number) || state_of(claim) == kTakenBack) return;
    const int64_t begun = now(), patience = std::clamp(begun - started, kMinPatience, kMaxPatience);
    for (int spins = 1; is_of_job(claim = helper.claim.load(std::memory_order_acquire), number); ++spins) {
        relax();
        if (spins % 16 != 0 || now() - begun < patience) continue;
        if (job.compute_aside == nullptr || state_of(claim) == kPutting) {
            std::this_thread::yield();
            continue;
        }
        const int begin = begin_of(claim), end = end_of(claim);
        if (!helper.claim.compare_exchange_strong(claim, claim_of(kTakenBack, begin, end, number), std::memory_order_seq_cst)) continue;
        job.compute(job.work, begin, std::min(end, job.num_items));
        ++num_taken_back_;
        return;
    }
}
