// One token of every row, in place: a column more of the open chunk, row t of its kernels, and the read right after the
// write (decode.py has the formulas). What a chunk's end costs is not in here.
#pragma once
#include "vectors.h"

// B samples of `heads` rows, C columns of n numbers, head width D, hidden width H (D where the memory is one matrix).
// pulls: reads do not see the forgetting of the weights at the chunk's start. sums: C, and one more with momentum.
// kernel: taps of the convolution, 1 and no weights for none. silu: after it.
struct StepShape {
  long B, heads, C, n, D, H, activation, pulls, norm, momentum, sums, kernel, silu;
  double theta_max, eps;
  bool two() const { return activation != NONE; }
  long d() const { return heads * D; }
};

// Rows are [B * heads, ·], gain and bias [heads, D], column and active [B]; a pointer is null where the term is off.
// Columns hold a of every map, then δ of every map, then θ, η, α, w, as far as there are such. projected [B, 3 d] are a
// token's q, k and v before the convolution with weights conv [kernel, 3 d], tail [B, kernel - 1, 3 d] its last inputs;
// logits [B, heads * gates] those of θ, η, α; gate [B, d] and scale [d] those of the output.
template <class T>
struct StepTensors {
  const T *projected, *tail, *conv, *logits, *gate, *scale, *gain, *bias, *first, *last, *first_past, *last_past;
  T *tokens, *kernel, *push, *retained, *q, *y, *out, *new_tail;
  const int64_t* column;
  const bool* active;
  bool alpha;
};

