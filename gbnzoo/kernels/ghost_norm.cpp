// Ghost batch normalisation on the CPU, forward and backward, fused with the residual addition and the ReLU behind it.
//
// A *slab*, some channels of one ghost, fits in cache: it is read from memory once for its statistics, and from cache,
// last read first, to be normalised. Values are float32 or bfloat16, all arithmetic is float32, long sums are double.
// setup.py compiles this file once for each instruction set, cpu.py calls it through ctypes: it knows no torch, no Python.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "threads.h"
#include "vectors.h"

// From this size on an output is written past the cache, which it would only push other things out of. Tests change it.
extern "C" {
int64_t ghost_norm_streamed_bytes = 24 << 20;
}

namespace {

// Bytes, measured on one core of Emerald Rapids, which is flat around these values.
constexpr int64_t kAheadInPlanes = 4096;       // from what is computed on to what is prefetched
constexpr int64_t kAheadInRows = 8192;         // the same in channels-last layouts
constexpr int64_t kPlanesSlab = 640 << 10;     // of a slab of planes, if no more than 5/8 of the L2 cache
constexpr int64_t kBlock = 64 << 10;           // of the rows crossed by one strip of columns after the other
constexpr int64_t kSmallPlane = 512;           // of a channel, at most, to be crossed with those of other rows

constexpr int64_t kCutChannels = 64;  // that a channels-last ghost is cut into where that makes it fit the L3 cache
constexpr int64_t kRowsAtOnce = 8;    // that are crossed together where they are wider than a strip
constexpr int64_t kShortRows = 128;   // of a ghost, at most, to be crossed a strip at a time
constexpr int64_t kStripWidth = 4 * kLanes;
constexpr int64_t kPlanesAtOnce = 8;

constexpr float kFar = 16;  // from a guess to the mean, squared, in variances: beyond, digits of the variance would cancel

// Where rows are written that the processor does not foresee, last to first: up to a third of the time of a forward pass. Rows
// of channels-last layouts are crossed from first to last, and it only costs.
template <int V, bool SHARED, bool STREAM, class T>
inline void prefetch_output(T* p) {
  if (SHARED && !STREAM) prefetch<V, true>(p);
}

// ----------------------------------------------------------------------------------------------------------- layouts

inline int64_t system_bytes(int name, int64_t otherwise) {
  const int64_t bytes = name < 0 ? 0 : sysconf(name);
  return bytes > 0 ? bytes : otherwise;
}

#if defined(_SC_LEVEL2_CACHE_SIZE)
constexpr int kL2Name = _SC_LEVEL2_CACHE_SIZE, kL3Name = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kL2Name = -1, kL3Name = -1;
#endif

inline int64_t l2_bytes() {
  static const int64_t bytes = system_bytes(kL2Name, 1 << 20);
  return bytes;
}

inline int64_t l3_bytes() {
  static const int64_t bytes = system_bytes(kL3Name, 32 << 20);
  return bytes;
}

struct Problem {
  int64_t samples, channels, pixels, ghost_samples;
  int64_t ghosts() const { return std::max<int64_t>(1, samples / ghost_samples); }
};

// Some channels of some rows of one ghost.
struct Slab {
  int64_t row, rows, channel, channels;
};

// V vectors wide, `rows` deep. Its values start at `offset`, its constants and sums at `column`.
struct Strip {
  int64_t offset, rows, stride, ahead, column, lanes;
};

// Contiguous [samples, channels, pixels]. A row is a sample, a column a channel: all lanes of a strip share constants.
struct Planes : Problem {
  static constexpr bool kSharedColumn = true;

  int64_t rows_per_sample() const { return 1; }
  int64_t values_per_row() const { return pixels; }
  int64_t repeats() const { return 1; }
  int64_t block_rows(int64_t, int64_t) const { return std::max<int64_t>(1, 16384 / pixels); }
  int64_t at(int64_t row, int64_t channel) const { return (row * channels + channel) * pixels; }
  bool keeps_alignment() const { return pixels % kLanes == 0; }

  int64_t slab_channels(int64_t bytes_per_value, int64_t threads) const {
    const int64_t fitting = std::min(l2_bytes() * 5 / 8, kPlanesSlab) / (ghost_samples * pixels * bytes_per_value);
    int64_t blocks = (channels + std::max<int64_t>(1, fitting) - 1) / std::max<int64_t>(1, fitting);
    blocks = std::min(channels, std::max(blocks, (2 * threads + ghosts() - 1) / ghosts()));
    return (channels + blocks - 1) / blocks;
  }

  template <class T, class Op>
  void each(const Slab& s, bool reverse, const Op& op) const {
    const bool are_small = pixels * (int64_t)sizeof(T) <= kSmallPlane && s.rows >= kPlanesAtOnce / 2;
    are_small ? each_small<T>(s, reverse, op) : each_large<T>(s, reverse, op);
  }

  // A channel's planes of several rows together: one of 8 × 8 alone costs as much for its constants and sums as for its values.
  template <class T, class Op>
  void each_small(const Slab& s, bool reverse, const Op& op) const {
    const int64_t sign = reverse ? -1 : 1, distance = kAheadInPlanes / kPlanesAtOnce / Op::kStreams / sizeof(T);
    Strip strip{0, 0, sign * channels * pixels, sign * std::max(pixels, std::min(s.channels * pixels, distance)), 0, 0};
    for (int64_t i = 0; i < s.rows; i += kPlanesAtOnce) {
      strip.rows = std::min(kPlanesAtOnce, s.rows - i);
      for (int64_t j = 0; j < s.channels; ++j) {
        strip.column = reverse ? s.channels - 1 - j : j;
        strip.offset = at(s.row + (reverse ? s.rows - 1 - i : i), s.channel + strip.column);
        int64_t left = pixels;
        for (; left >= 4 * kLanes; left -= 4 * kLanes, strip.offset += 4 * kLanes) op.template strip<4, false>(strip);
        for (; left >= kLanes; left -= kLanes, strip.offset += kLanes) op.template strip<1, false>(strip);
        strip.lanes = left;
        if (left) op.template strip<1, true>(strip);
      }
    }
  }

