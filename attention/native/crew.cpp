#include "crew.h"

Crew::Crew(int num_threads) {
    try {
        for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(i); });
    } catch (...) {
        dismiss();
        throw;
    }
}

Crew::~Crew() { dismiss(); }

void Crew::dismiss() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        is_over_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Crew::run(const std::function<void(int)>& work) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        work_ = &work, num_busy_ = int(threads_.size()), ++round_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_busy_ == 0; });
}

void Crew::serve(int thread) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int seen = 0;;) {
        wake_.wait(lock, [&] { return is_over_ || round_ != seen; });
        if (is_over_) return;
        seen = round_;
        const std::function<void(int)>& work = *work_;
        lock.unlock();
        work(thread);
        lock.lock();
        if (--num_busy_ == 0) done_.notify_one();
    }
}
