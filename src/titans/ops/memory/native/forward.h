// Forward pass over one row. Reads are shifted by one token, as in fused_segment.py: a chunk's last token is row 0 of the
// next chunk; the very last token is read on its own.
#pragma once
#include "scratch.h"

template <class T>
class Forward {
 public:
  Forward(const Row<T>& row, Arena<T>& arena) : row(row), s(row.s), x(s, arena) {
    if (!s.projects()) return;
    const T* anchor = row.anchors();
    if (s.two()) norms(anchor, x.norm_first, s.H, s.D);
    norms(anchor + (s.two() ? s.H * s.D : 0), x.norm_last, s.D, s.H);
  }

  void run() {
    for (long c = 0; c < s.n; c++) {
      const long segment = c / s.every;
      T* now = row.point(segment + 1);
      const bool first = c % s.every == 0;
      chunk(c, first ? row.point(segment) : now, now, row.acts(c), row.t.y);
    }
    last_read(State<T>(s, row.point(s.segments())));
  }

  // Chunk c from the state `from` to the state `to`, which may be the same; y null: the outputs are known.
  void chunk(long c, T* from, T* to, const Acts<T>& acts, T* y) {
    const State<T> old(s, from), now(s, to);
    x.decay.fill(row.gates(c), s.C);
    keys(c, old, acts);
    reads(c, old, acts);
    outputs(c, acts, y);
    close(c, old, now, acts);
  }

  // Only the state, from activations that were kept.
  void advance(long c, T* from, T* to, const Acts<T>& acts) {
    x.decay.fill(row.gates(c), s.C);
    if (s.two()) {
      activate<true, false>(s.activation, acts.z, x.a, x.slope, (T*)nullptr, s.C * s.H);
      for (long i = 0; i < s.C * s.H; i++) x.e1[i] = acts.u[i] * x.slope[i];
    }
    weigh(c, acts);
    close(c, State<T>(s, from), State<T>(s, to), acts);
  }

 private:
  const Row<T>& row;
  const Shape& s;
  ForwardScratch<T> x;

  static void norms(const T* weight, T* out, long rows, long width) {
    for (long r = 0; r < rows; r++) out[r] = std::sqrt(dot(weight + r * width, weight + r * width, width));
  }

  const T* inner(long c) const { return s.two() ? x.a : row.tokens(row.t.k, c); }

  // a, o and the errors at the chunk's start.
  void keys(long c, const State<T>& old, const Acts<T>& acts) {
    const int C = s.C, D = s.D, H = s.H;
    const T *k = row.tokens(row.t.k, c), *v = row.tokens(row.t.v, c);
    if (s.two()) {
      product<T>('N', 'T', C, H, D, 1, k, old.first, 0, acts.z);
      activate<true, false>(s.activation, acts.z, x.a, x.slope, (T*)nullptr, s.C * s.H);
    }
    product<T>('N', 'T', C, D, H, 1, inner(c), old.last, 0, x.o);
    for (long t = 0; t < s.C; t++) {
      const long at = t * s.D;
      T *n = acts.n + at, *error = acts.error + at;
      if (!s.norm) {
        for (long i = 0; i < s.D; i++) error[i] = 2 * (x.o[at + i] - v[at + i]);
        continue;
      }
      const T *gain = row.gain(), *bias = row.bias();
      acts.rstd[t] = normalise(x.o + at, n, s.D);
      for (long i = 0; i < s.D; i++) x.g[i] = 2 * gain[i] * (k[at + i] + n[i] * gain[i] + bias[i] - v[at + i]);
      jacobian(x.g, n, acts.rstd[t], error, s.D);
    }
    if (s.two()) {
      product<T>('N', 'N', C, H, D, 1, acts.error, old.last, 0, acts.u);
      for (long i = 0; i < s.C * s.H; i++) x.e1[i] = acts.u[i] * x.slope[i];
    }
    weigh(c, acts);
  }

  // The factors of the writes with their shares.
  void weigh(long c, const Acts<T>& acts) {
    const T* k = row.tokens(row.t.k, c);
    for (long t = 0; t < s.C; t++) {
      const T share = x.decay.share[t], push = x.decay.push[t];
      for (long i = t * s.D; i < (t + 1) * s.D; i++) {
        x.e_share[i] = share * acts.error[i];
        x.e_push[i] = push * acts.error[i];
        x.k_share[i] = share * k[i];
        x.k_push[i] = push * k[i];
      }
    }
  }

  // The queries through both maps.
  void reads(long c, const State<T>& old, const Acts<T>& acts) {
    const int C = s.C, D = s.D, H = s.H;
    const T *q = row.queries(row.t.q, c, x.q), *k = row.tokens(row.t.k, c), *b = q;
    if (s.two()) {
      product<T>('N', 'T', C, C, D, 1, q, k, 0, x.scores);
      for (long i = 0; i < s.C * s.C; i++) x.scores[i] *= x.decay.shifted[i];
      shrink(q);
      product<T>('N', 'T', C, H, D, 1, x.q_kept, old.first, 0, acts.h);
      if (s.momentum) product<T>('N', 'T', C, H, D, 1, x.q_pushed, old.first_past, 1, acts.h);
      product<T>('N', 'N', C, H, C, -1, x.scores, x.e1, 1, acts.h);
      activate<false, false>(s.activation, acts.h, x.b, (T*)nullptr, (T*)nullptr, s.C * s.H);
      b = x.b;
    }
    product<T>('N', 'T', C, D, H, 1, b, old.last, 0, acts.read);
    if (s.momentum) product<T>('N', 'T', C, D, H, 1, b, old.last_past, 0, acts.past);
    product<T>('N', 'T', C, C, H, 1, b, inner(c), 0, acts.match);
  }

