// From pixels to a model's input: resize, crop, normalise, as the artefact stores it.
//
// The pixels equal those of `tvm-vitq run`, which calls Pillow, bit for bit: the filters are
// Pillow's (the window grows with the reduction, coefficients in 22-bit fixed point, one direction
// after the other and rounded to 8 bits between), the crop's rounding is torchvision's. Compile with
// -ffp-contract=off: a fused multiply-add in the coefficients could change the last bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "result.hpp"

namespace vitq {

struct Preprocess {
  int channels = 3, height = 0, width = 0;
  double crop_pct = 0.875;
  std::string crop_mode = "center";         // center, squash, border
  std::string interpolation = "bilinear";   // nearest, bilinear, bicubic, box, hamming, lanczos
  int resize_height = 0, resize_width = 0;  // 0: by crop_pct
  std::vector<double> mean, std;            // per channel, of pixels in [0, 1]
};

// Pixels of someone else: rows of `width` times `channels` bytes, `stride` bytes apart.
struct PixelView {
  const uint8_t* data;
  int height, width;
  int channels = 3;   // 3: RGB, 1: grey
  size_t stride = 0;  // 0: rows without gaps
};

struct Pixels {
  int height = 0, width = 0, channels = 3;
  std::vector<uint8_t> data;  // [height, width, channels]

  Pixels() = default;
  Pixels(int h, int w, int c)
      : height(h), width(w), channels(c), data(static_cast<size_t>(h) * w * c) {}
  PixelView view() const { return {data.data(), height, width, channels, 0}; }
  uint8_t* row(int y) { return data.data() + static_cast<size_t>(y) * width * channels; }
  const uint8_t* row(int y) const {
    return data.data() + static_cast<size_t>(y) * width * channels;
  }
};

namespace detail {

inline double Bilinear(double x) { return std::max(0.0, 1.0 - std::fabs(x)); }
inline double Box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }
inline double Bicubic(double x) {
  x = std::fabs(x);
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}
inline double Sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * M_PI) / (x * M_PI); }
inline double Lanczos(double x) { return -3.0 <= x && x < 3.0 ? Sinc(x) * Sinc(x / 3) : 0.0; }
inline double Hamming(double x) {
  x = std::fabs(x);
  if (x >= 1.0) return 0.0;
  return x == 0.0 ? 1.0 : Sinc(x) * (0.54f + 0.46f * std::cos(x * M_PI));
}

struct Filter {
  const char* name;
  double (*value)(double);
  double support;
};
inline constexpr Filter kFilters[] = {{"bilinear", Bilinear, 1.0}, {"bicubic", Bicubic, 2.0},
                                      {"box", Box, 0.5},           {"hamming", Hamming, 1.0},
                                      {"lanczos", Lanczos, 3.0}};

// For every output position the first input position and its weights, times 2**22.
struct Windows {
  std::vector<int> first;
  std::vector<std::vector<int32_t>> weights;
};

inline constexpr int kFraction = 22;

inline Windows MakeWindows(int in, int out, const Filter& filter) {
  Windows windows;
  double scale = static_cast<double>(in) / out, stretch = std::max(scale, 1.0);
  double support = filter.support * stretch, inverse = 1.0 / stretch;
  for (int i = 0; i < out; ++i) {
    double center = (i + 0.5) * scale, sum = 0.0;
    int first = std::max(static_cast<int>(center - support + 0.5), 0);
    int last = std::min(static_cast<int>(center + support + 0.5), in);
    std::vector<double> exact;
    for (int x = first; x < last; ++x) {
      exact.push_back(filter.value((x - center + 0.5) * inverse));
      sum += exact.back();
    }
    std::vector<int32_t> weights;
    for (double weight : exact) {
      double part = (sum != 0.0 ? weight / sum : weight) * (1 << kFraction);
      weights.push_back(static_cast<int32_t>(part < 0 ? part - 0.5 : part + 0.5));
    }
    windows.first.push_back(first);
    windows.weights.push_back(std::move(weights));
  }
  return windows;
}

