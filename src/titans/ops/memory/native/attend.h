// One token of every row through attention over a cache of fixed size, between its projections.
#pragma once
#include "vectors.h"

// B rows of H heads of width D. The cache has `fixed` columns that every token sees, then the token's own `circle`; with
// `beside`, a vector more per token stands in as many columns before those. kernel: taps of the convolution, 1 for none.
struct AttendShape {
  long B, H, D, columns, fixed, circle, kernel, beside;
  long d() const { return H * D; }
};

// projected [B, 3 d] are q, k and v before the convolution with weights conv [kernel, 3 d], tail [B, kernel - 1, 3 d];
// beside [B, 2 d] a further key and value, which it passes by; cos and sin [B, D / 2] turn the token's position. cache
// [B, H, columns, 2 D] holds keys and values side by side and is written into; hidden [B, columns] are columns that are
// not seen; column [B] is where the token goes, active [B] or null whether there is one.
template <class T>
struct AttendTensors {
  const T *projected, *tail, *conv, *beside, *cos, *sin;
  T *cache, *out, *new_tail;
  const int64_t* column;
  const bool *hidden, *active;
};

// Pairs (i, i + D / 2) turned; an odd D leaves its last number alone.
template <class T>
void turn(const T* x, const T* cos, const T* sin, T* out, long D) {
  const long pairs = D / 2;
  for (long i = 0; i < pairs; i++) {
    const T a = x[i], b = x[i + pairs];
    out[i] = a * cos[i] - b * sin[i];
    out[i + pairs] = b * cos[i] + a * sin[i];
  }
  if (D % 2) out[D - 1] = x[D - 1];
}

// One head: scratch [3 D + columns].
template <class T>
void attend(const AttendShape& s, const AttendTensors<T>& t, long g, T* scratch) {
  const long b = g / s.H, head = g % s.H, d = s.d(), wide = 3 * d, pairs = s.D / 2;
  const T *now = t.projected + b * wide, *cos = t.cos + b * pairs, *sin = t.sin + b * pairs;
  const bool comes = !t.active || t.active[b];
  T *part[3], *cache = t.cache + g * s.columns * 2 * s.D;
  for (long i = 0; i < 3; i++) {
    part[i] = scratch + i * s.D;
    const long first = i * d + head * s.D;
    if (!t.conv) {
      std::memcpy(part[i], now + first, sizeof(T) * s.D);
      continue;
    }
    const T* tail = t.tail + b * (s.kernel - 1) * wide;
    convolve(now, tail, t.conv, s.kernel, wide, first, s.D, part[i]);
    remember(now, tail, s.kernel, wide, first, s.D, comes, t.new_tail + b * (s.kernel - 1) * wide);
  }
  if (comes) {
    T* own = cache + (s.fixed + (s.beside ? s.circle : 0) + t.column[b]) * 2 * s.D;
    turn(part[1], cos, sin, own, s.D);
    std::memcpy(own + s.D, part[2], sizeof(T) * s.D);
    if (s.beside) {
      const T* other = t.beside + b * 2 * d + head * s.D;
      own -= s.circle * 2 * s.D;
      turn(other, cos, sin, own, s.D);
      std::memcpy(own + s.D, other + d, sizeof(T) * s.D);
    }
  }
  T *plain = part[0], *turned = part[1], *scores = scratch + 3 * s.D, *out = t.out + g * s.D;
  turn(plain, cos, sin, turned, s.D);
  const bool* hidden = t.hidden + b * s.columns;
  const T scale = 1 / std::sqrt(T(s.D));
  T highest = -std::numeric_limits<T>::infinity(), sum = 0;
  for (long n = 0; n < s.columns; n++) {
    if (hidden[n]) continue;
    scores[n] = scale * dot(n < s.fixed ? plain : turned, cache + n * 2 * s.D, s.D);
    highest = scores[n] > highest ? scores[n] : highest;
  }
  std::memset(out, 0, sizeof(T) * s.D);
  for (long n = 0; n < s.columns; n++) {
    if (hidden[n]) continue;
    const T chance = exponential(scores[n] - highest), *value = cache + n * 2 * s.D + s.D;
    sum += chance;
    for (long i = 0; i < s.D; i++) out[i] += chance * value[i];
  }
  for (long i = 0; i < s.D; i++) out[i] /= sum;
}
