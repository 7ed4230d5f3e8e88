// Depthwise inner loops: one vector of channels, sliding along a row.
//
// A run computes QT neighbouring outputs at once (8 for filters up to 4 wide, 4 beyond): the taps of a filter row and
// the QT sums stay in registers, and every input vector is loaded once for all outputs it reaches, so a 3-wide filter at
// stride 1 costs 10 loads for 24 multiply-adds.
#pragma once

#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

constexpr int kMaxDepthwiseRows = 16;  // filter rows a run takes at once; taller filters go in several runs

template <class T> struct DepthwiseRun {
  const T* const* rows;       // source of output 0, tap 0, for each filter row
  const T* const* weights;    // tap 0 of each filter row
  int row_count;
  int64_t taps, tap_step, weight_step;  // tap_step: source elements from tap to tap
  int64_t outputs, output_step;         // output_step: source elements from output to output
  int64_t pixel;              // source elements from pixel to pixel (fixed-width runs: tap_step == pixel)
  T* out;
  int64_t out_step;
  bool accumulate;            // add to what `out` holds: later runs of a tall filter
  const T *scale, *shift;     // epilogue, or null
  bool relu;
  int lanes;                  // valid lanes
};

template <class T> CONVKIT_INLINE void finish_depthwise(const DepthwiseRun<T>& a, T* out, vec<T> sum) {
  bool whole = a.lanes == kLanes<T>;
  if (a.accumulate) sum += whole ? load(out) : load_n(out, a.lanes);
  if (a.scale != nullptr) sum *= whole ? load(a.scale) : load_n(a.scale, a.lanes);
  if (a.shift != nullptr) sum += whole ? load(a.shift) : load_n(a.shift, a.lanes);
  if (a.relu) sum = relu<T>(sum);
  if (whole) store(out, sum);
  else store_n(out, sum, a.lanes);
}

// TAPS taps, outputs STRIDE pixels apart.
// `plain`: nothing to do after the sum. Asked once a run: asked once an output, the epilogue's questions took three times
// as long as a 3x3 filter's arithmetic.
template <class T, int TAPS, int STRIDE, int QT, bool WHOLE>
CONVKIT_INLINE void depthwise_outputs(const DepthwiseRun<T>& a, int64_t q, bool plain) {
  auto fetch = [&](const T* p) { return WHOLE ? load(p) : load_n(p, a.lanes); };
  vec<T> sum[QT];
  CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[t] = vec<T>{};
  for (int r = 0; r < a.row_count; ++r) {
    const T* x = a.rows[r] + q * a.output_step;
    vec<T> w[TAPS];
    CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) w[s] = fetch(a.weights[r] + s * a.weight_step);
    CONVKIT_UNROLL for (int j = 0; j < (QT - 1) * STRIDE + TAPS; ++j) {
      // With a stride beyond the filter some pixels are between outputs.
      if (STRIDE > TAPS && j % STRIDE >= TAPS) continue;
      vec<T> xj = fetch(x + j * a.pixel);
      CONVKIT_UNROLL for (int t = 0; t < QT; ++t) {
        int s = j - t * STRIDE;
        if (s >= 0 && s < TAPS) sum[t] += xj * w[s];
      }
    }
  }
  T* out = a.out + q * a.out_step;
  int64_t step = a.out_step;
  if (WHOLE && plain) {
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) store(out + t * step, sum[t]);
  } else {
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) finish_depthwise(a, out + t * step, sum[t]);
  }
}

template <class T, int TAPS, int STRIDE> __attribute__((noinline)) void depthwise_run(const DepthwiseRun<T>& a) {
  constexpr int QT = TAPS <= 4 ? 8 : 4;
  bool plain = !a.accumulate && a.scale == nullptr && a.shift == nullptr && !a.relu;
  int64_t q = 0;
  if (a.lanes == kLanes<T>) {
    for (; q + QT <= a.outputs; q += QT) depthwise_outputs<T, TAPS, STRIDE, QT, true>(a, q, plain);
    if (QT == 8 && q + 4 <= a.outputs) depthwise_outputs<T, TAPS, STRIDE, 4, true>(a, q, plain), q += 4;
    for (; q < a.outputs; ++q) depthwise_outputs<T, TAPS, STRIDE, 1, true>(a, q, plain);
  } else {
    for (; q < a.outputs; ++q) depthwise_outputs<T, TAPS, STRIDE, 1, false>(a, q, plain);
  }
}

