// Depthwise inner loops: vectors of channels, sliding along two rows of outputs.
//
// A tile is 2 x QT neighbouring outputs of a vector of channels, in registers. The source lines under it are gone through
// one by one, and a source vector is loaded once for all taps and outputs of both rows that it meets. Pixels that do not
// exist are skipped. S is what tensors are stored as: 16-bit values are widened as they are loaded, unless these are copies.
#pragma once

#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

// A source line and, for each of two rows of outputs, tap 0 of the filter row under which it has the line, of the first
// vector of channels; null: it has not.
template <class S, class W> struct DepthwiseLine {
  const S* source;  // pixel 0 of the line, first channel
  W* taps[2];
};

// Two rows of outputs, all channels of a block, and the lines under them.
template <class S, class W> struct DepthwiseLines {
  DepthwiseLine<S, W>* lines;         // those under the first row of outputs only, under both, under the second only
  int64_t upto[3];                    // where these three end
  int rows;                           // of outputs: 1 or 2
  int64_t outputs;                    // of a row
  int64_t taps;                       // of a filter row
  int64_t tap_pixels, output_pixels;  // source pixels from tap to tap and from output to output
  int64_t tap_step, tap_vector;       // elements of taps from tap to tap and from vector to vector of channels
  int64_t first_tap;                  // elements from tap 0 to the one that meets `origin`
  int64_t pixel;                      // source elements from pixel to pixel
  int64_t origin, columns;            // column of output 0, first tap; columns of the source that exist
  int64_t channels;
  const S* ahead;                     // whole lines to ask of memory meanwhile: the first
  int64_t ahead_row;                  // elements from line to line of them
  int ahead_rows;                     // how many

  // Are there no outputs that lie off the image with all their taps? Then all but the outer pixels of a tile exist.
  bool near() const { return origin > -taps && origin + (outputs - 1) * output_pixels < columns; }

  // Bit j: does source pixel j of a tile whose first tap is at `column` exist?
  CONVKIT_INLINE uint32_t inside(int64_t column, int pixels) const {
    int64_t begin = max_of<int64_t>(0, -column), end = max_of(begin, min_of<int64_t>(pixels, columns - column));
    return begin >= pixels ? 0 : uint32_t((uint64_t(1) << end) - (uint64_t(1) << begin));
  }
};

template <class S> struct DepthwiseOutputs : DepthwiseLines<S, const compute_t<S>> {
  S* out;                             // output 0 of the first row
  int64_t out_row, out_step;          // elements from row to row and from output to output
  bool streamed;                      // write past the caches; `out`, its steps and the channels are whole lines then
  const compute_t<S> *scale, *shift;  // per channel, or null
  const S* residual;                  // of output 0, in the order of `out`, or null
  bool relu;
};

// Calls tile(number, q, channel, lanes) for the tiles of QT outputs of a row, from output q of each on, and every so many
// vectors of channels: in the order of memory, but with wide filters, whose arithmetic takes longer than memory does, so few channels
// at a time that their taps, and the pixels that neighbouring tiles share, stay in the first-level cache.
template <class S, int TAPS, int QT, int VECTORS = 1, class F> CONVKIT_INLINE void depthwise_each_tile(int64_t outputs, int64_t channels, F&& tile) {
  using T = compute_t<S>;
  constexpr int64_t L = VECTORS * kLanes<T>;
  int64_t at_once = TAPS < 7 ? channels : 256 / sizeof(T), number = 0;
  for (int64_t first = 0; first < channels; first += at_once)
    for (int64_t q = 0; q < outputs; q += QT)
      for (int64_t c = first; c < min_of(first + at_once, channels); c += L, number += VECTORS) tile(number, q, c, int(min_of(L, channels - c)));
}

// Asks for the part of the lines `ahead` that falls to a tile, in the order of memory.
template <int PIXELS, class S, class W> CONVKIT_INLINE void depthwise_ahead(const DepthwiseLines<S, W>& a, int64_t number) {
  constexpr int PART = PIXELS * kLanes<compute_t<S>>;
  const S* next = a.ahead + number * PART;
  for (int r = 0; r < a.ahead_rows; ++r, next += a.ahead_row)
    CONVKIT_UNROLL for (int j = 0; j < PART; j += kLine<S>) __builtin_prefetch(next + j, 0, 2);
}

