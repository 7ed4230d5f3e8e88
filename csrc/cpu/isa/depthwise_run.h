// Depthwise inner loops: vectors of channels, sliding along a row.
//
// QT neighbouring outputs are computed at once, 8 where the row has them: their sums and the taps of one filter row stay
// in registers, and every source vector is loaded once for all the outputs it reaches, so a 3-wide filter at stride 1
// costs 10 loads for 24 multiply-adds, and 8 independent sums are what it takes to keep two multiply-add units busy.
// Blocks of outputs that see the edge of the image skip what is outside of it; all others ask no questions.
#pragma once

#include "../../plan.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

// A row of outputs: some of its columns, all channels of a block. S is what the source and the outputs are stored as.
template <class S> struct DepthwiseRow {
  using T = compute_t<S>;
  const S* rows[kMaxDepthwiseRows];     // source of output 0, tap 0, first channel, by filter row; may be off the image
  const T* weights[kMaxDepthwiseRows];  // tap 0 of the first vector of channels, by filter row
  int row_count;
  int64_t taps, weight_step, weight_vector;  // elements of weight from tap to tap and from vector to vector
  int64_t tap_pixels, output_pixels;    // source pixels from tap to tap and from output to output
  int64_t pixel;                        // source elements from pixel to pixel
  int64_t origin, columns;              // column of output 0, tap 0; columns of the source that exist
  int64_t first, last;                  // outputs to compute
  int64_t channels;
  S* out;                               // output 0
  int64_t out_step;
  int64_t ahead;                        // elements from the last filter row to the source row worth fetching early, or 0
  bool accumulate;                      // add to what `out` holds: later runs of a tall filter
  bool streamed;                        // write past the caches; `out` and out_step are whole vectors then
  const T *scale, *shift;               // per channel, or null
  const S* residual;                    // of output 0, in the order of `out`, or null
  bool relu;
};

// Outputs [q, q + count), count <= QT, of the vector of channels at `channel`. EDGE: bit j of `inside` says whether source
// pixel j of the block exists. `line`, of QT x 2 vectors: where 16-bit outputs wait for those of the neighbouring channels.
template <class S, int TAPS, int STRIDE, int QT, bool EDGE, bool WHOLE>
CONVKIT_INLINE void depthwise_outputs(const DepthwiseRow<S>& a, int64_t q, int count, uint32_t inside, int64_t channel, int lanes, S* line = nullptr) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>, PIXELS = (QT - 1) * STRIDE + TAPS;
  auto fetch = [&](const auto* p) { return WHOLE ? load(p) : load_n(p, lanes); };
  vec<T> sum[QT];
  CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[t] = vec<T>{};
  int64_t from = q * STRIDE * a.pixel + channel;
  for (int r = 0; r < a.row_count; ++r) {
    const S* x = a.rows[r] + from;
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
    const S* next = a.rows[a.row_count - 1] + from + a.ahead;
    CONVKIT_UNROLL for (int j = 0; j < QT * STRIDE; ++j, next = held(next + a.pixel)) __builtin_prefetch(next);
  }
  S* out = a.out + q * a.out_step + channel;
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
    const S* residual = a.residual + q * out_step + channel;
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) if (!EDGE || t < count) sum[t] += fetch(residual + t * out_step);
  }
  if (a.relu)
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[t] = relu<T>(sum[t]);
  if constexpr (sizeof(S) != sizeof(T))
    if (line != nullptr) out = line, out_step = kStreamed<S>;
  CONVKIT_UNROLL for (int t = 0; t < QT; ++t, out += out_step) {
    if (EDGE && t >= count) break;
    if (!WHOLE) {
      store_n(out, sum[t], lanes);
      continue;
    }
    if constexpr (sizeof(S) == sizeof(T))
      if (streamed) {
        stream(out, sum[t]);
        continue;
      }
    store(out, sum[t]);
  }
}

// The same for the two vectors of channels that 16-bit outputs are streamed by.
template <class S, int TAPS, int STRIDE, int QT, bool EDGE>
CONVKIT_INLINE void depthwise_outputs_streamed(const DepthwiseRow<S>& a, int64_t q, int count, uint32_t inside, int64_t channel) {
  constexpr int L = kLanes<compute_t<S>>;
  alignas(64) S line[QT * 2 * L];
  for (int half = 0; half < 2; ++half) depthwise_outputs<S, TAPS, STRIDE, QT, EDGE, true>(a, q, count, inside, channel + half * L, L, line + half * L);
  S* out = a.out + q * a.out_step + channel;
  for (int t = 0; t < count; ++t, out += a.out_step) {
    half_bits halves[2];
    std::memcpy(halves, line + t * 2 * L, sizeof halves);
    stream(out, halves[0], halves[1]);
  }
}

