// Crops of an image set, some of them flipped, normalised. Their rows lie far apart in memory: those of a crop soon to come are
// asked for while one is made.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t kLine = 64;                 // bytes
constexpr int64_t kAhead = 2, kPerItem = 64;  // crops; flat around these values
constexpr int64_t kBlock = 256;               // pixels at once

// What crops.py packs: each field is 8 bytes. Images lie row by row, pixel by pixel, and a corner counts pixels from the first's.
struct CropArguments {
  const uint8_t* images;
  const int64_t* corners;         // [crops]
  const uint64_t* flipped;        // [crops], 0 or 1; or null
  const float *mean, *deviation;  // [channels]
  void* out;                      // dense
  int64_t crops, rows, row_pixels, pixels_to_next_row, channels, threads;
};

inline Vec load(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Vec v;
  for (int l = 0; l < kLanes; ++l) v[l] = p[l];
  return v;
#endif
}

template <class T>
INLINE void normalise(T* to, const uint8_t* from, const float* mean, const float* deviation, int64_t values) {
  const auto some = [&](int64_t i) {
    store<false>(to + i, (load(from + i) - load(mean + i)) / load(deviation + i));
  };
  if (values < kLanes) {
    for (int64_t i = 0; i < values; ++i) store_part(to + i, (splat(from[i]) - splat(mean[i])) / splat(deviation[i]), 1);
  } else {
    for (int64_t i = 0; i + kLanes <= values; i += kLanes) some(i);
    some(values - kLanes);
  }
}

template <int64_t CHANNELS>
void flip(uint8_t* to, const uint8_t* from, int64_t pixels, int64_t channels) {
  const int64_t size = CHANNELS ? CHANNELS : channels;  // a copy of constant size is an instruction or two
  for (int64_t i = 0; i < pixels; ++i) std::memcpy(to + i * size, from + (pixels - 1 - i) * size, size);
}

template <class T>
void gather(const CropArguments& a) {
  const int64_t row_bytes = a.row_pixels * a.channels, pitch = a.pixels_to_next_row * a.channels;
  const int64_t block = std::min(kBlock, a.row_pixels), block_values = block * a.channels;
  const auto flip_block = a.channels == 1 ? flip<1> : a.channels == 3 ? flip<3> : flip<0>;
  const auto mean = std::make_unique<float[]>(block_values), deviation = std::make_unique<float[]>(block_values);
  for (int64_t i = 0; i < block_values; ++i) {
    mean[i] = a.mean[i % a.channels];
    deviation[i] = a.deviation[i % a.channels];
  }

  parallel((a.crops + kPerItem - 1) / kPerItem, a.threads, [&](int64_t item) {
    const auto mirrored = std::make_unique<uint8_t[]>(block_values);
    for (int64_t i = item * kPerItem, end = std::min(i + kPerItem, a.crops); i < end; ++i) {
      const bool is_flipped = a.flipped && a.flipped[i];
      const uint8_t* row = a.images + a.corners[i] * a.channels;
      const uint8_t* ahead = a.images + a.corners[std::min(i + kAhead, a.crops - 1)] * a.channels;
      T* to = (T*)a.out + i * a.rows * row_bytes;
      for (int64_t r = 0; r < a.rows; ++r, row += pitch, ahead += pitch) {
        for (int64_t b = 0; b < row_bytes; b += kLine) __builtin_prefetch(ahead + b);
        __builtin_prefetch(ahead + row_bytes - 1);
        for (int64_t first = 0, pixels; first < a.row_pixels; first += pixels, to += pixels * a.channels) {
          pixels = std::min(block, a.row_pixels - first);
          const uint8_t* from = row + first * a.channels;
          if (is_flipped) {
            flip_block(mirrored.get(), row + (a.row_pixels - first - pixels) * a.channels, pixels, a.channels);
            from = mirrored.get();
          }
          normalise(to, from, mean.get(), deviation.get(), pixels * a.channels);
        }
      }
    }
  });
}

}  // namespace

extern "C" {

void gather_crops_float(const CropArguments* a) { gather<float>(*a); }
void gather_crops_bfloat16(const CropArguments* a) { gather<bf16>(*a); }

}  // extern "C"
