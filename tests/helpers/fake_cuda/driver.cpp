// A GPU for TVM's CUDA runtime where there is none: memory is the host's, kernels are the emulator's
// (schedules/cuda/emulate.py), a graph is the list of the launches that were recorded.
//
// It takes the place of libcudart and libcuda, with just the functions that libtvm_runtime_cuda
// wants, and complains of what CUDA forbids: allocations, copies and waits while launches are
// recorded, launches on another stream meanwhile, more shared memory than was asked for.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

// CUlaunchAttribute and CUlaunchConfig of cuda.h
struct Attribute {
  int id, padding;
  union {
    int allowed;
    char bytes[64];
  };
};

constexpr int kProgrammaticStreamSerialization = 6;

struct Config {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const Attribute* attributes;
  unsigned attribute_count;
};

struct Kernel {
  std::string name;
  void* emulator = nullptr;
  unsigned shared_bytes = 48 << 10;
};

using Graph = std::vector<std::function<void()>>;

constexpr int kForbidden = 1, kMaxShared = 232448;
char recorded_stream;
std::map<char*, std::size_t> memory;
std::map<std::string, int> arguments;
void* emulator = nullptr;  // of the modules that are loaded next
Graph* recording = nullptr;
std::string problems;
int launched = 0, recorded = 0, replayed = 0, overlapping = 0;
double clock_ms = 0;  // a block takes a microsecond
std::uint64_t seed = 0;

int complain(const std::string& what) {
  problems += what + "\n";
  return kForbidden;
}

int while_recording(const char* what) {
  return recording ? complain(std::string(what) + " while launches are recorded") : 0;
}

void launch(void* emulator, const std::string& name, const Config& config,
            std::vector<void*> values) {
  clock_ms += 1e-3 * config.grid[0] * config.grid[1] * config.grid[2];
  using Launch = int (*)(void*, int, void**, const long*, const unsigned*, int, long, std::uint64_t,
                         void*);
  std::vector<long> sizes;
  for (void* value : values) {
    auto found = memory.upper_bound(static_cast<char*>(value));
    long left = 0;
    if (found != memory.begin()) {
      --found;
      left = found->first + found->second - static_cast<char*>(value);
    }
    if (left <= 0) return void(complain(name + ": an argument is not on the device"));
    sizes.push_back(left);
  }
  for (std::size_t i = 0; i < values.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (values[i] == values[j]) complain(name + ": two arguments are one");
  char report[256];
  auto run = reinterpret_cast<Launch>(dlsym(emulator, "vitq_launch"));
  void* kernel = dlsym(emulator, ("vitq_call_" + name).c_str());
  if (!run || !kernel) return void(complain(name + ": no such kernel"));
  if (run(kernel, values.size(), values.data(), sizes.data(), config.grid, config.block[0],
          config.shared_bytes, seed, report))
    complain(name + ": the emulator stopped it");
}

}  // namespace

extern "C" {

// The test's side.
void fake_open(const char* path) { emulator = dlopen(path, RTLD_NOW); }
void fake_kernel(const char* name, int count) { arguments[name] = count; }
void fake_seed(int value) { seed = value; }
const char* fake_problems() { return problems.c_str(); }
void fake_counts(int* out) { out[0] = launched, out[1] = recorded, out[2] = replayed, out[3] = overlapping; }

// libcuda
int cuLaunchKernelEx(const Config* config, Kernel* kernel, void** parameters, void**) {
  const std::string& name = kernel->name;
  if (config->shared_bytes > kernel->shared_bytes) return complain(name + ": shared memory");
  if (config->grid[1] > 65535 || config->grid[2] > 65535) return complain(name + ": grid");
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const Attribute& one = config->attributes[i];
    if (one.id == kProgrammaticStreamSerialization) overlapping += one.allowed;
  }
  std::vector<void*> values;
  for (int i = 0; i < arguments[name]; ++i) values.push_back(*static_cast<void**>(parameters[i]));
  std::function<void()> job = [emulator = kernel->emulator, name, values, config = *config] {
    launch(emulator, name, config, values);
  };
  if (!recording) return ++launched, job(), 0;
  if (config->stream != &recorded_stream) return complain(name + ": on another stream");
  recording->push_back(job);
  return ++recorded, 0;
}
int cuModuleLoadData(void** module, const void* data) {
  unsigned magic;
  std::memcpy(&magic, data, 4);
  *module = emulator;
  return magic == 0xba55ed50 ? while_recording("module") : complain("no fat binary");
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(Kernel** kernel, void* module, const char* name) {
  *kernel = new Kernel{name, module};
  return 0;
}
int cuFuncSetAttribute(Kernel* kernel, int attribute, int value) {
  if (attribute == 8) kernel->shared_bytes = value;  // the most dynamic shared memory
  return value > kMaxShared;
}
int cuDeviceGetName(char* name, int size, int) { return std::strncpy(name, "fake", size), 0; }
int cuGetErrorName(int, const char** name) { return *name = "fake", 0; }
int cuGetErrorString(int, const char** text) { return *text = "fake", 0; }
int cuTensorMapEncodeTiled() { return kForbidden; }

// libcudart
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1024;  // compute capability 9.0
  return 0;
}
int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceProperties(void*, int) { return kForbidden; }
int cudaMemGetInfo(std::size_t* left, std::size_t* all) { return *left = *all = 1ull << 36, 0; }
const char* cudaGetErrorName(int) { return "fake"; }
const char* cudaGetErrorString(int) { return "fake"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaMalloc(void** data, std::size_t size) {
  *data = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(*data, 0xa7, size);
  memory[static_cast<char*>(*data)] = size;
  return while_recording("allocation");
}
int cudaFree(void* data) {
  memory.erase(static_cast<char*>(data));
  std::free(data);
  return while_recording("release");
}
int cudaMallocHost(void** data, std::size_t size) { return *data = std::malloc(size), 0; }
int cudaFreeHost(void* data) { return std::free(data), 0; }
int cudaMemcpyAsync(void* to, const void* from, std::size_t size, int, void*) {
  std::memcpy(to, from, size);
  return while_recording("copy");
}
int cudaMemcpyPeerAsync() { return kForbidden; }
int cudaStreamCreate(void** stream) { return *stream = &recorded_stream, 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return while_recording("wait"); }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaStreamBeginCapture(void* stream, int) {
  recording = new Graph;
  return stream == &recorded_stream ? 0 : complain("the usual stream cannot be recorded");
}
int cudaStreamEndCapture(void*, Graph** graph) {
  *graph = recording;
  recording = nullptr;
  return 0;
}
int cudaGraphInstantiate(Graph** made, Graph* graph, unsigned long long) {
  *made = new Graph(*graph);
  return 0;
}
int cudaGraphLaunch(Graph* graph, void*) {
  for (const auto& job : *graph) job();
  return ++replayed, 0;
}
int cudaGraphDestroy(Graph* graph) { return delete graph, 0; }
int cudaGraphExecDestroy(Graph* graph) { return delete graph, 0; }
int cudaEventCreate(double** event) { return *event = new double, 0; }
int cudaEventDestroy(double* event) { return delete event, 0; }
int cudaEventElapsedTime(float* time, double* from, double* to) { return *time = *to - *from, 0; }
int cudaEventRecord(double* event, void*) { return *event = clock_ms, 0; }
int cudaEventSynchronize(void*) { return 0; }
}
