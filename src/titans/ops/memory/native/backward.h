// Backward pass over one row; d_x is the cotangent of x. Order and formulas as in fused_backward.py.
#pragma once
#include "forward.h"

template <class T>
class Backward {
 public:
  // `again` computes states and activations that were not kept.
  Backward(const Row<T>& row, Arena<T>& arena, Forward<T>& again)
      : row(row), s(row.s), x(s, arena), again(again), d_end(s, row.t.d_state + row.g * s.state()) {}

  void run() {
    T* d_state = row.t.d_state + row.g * s.state();
    std::memcpy(d_state, row.t.d_end + row.g * s.state(), sizeof(T) * s.state());
    if (s.norm) std::memset(d_gain(), 0, sizeof(T) * 2 * s.D);
    if (s.projects()) {
      std::memset(row.t.d_anchors + row.g * s.weights(), 0, sizeof(T) * s.weights());
      std::memset(x.d_norms, 0, sizeof(T) * s.rows());
    }
    last_read(State<T>(s, row.point(s.segments())));
    for (long segment = s.segments() - 1; segment >= 0; segment--) {
      const long first = segment * s.every, count = std::min(s.every, s.n - first);
      for (long j = 0; j < count; j++) restore(segment, first + j, j, count);
      for (long j = count - 1; j >= 0; j--)
        chunk(first + j, State<T>(s, state(segment, j, count)), State<T>(s, state(segment, j + 1, count)),
              acts(first + j, j));
    }
    if (s.projects()) anchors();
  }

 private:
  const Row<T>& row;
  const Shape& s;
  BackwardScratch<T> x;
  Forward<T>& again;
  State<T> d_end;  // of the state at the end of the chunk at hand, then of that at its start

  T* d_gain() { return row.t.d_norm + row.g * 2 * s.D; }
  T* d_bias() { return d_gain() + s.D; }
  Acts<T> acts(long c, long j) { return s.keep ? row.acts(c) : Acts<T>(s, x.acts + j * s.acts()); }

  // Where the state before chunk j of a segment stands: kept at both ends, in scratch between.
  T* state(long segment, long j, long count) {
    if (j == 0) return row.point(segment);
    return j == count ? row.point(segment + 1) : x.states + (j - 1) * s.state();
  }

  // State after chunk j, and its activations, where they were not kept. The last state of a segment always was: what is
  // computed again goes to a spare place.
  void restore(long segment, long c, long j, long count) {
    T* to = j + 1 == count ? x.states + (s.every - 1) * s.state() : state(segment, j + 1, count);
    if (!s.keep)
      again.chunk(c, state(segment, j, count), to, acts(c, j), nullptr);
    else if (j + 1 < count)
      again.advance(c, state(segment, j, count), to, acts(c, j));
  }

  void last_read(const State<T>& end) {
    const int D = s.D, H = s.H;
    const long at = (row.g * s.tokens() + s.tokens() - 1) * s.D;
    const T *q = row.t.q + at, *d_y = row.t.d_y + at, *b = q, *d_p = d_y;
    T* d_q = row.t.d_q + at;
    if (s.two()) {
      product<T>('N', 'T', 1, H, D, 1, q, end.first, 0, x.a);
      activate<true, false>(s.activation, x.a, x.b, x.slope, (T*)nullptr, s.H);
      b = x.b;
    }
    if (s.norm) {
      product<T>('N', 'T', 1, D, H, 1, b, end.last, 0, x.t);
      const T rstd = normalise(x.t, x.g, s.D);
      for (long i = 0; i < s.D; i++) {
        d_gain()[i] += d_y[i] * x.g[i];
        d_bias()[i] += d_y[i];
        x.t[i] = d_y[i] * row.gain()[i];
      }
      jacobian(x.t, x.g, rstd, x.d_p, s.D);
      d_p = x.d_p;
    }
    for (long i = 0; i < s.D; i++) d_q[i] = s.norm ? d_y[i] : 0;
    product<T>('T', 'N', D, H, 1, 1, d_p, b, 1, d_end.last);
    if (!s.two()) {
      product<T>('N', 'N', 1, D, H, 1, d_p, end.last, 1, d_q);
      return;
    }
    product<T>('N', 'N', 1, H, D, 1, d_p, end.last, 0, x.d_h);
    for (long i = 0; i < s.H; i++) x.d_h[i] *= x.slope[i];
    product<T>('T', 'N', H, D, 1, 1, x.d_h, q, 1, d_end.first);
    product<T>('N', 'N', 1, D, H, 1, x.d_h, end.first, 1, d_q);
  }

