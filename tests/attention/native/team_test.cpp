// A team computes every item once into place, whichever helpers have a core, and helpers that are away hold nobody up.

#include "team.h"

#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <csignal>
#endif

#include "checks.h"

namespace {

// Squares of the items. A helper may be held up in the middle, as one that has lost its core is.
struct Squares {
    const int* from;
    int* to;
    std::atomic<bool>* is_held;
    std::atomic<int>* num_aside;

    void compute(int begin, int end) const {
        for (int i = begin; i < end; ++i) to[i] = from[i] * from[i];
    }
    void compute_aside(int begin, int end, char* aside) const {
        auto* results = reinterpret_cast<int*>(aside);
        num_aside->fetch_add(1);
        while (is_held->load()) std::this_thread::yield();
        for (int i = begin; i < end; ++i) results[i - begin] = from[i] * from[i];
    }
    void put(int begin, int end, const char* aside) const {
        for (int i = begin; i < end; ++i) to[i] = reinterpret_cast<const int*>(aside)[i - begin];
    }
};

constexpr int kMaxRange = 64;
constexpr size_t kAsideBytes = kMaxRange * sizeof(int);

bool are_squares(const std::vector<int>& from, const std::vector<int>& to) {
    for (size_t i = 0; i < from.size(); ++i)
        if (to[i] != from[i] * from[i]) return false;
    return true;
}

void test_all_items(int num_threads, int num_items) {
    Team team;
    team.reserve(num_threads, kAsideBytes);
    std::vector<int> from(num_items), to(num_items);
    std::atomic<bool> is_held{false};
    std::atomic<int> num_aside{0};
    for (int round = 0; round < 300; ++round) {
        for (int i = 0; i < num_items; ++i) from[i] = i + round, to[i] = -1;
        team.share(Squares{from.data(), to.data(), &is_held, &num_aside}, num_items, 1 + round % 5, kMaxRange);
        require(are_squares(from, to), "team: are_squares(from, to)");
        if (team.num_taken_back() > 0) team.settle();  // a helper without a core may still read the items
        if (round % 50 == 0) team.set_active(1 + round / 50 % num_threads);
    }
    team.settle();
}

// No range is longer than asked for, also without helpers: weights that were read are released range by range.
void test_ranges_alone() {
    struct Ranges {
        int* longest;
        void compute(int begin, int end) const { *longest = std::max(*longest, end - begin); }
        void compute_aside(int, int, char*) const {}
        void put(int, int, const char*) const {}
    };
    Team team;
    int longest = 0;
    team.share(Ranges{&longest}, 1000, 1, 7);
    require(longest == 7, "ranges have %d items; 7 were asked for", longest);
}

// A helper that is held up has taken a range: the caller computes it again, and what the helper makes later is dropped.
void test_held_helper() {
    Team team;
    team.reserve(2, kAsideBytes);
    std::vector<int> from(4096), to(4096);
    std::atomic<bool> is_held{true};
    std::atomic<int> num_aside{0};
    int rounds = 0;
    while (num_aside.load() == 0 && ++rounds < 20000) {
        for (int i = 0; i < 4096; ++i) from[i] = i + rounds, to[i] = -1;
        team.share(Squares{from.data(), to.data(), &is_held, &num_aside}, 4096, 1, kMaxRange);
        require(are_squares(from, to), "team: are_squares(from, to)");
    }
    require(num_aside.load() == 1, "team: num_aside.load() == 1");
    require(team.num_taken_back() == 1, "team: team.num_taken_back() == 1");
    for (int round = 0; round < 100; ++round) {  // the others go on without it
        for (int i = 0; i < 4096; ++i) to[i] = -1;
        if (round == 50) is_held = false;
        team.share(Squares{from.data(), to.data(), &is_held, &num_aside}, 4096, 1, kMaxRange);
        require(are_squares(from, to), "team: are_squares(from, to)");
    }
    team.settle();
}

void test_for_each() {
    Team team;
    team.reserve(3, 0);
    std::vector<std::atomic<int>> counts(3);
    for (int round = 0; round < 500; ++round) team.for_each(3, [&](int i) { counts[i].fetch_add(1); });
    for (const auto& count : counts) require(count.load() == 500, "an item was left out or computed twice");
}

// Between two pieces of work helpers sleep: the process takes next to no time.
void test_idle() {
    Team team;
    team.reserve(4, 0);
    std::atomic<int> count{0};
    team.for_each(4, [&](int) { count.fetch_add(1); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const std::clock_t before = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    require(std::clock() - before < CLOCKS_PER_SEC / 50, "team: std::clock() - before < CLOCKS_PER_SEC / 50");
    require(count.load() == 4, "team: count.load() == 4");
}

#if defined(__linux__)
// A thread that changes a number may lose its core at any instruction, also between the change and the waking. A signal
// handler that takes longer than waiting threads spin takes its place here.
void test_none_sleeps_for_ever() {
    struct sigaction action = {};
    action.sa_handler = [](int) {
        const timespec pause{0, 200000};
        nanosleep(&pause, nullptr);
    };
    sigaction(SIGUSR1, &action, nullptr);
    WaitableNumber number;
    std::atomic<bool> ends{false};
    std::atomic<uint32_t> last{0};
    std::thread waiting([&] {
        for (uint32_t seen = 0; !ends;) {
            number.wait_for_change(seen);
            last = seen = number.load();
        }
    });
    std::thread changing([&] {
        for (int i = 0; i < 400; ++i) {
            const auto start = std::chrono::steady_clock::now();
            while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(1)) number.advance();
            for (int waited = 0; last != number.load(); ++waited) {
                require(waited < 2000, "a thread sleeps though its number has changed");
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        }
        ends = true;
        number.advance();
    });
    while (!ends) {
        pthread_kill(changing.native_handle(), SIGUSR1);
        std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
    changing.join();
    waiting.join();
}
#endif

}  // namespace

int main() {
    for (int num_threads : {1, 2, 3, 5})
        for (int num_items : {0, 1, 7, 64, 1000}) test_all_items(num_threads, num_items);
    test_ranges_alone();
    test_held_helper();
    test_for_each();
    test_idle();
#if defined(__linux__)
    test_none_sleeps_for_ever();
#endif
    std::printf("all results agree\n");
}
