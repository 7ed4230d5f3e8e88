// The transforms of Winograd's minimal filtering (Lavin & Gray 2016, arXiv:1509.09308), a vector of channels or filters at
// a time: F(5x5, 2x2) and F(4x4, 3x3) on tiles of 6 x 6 pixels, F(5x5, 4x4) and F(4x4, 5x5) on tiles of 8 x 8.
//
// A tile of outputs y comes from the inputs d and a filter g by y = A'[(G g G') * (B' d B)]A, where * is taken position by
// position: 36 products instead of 144 for a 3 x 3 filter, 64 instead of 400 for a 4 x 4 or a 5 x 5 one. The weight
// gradient is the same identity read the other way, dg = G'[(B' d B) * (A dy A')]G, and so is the input gradient,
// dd = B[(G g G') * (A dy A')]B', which can also be had as the forward pass with the filter turned by half a turn.
//
// The points are 0, pairs ±x, and infinity: 5/8 and 3/2 on tiles of 6 x 6, 7/16, 1 and 2 on tiles of 8 x 8. Their powers
// are exact in float32 and of moderate size: the error is half of that with the textbook's 1 and 2 (measured, norm-wise, 3 x 3,
// 64 channels: 8e-7 against 1.7e-6). That of 5 x 5 is 2.4e-6 with 20 channels and 3.5e-6 with 64, and 5e-6 in the weight
// gradient.
#pragma once

#include "../../plan.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

