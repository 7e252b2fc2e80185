// Threads that share out numbered items of work.
#pragma once
#include <cstdint>
#include <functional>

namespace gossamer {

// Calls work(item, worker) for every item in [0, n), on up to `threads` threads, and no more than there are items; the
// caller's is worker 0. Returns when all that was claimed is done: a thread that wakes late, because the machine is busy,
// finds nothing left and is not waited for.
// Another run that comes meanwhile, from another thread of the program, works on its caller's thread alone.
// with_team: on PyTorch's threads where they can be had, which is best between its operators. `threads` is then how many it
// has, and all of them are waited for.
void share(int64_t n, int threads, const std::function<void(int64_t, int)>& work, bool with_team = false);

// Whether PyTorch's threads can be had.
bool has_team();

}  // namespace gossamer