// Any number of taps, any step: wide filters, dilation, strides beyond 2, and the edges of an image.
template <class T> __attribute__((noinline)) void depthwise_run_any(const DepthwiseRun<T>& a) {
  bool whole = a.lanes == kLanes<T>;
  for (int64_t q = 0; q < a.outputs; ++q) {
    vec<T> sum{};
    for (int r = 0; r < a.row_count; ++r) {
      const T* x = a.rows[r] + q * a.output_step;
      const T* w = a.weights[r];
      for (int64_t s = 0; s < a.taps; ++s, x += a.tap_step, w += a.weight_step)
        sum += whole ? load(x) * load(w) : load_n(x, a.lanes) * load_n(w, a.lanes);
    }
    finish_depthwise(a, a.out + q * a.out_step, sum);
  }
}

template <class T> CONVKIT_INLINE void depthwise_dispatch(const DepthwiseRun<T>& a) {
  if (a.tap_step == a.pixel && a.output_step == a.pixel) switch (a.taps) {
      case 1: return depthwise_run<T, 1, 1>(a);
      case 2: return depthwise_run<T, 2, 1>(a);
      case 3: return depthwise_run<T, 3, 1>(a);
      case 4: return depthwise_run<T, 4, 1>(a);
      case 5: return depthwise_run<T, 5, 1>(a);
      case 7: return depthwise_run<T, 7, 1>(a);
    }
  if (a.tap_step == a.pixel && a.output_step == 2 * a.pixel) switch (a.taps) {
      case 3: return depthwise_run<T, 3, 2>(a);
      case 5: return depthwise_run<T, 5, 2>(a);
      case 7: return depthwise_run<T, 7, 2>(a);
    }
  depthwise_run_any(a);
}

// Sums for the weight gradient: for each tap, over a block of outputs, gradient times source.
template <class T> struct DepthwiseGradRun {
  const T *grad, *x;          // output 0 of row 0; tap 0
  int64_t rows, grad_row, x_row;        // elements from row to row
  int64_t outputs, grad_step, x_step;   // elements from output to output
  int64_t taps, tap_step;
  T* sums;                    // [tap], sum_step elements apart
  int64_t sum_step;
  int lanes;
};

template <class T, int TAPS, bool WHOLE> __attribute__((noinline)) void depthwise_grad_run(const DepthwiseGradRun<T>& a) {
  // Two sets of sums: few taps alone would not keep both multiply-add units busy, and shorter chains round less.
  constexpr int SETS = 2;
  auto fetch = [&](const T* p) { return WHOLE ? load(p) : load_n(p, a.lanes); };
  vec<T> sum[SETS][TAPS];
  CONVKIT_UNROLL for (int i = 0; i < SETS; ++i)
    CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) sum[i][s] = vec<T>{};
  for (int64_t p = 0; p < a.rows; ++p) {
    const T* g = a.grad + p * a.grad_row;
    const T* x = a.x + p * a.x_row;
    int64_t q = 0;
    for (; q + SETS <= a.outputs; q += SETS)
      CONVKIT_UNROLL for (int i = 0; i < SETS; ++i) {
        vec<T> gq = fetch(g);
        CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) sum[i][s] += gq * fetch(x + s * a.tap_step);
        g += a.grad_step;
        x += a.x_step;
      }
    for (; q < a.outputs; ++q, g += a.grad_step, x += a.x_step) {
      vec<T> gq = fetch(g);
      CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) sum[0][s] += gq * fetch(x + s * a.tap_step);
    }
  }
  CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) {
    T* to = a.sums + s * a.sum_step;
    vec<T> total = fetch(to) + (sum[0][s] + sum[1][s]);
    if (WHOLE) store(to, total);
    else store_n(to, total, a.lanes);
  }
}

template <class T, bool WHOLE> CONVKIT_INLINE void depthwise_grad_taps(const DepthwiseGradRun<T>& a) {
  switch (a.taps) {
    case 1: return depthwise_grad_run<T, 1, WHOLE>(a);
    case 2: return depthwise_grad_run<T, 2, WHOLE>(a);
    case 3: return depthwise_grad_run<T, 3, WHOLE>(a);
    case 4: return depthwise_grad_run<T, 4, WHOLE>(a);
    case 5: return depthwise_grad_run<T, 5, WHOLE>(a);
    case 6: return depthwise_grad_run<T, 6, WHOLE>(a);
    case 7: return depthwise_grad_run<T, 7, WHOLE>(a);
  }
}

// Any number of taps, up to seven at a time.
template <class T> CONVKIT_INLINE void depthwise_grad_dispatch(DepthwiseGradRun<T> a) {
  int64_t taps = a.taps;
  for (int64_t s = 0; s < taps; s += 7, a.x += 7 * a.tap_step, a.sums += 7 * a.sum_step) {
    a.taps = min_of<int64_t>(7, taps - s);
    if (a.lanes == kLanes<T>) depthwise_grad_taps<T, true>(a);
    else depthwise_grad_taps<T, false>(a);
  }
}

}  // namespace convkit::cpu::CONVKIT_ISA
