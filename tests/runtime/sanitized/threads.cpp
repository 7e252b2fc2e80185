// Threads of a program that share layers and plans, and the pool under them.
#include <atomic>
#include <thread>

#include "network.h"

int main() {
  std::atomic<int> runs{0};
  for (int round = 0; round < 6; round++) {
    const Network network;
    std::vector<std::unique_ptr<Ready>> all;
    for (int images : {1, 2, 7, 33}) all.push_back(std::make_unique<Ready>(network, 0, images, in(1, 3), in(1, 3)));
    std::vector<std::thread> threads;
    for (auto& ready : all)
      threads.emplace_back([&ready, &runs] {
        for (int times = 0; times < 8; times++, runs++) ready->run();
      });
    for (auto& thread : threads) thread.join();
  }
  std::printf("%d runs", runs.load());
}
