// Which samples stand at some places of a training's order, as `epoch_permutation` in gbnzoo/data.py draws it and explains it: all
// numbers are those there, and part of every trained weight.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int kTogether = 8;  // places whose hashes, each a chain of dependent products, are drawn side by side
constexpr int kRounds = 8;

// What order.py packs: each field is 8 bytes.
struct OrderArguments {
  const int64_t* places;       // [count], counted from `first`
  int64_t *samples, *epochs;   // [count]
  int64_t count, first, samples_an_epoch, columns, rows;  // a grid of columns · rows cells, at least samples_an_epoch
  uint64_t key;                // of the seed
};

// x / n and x % n by a product (Barrett 1986), which gives the quotient or one less.
struct Divisor {
  uint64_t n, inverse;
  explicit Divisor(uint64_t n) : n(n), inverse(~uint64_t{0} / n) {}
  uint64_t estimate(uint64_t x) const { return (unsigned __int128)x * inverse >> 64; }
  uint64_t quotient(uint64_t x) const { return estimate(x) + (x - estimate(x) * n >= n); }
  uint64_t less(uint64_t x) const { return std::min(x, x - n); }  // x % n where x < 2 n: below n, x - n wraps around
  uint64_t remainder(uint64_t x) const { return less(x - estimate(x) * n); }
};

inline uint64_t absorb(uint64_t state, uint64_t word) {
  uint64_t z = state + (word + 1) * 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

template <int N>
void encipher(uint64_t* cells, const uint64_t* keys, const Divisor& columns, const Divisor& rows) {
  uint64_t left[N], right[N];
  for (int i = 0; i < N; ++i) {
    left[i] = columns.remainder(cells[i]);
    right[i] = columns.quotient(cells[i]);
  }
  for (uint64_t round = 0; round < kRounds; round += 2) {
    for (int i = 0; i < N; ++i) {
      left[i] = columns.less(left[i] + columns.remainder(absorb(keys[i], right[i] + round * columns.n)));
    }
    for (int i = 0; i < N; ++i) {
      right[i] = rows.less(right[i] + rows.remainder(absorb(keys[i], left[i] + (round + 1) * columns.n)));
    }
  }
  for (int i = 0; i < N; ++i) cells[i] = right[i] * columns.n + left[i];
}

template <int N>
void draw(const OrderArguments& a, const Divisor& epochs, const Divisor& columns, const Divisor& rows, int64_t first) {
  uint64_t cells[N], keys[N];
  for (int i = 0; i < N; ++i) {
    const uint64_t place = a.places[first + i] + a.first, epoch = epochs.quotient(place);
    cells[i] = epochs.remainder(place);
    keys[i] = absorb(a.key, epoch);
    a.epochs[first + i] = epoch;
  }
  encipher<N>(cells, keys, columns, rows);
  for (int i = 0; i < N; ++i) {
    while (cells[i] >= (uint64_t)a.samples_an_epoch) encipher<1>(cells + i, keys + i, columns, rows);
    a.samples[first + i] = cells[i];
  }
}

}  // namespace

extern "C" void draw_order(const OrderArguments* a) {
  const Divisor epochs(a->samples_an_epoch), columns(a->columns), rows(a->rows);
  int64_t i = 0;
  for (; i + kTogether <= a->count; i += kTogether) draw<kTogether>(*a, epochs, columns, rows, i);
  for (; i < a->count; ++i) draw<1>(*a, epochs, columns, rows, i);
}
