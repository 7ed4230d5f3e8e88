// The matrix-product microkernel that every dense convolution ends in: MR gathered rows times NV vectors of columns.
//
// Accumulators live in registers: 7 rows x 4 vectors (or 9 x 3, 14 x 2, 14 x 1) of AVX-512's 32 registers, 6 x 2 of
// AVX2's and SSE's 16, so that each vector of weights loaded serves 6 to 14 fused multiply-adds and each broadcast
// serves NV. Measured: 98 % of the rate of register-only multiply-adds, against 80 % for 14 x 2 with one step a turn.
#pragma once

#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows[5] = {0, 14, 14, 9, 7};
constexpr int kMaxVectors = 4;
#elif defined(__aarch64__)
constexpr int kTileRows[5] = {0, 12, 10, 7, 5};
constexpr int kMaxVectors = 4;
#else
constexpr int kTileRows[5] = {0, 6, 6, 0, 0};
constexpr int kMaxVectors = 2;
#endif
constexpr int kMaxTileRows = 14;

// Steps of the depth a turn of the loop takes: enough that loop control and pointer loads hide behind the arithmetic, and not
// more than have room for their weights beside the sums: 6 x 2 with two steps in 16 registers took a quarter longer (Zen 4).
template <int NV> constexpr int kDepthUnroll = NV == 1 ? 4 : NV == kMaxVectors ? 1 : 2;

template <class X, class S> struct RowsTile {
  using T = compute_t<X>;
  const X* const* rows;   // [taps][MR], or [MR] for all taps with rows_step 0
  int64_t rows_step;
  const int64_t* offsets; // added to the pointers of each tap
  const int32_t* taps;    // which tap's weights each group of MR pointers meets
  int64_t tap_count, depth;
  int64_t chain;          // products summed before they are added to a total
  int64_t row_offset;     // added to every pointer: the group's first channel
  const X* panel;         // [tap][depth][NV * lanes]; of bf16 [tap][depth / 2][NV * lanes][2], zero beyond an odd depth
  int64_t ahead = 0;      // where the next tile reads, in elements from this one's first row: fetched meanwhile
  S* const* dst;          // [MR]
  int64_t dst_offset;
  int valid_rows;
  int columns;            // valid columns, at most NV * lanes
  const T* scale;         // per column or null
  const T* bias;          // per column or null
  const T *row_scale = nullptr, *row_bias = nullptr;  // per row or null
  const S *residual = nullptr, *origin = nullptr;     // residual, or null, and dst's tensor: both begin here, and lie alike
  bool relu;
  bool streamed;          // write past the caches: every dst + dst_offset is aligned, and columns are whole vectors
};

// Rounds to what is stored. Where products take numbers below 2^-126 for zeros, so does this: one instruction for six.
template <class X, class S> CONVKIT_INLINE half_bits narrow_sum(vec<float> v) {
#if defined(CONVKIT_DOTS)
  if constexpr (std::is_same_v<X, bf16> && std::is_same_v<S, bf16>) return (half_bits)_mm512_cvtneps_pbh((__m512)v);
#endif
  return narrow<S>(v);
}