// 2 x QT sums: a 3 x 3 filter at stride 1 and QT = 8 cost 40 loads of the source and 18 of taps for 144 multiply-adds in 16
// independent sums, which with the 6 taps of a line and a source vector take 23 registers. `lines`, 2 x QT of them: where
// outputs wait for those of the neighbouring vectors of channels, to be streamed.
template <class S, int TAPS, int STRIDE, int QT, bool WHOLE>
CONVKIT_INLINE void depthwise_tile(const DepthwiseOutputs<S>& a, int64_t number, int64_t q, uint32_t inside, int64_t channel, int lanes, S* lines = nullptr) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>, PIXELS = (QT - 1) * STRIDE + TAPS;
  auto fetch = [&](const auto* p) { return WHOLE ? load(p) : load_n(p, lanes); };
  vec<T> sum[2][QT];
  CONVKIT_UNROLL for (int o = 0; o < 2; ++o)
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[o][t] = vec<T>{};
  int64_t from = (a.origin + q * STRIDE) * a.pixel + channel, taps_from = a.first_tap + channel / L * a.tap_vector;
  int64_t pixel = a.pixel, tap_step = a.tap_step;
  const auto* line = a.lines;
  // Under rows [FIRST, LAST) of the outputs.
  auto add = [&]<int FIRST, int LAST>(std::integer_sequence<int, FIRST, LAST>, const auto* end) __attribute__((always_inline)) {
    for (; line != end; ++line) {
      vec<T> w[2][TAPS];
      CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o)
        CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) w[o][s] = held(load(line->taps[o] + taps_from + s * tap_step));
      const S* x = line->source + from;
      uint32_t exists = held(inside);
      CONVKIT_UNROLL for (int j = 0; j < PIXELS; ++j, x = held(x + pixel)) {
        // With a stride beyond the filter some pixels are between outputs.
        if (STRIDE > TAPS && j % STRIDE >= TAPS) continue;
        if ((j < TAPS - 1 || j > PIXELS - TAPS) && (exists & 1u << j) == 0) continue;
        vec<T> xj = held(fetch(x));
        CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o)
          CONVKIT_UNROLL for (int t = 0; t < QT; ++t) {
            int s = j - t * STRIDE;
            if (s >= 0 && s < TAPS) sum[o][t] += xj * w[o][s];
          }
      }
    }
  };
  add(std::integer_sequence<int, 0, 1>{}, a.lines + a.upto[0]);
  add(std::integer_sequence<int, 0, 2>{}, a.lines + a.upto[1]);
  add(std::integer_sequence<int, 1, 2>{}, a.lines + a.upto[2]);
  depthwise_ahead<QT * STRIDE>(a, number);
  bool streamed = a.streamed;
  CONVKIT_UNROLL for (int o = 0; o < 2; ++o) {
    if (o >= a.rows) break;
    int64_t at = o * a.out_row + q * a.out_step + channel, step = a.out_step;
    if (a.scale != nullptr) {
      vec<T> scale = fetch(a.scale + channel);
      CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[o][t] *= scale;
    }
    if (a.shift != nullptr) {
      vec<T> shift = fetch(a.shift + channel);
      CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[o][t] += shift;
    }
    if (a.residual != nullptr) {
      const S* residual = a.residual + at;
      CONVKIT_UNROLL for (int t = 0; t < QT; ++t, residual = held(residual + step)) sum[o][t] += fetch(residual);
    }
    if (a.relu)
      CONVKIT_UNROLL for (int t = 0; t < QT; ++t) sum[o][t] = relu<T>(sum[o][t]);
    S* out = a.out + at;
    if constexpr (kLine<S> > L)
      if (lines != nullptr) out = lines + o * QT * kLine<S>, step = kLine<S>;
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t, out = held(out + step)) {
      if constexpr (kLine<S> == L)
        if (WHOLE && streamed) {
          stream(out, sum[o][t]);
          continue;
        }
      if (WHOLE) store(out, sum[o][t]);
      else store_n(out, sum[o][t], lanes);
    }
  }
}

