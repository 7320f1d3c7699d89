// What lies around the scan when whole texts are read, forward and backward, in one pass each over what it touches:
// the convolution with the norms of queries, keys and values, the norm of layers and reads with its gate, SwiGLU.
#pragma once
#include <algorithm>
#include <vector>

#include "vectors.h"

enum Kind { PLAIN, UNIT, LIMIT };
constexpr long MOST = 4;  // parts

// B rows of T tokens of `parts` times H heads of D; a convolution of K taps. kinds: what becomes of each part's heads.
struct HeadsShape {
  long B, T, K, parts, H, D;
  const int64_t* kinds;
  double longest;
  long channels() const { return parts * H * D; }
};

template <class T>
struct HeadsTensors {
  const T *x, *tail, *w;        // [B, T, channels], [B, K-1, channels] or null for zeros, [K, channels]
  T *out[MOST], *after;         // of each part [B, H, T, D]; [B, K-1, channels]
  const T *d_out[MOST], *d_after;  // a part's is null where nothing depends on it
  T *d_x, *d_tail, *d_w;        // d_w: [GROUPS, K, channels], to be summed
};

constexpr long BLOCK = 32;   // tokens that a thread takes at once: their channels stay in its cache
constexpr long GROUPS = 32;  // partial sums of the gradient of w: as many at any number of threads, so equal bits

// Token t of a row, -K < t < T; null where the stream had not begun.
template <class T>
const T* token(const HeadsShape& s, const HeadsTensors<T>& p, long b, long t) {
  if (t >= 0) return p.x + (b * s.T + t) * s.channels();
  return p.tail ? p.tail + (b * (s.K - 1) + s.K - 1 + t) * s.channels() : nullptr;
}

template <class T>
void convolved(const HeadsShape& s, const HeadsTensors<T>& p, long b, long t, T* __restrict y) {
  const long n = s.channels();
  const T* now = token(s, p, b, t);
  const T* __restrict last = p.w + (s.K - 1) * n;
  for (long i = 0; i < n; i++) y[i] = last[i] * now[i];
  for (long j = 0; j + 1 < s.K; j++)
    if (const T* __restrict x = token(s, p, b, t - s.K + 1 + j)) {
      const T* __restrict w = p.w + j * n;
      for (long i = 0; i < n; i++) y[i] += w[i] * x[i];
    }
}

// The factor that a head of length `norm` is multiplied by.
template <class T>
T factor(long kind, T norm, T longest) {
  if (kind == UNIT) return 1 / std::max(norm, T(1e-12));
  return norm > longest ? longest / norm : T(1);
}

template <class T>
void heads(const HeadsShape& s, const HeadsTensors<T>& p, int threads) {
  const long n = s.channels(), blocks = (s.T + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1 && s.B * s.T * n > 1 << 15)
  for (long block = 0; block < s.B * blocks; block++) {
    const long b = block / blocks, first = block % blocks * BLOCK;
    std::vector<T> y(n);
    for (long t = first; t < std::min(first + BLOCK, s.T); t++) {
      convolved(s, p, b, t, y.data());
      for (long unit = 0; unit < s.parts * s.H; unit++) {
        const long part = unit / s.H, h = unit % s.H, kind = s.kinds[part];
        const T* in = y.data() + unit * s.D;
        const T scale = kind == PLAIN ? T(1) : factor(kind, std::sqrt(dot(in, in, s.D)), T(s.longest));
        T* out = p.out[part] + ((b * s.H + h) * s.T + t) * s.D;
        for (long i = 0; i < s.D; i++) out[i] = in[i] * scale;
      }
    }
  }
  for (long b = 0; b < s.B; b++)
    for (long i = 0; i + 1 < s.K; i++) {
      T* to = p.after + (b * (s.K - 1) + i) * n;
      if (const T* x = token(s, p, b, s.T - s.K + 1 + i))
        std::copy(x, x + n, to);
      else
        std::fill(to, to + n, T(0));
    }
}