  template <class T, class Op>
  void each_large(const Slab& s, bool reverse, const Op& op) const {
    const int64_t distance = std::min<int64_t>(s.channels * pixels, kAheadInPlanes / Op::kStreams / sizeof(T));
    for (int64_t i = 0; i < s.rows; ++i) {
      const int64_t row = at(s.row + (reverse ? s.rows - 1 - i : i), s.channel);
      for (int64_t j = 0; j < s.channels; ++j) {
        const int64_t column = reverse ? s.channels - 1 - j : j;
        const Ahead ahead = ahead_of(s, column, distance, reverse);
        const int64_t split = ahead.split - ahead.split % (4 * kLanes), begin = row + column * pixels;
        along(op, Strip{begin, 0, 0, distance, column, 0}, split);
        along(op, Strip{begin + split, 0, 0, ahead.far, column, 0}, pixels - split);
      }
    }
  }

  // The first `split` values of a plane are followed, `distance` later, by what is crossed then; the others not, but `far` later.
  // The cut is the same in every plane, or sums would hang on how many channels a slab has.
  struct Ahead {
    int64_t split, far;
  };

  // Planes lie one behind the other, in a row of the slab; then comes a gap. They are crossed in this order, or the last first;
  // each by itself is always crossed from its first value on.
  Ahead ahead_of(const Slab& s, int64_t column, int64_t distance, bool reverse) const {
    const int64_t gap = (channels - s.channels) * pixels, before = column * pixels, span = s.channels * pixels;
    const bool is_long = distance < pixels, is_last = column == (reverse ? 0 : s.channels - 1);
    // Beyond the end of a long plane, as far into the next; by whole planes where they are short.
    if (is_long) return {pixels - distance, distance - (reverse ? 2 * pixels : 0) + (is_last ? reverse ? -gap : gap : 0)};
    if (reverse) return {0, -distance - (before < distance ? gap : 0)};
    return {0, distance + (before + distance >= span ? gap : 0)};
  }

  template <class Op>
  INLINE static void along(const Op& op, Strip s, int64_t length) {
    s.stride = 4 * kLanes, s.rows = length / s.stride;
    if (s.rows) op.template strip<4, false>(s);
    s.offset += s.rows * s.stride, length -= s.rows * s.stride;
    s.stride = kLanes, s.rows = length / kLanes, s.lanes = length % kLanes;
    if (s.rows) op.template strip<1, false>(s);
    s.offset += s.rows * kLanes, s.rows = 1;
    if (s.lanes) op.template strip<1, true>(s);
  }
};

// Channels last, [samples · pixels, channels]. Several rows of few channels count as one, to fill a strip of four vectors and
// not more: two strips side by side read memory with gaps, at 0.7 times the speed.
struct Columns : Problem {
  static constexpr bool kSharedColumn = false;

  int64_t rows_per_sample() const { return pixels; }
  int64_t values_per_row() const { return 1; }
  int64_t repeats() const { return std::max<int64_t>(1, 64 / channels); }
  int64_t at(int64_t row, int64_t channel) const { return row * channels + channel; }
  bool keeps_alignment() const { return channels % kLanes == 0; }

  int64_t block_rows(int64_t slab_channels, int64_t bytes) const {
    return repeats() * std::clamp<int64_t>(kBlock / (repeats() * slab_channels * bytes), 16, 512);
  }

  int64_t slab_channels(int64_t bytes_per_value, int64_t) const {
    // Whole rows are read at twice the speed of columns: only a cut that saves reading memory again pays.
    const int64_t bytes_per_channel = ghost_samples * pixels * bytes_per_value, fitting = l3_bytes();
    const bool cuts = channels * bytes_per_channel > fitting && kCutChannels * bytes_per_channel <= fitting;
    return cuts ? std::min(channels, kCutChannels) : channels;
  }

  template <class T, class Op>
  void each(const Slab& s, bool, const Op& op) const {
    const int64_t width = repeats() * s.channels, stride = repeats() * channels;
    const int64_t ahead = stride * std::max<int64_t>(1, kAheadInRows / Op::kStreams / (width * (int64_t)sizeof(T)));
    const int64_t rows = s.rows / repeats(), begin = at(s.row, s.channel);
    const int64_t step = width > 4 * kLanes ? kRowsAtOnce : rows;
    for (int64_t r = 0; r < rows; r += step)
      across(op, Strip{begin + r * stride, std::min(step, rows - r), stride, ahead, 0, 0}, width);
    across(op, Strip{begin + rows * stride, 1, 0, 0, 0, 0}, s.rows % repeats() * channels);
  }