template <class T>
struct StepScratch {
  T *z, *slope, *h, *b, *v, *o, *n, *g;
  StepScratch(const StepShape& s, Arena<T>& arena) {
    for (T** p : {&z, &slope, &h, &b}) *p = arena.take(s.H);
    for (T** p : {&v, &o, &n, &g}) *p = arena.take(s.D);
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

// M(x) from f(x) = o: o itself, or with the wrapper's gain x + LN(o) gain + bias; n is scratch.
template <class T>
void wrapped(const T* x, const T* o, const T* gain, const T* bias, T* n, T* y, long D) {
  if (!gain) {
    std::memcpy(y, o, sizeof(T) * D);
    return;
  }
  normalise(o, n, D);
  for (long i = 0; i < D; i++) y[i] = x[i] + n[i] * gain[i] + bias[i];
}

template <class T>
class Step {
 public:
  Step(const StepShape& s, const StepTensors<T>& t, long g, Arena<T>& arena) : s(s), t(t), g(g), x(s, arena) {}

  void run() {
    T *y = t.y + g * s.D, *q = t.q + g * s.D;
    if (t.active && !t.active[sample]) {
      std::memset(y, 0, sizeof(T) * s.D);
      std::memset(q, 0, sizeof(T) * s.D);
      for (long part = 0; part < 3; part++) kept_inputs(part, false);
      return;
    }
    at = t.column[sample];
    advance();
    T *column = tokens(at), *a = column, *error = column + s.D;
    const T *k = column, *b = q;
    const T longest = std::sqrt(T(s.D));
    convolved(0, q), convolved(1, column), convolved(2, x.v);
    limit(q, s.D, T(1), T(1e-12)), limit(column, s.D, T(1), T(1e-12));
    if (s.norm) limit(x.v, s.D, longest, longest);
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
  const long g, sample = g / s.heads, head = g % s.heads;
  StepScratch<T> x;
  long at = 0;
  T kept = 1, pushed = 0;
  T* weights = nullptr;  // K[t, :] θ

  T* tokens(long i) const { return t.tokens + (g * s.C + i) * s.n; }
  const T* map(const T* maps) const { return maps ? maps + g * s.H * s.D : nullptr; }

  // q, k or v of this head, out of the convolution.
  void convolved(long part, T* out) const {
    const long wide = 3 * s.d(), first = part * s.d() + head * s.D;
    const T *now = t.projected + sample * wide, *tail = t.tail + sample * (s.kernel - 1) * wide;
    if (!t.conv)
      std::memcpy(out, now + first, sizeof(T) * s.D);
    else
      convolve(now, tail, t.conv, s.kernel, wide, first, s.D, out);
    kept_inputs(part, true);
    if (s.silu) silu(out, s.D);
  }

  // The convolution's new tail; the old one where no token comes.
  void kept_inputs(long part, bool comes) const {
    if (!t.conv) return;
    const long wide = 3 * s.d(), held = sample * (s.kernel - 1) * wide;
    remember(t.projected + sample * wide, t.tail + held, s.kernel, wide, part * s.d() + head * s.D, s.D, comes,
             t.new_tail + held);
  }

  T gate(long which) const {
    const long gates = 1 + s.momentum + t.alpha;
    return 1 / (1 + exponential(-t.logits[(sample * gates + which) * s.heads + head]));
  }

  // Row t of L, K and P from row t - 1, and the gates into the column.
  void advance() {
    const T eta = s.momentum ? gate(1) : T(0), alpha = t.alpha ? gate(1 + s.momentum) : T(0), keep = 1 - alpha;
    const T theta = gate(0) * (T(s.theta_max) * (1 - eta));
    T* place = tokens(at) + (s.two() ? 2 : 1) * (s.D + s.H);
    *place++ = theta;
    weights = t.kernel + g * s.sums;
    if (s.momentum) {
      *place++ = eta;
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
      *place++ = alpha;
      t.retained[g] *= keep;
      if (!s.pulls) kept = t.retained[g];
    }
    *place = 1;
  }

  // ∂ℓ/∂f at the chunk's start, of M(k) - v.
  void errors(const T* k, T* error) const {
    const T* v = x.v;
    if (!s.norm) {
      for (long i = 0; i < s.D; i++) error[i] = 2 * (x.o[i] - v[i]);
      return;
    }
    const T *gain = t.gain + head * s.D, *bias = t.bias + head * s.D;
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

  void finish(const T* q, T* y) const {
    const long first = head * s.D;
    wrapped(q, x.o, s.norm ? t.gain + first : nullptr, t.bias + first, x.n, y, s.D);
  }
};

// RMSNorm of a sample's reads, times σ(gate): what the layer projects.
template <class T>
void gated(const StepShape& s, const StepTensors<T>& t, long sample) {
  const long d = s.d();
  const T* gate = t.gate + sample * d;
  T* out = t.out + sample * d;
  rms_norm(t.y + sample * d, t.scale, out, d, s.eps);
  for (long i = 0; i < d; i++) out[i] /= 1 + exponential(-gate[i]);
}

// A read of q at given weights, between its projection and what follows the norm: of StepShape and StepTensors what is
// named here, all [B, d] wide where a step's are three times that. y is written to `out`.
template <class T>
void recall(const StepShape& s, const StepTensors<T>& t, long g, Arena<T>& arena) {
  StepScratch<T> x(s, arena);
  const long sample = g / s.heads, head = g % s.heads, d = s.d(), first = head * s.D, held = sample * (s.kernel - 1) * d;
  const T *now = t.projected + sample * d, *in = x.v;
  if (!t.conv) {
    std::memcpy(x.v, now + first, sizeof(T) * s.D);
  } else {
    convolve(now, t.tail + held, t.conv, s.kernel, d, first, s.D, x.v);
    remember(now, t.tail + held, s.kernel, d, first, s.D, !t.active || t.active[sample], t.new_tail + held);
  }
  if (s.silu) silu(x.v, s.D);
  limit(x.v, s.D, T(1), T(1e-12));
  if (s.two()) {
    apply(t.first + g * s.H * s.D, in, x.z, s.H, s.D);
    activate<false, false>(s.activation, x.z, x.b, (T*)nullptr, (T*)nullptr, s.H);
    in = x.b;
  }
  apply(t.last + g * s.H * s.D, in, x.o, s.D, s.H);
  wrapped(x.v, x.o, s.norm ? t.gain + first : nullptr, t.bias + first, x.n, t.out + sample * d + first, s.D);
}