  void chunk(long c, const State<T>& start, const State<T>& end, const Acts<T>& acts) {
    rebuild(c, acts);
    outputs(c, acts);
    if (s.projects()) project(end, acts);
    writes(c);
    T d_h_end = carry(start);
    reads(c, start, acts);
    keys(c, start, acts);
    x.decay.backward(row.gates(c), s.C, x.d_shifted, x.d_share, x.d_push, x.d_P, x.d_m, d_h_end, gate(row.t.d_theta, c),
                     gate(row.t.d_eta, c), gate(row.t.d_alpha, c), x.g_K, x.g_L);
  }

  T* gate(T* d, long c) { return d ? d + row.g * s.tokens() + c * s.C : nullptr; }
  const T* inner(long c) const { return s.two() ? x.a : row.tokens(row.t.k, c); }

  // What the forward pass had at hand.
  void rebuild(long c, const Acts<T>& acts) {
    x.decay.fill(row.gates(c), s.C);
    if (s.two()) {
      activate<true, true>(s.activation, acts.z, x.a, x.slope, x.curvature, s.C * s.H);
      activate<true, false>(s.activation, acts.h, x.b, x.b_slope, (T*)nullptr, s.C * s.H);
      for (long i = 0; i < s.C * s.H; i++) x.e1[i] = acts.u[i] * x.slope[i];
    }
    const T *k = row.tokens(row.t.k, c), *q = row.queries(row.t.q, c, x.q);
    for (long t = 0; t < s.C; t++) {
      const T share = x.decay.share[t], push = x.decay.push[t], kept = retained(t), pushed = t ? x.decay.m[t - 1] : 0;
      for (long i = t * s.D; i < (t + 1) * s.D; i++) {
        x.k_share[i] = share * k[i];
        x.k_push[i] = push * k[i];
        x.e_share[i] = share * acts.error[i];
        x.e_push[i] = push * acts.error[i];
        x.q_kept[i] = kept * q[i];
        x.q_pushed[i] = pushed * q[i];
      }
    }
  }

  T retained(long t) const { return t && s.retention != ANCHORED ? x.decay.P[t - 1] : T(1); }

  // From the outputs to what was read: d_p, d_read, d_past, and the gates' share of it.
  void outputs(long c, const Acts<T>& acts) {
    const T* d_y = row.queries(row.t.d_y, c, x.d_y);
    std::memset(x.d_P, 0, sizeof(T) * s.C);
    std::memset(x.d_m, 0, sizeof(T) * s.C);
    for (long t = 0; t < s.C; t++) {
      const long at = t * s.D;
      const T *d = d_y + at, *n = acts.out + at, kept = retained(t), pushed = t ? x.decay.m[t - 1] : 0;
      T* d_p = x.d_p + at;
      if (s.norm) {
        for (long i = 0; i < s.D; i++) {
          d_gain()[i] += d[i] * n[i];
          d_bias()[i] += d[i];
          x.t[i] = d[i] * row.gain()[i];
        }
        jacobian(x.t, n, acts.out_rstd[t], d_p, s.D);
      } else {
        std::memcpy(d_p, d, sizeof(T) * s.D);
      }
      for (long i = 0; i < s.D; i++) {
        x.d_read[at + i] = kept * d_p[i];
        x.d_past[at + i] = pushed * d_p[i];
      }
      if (!t) continue;
      if (s.retention != ANCHORED) x.d_P[t - 1] += dot(d_p, acts.read + at, s.D);
      if (s.momentum) x.d_m[t - 1] += dot(d_p, acts.past + at, s.D);
    }
  }

  // Through the rows' scaling: W = s A with s = ‖A_0‖ / ‖A‖ per row.
  void project(const State<T>& end, const Acts<T>& acts) {
    auto back = [&](T* d_weight, const T* weight, long offset, long rows, long width) {
      for (long r = 0; r < rows; r++) {
        T* d = d_weight + r * width;
        const T *w = weight + r * width, of_norm = acts.of_norm[offset + r], scale = acts.scale[offset + r];
        const T along = dot(d, w, width) * of_norm;
        x.d_norms[offset + r] += along;
        for (long i = 0; i < width; i++) d[i] = scale * (d[i] - along * of_norm * w[i]);
      }
    };
    if (s.two()) back(d_end.first, end.first, 0, s.H, s.D);
    back(d_end.last, end.last, s.two() ? s.H : 0, s.D, s.H);
  }

