// What may go wrong, as values: a function returns its result or an Error, and nothing is thrown
// unless the caller asks for it with OrThrow().
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

namespace vitq {

enum class Code {
  kCannotRead,         // no such file, or no right to read it
  kNotAnArtifact,      // a file of another kind
  kTruncated,          // ends before its own headers say
  kOtherArchitecture,  // built for another kind of machine
  kOtherProcessor,     // its code needs instructions that this processor lacks
  kOtherFormat,        // made by a version of tvm-vitq that this header does not read
  kWrongInput,         // size, type or values of an input
  kNotEqual,           // the golden vectors give other logits
  kRuntime,            // TVM refused
};

struct Error {
  Code code;
  std::string message;  // one line
};

// Thrown by OrThrow() only.
class Exception : public std::runtime_error {
 public:
  explicit Exception(Error error) : std::runtime_error(error.message), code(error.code) {}
  Code code;
};

struct Done {};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}      // NOLINT: a value is a result
  Result(Error error) : state_(std::move(error)) {}  // NOLINT: so is an error

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  // Only if ok().
  T& operator*() & { return *std::get_if<0>(&state_); }
  const T& operator*() const& { return *std::get_if<0>(&state_); }
  T* operator->() { return std::get_if<0>(&state_); }
  const T* operator->() const { return std::get_if<0>(&state_); }

  // Only if not ok().
  const Error& error() const { return *std::get_if<1>(&state_); }

  // The value; throws vitq::Exception if there is none.
  T OrThrow() && {
    if (!ok()) throw Exception(error());
    return std::move(*std::get_if<0>(&state_));
  }

 private:
  std::variant<T, Error> state_;
};

using Status = Result<Done>;

namespace detail {

inline std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

// Runs `body`, which returns a Result; whatever it throws becomes an Error.
template <typename Body>
auto Guarded(const char* what, Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Exception& why) {
    return Error{why.code, why.what()};
  } catch (const std::bad_alloc&) {
    return Error{Code::kRuntime, std::string(what) + ": not enough memory"};
  } catch (const std::exception& why) {
    return Error{Code::kRuntime, std::string(what) + ": " + FirstLine(why.what())};
  } catch (...) {
    return Error{Code::kRuntime, std::string(what) + ": unknown failure"};
  }
}

}  // namespace detail
}  // namespace vitq