template <class S, int TAPS, int STRIDE, int QT> __attribute__((noinline)) void depthwise_rows(const DepthwiseOutputs<S>& a) {
  constexpr int L = kLanes<compute_t<S>>, LINE = kLine<S>;
  auto first_of = [&](int64_t q) { return min_of(q, a.outputs - QT); };  // the last tile may compute some outputs again
  auto inside_at = [&](int64_t q) { return a.inside(a.origin + q * STRIDE, (QT - 1) * STRIDE + TAPS); };
  if constexpr (LINE > L)
    if (a.streamed)
      return depthwise_each_tile<S, TAPS, QT, LINE / L>(a.outputs, a.channels, [&](int64_t number, int64_t q, int64_t channel, int) __attribute__((always_inline)) {
        q = first_of(q);
        alignas(64) S lines[2 * QT * LINE];
        for (int i = 0; i < LINE / L; ++i)
          depthwise_tile<S, TAPS, STRIDE, QT, true>(a, number + i, q, inside_at(q), channel + i * L, L, lines + i * L);
        for (int o = 0; o < a.rows; ++o)
          for (int t = 0; t < QT; ++t) stream_line(a.out + o * a.out_row + (q + t) * a.out_step + channel, lines + (o * QT + t) * LINE);
      });
  depthwise_each_tile<S, TAPS, QT>(a.outputs, a.channels, [&](int64_t number, int64_t q, int64_t channel, int lanes) __attribute__((always_inline)) {
    q = first_of(q);
    if (lanes == L) depthwise_tile<S, TAPS, STRIDE, QT, true>(a, number, q, inside_at(q), channel, lanes);
    else depthwise_tile<S, TAPS, STRIDE, QT, false>(a, number, q, inside_at(q), channel, lanes);
  });
}

// Any number of taps at any step: dilation, wide filters, strides beyond 2, padding beyond the filter, narrow images.
template <class S> __attribute__((noinline)) void depthwise_rows_any(const DepthwiseOutputs<S>& a) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>;
  for (int o = 0; o < a.rows; ++o)
    for (int64_t q = 0; q < a.outputs; ++q)
      for (int64_t c = 0; c < a.channels; c += L) {
        int lanes = int(min_of<int64_t>(L, a.channels - c));
        auto fetch = [&](const auto* p) { return lanes == L ? load(p) : load_n(p, lanes); };
        vec<T> sum{};
        for (int64_t i = 0; i < a.upto[2]; ++i) {
          if (a.lines[i].taps[o] == nullptr) continue;
          const T* w = a.lines[i].taps[o] + a.first_tap + c / L * a.tap_vector;
          for (int64_t s = 0; s < a.taps; ++s) {
            int64_t column = a.origin + q * a.output_pixels + s * a.tap_pixels;
            if (column >= 0 && column < a.columns) sum += fetch(a.lines[i].source + column * a.pixel + c) * load(w + s * a.tap_step);
          }
        }
        int64_t at = o * a.out_row + q * a.out_step + c;
        if (a.scale != nullptr) sum *= fetch(a.scale + c);
        if (a.shift != nullptr) sum += fetch(a.shift + c);
        if (a.residual != nullptr) sum += fetch(a.residual + at);
        if (a.relu) sum = relu<T>(sum);
        if constexpr (kLine<S> == L)
          if (lanes == L && a.streamed) {
            stream(a.out + at, sum);
            continue;
          }
        if (lanes == L) store(a.out + at, sum);
        else store_n(a.out + at, sum, lanes);
      }
}

// The tile that computes the fewest outputs of a row twice.
template <class S, int TAPS, int STRIDE> CONVKIT_INLINE void depthwise_tiles(const DepthwiseOutputs<S>& a) {
  if constexpr (kVectorBytes == 64) {
    if (a.outputs >= 8 && ceil_div(a.outputs, 8) * 8 <= ceil_div(a.outputs, 7) * 7) return depthwise_rows<S, TAPS, STRIDE, 8>(a);
    if (a.outputs >= 7) return depthwise_rows<S, TAPS, STRIDE, 7>(a);
  }
  depthwise_rows<S, TAPS, STRIDE, 4>(a);
}