  template <class Op>
  INLINE static void across(const Op& op, Strip s, int64_t width) {
    s.lanes = width % kLanes;
    for (const int64_t begin = s.offset; s.column < width; s.offset = begin + s.column) {
      const int64_t vectors = (width - s.column) / kLanes;
      if (vectors >= 4) op.template strip<4, false>(s), s.column += 4 * kLanes;
      else if (vectors >= 2) op.template strip<2, false>(s), s.column += 2 * kLanes;
      else if (vectors == 1) op.template strip<1, false>(s), s.column += kLanes;
      else op.template strip<1, true>(s), s.column = width;
    }
  }
};

// -------------------------------------------------------------------------------------------------------- operations

// How the values of a ghost are crossed twice.
enum Way {
  kSlab,   // a slab for its sums, then for its results: the sums ask ahead for what is in memory
  kStrip,  // one strip for both, of few rows
  kKept,   // the same, for which the sums keep what they take in float32: it is converted once
};

// A constant for each column, readable a vector at a time to past the last.
template <bool SHARED>
INLINE Vec constant(const float* values, int64_t column, int v) {
  return SHARED ? splat(values[column]) : load(values + column + v * kLanes);
}

// In pairs, for the least rounding.
template <int V>
INLINE Vec total(const Vec* v) {
  if constexpr (V == 1) return v[0];
  else return total<V / 2>(v) + total<V / 2>(v + V / 2);
}

// Two running sums: of each column, or where a strip shares its column, of kLanes parts of it.
struct Sums {
  float *a, *b;

  template <bool SHARED, int V>
  INLINE void add(int64_t column, const Vec* more_a, const Vec* more_b) const {
    if (SHARED) {
      store<false>(a + column * kLanes, load(a + column * kLanes) + total<V>(more_a));
      store<false>(b + column * kLanes, load(b + column * kLanes) + total<V>(more_b));
    } else {
      for (int v = 0; v < V; ++v) {
        const int64_t i = column + v * kLanes;
        store<false>(a + i, load(a + i) + more_a[v]);
        store<false>(b + i, load(b + i) + more_b[v]);
      }
    }
  }
};

// Σ (x - shift) and Σ (x - shift)². Values on a grid, as bfloat16's are, have squares that all round the same way: short sums
// of them, summed, err by less than one long sum does.
template <class T, bool SHARED, Way WAY = kSlab>
struct Moments {
  static constexpr int kStreams = 1;
  static constexpr int64_t kShort = 32;
  const T* x;
  const float* shift;
  Sums sums;
  float* kept = nullptr;

  template <int V, bool PART>
  INLINE void strip(const Strip& s) const {
    Vec k[V];
    for (int v = 0; v < V; ++v) k[v] = constant<SHARED>(shift, s.column, v);
    const T* p = x + s.offset;
    for (int64_t begin = 0; begin < s.rows; begin += kShort) {
      Vec a[V] = {}, b[V] = {};
      const int64_t end = std::min(s.rows, begin + kShort);
      for (int64_t r = begin; r < end; ++r, p += s.stride) {
        if (WAY == kSlab) prefetch<V>(p + s.ahead);
        for (int v = 0; v < V; ++v) {
          const Vec d = first<PART>(load<PART>(p + v * kLanes, s.lanes) - k[v], s.lanes);
          a[v] += d;
          b[v] += d * d;
          if (WAY == kKept) store<false>(kept + r * kStripWidth + s.column + v * kLanes, d);
        }
      }
      sums.template add<SHARED, V>(s.column, a, b);
    }
  }
};

// y = (x - mean) · scale + bias, then + residual, then max(0, ·). What was kept is x minus what `mean` is relative to.
template <class T, bool SHARED, bool ADD, bool RELU, bool STREAM, Way WAY = kSlab>
struct Normalize {
  static constexpr int kStreams = 1;
  const T *x, *residual;
  T* y;
  const float *mean, *scale, *bias, *kept = nullptr;

  template <int V, bool PART>
  INLINE void strip(const Strip& s) const {
    Vec m[V], a[V], b[V];
    for (int v = 0; v < V; ++v) {
      m[v] = constant<SHARED>(mean, s.column, v);
      a[v] = constant<SHARED>(scale, s.column, v);
      b[v] = constant<SHARED>(bias, s.column, v);
    }
    const T *const from = x, *const other = residual;
    T* const to = y;
    for (int64_t r = 0, i = s.offset; r < s.rows; ++r, i += s.stride) {
      if (ADD && WAY == kSlab) prefetch<V>(other + i + s.ahead);
      prefetch_output<V, SHARED, STREAM>(to + i + s.ahead);
      Vec values[V];
      for (int v = 0; v < V; ++v) {
        const int64_t again = r * kStripWidth + s.column + v * kLanes;
        const Vec d = WAY == kKept ? load(kept + again) : load<PART>(from + i + v * kLanes, s.lanes);
        values[v] = (d - m[v]) * a[v] + b[v];
        if (ADD) values[v] += load<PART>(other + i + v * kLanes, s.lanes);
        if (RELU) values[v] = relu(values[v]);
      }
      store_all<V, PART, STREAM>(to + i, values, s.lanes);
    }
  }
};

// The gradient behind the ReLU. Without a residual, whether it let a value through is computed anew from x; with one, y tells.
template <class T, bool ADD, bool RELU>
struct Incoming {
  const T *dy, *y;

  template <bool PART>
  INLINE Vec at(int64_t i, int64_t lanes, Vec centred, Vec scale, Vec bias) const {
    const Vec d = load<PART>(dy + i, lanes);
    if (!RELU) return d;
    return relu_gradient(ADD ? load<PART>(y + i, lanes) : centred * scale + bias, d);
  }
};

// Σ d and Σ d · (x - mean), d the gradient behind the ReLU; d is also the residual's gradient.
template <class T, bool SHARED, bool ADD, bool RELU, bool STREAM, Way WAY = kSlab>
struct GradientSums {
  static constexpr int kStreams = 2;
  const T* x;
  Incoming<T, ADD, RELU> incoming;
  T* dresidual;
  const float *mean, *scale, *bias;
  Sums sums;
  float *kept = nullptr, *kept_d = nullptr;

