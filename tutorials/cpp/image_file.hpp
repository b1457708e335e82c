// JPEG and PNG files as 8-bit pixels, as Pillow reads them: no rotation by EXIF, no colour profile,
// transparency dropped.
#pragma once

#include <string>

#include "vitq/preprocess.hpp"
#include "vitq/result.hpp"

vitq::Result<vitq::Pixels> ReadImage(const std::string& path);
