// CUDA kernels on the CPU: what emulate.py puts before the generated source. The names of CUDA C++
// and of our device functions (device.py), with the meanings that NVIDIA's manuals give them.
#pragma once
#include "emulation_warp.hpp"

namespace vitq {

// Codes limited to their dtype, side by side in a word.
template <class T>
int pack(std::initializer_list<int> codes) {
  unsigned int word = 0;
  int at = 0;
  for (int code : codes) {
    const int low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
    const unsigned int limited = static_cast<unsigned int>(std::min(std::max(code, low), high));
    word |= (limited & ((1u << 8 * sizeof(T)) - 1)) << at;
    at += 8 * sizeof(T);
  }
  return static_cast<int>(word);
}

inline void check_alignment(const void* address, int size, int line) {
  if (reinterpret_cast<std::uintptr_t>(address) % size != 0) fail(kAlignment, line);
}

inline void barrier(int line) { stop_here(kBarrier, line); }

inline void wait_for_launches(int line) { stop_here(kLaunches, line); }

inline int shuffle(int line, int mode, int value, int by) {
  current->form = mode, current->value = value, current->by = by;
  stop_here(kShuffle, line);
  return current->value;
}

inline void mma(int line, int form, int* c, const int* a, const int* b) {
  current->form = form, current->first = a, current->second = b, current->out = c;
  stop_here(kMma, line);
}

inline void ldmatrix(int line, int count, int* d, const void* from) {
  current->form = count, current->first = from, current->out = d;
  stop_here(kLdmatrix, line);
}

inline void do_copy(const Copy& copy) {
  if (copy.valid) std::memcpy(copy.to, copy.from, copy.size);
  else std::memset(copy.to, 0, copy.size);
}

inline void copy(int line, int size, void* to, const void* from, bool valid) {
  current->line = line;
  check_shared(to, size, line);
  Copy one = {static_cast<char*>(to), static_cast<const char*>(from),
              size,                   valid,
              current->group,         random() % 2 != 0};
  ++unfenced[(one.to - shared) / 16];
  if (valid) {
    check_alignment(from, size, line);
    // An address outside of its argument faults here rather than at the wait.
    static_cast<void>(*static_cast<const volatile char*>(from));
    static_cast<void>(static_cast<const volatile char*>(from)[size - 1]);
  }
  ++report.copied;
  if (one.done) do_copy(one);
  current->copies.push_back(one);
}

inline void copy_wait(int left) {
  std::vector<Copy>& waiting = current->copies;
  std::size_t kept = 0;
  for (const Copy& one : waiting) {
    if (one.group >= current->group - left) {
      waiting[kept++] = one;
      continue;
    }
    if (!one.done) do_copy(one);
    current->written.push_back(one);
  }
  waiting.resize(kept, Copy{});
}

// What this thread's copies wrote, as far as it has waited for them, is seen by products.
inline void fence_async() {
  for (const Copy& one : current->written) --unfenced[(one.to - shared) / 16];
  current->written.clear();
}

inline void wgmma(int line, int form, int width, int* d, std::uint64_t a, std::uint64_t b) {
  current->form = form, current->by = width, current->out = d;
  current->product[0] = a, current->product[1] = b;
  stop_here(kWgmma, line);
}

inline void wgmma_wait(int line, int left) {
  current->form = left;
  stop_here(kWgmmaWait, line);
}

inline std::uint64_t shared_address(const void* at) {
  return static_cast<const char*>(at) - shared + kBase;
}

template <int Words>
inline void load(int line, int* d, const void* from) {
  current->line = line;
  check_alignment(from, 4 * Words, line);
  std::memcpy(d, from, 4 * Words);
}

template <int Words>
inline void store(int line, void* to, const int* s) {
  current->line = line;
  check_alignment(to, 4 * Words, line);
  std::memcpy(to, s, 4 * Words);
}

}  // namespace vitq

// CUDA C++ ----------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __CUDA_ARCH__ VITQ_CUDA_ARCH
#define __syncthreads() vitq::barrier(__LINE__)
#define __syncwarp(...) static_cast<void>(vitq::shuffle(__LINE__, 4, 0, 0))
#define __shfl_xor_sync(mask, value, by) vitq::shuffle(__LINE__, 0, value, by)
#define __shfl_sync(mask, value, by) vitq::shuffle(__LINE__, 1, value, by)
#define __shfl_down_sync(mask, value, by) vitq::shuffle(__LINE__, 2, value, by)
#define __shfl_up_sync(mask, value, by) vitq::shuffle(__LINE__, 3, value, by)

#define __cvta_generic_to_shared(at) vitq::shared_address(at)
#define __trap() vitq::fail(vitq::kAlignment, vitq::current->line)

#define uchar unsigned char
using std::abs;
using std::max;
using std::min;

#define VITQ_VECTORS(name, type)                                                             \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                   \
  struct name##3 { type x, y, z; };                                                          \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                           \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VITQ_VECTORS(char, signed char)
VITQ_VECTORS(uchar, unsigned char)
VITQ_VECTORS(short, short)
VITQ_VECTORS(ushort, unsigned short)
VITQ_VECTORS(int, int)
VITQ_VECTORS(uint, unsigned int)
VITQ_VECTORS(longlong, long long)
VITQ_VECTORS(ulonglong, unsigned long long)
VITQ_VECTORS(float, float)
VITQ_VECTORS(double, double)
#undef VITQ_VECTORS

