// Small parts of the scan: matrix products, activations, the layer norm, and what the gates contribute to a chunk.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// The BLAS that torch itself calls; column-major.
extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

enum Activation { NONE, GELU, SILU };
enum Retention { WEIGHT_DECAY, SPHERE, ANCHORED };

// Row-major out[M, N] = alpha x y + beta out, where x is [M, K] and y is [K, N]; stored the other way round if "T".
// All matrices are dense, so their leading dimensions follow.
template <class T>
inline void product(char tx, char ty, int M, int N, int K, T alpha, const T* x, const T* y, T beta, T* out) {
  const int ldx = tx == 'T' ? M : K, ldy = ty == 'T' ? K : N;
  if constexpr (std::is_same_v<T, float>)
    sgemm_(&ty, &tx, &N, &M, &K, &alpha, y, &ldy, x, &ldx, &beta, out, &N);
  else
    dgemm_(&ty, &tx, &N, &M, &K, &alpha, y, &ldy, x, &ldx, &beta, out, &N);
}

// e^x. In float a polynomial, to about 1e-7; loops over it are vectorised, which takes inlining.
inline double exponential(double x) { return std::exp(x); }
[[gnu::always_inline]] inline float exponential(float x) {
  x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));  // ln 2 in two parts, not to be joined
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// The normal distribution at x: its cumulative function and its density.
inline void normal(double x, double& below, double& density) {
  below = 0.5 * std::erfc(-x * M_SQRT1_2);
  density = std::exp(-0.5 * x * x) * 0.3989422804014327;
}
// Abramowitz and Stegun 7.1.26 to 1.5e-7: one exponential serves both.
[[gnu::always_inline]] inline void normal(float x, float& below, float& density) {
  const float e = exponential(-0.5f * x * x), t = 1.f / (1.f + 0.3275911f * 0.70710678f * std::fabs(x));
  float r = 1.061405429f;
  r = r * t - 1.453152027f;
  r = r * t + 1.421413741f;
  r = r * t - 0.284496736f;
  r = r * t + 0.254829592f;
  below = 0.5f + std::copysign(0.5f - 0.5f * r * t * e, x);  // without a branch, or the loop is not vectorised
  density = e * 0.39894228f;
}

// σ(x), σ'(x) and σ''(x); a place that is null is left out.
template <bool FIRST, bool SECOND, class T>
[[gnu::noinline]] void activate(int name, const T* __restrict x, T* __restrict value, T* __restrict slope,
                                T* __restrict curvature, long count) {
  if (name == GELU) {
    for (long i = 0; i < count; i++) {
      const T z = x[i];
      T below, density;
      normal(z, below, density);
      value[i] = z * below;
      if constexpr (FIRST) slope[i] = below + z * density;
      if constexpr (SECOND) curvature[i] = density * (2 - z * z);
    }
    return;
  }
  for (long i = 0; i < count; i++) {
    const T z = x[i], s = 1 / (1 + exponential(-z));
    value[i] = z * s;
    if constexpr (FIRST) slope[i] = s * (1 + z * (1 - s));
    if constexpr (SECOND) curvature[i] = s * (1 - s) * (2 + z * (1 - 2 * s));
  }
}

template <class T>
inline T dot(const T* x, const T* y, long count) {
  T sum = 0;
  for (long i = 0; i < count; i++) sum += x[i] * y[i];
  return sum;
}

// n = (x - mean) rstd over one token; returns rstd.
template <class T>
inline T normalise(const T* x, T* n, long width) {
  T mean = 0, square = 0;
  for (long i = 0; i < width; i++) mean += x[i];
  mean /= width;
  for (long i = 0; i < width; i++) {
    n[i] = x[i] - mean;
    square += n[i] * n[i];
  }
  const T rstd = 1 / std::sqrt(square / width + T(1e-6));
  for (long i = 0; i < width; i++) n[i] *= rstd;
  return rstd;
}

// out = rstd (g - mean g - n mean(g n)): the norm's symmetric Jacobian applied to g.
template <class T>
inline void jacobian(const T* g, const T* n, T rstd, T* out, long width) {
  T mean = 0, along = 0;
  for (long i = 0; i < width; i++) {
    mean += g[i];
    along += g[i] * n[i];
  }
  mean /= width;
  along /= width;
  for (long i = 0; i < width; i++) out[i] = rstd * (g[i] - mean - n[i] * along);
}

