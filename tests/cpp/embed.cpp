// What an application may do with vitq.hpp, wrong and right, for test_embedding.py; every command
// prints what it found, one line each, and ends with 0.
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "vitq.hpp"

namespace {

using Logits = std::vector<float>;
using Words = std::vector<std::string>;

// Opens or ends the program: vitq::Exception is what OrThrow() is for.
vitq::Model Open(const std::string& path, int threads = 1) {
  return vitq::Model::Open(path, {threads}).OrThrow();
}

// An image of the model's size that differs from every other `seed`'s.
std::vector<uint8_t> Picture(const vitq::Model& model, unsigned seed) {
  std::vector<uint8_t> pixels(static_cast<size_t>(model.image_size()));
  for (uint8_t& pixel : pixels) {
    seed = seed * 1664525u + 1013904223u;
    pixel = static_cast<uint8_t>(seed >> 24);
  }
  return pixels;
}

Logits Run(vitq::Model& model, unsigned seed) {
  std::vector<uint8_t> pixels = Picture(model, seed);
  if (model.metadata().input_type == "uint8")
    return model.Run(pixels.data(), pixels.size()).OrThrow();
  std::vector<float> floats(pixels.size());
  for (size_t i = 0; i < floats.size(); ++i) floats[i] = (pixels[i] - 128) / 64.0f;
  return model.Run(floats.data(), floats.size()).OrThrow();
}

long Resident() {
  long total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE) / 1024;
}

template <typename T>
void Say(const vitq::Result<T>& result) {
  if (result)
    std::cout << "accepted\n";
  else
    std::cout << static_cast<int>(result.error().code) << " " << result.error().message << "\n";
}

// refuse FILE...: what Open says of each.
void Refuse(const Words& words) {
  for (const std::string& path : words) Say(vitq::Model::Open(path));
}

// inputs MODEL: inputs that are none.
void Inputs(const Words& words) {
  vitq::Model model = Open(words[0]);
  bool bytes = model.metadata().input_type == "uint8";
  size_t size = static_cast<size_t>(model.image_size());
  std::vector<uint8_t> pixels(2 * size);
  std::vector<float> floats(2 * size), bad(size);
  bad[size / 2] = std::numeric_limits<float>::quiet_NaN();
  auto run = [&](size_t count) {
    return bytes ? model.Run(pixels.data(), count) : model.Run(floats.data(), count);
  };
  for (size_t count : {size - 1, size + 1, size_t{0}}) Say(run(count));
  Say(bytes ? model.Run(static_cast<const uint8_t*>(nullptr), size)
            : model.Run(static_cast<const float*>(nullptr), size));
  Say(bytes ? model.Run(floats.data(), size) : model.Run(pixels.data(), size));
  Say(model.Classify({pixels.data(), 0, 4}));
  Say(model.Classify({pixels.data(), 1, 1, 2}));
  if (!bytes) {
    Say(model.Run(bad.data(), size));
    bad[size / 2] = -std::numeric_limits<float>::infinity();
    Say(model.Run(bad.data(), size));
  }
  Say(vitq::Model::Open(words[0], {-1}));
  Say(vitq::Model::Open(words[0], {vitq::MostThreads() + 1}));
  Say(run(size));
  Say(run(2 * size));
  std::cout << model.Top(*run(size), 1000).size() << " " << model.Top({}, 5).size() << std::endl;
}

// two MODEL MODEL [ROUNDS]: in turn they give what each gives alone.
void Two(const Words& words) {
  const int rounds = words.size() > 2 ? std::stoi(words[2]) : 20;
  std::vector<Logits> alone;
  for (int i = 0; i < 2; ++i) {
    vitq::Model model = Open(words[i]);
    alone.push_back(Run(model, 1));
  }
  vitq::Model first = Open(words[0]), second = Open(words[1]);
  int different = 0;
  for (int i = 0; i < rounds; ++i)
    different += (Run(first, 1) != alone[0]) + (Run(second, 1) != alone[1]);
  { vitq::Model gone = std::move(first); }  // the other one lives on
  different += Run(second, 1) != alone[1];
  std::cout << different << " different" << std::endl;
}

// threads MODEL shared|own [RUNS]: four threads, an instance each, against one thread.
void Threads(const Words& words) {
  constexpr unsigned kThreads = 4;
  const unsigned runs = words.size() > 2 ? static_cast<unsigned>(std::stoi(words[2])) : 50;
  vitq::Model model = Open(words[0]);
  std::vector<Logits> expected;
  for (unsigned seed = 0; seed < kThreads * runs; ++seed) expected.push_back(Run(model, seed));
  std::vector<int> different(kThreads, -1);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      vitq::Model mine = words[1] == "own" ? Open(words[0]) : model.Another().OrThrow();
      different[t] = mine.Verify().OrThrow().equal() ? 0 : 1;
      for (unsigned seed = t * runs; seed < (t + 1) * runs; ++seed)
        different[t] += Run(mine, seed) != expected[seed];
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int count : different) std::cout << count << " different" << std::endl;
}

// loop MODEL COUNT: resident KiB after a tenth of the runs and after all.
void Loop(const Words& words) {
  int count = std::stoi(words[1]);
  vitq::Model model = Open(words[0]);
  long before = 0;
  for (int i = 0; i < count; ++i) {
    if (i == count / 10) before = Resident();
    Run(model, static_cast<unsigned>(i));
  }
  std::cout << before << " " << Resident() << std::endl;
}

// reopen MODEL COUNT: the same, for opening, verifying and closing.
void Reopen(const Words& words) {
  int count = std::stoi(words[1]);
  long before = 0;
  for (int i = 0; i < count; ++i) {
    if (i == count / 10) before = Resident();
    vitq::Model model = Open(words[0]);
    Run(model, 1);
    if (!model.Verify().OrThrow().equal()) std::cout << "not equal" << std::endl;
  }
  std::cout << before << " " << Resident() << std::endl;
}

// pixels SPEC HEIGHT WIDTH CHANNELS: raw pixels of standard input, cropped to standard output.
void CropRaw(const Words& words) {
  vitq::Preprocess spec = vitq::detail::ReadPreprocess(vitq::detail::Json::Parse(words[0]));
  std::vector<uint8_t> raw{std::istreambuf_iterator<char>(std::cin),
                           std::istreambuf_iterator<char>()};
  vitq::Pixels out = vitq::CropPixels(
      {raw.data(), std::stoi(words[1]), std::stoi(words[2]), std::stoi(words[3])}, spec);
  std::vector<float> floats = vitq::Normalize(out, spec);
  std::cout.write(reinterpret_cast<const char*>(out.data.data()),
                  static_cast<std::streamsize>(out.data.size()));
  std::cout.write(reinterpret_cast<const char*>(floats.data()),
                  static_cast<std::streamsize>(floats.size() * sizeof(float)));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  const Words words(argv + std::min(argc, 2), argv + argc);
  try {
    if (command == "refuse") Refuse(words);
    else if (command == "inputs") Inputs(words);
    else if (command == "two") Two(words);
    else if (command == "threads") Threads(words);
    else if (command == "loop") Loop(words);
    else if (command == "reopen") Reopen(words);
    else if (command == "pixels") CropRaw(words);
    else return 3;
  } catch (const vitq::Exception& why) {
    std::cerr << "vitq::Exception " << static_cast<int>(why.code) << " " << why.what() << std::endl;
    return 2;
  }
  return 0;
}