template <class S, int TAPS, int STRIDE, int QT> __attribute__((noinline)) void depthwise_row(const DepthwiseRow<S>& a) {
  constexpr int L = kLanes<compute_t<S>>, PIXELS = (QT - 1) * STRIDE + TAPS;
  int64_t whole = a.channels / L * L;
  for (int64_t q = a.first; q < a.last; q += QT) {
    int count = int(min_of<int64_t>(QT, a.last - q));
    if (count < QT && a.last - QT >= a.first && !a.accumulate) q = a.last - QT, count = QT;  // some outputs twice
    int64_t column = a.origin + q * STRIDE;
    int64_t begin = max_of<int64_t>(0, -column), end = max_of(begin, min_of<int64_t>(PIXELS, a.columns - column));
    uint32_t inside = begin >= PIXELS ? 0 : uint32_t((uint64_t(1) << end) - (uint64_t(1) << begin));
    bool clear = count == QT && begin == 0 && end == PIXELS;
    if constexpr (sizeof(S) == 2)
      if (a.streamed) {
        if (clear)
          for (int64_t c = 0; c < whole; c += 2 * L) depthwise_outputs_streamed<S, TAPS, STRIDE, QT, false>(a, q, QT, inside, c);
        else
          for (int64_t c = 0; c < whole; c += 2 * L) depthwise_outputs_streamed<S, TAPS, STRIDE, QT, true>(a, q, count, inside, c);
        continue;
      }
    if (clear)
      for (int64_t c = 0; c < whole; c += L) depthwise_outputs<S, TAPS, STRIDE, QT, false, true>(a, q, QT, inside, c, L);
    else
      for (int64_t c = 0; c < whole; c += L) depthwise_outputs<S, TAPS, STRIDE, QT, true, true>(a, q, count, inside, c, L);
    if (whole < a.channels) depthwise_outputs<S, TAPS, STRIDE, QT, true, false>(a, q, count, inside, whole, int(a.channels - whole));
  }
}

// Any number of taps at any step: dilation, wide filters, strides beyond 2.
template <class S> __attribute__((noinline)) void depthwise_row_any(const DepthwiseRow<S>& a) {
  using T = compute_t<S>;
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
          const S* x = a.rows[r] + at * a.pixel + c;
          sum += (lanes == L ? load(x) : load_n(x, lanes)) * load(w + s * a.weight_step);
        }
      }
      S* out = a.out + q * a.out_step + c;
      auto fetch = [&](const auto* p) { return lanes == L ? load(p) : load_n(p, lanes); };
      if (a.accumulate) sum += fetch(out);
      if (a.scale != nullptr) sum *= fetch(a.scale + c);
      if (a.shift != nullptr) sum += fetch(a.shift + c);
      if (a.residual != nullptr) sum += fetch(a.residual + q * a.out_step + c);
      if (a.relu) sum = relu<T>(sum);
      if (lanes != L) {
        store_n(out, sum, lanes);
        continue;
      }
      if constexpr (sizeof(S) == sizeof(T))
        if (a.streamed) {
          stream(out, sum);
          continue;
        }
      store(out, sum);
    }
}

template <class S, int TAPS, int STRIDE> CONVKIT_INLINE void depthwise_row_wide(const DepthwiseRow<S>& a) {
  return a.last - a.first > 4 ? depthwise_row<S, TAPS, STRIDE, 8>(a) : depthwise_row<S, TAPS, STRIDE, 4>(a);
}

template <class S> CONVKIT_INLINE void depthwise_dispatch(const DepthwiseRow<S>& a) {
  if (a.tap_pixels == 1 && a.output_pixels == 1) switch (a.taps) {
      case 1: return depthwise_row_wide<S, 1, 1>(a);
      case 2: return depthwise_row_wide<S, 2, 1>(a);
      case 3: return depthwise_row_wide<S, 3, 1>(a);
      case 4: return depthwise_row_wide<S, 4, 1>(a);
      case 5: return depthwise_row_wide<S, 5, 1>(a);
      case 7: return depthwise_row_wide<S, 7, 1>(a);
    }
  if (a.tap_pixels == 1 && a.output_pixels == 2) switch (a.taps) {
      case 3: return depthwise_row_wide<S, 3, 2>(a);
      case 5: return depthwise_row_wide<S, 5, 2>(a);
      case 7: return depthwise_row_wide<S, 7, 2>(a);
    }
  depthwise_row_any(a);
}

