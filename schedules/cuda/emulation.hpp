// CUDA kernels on the CPU: threads, warps, blocks, memory, a launch.
//
// A thread of a block is a fiber: a stack of its own, entered once by makecontext and afterwards by
// _longjmp. It runs until it waits for its block (__syncthreads) or its warp (mma, ldmatrix,
// shuffles); between such points threads run one after the other in an order drawn from a seed, so
// that what depends on the order comes out differently with another seed. Asynchronous copies are
// done, by lot, at once or not before the wait that covers them. Shared memory and registers
// (-ftrivial-auto-var-init=pattern) begin with rubbish; arguments lie against pages without access.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace vitq {

struct Index {
  unsigned int x = 0, y = 0, z = 0;
};

// What a thread waits for: with its block up to `launches`, from `ldmatrix` on with its warp.
enum Stop : int {
  kRunning, kEnd, kBarrier, kLaunches, kLdmatrix, kMma, kShuffle, kWgmma, kWgmmaWait
};

struct Copy {
  char* to;
  const char* from;
  int size;
  bool valid;
  long group;
  bool done;
};

// A warp's part of a product of four warps.
struct Product {
  int form, width, line, warp;
  std::uint64_t a, b;
  long group;
  int* out[32];
};

struct Fiber {
  jmp_buf where;
  ucontext_t start;
  char* stack = nullptr;
  bool started = false;
  Index thread;
  int stop = kRunning, line = 0;
  int form = 0;                                    // of the operation: matrices, signs, shuffle mode
  const void *first = nullptr, *second = nullptr;  // its operands
  int* out = nullptr;
  int value = 0, by = 0;
  std::vector<Copy> copies;                        // that no wait has covered yet
  long group = 0;
  std::vector<Copy> written;                       // by copies, without a fence since
  std::uint64_t product[2] = {0, 0};
  std::vector<Product> products;                   // of a warp, in its first lane
  long group_of_products = 0;
  std::size_t asked = 0;
  bool ready_for_products = false;
};

enum Problem : int {
  kNone,
  kDivergence,     // threads wait at different places, or some have ended
  kFault,          // an access outside of arguments, or one that is not aligned
  kAlignment,      // an address that an instruction cannot take
  kNotShared,      // an address that should be of shared memory
  kOverwritten,    // bytes beyond an argument were written
  kPartWarp,       // an operation of a warp of fewer than 32 threads
  kSelector,       // a byte permutation's selector beyond 7, or a matrix of no known form
  kUnfenced,       // products before a fence: of what copies wrote, or the first one of the sums
  kEarly,          // an access, before the wait for earlier launches, to what these may write
};

// What emulate.py reads: how a run ended, and what it counted.
struct Report {
  int problem = kNone, line = 0, other = 0, argument = -1;
  long offset = 0;
  unsigned int block[3] = {0, 0, 0}, thread = 0;
  long mma = 0, ldmatrix = 0, conflicts = 0, barriers = 0, copied = 0;
};

constexpr std::size_t kPage = 4096, kStack = 1 << 17;
constexpr std::uint64_t kBase = 1024;  // where a block's own shared memory begins

struct Argument {
  char *base = nullptr, *data = nullptr;
  std::size_t bytes = 0, mapped = 0;
  bool late = false;  // not to be touched before the wait for launches
};

constexpr int kShownBlocks = 32;  // that show it; what is touched early hardly depends on the block

inline jmp_buf scheduler;
inline sigjmp_buf failure;
inline Fiber* current = nullptr;
inline std::vector<Fiber*> fibers;
inline Index block;
inline char *shared = nullptr, *shared_end = nullptr;
inline std::vector<int> unfenced;  // writes to each 16 bytes of shared memory
using Asked = std::tuple<std::uint64_t, std::uint64_t, int, int>;
inline std::vector<std::vector<Asked>> asked;  // products, by four warps
inline Report report;
inline std::vector<Argument> arguments;
inline std::vector<char> late;  // of the next launch's arguments
inline bool held = false;       // whether those are without access now
inline std::uint64_t random_state = 1;
inline unsigned char rubbish = 0xa5;
inline void (*kernel)(void* const*) = nullptr;
inline void* const* parameters = nullptr;

inline std::uint32_t random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<std::uint32_t>(random_state >> 32);
}

// Take access to what earlier launches may write, or give it.
inline void hold(bool now) {
  if (held == now) return;
  held = now;
  for (const Argument& a : arguments)
    if (a.late)
      mprotect(a.base + kPage, a.mapped - 2 * kPage, now ? PROT_NONE : PROT_READ | PROT_WRITE);
}