template <class S> CONVKIT_INLINE void depthwise_dispatch(const DepthwiseOutputs<S>& a) {
  bool tiles = a.outputs >= 4 && a.near() && a.tap_pixels == 1;
  if (tiles && a.output_pixels == 1) switch (a.taps) {
      case 1: return depthwise_tiles<S, 1, 1>(a);
      case 2: return depthwise_tiles<S, 2, 1>(a);
      case 3: return depthwise_tiles<S, 3, 1>(a);
      case 4: return depthwise_tiles<S, 4, 1>(a);
      case 5: return depthwise_tiles<S, 5, 1>(a);
      case 7: return depthwise_tiles<S, 7, 1>(a);
    }
  if (tiles && a.output_pixels == 2) switch (a.taps) {
      case 3: return depthwise_tiles<S, 3, 2>(a);
      case 5: return depthwise_tiles<S, 5, 2>(a);
      case 7: return depthwise_tiles<S, 7, 2>(a);
    }
  depthwise_rows_any(a);
}

template <class S> struct DepthwiseGrads : DepthwiseLines<S, compute_t<S>> {
  const S* grad;                      // of output 0 of the first row
  int64_t grad_row, grad_pixel;       // elements from row to row and from output to output
};

// 2 x QT gradients, and the sums of a line, which are added to memory: a 3 x 3 filter at stride 1 and QT = 8 cost 40 loads of the
// source, 16 of gradients and 18 of sums for 144 multiply-adds.
template <class S, int TAPS, int STRIDE, int QT, bool WHOLE>
CONVKIT_INLINE void depthwise_tile(const DepthwiseGrads<S>& a, int64_t number, int64_t q, uint32_t inside, int64_t channel, int lanes) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>, PIXELS = (QT - 1) * STRIDE + TAPS;
  auto fetch = [&](const S* p) { return WHOLE ? load(p) : load_n(p, lanes); };
  vec<T> grad[2][QT];
  CONVKIT_UNROLL for (int o = 0; o < 2; ++o) {
    const S* g = a.grad + (o < a.rows ? o * a.grad_row : 0) + q * a.grad_pixel + channel;
    CONVKIT_UNROLL for (int t = 0; t < QT; ++t, g = held(g + a.grad_pixel)) grad[o][t] = held(fetch(g));
  }
  int64_t from = (a.origin + q * STRIDE) * a.pixel + channel, taps_from = channel / L * a.tap_vector, pixel = a.pixel;
  const auto* line = a.lines;
  // Under rows [FIRST, LAST) of the outputs.
  auto add = [&]<int FIRST, int LAST>(std::integer_sequence<int, FIRST, LAST>, const auto* end) __attribute__((always_inline)) {
    for (; line != end; ++line) {
      vec<T> sum[2][TAPS];
      CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o)
        CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) sum[o][s] = vec<T>{};
      const S* x = line->source + from;
      uint32_t exists = held(inside);
      CONVKIT_UNROLL for (int j = 0; j < PIXELS; ++j, x = held(x + pixel)) {
        if (STRIDE > TAPS && j % STRIDE >= TAPS) continue;
        if ((j < TAPS - 1 || j > PIXELS - TAPS) && (exists & 1u << j) == 0) continue;
        vec<T> xj = held(fetch(x));
        CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o)
          CONVKIT_UNROLL for (int t = 0; t < QT; ++t) {
            int s = j - t * STRIDE;
            if (s >= 0 && s < TAPS) sum[o][s] += grad[o][t] * xj;
          }
      }
      CONVKIT_UNROLL for (int o = FIRST; o < LAST; ++o) {
        T* to = line->taps[o] + taps_from;
        CONVKIT_UNROLL for (int s = 0; s < TAPS; ++s) store(to + s * L, load(to + s * L) + sum[o][s]);
      }
    }
  };
  add(std::integer_sequence<int, 0, 1>{}, a.lines + a.upto[0]);
  add(std::integer_sequence<int, 0, 2>{}, a.lines + a.upto[1]);
  add(std::integer_sequence<int, 1, 2>{}, a.lines + a.upto[2]);
  depthwise_ahead<QT * STRIDE>(a, number);
  if (a.ahead_rows > 0) {
    const S* next = a.grad + 2 * a.grad_row + number * QT * L;
    CONVKIT_UNROLL for (int o = 0; o < 2; ++o, next += a.grad_row)
      CONVKIT_UNROLL for (int j = 0; j < QT * L; j += kLine<S>) __builtin_prefetch(next + j, 0, 2);
  }
}

