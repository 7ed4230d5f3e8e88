// The transforms of Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv:1509.09308), a vector of channels
// or filters at a time.
//
// A tile of 4 x 4 outputs y comes from 6 x 6 inputs d and a 3 x 3 filter g by y = A'[(G g G') * (B' d B)]A, where * is
// taken position by position: 36 products instead of 144. The weight gradient is the same identity read the other way,
// dg = G'[(B' d B) * (A dy A')]G, and the input gradient is the forward pass with the filter turned by half a turn.
//
// The six points are 0, 5/8, -5/8, 3/2, -3/2 and infinity. Their powers are exact in float32 and of moderate size: the
// error is half of that with the textbook's 0, 1, -1, 2, -2 (measured, norm-wise, 64 channels: 8e-7 against 1.7e-6).
#pragma once

#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

constexpr int kTileIn = 6, kTileOut = 4, kFilter = 3, kPositions = 36;

constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
// Reciprocals of the products of differences between a point and the others.
constexpr float kG0 = 1 / (kA2 * kB2), kGa = 1 / (2 * kA2 * (kA2 - kB2)), kGb = 1 / (2 * kB2 * (kB2 - kA2));

// One row or column: what the matrices B', G, A' and their transposes do to it, with sums and differences of the points ±a
// and ±b shared. From `in` values to `out` values.
struct SourceTransform {  // B': 6 -> 6
  static constexpr int in = kTileIn, out = kTileIn;
  template <class V> CONVKIT_INLINE static void apply(const V* d, V* v) {
    V even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
    V even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
    v[0] = kA2 * kB2 * d[0] + (d[4] - (kA2 + kB2) * d[2]);
    v[1] = even_a + kA * odd_a;
    v[2] = even_a - kA * odd_a;
    v[3] = even_b + kB * odd_b;
    v[4] = even_b - kB * odd_b;
    v[5] = kA2 * kB2 * d[1] + (d[5] - (kA2 + kB2) * d[3]);
  }
};

struct FilterTransform {  // G: 3 -> 6
  static constexpr int in = kFilter, out = kTileIn;
  template <class V> CONVKIT_INLINE static void apply(const V* g, V* u) {
    V even_a = kGa * g[0] + kGa * kA2 * g[2], even_b = kGb * g[0] + kGb * kB2 * g[2];
    u[0] = kG0 * g[0];
    u[1] = even_a + kGa * kA * g[1];
    u[2] = even_a - kGa * kA * g[1];
    u[3] = even_b + kGb * kB * g[1];
    u[4] = even_b - kGb * kB * g[1];
    u[5] = g[2];
  }
};

struct OutputTransform {  // A': 6 -> 4
  static constexpr int in = kTileIn, out = kTileOut;
  template <class V> CONVKIT_INLINE static void apply(const V* m, V* y) {
    V sum_a = m[1] + m[2], sum_b = m[3] + m[4], difference_a = m[1] - m[2], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = kA * difference_a + kB * difference_b;
    y[2] = kA2 * sum_a + kB2 * sum_b;
    y[3] = m[5] + (kA3 * difference_a + kB3 * difference_b);
  }
};

struct GradTransform {  // A: 4 -> 6
  static constexpr int in = kTileOut, out = kTileIn;
  template <class V> CONVKIT_INLINE static void apply(const V* y, V* m) {
    V even_a = y[0] + kA2 * y[2], odd_a = y[1] + kA2 * y[3];
    V even_b = y[0] + kB2 * y[2], odd_b = y[1] + kB2 * y[3];
    m[0] = y[0];
    m[1] = even_a + kA * odd_a;
    m[2] = even_a - kA * odd_a;
    m[3] = even_b + kB * odd_b;
    m[4] = even_b - kB * odd_b;
    m[5] = y[3];
  }
};

struct WeightGradTransform {  // G': 6 -> 3
  static constexpr int in = kTileIn, out = kFilter;
  template <class V> CONVKIT_INLINE static void apply(const V* u, V* g) {
    V sum_a = u[1] + u[2], sum_b = u[3] + u[4];
    g[0] = kG0 * u[0] + (kGa * sum_a + kGb * sum_b);
    g[1] = kGa * kA * (u[1] - u[2]) + kGb * kB * (u[3] - u[4]);
    g[2] = u[5] + (kGa * kA2 * sum_a + kGb * kB2 * sum_b);
  }
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
