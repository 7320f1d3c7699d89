// The scan over whole chunks, one row (a sample's head) at a time: weights, momentum and a chunk's activations of one
// row stay in the processor's cache between two products, and rows need no synchronisation. Called through ctypes.
#include <algorithm>
#include <atomic>

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

template <class T>
int step(const int64_t* x, const double* numbers, void* const* p, int threads) {
  auto long_of = [&](int i) { return long(x[i]); };
  const StepShape s{long_of(0), long_of(1), long_of(2),  long_of(3),  long_of(4),  long_of(5), long_of(6), long_of(7),
                    long_of(8), long_of(9), long_of(10), long_of(11), long_of(12), numbers[0], numbers[1]};
  auto in = [&](int i) { return static_cast<const T*>(p[i]); };
  auto out = [&](int i) { return static_cast<T*>(p[i]); };
  const StepTensors<T> t{in(0),   in(1),   in(2),   in(3),   in(4),   in(5),   in(6),
                         in(7),   in(8),   in(9),   in(10),  in(11),  out(12), out(13),
                         out(14), out(15), out(16), out(17), out(18), out(19), static_cast<const int64_t*>(p[20]),
                         static_cast<const bool*>(p[21]), x[13] != 0};
  std::atomic<int> failed{0};
  const long rows = s.B * s.heads;
#pragma omp parallel for num_threads(threads) if (rows > 1 && threads > 1)
  for (long g = 0; g < rows; g++) {
    Arena<T> counter;
    StepScratch<T>(s, counter);
    if (arena<T>(0).reserve(counter.used()))
      Step<T>(s, t, g, arena<T>(0)).run();
    else
      failed = 1;
  }
  for (long sample = 0; sample < s.B; sample++) gated(s, t, sample);
  return failed;
}

}  // namespace

// sizes: the fields of Shape; pointers: those of Tensors. Returns 0, or 1 where there was no memory for scratch.
extern "C" int titans_scan(const int64_t* sizes, void* const* pointers, int is_double, int back, int threads) {
  return is_double ? run<double>(sizes, pointers, back, threads) : run<float>(sizes, pointers, back, threads);
}

// One token of every row; sizes and numbers: the fields of StepShape, then whether there is an α; pointers: those of
// StepTensors. Returns as titans_scan does.
extern "C" int titans_step(const int64_t* sizes, const double* numbers, void* const* pointers, int is_double,
                           int threads) {
  return is_double ? step<double>(sizes, numbers, pointers, threads) : step<float>(sizes, numbers, pointers, threads);
}

// Elements per row and chunk that the forward pass leaves behind.
extern "C" int64_t titans_scan_acts(const int64_t* sizes) { return shape(sizes).acts(); }