// Two rows of the outputs' gradients, all channels of a block, and the source lines under them: for each tap, the sum of
// gradient times source. S is what both are stored as.
template <class S> struct DepthwiseGrad {
  using T = compute_t<S>;
  struct Line {
    const S* source;  // of output 0, tap 0, first channel; may be off the image
    T* sums[2];       // for each row of outputs, tap 0 of the first vector of channels, [tap][lanes]; null: not under it
  } lines[2 * kMaxDepthwiseRows];
  int line_count;
  int64_t taps, sums_vector;          // elements of sums from vector to vector of channels
  int64_t tap_pixels, output_pixels;  // source pixels from tap to tap and from output to output
  int64_t pixel;                      // source elements from pixel to pixel
  int64_t origin, columns;            // column of output 0, tap 0; columns of the source that exist
  int64_t outputs;                    // of a row
  int64_t channels;
  const S* grad;                      // output 0
  int64_t grad_row, grad_pixel;       // elements; grad_row is 0 where there is only one row
  int64_t ahead, row;                 // elements from the last line to the next source rows, and from row to row
  int ahead_rows;                     // how many to ask of memory meanwhile, and as many rows of gradients as there are
};

// A tile: 2 x QT gradients of a vector of channels, in registers. A source vector is loaded once for all taps and outputs
// of both rows that it meets, and the products of a line are summed up tap by tap before they are added to memory: a 3 x 3
// filter at stride 1 and QT = 8 cost 40 loads of the source, 16 of gradients and 18 of sums for 144 multiply-adds.
// EDGE: bit j of `inside` says whether source pixel j of the tile exists.
template <class S, int TAPS, int STRIDE, int QT, bool EDGE, bool WHOLE>
CONVKIT_INLINE void depthwise_grad_tile(const DepthwiseGrad<S>& a, int64_t q, uint32_t inside, int64_t channel, int lanes) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>, PIXELS = (QT - 1) * STRIDE + TAPS;
  auto fetch = [&](const S* p) { return WHOLE ? load(p) : load_n(p, lanes); };
  const S* g = a.grad + q * a.grad_pixel + channel;
  vec<T> grad[2][QT];
  CONVKIT_UNROLL for (int o = 0; o < 2; ++o)
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) grad[o][t] = held(fetch(g + o * a.grad_row + t * a.grad_pixel));
  int64_t from = q * STRIDE * a.pixel + channel, sums_from = channel / L * a.sums_vector;
  for (int i = 0; i < a.line_count; ++i) {
    const auto& line = a.lines[i];
    // Under rows [FIRST, LAST) of the outputs.
    auto add = [&]<int FIRST, int LAST>(std::integer_sequence<int, FIRST, LAST>) __attribute__((always_inline)) {
      vec<T> sum[2][TAPS];
      CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o)
        CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) sum[o][s] = vec<T>{};
      const S* x = line.source + from;
      CONVKIT_UNROLL for (int j = 0; j < PIXELS; ++j, x = held(x + a.pixel)) {
        if (EDGE && (inside & 1u << j) == 0) continue;
        vec<T> xj = held(fetch(x));
        CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o)
          CONVKIT_UNROLL for (int t = 0; t < QT; ++t) {
            int s = j - t * STRIDE;
            if (s >= 0 && s < TAPS) sum[o][s] += grad[o][t] * xj;
          }
      }
      CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o)
        CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) {
          T* to = line.sums[o] + sums_from + s * L;
          store(to, load(to) + sum[o][s]);
        }
    };
    if (line.sums[1] == nullptr) add(std::integer_sequence<int, 0, 1>{});
    else if (line.sums[0] == nullptr) add(std::integer_sequence<int, 1, 2>{});
    else add(std::integer_sequence<int, 0, 2>{});
  }
  if (a.ahead_rows > 0) {
    const S* next = a.lines[a.line_count - 1].source + from + a.ahead;
    for (int r = 0; r < a.ahead_rows; ++r, next += a.row)
      CONVKIT_UNROLL for (int j = 0; j < QT * STRIDE; ++j) __builtin_prefetch(next + j * a.pixel, 0, 2);
    CONVKIT_UNROLL for (int o = 2; o < 4; ++o)
      CONVKIT_UNROLL for (int t = 0; t < QT; ++t) __builtin_prefetch(g + o * a.grad_row + t * a.grad_pixel, 0, 2);
  }
}

