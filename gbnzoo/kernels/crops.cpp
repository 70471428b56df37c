// Crops of an image set, some of them flipped. Their rows lie far apart in memory: those of a crop soon to come are asked for
// while one is copied.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"

namespace {

constexpr int64_t kLine = 64, kBlock = 32;   // bytes
constexpr int64_t kAhead = 2, kPerItem = 64;  // crops; flat around these values

// What crops.py packs: each field is 8 bytes. Images lie row by row, pixel by pixel, and a corner counts pixels from the first's.
struct CropArguments {
  const char* images;
  const int64_t* corners;   // [crops]
  const uint64_t* flipped;  // [crops], 0 or 1
  char* out;                // dense
  int64_t crops, rows, row_pixels, pixels_to_next_row, pixel_bytes, threads;
};

void copy_row(char* to, const char* from, int64_t bytes) {
  if (bytes < kBlock) {
    std::memcpy(to, from, bytes);
  } else {
    for (int64_t b = 0; b + kBlock <= bytes; b += kBlock) std::memcpy(to + b, from + b, kBlock);
    std::memcpy(to + bytes - kBlock, from + bytes - kBlock, kBlock);
  }
}

template <int64_t BYTES>
void copy_flipped(char* to, const char* from, int64_t pixels, int64_t bytes) {
  const int64_t size = BYTES ? BYTES : bytes;
  for (int64_t i = 0; i < pixels; ++i) std::memcpy(to + i * size, from + (pixels - 1 - i) * size, size);
}

// By the bytes of a pixel: a copy of constant size is an instruction or two.
auto flipping_copy(int64_t bytes) {
  switch (bytes) {
    case 1: return copy_flipped<1>;
    case 2: return copy_flipped<2>;
    case 3: return copy_flipped<3>;
    case 4: return copy_flipped<4>;
    case 6: return copy_flipped<6>;
    case 12: return copy_flipped<12>;
    default: return copy_flipped<0>;
  }
}

}  // namespace

extern "C" void gather_crops(const CropArguments* arguments) {
  const CropArguments& a = *arguments;
  const int64_t row_bytes = a.row_pixels * a.pixel_bytes, pitch = a.pixels_to_next_row * a.pixel_bytes;
  const auto copy_row_flipped = flipping_copy(a.pixel_bytes);
  parallel((a.crops + kPerItem - 1) / kPerItem, a.threads, [&](int64_t item) {
    for (int64_t i = item * kPerItem, end = std::min(i + kPerItem, a.crops); i < end; ++i) {
      const char* from = a.images + a.corners[i] * a.pixel_bytes;
      const char* ahead = a.images + a.corners[std::min(i + kAhead, a.crops - 1)] * a.pixel_bytes;
      char* to = a.out + i * a.rows * row_bytes;
      for (int64_t r = 0; r < a.rows; ++r, from += pitch, ahead += pitch, to += row_bytes) {
        for (int64_t b = 0; b < row_bytes; b += kLine) __builtin_prefetch(ahead + b);
        __builtin_prefetch(ahead + row_bytes - 1);
        if (a.flipped[i]) copy_row_flipped(to, from, a.row_pixels, a.pixel_bytes);
        else copy_row(to, from, row_bytes);
      }
    }
  });
}