// X: the operands' type, float, double or, where there are products of it, bf16.
template <class X, class S, int MR, int NV> __attribute__((noinline)) void rows_tile(const RowsTile<X, S>& a) {
  using T = compute_t<X>;
  using O = Operand<X>;
  constexpr int L = kLanes<T>, G = O::kDepth, U = kDepthUnroll<NV>;
  vec<T> acc[MR][NV], total[MR][NV];
  CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = vec<T>{};

  int64_t chain = 0;  // products in acc
  bool carried = false;  // total holds earlier chains
  for (int64_t t = 0; t < a.tap_count; ++t) {
    const X* row[MR];
    int64_t offset = a.offsets[t] + a.row_offset;
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) row[m] = a.rows[t * a.rows_step + m] + offset;
    const X* w = a.panel + a.taps[t] * whole_steps<X>(a.depth) * (NV * L);
    for (int64_t d = 0; d < a.depth;) {
      int64_t piece = min_of(a.chain, a.depth - d), end = d + piece;
      if (chain + piece > a.chain && chain > 0) {
        CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
          CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
            total[m][v] = carried ? total[m][v] + acc[m][v] : acc[m][v];
            acc[m][v] = vec<T>{};
          }
        carried = true;
        chain = 0;
      }
      chain += piece;
      const X* next = row[0] + a.ahead + d * MR;
      for (; d + U * G <= end; d += U * G, w += U * G * NV * L, next += U * G * MR) {
        __builtin_prefetch(next);
        vec<T> weights[U][NV];
        CONVKIT_UNROLL for (int u = 0; u < U; ++u)
          CONVKIT_UNROLL for (int v = 0; v < NV; ++v) weights[u][v] = O::columns(w + (u * NV + v) * L * G);
        CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
          CONVKIT_UNROLL for (int u = 0; u < U; ++u) {
            vec<T> x = O::row(row[m] + d + u * G);
            CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = O::multiply_add(acc[m][v], x, weights[u][v]);
          }
      }
      if constexpr (U > 1) {
        for (; d + G <= end; d += G, w += G * NV * L)
          CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
            vec<T> x = O::row(row[m] + d);
            CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = O::multiply_add(acc[m][v], x, O::columns(w + v * L * G));
          }
      }
      if constexpr (G > 1) {
        if (d < end) {
          CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
            vec<T> x = O::last_of_odd(row[m] + d);
            CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = O::multiply_add(acc[m][v], x, O::columns(w + v * L * G));
          }
          d = end;
        }
      }
    }
  }
  if (carried)
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] += total[m][v];

  if (a.scale != nullptr)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
      vec<T> scale = load(a.scale + v * L);
      CONVKIT_UNROLL for (int m = 0; m < MR; ++m) acc[m][v] *= scale;
    }
  if (a.bias != nullptr)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
      vec<T> bias = load(a.bias + v * L);
      CONVKIT_UNROLL for (int m = 0; m < MR; ++m) acc[m][v] += bias;
    }
  if (a.row_scale != nullptr)
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
      vec<T> scale = broadcast(a.row_scale[m]);
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] *= scale;
    }
  if (a.row_bias != nullptr)
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
      vec<T> bias = broadcast(a.row_bias[m]);
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] += bias;
    }
  if (a.residual != nullptr)
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
      if (m == a.valid_rows) break;
      const S* from = a.residual + (a.dst[m] - a.origin) + a.dst_offset;
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
        int left = a.columns - v * L;
        if (left >= L) acc[m][v] += load(from + v * L);
        else if (left > 0) acc[m][v] += load_n(from + v * L, left);
      }
    }
  if (a.relu)
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = relu<T>(acc[m][v]);

  if (a.streamed) {
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
      if (m == a.valid_rows) break;
      S* out = a.dst[m] + a.dst_offset;
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
        if (v * L >= a.columns) break;
        if constexpr (sizeof(S) == sizeof(T)) stream(out + v * L, acc[m][v]);
        else if (v % 2 == 1) stream(out + (v - 1) * L, narrow_sum<X, S>(acc[m][v - 1]), narrow_sum<X, S>(acc[m][v]));
      }
    }
    return;
  }
  if (a.columns == NV * L) {
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
      if (m == a.valid_rows) break;
      S* out = a.dst[m] + a.dst_offset;
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
        if constexpr (sizeof(S) == sizeof(T)) {
          store(out + v * L, acc[m][v]);
        } else {
          half_bits h = narrow_sum<X, S>(acc[m][v]);
          std::memcpy(out + v * L, &h, sizeof h);
        }
      }
    }
  } else {
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
      if (m == a.valid_rows) break;
      S* out = a.dst[m] + a.dst_offset;
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
        int left = a.columns - v * L;
        if (left >= L) store(out + v * L, acc[m][v]);
        else if (left > 0) store_n(out + v * L, acc[m][v], left);
      }
    }
  }
}