  template <int V, bool PART>
  INLINE void strip(const Strip& s) const {
    Vec m[V], g[V], h[V], a[V] = {}, b[V] = {};
    for (int v = 0; v < V; ++v) {
      m[v] = constant<SHARED>(mean, s.column, v);
      g[v] = constant<SHARED>(scale, s.column, v);
      h[v] = constant<SHARED>(bias, s.column, v);
    }
    const T* const from = x;
    T* const to = dresidual;
    const Incoming<T, ADD, RELU> in = incoming;
    for (int64_t r = 0, i = s.offset; r < s.rows; ++r, i += s.stride) {
      if (WAY == kSlab) prefetch<V>(from + i + s.ahead);
      if (WAY == kSlab) prefetch<V>(in.dy + i + s.ahead);
      if (ADD && RELU && WAY == kSlab) prefetch<V>(in.y + i + s.ahead);
      for (int v = 0; v < V; ++v) {
        const int64_t at = i + v * kLanes;
        const Vec centred = load<PART>(from + at, s.lanes) - m[v];
        const Vec d = in.template at<PART>(at, s.lanes, centred, g[v], h[v]);
        if (ADD && RELU) store<PART, STREAM>(to + at, d, s.lanes);
        a[v] += d;
        b[v] += d * centred;
        const int64_t again = r * kStripWidth + s.column + v * kLanes;
        if (WAY == kKept) store<false>(kept + again, centred), store<false>(kept_d + again, d);
      }
    }
    sums.template add<SHARED, V>(s.column, a, b);
  }
};

// dx = scale · d - (x - mean) · slope - offset.
template <class T, bool SHARED, bool ADD, bool RELU, bool STREAM, Way WAY = kSlab>
struct GradientApply {
  static constexpr int kStreams = 2;
  const T* x;
  Incoming<T, ADD, RELU> incoming;
  T* dx;
  const float *mean, *scale, *bias, *slope, *offset, *kept = nullptr, *kept_d = nullptr;

  template <int V, bool PART>
  INLINE void strip(const Strip& s) const {
    Vec m[V], g[V], h[V], a[V], b[V];
    for (int v = 0; v < V; ++v) {
      m[v] = constant<SHARED>(mean, s.column, v);
      g[v] = constant<SHARED>(scale, s.column, v);
      h[v] = constant<SHARED>(bias, s.column, v);
      a[v] = constant<SHARED>(slope, s.column, v);
      b[v] = constant<SHARED>(offset, s.column, v);
    }
    const T* const from = x;
    T* const to = dx;
    const Incoming<T, ADD, RELU> in = incoming;
    for (int64_t r = 0, i = s.offset; r < s.rows; ++r, i += s.stride) {
      prefetch_output<V, SHARED, STREAM>(to + i + s.ahead);
      Vec values[V];
      for (int v = 0; v < V; ++v) {
        const int64_t at = i + v * kLanes, again = r * kStripWidth + s.column + v * kLanes;
        const Vec centred = WAY == kKept ? load(kept + again) : load<PART>(from + at, s.lanes) - m[v];
        const Vec d = WAY == kKept ? load(kept_d + again) : in.template at<PART>(at, s.lanes, centred, g[v], h[v]);
        values[v] = g[v] * d - centred * a[v] - b[v];
      }
      store_all<V, PART, STREAM>(to + i, values, s.lanes);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ threads

// Calls job(ghost, slab, parts) for all slabs. Enough of them for all threads are one thread's each, in one part; else all
// threads share each, in parts of its rows.
template <class Layout, class Job>
void each_slab(const Layout& layout, int64_t bytes_per_value, int64_t threads, const Job& job) {
  const int64_t width = layout.slab_channels(bytes_per_value, threads);
  const int64_t blocks = (layout.channels + width - 1) / width, ghosts = layout.ghosts(), slabs = ghosts * blocks;
  const bool are_enough = slabs % threads == 0 || slabs >= 4 * threads;
  parallel(slabs, are_enough ? threads : 1, [&](int64_t i) {
    const int64_t ghost = i / blocks, first = ghost * layout.ghost_samples, channel = i % blocks * width;
    const int64_t samples = ghost == ghosts - 1 ? layout.samples - first : layout.ghost_samples;
    const Slab slab{first * layout.rows_per_sample(), samples * layout.rows_per_sample(), channel,
                    std::min(width, layout.channels - channel)};
    job(ghost, slab, are_enough ? 1 : std::min(threads, slab.rows));
  });
}

template <class F>
void each_part(const Slab& s, int64_t parts, const F& f) {
  parallel(parts, parts, [&](int64_t i) {
    const int64_t begin = s.rows * i / parts, end = s.rows * (i + 1) / parts;
    f(Slab{s.row + begin, end - begin, s.channel, s.channels}, i);
  });
}

template <class T, class Layout, class F>
void each_block(const Layout& layout, const Slab& s, bool reverse, const F& f) {
  const int64_t step = layout.block_rows(s.channels, sizeof(T)), blocks = (s.rows + step - 1) / step;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = (reverse ? blocks - 1 - i : i) * step;
    f(Slab{s.row + begin, std::min(step, s.rows - begin), s.channel, s.channels});
  }
}

// ------------------------------------------------------------------------------------------------------------ drivers

// Memory of this thread for one use, zero at first: what each small slab allocated and freed took an eighth of the time.
enum Use { kConstants, kSums, kTotals, kOfGhosts, kUses };

inline std::vector<Vec>& zeros(Use use, int64_t vectors) {
  thread_local std::vector<Vec> memory[kUses];
  memory[use].assign(vectors, Vec{});
  return memory[use];
}

inline double* zero_doubles(Use use, int64_t size) {
  return (double*)zeros(use, (size * sizeof(double) + sizeof(Vec) - 1) / sizeof(Vec)).data();
}

// Rows of constants or sums for all columns of a slab, zero at first, aligned, and padded by a vector at least.
struct Scratch {
  int64_t size;
  std::vector<Vec>& memory;

  Scratch(Use use, int64_t rows, int64_t columns) : size(columns / kLanes + 2), memory(zeros(use, rows * size)) {}
  float* row(int64_t i) { return (float*)(memory.data() + i * size); }
};

// totals[0 : channels] and totals[channels : 2 · channels] are the sums over a slab of the summing operation make(sums).
template <class T, class Layout, class Make>
void sum(const Layout& layout, const Slab& slab, double* __restrict totals, const Make& make) {
  const int64_t repeats = layout.repeats(), channels = slab.channels;
  Scratch scratch(kSums, 2, channels * repeats * (Layout::kSharedColumn ? kLanes : 1));
  const auto op = make(Sums{scratch.row(0), scratch.row(1)});
  std::fill_n(totals, 2 * channels, 0.0);
  each_block<T>(layout, slab, false, [&](const Slab& block) {
    layout.template each<T>(block, false, op);
    for (int i = 0; i < 2; ++i) {
      const float* __restrict sums = scratch.row(i);
      double* __restrict total = totals + i * channels;
      if (Layout::kSharedColumn) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t l = 0; l < kLanes; ++l) total[c] += sums[c * kLanes + l];
      } else {
        for (int64_t k = 0; k < repeats; ++k)
          for (int64_t c = 0; c < channels; ++c) total[c] += sums[k * channels + c];
      }
    }
    std::fill(scratch.memory.begin(), scratch.memory.end(), Vec{});
  });
}

// The sums over all parts of a slab, into those of the first.
void add_parts(double* totals, int64_t size, int64_t parts) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) totals[i] += totals[part * size + i];
}