  // To both factors of the writes.
  void writes(long c) {
    const int C = s.C, D = s.D, H = s.H;
    product<T>('N', 'T', C, D, H, 1, inner(c), d_end.last, 0, x.last_share);
    product<T>('N', 'N', C, H, D, -1, x.e_share, d_end.last, 0, x.d_a);
    if (s.momentum) {
      product<T>('N', 'T', C, D, H, 1, inner(c), d_end.last_past, 0, x.last_push);
      product<T>('N', 'N', C, H, D, -1, x.e_push, d_end.last_past, 1, x.d_a);
    }
    if (!s.two()) return;
    product<T>('N', 'N', C, D, H, 1, x.e1, d_end.first, 0, x.first_share);
    product<T>('N', 'T', C, H, D, -1, x.k_share, d_end.first, 0, x.d_e1);
    if (s.momentum) {
      product<T>('N', 'N', C, D, H, 1, x.e1, d_end.first_past, 0, x.first_push);
      product<T>('N', 'T', C, H, D, -1, x.k_push, d_end.first_past, 1, x.d_e1);
    }
  }

  // To P_C, m_C, A_0 and the state at the chunk's start as far as it is carried along; returns that of h_C.
  T carry(const State<T>& start) {
    const long size = s.H * s.D, end = s.C - 1;
    const T* anchor = row.anchors();
    T* d_anchor = anchor ? row.t.d_anchors + row.g * s.weights() : nullptr;
    T sums[3] = {0, 0, 0};
    auto one = [&](T* d, T* d_past, const T* weight, const T* past, long offset) {
      const bool pulls = s.retention == ANCHORED;
      if (s.momentum)
        pulls ? carry_map<true, true>(d, d_past, weight, past, anchor + offset, d_anchor + offset, sums)
              : carry_map<true, false>(d, d_past, weight, past, (const T*)nullptr, (T*)nullptr, sums);
      else
        pulls ? carry_map<false, true>(d, d_past, weight, past, anchor + offset, d_anchor + offset, sums)
              : carry_map<false, false>(d, d_past, weight, past, (const T*)nullptr, (T*)nullptr, sums);
    };
    if (s.two()) one(d_end.first, d_end.first_past, start.first, start.first_past, 0);
    one(d_end.last, d_end.last_past, start.last, start.last_past, s.two() ? size : 0);
    x.d_P[end] = sums[0];
    x.d_m[end] = sums[1];
    return sums[2];
  }

  template <bool MOMENTUM, bool PULLS>
  void carry_map(T* __restrict d, T* __restrict d_past, const T* __restrict weight, const T* __restrict past,
                 const T* __restrict anchor, T* __restrict d_anchor, T* sums) const {
    const long size = s.H * s.D, end = s.C - 1;
    const T kept = x.decay.P[end], pushed = x.decay.m[end], carried = x.decay.h[end];
    T of_kept = 0, of_pushed = 0, of_carried = 0;
    for (long i = 0; i < size; i++) {
      const T g = d[i];
      of_kept += g * (PULLS ? weight[i] - anchor[i] : weight[i]);
      if constexpr (MOMENTUM) {
        of_pushed += g * past[i];
        of_carried += d_past[i] * past[i];
        d_past[i] = carried * d_past[i] + pushed * g;
      }
      if constexpr (PULLS) d_anchor[i] += (1 - kept) * g;
      d[i] = kept * g;
    }
    sums[0] += of_kept;
    sums[1] += of_pushed;
    sums[2] += of_carried;
  }