  // P_t q and m_t q, one token late.
  void shrink(const T* q) {
    for (long t = 0; t < s.C; t++) {
      const T kept = t && s.retention != ANCHORED ? x.decay.P[t - 1] : 1, pushed = t ? x.decay.m[t - 1] : 0;
      for (long i = t * s.D; i < (t + 1) * s.D; i++) {
        x.q_kept[i] = kept * q[i];
        x.q_pushed[i] = pushed * q[i];
      }
    }
  }

  void outputs(long c, const Acts<T>& acts, T* y) {
    if (!y && !s.norm) return;
    const T* q = row.queries(row.t.q, c, x.q);
    T* out = y ? y + (row.g * s.tokens() + c * s.C - 1) * s.D : nullptr;
    last_map(acts);
    for (long t = 0; t < s.C; t++) {
      const long at = t * s.D;
      if (s.norm) acts.out_rstd[t] = normalise(x.p + at, acts.out + at, s.D);
      if (!y || (c == 0 && t == 0)) continue;
      for (long i = 0; i < s.D; i++)
        out[at + i] = s.norm ? q[at + i] + acts.out[at + i] * row.gain()[i] + row.bias()[i] : x.p[at + i];
    }
  }

  // p = P b W2ᵀ + m b S2ᵀ - (b aᵀ · K) e2.
  void last_map(const Acts<T>& acts) {
    for (long i = 0; i < s.C * s.C; i++) x.scores[i] = acts.match[i] * x.decay.shifted[i];
    for (long t = 0; t < s.C; t++) {
      const T kept = t && s.retention != ANCHORED ? x.decay.P[t - 1] : 1, pushed = t ? x.decay.m[t - 1] : 0;
      for (long i = t * s.D; i < (t + 1) * s.D; i++)
        x.p[i] = kept * acts.read[i] + (s.momentum ? pushed * acts.past[i] : 0);
    }
    product<T>('N', 'N', s.C, s.D, s.C, -1, x.scores, acts.error, 1, x.p);
  }

  void close(long c, const State<T>& old, const State<T>& now, const Acts<T>& acts) {
    const int C = s.C, D = s.D, H = s.H;
    const T* anchor = row.anchors();
    if (s.two()) {
      carry(old.first, old.first_past, now.first, now.first_past, anchor);
      product<T>('T', 'N', H, D, C, -1, x.e1, x.k_share, 1, now.first);
      if (s.momentum) product<T>('T', 'N', H, D, C, -1, x.e1, x.k_push, 1, now.first_past);
      if (s.projects()) project(now.first, x.norm_first, acts.scale, acts.of_norm, s.H, s.D);
    }
    carry(old.last, old.last_past, now.last, now.last_past, anchor ? anchor + (s.two() ? s.H * s.D : 0) : nullptr);
    product<T>('T', 'N', D, H, C, -1, x.e_share, inner(c), 1, now.last);
    if (s.momentum) product<T>('T', 'N', D, H, C, -1, x.e_push, inner(c), 1, now.last_past);
    const long before = s.two() ? s.H : 0;
    if (s.projects()) project(now.last, x.norm_last, acts.scale + before, acts.of_norm + before, s.D, s.H);
  }

  // P_C W + m_C S, or A_0 + P_C (W - A_0) + m_C S, and h_C S.
  void carry(const T* weight, const T* past, T* to, T* to_past, const T* anchor) {
    const long size = s.H * s.D, end = s.C - 1;
    const T kept = x.decay.P[end], pushed = x.decay.m[end], carried = x.decay.h[end];
    const bool pulls = s.retention == ANCHORED;
    if (!s.momentum) {
      if (pulls)
        for (long i = 0; i < size; i++) to[i] = anchor[i] + kept * (weight[i] - anchor[i]);
      else
        for (long i = 0; i < size; i++) to[i] = kept * weight[i];
      return;
    }
    if (pulls)
      for (long i = 0; i < size; i++) {
        const T was = past[i];
        to[i] = anchor[i] + kept * (weight[i] - anchor[i]) + pushed * was;
        to_past[i] = carried * was;
      }
    else
      for (long i = 0; i < size; i++) {
        const T was = past[i];
        to[i] = kept * weight[i] + pushed * was;
        to_past[i] = carried * was;
      }
  }

  // Every row back to A_0's norm; a row of rounding errors stays as it is.
  static void project(T* weight, const T* norm, T* scale, T* of_norm, long rows, long width) {
    for (long r = 0; r < rows; r++) {
      T* w = weight + r * width;
      const T found = std::sqrt(dot(w, w, width));
      const bool alive = found > norm[r] * std::numeric_limits<T>::epsilon();
      scale[r] = alive ? norm[r] / found : 1;
      of_norm[r] = alive && norm[r] > 0 ? 1 / norm[r] : 0;
      for (long i = 0; i < width; i++) w[i] *= scale[r];
    }
  }

  void last_read(const State<T>& end) {
    const long at = (row.g * s.tokens() + s.tokens() - 1) * s.D;
    const T *q = row.t.q + at, *b = q;
    if (s.two()) {
      product<T>('N', 'T', 1, s.H, s.D, 1, q, end.first, 0, x.a);
      activate<false, false>(s.activation, x.a, x.b, (T*)nullptr, (T*)nullptr, s.H);
      b = x.b;
    }
    T* y = row.t.y + at;
    product<T>('N', 'T', 1, s.D, s.H, 1, b, end.last, 0, x.p);
    if (s.norm) normalise(x.p, x.o, s.D);
    for (long i = 0; i < s.D; i++) y[i] = s.norm ? q[i] + x.o[i] * row.gain()[i] + row.bias()[i] : x.p[i];
  }
};
