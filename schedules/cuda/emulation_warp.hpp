// CUDA kernels on the CPU: what a warp does together, and the products of four warps.
#pragma once
#include "emulation.hpp"

namespace vitq {

// Operations of a warp ----------------------------------------------------------------------------

inline void do_ldmatrix(Fiber* const* lane) {
  const int count = lane[0]->form;
  unsigned int words[4][8][4];
  for (int m = 0; m < count; ++m) {
    int rows[8] = {0}, most = 0;
    for (int r = 0; r < 8; ++r) {
      const void* from = lane[8 * m + r]->first;
      current = lane[8 * m + r];
      check_shared(from, 16, lane[0]->line);
      std::memcpy(words[m][r], from, 16);
      most = std::max(most, ++rows[(static_cast<const char*>(from) - shared) / 16 % 8]);
    }
    report.conflicts += most - 1;
  }
  for (int i = 0; i < 32; ++i)
    for (int m = 0; m < count; ++m) lane[i]->out[m] = static_cast<int>(words[m][i / 4][i % 4]);
  ++report.ldmatrix;
}

template <class A, class B>
void multiply(Fiber* const* lane) {
  alignas(64) A codes_a[16][32];
  alignas(64) B codes_b[8][32];
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4;
    const int* a = static_cast<const int*>(lane[i]->first);
    const int* b = static_cast<const int*>(lane[i]->second);
    std::memcpy(&codes_a[g][4 * t], &a[0], 4);
    std::memcpy(&codes_a[g + 8][4 * t], &a[1], 4);
    std::memcpy(&codes_a[g][16 + 4 * t], &a[2], 4);
    std::memcpy(&codes_a[g + 8][16 + 4 * t], &a[3], 4);
    std::memcpy(&codes_b[g][4 * t], &b[0], 4);
    std::memcpy(&codes_b[g][16 + 4 * t], &b[1], 4);
  }
  alignas(64) std::int16_t wide_a[16][32], wide_b[8][32];
  for (int i = 0; i < 16 * 32; ++i) wide_a[0][i] = codes_a[0][i];
  for (int i = 0; i < 8 * 32; ++i) wide_b[0][i] = codes_b[0][i];
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 4; ++j) {
      const std::int16_t* a = wide_a[i / 4 + 8 * (j / 2)];
      const std::int16_t* b = wide_b[2 * (i % 4) + j % 2];
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[k] * b[k];
      lane[i]->out[j] = static_cast<int>(static_cast<unsigned int>(lane[i]->out[j]) +
                                         static_cast<unsigned int>(sum));
    }
  }
  ++report.mma;
}

inline void do_mma(Fiber* const* lane) {
  switch (lane[0]->form) {
    case 0: return multiply<std::int8_t, std::int8_t>(lane);
    case 1: return multiply<std::int8_t, std::uint8_t>(lane);
    case 2: return multiply<std::uint8_t, std::int8_t>(lane);
    default: return multiply<std::uint8_t, std::uint8_t>(lane);
  }
}

// Modes of shuffles: 0 xor, 1 from a lane, 2 down, 3 up, 4 none (a barrier of the warp).
inline void do_shuffle(Fiber* const* lane) {
  int values[32];
  for (int i = 0; i < 32; ++i) values[i] = lane[i]->value;
  for (int i = 0; i < 32; ++i) {
    const int by = lane[i]->by;
    int from = i;
    if (lane[i]->form == 0) from = i ^ by;
    if (lane[i]->form == 1) from = by & 31;
    if (lane[i]->form == 2) from = i + by;
    if (lane[i]->form == 3) from = i - by;
    lane[i]->value = values[from >= 0 && from < 32 ? from : i];
  }
}

// Products of four warps ---------------------------------------------------------------------------

// A matrix in shared memory as a descriptor has it; see vitq_descriptor.
struct Matrix {
  std::uint64_t at, leading, stride, form, other;  // the other bits must be 0