// Fill the constants of all columns from those of the first `channels`.
void repeat(float* values, int64_t channels, int64_t repeats) {
  for (int64_t k = 1; k < repeats; ++k) std::copy_n(values, channels, values + k * channels);
}

// scale = invstd · weight and bias, of a slab's channels.
void fill_affine(const Slab& s, const float* __restrict invstd, const float* weight, const float* bias,
                 float* __restrict scales, float* __restrict biases) {
  if (weight) for (int64_t c = 0; c < s.channels; ++c) scales[c] = invstd[c] * weight[s.channel + c];
  else std::copy_n(invstd, s.channels, scales);
  if (bias) std::copy_n(bias + s.channel, s.channels, biases);
}

// Running statistics, into which a batch's ghosts are folded as if one by one: r = keep · r + last · Σ step^(G-1-g) · s_g.
struct Folding {
  float *mean, *variance;  // [channels], or null
  int64_t *count, counted;
  double keep, step, last;

  void fold(const Problem& p, const float* means, const float* variances) const {
    if (!mean) return;
    *count += counted;
    fold_one(p, means, mean);
    fold_one(p, variances, variance);
  }

 private:
  void fold_one(const Problem& p, const float* __restrict statistics, float* __restrict running) const {
    constexpr int64_t kBlockChannels = 64;
    for (int64_t begin = 0; begin < p.channels; begin += kBlockChannels) {
      const int64_t channels = std::min(kBlockChannels, p.channels - begin);
      double total[kBlockChannels] = {};
      for (int64_t g = 0; g < p.ghosts(); ++g)
        for (int64_t c = 0; c < channels; ++c) total[c] = total[c] * step + statistics[g * p.channels + begin + c];
      for (int64_t c = 0; c < channels; ++c) running[begin + c] = (float)(keep * running[begin + c] + last * total[c]);
    }
  }
};

// Whether a thread crosses all of a channels-last ghost, and a strip of it at a time: one that stays in the L1 cache from its
// first value to its last result. Nothing is asked for ahead there; that cost a tenth.
template <class Layout>
bool has_short_strips(const Layout& layout, const Slab& s, int64_t parts) {
  return !Layout::kSharedColumn && parts == 1 && layout.repeats() == 1 && s.channels == layout.channels && s.rows <= kShortRows;
}

// Float32 is read anew, last row first: some of it is still in the L1 cache, where a buffer's stores would delay its loads.
template <class T>
constexpr Way kShortWay = sizeof(T) == 2 ? kKept : kStrip;

template <Way WAY>
Strip again(const Strip& s) {
  return WAY == kKept ? s : Strip{s.offset + (s.rows - 1) * s.stride, s.rows, -s.stride, 0, 0, 0};
}

// Calls f(strip, channel, channels) for strips of a slab.
template <class F>
void each_strip(const Columns& layout, const Slab& s, const F& f) {
  for (int64_t c = 0; c < s.channels; c += kStripWidth)
    f(Strip{layout.at(s.row, c), s.rows, layout.channels, 0, 0, 0}, c, std::min(kStripWidth, s.channels - c));
}

// Calls f(channel, lanes) for vectors of channels.
template <class F>
void each_vector(int64_t channels, const F& f) {
  for (int64_t c = 0; c < channels; c += kLanes) f(c, std::min<int64_t>(kLanes, channels - c));
}

inline Vec load_lanes(const float* p, int64_t lanes) { return lanes == kLanes ? load(p) : load_part(p, lanes); }
inline void store_lanes(float* p, Vec v, int64_t lanes) { lanes == kLanes ? store<false>(p, v) : store_part(p, v, lanes); }

