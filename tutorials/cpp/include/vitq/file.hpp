// Tells an artefact from a foreign or damaged file before it is loaded: dlopen maps a truncated
// library without complaint, the process dies on the first page that is not there, and the
// constructors of any library that it is given are run.
#pragma once

#include <elf.h>
#include <sys/auxv.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "result.hpp"

namespace vitq {

struct Machine {
  uint16_t number;
  const char* name;
};

inline constexpr Machine kMachines[] = {
    {EM_386, "x86"}, {EM_ARM, "arm"}, {EM_X86_64, "x86_64"}, {EM_AARCH64, "aarch64"},
    {EM_RISCV, "riscv"}};

#if defined(__x86_64__)
inline constexpr uint16_t kThisMachine = EM_X86_64;
#elif defined(__aarch64__)
inline constexpr uint16_t kThisMachine = EM_AARCH64;
#else
#error "vitq.hpp is for x86-64 and AArch64"
#endif

inline std::string MachineName(uint16_t number) {
  for (const Machine& machine : kMachines)
    if (machine.number == number) return machine.name;
  return "machine " + std::to_string(number);
}

namespace detail {

class File {
 public:
  explicit File(const std::string& path) : stream_(path, std::ios::binary) {
    if (stream_.seekg(0, std::ios::end)) size_ = static_cast<uint64_t>(stream_.tellg());
  }
  bool good() const { return static_cast<bool>(stream_); }
  uint64_t size() const { return size_; }
  bool Holds(uint64_t offset, uint64_t length) const {
    return offset <= size_ && length <= size_ - offset;
  }
  bool Read(uint64_t offset, void* where, uint64_t length) {
    if (!Holds(offset, length)) return false;
    stream_.seekg(static_cast<std::streamoff>(offset));
    stream_.read(static_cast<char*>(where), static_cast<std::streamsize>(length));
    return static_cast<bool>(stream_);
  }

 private:
  std::ifstream stream_;
  uint64_t size_ = 0;
};

// Whether the library defines what every artefact does: its module and kernels of ours.
inline bool HasOurSymbols(File& file, const std::vector<Elf64_Shdr>& sections) {
  bool library = false, kernels = false;
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_DYNSYM || section.sh_link >= sections.size()) continue;
    const Elf64_Shdr& names = sections[section.sh_link];
    if (!file.Holds(names.sh_offset, names.sh_size)) return false;
    std::string strings(names.sh_size, '\0');
    std::vector<Elf64_Sym> symbols(section.sh_size / sizeof(Elf64_Sym));
    if (!file.Read(names.sh_offset, &strings[0], strings.size()) ||
        !file.Read(section.sh_offset, symbols.data(), symbols.size() * sizeof(Elf64_Sym)))
      return false;
    for (const Elf64_Sym& symbol : symbols) {
      if (symbol.st_value == 0 || symbol.st_name >= strings.size()) continue;
      const char* name = strings.c_str() + symbol.st_name;
      library |= std::strcmp(name, "__tvm_ffi__library_bin") == 0;
      kernels |= std::strncmp(name, "__tvm_ffi_vitq_", 15) == 0;
    }
  }
  return library && kernels;
}

// Refuses a file that is not an artefact for this machine, without loading it.
inline Status CheckFile(const std::string& path) {
  errno = 0;
  File file(path);
  if (!file.good() || file.size() > (uint64_t{1} << 62)) {
    int why = errno ? errno : EISDIR;
    return Error{Code::kCannotRead, "cannot read " + path + ": " + std::strerror(why)};
  }
  Error foreign{Code::kNotAnArtifact,
                path + " is not a shared library; expected what 'tvm-vitq compile' wrote"};
  Error cut{Code::kTruncated, path + " is truncated; copy it again or compile it again"};
  unsigned char magic[EI_NIDENT] = {};
  file.Read(0, magic, file.size() < EI_NIDENT ? file.size() : EI_NIDENT);
  if (file.size() == 0 || std::memcmp(magic, ELFMAG, file.size() < 4 ? file.size() : 4) != 0)
    return foreign;
  Elf64_Ehdr head;
  if (!file.Read(0, &head, sizeof head)) return cut;
  if (magic[EI_CLASS] != ELFCLASS64 || magic[EI_DATA] != ELFDATA2LSB)
    return Error{Code::kNotAnArtifact,
                 path + " is not a 64-bit little-endian shared library"};
  if (head.e_type != ET_DYN || head.e_shentsize != sizeof(Elf64_Shdr)) return foreign;
  std::vector<Elf64_Shdr> sections(head.e_shnum);
  if (!file.Read(head.e_shoff, sections.data(), sections.size() * sizeof(Elf64_Shdr))) return cut;
  for (const Elf64_Shdr& section : sections)
    if (section.sh_type != SHT_NOBITS && !file.Holds(section.sh_offset, section.sh_size))
      return cut;
  if (!HasOurSymbols(file, sections))
    return Error{Code::kNotAnArtifact, path + " is a shared library, but not one of tvm-vitq; "
                                              "expected what 'tvm-vitq compile' wrote"};
  if (head.e_machine != kThisMachine)
    return Error{Code::kOtherArchitecture,
                 path + " was built for " + MachineName(head.e_machine) + " and this machine is " +
                     MachineName(kThisMachine) + "; run it there or compile it for this one"};
  return Done{};
}

#if defined(__aarch64__)
// Of the features that an artefact may name, those that this processor has: what the kernel (or an
// emulator, whose /proc/cpuinfo is its host's) tells every process.
inline std::set<std::string> CpuFeatures() {
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  std::set<std::string> features = {"asimd"};
  if (first >> 20 & 1) features.insert("asimddp");
  if (first >> 22 & 1) features.insert("sve");
  if (second >> 1 & 1) features.insert("sve2");
  if (second >> 13 & 1) features.insert("i8mm");
  return features;
}
#else
// The processor's features as Linux lists them, without '_'; empty if unknown.
inline std::set<std::string> CpuFeatures() {
  std::ifstream file("/proc/cpuinfo");
  std::set<std::string> features;
  for (std::string line; features.empty() && std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) {
      word.erase(std::remove(word.begin(), word.end(), '_'), word.end());
      features.insert(word);
    }
  }
  return features;
}
#endif

inline std::string MissingFeatures(const std::vector<std::string>& needed) {
  const std::set<std::string> have = CpuFeatures();
  std::string missing;
  for (const std::string& feature : needed) {
    std::string plain;
    for (char c : feature)
      if (c != '_' && c != '-') plain += c;
    if (!have.empty() && !have.count(plain)) missing += (missing.empty() ? "" : ", ") + feature;
  }
  return missing;
}

}  // namespace detail
}  // namespace vitq