// Whole tiles, then what is left one by one: outputs that do not exist may not meet an infinite source.
template <class S, int TAPS, int STRIDE, int QT> __attribute__((noinline)) void depthwise_grad(const DepthwiseGrad<S>& a, int64_t q = 0) {
  constexpr int L = kLanes<compute_t<S>>, PIXELS = (QT - 1) * STRIDE + TAPS;
  int64_t whole = a.channels / L * L;
  for (; q + QT <= a.outputs; q += QT) {
    int64_t column = a.origin + q * STRIDE;
    int64_t begin = max_of<int64_t>(0, -column), end = max_of(begin, min_of<int64_t>(PIXELS, a.columns - column));
    uint32_t inside = begin >= PIXELS ? 0 : uint32_t((uint64_t(1) << end) - (uint64_t(1) << begin));
    if (begin == 0 && end == PIXELS)
      for (int64_t c = 0; c < whole; c += L) depthwise_grad_tile<S, TAPS, STRIDE, QT, false, true>(a, q, inside, c, L);
    else
      for (int64_t c = 0; c < whole; c += L) depthwise_grad_tile<S, TAPS, STRIDE, QT, true, true>(a, q, inside, c, L);
    if (whole < a.channels) depthwise_grad_tile<S, TAPS, STRIDE, QT, true, false>(a, q, inside, whole, int(a.channels - whole));
  }
  if constexpr (QT > 1)
    if (q < a.outputs) depthwise_grad<S, TAPS, STRIDE, 1>(a, q);
}

// Any number of taps at any step.
template <class S> __attribute__((noinline)) void depthwise_grad_any(const DepthwiseGrad<S>& a) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>, AT_ONCE = 5;
  for (int64_t c = 0; c < a.channels; c += L) {
    int lanes = int(min_of<int64_t>(L, a.channels - c));
    auto fetch = [&](const S* p) { return lanes == L ? load(p) : load_n(p, lanes); };
    for (int i = 0; i < a.line_count; ++i)
      for (int o = 0; o < 2; ++o)
        for (int64_t s0 = 0; a.lines[i].sums[o] != nullptr && s0 < a.taps; s0 += AT_ONCE) {
          vec<T> sum[AT_ONCE] = {};
          for (int64_t q = 0; q < a.outputs; ++q) {
            vec<T> grad = fetch(a.grad + o * a.grad_row + q * a.grad_pixel + c);
            CONVKIT_UNROLL for (int s = 0; s < AT_ONCE; ++s) {
              int64_t at = q * a.output_pixels + (s0 + s) * a.tap_pixels;
              if (s0 + s < a.taps && a.origin + at >= 0 && a.origin + at < a.columns) sum[s] += grad * fetch(a.lines[i].source + at * a.pixel + c);
            }
          }
          T* to = a.lines[i].sums[o] + c / L * a.sums_vector + s0 * L;
          CONVKIT_UNROLL for (int s = 0; s < AT_ONCE; ++s)
            if (s0 + s < a.taps) store(to + s * L, load(to + s * L) + sum[s]);
        }
  }
}

// The tile that leaves the fewest outputs over.
template <class S, int TAPS, int STRIDE> CONVKIT_INLINE void depthwise_grad_tiles(const DepthwiseGrad<S>& a) {
  if constexpr (kVectorBytes == 64) {
    if (a.outputs % 8 <= a.outputs % 7 && a.outputs % 8 <= a.outputs % 4) return depthwise_grad<S, TAPS, STRIDE, 8>(a);
    if (a.outputs % 7 <= a.outputs % 4) return depthwise_grad<S, TAPS, STRIDE, 7>(a);
  }
  depthwise_grad<S, TAPS, STRIDE, 4>(a);
}

template <class S> CONVKIT_INLINE void depthwise_grad_dispatch(const DepthwiseGrad<S>& a) {
  if (a.tap_pixels == 1 && a.output_pixels <= 2) switch (a.taps) {
      case 3: return a.output_pixels == 1 ? depthwise_grad_tiles<S, 3, 1>(a) : depthwise_grad_tiles<S, 3, 2>(a);
      case 5: return a.output_pixels == 1 ? depthwise_grad_tiles<S, 5, 1>(a) : depthwise_grad_tiles<S, 5, 2>(a);
      case 7: return a.output_pixels == 1 ? depthwise_grad_tiles<S, 7, 1>(a) : depthwise_grad_tiles<S, 7, 2>(a);
    }
  depthwise_grad_any(a);
}

}  // namespace convkit::cpu::CONVKIT_ISA
