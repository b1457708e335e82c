// Run an artefact of tvm-vitq from C++: two runtime libraries of TVM, no Python, no compiler.
//
//   vitq::Result<vitq::Model> model = vitq::Model::Open("deit_tiny.so");
//   if (!model) return complain(model.error().message);
//   vitq::Result<std::vector<float>> logits = model->Classify({rgb, height, width});
//   for (const vitq::Guess& guess : model->Top(*logits, 5)) ...
//
// No function throws, but for OrThrow() of what they return. A Model belongs to one thread at a
// time; for another thread take Another() instance of it: library and weights are shared.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "vitq/file.hpp"
#include "vitq/metadata.hpp"
#include "vitq/preprocess.hpp"
#include "vitq/result.hpp"
#include "vitq/threads.hpp"

namespace vitq {

struct Options {
  // Threads of the kernels that this process starts; 0 leaves TVM's choice (TVM_NUM_THREADS, else
  // the number of cores). TVM keeps one pool for each thread that calls Run, made at its first
  // call: later and larger numbers have no effect there. More than MostThreads() are refused.
  int threads = 0;
};

struct Guess {
  int64_t index;
  std::string label;  // empty if the artefact has none
  float logit;
  double probability;  // softmax over all classes
};

struct Verification {
  int64_t vectors = 0, logits_compared = 0, logits_different = 0;
  bool equal() const { return logits_different == 0; }
};

class Model {
 public:
  // Opens an artefact. Refuses, without loading it, a file that is missing, truncated, of another
  // kind or for another architecture.
  static Result<Model> Open(const std::string& path, const Options& options = {});

  // Another instance for another thread.
  Result<Model> Another() const;

  const Metadata& metadata() const { return shared_->metadata; }
  int64_t batch() const { return metadata().input_shape[0]; }
  int64_t classes() const { return metadata().classes; }
  // Numbers of one image.
  int64_t image_size() const { return Count(metadata().input_shape) / batch(); }

  // Logits [images, classes] of `count` numbers: normalised float32 [images, C, H, W].
  Result<std::vector<float>> Run(const float* input, size_t count);
  // The same of an artefact with uint8 input: raw pixels [images, H, W, C].
  Result<std::vector<float>> Run(const uint8_t* input, size_t count);
  // Logits of one image of any size, preprocessed as the artefact says.
  Result<std::vector<float>> Classify(const PixelView& image);

  // The most likely classes of one image's logits.
  std::vector<Guess> Top(const float* logits, size_t count) const;
  std::vector<Guess> Top(const std::vector<float>& logits, size_t count) const {
    return logits.size() == static_cast<size_t>(classes()) ? Top(logits.data(), count)
                                                           : std::vector<Guess>();
  }

  // Replays the golden vectors of the artefact and compares the integer logits, bit for bit.
  Result<Verification> Verify();

 private:
  using Tensor = tvm::ffi::Tensor;

  struct Shared {
    std::string path;
    Options options;
    tvm::ffi::Module library;  // outlives everything made of it
    Metadata metadata;
  };

  struct Memory {
    void AllocData(DLTensor* tensor) {
      // TVM's kernels take 64-byte alignment for granted.
      size_t size = (tvm::ffi::GetDataSize(*tensor) + 63) / 64 * 64;
      tensor->data = std::aligned_alloc(64, size ? size : 64);
      if (tensor->data == nullptr) throw std::bad_alloc();
    }
    void FreeData(DLTensor* tensor) { std::free(tensor->data); }
  };

  Model(std::shared_ptr<const Shared> shared, tvm::ffi::Module machine)
      : shared_(std::move(shared)), machine_(std::move(machine)) {}

  static tvm::ffi::Module Start(const tvm::ffi::Module& library);
  static tvm::ffi::Function Function(const tvm::ffi::Module& machine, const char* name);
  static int64_t Count(const std::vector<int64_t>& shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
  }
  static Tensor Allocate(const std::vector<int64_t>& shape, const std::string& type);
  static void SetThreads(int threads);
  Tensor Constant(const char* name) const { return Function(machine_, name)().cast<Tensor>(); }
  Error WrongInput(const std::string& why) const {
    return {Code::kWrongInput, shared_->path + ": " + why};
  }
  template <typename T>
  Result<std::vector<float>> RunAll(const T* input, size_t count, const char* type);
  template <typename T>
  static int64_t Different(const Tensor& found, const Tensor& expected, int64_t row, int64_t rows);