  explicit Matrix(std::uint64_t word)
      : at((word & 0x3fff) << 4),
        leading((word >> 16 & 0x3fff) << 4),
        stride((word >> 32 & 0x3fff) << 4),
        form(word >> 62),
        other(word & ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62)) {}

  // 16 codes of a row: the first or the second half of 32.
  const char* chunk(int row, int half, int line) const {
    std::uint64_t place = at + row / 8 * stride;
    if (form == 0) place += row % 8 * 16 + half * leading;
    if (form == 1) place += row % 8 * 128 + half * 16, place ^= (place >> 7 & 7) << 4;
    if (form == 2) place += row % 8 * 64 + half * 16, place ^= (place >> 7 & 3) << 4;
    const char* found = shared + place - kBase;
    if (form == 3 || other != 0) fail(kSelector, line);
    check_shared(found, 16, line);
    if (unfenced[(found - shared) / 16]) fail(kUnfenced, line);
    return found;
  }
};

template <class A>
void multiply(const Product& product) {
  const Matrix a(product.a), b(product.b);
  const int first = product.warp % 4 * 16, width = product.width;
  alignas(64) std::int16_t wide_a[16][32], wide_b[256][32];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 32; ++k)
      wide_a[row][k] =
          reinterpret_cast<const A*>(a.chunk(first + row, k / 16, product.line))[k % 16];
  for (int column = 0; column < width; ++column)
    for (int half = 0; half < 2; ++half) {
      const char* codes = b.chunk(column, half, product.line);
      for (int k = 0; k < 16; ++k)
        wide_b[column][16 * half + k] = static_cast<std::int8_t>(codes[k]);
    }
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < width / 2; ++j) {
      const std::int16_t* left = wide_a[i / 4 + 8 * (j / 2 % 2)];
      const std::int16_t* right = wide_b[j / 4 * 8 + 2 * (i % 4) + j % 2];
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += left[k] * right[k];
      int& out = product.out[i][j];
      out = static_cast<int>(static_cast<unsigned int>(out) + static_cast<unsigned int>(sum));
    }
  report.mma += width / 8;
}

inline void do_product(const Product& product) {
  if (product.form == 0) return multiply<std::int8_t>(product);
  multiply<std::uint8_t>(product);
}

// Each warp's part is done, by lot, at once or not before the wait that covers it. The four must ask
// for the same products.
inline void do_wgmma(Fiber* const* lane) {
  Fiber* own = lane[0];
  Product product = {own->form, own->by, own->line, static_cast<int>(own->thread.x / 32),
                     own->product[0], own->product[1], own->group_of_products, {}};
  for (int i = 0; i < 32; ++i) {
    current = lane[i];
    product.out[i] = lane[i]->out;
    if (lane[i]->product[0] != product.a || lane[i]->product[1] != product.b ||
        lane[i]->form != own->form || lane[i]->by != own->by)
      fail(kDivergence, own->line, own->line);
  }
  if (!own->ready_for_products) fail(kUnfenced, own->line);
  const std::size_t number = own->asked++, four = product.warp / 4;
  if (asked.size() <= four) asked.resize(four + 1);
  const Asked here = {product.a, product.b, product.form, product.width};
  if (asked[four].size() <= number) asked[four].push_back(here);
  if (asked[four][number] != here) fail(kDivergence, own->line, own->line);
  if (random() % 2 != 0) do_product(product);
  else own->products.push_back(product);
}

inline void do_wgmma_wait(Fiber* const* lane) {
  Fiber* own = lane[0];
  std::vector<Product> kept;
  for (const Product& one : own->products) {
    if (one.group < own->group_of_products - own->form) do_product(one);
    else kept.push_back(one);
  }
  own->products = kept;
}

inline void do_operation(Fiber* const* lane) {
  if (lane[0]->stop == kLdmatrix) return do_ldmatrix(lane);
  if (lane[0]->stop == kMma) return do_mma(lane);
  if (lane[0]->stop == kWgmma) return do_wgmma(lane);
  if (lane[0]->stop == kWgmmaWait) return do_wgmma_wait(lane);
  return do_shuffle(lane);
}

}  // namespace vitq
