// What the passes over one row (a sample's head) share: sizes, places in memory, the state.
#pragma once
#include <cstdlib>
#include <utility>

#include "kernels.h"

// G rows, n chunks of C tokens, head width D, hidden width H (D where the memory is one matrix).
// A state is kept at the start of every `every`-th chunk; with `keep`, every chunk's activations too.
struct Shape {
  long G, n, C, D, H, activation, retention, norm, momentum, every, keep;

  bool two() const { return activation != NONE; }
  bool projects() const { return retention != WEIGHT_DECAY; }
  long tokens() const { return n * C; }
  long weights() const { return (two() ? 2 : 1) * H * D; }
  long state() const { return weights() * (momentum ? 2 : 1); }
  long segments() const { return (n + every - 1) / every; }
  long rows() const { return (two() ? H : 0) + D; }  // of all maps together
  long acts() const {
    const long hidden = two() ? 3 * C * H : 0;
    return (hidden + 5 * C * D + C * C + 2 * C + 2 * rows() + 15) / 16 * 16;
  }
};

// Everything of all rows; a pointer is null where the term is off. Tokens are [G, n C, ·], norm is [G, 2, D] (gain and
// bias), states are [G, state] (weights of both maps, then momentum), anchors [G, weights].
template <class T>
struct Tensors {
  const T *q, *k, *v, *theta, *eta, *alpha, *write, *norm, *state, *anchors;
  T *y, *end, *points, *acts;  // points [G, segments + 1, state], acts [G, n, acts]
  const T *d_y, *d_end;
  T *d_q, *d_k, *d_v, *d_theta, *d_eta, *d_alpha, *d_norm, *d_state, *d_anchors;
};

// Weights and momentum of both maps inside one block; first is unused where there is one map.
template <class T>
struct State {
  T *first, *last, *first_past, *last_past;
  State(const Shape& s, T* block) {
    const long size = s.H * s.D;
    first = s.two() ? block : nullptr;
    last = s.two() ? block + size : block;
    first_past = s.momentum && s.two() ? block + 2 * size : nullptr;
    last_past = s.momentum ? last + (s.two() ? 2 : 1) * size : nullptr;
  }
};

// What the forward pass leaves of one chunk.
template <class T>
struct Acts {
  T *z, *u, *h;                      // [C, H]: key pass, error before the slope, query pass
  T *n, *error, *read, *past, *out;  // [C, D]: normalised o, e2, b W2ᵀ, b S2ᵀ, normalised output
  T* match;                          // [C, C]: b aᵀ
  T *rstd, *out_rstd;                // [C]
  T *scale, *of_norm;                // [rows]: ‖A_0‖ / ‖A‖ and 1 / ‖A_0‖ per row of both maps
  Acts(const Shape& s, T* p) {
    auto take = [&](long size) { return std::exchange(p, p + size); };
    const long hidden = s.two() ? s.C * s.H : 0, wide = s.C * s.D;
    z = take(hidden), u = take(hidden), h = take(hidden);
    n = take(wide), error = take(wide), read = take(wide), past = take(wide), out = take(wide);
    match = take(s.C * s.C), rstd = take(s.C), out_rstd = take(s.C), scale = take(s.rows()), of_norm = take(s.rows());
  }
};

// Scratch memory of a thread, kept for its next call. Without memory it only counts what is asked of it.
template <class T>
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() { std::free(block_); }
  T* take(long count) {
    T* found = block_ ? block_ + used_ : nullptr;
    used_ += (count + 15) / 16 * 16;
    return found;
  }
  long used() const { return used_; }
  // Room for `count` elements, all free again; false where the system has no more memory.
  bool reserve(long count) {
    used_ = 0;
    if (count <= size_) return true;
    std::free(block_);
    block_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
    size_ = block_ ? count : 0;
    return block_ != nullptr;
  }

 private:
  T* block_ = nullptr;
  long size_ = 0, used_ = 0;
};

// A thread's arena with a `Scratch` in it.
template <class Scratch, class T>
bool prepare(const Shape& s, Arena<T>& arena) {
  Arena<T> counter;
  Scratch(s, counter);
  return arena.reserve(counter.used());
}