  std::shared_ptr<const Shared> shared_;
  tvm::ffi::Module machine_;
  // Kept between calls: the input's memory and the compiled function.
  std::unique_ptr<Tensor> input_;
  std::unique_ptr<tvm::ffi::Function> main_;
};

// -- how it is done ---------------------------------------------------------------------------------

inline tvm::ffi::Function Model::Function(const tvm::ffi::Module& machine, const char* name) {
  tvm::ffi::Optional<tvm::ffi::Function> found = machine->GetFunction(name);
  if (!found)
    throw Exception({Code::kOtherFormat, std::string("it has no function ") + name +
                                             "; compile it again"});
  return *found;
}

inline tvm::ffi::Module Model::Start(const tvm::ffi::Module& library) {
  tvm::ffi::Module machine =
      Function(library, "vm_load_executable")().cast<tvm::ffi::Module>();
  constexpr int kPooled = 2, kCpu = static_cast<int>(kDLCPU);
  Function(machine, "vm_initialization")(kCpu, 0, kPooled, kCpu, 0, kPooled);
  return machine;
}

inline Result<Model> Model::Open(const std::string& path, const Options& options) {
  return detail::Guarded(path.c_str(), [&]() -> Result<Model> {
    if (Status status = detail::CheckFile(path); !status) return status.error();
    if (options.threads < 0)
      return Error{Code::kWrongInput, "the number of threads must not be negative"};
    if (options.threads > MostThreads())
      return Error{Code::kWrongInput, TooManyThreads(std::to_string(options.threads))};
    // dlopen looks for a bare name in the system's folders.
    std::unique_ptr<char, decltype(&std::free)> full(realpath(path.c_str(), nullptr), &std::free);
    if (!full) return Error{Code::kCannotRead, "cannot read " + path};
    try {
      tvm::ffi::Module library = tvm::ffi::Module::LoadFromFile(full.get());
      tvm::ffi::Module machine = Start(library);
      Tensor text = Function(machine, "vitq_metadata")().cast<Tensor>();
      Metadata metadata = detail::ReadMetadata(std::string(
          static_cast<const char*>(text.data_ptr()), tvm::ffi::GetDataSize(text)));
      if (std::string missing = detail::MissingFeatures(metadata.features); !missing.empty())
        return Error{Code::kOtherProcessor, path + " needs a processor with " + missing +
                                                "; compile it for this one"};
      auto shared = std::make_shared<const Shared>(
          Shared{path, options, std::move(library), std::move(metadata)});
      return Model(std::move(shared), std::move(machine));
    } catch (const Exception& why) {
      return Error{why.code, path + ": " + why.what()};
    } catch (const std::exception& why) {
      return Error{Code::kRuntime, path + " cannot be loaded by this TVM runtime: " +
                                       detail::FirstLine(why.what())};
    }
  });
}

inline Result<Model> Model::Another() const {
  return detail::Guarded(shared_->path.c_str(), [&]() -> Result<Model> {
    return Model(shared_, Start(shared_->library));
  });
}

inline Model::Tensor Model::Allocate(const std::vector<int64_t>& shape, const std::string& type) {
  size_t digit = type.find_first_of("0123456789");
  std::string kind = type.substr(0, digit);
  uint8_t code = kind == "int" ? kDLInt : kind == "uint" ? kDLUInt : kDLFloat;
  uint8_t bits = static_cast<uint8_t>(std::atoi(type.c_str() + std::min(digit, type.size())));
  if (bits != 8 && bits != 16 && bits != 32)
    throw Exception({Code::kOtherFormat, "it has an input of type " + type});
  return Tensor::FromNDAlloc(Memory(), tvm::ffi::Shape(shape.begin(), shape.end()),
                             DLDataType{code, bits, 1}, DLDevice{kDLCPU, 0});
}

inline void Model::SetThreads(int threads) {
  static std::mutex mutex;
  static thread_local int current = 0;
  if (threads == 0 || threads == current) return;
  std::lock_guard<std::mutex> lock(mutex);
  // A pool reads the variable when it starts; one that runs is configured.
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
  constexpr int kBigCores = 1;
  tvm::ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kBigCores, threads);
  current = threads;
}

template <typename T>
Result<std::vector<float>> Model::RunAll(const T* input, size_t count, const char* type) {
  return detail::Guarded(shared_->path.c_str(), [&]() -> Result<std::vector<float>> {
    const Metadata& meta = metadata();
    if (meta.input_type != type)
      return WrongInput(std::string("the input is ") + type + "; this artefact takes " +
                        meta.input_type);
    const size_t size = static_cast<size_t>(image_size()), group = static_cast<size_t>(batch());
    if (input == nullptr || count == 0 || count % size != 0)
      return WrongInput("the input has " + std::to_string(count) + " numbers; one image has " +
                        std::to_string(size));
    if constexpr (std::is_floating_point_v<T>) {
      // A sum with NaN or Inf in it is one of both; a sum of finite floats fits a double.
      double sum = 0;
      for (size_t i = 0; i < count; ++i) sum += input[i];
      if (!std::isfinite(sum)) return WrongInput("the input has NaN or Inf");
    }
    SetThreads(shared_->options.threads);
    if (!main_) {
      input_ = std::make_unique<Tensor>(Allocate(meta.input_shape, meta.input_type));
      main_ = std::make_unique<tvm::ffi::Function>(Function(machine_, "main"));
    }
    const size_t images = count / size, row = static_cast<size_t>(classes());
    std::vector<float> logits(images * row);
    T* place = static_cast<T*>(input_->data_ptr());
    for (size_t start = 0; start < images; start += group) {
      // An incomplete group is filled up; no operator mixes images.
      const size_t have = std::min(group, images - start);
      std::copy_n(input + start * size, have * size, place);
      std::fill(place + have * size, place + group * size, T{});
      Tensor result = (*main_)(*input_).cast<Tensor>();
      std::memcpy(&logits[start * row], result.data_ptr(), have * row * sizeof(float));
    }
    return logits;
  });
}