inline uint8_t RoundToByte(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kFraction, 0, 255));
}

inline Pixels ResizeColumns(const Pixels& image, int width, const Filter& filter) {
  Windows windows = MakeWindows(image.width, width, filter);
  Pixels out(image.height, width, image.channels);
  const int channels = image.channels;
  for (int y = 0; y < image.height; ++y) {
    uint8_t* to = out.row(y);
    for (int x = 0; x < width; ++x, to += channels) {
      const std::vector<int32_t>& weights = windows.weights[x];
      const uint8_t* from = image.row(y) + static_cast<size_t>(windows.first[x]) * channels;
      for (int c = 0; c < channels; ++c) {
        int32_t sum = 1 << (kFraction - 1);
        for (size_t i = 0; i < weights.size(); ++i) sum += from[i * channels + c] * weights[i];
        to[c] = RoundToByte(sum);
      }
    }
  }
  return out;
}

inline Pixels ResizeRows(const Pixels& image, int height, const Filter& filter) {
  Windows windows = MakeWindows(image.height, height, filter);
  Pixels out(height, image.width, image.channels);
  size_t bytes = static_cast<size_t>(image.width) * image.channels;
  std::vector<int32_t> sums(bytes);
  for (int y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), 1 << (kFraction - 1));
    for (size_t i = 0; i < windows.weights[y].size(); ++i) {
      const uint8_t* from = image.row(windows.first[y] + static_cast<int>(i));
      int32_t weight = windows.weights[y][i];
      for (size_t x = 0; x < bytes; ++x) sums[x] += from[x] * weight;
    }
    std::transform(sums.begin(), sums.end(), out.row(y), RoundToByte);
  }
  return out;
}

inline Pixels ResizeNearest(const Pixels& image, int height, int width) {
  Pixels out(height, width, image.channels);
  // Positions are sums of steps, not products, as in Pillow: that decides ties.
  auto places = [](int in, int count) {
    std::vector<int> found;
    double step = static_cast<double>(in) / count, place = step * 0.5;
    for (int i = 0; i < count; ++i, place += step)
      found.push_back(std::min(static_cast<int>(place), in - 1));
    return found;
  };
  std::vector<int> rows = places(image.height, height), columns = places(image.width, width);
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      std::copy_n(image.row(rows[y]) + static_cast<size_t>(columns[x]) * image.channels,
                  image.channels, out.row(y) + static_cast<size_t>(x) * image.channels);
  return out;
}

inline Pixels Resize(Pixels image, int height, int width, const std::string& how) {
  if (image.height == height && image.width == width) return image;
  if (how == "nearest") return ResizeNearest(image, height, width);
  for (const Filter& filter : kFilters) {
    if (how != filter.name) continue;
    // Pillow 13's order; earlier ones always took the columns first.
    bool rows_first = image.height > height &&
                      int64_t{image.height} - height > 2 * (int64_t{image.width} - width);
    if (rows_first) image = ResizeRows(image, height, filter);
    if (image.width != width) image = ResizeColumns(image, width, filter);
    if (image.height != height) image = ResizeRows(image, height, filter);
    return image;
  }
  throw Exception({Code::kOtherFormat, "unknown interpolation " + how});
}

// Half to even, as Python's round().
inline int Round(double value) { return static_cast<int>(std::nearbyint(value)); }

