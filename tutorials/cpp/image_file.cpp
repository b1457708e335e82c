#include "image_file.hpp"

#include <png.h>

#include <cerrno>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

extern "C" {
#include <jerror.h>
#include <jpeglib.h>
}

using vitq::Code;
using vitq::Error;
using vitq::Pixels;
using vitq::Result;

namespace {

using Bytes = std::vector<unsigned char>;

Error Bad(const std::string& path, const std::string& why) {
  return {Code::kWrongInput, "cannot read " + path + " as an image: " + why};
}

// -- JPEG -------------------------------------------------------------------------------------------

struct JpegErrors {
  jpeg_error_mgr manager;
  std::jmp_buf leave;
  char text[JMSG_LENGTH_MAX];
  static JpegErrors* Of(j_common_ptr info) { return reinterpret_cast<JpegErrors*>(info->err); }
};

void JpegFails(j_common_ptr info) {
  JpegErrors* errors = JpegErrors::Of(info);
  (*info->err->format_message)(info, errors->text);
  std::longjmp(errors->leave, 1);
}

void JpegWarns(j_common_ptr info, int level) {
  // The end of the file before the end of the picture is no picture.
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) JpegFails(info);
}

// Keeps libjpeg's state, which longjmp leaves as it is, and frees it.
struct JpegDecoder {
  jpeg_decompress_struct info{};
  JpegErrors errors{};
  JpegDecoder() {
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = JpegFails;
    errors.manager.emit_message = JpegWarns;
  }
  ~JpegDecoder() { jpeg_destroy_decompress(&info); }
};

// Adobe's CMYK is stored inverted: a byte is 255 less the ink.
void CmykToRgb(const uint8_t* from, uint8_t* to, int width) {
  for (int x = 0; x < width; ++x, from += 4, to += 3) {
    for (int c = 0; c < 3; ++c) {
      int product = (255 - from[c]) * from[3] + 128;
      int value = from[3] - (((product >> 8) + product) >> 8);
      to[c] = static_cast<uint8_t>(value < 0 ? 0 : value);
    }
  }
}

// Objects with destructors belong to the caller: longjmp passes this function by.
bool DecodeJpeg(JpegDecoder* decoder, const Bytes& file, Pixels* out, Bytes* line) {
  jpeg_decompress_struct* info = &decoder->info;
  if (setjmp(decoder->errors.leave)) return false;
  jpeg_create_decompress(info);
  jpeg_mem_src(info, const_cast<unsigned char*>(file.data()), file.size());
  jpeg_read_header(info, TRUE);
  bool cmyk = info->num_components == 4;
  info->out_color_space = cmyk ? JCS_CMYK : info->num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_start_decompress(info);
  *out = Pixels(static_cast<int>(info->output_height), static_cast<int>(info->output_width),
                cmyk ? 3 : info->output_components);
  line->resize(static_cast<size_t>(info->output_width) * info->output_components);
  while (info->output_scanline < info->output_height) {
    uint8_t* row = out->row(static_cast<int>(info->output_scanline));
    JSAMPROW target = cmyk ? line->data() : row;
    jpeg_read_scanlines(info, &target, 1);
    if (cmyk) CmykToRgb(line->data(), row, out->width);
  }
  jpeg_finish_decompress(info);
  return true;
}

Result<Pixels> ReadJpeg(const std::string& path, const Bytes& file) {
  JpegDecoder decoder;
  Pixels out;
  Bytes line;
  if (!DecodeJpeg(&decoder, file, &out, &line)) return Bad(path, decoder.errors.text);
  return out;
}

// -- PNG --------------------------------------------------------------------------------------------

struct PngDecoder {
  png_structp png = nullptr;
  png_infop info = nullptr;
  const Bytes* file = nullptr;
  size_t place = 0;
  std::string why;
  ~PngDecoder() { png_destroy_read_struct(&png, &info, nullptr); }
};

void PngFails(png_structp png, png_const_charp text) {
  static_cast<PngDecoder*>(png_get_error_ptr(png))->why = text;
  png_longjmp(png, 1);
}

void PngWarns(png_structp, png_const_charp) {}

void PngReads(png_structp png, png_bytep to, size_t count) {
  PngDecoder* decoder = static_cast<PngDecoder*>(png_get_io_ptr(png));
  if (count > decoder->file->size() - decoder->place) png_error(png, "the file is truncated");
  std::memcpy(to, decoder->file->data() + decoder->place, count);
  decoder->place += count;
}

bool DecodePng(PngDecoder* decoder, Pixels* out, std::vector<png_bytep>* rows) {
  png_structp png = decoder->png;
  png_infop info = decoder->info;
  if (setjmp(png_jmpbuf(png))) return false;
  png_set_read_fn(png, decoder, PngReads);
  png_read_info(png, info);
  int kind = png_get_color_type(png, info), bits = png_get_bit_depth(png, info);
  if (kind == PNG_COLOR_TYPE_GRAY && bits == 16)
    png_error(png, "16-bit grey; save it with 8 bits per channel");
  if (kind == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png);
  if (kind == PNG_COLOR_TYPE_GRAY && bits < 8) png_set_expand_gray_1_2_4_to_8(png);
  if (bits == 16) png_set_strip_16(png);
  png_set_strip_alpha(png);  // also what a palette says of transparency
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  *out = Pixels(static_cast<int>(png_get_image_height(png, info)),
                static_cast<int>(png_get_image_width(png, info)), png_get_channels(png, info));
  for (int y = 0; y < out->height; ++y) rows->push_back(out->row(y));
  png_read_image(png, rows->data());
  png_read_end(png, nullptr);
  return true;
}

Result<Pixels> ReadPng(const std::string& path, const Bytes& file) {
  PngDecoder decoder;
  decoder.file = &file;
  decoder.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &decoder, PngFails, PngWarns);
  if (decoder.png != nullptr) decoder.info = png_create_info_struct(decoder.png);
  if (decoder.info == nullptr) return Bad(path, "libpng does not start");
  Pixels out;
  std::vector<png_bytep> rows;
  if (!DecodePng(&decoder, &out, &rows)) return Bad(path, decoder.why);
  return out;
}

}  // namespace

Result<Pixels> ReadImage(const std::string& path) {
  // Not a stream: of a folder its iterators throw.
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> stream(std::fopen(path.c_str(), "rb"),
                                                         &std::fclose);
  const auto unreadable = [&] {
    return Error{Code::kCannotRead, "cannot read " + path + ": " + std::strerror(errno)};
  };
  if (!stream) return unreadable();
  try {
    Bytes file;
    unsigned char part[1 << 16];
    while (size_t size = std::fread(part, 1, sizeof part, stream.get()))
      file.insert(file.end(), part, part + size);
    if (std::ferror(stream.get())) return unreadable();
    if (file.size() >= 3 && std::memcmp(file.data(), "\xff\xd8\xff", 3) == 0)
      return ReadJpeg(path, file);
    if (file.size() >= 8 && png_sig_cmp(file.data(), 0, 8) == 0) return ReadPng(path, file);
  } catch (const std::exception&) {
    return Bad(path, "not enough memory");
  }
  return Bad(path, "it is neither JPEG nor PNG");
}
