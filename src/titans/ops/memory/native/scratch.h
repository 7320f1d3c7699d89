// Scratch memory: what one thread needs for one chunk at a time.
#pragma once
#include <cstdlib>

#include "row.h"

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

template <class T>
struct ForwardScratch {
  Decay<T> decay;
  T *a, *slope, *b, *e1;                                          // [C, H]
  T *q, *q_kept, *q_pushed, *k_share, *k_push, *e_share, *e_push;  // [C, D]
  T *o, *p, *scores;                                              // [C, D], [C, D], [C, C]
  T *norm_first, *norm_last, *g;                                  // ‖A_0‖ per row, [D]
  ForwardScratch(const Shape& s, Arena<T>& arena) {
    const long hidden = s.C * s.H, wide = s.C * s.D, square = s.C * s.C;
    for (T** p : {&decay.K, &decay.L, &decay.shifted, &scores}) *p = arena.take(square);
    for (T** p : {&decay.P, &decay.m, &decay.h, &decay.share, &decay.push}) *p = arena.take(s.C);
    for (T** p : {&a, &slope, &b, &e1}) *p = arena.take(hidden);
    for (T** x : {&q, &q_kept, &q_pushed, &k_share, &k_push, &e_share, &e_push, &o, &p}) *x = arena.take(wide);
    norm_first = arena.take(s.H), norm_last = arena.take(s.D), g = arena.take(s.D);
  }
};

template <class T>
struct BackwardScratch {
  Decay<T> decay;
  T *a, *slope, *curvature, *b, *b_slope, *e1, *d_a, *d_e1, *d_h;           // [C, H]
  T *q, *q_kept, *q_pushed, *k_share, *k_push, *e_share, *e_push;            // [C, D]
  T *d_p, *d_read, *d_past, *d_error, *d_o, *d_q, *d_queries, *d_y;          // [C, D]
  T *first_share, *first_push, *last_share, *last_push, *d_kept, *d_pushed;  // [C, D]
  T *raw, *scores, *d_match, *d_scores, *d_shifted;                         // [C, C]
  T *d_P, *d_m, *d_share, *d_push, *g_K, *g_L;                              // [C]
  T *t, *g, *d_norms, *norms;                                               // [D], [D], [rows], [rows]
  T *states, *acts;
  BackwardScratch(const Shape& s, Arena<T>& arena) {
    const long hidden = s.C * s.H, wide = s.C * s.D, square = s.C * s.C;
    for (T** x : {&decay.K, &decay.L, &decay.shifted, &raw, &scores, &d_match, &d_scores, &d_shifted})
      *x = arena.take(square);
    for (T** x : {&decay.P, &decay.m, &decay.h, &decay.share, &decay.push, &d_P, &d_m, &d_share, &d_push, &g_K, &g_L})
      *x = arena.take(s.C);
    for (T** x : {&a, &slope, &curvature, &b, &b_slope, &e1, &d_a, &d_e1, &d_h}) *x = arena.take(hidden);
    for (T** x : {&q, &q_kept, &q_pushed, &k_share, &k_push, &e_share, &e_push, &d_p, &d_read, &d_past, &d_error, &d_o,
                  &d_q, &d_queries, &d_y, &first_share, &first_push, &last_share, &last_push, &d_kept, &d_pushed})
      *x = arena.take(wide);
    t = arena.take(s.D), g = arena.take(s.D), d_norms = arena.take(s.rows()), norms = arena.take(s.rows());
    states = arena.take(s.every * s.state());
    acts = arena.take(s.keep ? 0 : s.every * s.acts());
  }
};