// The tile for a number of vectors; its rows are kTileRows[vectors].
template <class X, class S> using RowsTileFn = void (*)(const RowsTile<X, S>&);
template <class X, class S> RowsTileFn<X, S> rows_tile_for(int vectors) {
  switch (vectors) {
    case 1: return rows_tile<X, S, kTileRows[1], 1>;
    case 2: return rows_tile<X, S, kTileRows[2], 2>;
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3: return rows_tile<X, S, kTileRows[3], 3>;
    case 4: return rows_tile<X, S, kTileRows[4], 4>;
#endif
  }
  return nullptr;
}

// Weights as the tile reads them: panel[tap][depth][columns], zero beyond the last column. Strides are the source's, in
// elements, of which `source` gives the first weight of (tap, depth step); 0 where steps, or taps, are not evenly apart.
// What lies side by side of a column, its depth or its taps, is transposed a vector of columns at a time: as many streams.
template <class X, class Source> requires(Operand<X>::kDepth == 1)
CONVKIT_INLINE void pack_panel(X* panel, int64_t taps, int64_t depth_begin, int64_t depth_end, int64_t depth, int64_t width,
                               int64_t columns, int64_t column_stride, int64_t depth_stride, int64_t tap_stride, Source&& source) {
  bool deep = depth_stride == 1 && column_stride != 1, wide = !deep && tap_stride == 1 && taps > 1;
  for (int64_t i = 0; (deep || wide) && i < columns; i += kLanes<X>) {
    int64_t lanes = min_of<int64_t>(kLanes<X>, columns - i);
    X* to = panel + i;
    for (int64_t t = 0; deep && t < taps; ++t)
      transpose_block(source(t, depth_begin) + i * column_stride, column_stride, to + (t * depth + depth_begin) * width, width, lanes, depth_end - depth_begin);
    for (int64_t d = depth_begin; wide && d < depth_end; ++d)
      transpose_block(source(0, d) + i * column_stride, column_stride, to + d * width, depth * width, lanes, taps);
  }
  for (int64_t d = depth_begin; d < depth_end; ++d)
    for (int64_t t = 0; t < taps; ++t) {
      X* to = panel + (t * depth + d) * width;
      if (!deep && !wide) {
        auto from = source(t, d);
        if (column_stride == 1) copy_values(from, to, columns);
        else
          for (int64_t j = 0; j < columns; ++j) to[j] = get(from + j * column_stride);
      }
      for (int64_t j = columns; j < width; ++j) to[j] = 0;
    }
}

#if defined(CONVKIT_DOTS)
// The same of pairs: panel[tap][depth / 2][columns][2]. Pieces of the depth begin at even steps.
template <class X, class Source> requires(Operand<X>::kDepth == 2)
CONVKIT_INLINE void pack_panel(X* panel, int64_t taps, int64_t depth_begin, int64_t depth_end, int64_t depth,
                               int64_t width, int64_t columns, int64_t column_stride, int64_t depth_stride, int64_t, Source&& source) {
  float* pairs = reinterpret_cast<float*>(panel);
  // Neighbours along the depth are pairs where they lie.
  bool across = depth_stride == 1 && column_stride != 1 && column_stride % 2 == 0 && depth_end % 2 == 0;
  int64_t steps = whole_steps<X>(depth) / 2;
  for (int64_t t = 0; t < taps; ++t) {
    float* to = pairs + (t * steps + depth_begin / 2) * width;
    if (across) transpose_block(reinterpret_cast<const float*>(source(t, depth_begin)), column_stride / 2, to, width, columns, (depth_end - depth_begin) / 2);
    for (int64_t d = depth_begin; d < depth_end; d += 2, to += width) {
      if (!across) {
        const X *first = source(t, d), *second = d + 1 < depth_end ? source(t, d + 1) : nullptr;
        int64_t j = 0;
        if (second != nullptr && column_stride == 1)
          copy_values(Pairs{first, second - first}, to, columns), j = columns;
        for (; j < columns; ++j) {
          X pair[2] = {first[j * column_stride], second == nullptr ? X{} : second[j * column_stride]};
          std::memcpy(to + j, pair, sizeof pair);
        }
      }
      fill_zero(to + columns, width - columns);
    }
  }
}
#endif

}  // namespace convkit::cpu::CONVKIT_ISA