[[noreturn]] __attribute__((noinline)) inline void fail(int problem, int line, int other = 0) {
  report.problem = problem;
  report.line = line;
  report.other = other;
  report.block[0] = block.x, report.block[1] = block.y, report.block[2] = block.z;
  if (current != nullptr) report.thread = current->thread.x;
  siglongjmp(failure, 1);
}

inline void on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const Argument& a = arguments[i];
    if (at >= a.base && at < a.base + a.mapped) {
      report.argument = static_cast<int>(i);
      report.offset = at - a.data;
      if (held && a.late && at >= a.data && at < a.data + a.bytes)
        fail(kEarly, current != nullptr ? current->line : 0);
    }
  }
  if (at >= shared_end && at < shared_end + kPage) {
    report.argument = -2;
    report.offset = at - shared_end;
  }
  fail(kFault, current != nullptr ? current->line : 0);
}

// Fibers ----------------------------------------------------------------------------------------

__attribute__((noinline)) inline void stop_here(int stop, int line) {
  current->stop = stop;
  current->line = line;
  if (_setjmp(current->where) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    kernel(parameters);
    // The hardware lets what is under way finish; nobody can see it any more.
    current->copies.clear(), current->written.clear(), current->products.clear();
    current->ready_for_products = false;
    stop_here(kEnd, 0);
  }
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
  current = fiber;
  fiber->stop = kRunning;
  if (_setjmp(scheduler) == 0) {
    if (fiber->started) _longjmp(fiber->where, 1);
    fiber->started = true;
    setcontext(&fiber->start);
  }
}

inline Fiber* new_fiber(std::size_t index) {
  Fiber* fiber = new Fiber;
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  mprotect(memory, kPage, PROT_NONE);
  fiber->stack = static_cast<char*>(memory);
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack + kPage;
  // Tops that are a multiple of the cache's way apart would share its sets.
  fiber->start.uc_stack.ss_size = kStack - kPage - index % 60 * 832;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, fiber_main, 0);
  return fiber;
}

inline void drop_fibers() {
  for (Fiber* fiber : fibers) {
    munmap(fiber->stack, kStack);
    delete fiber;
  }
  fibers.clear();
}

void do_operation(Fiber* const* lane);  // emulation_warp.hpp

inline void check_shared(const void* address, int size, int line) {
  const char* at = static_cast<const char*>(address);
  if (at < shared || at + size > shared_end) fail(kNotShared, line);
  if (reinterpret_cast<std::uintptr_t>(at) % size != 0) fail(kAlignment, line);
}

// One block -----------------------------------------------------------------------------------------

// Run the lanes of a warp up to their next stop; all must have come to the same one.
inline void run_lanes(Fiber* const* lane, int lanes) {
  const std::uint32_t lot = random();
  const int first = lot % lanes, step = lanes == 32 ? (lot >> 8) % 16 * 2 + 1 : 1;
  for (int i = 0, at = first; i < lanes; ++i, at = (at + step) % lanes) resume(lane[at]);
  for (int i = 1; i < lanes; ++i) {
    current = lane[i];
    if (lane[i]->stop != lane[0]->stop || lane[i]->line != lane[0]->line)
      fail(kDivergence, lane[0]->line, lane[i]->line);
  }
  if (lane[0]->stop > kLaunches) {
    if (lanes != 32) fail(kPartWarp, lane[0]->line);
    do_operation(lane);
  }
}

inline void run_block(int threads) {
  const int warps = (threads + 31) / 32;
  std::vector<int> ready(warps);
  for (int w = 0; w < warps; ++w) ready[w] = w;
  for (;;) {
    while (!ready.empty()) {
      const std::size_t pick = random() % ready.size();
      Fiber* const* lane = &fibers[32 * ready[pick]];
      run_lanes(lane, std::min(32, threads - 32 * ready[pick]));
      if (lane[0]->stop <= kLaunches) {
        ready[pick] = ready.back();
        ready.pop_back();
      }
    }
    for (int w = 1; w < warps; ++w) {
      current = fibers[32 * w];
      if (current->stop != fibers[0]->stop || current->line != fibers[0]->line)
        fail(kDivergence, fibers[0]->line, current->line);
    }
    if (fibers[0]->stop == kEnd) {
      for (int w = 0; w < warps; ++w) {  // all four have asked for all products
        const std::size_t four = w / 4, count = fibers[32 * w]->asked;
        fibers[32 * w]->asked = 0;
        if (four < asked.size() && count != asked[four].size()) fail(kDivergence, 0);
      }
      if (held) fail(kEarly, 0);  // it ends without a wait
      return;
    }
    if (fibers[0]->stop == kBarrier) ++report.barriers;
    else hold(false);
    for (int w = 0; w < warps; ++w) ready.push_back(w);
  }
}

// Arguments -----------------------------------------------------------------------------------------

