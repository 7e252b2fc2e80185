#include "pool.h"

#include "gossamer.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("isb")  // about as long as a pause; arm's own `yield` takes no time at all
#else
#define RELAX() std::this_thread::yield()
#endif

namespace gossamer {
namespace {

constexpr int SPINS = 4000;  // some tens of microseconds, which is what lies between two layers

// One job at a time. Each thread has a range of items of its own, the same one in every job of as many items, so that it
// finds in its cache what it wrote there before; then it helps others with theirs. A range's ticket holds the job's number
// above and the next item below, so that an item can only be claimed of the job that the thread has read; once it is claimed
// the job stays until it is done.
class Pool {
 public:
  bool run(int64_t n, int threads, const std::function<void(int64_t, int)>& work) {
    if (!busy_.try_lock()) return false;
    std::lock_guard<std::mutex> one(busy_, std::adopt_lock);
    grow(threads - 1);
    const int n_ranges = threads < MOST ? threads : MOST;
    const uint64_t job = (job_.load(std::memory_order_relaxed) + 1) & 0xffffffff;
    n_ranges_.store(n_ranges, std::memory_order_relaxed);
    work_.store(&work, std::memory_order_relaxed);
    limit_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    for (int r = 0; r < n_ranges; r++) {
      ranges_[r].end.store(n * (r + 1) / n_ranges, std::memory_order_relaxed);
      ranges_[r].ticket.store(job << 32 | uint64_t(n * r / n_ranges), std::memory_order_release);
    }
    job_.store(job, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take(job, 0);
    while (done_.load(std::memory_order_acquire) < n) RELAX();
    // Closed: else a thread that is late could claim an item of it by the next job's end.
    for (int r = 0; r < n_ranges; r++) ranges_[r].ticket.store((job << 32) | 0xffffffff, std::memory_order_release);
    return true;
  }

  ~Pool() {
    stop_.store(true);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    for (auto& thread : threads_) thread.join();
  }

 private:
  static constexpr int MOST = 64;
  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> end{0};
  };

  void grow(int n) {
    try {
      while (int(threads_.size()) < n) threads_.emplace_back([this, i = int(threads_.size())] { live(i); });
    } catch (const std::system_error&) {  // the machine gives no more; those that there are take all of it
    }
  }

  void take(uint64_t job, int worker) {
    const int n = n_ranges_.load(std::memory_order_relaxed);
    for (int k = 0; k < n; k++) {
      Range& range = ranges_[(worker + k) % n];
      uint64_t now = range.ticket.load(std::memory_order_acquire);
      while (now >> 32 == job) {
        const int64_t item = int64_t(now & 0xffffffff), left = range.end.load(std::memory_order_relaxed) - item;
        if (left <= 0) break;
        const int64_t few = left > 8 ? left / 8 : 1;  // several at once, since claiming costs as much as a small item
        if (!range.ticket.compare_exchange_weak(now, now + uint64_t(few), std::memory_order_acq_rel)) continue;
        for (int64_t i = item; i < item + few; i++) (*work_.load(std::memory_order_relaxed))(i, worker);
        done_.fetch_add(few, std::memory_order_acq_rel);
        now = range.ticket.load(std::memory_order_acquire);
      }
    }
  }

  void live(int i) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t now = 0;
      int spins = 0;
      while ((now = job_.load(std::memory_order_acquire)) == seen && !stop_.load(std::memory_order_relaxed)) {
        if (++spins < SPINS) {
          RELAX();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return job_.load() != seen || stop_.load(); });
        sleeping_.fetch_sub(1);
        spins = 0;
      }
      if (stop_.load(std::memory_order_relaxed)) return;
      seen = now;
      if (i < limit_.load(std::memory_order_relaxed)) take(now, i + 1);
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  Range ranges_[MOST];
  std::atomic<uint64_t> job_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<int> n_ranges_{0};
  std::atomic<const std::function<void(int64_t, int)>*> work_{nullptr};
  std::atomic<int> limit_{0}, sleeping_{0};
  std::atomic<bool> stop_{false};
};

int64_t process() { return int64_t(getpid()); }

// OpenMP's threads, where a library of GNU's interface is in the process: in most builds of PyTorch its own, which spin on
// for milliseconds after each operator, and then leave other threads no processor. Looked up, so that nothing is linked.
struct Team {
  typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
  typedef int (*Number)();
  Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Number number = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  const int64_t owner = process();  // a forked child has none of the threads, and OpenMP would wait for them
  std::mutex busy;

  bool is_there() const { return parallel && number && owner == process(); }
};

// Made when the library is loaded, so that a process that is forked later is known to be another.
Team& team = *new Team;

// As a pool's, but that OpenMP waits for every thread at the end.
struct Shared {
  static constexpr int MOST = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  const std::function<void(int64_t, int)>& work;
  const Team::Number number;
  const int n_ranges;
  Range ranges[MOST];

  Shared(int64_t n, int workers, Team::Number number, const std::function<void(int64_t, int)>& work)
      : work(work), number(number), n_ranges(std::min(workers, MOST)) {
    for (int r = 0; r < n_ranges; r++) {
      ranges[r].next.store(n * r / n_ranges, std::memory_order_relaxed);
      ranges[r].end = n * (r + 1) / n_ranges;
    }
  }

  static void enter(void* shared) {
    Shared& s = *static_cast<Shared*>(shared);
    const int worker = s.number();
    for (int k = 0; worker < s.n_ranges && k < s.n_ranges; k++) {
      Range& range = s.ranges[(worker + k) % s.n_ranges];
      for (;;) {
        const int64_t left = range.end - range.next.load(std::memory_order_relaxed);
        if (left <= 0) break;
        const int64_t few = left > 8 ? left / 8 : 1, item = range.next.fetch_add(few, std::memory_order_relaxed);
        for (int64_t i = item; i < std::min(item + few, range.end); i++) s.work(i, worker);
      }
    }
  }
};

bool share_with_team(int64_t n, int threads, int workers, const std::function<void(int64_t, int)>& work) {
  if (!team.is_there() || !team.busy.try_lock()) return false;
  std::lock_guard<std::mutex> one(team.busy, std::adopt_lock);
  Shared shared(n, workers, team.number, work);
  team.parallel(Shared::enter, &shared, unsigned(threads), 0);  // as many as PyTorch has: OpenMP ends those that are too many
  return true;
}

}  // namespace

bool has_team() { return team.is_there(); }

void share(int64_t n, int threads, const std::function<void(int64_t, int)>& work, bool with_team) {
  const int all = threads;
  threads = int(std::min<int64_t>(threads, n));  // no worker's number is beyond those that there is memory for
  if (with_team && threads > 1 && share_with_team(n, all, threads, work)) return;
  // Never freed: a thread of the program may still be in a run when it exits. A forked child has none of the threads,
  // and a pool of its own.
  static std::atomic<Pool*> pool{nullptr};
  static std::atomic<int64_t> owner{0};
  if (threads > 1 && n > 1) {
    if (owner.load() != process()) {
      static std::mutex making;
      std::lock_guard<std::mutex> lock(making);
      if (owner.load() != process()) {
        pool.store(new Pool);
        owner.store(process());
      }
    }
    if (pool.load()->run(n, threads, work)) return;
  }
  for (int64_t i = 0; i < n; i++) work(i, 0);
}

}  // namespace gossamer

int32_t gossamer_has_team() { return gossamer::has_team(); }