inline Pixels CropOrPad(const Pixels& image, const Preprocess& spec) {
  Pixels out(spec.height, spec.width, image.channels);
  std::vector<uint8_t> fill(image.channels, 0);
  if (spec.crop_mode == "border")
    for (int c = 0; c < image.channels; ++c)
      fill[c] = static_cast<uint8_t>(std::clamp(Round(255 * spec.mean[c]), 0, 255));
  int pad_y = std::max(spec.height - image.height, 0), pad_x = std::max(spec.width - image.width, 0);
  // From a place in the result to one in the image: the crop's offset less what was padded before.
  int top = Round((image.height + pad_y - spec.height) / 2.0) - pad_y / 2;
  int left = Round((image.width + pad_x - spec.width) / 2.0) - pad_x / 2;
  for (int y = 0; y < spec.height; ++y) {
    for (int x = 0; x < spec.width; ++x) {
      int row = y + top, column = x + left;
      bool inside = row >= 0 && row < image.height && column >= 0 && column < image.width;
      const uint8_t* from =
          inside ? image.row(row) + static_cast<size_t>(column) * image.channels : fill.data();
      std::copy_n(from, image.channels, out.row(y) + static_cast<size_t>(x) * image.channels);
    }
  }
  return out;
}

inline Pixels Convert(const PixelView& view, int channels) {
  if (view.data == nullptr || view.height < 1 || view.width < 1 ||
      (view.channels != 1 && view.channels != 3))
    throw Exception({Code::kWrongInput, "an image has at least one pixel, of 1 or 3 channels"});
  size_t stride = view.stride ? view.stride : static_cast<size_t>(view.width) * view.channels;
  Pixels out(view.height, view.width, channels);
  for (int y = 0; y < view.height; ++y) {
    const uint8_t* from = view.data + y * stride;
    uint8_t* to = out.row(y);
    if (channels == view.channels) {
      std::copy_n(from, static_cast<size_t>(view.width) * channels, to);
    } else if (channels == 3) {
      for (int x = 0; x < view.width; ++x) std::fill_n(to + 3 * x, 3, from[x]);
    } else {  // ITU-R 601-2 luma in 16-bit fixed point
      for (int x = 0; x < view.width; ++x, from += 3)
        to[x] = static_cast<uint8_t>(
            (from[0] * 19595u + from[1] * 38470u + from[2] * 7471u + 0x8000u) >> 16);
    }
  }
  return out;
}

}  // namespace detail

// The pixels that the model looks at: [height, width, channels] of the specification.
inline Pixels CropPixels(const PixelView& view, const Preprocess& spec) {
  Pixels image = detail::Convert(view, spec.channels);
  int rows = spec.resize_height, columns = spec.resize_width;
  if (rows == 0) {
    rows = static_cast<int>(std::floor(spec.height / spec.crop_pct));
    columns = static_cast<int>(std::floor(spec.width / spec.crop_pct));
  }
  const int64_t h = image.height, w = image.width;
  if (spec.crop_mode == "border" || (spec.crop_mode != "squash" && rows != columns)) {
    double ratio_y = static_cast<double>(h) / rows, ratio_x = static_cast<double>(w) / columns;
    double ratio = spec.crop_mode == "border" ? std::max(ratio_y, ratio_x)
                                              : std::min(ratio_y, ratio_x);
    rows = detail::Round(h / ratio);
    columns = detail::Round(w / ratio);
  } else if (spec.crop_mode != "squash") {
    int side = rows;
    if (w <= h) {
      rows = static_cast<int>(static_cast<double>(side * h) / w);
    } else {
      columns = static_cast<int>(static_cast<double>(side * w) / h);
    }
  }
  return detail::CropOrPad(
      detail::Resize(std::move(image), std::max(rows, 1), std::max(columns, 1), spec.interpolation),
      spec);
}

// float32 [channels, height, width]: (pixel / 255 - mean) / std.
inline std::vector<float> Normalize(const Pixels& image, const Preprocess& spec) {
  size_t area = static_cast<size_t>(image.height) * image.width;
  std::vector<float> out(area * image.channels);
  for (int c = 0; c < image.channels; ++c) {
    float table[256];
    const float mean = static_cast<float>(spec.mean[c]), std = static_cast<float>(spec.std[c]);
    for (int v = 0; v < 256; ++v) table[v] = (static_cast<float>(v) / 255.0f - mean) / std;
    for (size_t i = 0; i < area; ++i) out[c * area + i] = table[image.data[i * image.channels + c]];
  }
  return out;
}

}  // namespace vitq