template <class T>
struct Forward {
  const T *x, *residual;
  const float *weight, *bias;
  float eps;
  T* y;
  float *mean, *variance, *invstd;  // [ghosts, channels]; the variance is unbiased
  Folding folding;

  template <bool ADD, bool RELU, bool STREAM, class Layout>
  void run(const Layout& layout, int64_t threads) const {
    constexpr bool kShared = Layout::kSharedColumn;
    each_slab(layout, sizeof(T), threads, [&](int64_t ghost, const Slab& s, int64_t parts) {
      if constexpr (!kShared)
        if (has_short_strips(layout, s, parts)) return cross<ADD, RELU, STREAM>(layout, ghost, s);
      const int64_t repeats = layout.repeats(), first = ghost * layout.channels + s.channel;
      Scratch scratch(kConstants, 3, s.channels * repeats);
      float *means = scratch.row(0), *scales = scratch.row(1), *biases = scratch.row(2);
      double* totals = zero_doubles(kTotals, parts * 2 * s.channels);

      // Where a guess is far off, the mean is the next.
      guess_means(layout, s, means);
      for (int attempt = 0, is_off = 1; is_off && attempt < 2; ++attempt) {
        repeat(means, s.channels, repeats);
        each_part(s, parts, [&](const Slab& part, int64_t i) {
          sum<T>(layout, part, &totals[i * 2 * s.channels],
                 [&](Sums sums) { return Moments<T, kShared>{x, means, sums}; });
        });
        add_parts(totals, 2 * s.channels, parts);
        is_off = finish(s.channels, s.rows * layout.values_per_row(), totals, means, first);
      }
      fill_affine(s, invstd + first, weight, bias, scales, biases);
      for (int i = 0; i < 3; ++i) repeat(scratch.row(i), s.channels, repeats);

      each_part(s, parts, [&](const Slab& part, int64_t) {
        const Normalize<T, kShared, ADD, RELU, STREAM> op{x, residual, y, means, scales, biases};
        each_block<T>(layout, part, true, [&](const Slab& block) { layout.template each<T>(block, true, op); });
        if (STREAM) finish_streaming();
      });
    });
    folding.fold(layout, mean, variance);
  }

  // What `run` does with a slab, for one of short strips.
  template <bool ADD, bool RELU, bool STREAM>
  void cross(const Columns& layout, int64_t ghost, const Slab& s) const {
    constexpr Way kWay = kShortWay<T>;
    alignas(64) float guesses[kStripWidth], means[kStripWidth], scales[kStripWidth], biases[kStripWidth];
    alignas(64) float sums[2][kStripWidth], kept[kWay == kKept ? kShortRows * kStripWidth : 1];
    const Moments<T, false, kWay> moments{x, guesses, {sums[0], sums[1]}, kept};
    const Normalize<T, false, ADD, RELU, STREAM, kWay> normalize{x, residual, y, means, scales, biases, kept};
    const float per_value = 1.f / s.rows, unbias = (float)s.rows / (s.rows - 1);
    each_strip(layout, s, [&](const Strip& strip, int64_t channel, int64_t channels) {
      const int64_t at = ghost * layout.channels + channel;
      std::memset(guesses, 0, sizeof guesses);
      guess_means(layout, Slab{s.row, s.rows, channel, channels}, guesses);
      for (int attempt = 0, is_off = 1; is_off && attempt < 2; ++attempt) {
        if (attempt) std::memcpy(guesses, means, sizeof means);
        std::memset(sums, 0, sizeof sums);
        layout.across(moments, strip, channels);
        Index off = {};
        each_vector(channels, [&](int64_t c, int64_t lanes) {
          const Vec guess = load(guesses + c), d = load(sums[0] + c) * per_value;
          Vec v = load(sums[1] + c) * per_value - d * d;
          off |= d * d > kFar * v;
          v = v < 0 ? Vec{} : v;
          const Vec i = inverse_root(v + eps);
          store_lanes(mean + at + c, guess + d, lanes);
          store_lanes(variance + at + c, v * unbias, lanes);
          store_lanes(invstd + at + c, i, lanes);
          store<false>(means + c, guess + d);
          store<false>(scales + c, weight ? i * load_lanes(weight + channel + c, lanes) : i);
          store<false>(biases + c, bias ? load_lanes(bias + channel + c, lanes) : Vec{});
        });
        is_off = any(off);
      }
      if (kWay == kKept)
        for (int64_t c = 0; c < kStripWidth; ++c) means[c] -= guesses[c];
      layout.across(normalize, again<kWay>(strip), channels);
    });
    if (STREAM) finish_streaming();
  }

  // Means of a few values of each channel: where it has planes, the first of the first.
  void guess_means(const Planes& layout, const Slab& s, float* guess) const {
    const int64_t values = std::min<int64_t>(4 * kLanes, layout.pixels);
    for (int64_t c = 0; c < s.channels; ++c) {
      const T* plane = x + layout.at(s.row, s.channel + c);
      Vec sums = {};
      for (int64_t i = 0; i < values; i += kLanes) sums += load_part(plane + i, std::min<int64_t>(kLanes, values - i));
      for (int l = 0; l < kLanes; ++l) guess[c] += sums[l];
      guess[c] /= values;
    }
  }

