// embedding_time MODEL: for every line of standard input one run, answered with its nanoseconds.
#include <chrono>
#include <iostream>
#include <string>
#include <vector>

#include "vitq.hpp"

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  vitq::Model model = vitq::Model::Open(argc > 1 ? argv[1] : "", {1}).OrThrow();
  std::vector<float> input(static_cast<size_t>(model.image_size() * model.batch()), 0.5f);
  for (std::string line; std::getline(std::cin, line);) {
    Clock::time_point start = Clock::now();
    std::vector<float> logits = model.Run(input.data(), input.size()).OrThrow();
    std::cout << std::chrono::nanoseconds(Clock::now() - start).count() << std::endl;
  }
  return 0;
}