inline int __clz(int value) {
  return value ? __builtin_clz(static_cast<unsigned int>(value)) : 32;
}
inline int __clzll(long long value) {
  return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64;
}
inline int __mulhi(int a, int b) {
  return static_cast<int>(static_cast<std::int64_t>(a) * b >> 32);
}
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return static_cast<unsigned int>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
inline int __vimin_s32_relu(int a, int b) { return max(min(a, b), 0); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8)
    c += static_cast<std::int8_t>(a >> i) * static_cast<std::int8_t>(b >> i);
  return c;
}
inline unsigned int __dp4a(unsigned int a, unsigned int b, unsigned int c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
inline unsigned int __byte_perm(unsigned int a, unsigned int b, unsigned int select) {
  const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned int result = 0;
  if ((select & 0x8888) != 0) vitq::fail(vitq::kSelector, vitq::current->line);
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned int>(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
template <class T>
inline T __ldg(const T* from) {
  return *from;
}

#define vitq_mma_s8_s8(c, a, b) vitq::mma(__LINE__, 0, c, a, b)
#define vitq_mma_s8_u8(c, a, b) vitq::mma(__LINE__, 1, c, a, b)
#define vitq_mma_u8_s8(c, a, b) vitq::mma(__LINE__, 2, c, a, b)
#define vitq_mma_u8_u8(c, a, b) vitq::mma(__LINE__, 3, c, a, b)
#define vitq_ldmatrix1(d, from) vitq::ldmatrix(__LINE__, 1, d, from)
#define vitq_ldmatrix2(d, from) vitq::ldmatrix(__LINE__, 2, d, from)
#define vitq_ldmatrix4(d, from) vitq::ldmatrix(__LINE__, 4, d, from)
#define vitq_copy4(to, from, valid) vitq::copy(__LINE__, 4, to, from, valid)
#define vitq_copy8(to, from, valid) vitq::copy(__LINE__, 8, to, from, valid)
#define vitq_copy16(to, from, valid) vitq::copy(__LINE__, 16, to, from, valid)
#define vitq_let_next_begin() static_cast<void>(0)
#define vitq_wait_for_launches() vitq::wait_for_launches(__LINE__)
#define vitq_copy_commit() static_cast<void>(++vitq::current->group)
#define vitq_copy_wait0() vitq::copy_wait(0)
#define vitq_copy_wait1() vitq::copy_wait(1)
#define vitq_copy_wait2() vitq::copy_wait(2)
#define vitq_copy_wait3() vitq::copy_wait(3)
#define vitq_copy_wait4() vitq::copy_wait(4)
#define vitq_pack_s8(a, b, c, d) vitq::pack<std::int8_t>({a, b, c, d})
#define vitq_pack_u8(a, b, c, d) vitq::pack<std::uint8_t>({a, b, c, d})
#define vitq_pack_s16(a, b) vitq::pack<std::int16_t>({a, b})
#define vitq_load4(d, from) vitq::load<1>(__LINE__, d, from)
#define vitq_store4(to, s) vitq::store<1>(__LINE__, to, s)
#define vitq_load8(d, from) vitq::load<2>(__LINE__, d, from)
#define vitq_load16(d, from) vitq::load<4>(__LINE__, d, from)
#define vitq_store8(to, s) vitq::store<2>(__LINE__, to, s)
#define vitq_store16(to, s) vitq::store<4>(__LINE__, to, s)
#define vitq_shuffle_xor(value, lanes) vitq::shuffle(__LINE__, 0, value, lanes)
#define vitq_wgmma_s8_n32(d, a, b) vitq::wgmma(__LINE__, 0, 32, d, a, b)
#define vitq_wgmma_s8_n64(d, a, b) vitq::wgmma(__LINE__, 0, 64, d, a, b)
#define vitq_wgmma_s8_n96(d, a, b) vitq::wgmma(__LINE__, 0, 96, d, a, b)
#define vitq_wgmma_s8_n128(d, a, b) vitq::wgmma(__LINE__, 0, 128, d, a, b)
#define vitq_wgmma_s8_n160(d, a, b) vitq::wgmma(__LINE__, 0, 160, d, a, b)
#define vitq_wgmma_s8_n192(d, a, b) vitq::wgmma(__LINE__, 0, 192, d, a, b)
#define vitq_wgmma_s8_n224(d, a, b) vitq::wgmma(__LINE__, 0, 224, d, a, b)
#define vitq_wgmma_s8_n256(d, a, b) vitq::wgmma(__LINE__, 0, 256, d, a, b)
#define vitq_wgmma_u8_n32(d, a, b) vitq::wgmma(__LINE__, 1, 32, d, a, b)
#define vitq_wgmma_u8_n64(d, a, b) vitq::wgmma(__LINE__, 1, 64, d, a, b)
#define vitq_wgmma_u8_n96(d, a, b) vitq::wgmma(__LINE__, 1, 96, d, a, b)
#define vitq_wgmma_u8_n128(d, a, b) vitq::wgmma(__LINE__, 1, 128, d, a, b)
#define vitq_wgmma_u8_n160(d, a, b) vitq::wgmma(__LINE__, 1, 160, d, a, b)
#define vitq_wgmma_u8_n192(d, a, b) vitq::wgmma(__LINE__, 1, 192, d, a, b)
#define vitq_wgmma_u8_n224(d, a, b) vitq::wgmma(__LINE__, 1, 224, d, a, b)
#define vitq_wgmma_u8_n256(d, a, b) vitq::wgmma(__LINE__, 1, 256, d, a, b)
#define vitq_wgmma_fence() static_cast<void>(vitq::current->ready_for_products = true)
#define vitq_wgmma_commit() static_cast<void>(++vitq::current->group_of_products)
#define vitq_wgmma_wait0() vitq::wgmma_wait(__LINE__, 0)
#define vitq_wgmma_wait1() vitq::wgmma_wait(__LINE__, 1)
#define vitq_fence_async() vitq::fence_async()
#define vitq_together() static_cast<void>(vitq::shuffle(__LINE__, 4, 0, 0))
#define vitq_settle8(d) static_cast<void>(d)
