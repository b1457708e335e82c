// What an artefact says of itself.
#pragma once

#include <tvm/ffi/extra/json.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "preprocess.hpp"
#include "result.hpp"

namespace vitq {

inline constexpr int64_t kMetadataFormat = 1;

struct Metadata {
  std::string model;                 // name
  std::string target, architecture;  // what it was compiled for
  std::vector<std::string> features;
  std::string input_type;            // "float32": normalised NCHW; "uint8": raw NHWC
  std::vector<int64_t> input_shape;  // the first extent is the batch
  std::string code_type;
  std::vector<int64_t> code_shape;
  int golden_shift = 0;
  int64_t classes = 0;
  std::vector<std::string> labels;  // empty if there are none
  std::optional<Preprocess> preprocess;
  std::string json;  // the whole document
};

namespace detail {

namespace ffi = tvm::ffi;

// One place in a JSON document; a missing one is null.
class Json {
 public:
  explicit Json(ffi::Any value) : value_(std::move(value)) {}
  static Json Parse(const std::string& text) {
    ffi::String why;
    ffi::Any value = ffi::json::Parse(ffi::String(text), &why);
    if (!why.empty()) throw Exception({Code::kOtherFormat, "its metadata is no JSON"});
    return Json(std::move(value));
  }
  Json operator[](const char* key) const {
    std::optional<ffi::json::Object> object = value_.as<ffi::json::Object>();
    if (!object || !object->count(ffi::String(key))) return Json(ffi::Any(nullptr));
    return Json(object->at(ffi::String(key)));
  }
  explicit operator bool() const { return value_ != nullptr; }
  std::string Text() const {
    std::optional<ffi::String> text = value_.as<ffi::String>();
    return text ? std::string(*text) : std::string();
  }
  double Number() const { return Cast<double>(); }
  int64_t Integer() const { return Cast<int64_t>(); }
  template <typename T, typename Get>
  std::vector<T> List(Get get) const {
    std::vector<T> found;
    if (!*this) return found;
    for (const ffi::Any& item : Cast<ffi::json::Array>()) found.push_back(get(Json(item)));
    return found;
  }
  std::vector<int64_t> Integers() const {
    return List<int64_t>([](const Json& item) { return item.Integer(); });
  }
  std::vector<double> Numbers() const {
    return List<double>([](const Json& item) { return item.Number(); });
  }
  std::vector<std::string> Texts() const {
    return List<std::string>([](const Json& item) { return item.Text(); });
  }
  bool IsList() const { return value_.as<ffi::json::Array>().has_value(); }

 private:
  template <typename T>
  T Cast() const {
    std::optional<T> found = value_.try_cast<T>();
    if (!found) throw Exception({Code::kOtherFormat, "its metadata lacks what this reader needs"});
    return *std::move(found);
  }
  ffi::Any value_;
};

inline Preprocess ReadPreprocess(const Json& from) {
  Preprocess spec;
  std::vector<int64_t> size = from["input_size"].Integers();
  spec.mean = from["mean"].Numbers();
  spec.std = from["std"].Numbers();
  if (size.size() != 3 || (size[0] != 1 && size[0] != 3) || size[1] < 1 || size[2] < 1 ||
      spec.mean.size() != static_cast<size_t>(size[0]) || spec.std.size() != spec.mean.size())
    throw Exception({Code::kOtherFormat, "its preprocessing is not complete"});
  spec.channels = static_cast<int>(size[0]);
  spec.height = static_cast<int>(size[1]);
  spec.width = static_cast<int>(size[2]);
  spec.crop_pct = from["crop_pct"].Number();
  spec.crop_mode = from["crop_mode"].Text();
  spec.interpolation = from["interpolation"].Text();
  if (Json resize = from["resize"]) {
    std::vector<int64_t> sides =
        resize.IsList() ? resize.Integers() : std::vector<int64_t>(2, resize.Integer());
    if (sides.size() != 2) throw Exception({Code::kOtherFormat, "its resize is not two sizes"});
    spec.resize_height = static_cast<int>(sides[0]);
    spec.resize_width = static_cast<int>(sides[1]);
  }
  return spec;
}

inline Metadata ReadMetadata(std::string text) {
  Json from = Json::Parse(text);
  int64_t format = from["format"] ? from["format"].Integer() : 0;
  if (format != kMetadataFormat)
    throw Exception({Code::kOtherFormat,
                     "it has artefact format " + std::to_string(format) + ", this program reads " +
                         std::to_string(kMetadataFormat) +
                         ": compile the artefact or the program again"});
  Metadata to;
  to.model = from["model"]["name"].Text();
  to.target = from["target"]["name"].Text();
  to.architecture = from["target"]["architecture"].Text();
  to.features = from["target"]["features"].Texts();
  to.input_type = from["input"]["dtype"].Text();
  to.input_shape = from["input"]["shape"].Integers();
  to.code_type = from["input"]["codes"]["dtype"].Text();
  to.code_shape = from["input"]["codes"]["shape"].Integers();
  if (Json shift = from["golden"]["shift"]) to.golden_shift = static_cast<int>(shift.Integer());
  std::vector<int64_t> output = from["output"]["shape"].Integers();
  if (output.empty() || to.input_shape.size() < 2 || to.code_shape.size() < 2)
    throw Exception({Code::kOtherFormat, "its metadata lacks what this reader needs"});
  to.classes = output.back();
  to.labels = from["labels"].Texts();
  if (Json spec = from["preprocess"]) to.preprocess = ReadPreprocess(spec);
  to.json = std::move(text);
  return to;
}

}  // namespace detail
}  // namespace vitq