  // Through the queries' way through both maps.
  void reads(long c, const State<T>& start, const Acts<T>& acts) {
    const int C = s.C, D = s.D, H = s.H;
    const T *q = c ? row.tokens(row.t.q, c) - s.D : x.q, *d_y = c ? row.tokens(row.t.d_y, c) - s.D : x.d_y;
    const T* b = s.two() ? x.b : q;
    T* d_b = s.two() ? x.d_h : x.d_queries;
    product<T>('N', 'T', C, C, D, -1, x.d_p, acts.error, 0, x.d_match);
    for (long i = 0; i < s.C * s.C; i++) {
      x.scores[i] = acts.match[i] * x.decay.shifted[i];
      x.d_shifted[i] = x.d_match[i] * acts.match[i];
      x.d_match[i] *= x.decay.shifted[i];
    }
    product<T>('T', 'N', C, D, C, -1, x.scores, x.d_p, 0, x.d_error);
    product<T>('N', 'N', C, H, D, 1, x.d_read, start.last, 0, d_b);
    product<T>('T', 'N', D, H, C, 1, x.d_read, b, 1, d_end.last);
    if (s.momentum) {
      product<T>('N', 'N', C, H, D, 1, x.d_past, start.last_past, 1, d_b);
      product<T>('T', 'N', D, H, C, 1, x.d_past, b, 1, d_end.last_past);
    }
    product<T>('N', 'N', C, H, C, 1, x.d_match, inner(c), 1, d_b);
    product<T>('T', 'N', C, H, C, 1, x.d_match, b, 1, x.d_a);
    if (s.two()) first_map(c, start, q);
    T* d_q = row.t.d_q + (row.g * s.tokens() + c * s.C - 1) * s.D;
    for (long i = c ? 0 : s.D; i < s.C * s.D; i++) d_q[i] = x.d_queries[i] + (s.norm ? d_y[i] : 0);
  }

  void first_map(long c, const State<T>& start, const T* q) {
    const int C = s.C, D = s.D, H = s.H;
    const T* k = row.tokens(row.t.k, c);
    for (long i = 0; i < s.C * s.H; i++) x.d_h[i] *= x.b_slope[i];
    product<T>('N', 'T', C, C, D, 1, q, k, 0, x.raw);
    for (long i = 0; i < s.C * s.C; i++) x.scores[i] = x.raw[i] * x.decay.shifted[i];
    product<T>('T', 'N', C, H, C, -1, x.scores, x.d_h, 1, x.d_e1);
    product<T>('N', 'T', C, C, H, -1, x.d_h, x.e1, 0, x.d_scores);
    product<T>('N', 'N', C, D, H, 1, x.d_h, start.first, 0, x.d_kept);
    product<T>('T', 'N', H, D, C, 1, x.d_h, x.q_kept, 1, d_end.first);
    if (s.momentum) {
      product<T>('N', 'N', C, D, H, 1, x.d_h, start.first_past, 0, x.d_pushed);
      product<T>('T', 'N', H, D, C, 1, x.d_h, x.q_pushed, 1, d_end.first_past);
    }
    for (long t = 0; t < s.C; t++) {
      const T kept = retained(t), pushed = t ? x.decay.m[t - 1] : 0;
      const long at = t * s.D;
      for (long i = at; i < at + s.D; i++)
        x.d_queries[i] = kept * x.d_kept[i] + (s.momentum ? pushed * x.d_pushed[i] : 0);
      if (t && s.retention != ANCHORED) x.d_P[t - 1] += dot(x.d_kept + at, q + at, s.D);
      if (t && s.momentum) x.d_m[t - 1] += dot(x.d_pushed + at, q + at, s.D);
    }
    for (long i = 0; i < s.C * s.C; i++) {
      x.d_shifted[i] += x.d_scores[i] * x.raw[i];
      x.d_scores[i] *= x.decay.shifted[i];
    }
    product<T>('N', 'N', C, D, C, 1, x.d_scores, k, 1, x.d_queries);
  }

  // Through the errors and the key pass.
  void keys(long c, const State<T>& start, const Acts<T>& acts) {
    const int C = s.C, D = s.D, H = s.H;
    const T* k = row.tokens(row.t.k, c);
    T* d_k = row.t.d_k + (row.g * s.tokens() + c * s.C) * s.D;
    shares(acts, k, d_k);
    if (s.two()) {
      for (long i = 0; i < s.C * s.H; i++) {
        const T d = x.d_e1[i];
        x.curvature[i] *= d * acts.u[i];
        x.d_e1[i] = d * x.slope[i];
      }
      product<T>('N', 'T', C, D, H, 1, x.d_e1, start.last, 1, x.d_error);
      product<T>('T', 'N', D, H, C, 1, acts.error, x.d_e1, 1, d_end.last);
    }
    errors(c, acts, k, d_k);
    product<T>('T', 'N', D, H, C, 1, x.d_o, inner(c), 1, d_end.last);
    product<T>('N', 'N', C, H, D, 1, x.d_o, start.last, 1, x.d_a);
    if (!s.two()) {
      for (long i = 0; i < s.C * s.D; i++) d_k[i] += x.d_a[i];
      return;
    }
    T* d_z = x.curvature;
    for (long i = 0; i < s.C * s.H; i++) d_z[i] += x.d_a[i] * x.slope[i];
    product<T>('N', 'N', C, D, H, 1, d_z, start.first, 1, d_k);
    product<T>('T', 'N', C, D, C, 1, x.d_scores, c ? row.tokens(row.t.q, c) - s.D : x.q, 1, d_k);
    product<T>('T', 'N', H, D, C, 1, d_z, k, 1, d_end.first);
  }