// dy: the gradient of what the convolution returned of token t, from those of the heads.
template <class T>
void heads_back(const HeadsShape& s, const HeadsTensors<T>& p, long b, long t, T* y, T* dy) {
  convolved(s, p, b, t, y);
  for (long unit = 0; unit < s.parts * s.H; unit++) {
    const long part = unit / s.H, h = unit % s.H, kind = s.kinds[part];
    T* to = dy + unit * s.D;
    if (!p.d_out[part]) {
      std::fill(to, to + s.D, T(0));
      continue;
    }
    const T *in = y + unit * s.D, *g = p.d_out[part] + ((b * s.H + h) * s.T + t) * s.D;
    if (kind == PLAIN) {
      std::copy(g, g + s.D, to);
      continue;
    }
    const T norm = std::sqrt(dot(in, in, s.D)), scale = factor(kind, norm, T(s.longest));
    const bool bound = kind == UNIT ? norm >= T(1e-12) : norm > T(s.longest);  // does the length matter?
    const T along = bound ? dot(in, g, s.D) / (norm * norm) : T(0);
    for (long i = 0; i < s.D; i++) to[i] = scale * (g[i] - along * in[i]);
  }
}

template <class T>
void heads_backward(const HeadsShape& s, const HeadsTensors<T>& p, int threads) {
  const long n = s.channels(), blocks = (s.T + BLOCK - 1) / BLOCK, all = s.B * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1 && s.B * s.T * n > 1 << 15) schedule(dynamic, 1)
  for (long group = 0; group < GROUPS; group++) {
    T* d_w = p.d_w + group * s.K * n;
    std::fill(d_w, d_w + s.K * n, T(0));
    std::vector<T> y(n), dy((BLOCK + s.K - 1) * n);
    for (long block = group * all / GROUPS; block < (group + 1) * all / GROUPS; block++) {
      const long b = block / blocks, first = block % blocks * BLOCK, end = std::min(first + BLOCK, s.T);
      for (long t = first; t < std::min(end + s.K - 1, s.T); t++) {
        T* __restrict d = dy.data() + (t - first) * n;
        heads_back(s, p, b, t, y.data(), d);
        for (long j = 0; t < end && j < s.K; j++)
          if (const T* __restrict x = token(s, p, b, t - s.K + 1 + j)) {
            T* __restrict to = d_w + j * n;
            for (long i = 0; i < n; i++) to[i] += d[i] * x[i];
          }
      }
      for (long t = first || !p.d_tail ? first : 1 - s.K; t < end; t++) {
        T* __restrict to = t >= 0 ? p.d_x + (b * s.T + t) * n : p.d_tail + (b * (s.K - 1) + s.K - 1 + t) * n;
        const long kept = t - (s.T - s.K + 1);  // its place in the tail that the call leaves
        if (kept >= 0 && p.d_after && s.K > 1)
          std::copy_n(p.d_after + (b * (s.K - 1) + kept) * n, n, to);
        else
          std::fill(to, to + n, T(0));
        for (long j = 0; j < s.K; j++) {
          const long reader = t + s.K - 1 - j;
          if (reader < 0 || reader >= s.T) continue;
          const T *__restrict w = p.w + j * n, *__restrict d = dy.data() + (reader - first) * n;
          for (long i = 0; i < n; i++) to[i] += w[i] * d[i];
        }
      }
    }
  }
}

// out = x / RMS(x) scale (σ(gate)) of B × T vectors of H heads of D: x [B, H, T, D], scale [H D], gate and out
// [B, T, H D]; gate may be null. With one head x is [B, T, D].
struct NormShape {
  long B, T, H, D;
  double eps;
  long width() const { return H * D; }
};

template <class T>
T inverse_rms(const NormShape& s, const T* x) {
  T sum = 0;
  for (long h = 0; h < s.H; h++) sum += dot(x + h * s.T * s.D, x + h * s.T * s.D, s.D);
  return 1 / std::sqrt(sum / s.width() + T(s.eps));
}

