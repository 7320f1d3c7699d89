// One token of every row, in place: a column more of the open chunk, row t of its kernels, and the read right after the
// write (decode.py has the formulas). What a chunk's end costs is not in here.
#pragma once
#include "scratch.h"

// B samples of `heads` rows, C columns of n numbers, head width D, hidden width H (D where the memory is one matrix).
// pulls: reads do not see the forgetting of the weights at the chunk's start. sums: C, and one more with momentum.
struct StepShape {
  long B, heads, C, n, D, H, activation, pulls, norm, momentum, sums;
  bool two() const { return activation != NONE; }
};

// Rows are [B * heads, ·], gain and bias [heads, D], column and active [B]; a pointer is null where the term is off.
// Columns hold a of every map, then δ of every map, then θ, η, α, w, as far as there are such.
template <class T>
struct StepTensors {
  const T *q, *k, *v, *theta, *eta, *alpha, *gain, *bias, *first, *last, *first_past, *last_past;
  T *tokens, *kernel, *push, *retained, *y;
  const int64_t* column;
  const bool* active;
};

template <class T>
struct StepScratch {
  T *z, *a, *slope, *e1, *h, *b, *o, *n, *g, *error;
  StepScratch(const StepShape& s, Arena<T>& arena) {
    for (T** p : {&z, &a, &slope, &e1, &h, &b}) *p = arena.take(s.H);
    for (T** p : {&o, &n, &g, &error}) *p = arena.take(s.D);
  }
};

// out = W x of a row-major W [rows, width]; the second form reads W once for two vectors.
template <class T>
[[gnu::noinline]] void apply(const T* __restrict W, const T* __restrict x, T* __restrict out, long rows, long width) {
  for (long r = 0; r < rows; r++) out[r] = dot(W + r * width, x, width);
}
template <class T>
[[gnu::noinline]] void apply(const T* __restrict W, const T* __restrict x, const T* __restrict y, T* __restrict of_x,
                             T* __restrict of_y, long rows, long width) {
  for (long r = 0; r < rows; r++) {
    const T* w = W + r * width;
    T a = 0, b = 0;
    for (long i = 0; i < width; i++) {
      a += w[i] * x[i];
      b += w[i] * y[i];
    }
    of_x[r] = a;
    of_y[r] = b;
  }
}

template <class T>
class Step {
 public:
  Step(const StepShape& s, const StepTensors<T>& t, long g, Arena<T>& arena) : s(s), t(t), g(g), x(s, arena) {}

  void run() {
    const long sample = g / s.heads;
    T* y = t.y + g * s.D;
    if (t.active && !t.active[sample]) {
      std::memset(y, 0, sizeof(T) * s.D);
      return;
    }
    at = t.column[sample];
    advance();
    const T *q = t.q + g * s.D, *k = t.k + g * s.D, *b = q;
    T *column = tokens(at), *a = column, *error = column + s.D;
    std::memcpy(column, k, sizeof(T) * s.D);
    if (s.two()) {
      a = column + s.D, error = column + s.D + 2 * s.H;
      apply(map(t.first), k, q, x.z, x.h, s.H, s.D);
      activate<true, false>(s.activation, x.z, a, x.slope, (T*)nullptr, s.H);
    }
    apply(map(t.last), a, x.o, s.D, s.H);
    errors(k, error);
    if (s.two()) {
      T* e1 = column + s.D + s.H;
      back(map(t.last), error, e1);
      for (long i = 0; i < s.H; i++) e1[i] *= x.slope[i];
      read(q, x.h, map(t.first_past), s.H, s.D, 0, s.D + s.H);
      activate<false, false>(s.activation, x.h, x.b, (T*)nullptr, (T*)nullptr, s.H);
      b = x.b;
    }
    apply(map(t.last), b, x.o, s.D, s.H);
    read(b, x.o, map(t.last_past), s.D, s.H, s.two() ? s.D : 0, error - column);
    finish(q, y);
  }

 private:
  const StepShape& s;
  const StepTensors<T>& t;
  const long g;
  StepScratch<T> x;
  long at = 0;
  T kept = 1, pushed = 0;
  T* weights = nullptr;  // K[t, :] θ

  T* tokens(long i) const { return t.tokens + (g * s.C + i) * s.n; }
  const T* map(const T* maps) const { return maps ? maps + g * s.H * s.D : nullptr; }

  // Row t of L, K and P from row t - 1, and the gates into the column.
  void advance() {
    const T theta = t.theta[g], keep = t.alpha ? 1 - t.alpha[g] : T(1);
    T* gate = tokens(at) + (s.two() ? 2 : 1) * (s.D + s.H);
    *gate++ = theta;
    weights = t.kernel + g * s.sums;
    if (s.momentum) {
      const T eta = *gate++ = t.eta[g];
      T* push = t.push + g * s.sums;
      for (long i = 0; i < at; i++) push[i] *= eta;
      push[at] = theta;
      push[s.C] *= eta;
      for (long i = 0; i < at; i++) weights[i] = keep * weights[i] + push[i];
      weights[s.C] = pushed = keep * weights[s.C] + push[s.C];
    } else {
      for (long i = 0; i < at; i++) weights[i] *= keep;
    }
    weights[at] = theta;
    if (t.alpha) {
      *gate++ = t.alpha[g];
      t.retained[g] *= keep;
      if (!s.pulls) kept = t.retained[g];
    }
    *gate = 1;
  }

  // ∂ℓ/∂f at the chunk's start, of M(k) - v.
  void errors(const T* k, T* error) const {
    const T* v = t.v + g * s.D;
    if (!s.norm) {
      for (long i = 0; i < s.D; i++) error[i] = 2 * (x.o[i] - v[i]);
      return;
    }
    const T *gain = t.gain + g % s.heads * s.D, *bias = t.bias + g % s.heads * s.D;
    const T rstd = normalise(x.o, x.n, s.D);
    for (long i = 0; i < s.D; i++) x.g[i] = 2 * gain[i] * (k[i] + x.n[i] * gain[i] + bias[i] - v[i]);
    jacobian(x.g, x.n, rstd, error, s.D);
  }

  // out = Wᵀ error, W [D, H].
  void back(const T* __restrict W, const T* __restrict error, T* __restrict out) const {
    std::memset(out, 0, sizeof(T) * s.H);
    for (long r = 0; r < s.D; r++)
      for (long i = 0; i < s.H; i++) out[i] += error[r] * W[r * s.H + i];
  }

  // out = kept out + m S x - Σ_i K[t, i] θ_i (a_i·x) δ_i, with a and δ at these places of the columns.
  void read(const T* __restrict in, T* __restrict out, const T* past, long rows, long width, long a, long error) const {
    for (long r = 0; r < rows; r++) out[r] *= kept;
    if (past)
      for (long r = 0; r < rows; r++) out[r] += pushed * dot(past + r * width, in, width);
    for (long i = 0; i <= at; i++) {
      const T* column = tokens(i);
      const T share = weights[i] * dot(column + a, in, width);
      const T* __restrict delta = column + error;
      for (long r = 0; r < rows; r++) out[r] -= share * delta[r];
    }
  }

  // M(q) from f(q).
  void finish(const T* q, T* y) const {
    if (!s.norm) {
      std::memcpy(y, x.o, sizeof(T) * s.D);
      return;
    }
    const T *gain = t.gain + g % s.heads * s.D, *bias = t.bias + g % s.heads * s.D;
    normalise(x.o, x.n, s.D);
    for (long i = 0; i < s.D; i++) y[i] = q[i] + x.n[i] * gain[i] + bias[i];
  }
};