// Whole tiles, then what is left one by one: outputs that do not exist may not meet an infinite source.
template <class S, int TAPS, int STRIDE, int QT> __attribute__((noinline)) void depthwise_rows(const DepthwiseGrads<S>& a, int64_t from = 0) {
  int64_t tiled = (a.outputs - from) / QT * QT;
  depthwise_each_tile<S, TAPS, QT>(tiled, a.channels, [&](int64_t number, int64_t q, int64_t channel, int lanes) __attribute__((always_inline)) {
    q += from;
    uint32_t inside = a.inside(a.origin + q * STRIDE, (QT - 1) * STRIDE + TAPS);
    if (lanes == kLanes<compute_t<S>>) depthwise_tile<S, TAPS, STRIDE, QT, true>(a, number, q, inside, channel, lanes);
    else depthwise_tile<S, TAPS, STRIDE, QT, false>(a, number, q, inside, channel, lanes);
  });
  if constexpr (QT > 1)
    if (from + tiled < a.outputs) depthwise_rows<S, TAPS, STRIDE, 1>(a, from + tiled);
}

// Any number of taps at any step.
template <class S> __attribute__((noinline)) void depthwise_rows_any(const DepthwiseGrads<S>& a) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>, AT_ONCE = 5;
  for (int64_t c = 0; c < a.channels; c += L) {
    int lanes = int(min_of<int64_t>(L, a.channels - c));
    auto fetch = [&](const S* p) { return lanes == L ? load(p) : load_n(p, lanes); };
    for (int64_t i = 0; i < a.upto[2]; ++i)
      for (int o = 0; o < 2; ++o)
        for (int64_t s0 = 0; a.lines[i].taps[o] != nullptr && s0 < a.taps; s0 += AT_ONCE) {
          vec<T> sum[AT_ONCE] = {};
          for (int64_t q = 0; q < a.outputs; ++q) {
            vec<T> grad = fetch(a.grad + o * a.grad_row + q * a.grad_pixel + c);
            CONVKIT_UNROLL for (int s = 0; s < AT_ONCE; ++s) {
              int64_t column = a.origin + q * a.output_pixels + (s0 + s) * a.tap_pixels;
              if (s0 + s < a.taps && column >= 0 && column < a.columns) sum[s] += grad * fetch(a.lines[i].source + column * a.pixel + c);
            }
          }
          T* to = a.lines[i].taps[o] + c / L * a.tap_vector + s0 * L;
          CONVKIT_UNROLL for (int s = 0; s < AT_ONCE; ++s)
            if (s0 + s < a.taps) store(to + s * L, load(to + s * L) + sum[s]);
        }
  }
}

// The tile that leaves the fewest outputs over.
template <class S, int TAPS, int STRIDE> CONVKIT_INLINE void depthwise_tiles(const DepthwiseGrads<S>& a) {
  if constexpr (kVectorBytes == 64) {
    if (a.outputs % 8 <= a.outputs % 7 && a.outputs % 8 <= a.outputs % 4) return depthwise_rows<S, TAPS, STRIDE, 8>(a);
    if (a.outputs % 7 <= a.outputs % 4) return depthwise_rows<S, TAPS, STRIDE, 7>(a);
  }
  depthwise_rows<S, TAPS, STRIDE, 4>(a);
}

template <class S> CONVKIT_INLINE void depthwise_dispatch(const DepthwiseGrads<S>& a) {
  if (a.near() && a.tap_pixels == 1 && a.output_pixels <= 2) switch (a.taps) {
      case 3: return a.output_pixels == 1 ? depthwise_tiles<S, 3, 1>(a) : depthwise_tiles<S, 3, 2>(a);
      case 5: return a.output_pixels == 1 ? depthwise_tiles<S, 5, 1>(a) : depthwise_tiles<S, 5, 2>(a);
      case 7: return a.output_pixels == 1 ? depthwise_tiles<S, 7, 1>(a) : depthwise_tiles<S, 7, 2>(a);
    }
  depthwise_rows_any(a);
}

}  // namespace convkit::cpu::CONVKIT_ISA