// A copy between two pages without access, against the latter (`late`) or the former.
inline Argument guard(const void* data, std::size_t bytes, bool late) {
  Argument a;
  a.bytes = bytes;
  const std::size_t room = (bytes + kPage - 1) / kPage * kPage;
  a.mapped = room + 2 * kPage;
  void* memory = mmap(nullptr, a.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  a.base = static_cast<char*>(memory);
  mprotect(a.base, kPage, PROT_NONE);
  mprotect(a.base + kPage + room, kPage, PROT_NONE);
  // Tensors are at least 16-byte aligned; the rest up to there is looked at after the run.
  a.data = a.base + kPage + (late ? (room - bytes) / 16 * 16 : 0);
  std::memset(a.base + kPage, rubbish, room);
  if (data != nullptr) std::memcpy(a.data, data, bytes);
  return a;
}

inline bool intact(const Argument& a) {
  const unsigned char* end = reinterpret_cast<const unsigned char*>(a.base + a.mapped - kPage);
  const unsigned char* at = reinterpret_cast<const unsigned char*>(a.base + kPage);
  for (; at < end; ++at) {
    if (at == reinterpret_cast<const unsigned char*>(a.data)) {
      at += a.bytes;
      if (at >= end) break;
    }
    if (*at != rubbish) return false;
  }
  return true;
}

template <class... T, std::size_t... I>
void call(void (*function)(T...), void* const* a, std::index_sequence<I...>) {
  function(static_cast<T>(a[I])...);
}

template <class... T>
void call(void (*function)(T...), void* const* a) {
  call(function, a, std::index_sequence_for<T...>());
}

// One launch; `data` is read and written in place. Returns the report's problem.
inline int launch(void (*function)(void* const*), int count, void** data, const long* bytes,
                  const unsigned int* grid, int threads, long shared_bytes, std::uint64_t seed,
                  Report* out) {
  random_state = (seed + 1) * 0x9e3779b97f4a7c15ull;
  for (int i = 0; i < 8; ++i) random();
  rubbish = static_cast<unsigned char>(random() | 1);
  report = Report();
  arguments.clear();
  std::vector<void*> pointers(count);
  for (int i = 0; i < count; ++i) {
    arguments.push_back(guard(data[i], bytes[i], seed % 2 == 0));
    arguments[i].late = i < static_cast<int>(late.size()) && late[i];
    pointers[i] = arguments[i].data;
  }
  const Argument memory = guard(nullptr, (shared_bytes + 127) / 128 * 128, true);
  shared = memory.data, shared_end = memory.data + memory.bytes;
  kernel = function, parameters = pointers.data();
  while (fibers.size() < static_cast<std::size_t>(threads)) fibers.push_back(new_fiber(fibers.size()));
  for (int i = 0; i < threads; ++i) fibers[i]->thread.x = i;

  static char signal_stack[1 << 16];
  stack_t alternative = {}, stack_before = {};
  alternative.ss_sp = signal_stack, alternative.ss_size = sizeof(signal_stack);
  sigaltstack(&alternative, &stack_before);
  struct sigaction action = {}, before[2];
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before[0]);
  sigaction(SIGBUS, &action, &before[1]);
  if (sigsetjmp(failure, 1) == 0) {
    // Blocks in an order of their own: from a random one on, in steps that reach all.
    const unsigned long total = static_cast<unsigned long>(grid[0]) * grid[1] * grid[2];
    unsigned long step = random() % total | 1;
    while (std::__gcd(step, total) != 1) ++step;
    unsigned long at = random() % total;
    for (unsigned long i = 0; i < total; ++i, at = (at + step) % total) {
      block.x = at % grid[0], block.y = at / grid[0] % grid[1], block.z = at / grid[0] / grid[1];
      std::memset(shared, rubbish, memory.bytes);
      unfenced.assign(memory.bytes / 16 + 1, 0);
      asked.clear();
      hold(!late.empty() && i < kShownBlocks);
      run_block(threads);
    }
  } else {
    hold(false);
    drop_fibers();  // they were left in the middle
    current = nullptr;
  }
  sigaction(SIGSEGV, &before[0], nullptr);
  sigaction(SIGBUS, &before[1], nullptr);
  sigaltstack(&stack_before, nullptr);
  for (int i = 0; i < count; ++i) {
    if (report.problem == kNone && !intact(arguments[i])) {
      report.problem = kOverwritten;
      report.argument = i;
    }
    if (report.problem == kNone && std::memcmp(data[i], arguments[i].data, bytes[i]) != 0)
      std::memcpy(data[i], arguments[i].data, bytes[i]);
    munmap(arguments[i].base, arguments[i].mapped);
  }
  munmap(memory.base, memory.mapped);
  late.clear();
  *out = report;
  return report.problem;
}

}  // namespace vitq