template <class T>
void norm(const NormShape& s, const T* x, const T* scale, const T* gate, T* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && s.B * s.T * s.width() > 1 << 15)
  for (long at = 0; at < s.B * s.T; at++) {
    const T* in = x + (at / s.T * s.H * s.T + at % s.T) * s.D;
    const T r = inverse_rms(s, in);
    for (long h = 0; h < s.H; h++) {
      const T *__restrict from = in + h * s.T * s.D, *__restrict w = scale + h * s.D;
      T* __restrict to = out + at * s.width() + h * s.D;
      if (gate) {
        const T* __restrict g = gate + at * s.width() + h * s.D;
        for (long i = 0; i < s.D; i++) to[i] = from[i] * r * w[i] / (1 + exponential(-g[i]));
      } else {
        for (long i = 0; i < s.D; i++) to[i] = from[i] * r * w[i];
      }
    }
  }
}

// d_scale: [GROUPS, H D], to be summed.
template <class T>
void norm_backward(const NormShape& s, const T* x, const T* scale, const T* gate, const T* d_out, T* d_x, T* d_scale,
                   T* d_gate, int threads) {
  const long width = s.width(), all = s.B * s.T;
#pragma omp parallel for num_threads(threads) if (threads > 1 && all * width > 1 << 15) schedule(dynamic, 1)
  for (long group = 0; group < GROUPS; group++) {
    std::vector<T> passed(width);
    T* sums = d_scale + group * width;
    std::fill(sums, sums + width, T(0));
    for (long at = group * all / GROUPS; at < (group + 1) * all / GROUPS; at++) {
      const long start = (at / s.T * s.H * s.T + at % s.T) * s.D;
      const T r = inverse_rms(s, x + start);
      T along = 0;
      for (long h = 0; h < s.H; h++) {
        const long here = h * s.D, there = at * width + here;
        const T *__restrict from = x + start + h * s.T * s.D, *__restrict w = scale + here;
        const T* __restrict d = d_out + there;
        T *__restrict to = passed.data() + here, *__restrict sum = sums + here;
        if (gate) {
          const T* __restrict g = gate + there;
          T* __restrict d_g = d_gate + there;
          for (long i = 0; i < s.D; i++) {
            const T open = 1 / (1 + exponential(-g[i])), normed = from[i] * r;
            to[i] = d[i] * w[i] * open;
            sum[i] += d[i] * normed * open;
            d_g[i] = to[i] * normed * (1 - open);
          }
        } else {
          for (long i = 0; i < s.D; i++) {
            to[i] = d[i] * w[i];
            sum[i] += d[i] * from[i] * r;
          }
        }
        along += dot(to, from, s.D);
      }
      along *= r * r / width;
      for (long h = 0; h < s.H; h++) {
        const T *__restrict from = x + start + h * s.T * s.D, *__restrict in = passed.data() + h * s.D;
        T* __restrict to = d_x + start + h * s.T * s.D;
        for (long i = 0; i < s.D; i++) to[i] = r * (in[i] - along * from[i]);
      }
    }
  }
}

// out = SiLU(gate) value of `rows` vectors [gate, value] of 2 × hidden; or, with d_out, the gradient of x.
template <class T>
void swiglu(const T* x, const T* d_out, T* out, long rows, long hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * hidden > 1 << 15)
  for (long r = 0; r < rows; r++) {
    const T *__restrict g = x + 2 * r * hidden, *__restrict v = g + hidden;
    if (!d_out) {
      T* __restrict to = out + r * hidden;
      for (long i = 0; i < hidden; i++) to[i] = v[i] * g[i] / (1 + exponential(-g[i]));
      continue;
    }
    const T* __restrict d = d_out + r * hidden;
    T *__restrict d_g = out + 2 * r * hidden, *__restrict d_v = d_g + hidden;
    for (long i = 0; i < hidden; i++) {
      const T open = 1 / (1 + exponential(-g[i]));
      d_v[i] = d[i] * g[i] * open;
      d_g[i] = d[i] * v[i] * open * (1 + g[i] * (1 - open));
    }
  }
}
