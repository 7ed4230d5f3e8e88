// The transforms of Winograd's minimal filtering (Lavin & Gray 2016, arXiv:1509.09308), a vector of channels or filters at
// a time: F(4x4, 3x3) on tiles of 6 x 6 pixels and F(4x4, 5x5) on tiles of 8 x 8.
//
// A tile of 4 x 4 outputs y comes from the inputs d and a filter g by y = A'[(G g G') * (B' d B)]A, where * is taken
// position by position: 36 products instead of 144 for a 3 x 3 filter, 64 instead of 400 for a 5 x 5 one. The weight
// gradient is the same identity read the other way, dg = G'[(B' d B) * (A dy A')]G, and so is the input gradient,
// dd = B[(G g G') * (A dy A')]B', which can also be had as the forward pass with the filter turned by half a turn.
//
// The points are 0, pairs ±x, and infinity: 5/8 and 3/2 for 3 x 3, 7/16, 1 and 2 for 5 x 5. Their powers are exact in
// float32 and of moderate size: the error is half of that with the textbook's 1 and 2 (measured, norm-wise, 64 channels:
// 8e-7 against 1.7e-6). That of 5 x 5 is 2.4e-6 with 20 channels and 3.5e-6 with 64, and 5e-6 in the weight gradient.
#pragma once

#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

constexpr int kTileOut = 4;

// For filters of R taps: the matrices, put together from the points.
template <int R> struct Matrices {
  static constexpr int pairs = R == 3 ? 2 : 3, tile = 2 * pairs + 2;
  static_assert(tile == kTileOut + R - 1);
  // Of B': coefficients of the product over all pairs of (t - x²), in t, and of the products with one pair left out.
  float all[pairs + 1], without[pairs][pairs];
  float point[pairs];
  // Of A and G: powers of the points, and those times the reciprocal of the product of differences to all other points.
  float powers[2][pairs][tile];
  float zero[2];

  constexpr Matrices() : all{}, without{}, point{}, powers{}, zero{} {
    constexpr double x[3] = {R == 3 ? 0.625 : 0.4375, R == 3 ? 1.5 : 1, 2};
    double differences = 1;
    for (int k = -1; k < pairs; ++k) {  // -1: none left out
      double of[pairs + 1] = {1}, product = k < 0 ? 1 : 2 * x[k] * x[k];
      for (int other = 0, degree = 0; other < pairs; ++other) {
        if (other == k) continue;
        for (int j = ++degree; j >= 0; --j) of[j] = (j > 0 ? of[j - 1] : 0) - x[other] * x[other] * of[j];
        product *= (k < 0 ? 0 : x[k] * x[k]) - x[other] * x[other];
      }
      if (k < 0) {
        for (int j = 0; j <= pairs; ++j) all[j] = float(of[j]);
        differences = product;
        continue;
      }
      for (int j = 0; j < pairs; ++j) without[k][j] = float(of[j]);
      point[k] = float(x[k]);
      double power = 1;
      for (int i = 0; i < tile; ++i, power *= x[k]) powers[0][k][i] = float(power), powers[1][k][i] = float(power / product);
    }
    zero[0] = 1, zero[1] = float(1 / differences);
  }
};

