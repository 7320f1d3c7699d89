// What Python calls, through ctypes. The scan over whole chunks goes one row (a sample's head) at a time: weights, momentum and a chunk's activations of one
// row stay in the processor's cache between two products, and rows need no synchronisation.
#include <algorithm>
#include <atomic>

#include "around.h"
#include "attend.h"
#include "backward.h"
#include "step.h"

namespace {

template <class T>
Arena<T>& arena(int which) {
  static thread_local Arena<T> mine[2];
  return mine[which];
}

template <class T>
int forward(const Shape& s, const Tensors<T>& t, int threads) {
  std::atomic<int> failed{0};
#pragma omp parallel for num_threads(threads) if (s.G > 1) schedule(dynamic, 1)
  for (long g = 0; g < s.G; g++) {
    if (!prepare<ForwardScratch<T>>(s, arena<T>(0))) {
      failed = 1;
      continue;
    }
    Forward<T>(Row<T>{s, t, g}, arena<T>(0)).run();
  }
  return failed;
}

template <class T>
int backward(const Shape& s, const Tensors<T>& t, int threads) {
  std::atomic<int> failed{0};
#pragma omp parallel for num_threads(threads) if (s.G > 1) schedule(dynamic, 1)
  for (long g = 0; g < s.G; g++) {
    if (!prepare<ForwardScratch<T>>(s, arena<T>(0)) || !prepare<BackwardScratch<T>>(s, arena<T>(1))) {
      failed = 1;
      continue;
    }
    const Row<T> row{s, t, g};
    Forward<T> again(row, arena<T>(0));
    Backward<T>(row, arena<T>(1), again).run();
  }
  return failed;
}

Shape shape(const int64_t* x) {
  return {long(x[0]), long(x[1]), long(x[2]), long(x[3]), long(x[4]), long(x[5]),
          long(x[6]), long(x[7]), long(x[8]), long(x[9]), long(x[10])};
}

template <class T>
Tensors<T> tensors(void* const* p) {
  auto in = [&](int i) { return static_cast<const T*>(p[i]); };
  auto out = [&](int i) { return static_cast<T*>(p[i]); };
  return {in(0),   in(1),   in(2),   in(3),   in(4),   in(5),   in(6),   in(7),   in(8),
          in(9),   out(10), out(11), out(12), out(13), in(14),  in(15),  out(16), out(17),
          out(18), out(19), out(20), out(21), out(22), out(23), out(24)};
}

template <class T>
int run(const int64_t* sizes, void* const* pointers, int back, int threads) {
  const Shape s = shape(sizes);
  const Tensors<T> t = tensors<T>(pointers);
  return back ? backward(s, t, threads) : forward(s, t, threads);
}

// work(g, arena) for every row g, with a thread's arena of `scratch` elements. Returns 1 where there was no memory.
template <class T, class Work>
int each(long rows, long scratch, int threads, Work work) {
  std::atomic<int> failed{0};
#pragma omp parallel for num_threads(threads) if (rows > 1 && threads > 1)
  for (long g = 0; g < rows; g++) {
    if (arena<T>(0).reserve(scratch))
      work(g, arena<T>(0));
    else
      failed = 1;
  }
  return failed;
}

StepShape step_shape(const int64_t* x, const double* numbers) {
  auto at = [&](int i) { return long(x[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11), at(12), numbers[0],
          numbers[1]};
}

template <class T>
StepTensors<T> step_tensors(void* const* p, bool alpha) {
  auto in = [&](int i) { return static_cast<const T*>(p[i]); };
  auto out = [&](int i) { return static_cast<T*>(p[i]); };
  return {in(0),   in(1),   in(2),   in(3),   in(4),   in(5),   in(6),
          in(7),   in(8),   in(9),   in(10),  in(11),  out(12), out(13),
          out(14), out(15), out(16), out(17), out(18), out(19), static_cast<const int64_t*>(p[20]),
          static_cast<const bool*>(p[21]), alpha};
}

template <class T>
int step(const int64_t* x, const double* numbers, void* const* p, bool reads, int threads) {
  const StepShape s = step_shape(x, numbers);
  const StepTensors<T> t = step_tensors<T>(p, x[13]);
  Arena<T> counter;
  StepScratch<T>(s, counter);
  const int failed = each<T>(s.B * s.heads, counter.used(), threads, [&](long g, Arena<T>& arena) {
    if (reads)
      recall(s, t, g, arena);
    else
      Step<T>(s, t, g, arena).run();
  });
  for (long sample = 0; sample < s.B; sample++) {
    T* out = t.out + sample * s.d();
    if (reads)
      rms_norm(out, t.scale, out, s.d(), s.eps);
    else
      gated(s, t, sample);
  }
  return failed;
}

template <class T>
int attention(const int64_t* x, void* const* p, int threads) {
  const AttendShape s{long(x[0]), long(x[1]), long(x[2]), long(x[3]), long(x[4]), long(x[5]), long(x[6]), long(x[7])};
  auto in = [&](int i) { return static_cast<const T*>(p[i]); };
  auto out = [&](int i) { return static_cast<T*>(p[i]); };
  const AttendTensors<T> t{in(0), in(1), in(2), in(3), in(4), in(5), out(6), out(7), out(8),
                           static_cast<const int64_t*>(p[9]), static_cast<const bool*>(p[10]),
                           static_cast<const bool*>(p[11])};
  return each<T>(s.B * s.H, 3 * s.D + s.columns + 64, threads,
                 [&](long g, Arena<T>& arena) { attend(s, t, g, arena.take(3 * s.D + s.columns)); });
}

template <class T>
int vectors(const int64_t* n, double eps, void* const* p, int what, int threads) {
  auto in = [&](int i) { return static_cast<const T*>(p[i]); };
  T* out = static_cast<T*>(p[0]);
  const long B = n[0], width = n[1], other = n[2];
  if (what == 0) {
    linear(in(1), in(2), in(3), out, B, other, width, threads);
  } else if (what == 1) {
    for (long b = 0; b < B; b++) rms_norm(in(1) + b * width, in(2), out + b * width, width, eps);
  } else {
    return !feedforward(in(1), in(2), in(3), in(4), out, B, width, other, eps, threads, arena<T>(0));
  }
  return 0;
}

template <class T>
void all_heads(const int64_t* n, double longest, void* const* p, bool back, int threads) {
  const HeadsShape s{long(n[0]), long(n[1]), long(n[2]), long(n[3]), long(n[4]), long(n[5]), n + 6, longest};
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  HeadsTensors<T> t{at(0), at(1), at(2), {}, at(3), {}, at(3), at(4), at(5), at(6)};
  for (long part = 0; part < s.parts; part++) t.out[part] = at(7 + part), t.d_out[part] = at(7 + part);
  back ? heads_backward(s, t, threads) : heads(s, t, threads);
}

template <class T>
void around(const int64_t* n, double number, void* const* p, int what, int threads) {
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  const NormShape s{long(n[0]), long(n[1]), long(n[2]), long(n[3]), number};
  if (what < 2) all_heads<T>(n, number, p, what == 1, threads);
  if (what == 2) norm<T>(s, at(0), at(1), at(2), at(3), threads);
  if (what == 3) norm_backward<T>(s, at(0), at(1), at(2), at(3), at(4), at(5), at(6), threads);
  if (what == 4) swiglu<T>(at(0), at(1), at(2), n[0], n[1], threads);
}

}  // namespace

// sizes: the fields of Shape; pointers: those of Tensors. Returns 0, or 1 where there was no memory for scratch.
extern "C" int titans_scan(const int64_t* sizes, void* const* pointers, int is_double, int back, int threads) {
  return is_double ? run<double>(sizes, pointers, back, threads) : run<float>(sizes, pointers, back, threads);
}

// One token of every row, or with `reads` a read of a vector each. sizes and numbers: the fields of StepShape, then
// whether there is an α; pointers: those of StepTensors. Returns as titans_scan does, as all that follow.
extern "C" int titans_step(const int64_t* sizes, const double* numbers, void* const* pointers, int is_double, int reads,
                           int threads) {
  return is_double ? step<double>(sizes, numbers, pointers, reads, threads)
                   : step<float>(sizes, numbers, pointers, reads, threads);
}

// sizes: the fields of AttendShape; pointers: those of AttendTensors.
extern "C" int titans_attend(const int64_t* sizes, void* const* pointers, int is_double, int threads) {
  return is_double ? attention<double>(sizes, pointers, threads) : attention<float>(sizes, pointers, threads);
}

// 0 linear, 1 rms_norm, 2 feedforward. sizes: B, width, and the width of the output or the hidden layer; pointers: the
// output, then the inputs in the order of vectors.h.
extern "C" int titans_vectors(const int64_t* sizes, double eps, void* const* pointers, int is_double, int what,
                              int threads) {
  return is_double ? vectors<double>(sizes, eps, pointers, what, threads)
                   : vectors<float>(sizes, eps, pointers, what, threads);
}

// What around.h has, 0 heads, 1 heads_backward, 2 norm, 3 norm_backward, 4 swiglu: its sizes, its number, and its tensors
// in the order of `all_heads` or of its arguments.
extern "C" void titans_around(const int64_t* sizes, double number, void* const* pointers, int is_double, int what,
                              int threads) {
  is_double ? around<double>(sizes, number, pointers, what, threads)
            : around<float>(sizes, number, pointers, what, threads);
}

// Elements per row and chunk that the forward pass leaves behind.
extern "C" int64_t titans_scan_acts(const int64_t* sizes) { return shape(sizes).acts(); }