inline Result<std::vector<float>> Model::Run(const float* input, size_t count) {
  return RunAll(input, count, "float32");
}

inline Result<std::vector<float>> Model::Run(const uint8_t* input, size_t count) {
  return RunAll(input, count, "uint8");
}

inline Result<std::vector<float>> Model::Classify(const PixelView& image) {
  return detail::Guarded(shared_->path.c_str(), [&]() -> Result<std::vector<float>> {
    if (!metadata().preprocess)
      return WrongInput("it has no preprocessing; compile it with --mean, --std, --crop-pct ...");
    Pixels pixels = CropPixels(image, *metadata().preprocess);
    if (metadata().input_type == "uint8") return Run(pixels.data.data(), pixels.data.size());
    std::vector<float> floats = Normalize(pixels, *metadata().preprocess);
    return Run(floats.data(), floats.size());
  });
}

inline std::vector<Guess> Model::Top(const float* logits, size_t count) const {
  if (logits == nullptr) return {};
  const size_t total = static_cast<size_t>(classes());
  std::vector<int64_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  double sum = 0;
  for (size_t i = 0; i < total; ++i) sum += std::exp(double{logits[i]} - logits[order[0]]);
  std::vector<Guess> guesses;
  const int64_t labels = static_cast<int64_t>(metadata().labels.size());
  for (size_t i = 0; i < std::min(count, total); ++i) {
    int64_t index = order[i];
    guesses.push_back({index, index < labels ? metadata().labels[index] : "", logits[index],
                       std::exp(double{logits[index]} - logits[order[0]]) / sum});
  }
  return guesses;
}

template <typename T>
int64_t Model::Different(const Tensor& found, const Tensor& expected, int64_t row, int64_t rows) {
  const int64_t width = expected.size(1);
  const T* a = static_cast<const T*>(found.data_ptr());
  const T* b = static_cast<const T*>(expected.data_ptr()) + row * width;
  int64_t different = 0;
  for (int64_t i = 0; i < rows * width; ++i) different += a[i] != b[i];
  return different;
}

inline Result<Verification> Model::Verify() {
  return detail::Guarded(shared_->path.c_str(), [&]() -> Result<Verification> {
    const Metadata& meta = metadata();
    Tensor stored = Constant("vitq_golden_inputs"), expected = Constant("vitq_golden_logits");
    tvm::ffi::Function run = Function(machine_, "main_codes");
    SetThreads(shared_->options.threads);
    const int64_t group = meta.code_shape[0], size = Count(meta.code_shape) / group;
    Verification found;
    found.vectors = stored.size(0);
    found.logits_compared = expected.numel();
    Tensor codes = Allocate(meta.code_shape, meta.code_type);
    const int width = codes.dtype().bits / 8, stored_width = stored.dtype().bits / 8;
    const char* from = static_cast<const char*>(stored.data_ptr());
    for (int64_t start = 0; start < found.vectors; start += group) {
      const int64_t have = std::min(group, found.vectors - start);
      std::memset(codes.data_ptr(), 0, tvm::ffi::GetDataSize(codes));
      for (int64_t i = 0; i < have * size; ++i) {
        // One byte a code, or the codes as they are: see artifact/golden.py.
        const char* at = from + (start * size + i) * stored_width;
        char* to = static_cast<char*>(codes.data_ptr()) + i * width;
        if (stored_width == width) {
          std::memcpy(to, at, width);
        } else {
          int16_t code = static_cast<int16_t>(static_cast<int8_t>(*at) * (1 << meta.golden_shift));
          std::memcpy(to, &code, sizeof code);
        }
      }
      Tensor logits = run(codes).cast<Tensor>();
      const int bits = expected.dtype().bits;
      found.logits_different += bits == 8    ? Different<int8_t>(logits, expected, start, have)
                                : bits == 16 ? Different<int16_t>(logits, expected, start, have)
                                             : Different<int32_t>(logits, expected, start, have);
    }
    return found;
  });
}

}  // namespace vitq