// One row or column: what the matrices do to it, with sums and differences of the points ±x shared. From `in` values to
// `out` values.
template <int R> struct Winograd {
  static constexpr Matrices<R> m{};
  static constexpr int pairs = Matrices<R>::pairs, tile = Matrices<R>::tile;

  struct Source {  // B'
    static constexpr int in = tile, out = tile;
    template <class V> CONVKIT_INLINE static void apply(const V* d, V* v) {
      v[0] = d[2 * pairs], v[tile - 1] = d[2 * pairs + 1];
      CONVKIT_UNROLL for (int i = 0; i < pairs; ++i) v[0] += m.all[i] * d[2 * i], v[tile - 1] += m.all[i] * d[2 * i + 1];
      CONVKIT_UNROLL for (int k = 0; k < pairs; ++k) {
        V even = d[2 * pairs], odd = d[2 * pairs - 1];
        CONVKIT_UNROLL for (int i = 0; i < pairs - 1; ++i) even += m.without[k][i] * d[2 + 2 * i], odd += m.without[k][i] * d[1 + 2 * i];
        v[1 + 2 * k] = even + m.point[k] * odd;
        v[2 + 2 * k] = even - m.point[k] * odd;
      }
    }
  };

  struct Spread {  // B, the transpose: what the sums of products come to at the pixels that a tile was made from
    static constexpr int in = tile, out = tile;
    template <class V> CONVKIT_INLINE static void apply(const V* v, V* d) {
      V even[pairs], odd[pairs];
      CONVKIT_UNROLL for (int k = 0; k < pairs; ++k) even[k] = v[1 + 2 * k] + v[2 + 2 * k], odd[k] = m.point[k] * (v[1 + 2 * k] - v[2 + 2 * k]);
      CONVKIT_UNROLL for (int i = 0; i <= pairs; ++i) {  // the highest coefficients are 1
        d[2 * i] = m.all[i] * v[0], d[2 * i + 1] = m.all[i] * v[tile - 1];
        CONVKIT_UNROLL for (int k = 0; k < pairs; ++k) {
          if (i > 0) d[2 * i] += m.without[k][i - 1] * even[k];
          if (i < pairs) d[2 * i + 1] += m.without[k][i] * odd[k];
        }
      }
    }
  };

  // The values of a polynomial with N coefficients at the points: A, and G, which is scaled.
  template <int N, bool scaled> struct ToPoints {
    static constexpr int in = N, out = tile;
    template <class V> CONVKIT_INLINE static void apply(const V* c, V* v) {
      v[0] = m.zero[scaled] * c[0], v[tile - 1] = c[N - 1];
      CONVKIT_UNROLL for (int k = 0; k < pairs; ++k) {
        V even = m.powers[scaled][k][0] * c[0], odd = m.powers[scaled][k][1] * c[1];
        CONVKIT_UNROLL for (int i = 2; i < N; ++i) (i % 2 == 0 ? even : odd) += m.powers[scaled][k][i] * c[i];
        v[1 + 2 * k] = even + odd;
        v[2 + 2 * k] = even - odd;
      }
    }
  };

  // Their transposes: A', and G', which is scaled.
  template <int N, bool scaled> struct FromPoints {
    static constexpr int in = tile, out = N;
    template <class V> CONVKIT_INLINE static void apply(const V* v, V* c) {
      V sum[pairs], difference[pairs];
      CONVKIT_UNROLL for (int k = 0; k < pairs; ++k) sum[k] = v[1 + 2 * k] + v[2 + 2 * k], difference[k] = v[1 + 2 * k] - v[2 + 2 * k];
      CONVKIT_UNROLL for (int i = 0; i < N; ++i) {
        c[i] = m.powers[scaled][0][i] * (i % 2 == 0 ? sum : difference)[0];
        CONVKIT_UNROLL for (int k = 1; k < pairs; ++k) c[i] += m.powers[scaled][k][i] * (i % 2 == 0 ? sum : difference)[k];
      }
      c[0] += m.zero[scaled] * v[0];
      c[N - 1] += v[tile - 1];
    }
  };

  using Filter = ToPoints<R, true>;
  using Grad = ToPoints<kTileOut, false>;
  using Output = FromPoints<kTileOut, false>;
  using WeightGrad = FromPoints<R, true>;
};

// Both dimensions: load(i, j) gives a value of the tile as it comes, store(i, j, value) takes one of the result. Columns
// first; between the two passes a tile lies on the stack, for 36 vectors are more than there are registers.
template <class Transform, class Load, class Store> CONVKIT_INLINE void transform_tile(Load&& load_at, Store&& store_at) {
  using V = vec<float>;
  V half[Transform::out][Transform::in];
  CONVKIT_UNROLL for (int j = 0; j < Transform::in; ++j) {
    V from[Transform::in], to[Transform::out];
    CONVKIT_UNROLL for (int i = 0; i < Transform::in; ++i) from[i] = load_at(i, j);
    Transform::apply(from, to);
    CONVKIT_UNROLL for (int i = 0; i < Transform::out; ++i) half[i][j] = to[i];
  }
  CONVKIT_UNROLL for (int i = 0; i < Transform::out; ++i) {
    V to[Transform::out];
    Transform::apply(half[i], to);
    CONVKIT_UNROLL for (int j = 0; j < Transform::out; ++j) store_at(i, j, to[j]);
  }
}

}  // namespace convkit::cpu::CONVKIT_ISA
