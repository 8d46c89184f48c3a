// A pool of threads that sleeps between calls. Work is handed out by number, so that what is computed
// never depends on how many threads there are; only who computes it does.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace sparseattn {

// Memory of a call, on the alignment of the widest vectors.
class Room {
   public:
    Room() = default;
    explicit Room(int64_t bytes) { grow(bytes); }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    Room(Room&& other) noexcept : at_(other.at_), bytes_(other.bytes_) { other.at_ = nullptr; }
    ~Room() { std::free(at_); }
    // At least so many bytes; what was in it is lost where it has to grow.
    void* grow(int64_t bytes) {
        if (bytes > bytes_) {
            std::free(at_);
            bytes_ = (bytes + 63) / 64 * 64;
            at_ = std::aligned_alloc(64, size_t(bytes_));
            if (at_ == nullptr) throw std::bad_alloc();
        }
        return at_;
    }
    float* floats() const { return static_cast<float*>(at_); }

   private:
    void* at_ = nullptr;
    int64_t bytes_ = 0;
};

class Pool {
   public:
    static Pool& get() {
        // Never destroyed: threads may still wait when the process ends. Threads do not survive a
        // fork, so a child makes its own pool.
        static std::mutex guard;
        static Pool* pool = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> hold(guard);
        if (pool == nullptr || owner != getpid()) {
            pool = new Pool;
            owner = getpid();
        }
        return *pool;
    }

    // f(index, worker) for every index below `count`, on at most `threads` threads, the caller among
    // them; workers are numbered from 0 (the caller). Calls from several threads take turns.
    template <class F>
    void run(int64_t threads, int64_t count, const F& f) {
        if (threads > count) threads = count;
        if (threads <= 1 || !turn_.try_lock()) {
            // A second caller would wait for the first one's threads: it works alone instead.
            for (int64_t index = 0; index < count; ++index) f(index, int64_t(0));
            return;
        }
        std::lock_guard<std::mutex> turn(turn_, std::adopt_lock);
        while (int64_t(workers_.size()) < threads - 1) {
            int64_t number = int64_t(workers_.size()) + 1;
            workers_.emplace_back([this, number] { wait(number); });
            workers_.back().detach();
        }
        auto work = [](const void* state, int64_t index, int64_t worker) {
            (*static_cast<const F*>(state))(index, worker);
        };
        {
            std::lock_guard<std::mutex> hold(lock_);
            call_ = work;
            state_ = &f;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = threads - 1;
            running_ = threads - 1;
            ++round_;
            signal_.store(round_, std::memory_order_release);
        }
        wake_.notify_all();
        take(0);
        for (int spin = 0; spin < SPINS && left_.load(std::memory_order_acquire) != round_; ++spin) pause();
        std::unique_lock<std::mutex> hold(lock_);
        done_.wait(hold, [this] { return running_ == 0; });
    }

   private:
    static constexpr int SPINS = 2000;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void take(int64_t worker) {
        for (;;) {
            int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
            if (index >= count_) return;
            call_(state_, index, worker);
        }
    }

    void wait(int64_t number) {
        uint64_t seen = 0;
        for (;;) {
            for (int spin = 0; spin < SPINS && signal_.load(std::memory_order_acquire) == seen; ++spin) pause();
            {
                std::unique_lock<std::mutex> hold(lock_);
                wake_.wait(hold, [&] { return round_ != seen; });
                seen = round_;
                if (number > wanted_) continue;
            }
            take(number);
            std::lock_guard<std::mutex> hold(lock_);
            if (--running_ == 0) {
                left_.store(seen, std::memory_order_release);
                done_.notify_one();
            }
        }
    }

    std::vector<std::thread> workers_;
    std::mutex turn_, lock_;
    std::condition_variable wake_, done_;
    void (*call_)(const void*, int64_t, int64_t) = nullptr;
    const void* state_ = nullptr;
    int64_t count_ = 0, wanted_ = 0, running_ = 0;
    uint64_t round_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<uint64_t> signal_{0}, left_{0};
};

template <class F>
static inline void parallel_for(int64_t threads, int64_t count, const F& f) {
    Pool::get().run(threads, count, f);
}

}  // namespace sparseattn