  // Through K[C, i] θ_i and L[C, i] θ_i.
  void shares(const Acts<T>& acts, const T* k, T* d_k) {
    for (long t = 0; t < s.C; t++) {
      const T share = x.decay.share[t], push = x.decay.push[t];
      const long at = t * s.D;
      T of_share = dot(x.last_share + at, acts.error + at, s.D), of_push = 0;
      if (s.two()) of_share += dot(x.first_share + at, k + at, s.D);
      for (long i = at; i < at + s.D; i++) {
        x.d_error[i] -= share * x.last_share[i];
        d_k[i] = s.two() ? -share * x.first_share[i] : 0;
      }
      if (s.momentum) {
        of_push = dot(x.last_push + at, acts.error + at, s.D);
        if (s.two()) of_push += dot(x.first_push + at, k + at, s.D);
        for (long i = at; i < at + s.D; i++) {
          x.d_error[i] -= push * x.last_push[i];
          if (s.two()) d_k[i] -= push * x.first_push[i];
        }
      }
      x.d_share[t] = -of_share;
      x.d_push[t] = -of_push;
    }
  }

  // From the last map's error to its output, to k and v, gain and bias.
  void errors(long c, const Acts<T>& acts, const T* k, T* d_k) {
    const T* v = row.tokens(row.t.v, c);
    T* d_v = row.t.d_v + (row.g * s.tokens() + c * s.C) * s.D;
    for (long t = 0; t < s.C; t++) {
      const long at = t * s.D;
      const T *n = acts.n + at, *d = x.d_error + at, *error = acts.error + at, rstd = acts.rstd[t];
      T* d_o = x.d_o + at;
      if (!s.norm) {
        for (long i = 0; i < s.D; i++) {
          d_o[i] = 2 * d[i];
          d_v[at + i] = -d_o[i];
        }
        continue;
      }
      const T *gain = row.gain(), *bias = row.bias();
      jacobian(d, n, rstd, x.t, s.D);
      T g_n = 0, d_n = 0, d_e = 0;
      for (long i = 0; i < s.D; i++) {
        const T r = k[at + i] + n[i] * gain[i] + bias[i] - v[at + i], d_r = 2 * gain[i] * x.t[i];
        x.g[i] = 2 * gain[i] * r;
        g_n += x.g[i] * n[i];
        d_n += d[i] * n[i];
        d_e += d[i] * error[i];
        d_gain()[i] += 2 * r * x.t[i] + n[i] * d_r;
        d_bias()[i] += d_r;
        d_k[at + i] += d_r;
        d_v[at + i] = -d_r;
      }
      g_n /= s.D, d_n /= s.D, d_e /= s.D;
      for (long i = 0; i < s.D; i++) x.t[i] = 2 * gain[i] * gain[i] * x.t[i] - rstd * (d[i] * g_n + x.g[i] * d_n);
      jacobian(x.t, n, rstd, d_o, s.D);
      for (long i = 0; i < s.D; i++) d_o[i] -= n[i] * rstd * d_e;
    }
  }

  // A_0 through the norms of its rows.
  void anchors() {
    auto add = [&](long at, long offset, long rows, long width) {
      for (long r = 0; r < rows; r++) {
        const T* w = row.anchors() + at + r * width;
        T* d = row.t.d_anchors + row.g * s.weights() + at + r * width;
        const T norm = std::sqrt(dot(w, w, width)), share = norm > 0 ? x.d_norms[offset + r] / norm : 0;
        for (long i = 0; i < width; i++) d[i] += share * w[i];
      }
    };
    if (s.two()) add(0, 0, s.H, s.D);
    add(s.two() ? s.H * s.D : 0, s.two() ? s.H : 0, s.D, s.H);
  }
};