  void guess_means(const Columns& layout, const Slab& s, float* guess) const {
    const int64_t rows = std::min<int64_t>(4, s.rows);
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = x + layout.at(s.row + r * (s.rows / rows), s.channel);
      for (int64_t c = 0; c < s.channels; c += kLanes)
        store<false>(guess + c, load(guess + c) + load_part(row + c, std::min<int64_t>(kLanes, s.channels - c)));
    }
    for (int64_t c = 0; c < s.channels; ++c) guess[c] /= rows;
  }

  // The statistics, from `at` on, out of the sums; `means` turns from guesses into means. Returns how many guesses were off.
  int64_t finish(int64_t channels, int64_t count, const double* __restrict totals, float* __restrict means,
                 int64_t at) const {
    const double* __restrict squares = totals + channels;
    float *__restrict m = mean + at, *__restrict v = variance + at, *__restrict i = invstd + at;
    const double per_value = 1.0 / count;
    const float unbias = (float)count / (count - 1);
    int64_t off = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double d = totals[c] * per_value, biased = squares[c] * per_value - d * d;
      off += d * d > kFar * biased;
      m[c] = means[c] = (float)(means[c] + d);
      v[c] = biased < 0 ? 0.f : (float)biased;
    }
    for (int64_t c = 0; c < channels; ++c) i[c] = 1.f / std::sqrt(v[c] + eps);
    for (int64_t c = 0; c < channels; ++c) v[c] *= unbias;
    return off;
  }
};

template <class T>
struct Backward {
  const T *dy, *x, *y;
  const float *weight, *bias, *mean, *invstd;
  T *dx, *dresidual;
  float *dweight, *dbias;  // [channels]

  template <bool ADD, bool RELU, bool STREAM, class Layout>
  void run(const Layout& layout, int64_t threads) const {
    constexpr bool kShared = Layout::kSharedColumn;
    const Incoming<T, ADD, RELU> incoming{dy, y};
    Scratch of_ghosts(kOfGhosts, 2, layout.ghosts() * layout.channels);
    float *dweights = of_ghosts.row(0), *dbiases = of_ghosts.row(1);
    each_slab(layout, 2 * sizeof(T), threads, [&](int64_t ghost, const Slab& s, int64_t parts) {
      if constexpr (!kShared)
        if (has_short_strips(layout, s, parts)) return cross<ADD, RELU, STREAM>(layout, ghost, s, dweights, dbiases);
      const int64_t repeats = layout.repeats(), first = ghost * layout.channels + s.channel;
      Scratch scratch(kConstants, 5, s.channels * repeats);
      float *means = scratch.row(0), *scales = scratch.row(1), *biases = scratch.row(2);
      float *slopes = scratch.row(3), *offsets = scratch.row(4);
      double* totals = zero_doubles(kTotals, parts * 2 * s.channels);

      std::copy_n(mean + first, s.channels, means);
      fill_affine(s, invstd + first, weight, bias, scales, biases);
      for (int i = 0; i < 3; ++i) repeat(scratch.row(i), s.channels, repeats);
      each_part(s, parts, [&](const Slab& part, int64_t i) {
        sum<T>(layout, part, &totals[i * 2 * s.channels], [&](Sums sums) {
          return GradientSums<T, kShared, ADD, RELU, STREAM>{x, incoming, dresidual, means, scales, biases, sums};
        });
        if (STREAM) finish_streaming();
      });
      add_parts(totals, 2 * s.channels, parts);

      finish(s.channels, s.rows * layout.values_per_row(), totals, invstd + first, scales, &dweights[first],
             &dbiases[first], slopes, offsets);
      for (int i = 3; i < 5; ++i) repeat(scratch.row(i), s.channels, repeats);
      each_part(s, parts, [&](const Slab& part, int64_t) {
        const GradientApply<T, kShared, ADD, RELU, STREAM> op{x, incoming, dx, means, scales, biases, slopes, offsets};
        each_block<T>(layout, part, true, [&](const Slab& block) { layout.template each<T>(block, true, op); });
        if (STREAM) finish_streaming();
      });
    });
    sum_ghosts(dweights, layout, dweight);
    sum_ghosts(dbiases, layout, dbias);
  }

  // What `run` does with a slab, for one of short strips.
  template <bool ADD, bool RELU, bool STREAM>
  void cross(const Columns& layout, int64_t ghost, const Slab& s, float* dweights, float* dbiases) const {
    constexpr Way kWay = kShortWay<T>;
    constexpr int64_t kSize = kWay == kKept ? kShortRows * kStripWidth : 1;
    alignas(64) float means[kStripWidth], scales[kStripWidth], biases[kStripWidth], sums[2][kStripWidth];
    alignas(64) float slopes[kStripWidth], offsets[kStripWidth], kept[kSize], kept_d[kSize];
    const Incoming<T, ADD, RELU> incoming{dy, y};
    const GradientSums<T, false, ADD, RELU, STREAM, kWay> gradients{
        x, incoming, dresidual, means, scales, biases, {sums[0], sums[1]}, kept, kept_d};
    const GradientApply<T, false, ADD, RELU, STREAM, kWay> apply{
        x, incoming, dx, means, scales, biases, slopes, offsets, kept, kept_d};
    const float per_value = 1.f / s.rows;
    each_strip(layout, s, [&](const Strip& strip, int64_t channel, int64_t channels) {
      const int64_t at = ghost * layout.channels + channel;
      each_vector(channels, [&](int64_t c, int64_t lanes) {
        const Vec i = load_lanes(invstd + at + c, lanes);
        store<false>(means + c, load_lanes(mean + at + c, lanes));
        store<false>(scales + c, weight ? i * load_lanes(weight + channel + c, lanes) : i);
        store<false>(biases + c, bias ? load_lanes(bias + channel + c, lanes) : Vec{});
      });
      std::memset(sums, 0, sizeof sums);
      layout.across(gradients, strip, channels);
      each_vector(channels, [&](int64_t c, int64_t lanes) {
        const Vec i = load_lanes(invstd + at + c, lanes), d = load(sums[0] + c), d_normalized = load(sums[1] + c) * i;
        const Vec scale = load(scales + c) * per_value;
        store_lanes(dbiases + at + c, d, lanes);
        store_lanes(dweights + at + c, d_normalized, lanes);
        store<false>(offsets + c, scale * d);
        store<false>(slopes + c, scale * i * d_normalized);
      });
      layout.across(apply, again<kWay>(strip), channels);
    });
    if (STREAM) finish_streaming();
  }

