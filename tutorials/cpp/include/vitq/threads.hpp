// How many threads may be asked for. TVM starts as many as it is told: thousands take minutes, and
// then all that the system has.
#pragma once

#include <algorithm>
#include <string>
#include <thread>

namespace vitq {

// The largest number of threads that is let through.
inline int MostThreads() {
  return std::max(16, 4 * static_cast<int>(std::thread::hardware_concurrency()));
}

// What is said of a larger one.
inline std::string TooManyThreads(const std::string& given) {
  return given + " threads are too many: this machine has " +
         std::to_string(std::thread::hardware_concurrency()) + " CPUs; give 1 to " +
         std::to_string(MostThreads());
}

}  // namespace vitq
