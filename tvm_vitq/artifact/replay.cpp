// Runs functions of a compiled library: what replays golden vectors on a machine, or under an
// emulator, that has the library's architecture and no Python.
//
//   replay LIBRARY FOLDER CALL...      CALL is NAME or NAME=FILE[,FILE...]
//
// A file holds one tensor: a line with its dtype and extents, as "int8 1 3 32 32", then the bytes.
// The result of call number i goes to FOLDER/i.tensor: what the function returned or, where it
// returned nothing (a kernel on its own), its last argument.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

struct Memory {
  void AllocData(DLTensor* tensor) {
    // TVM's kernels take 64-byte alignment for granted.
    size_t size = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = std::aligned_alloc(64, size ? size : 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

DLDataType ParseType(const std::string& name) {
  size_t digit = name.find_first_of("0123456789");
  std::string kind = name.substr(0, digit);
  uint8_t code = kind == "int" ? kDLInt : kind == "uint" ? kDLUInt : kDLFloat;
  return DLDataType{code, static_cast<uint8_t>(std::stoi(name.substr(digit))), 1};
}

std::string TypeName(DLDataType type) {
  const char* kind = type.code == kDLInt ? "int" : type.code == kDLUInt ? "uint" : "float";
  return kind + std::to_string(type.bits);
}

ffi::Tensor Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string line, dtype;
  if (!std::getline(file, line)) throw std::runtime_error("cannot read " + path);
  std::istringstream words(line);
  words >> dtype;
  std::vector<int64_t> shape;
  for (int64_t extent; words >> extent;) shape.push_back(extent);
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Memory(), ffi::Shape(shape), ParseType(dtype),
                                                DLDevice{kDLCPU, 0});
  file.read(static_cast<char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
  if (!file) throw std::runtime_error(path + " is cut off");
  return tensor;
}

void Write(const std::string& path, const ffi::Tensor& tensor) {
  std::ofstream file(path, std::ios::binary);
  file << TypeName(tensor.dtype());
  for (int64_t extent : tensor.shape()) file << ' ' << extent;
  file << '\n';
  file.write(static_cast<const char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

std::vector<std::string> Split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::istringstream words(text);
  for (std::string part; std::getline(words, part, by);) parts.push_back(part);
  return parts;
}

void Run(int argc, char** argv) {
  if (argc < 4) throw std::runtime_error("usage: replay LIBRARY FOLDER CALL...");
  ffi::Module module = ffi::Module::LoadFromFile(argv[1]);
  if (ffi::Optional<ffi::Function> load = module->GetFunction("vm_load_executable")) {
    module = (*load)().cast<ffi::Module>();
    constexpr int kPooled = 2;
    ffi::Function start = module->GetFunction("vm_initialization").value();
    start(static_cast<int>(kDLCPU), 0, kPooled, static_cast<int>(kDLCPU), 0, kPooled);
  }
  for (int i = 3; i < argc; ++i) {
    std::vector<std::string> call = Split(argv[i], '=');
    ffi::Optional<ffi::Function> function = module->GetFunction(call[0], true);
    if (!function) throw std::runtime_error("the library has no function " + call[0]);
    std::vector<ffi::Tensor> tensors;
    if (call.size() > 1)
      for (const std::string& path : Split(call[1], ',')) tensors.push_back(Read(path));
    std::vector<ffi::AnyView> views(tensors.begin(), tensors.end());
    ffi::Any result;
    (*function).CallPacked(ffi::PackedArgs(views.data(), views.size()), &result);
    ffi::Optional<ffi::Tensor> value = result.as<ffi::Tensor>();
    Write(std::string(argv[2]) + "/" + std::to_string(i - 3) + ".tensor",
          value ? *value : tensors.back());
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Run(argc, argv);
  } catch (const std::exception& why) {
    std::cerr << "replay: " << why.what() << std::endl;
    return 1;
  }
  return 0;
}
