// Depthwise inner loops: vectors of channels, sliding along a row.
//
// QT neighbouring outputs are computed at once, 8 where the row has them: their sums and the taps of one filter row stay
// in registers, and every source vector is loaded once for all the outputs it reaches, so a 3-wide filter at stride 1
// costs 10 loads for 24 multiply-adds, and 8 independent sums are what it takes to keep two multiply-add units busy.
// Blocks of outputs that see the edge of the image skip what is outside of it; all others ask no questions.
#pragma once

#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

constexpr int kMaxDepthwiseRows = 16;  // filter rows a run takes at once; taller filters go in several runs

// A row of outputs: some of its columns, all channels of a block.
template <class T> struct DepthwiseRow {
  const T* rows[kMaxDepthwiseRows];     // source of output 0, tap 0, first channel, by filter row; may be off the image
  const T* weights[kMaxDepthwiseRows];  // tap 0 of the first vector of channels, by filter row
  int row_count;
  int64_t taps, weight_step, weight_vector;  // elements of weight from tap to tap and from vector to vector
  int64_t tap_pixels, output_pixels;    // source pixels from tap to tap and from output to output
  int64_t pixel;                        // source elements from pixel to pixel
  int64_t origin, columns;              // column of output 0, tap 0; columns of the source that exist
  int64_t first, last;                  // outputs to compute
  int64_t channels;
  T* out;                               // output 0
  int64_t out_step;
  int64_t ahead;                        // elements from the last filter row to the source row worth fetching early, or 0
  bool accumulate;                      // add to what `out` holds: later runs of a tall filter
  bool streamed;                        // write past the caches; `out` and out_step are whole vectors then
  const T *scale, *shift;               // per channel, or null
  const T* residual;                    // of output 0, in the order of `out`, or null
  bool relu;
};

// Outputs [q, q + count), count <= QT, of the vector of channels at `channel`. EDGE: bit j of `inside` says whether source
// pixel j of the block exists.
template <class T, int TAPS, int STRIDE, int QT, bool EDGE, bool WHOLE>
CONVKIT_INLINE void depthwise_outputs(const DepthwiseRow<T>& a, int64_t q, int count, uint32_t inside, int64_t channel, int lanes) {
  constexpr int L = kLanes<T>, PIXELS = (QT - 1) * STRIDE + TAPS;
  auto fetch = [&](const T* p) { return WHOLE ? load(p) : load_n(p, lanes); };
  vec<T> sum[QT];
  CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[t] = vec<T>{};
  int64_t from = q * STRIDE * a.pixel + channel;
  for (int r = 0; r < a.row_count; ++r) {
    const T* x = a.rows[r] + from;
    const T* taps = a.weights[r] + channel / L * a.weight_vector;
    vec<T> w[TAPS];
    CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) w[s] = held(load(taps + s * a.weight_step));
    CONVKIT_UNROLL for (int j = 0; j < PIXELS; ++j, x = held(x + a.pixel)) {
      if (EDGE && (inside & 1u << j) == 0) continue;
      // With a stride beyond the filter some pixels are between outputs.
      if (STRIDE > TAPS && j % STRIDE >= TAPS) continue;
      vec<T> xj = held(fetch(x));
      CONVKIT_UNROLL for (int t = 0; t < QT; ++t) {
        int s = j - t * STRIDE;
        if (s >= 0 && s < TAPS) sum[t] += xj * w[s];
      }
    }
  }
  if (a.ahead != 0) {
    const T* next = a.rows[a.row_count - 1] + from + a.ahead;
    CONVKIT_UNROLL for (int j = 0; j < QT * STRIDE; ++j, next = held(next + a.pixel)) __builtin_prefetch(next);
  }
  T* out = a.out + q * a.out_step + channel;
  int64_t out_step = a.out_step;
  bool streamed = a.streamed;
  if (a.accumulate)
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) if (!EDGE || t < count) sum[t] += fetch(out + t * out_step);
  if (a.scale != nullptr) {
    vec<T> scale = fetch(a.scale + channel);
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[t] *= scale;
  }
  if (a.shift != nullptr) {
    vec<T> shift = fetch(a.shift + channel);
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[t] += shift;
  }
  if (a.residual != nullptr) {
    const T* residual = a.residual + q * out_step + channel;
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) if (!EDGE || t < count) sum[t] += fetch(residual + t * out_step);
  }
  if (a.relu)
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[t] = relu<T>(sum[t]);
  CONVKIT_UNROLL for (int t = 0; t < QT; ++t, out += out_step) {
    if (EDGE && t >= count) break;
    if (!WHOLE) store_n(out, sum[t], lanes);
    else if (streamed) stream(out, sum[t]);
    else store(out, sum[t]);
  }
}

