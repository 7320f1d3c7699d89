// What the passes over one row (a sample's head) share: sizes, places in memory, the state.
#pragma once
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
  T *y, *end, *points, *acts;  // points [G, segments - 1, state], acts [G, n, acts]
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

// One row's tokens and slow parameters.
template <class T>
struct Row {
  const Shape& s;
  const Tensors<T>& t;
  const long g;

  const T* tokens(const T* x, long c) const { return x + (g * s.tokens() + c * s.C) * s.D; }
  const T* gate(const T* x, long c) const { return x ? x + g * s.tokens() + c * s.C : nullptr; }
  Gates<T> gates(long c) const { return {gate(t.theta, c), gate(t.eta, c), gate(t.alpha, c), gate(t.write, c)}; }
  const T* gain() const { return t.norm + g * 2 * s.D; }
  const T* bias() const { return gain() + s.D; }
  const T* anchors() const { return t.anchors ? t.anchors + g * s.weights() : nullptr; }
  // The state before a segment: the first is an input and the last an output, both held by the caller anyway.
  T* point(long segment) const {
    if (segment == 0) return const_cast<T*>(t.state) + g * s.state();
    if (segment == s.segments()) return t.end + g * s.state();
    return t.points + (g * (s.segments() - 1) + segment - 1) * s.state();
  }
  Acts<T> acts(long c) const { return {s, t.acts + (s.keep ? g * s.n + c : g) * s.acts()}; }

  // The chunk's queries, one token late; before the first token there is a row of zeros.
  const T* queries(const T* x, long c, T* scratch) const {
    const T* found = tokens(x, c) - s.D;
    if (c) return found;
    std::memset(scratch, 0, sizeof(T) * s.D);
    std::memcpy(scratch + s.D, found + s.D, sizeof(T) * (s.C - 1) * s.D);
    return scratch;
  }
};