// Gates of one chunk [C]; null: the term is off.
template <class T>
struct Gates {
  const T *theta, *eta, *alpha, *write;
  T keep(long t) const { return alpha ? 1 - alpha[t] : T(1); }
  T writes(long t) const { return write ? write[t] : T(1); }
};

// W_t = P_t W_0 + m_t S_0 - Σ_i K[t, i] θ_i g_i and S_C = h_C S_0 - Σ_i L[C, i] θ_i g_i (math.md §3), by recursion.
template <class T>
struct Decay {
  T *K, *L, *P, *m, *h;  // K, L [C, C]; P, m, h [C]
  T* shifted;            // [C, C]: row t is K[t - 1, :] θ, what the read of the token before t sees; row 0 is zero
  T *share, *push;       // [C]: K[C, :] θ and L[C, :] θ

  void fill(const Gates<T>& g, long C) {
    T p = 1, pushed = 0, carried = 1;
    for (long t = 0; t < C; t++) {
      const T keep = g.keep(t), writes = g.writes(t);
      T *Kt = K + t * C, *Lt = L + t * C;
      const T *Kp = Kt - C, *Lp = Lt - C;
      std::memset(Kt, 0, sizeof(T) * C);
      if (g.eta) {
        std::memset(Lt, 0, sizeof(T) * C);
        for (long i = 0; i < t; i++) {
          Lt[i] = g.eta[t] * Lp[i];
          Kt[i] = keep * Kp[i] + writes * Lt[i];
        }
        Lt[t] = 1;
        Kt[t] = writes;
        carried *= g.eta[t];
        pushed = keep * pushed + writes * carried;
      } else {
        for (long i = 0; i < t; i++) Kt[i] = keep * Kp[i];
        Kt[t] = 1;
      }
      p *= keep;
      P[t] = p;
      m[t] = pushed;
      h[t] = carried;
    }
    std::memset(shifted, 0, sizeof(T) * C);
    for (long t = 1; t < C; t++)
      for (long i = 0; i < C; i++) shifted[t * C + i] = K[(t - 1) * C + i] * g.theta[i];
    for (long i = 0; i < C; i++) {
      share[i] = K[(C - 1) * C + i] * g.theta[i];
      push[i] = g.eta ? L[(C - 1) * C + i] * g.theta[i] : 0;
    }
  }

  // Gradients of the gates. d_shifted [C, C] and d_share, d_push [C] belong to the fields above, d_P and d_m [C] to
  // theirs, d_h to h_C. g_K and g_L are scratch [C].
  void backward(const Gates<T>& g, long C, const T* d_shifted, const T* d_share, const T* d_push, const T* d_P,
                const T* d_m, T d_h, T* d_theta, T* d_eta, T* d_alpha, T* g_K, T* g_L) const {
    for (long i = 0; i < C; i++) {
      g_K[i] = 0;
      g_L[i] = g.eta ? d_push[i] * g.theta[i] : 0;
      d_theta[i] = g.eta ? d_push[i] * L[(C - 1) * C + i] : 0;
    }
    T g_P = 0, g_m = 0, g_h = d_h;
    for (long t = C - 1; t >= 0; t--) {
      const T* row = t == C - 1 ? d_share : d_shifted + (t + 1) * C;
      const T *Kt = K + t * C, *Kp = Kt - C, *Lp = L + (t - 1) * C;
      const T keep = g.keep(t), writes = g.writes(t);
      for (long i = 0; i <= t; i++) {
        d_theta[i] += row[i] * Kt[i];
        g_K[i] += row[i] * g.theta[i];
      }
      g_P += d_P[t];
      g_m += d_m[t];
      if (d_alpha) {
        const T past = (t ? g_P * P[t - 1] + g_m * m[t - 1] : g_P);
        d_alpha[t] = -(past + (t ? dot(g_K, Kp, t) : 0));
      }
      if (g.eta) {
        for (long i = 0; i <= t; i++) g_L[i] += writes * g_K[i];
        g_h += writes * g_m;
        d_eta[t] = t ? g_h * h[t - 1] + dot(g_L, Lp, t) : g_h;
        g_h *= g.eta[t];
        for (long i = 0; i < t; i++) g_L[i] *= g.eta[t];
      }
      g_P *= keep;
      g_m *= keep;
      for (long i = 0; i < t; i++) g_K[i] *= keep;
    }
  }
};