template <class T, int TAPS, int STRIDE, int QT> __attribute__((noinline)) void depthwise_row(const DepthwiseRow<T>& a) {
  constexpr int L = kLanes<T>, PIXELS = (QT - 1) * STRIDE + TAPS;
  int64_t whole = a.channels / L * L;
  for (int64_t q = a.first; q < a.last; q += QT) {
    int count = int(min_of<int64_t>(QT, a.last - q));
    if (count < QT && a.last - QT >= a.first && !a.accumulate) q = a.last - QT, count = QT;  // some outputs twice
    int64_t column = a.origin + q * STRIDE;
    int64_t begin = max_of<int64_t>(0, -column), end = max_of(begin, min_of<int64_t>(PIXELS, a.columns - column));
    uint32_t inside = begin >= PIXELS ? 0 : uint32_t((uint64_t(1) << end) - (uint64_t(1) << begin));
    if (count == QT && begin == 0 && end == PIXELS)
      for (int64_t c = 0; c < whole; c += L) depthwise_outputs<T, TAPS, STRIDE, QT, false, true>(a, q, QT, inside, c, L);
    else
      for (int64_t c = 0; c < whole; c += L) depthwise_outputs<T, TAPS, STRIDE, QT, true, true>(a, q, count, inside, c, L);
    if (whole < a.channels) depthwise_outputs<T, TAPS, STRIDE, QT, true, false>(a, q, count, inside, whole, int(a.channels - whole));
  }
}

// Any number of taps at any step: dilation, wide filters, strides beyond 2.
template <class T> __attribute__((noinline)) void depthwise_row_any(const DepthwiseRow<T>& a) {
  constexpr int L = kLanes<T>;
  for (int64_t q = a.first; q < a.last; ++q)
    for (int64_t c = 0; c < a.channels; c += L) {
      int lanes = int(min_of<int64_t>(L, a.channels - c));
      vec<T> sum{};
      for (int r = 0; r < a.row_count; ++r) {
        const T* w = a.weights[r] + c / L * a.weight_vector;
        for (int64_t s = 0; s < a.taps; ++s) {
          int64_t at = q * a.output_pixels + s * a.tap_pixels;
          if (a.origin + at < 0 || a.origin + at >= a.columns) continue;
          const T* x = a.rows[r] + at * a.pixel + c;
          sum += (lanes == L ? load(x) : load_n(x, lanes)) * load(w + s * a.weight_step);
        }
      }
      T* out = a.out + q * a.out_step + c;
      auto fetch = [&](const T* p) { return lanes == L ? load(p) : load_n(p, lanes); };
      if (a.accumulate) sum += fetch(out);
      if (a.scale != nullptr) sum *= fetch(a.scale + c);
      if (a.shift != nullptr) sum += fetch(a.shift + c);
      if (a.residual != nullptr) sum += fetch(a.residual + q * a.out_step + c);
      if (a.relu) sum = relu<T>(sum);
      if (lanes != L) store_n(out, sum, lanes);
      else if (a.streamed) stream(out, sum);
      else store(out, sum);
    }
}

template <class T, int TAPS, int STRIDE> CONVKIT_INLINE void depthwise_row_wide(const DepthwiseRow<T>& a) {
  return a.last - a.first > 4 ? depthwise_row<T, TAPS, STRIDE, 8>(a) : depthwise_row<T, TAPS, STRIDE, 4>(a);
}

template <class T> CONVKIT_INLINE void depthwise_dispatch(const DepthwiseRow<T>& a) {
  if (a.tap_pixels == 1 && a.output_pixels == 1) switch (a.taps) {
      case 1: return depthwise_row_wide<T, 1, 1>(a);
      case 2: return depthwise_row_wide<T, 2, 1>(a);
      case 3: return depthwise_row_wide<T, 3, 1>(a);
      case 4: return depthwise_row_wide<T, 4, 1>(a);
      case 5: return depthwise_row_wide<T, 5, 1>(a);
      case 7: return depthwise_row_wide<T, 7, 1>(a);
    }
  if (a.tap_pixels == 1 && a.output_pixels == 2) switch (a.taps) {
      case 3: return depthwise_row_wide<T, 3, 2>(a);
      case 5: return depthwise_row_wide<T, 5, 2>(a);
      case 7: return depthwise_row_wide<T, 7, 2>(a);
    }
  depthwise_row_any(a);
}

