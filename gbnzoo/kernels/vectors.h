// Vectors of float32, as wide as the instruction set has them, loaded from and stored to float32 and bfloat16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Index __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline Vec splat(float a) { return Vec{} + a; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX512F__)
// Every value into the upper half of its lane, in one instruction; to widen and to shift are two.
inline Vec widened(__m256i h) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  constexpr Words from = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                          0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)from, _mm512_castsi256_si512(h));
}
#endif

inline Vec load(const bf16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  return widened((__m256i)h);
#elif defined(__AVX2__)
  return (Vec)((Bits)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
#endif
}

// Round to nearest even; a NaN that arithmetic made stays one.
inline Half rounded(Vec v) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh((__m512)v);
#else
  Bits u = (Bits)v;
  return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, Half);
#endif
}

template <bool STREAM>
inline void store(float* p, Vec v) {
#if defined(__AVX512F__)
  if (STREAM) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  if (STREAM) return _mm256_stream_ps(p, (__m256)v);
#endif
  std::memcpy(p, &v, sizeof v);
}

template <bool STREAM>
inline void store(bf16* p, Vec v) {
  Half h = rounded(v);
#if defined(__AVX512F__)
  if (STREAM) return _mm256_stream_si256((__m256i*)p, (__m256i)h);
#elif defined(__AVX2__)
  if (STREAM) return _mm_stream_si128((__m128i*)p, (__m128i)h);
#endif
  std::memcpy(p, &h, sizeof h);
}

// Where v is 0 or infinite the first approximation is right, and its refinement not a number.
inline Vec inverse_root(Vec v) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)v), refined = r + r * 0.5f * (1 - v * r * r);
  return refined == refined ? refined : r;
#else
  float values[kLanes];
  store<false>(values, v);
  for (int l = 0; l < kLanes; ++l) values[l] = 1.f / std::sqrt(values[l]);
  return load(values);
#endif
}

inline bool any(Index mask) {
  int32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= mask[l];
  return bits;
}

inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The same of only the first `lanes` values; the others read as zero and are not written.
#if defined(__AVX512F__)
inline Vec load_part(const float* p, int64_t lanes) { return (Vec)_mm512_maskz_loadu_ps((1u << lanes) - 1, p); }
inline Vec load_part(const bf16* p, int64_t lanes) {
  return widened(_mm256_maskz_loadu_epi16((1u << lanes) - 1, p));
}
inline void store_part(float* p, Vec v, int64_t lanes) { _mm512_mask_storeu_ps(p, (1u << lanes) - 1, (__m512)v); }
inline void store_part(bf16* p, Vec v, int64_t lanes) {
  _mm256_mask_storeu_epi16(p, (1u << lanes) - 1, (__m256i)rounded(v));
}
#else
// Copies of constant size: gcc makes a slow string instruction of the others.
template <class T>
inline void copy_part(T* to, const T* from, int64_t lanes) {
  for (int64_t size = kLanes; size > 0; size /= 2) {
    if (lanes & size) std::memcpy(to, from, size * sizeof(T)), to += size, from += size;
  }
}

template <class T>
inline Vec load_part(const T* p, int64_t lanes) {
  T buffer[kLanes] = {};
  copy_part(buffer, p, lanes);
  return load(buffer);
}

template <class T>
inline void store_part(T* p, Vec v, int64_t lanes) {
  T buffer[kLanes];
  store<false>(buffer, v);
  copy_part(p, buffer, lanes);
}
#endif

template <bool PART, class T>
inline Vec load(const T* p, int64_t lanes) {
  return PART ? load_part(p, lanes) : load(p);
}

template <bool PART, bool STREAM, class T>
inline void store(T* p, Vec v, int64_t lanes) {
  PART ? store_part(p, v, lanes) : store<STREAM>(p, v);
}

// V vectors, or the one that is a part; of bfloat16 two at a time, which make a whole cache line where rows begin with one.
template <int V, bool PART, bool STREAM, class T>
INLINE void store_all(T* p, const Vec* v, int64_t lanes) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16> && V % 2 == 0 && !PART) {
    if (!STREAM || (uintptr_t)p % 64 == 0) {
      for (int i = 0; i < V; i += 2) {
        const __m512i two = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[i + 1], (__m512)v[i]);
        STREAM ? _mm512_stream_si512((__m512i*)(p + i * kLanes), two) : _mm512_storeu_si512(p + i * kLanes, two);
      }
      return;
    }
  }
#endif
  for (int i = 0; i < V; ++i) store<PART, STREAM>(p + i * kLanes, v[i], lanes);
}

template <bool PART>
inline Vec first(Vec v, int64_t lanes) {
  if (!PART) return v;
  Index i;
  for (int l = 0; l < kLanes; ++l) i[l] = l;
  return i < (int32_t)lanes ? v : Vec{};
}

// Both let a NaN through, as torch's do.
inline Vec relu(Vec v) { return v < 0 ? Vec{} : v; }
inline Vec relu_gradient(Vec before, Vec dy) { return before <= 0 ? Vec{} : dy; }

template <int V, bool WRITE = false, class T>
inline void prefetch(const T* p) {
  constexpr int kBytes = V * kLanes * sizeof(T);
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch((const char*)p + b, WRITE);
}

}  // namespace
