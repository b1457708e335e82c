// Classifies image files with an artefact:
//
//   vitq_classify MODEL.so [--top N] [--threads N] [--json] [--verify] [IMAGE...]
//
// It wants images, --verify, or both.
// Exit status: 0 done, 1 the golden vectors give other logits, 2 the input was wrong (one line on
// standard error says what).
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "image_file.hpp"
#include "vitq.hpp"

namespace {

constexpr char kUsage[] =
    "usage: vitq_classify MODEL.so [--top N] [--threads N] [--json] [--verify] [IMAGE...]";

struct Arguments {
  std::string model;
  std::vector<std::string> images;
  int top = 5, threads = 0;
  bool json = false, verify = false, help = false;
};

vitq::Result<Arguments> Parse(int argc, char** argv) {
  Arguments found;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word == "--help" || word == "-h") {
      found.help = true;
      return found;
    } else if (word == "--top" || word == "--threads") {
      char* end = nullptr;
      long value = i + 1 < argc ? std::strtol(argv[i + 1], &end, 10) : 0;
      const long most = word == "--top" ? 1000000 : vitq::MostThreads();
      if (end == nullptr || end == argv[i + 1] || *end != '\0' || value < 1 ||
          (value > most && word == "--top"))
        return vitq::Error{vitq::Code::kWrongInput,
                           word + " takes a number from 1 to " + std::to_string(most)};
      if (value > most)
        return vitq::Error{vitq::Code::kWrongInput, vitq::TooManyThreads(argv[i + 1])};
      (word == "--top" ? found.top : found.threads) = static_cast<int>(value);
      ++i;
    } else if (word == "--json") {
      found.json = true;
    } else if (word == "--verify") {
      found.verify = true;
    } else if (word.size() > 1 && word[0] == '-') {
      return vitq::Error{vitq::Code::kWrongInput, "unknown option " + word + "; " + kUsage};
    } else if (found.model.empty()) {
      found.model = word;
    } else {
      found.images.push_back(word);
    }
  }
  if (found.model.empty()) return vitq::Error{vitq::Code::kWrongInput, kUsage};
  return found;
}

std::string Quote(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    char escape[8];
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20) {
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + '"';
}

void ShowTable(const std::string& image, const std::vector<vitq::Guess>& guesses) {
  std::printf("%s\n%7s  %9s  %11s  %s\n", image.c_str(), "class", "logit", "probability", "label");
  for (const vitq::Guess& guess : guesses)
    std::printf("%7lld  %9.3f  %9.2f %%  %s\n", static_cast<long long>(guess.index), guess.logit,
                100 * guess.probability, guess.label.c_str());
}

std::string AsJson(const std::string& image, const std::vector<vitq::Guess>& guesses) {
  std::string out = "{\"image\": " + Quote(image) + ", \"top\": [";
  for (size_t i = 0; i < guesses.size(); ++i) {
    char numbers[96];
    std::snprintf(numbers, sizeof numbers, "\"logit\": %.17g, \"probability\": %.17g}",
                  static_cast<double>(guesses[i].logit), guesses[i].probability);
    out += (i ? ", " : "") + ("{\"class\": " + std::to_string(guesses[i].index)) +
           ", \"label\": " + (guesses[i].label.empty() ? "null" : Quote(guesses[i].label)) + ", " +
           numbers;
  }
  return out + "]}";
}

int Complain(const vitq::Error& error) {
  std::cerr << "error: " << error.message << std::endl;
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  vitq::Result<Arguments> arguments = Parse(argc, argv);
  if (!arguments) return Complain(arguments.error());
  if (arguments->help) {
    std::cout << kUsage << std::endl;
    return 0;
  }
  vitq::Result<vitq::Model> model =
      vitq::Model::Open(arguments->model, {arguments->threads});
  if (!model) return Complain(model.error());
  if (arguments->images.empty() && !arguments->verify)
    return Complain({vitq::Code::kWrongInput,
                     arguments->model + " can run here; give an IMAGE or --verify"});
  bool equal = true;
  std::string json = "{\"artifact\": " + Quote(arguments->model);
  if (arguments->verify) {
    vitq::Result<vitq::Verification> found = model->Verify();
    if (!found) return Complain(found.error());
    equal = found->equal();
    char numbers[160];
    std::snprintf(numbers, sizeof numbers,
                  arguments->json
                      ? ", \"equal\": %s, \"vectors\": %lld, \"logits_compared\": %lld, "
                        "\"logits_different\": %lld"
                      : "%s: %lld golden vectors, %lld logits compared, %lld different\n",
                  arguments->json ? (equal ? "true" : "false") : (equal ? "equal" : "NOT equal"),
                  static_cast<long long>(found->vectors),
                  static_cast<long long>(found->logits_compared),
                  static_cast<long long>(found->logits_different));
    if (arguments->json)
      json += numbers;
    else
      std::cout << arguments->model << ": " << numbers << std::flush;
  }
  std::string entries;
  double seconds = 0;
  for (const std::string& image : arguments->images) {
    vitq::Result<vitq::Pixels> pixels = ReadImage(image);
    if (!pixels) return Complain(pixels.error());
    auto start = std::chrono::steady_clock::now();
    vitq::Result<std::vector<float>> logits = model->Classify(pixels->view());
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (!logits) return Complain(logits.error());
    std::vector<vitq::Guess> guesses = model->Top(*logits, static_cast<size_t>(arguments->top));
    if (arguments->json)
      entries += (entries.empty() ? "" : ", ") + AsJson(image, guesses);
    else
      ShowTable(image, guesses);
  }
  if (!arguments->images.empty()) {
    double each = 1e3 * seconds / static_cast<double>(arguments->images.size());
    if (arguments->json)
      json += ", \"milliseconds_per_image\": " + std::to_string(each);
    else
      std::printf("%.3f ms per image, preprocessing included\n", each);
  }
  if (arguments->json) std::cout << json << ", \"images\": [" << entries << "]}" << std::endl;
  return equal ? 0 : 1;
}