// The weight gradient of one vector of channels over a rectangle of outputs: for each tap, the sum of gradient times source.
template <class T> struct DepthwiseGrad {
  const T *grad, *x;                       // output (0, 0); source of output (0, 0), tap (0, 0), which may be off the image
  int64_t first_row, last_row, first, last;  // outputs
  int64_t grad_row, grad_pixel;            // elements
  int64_t row, pixel;                      // elements of x
  int64_t stride_h, stride_w, dilation_h, dilation_w, filter_h, filter_w;
  int64_t origin_h, origin_w, rows, columns;  // source of output 0, tap 0; rows and columns that exist
  int64_t grad_ahead, ahead;               // elements from what is used to what is asked of memory meanwhile, or 0
  T* sums;                                 // [filter_h][filter_w][lanes]
  int lanes;
};

// Registers that hold sums; with G gradients and a source vector they fill the register file.
constexpr int kGradSums = kVectorBytes == 64 ? 28 : 10;
template <int TAPS> constexpr int kGradRows = kGradSums / TAPS < 1 ? 1 : (kGradSums / TAPS < TAPS ? kGradSums / TAPS : TAPS);

// Taps [r0, r0 + kGradRows) x [s0, s0 + taps), taps <= TAPS. STRIDE 1 and 2 (undilated): G neighbouring outputs share the
// source vectors they have in common, so that 3 x 3 taps cost 22 loads for 36 multiply-adds in 9 sums; blocks at the edge
// of the image skip what is outside. STRIDE 0: anything, an output at a time.
template <class T, int TAPS, int STRIDE, bool WHOLE>
__attribute__((noinline)) void depthwise_grad(const DepthwiseGrad<T>& a, int64_t r0, int64_t s0, int64_t taps) {
  constexpr int L = kLanes<T>, ROWS = kGradRows<TAPS>, G = ROWS * TAPS + 5 > (kVectorBytes == 64 ? 32 : 16) ? 2 : 4;
  auto fetch = [&](const T* p) { return WHOLE ? load(p) : load_n(p, a.lanes); };
  vec<T> sum[ROWS][TAPS];
  CONVKIT_UNROLL for (int r = 0; r < ROWS; ++r)
    CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) sum[r][s] = vec<T>{};
  int64_t filter_rows = min_of<int64_t>(ROWS, a.filter_h - r0);
  int64_t tap_row = a.dilation_h * a.row, tap_step = a.dilation_w * a.pixel;
  for (int64_t i = a.first_row; i < a.last_row; ++i) {
    int64_t y = a.origin_h + i * a.stride_h + r0 * a.dilation_h;  // source row of the first filter row
    int64_t begin = 0, end = filter_rows;
    while (begin < end && y + begin * a.dilation_h < 0) ++begin;
    while (begin < end && y + (end - 1) * a.dilation_h >= a.rows) --end;
    if (begin == end) continue;
    const T* g = a.grad + i * a.grad_row;
    const T* x = a.x + (i * a.stride_h + r0 * a.dilation_h) * a.row + s0 * tap_step;
    if constexpr (STRIDE != 0) {
      constexpr int PIXELS = (G - 1) * STRIDE + TAPS;
      for (int64_t q = a.first; q < a.last; q += G) {
        int64_t column = a.origin_w + q * STRIDE;
        const T *gq = g + q * a.grad_pixel, *xq = x + q * STRIDE * a.pixel;
        auto block = [&](auto edge, int64_t count, int64_t left, int64_t right) __attribute__((always_inline)) {
          vec<T> grad[G];
          CONVKIT_UNROLL for (int t = 0; t < G; ++t) grad[t] = !edge.value || t < count ? held(fetch(gq + t * a.grad_pixel)) : vec<T>{};
          CONVKIT_UNROLL for (int r = 0; r < ROWS; ++r) {
            if (r < begin || r >= end) continue;
            const T* line = xq + r * tap_row;
            CONVKIT_UNROLL for (int j = 0; j < PIXELS; ++j) {
              if (STRIDE > TAPS && j % STRIDE >= TAPS) continue;
              if (edge.value && (j < left || j >= right)) continue;
              vec<T> xj = held(fetch(line + j * a.pixel));
              CONVKIT_UNROLL for (int t = 0; t < G; ++t) {
                int s = j - t * STRIDE;
                // Outputs that do not exist may not meet an infinite source.
                if (s >= 0 && s < TAPS && (!edge.value || t < count)) sum[r][s] += grad[t] * xj;
              }
            }
          }
        };
        int64_t count = min_of<int64_t>(G, a.last - q), left = max_of<int64_t>(0, -column), right = min_of<int64_t>(PIXELS, a.columns - column);
        if (count == G && left == 0 && right == PIXELS) block(std::false_type{}, count, left, right);
        else block(std::true_type{}, count, left, right);
        if (a.ahead != 0 && r0 == 0)
          CONVKIT_UNROLL for (int t = 0; t < G; ++t) {
            __builtin_prefetch(gq + t * a.grad_pixel + a.grad_ahead, 0, 2);
            CONVKIT_UNROLL for (int j = 0; j < STRIDE * STRIDE; ++j)
              __builtin_prefetch(xq + (t * STRIDE + j % STRIDE) * a.pixel + j / STRIDE * a.row + a.ahead, 0, 2);
          }
      }
      continue;
    }
    for (int64_t q = a.first; q < a.last; ++q) {
      int64_t column = a.origin_w + q * a.stride_w + s0 * a.dilation_w;
      const T* xq = x + q * a.stride_w * a.pixel;
      vec<T> gq = fetch(g + q * a.grad_pixel);
      int64_t left = 0, right = taps;
      while (left < right && column + left * a.dilation_w < 0) ++left;
      while (left < right && column + (right - 1) * a.dilation_w >= a.columns) --right;
      CONVKIT_UNROLL for (int r = 0; r < ROWS; ++r) {
        if (r < begin || r >= end) continue;
        const T* line = xq + r * tap_row;
        CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s)
          if (s >= left && s < right) sum[r][s] += gq * fetch(line + s * tap_step);
      }
    }
  }
  CONVKIT_UNROLL for (int r = 0; r < ROWS; ++r)
    CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s)
      if (r < filter_rows && s < taps) {
        T* to = a.sums + ((r0 + r) * a.filter_w + s0 + s) * L;
        store(to, load(to) + sum[r][s]);
      }
}