// The matrices, put together from the points.
template <int pairs> struct Matrices {
  static constexpr int tile = 2 * pairs + 2;
  // Of B': coefficients of the product over all pairs of (t - x²), in t, and of the products with one pair left out.
  float all[pairs + 1], without[pairs][pairs];
  float point[pairs];
  // Of A and G: powers of the points, and those times the reciprocal of the product of differences to all other points.
  float powers[2][pairs][tile];
  float zero[2];

  constexpr Matrices() : all{}, without{}, point{}, powers{}, zero{} {
    constexpr double x[3] = {pairs == 2 ? 0.625 : 0.4375, pairs == 2 ? 1.5 : 1, 2};
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

// What the matrices do to one row or column, with sums and differences of the points ±x shared. From `in` values to `out`
// values.
template <int pairs> struct Points {
  static constexpr int tile = 2 * pairs + 2;
  static constexpr Matrices<pairs> m{};

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
};

// Of filters of R taps.
template <int R> struct Winograd {
  static constexpr int tile = winograd_tile(R), outputs = tile + 1 - R;
  using Of = Points<tile / 2 - 1>;
  using Source = typename Of::Source;
  using Spread = typename Of::Spread;
  using Filter = typename Of::template ToPoints<R, true>;
  using Grad = typename Of::template ToPoints<outputs, false>;
  using Output = typename Of::template FromPoints<outputs, false>;
  using WeightGrad = typename Of::template FromPoints<R, true>;
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

CONVKIT_INLINE vec<float> load_up_to(const float* p, int64_t n) { return n >= kLanes<float> ? load(p) : load_n(p, int(n)); }

// Of `channels` channels: value (i, j) of the tile is at at[i * in + j], and (i, j) of the result goes to to + (i * out + j) * step,
// as whole vectors. kStep: the step, where it is known.
template <class Transform, int64_t kStep = 0>
__attribute__((noinline)) void transform_channels(const float* const* at, int64_t channels, float* to, int64_t step = kStep) {
  constexpr int L = kLanes<float>, n = Transform::in * Transform::in;
  if constexpr (kStep > 0) step = kStep;
  float rest[n][L];
  const float* of_rest[n];
  for (int64_t v = 0; v < channels; v += L) {
    if (v + L > channels) {
      for (int i = 0; i < n; ++i) store(rest[i], load_n(at[i] + v, int(channels - v))), of_rest[i] = rest[i] - v;
      at = of_rest;
    }
    transform_tile<Transform>([&](int i, int j) { return load(at[i * Transform::in + j] + v); },
                              [&](int i, int j, vec<float> value) { store(to + (i * Transform::out + j) * step + v, value); });
  }
}

// A tile of outputs: `down` rows and `right` columns of pixels, which exist.
struct OutputTile {
  float* to;
  const float* residual;  // in the order of `to`, or null
  int64_t row, pixel;
  int64_t down, right;
};

// What comes after the sum, of each of `channels` channels.
struct Epilogue {
  const float *scale, *bias;  // null: none; bias in whole vectors
  bool relu, streaming;
};

template <class Transform>
__attribute__((noinline)) void transform_output_tile(const float* sums, int64_t step, int64_t channels, const OutputTile& tile, const Epilogue& epilogue) {
  constexpr int L = kLanes<float>, E = Transform::out;
  bool whole = tile.down == E && tile.right == E;
  for (int64_t v = 0; v < channels; v += L) {
    int64_t lanes = min_of<int64_t>(L, channels - v);
    vec<float> y[E][E];
    transform_tile<Transform>([&](int i, int j) { return load(sums + (i * Transform::in + j) * step + v); },
                              [&](int i, int j, vec<float> value) { y[i][j] = value; });
    auto each = [&](auto&& f) {
      CONVKIT_UNROLL for (int i = 0; i < E; ++i)
        CONVKIT_UNROLL for (int j = 0; j < E; ++j) f(y[i][j], i, j);
    };
    if (epilogue.scale != nullptr) {
      vec<float> factor = load_up_to(epilogue.scale + v, lanes);
      each([&](vec<float>& value, int, int) { value *= factor; });
    }
    if (epilogue.bias != nullptr) {
      vec<float> add = load(epilogue.bias + v);
      each([&](vec<float>& value, int, int) { value += add; });
    }
    auto at = [&](int i, int j) { return i * tile.row + j * tile.pixel + v; };
    if (tile.residual != nullptr)
      each([&](vec<float>& value, int i, int j) {
        if (i < tile.down && j < tile.right) value += load_up_to(tile.residual + at(i, j), lanes);
      });
    if (epilogue.relu) each([&](vec<float>& value, int, int) { value = relu<float>(value); });
    if constexpr (kLine<float> == L)
      if (whole && epilogue.streaming) {
        each([&](vec<float>& value, int i, int j) { stream(tile.to + at(i, j), value); });
        continue;
      }
    if (whole && lanes == L) {
      each([&](vec<float>& value, int i, int j) { store(tile.to + at(i, j), value); });
    } else {
      each([&](vec<float>& value, int i, int j) {
        if (i < tile.down && j < tile.right) store_n(tile.to + at(i, j), value, int(lanes));
      });
    }
  }
}

// Adds what a tile comes to to the pixels that it reaches, `pixel` apart, from (y, x) on of an image of h x w; those outside
// are left out.
template <class Transform>
__attribute__((noinline)) void spread_tile(const float* sums, int64_t step, int64_t channels, float* pixels, int64_t pixel, int64_t y, int64_t x, int64_t h, int64_t w) {
  uint32_t rows = 0, across = 0;  // bit i: does row, does column i of the tile exist?
  for (int i = 0; i < Transform::out; ++i) rows |= uint32_t(y + i >= 0 && y + i < h) << i, across |= uint32_t(x + i >= 0 && x + i < w) << i;
  for (int64_t v = 0; v < channels; v += kLanes<float>)
    transform_tile<Transform>([&](int i, int j) { return load(sums + (i * Transform::in + j) * step + v); },
                              [&](int i, int j, vec<float> value) {
                                if ((rows >> i & across >> j & 1) == 0) return;
                                float* to = pixels + ((y + i) * w + x + j) * pixel + v;
                                store(to, load(to) + value);
                              });
}

}  // namespace convkit::cpu::CONVKIT_ISA
