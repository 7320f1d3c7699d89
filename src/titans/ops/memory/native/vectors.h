// What lies around a memory's step, of a few vectors: linear maps, norms, convolutions, a feed-forward layer. With so few
// the weights are read from memory at every token, and BLAS takes three times as long for that as one pass over rows.
#pragma once
#include "scratch.h"

// out = x Wᵀ + bias, of x [B, width] and W [rows, width]; a null bias is none.
template <class T>
void linear(const T* __restrict x, const T* __restrict W, const T* bias, T* __restrict out, long B, long rows,
            long width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > 1 << 15)
  for (long r = 0; r < rows; r++)
    for (long b = 0; b < B; b++) out[b * rows + r] = dot(W + r * width, x + b * width, width) + (bias ? bias[r] : T(0));
}

// out = x / RMS(x) scale, of one vector; in place where out is x.
template <class T>
void rms_norm(const T* x, const T* scale, T* out, long width, double eps) {
  const T rms = 1 / std::sqrt(dot(x, x, width) / width + T(eps));
  for (long i = 0; i < width; i++) out[i] = x[i] * rms * scale[i];
}

template <class T>
void silu(T* x, long count) {
  for (long i = 0; i < count; i++) x[i] = x[i] / (1 + exponential(-x[i]));
}

// x to the given length, or where `least` is that length too, no longer than it.
template <class T>
void limit(T* x, long width, T length, T least) {
  const T found = std::sqrt(dot(x, x, width)), scale = length / (found > least ? found : least);
  for (long i = 0; i < width; i++) x[i] *= scale;
}

// The channels [first, first + count) of a causal convolution over the token `now` [channels] and the kernel - 1 before
// it, tail [kernel - 1, channels], with weights [kernel, channels].
template <class T>
void convolve(const T* now, const T* tail, const T* weights, long kernel, long channels, long first, long count,
              T* out) {
  std::memset(out, 0, sizeof(T) * count);
  for (long j = 0; j < kernel; j++) {
    const T *in = (j + 1 < kernel ? tail + j * channels : now) + first, *w = weights + j * channels + first;
    for (long i = 0; i < count; i++) out[i] += w[i] * in[i];
  }
}

// Its tail for the next token; the same as before where no token comes.
template <class T>
void remember(const T* now, const T* tail, long kernel, long channels, long first, long count, bool comes, T* after) {
  for (long j = 0; j + 1 < kernel; j++) {
    const T* in = !comes ? tail + j * channels : j + 2 < kernel ? tail + (j + 1) * channels : now;
    std::memcpy(after + j * channels + first, in + first, sizeof(T) * count);
  }
}

// out = x + down (SiLU(gate) ⊙ value), where [gate, value] = up (x / RMS(x) scale); x [B, width], up [2 hidden, width].
template <class T>
bool feedforward(const T* x, const T* scale, const T* up, const T* down, T* out, long B, long width, long hidden,
                 double eps, int threads, Arena<T>& arena) {
  if (!arena.reserve(B * (width + 3 * hidden) + 64)) return false;
  T *normed = arena.take(B * width), *wide = arena.take(2 * B * hidden), *inner = arena.take(B * hidden);
  for (long b = 0; b < B; b++) rms_norm(x + b * width, scale, normed + b * width, width, eps);
  linear(normed, up, (const T*)nullptr, wide, B, 2 * hidden, width, threads);
  for (long b = 0; b < B; b++) {
    const T *gate = wide + 2 * b * hidden, *value = gate + hidden;
    T* to = inner + b * hidden;
    for (long i = 0; i < hidden; i++) to[i] = value[i] * gate[i] / (1 + exponential(-gate[i]));
  }
  linear(inner, down, (const T*)nullptr, out, B, width, hidden, threads);
  for (long i = 0; i < B * width; i++) out[i] += x[i];
  return true;
}