  static void finish(int64_t channels, int64_t count, const double* __restrict totals, const float* __restrict invstd,
                     const float* __restrict scales, float* __restrict dweights, float* __restrict dbiases,
                     float* __restrict slopes, float* __restrict offsets) {
    const double per_value = 1.0 / count;
    for (int64_t c = 0; c < channels; ++c) {
      const double is = invstd[c], d = totals[c], d_normalized = totals[channels + c] * is;
      dbiases[c] = (float)d;
      dweights[c] = (float)d_normalized;
      offsets[c] = (float)(scales[c] * d * per_value);
      slopes[c] = (float)(scales[c] * is * d_normalized * per_value);
    }
  }

  static void sum_ghosts(const float* values, const Problem& p, float* sums) {
    double* total = zero_doubles(kTotals, p.channels);
    for (int64_t g = 0; g < p.ghosts(); ++g)
      for (int64_t c = 0; c < p.channels; ++c) total[c] += values[g * p.channels + c];
    std::copy_n(total, p.channels, sums);
  }
};

// ------------------------------------------------------------------------------------------------------- entry points

// Make template arguments of what is known only now.
template <class F>
void with(bool flag, const F& f) {
  if (flag) f(std::true_type{});
  else f(std::false_type{});
}

template <class Direction>
void dispatch(const Direction& direction, const Problem& problem, bool channels_last, bool add, bool relu, int64_t threads,
              int64_t bytes, std::initializer_list<const void*> outputs) {
  with(channels_last, [&](auto last) {
    typedef std::conditional_t<last.value, Columns, Planes> Layout;
    const Layout layout{problem};
    const int64_t output_bytes = problem.samples * problem.channels * problem.pixels * bytes;
    bool stream = layout.keeps_alignment() && output_bytes >= ghost_norm_streamed_bytes;
    for (const void* output : outputs) stream &= (uintptr_t)output % 64 == 0;
    with(add, [&](auto add) {
      with(relu, [&](auto relu) {
        with(stream, [&](auto stream) {
          direction.template run<add.value, relu.value, stream.value>(layout, threads);
        });
      });
    });
  });
}

// What cpu.py packs: each field is 8 bytes. All tensors are dense and of one layout, x's; statistics and parameters float32.
struct Shape {
  int64_t samples, channels, pixels, ghost_samples, channels_last, relu, threads;
};

struct ForwardArguments {
  Shape shape;
  const void *x, *residual;    // or null
  const float *weight, *bias;  // [channels], or null
  void* y;
  float* statistics;                        // [3, ghosts, channels]: mean, unbiased variance, 1 / standard deviation
  float *running_mean, *running_variance;  // [channels], or null
  int64_t *count, counted;
  double eps, keep, step, last;
};

struct BackwardArguments {
  Shape shape;
  const void *dy, *x, *y;      // y where the ReLU followed a residual, else null
  const float *weight, *bias, *statistics;
  void *dx, *dresidual;        // dresidual with y
  float *dweight, *dbias;      // [channels]
};

template <class T>
void forward(const ForwardArguments& a) {
  const Shape& s = a.shape;
  const Problem problem{s.samples, s.channels, s.pixels, s.ghost_samples};
  const int64_t size = problem.ghosts() * s.channels;
  const Folding folding{a.running_mean, a.running_variance, a.count, a.counted, a.keep, a.step, a.last};
  dispatch(Forward<T>{(const T*)a.x, (const T*)a.residual, a.weight, a.bias, (float)a.eps, (T*)a.y, a.statistics,
                      a.statistics + size, a.statistics + 2 * size, folding},
           problem, s.channels_last, a.residual, s.relu, s.threads, sizeof(T), {a.y});
}

template <class T>
void backward(const BackwardArguments& a) {
  const Shape& s = a.shape;
  const Problem problem{s.samples, s.channels, s.pixels, s.ghost_samples};
  const float* invstd = a.statistics + 2 * problem.ghosts() * s.channels;
  dispatch(Backward<T>{(const T*)a.dy, (const T*)a.x, (const T*)a.y, a.weight, a.bias, a.statistics, invstd, (T*)a.dx,
                       (T*)a.dresidual, a.dweight, a.dbias},
           problem, s.channels_last, a.dresidual, s.relu, s.threads, sizeof(T), {a.dx, a.dresidual});
}

}  // namespace

extern "C" {

// To be raised, here and in cpu.py, with every change of what the functions below, or in the other .cpp, are given.
int ghost_norm_interface() { return 5; }

// Whether this processor can run what this file was compiled to.
int ghost_norm_is_supported() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

void ghost_norm_use_threads_of(void* gomp_parallel) { parallel_region = (ParallelRegion)gomp_parallel; }

void ghost_norm_forward_float(const ForwardArguments* a) { forward<float>(*a); }
void ghost_norm_forward_bfloat16(const ForwardArguments* a) { forward<bf16>(*a); }
void ghost_norm_backward_float(const BackwardArguments* a) { backward<float>(*a); }
void ghost_norm_backward_bfloat16(const BackwardArguments* a) { backward<bf16>(*a); }
}