template <class T, int TAPS, int STRIDE> CONVKIT_INLINE void depthwise_grad_rows(const DepthwiseGrad<T>& a, int64_t s0, int64_t taps) {
  for (int64_t r0 = 0; r0 < a.filter_h; r0 += kGradRows<TAPS>)
    a.lanes == kLanes<T> ? depthwise_grad<T, TAPS, STRIDE, true>(a, r0, s0, taps) : depthwise_grad<T, TAPS, STRIDE, false>(a, r0, s0, taps);
}

template <class T> CONVKIT_INLINE void depthwise_grad_dispatch(const DepthwiseGrad<T>& a) {
  bool dense = a.dilation_w == 1;
  if (dense && a.stride_w == 1) switch (a.filter_w) {
      case 1: return depthwise_grad_rows<T, 1, 1>(a, 0, 1);
      case 2: return depthwise_grad_rows<T, 2, 1>(a, 0, 2);
      case 3: return depthwise_grad_rows<T, 3, 1>(a, 0, 3);
      case 4: return depthwise_grad_rows<T, 4, 1>(a, 0, 4);
      case 5: return depthwise_grad_rows<T, 5, 1>(a, 0, 5);
      case 7: return depthwise_grad_rows<T, 7, 1>(a, 0, 7);
    }
  if (dense && a.stride_w == 2) switch (a.filter_w) {
      case 3: return depthwise_grad_rows<T, 3, 2>(a, 0, 3);
      case 5: return depthwise_grad_rows<T, 5, 2>(a, 0, 5);
      case 7: return depthwise_grad_rows<T, 7, 2>(a, 0, 7);
    }
  for (int64_t s0 = 0; s0 < a.filter_w; s0 += 5) depthwise_grad_rows<T, 5, 0>(a, s0, min_of<int64_t>(5, a.filter_w - s0));
}

}  // namespace convkit::cpu::CONVKIT_ISA
