// The matrix product on tensor cores that the dense convolutions are (implicit GEMM), for sm_80 and newer: float16,
// bfloat16, and float32 as tf32 or as three products in tf32. Operands differ in how they are gathered:
// conv_sm80.cu (forward, input gradient), conv_sm80_wgrad.cu, separable_sm80.cu.
//
// A block computes a tile of kTensorTiles in steps of 64 bytes of depth. cp.async brings both operands into a ring of
// four stages, ldmatrix takes fragments out of it, one barrier a stage. In shared memory chunks of 16 bytes stand where
// no two of a copy or of an ldmatrix meet in a bank:
//   along depth (rows of 64 bytes, two to a line of all banks): chunk ^ (row / 2 % 4);
//   across it (rows are steps of depth): chunk ^ (row % 8); float32, which is read by words: chunk ^ (row % 4 * 2).
// Registers: 128 sums of a 64 x 64 warp tile, 64 for the fragments of two steps, some 40 for addresses: two blocks of
// four warps a multiprocessor, so one multiplies while the other starts or ends.
#pragma once

#include "common.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace convkit::cuda {

template <class S_, bool exact_, int tile_> struct TensorConfig {
  using S = S_;
  static constexpr bool exact = exact_, wide = sizeof(S) == 4;
  static constexpr TensorTile tile = kTensorTiles[tile_];
  static constexpr int rows = tile.rows, columns = tile.columns, threads = tile.threads(), stages = TensorTile::stages;
  static constexpr int depth = TensorTile::depth_bytes / int(sizeof(S)), depth_bytes = TensorTile::depth_bytes;
  static constexpr int warp_rows = rows / tile.warp_rows, warp_columns = columns / tile.warp_columns;  // elements of a warp
  static constexpr int m_tiles = warp_rows / 16, n_tiles = warp_columns / 8;
  static constexpr int stage_bytes = (rows + columns) * depth_bytes;
  static constexpr int sums = m_tiles * n_tiles * 4 * (exact ? 2 : 1);  // of a thread
  static constexpr int blocks = threads > 128 ? 1 : sums >= 128 ? 2 : sums == 64 ? 3 : 4;  // of a multiprocessor, that have to fit into its registers
};

// Where a byte of an operand stands in its part of a stage.
__device__ __forceinline__ int along_depth_at(int row, int byte) { return row * TensorTile::depth_bytes + (((byte >> 4) ^ (row >> 1 & 3)) << 4) + (byte & 15); }
template <class S, int width> __device__ __forceinline__ int across_depth_at(int row, int byte) {
  constexpr int row_bytes = width * int(sizeof(S));
  int turn = sizeof(S) == 4 ? (row & 3) << 1 : row_bytes >= 128 ? row & 7 : row >> 1 & 3;
  return row * row_bytes + (((byte >> 4) ^ turn) << 4) + (byte & 15);
}

template <class C> struct Fragments {
  uint32_t a[C::m_tiles][4], b[C::n_tiles][2];
};

// The fragments of 32 bytes of depth, the first or second of a stage.
template <class C, bool along_depth> __device__ __forceinline__ void load_fragments(Fragments<C>& f, const unsigned char* left, const unsigned char* right, int half) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8;
  int row0 = warp / C::tile.warp_columns * C::warp_rows, column0 = warp % C::tile.warp_columns * C::warp_columns;
  if constexpr (along_depth) {
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i)
      ptx::ldmatrix_x4(f.a[i], left + along_depth_at(row0 + i * 16 + (matrix & 1) * 8 + lane % 8, (half * 2 + (matrix >> 1)) * 16));
#pragma unroll
    for (int j = 0; j < C::n_tiles; j += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, right + along_depth_at(column0 + j * 8 + (matrix >> 1) * 8 + lane % 8, (half * 2 + (matrix & 1)) * 16));
      f.b[j][0] = b[0], f.b[j][1] = b[1], f.b[j + 1][0] = b[2], f.b[j + 1][1] = b[3];
    }
  } else if constexpr (!C::wide) {
    using S = typename C::S;
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i)
      ptx::ldmatrix_x4_transposed(f.a[i], left + across_depth_at<S, C::rows>(half * 16 + (matrix >> 1) * 8 + lane % 8, (row0 + i * 16 + (matrix & 1) * 8) * 2));
#pragma unroll
    for (int j = 0; j < C::n_tiles; j += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_transposed(b, right + across_depth_at<S, C::columns>(half * 16 + (matrix & 1) * 8 + lane % 8, (column0 + j * 8 + (matrix >> 1) * 8) * 2));
      f.b[j][0] = b[0], f.b[j][1] = b[1], f.b[j + 1][0] = b[2], f.b[j + 1][1] = b[3];
    }
  } else {
    int g = lane / 4, t = lane % 4;
    auto word = [](const unsigned char* at) { return *reinterpret_cast<const uint32_t*>(at); };
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) f.a[i][e] = word(left + across_depth_at<float, C::rows>(half * 8 + t + e / 2 * 4, (row0 + i * 16 + g + e % 2 * 8) * 4));
#pragma unroll
    for (int j = 0; j < C::n_tiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) f.b[j][e] = word(right + across_depth_at<float, C::columns>(half * 8 + t + e * 4, (column0 + j * 8 + g) * 4));
  }
}

// v = big + small but for 2^-24 of it; what is not finite has neither, as its rest would be NaN, and so would be its
// product with another's rest of zero.
__device__ __forceinline__ void split_tf32(uint32_t v, uint32_t& big, uint32_t& small) {
  float value = isfinite(__uint_as_float(v)) ? __uint_as_float(v) : 0.0f;
  big = ptx::to_tf32(value);
  small = ptx::to_tf32(value - __uint_as_float(big));
}

template <class C> __device__ __forceinline__ void multiply(float (&sum)[C::m_tiles][C::n_tiles][4], const Fragments<C>& f) {
  if constexpr (!C::wide) {
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i)
#pragma unroll
      for (int j = 0; j < C::n_tiles; ++j) ptx::mma_m16n8k16<typename C::S>(sum[i][j], f.a[i], f.b[j]);
  } else {
    if constexpr (C::exact) {  // what tf32 leaves out, before what would swallow it
      uint32_t b[C::n_tiles][2], b_rest[C::n_tiles][2];
#pragma unroll
      for (int j = 0; j < C::n_tiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) split_tf32(f.b[j][e], b[j][e], b_rest[j][e]);
#pragma unroll
      for (int i = 0; i < C::m_tiles; ++i) {
        uint32_t a[4], a_rest[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) split_tf32(f.a[i][e], a[e], a_rest[e]);
#pragma unroll
        for (int j = 0; j < C::n_tiles; ++j) ptx::mma_m16n8k8_tf32(sum[i][j], a_rest, b[j]);
#pragma unroll
        for (int j = 0; j < C::n_tiles; ++j) ptx::mma_m16n8k8_tf32(sum[i][j], a, b_rest[j]);
      }
    }
    uint32_t b[C::n_tiles][2];
#pragma unroll
    for (int j = 0; j < C::n_tiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) b[j][e] = ptx::to_tf32(__uint_as_float(f.b[j][e]));
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = ptx::to_tf32(__uint_as_float(f.a[i][e]));
#pragma unroll
      for (int j = 0; j < C::n_tiles; ++j) ptx::mma_m16n8k8_tf32(sum[i][j], a, b[j]);
    }
  }
}

// The sums of one stage.
template <class C, bool along_depth> __device__ __forceinline__ void multiply_step(float (&total)[C::m_tiles][C::n_tiles][4], const unsigned char* left, const unsigned char* right) {
  if constexpr (C::exact) {
    // Tensor cores cut the sums off instead of rounding them: they get short chains, and the totals are added rounded.
    float sum[C::m_tiles][C::n_tiles][4] = {};
#pragma unroll 1  // unrolled, the fragments of both would have to fit into the registers
    for (int half = 0; half < 2; ++half) {
      Fragments<C> f;
      load_fragments<C, along_depth>(f, left, right, half);
      multiply<C>(sum, f);
    }
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i)
#pragma unroll
      for (int j = 0; j < C::n_tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) total[i][j][e] += sum[i][j][e];
  } else {
    Fragments<C> f[2];
    load_fragments<C, along_depth>(f[0], left, right, 0);
    load_fragments<C, along_depth>(f[1], left, right, 1);  // on its way while the first is multiplied
    multiply<C>(total, f[0]);
    multiply<C>(total, f[1]);
  }
}

// P has: C, a TensorConfig; along_depth: neighbours along the depth are neighbours in memory, for both operands; what it
// is given; and
//   struct Task (p, block index): which tile, bool exists, int steps of depth;
//   struct Left, Right (p, task, table): prepare() before a barrier, and copy(p, task, to) of one step after the other;
//   store(task, sums, shared).
template <class P> __global__ void __launch_bounds__(P::C::threads, P::C::blocks) product(const __grid_constant__ P p) {
  using C = typename P::C;
  unsigned char* shared = dynamic_shared();
  typename P::Task task(p, blockIdx.x);
  if (!task.exists) return;
  typename P::Left left(p, task, shared + C::stages * C::stage_bytes);
  typename P::Right right(p, task);
  __syncthreads();
  int fetched = 0;
  auto fetch = [&] {
    unsigned char* to = shared + fetched % C::stages * C::stage_bytes;
    if (fetched < task.steps) {
      left.copy(p, task, to);
      right.copy(p, task, to + C::rows * C::depth_bytes);
    }
    ++fetched;
    ptx::copy_async_commit();  // an empty group as well: what wait() counts
  };
#pragma unroll 1
  for (int i = 0; i < C::stages - 1; ++i) fetch();

  float total[C::m_tiles][C::n_tiles][4] = {};
#pragma unroll 1
  for (int step = 0; step < task.steps; ++step) {
    ptx::copy_async_wait<C::stages - 2>();
    __syncthreads();  // everyone's copies of this step are there, and everyone is done with the stage that is filled next
    fetch();
    const unsigned char* a = shared + step % C::stages * C::stage_bytes;
    const unsigned char* b = a + C::rows * C::depth_bytes;
    multiply_step<C, P::along_depth>(total, a, b);
  }
  ptx::copy_async_wait<0>();
  __syncthreads();  // the stages are free
  p.store(task, total, shared);
}

// Where the rows of a product are: h x w positions in each image, which start at (start + i * step) of the source and end
// at (dst + i * step) of the destination.
struct Grid {
  int h, w, rows, start_h, start_w, dst_h, dst_w;
  FastDiv by_h, by_w;
};
inline Grid grid_of_positions(int64_t n, int h, int w, int start_h, int start_w, int dst_h = 0, int dst_w = 0) {
  return {h, w, int(n * h * w), start_h, start_w, dst_h, dst_w, FastDiv(h), FastDiv(w)};
}

// A position of the grid: where its pixel starts in the source. Outside of the grid: where no tap leads inside.
struct alignas(16) Position {
  int64_t offset;
  int y, x;
};

// The positions of a tile's rows, of a source of h x w pixels of `pitch` elements, into a table in shared memory.
template <int rows, int threads>
__device__ __forceinline__ const Position* find_positions(unsigned char* table, const Grid& grid, int row0, int h, int w, int64_t pitch, int step_h, int step_w, int64_t channel) {
  Position* positions = reinterpret_cast<Position*>(table);
  for (int i = threadIdx.x; i < rows; i += threads) {
    int m = row0 + i;
    uint32_t x, y, n = grid.by_h.divmod(grid.by_w.divmod(uint32_t(m), x), y);
    Position at{0, -(1 << 30), 0};
    if (m < grid.rows) {
      at.y = int(y) * step_h + grid.start_h, at.x = int(x) * step_w + grid.start_w;
      at.offset = ((int64_t(n) * h + at.y) * w + at.x) * pitch + channel;
    }
    positions[i] = at;
  }
  return positions;
}

// What comes after the sums, and where it goes.
struct Epilogue {
  void* dst;
  const void* residual;            // in the order of dst, or null
  const void* bias;                // beside no scale
  const float *scale, *shift;
  bool relu, nhwc, vectors;        // vectors: 16 bytes can be stored at once
  int64_t h, w, channels;          // of the destination
  int step_h, step_w;
};

// A warp's sums go through shared memory, 16 rows at a time, to where neighbouring lanes hold neighbours in memory. A
// residual comes the same way, the next 16 rows of it on their way while these are added and stored.
template <class C, bool residual> __device__ __forceinline__ void store_tile(const Epilogue& e, const Grid& grid, int row0, int column0, int columns, int group,
                                                                             float (&sum)[C::m_tiles][C::n_tiles][4], unsigned char* shared) {
  using S = typename C::S;
  constexpr int V = kVec<S>, wide_pitch = C::warp_columns + V, tall_pitch = 16 + V;  // elements; no two lanes in one bank
  constexpr int bytes = (C::warp_columns * tall_pitch > 16 * wide_pitch ? C::warp_columns * tall_pitch : 16 * wide_pitch) * int(sizeof(S));
  constexpr int parts = residual ? 2 : 1;
  static_assert(parts * bytes * C::threads / 32 <= C::stages * C::stage_bytes && bytes % 16 == 0);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  unsigned char* area = shared + warp * parts * bytes;
  row0 += warp / C::tile.warp_columns * C::warp_rows;
  column0 += warp % C::tile.warp_columns * C::warp_columns;
  int64_t channel0 = int64_t(group) * columns;
  S* dst = static_cast<S*>(e.dst);
#pragma unroll
  for (int j = 0; j < C::n_tiles; ++j)
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      int column = column0 + j * 8 + 2 * t + x;
      if (column >= columns) continue;
      float scale = e.scale != nullptr ? e.scale[channel0 + column] : 1.0f, shift = e.shift != nullptr ? e.shift[channel0 + column] : 0.0f;
      if (e.bias != nullptr) shift += widen(static_cast<const S*>(e.bias)[channel0 + column]);
#pragma unroll
      for (int i = 0; i < C::m_tiles; ++i)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          float v = sum[i][j][y * 2 + x] * scale + shift;
          sum[i][j][y * 2 + x] = e.relu && !residual ? relu(v) : v;
        }
    }
  // Calls f(staged, place in dst, whether that exists, whole) for this lane's chunks of 16 rows: V neighbours, channels of a
  // pixel or pixels of a channel, if whole, else one element, beside those of the next lanes.
  auto each_chunk = [&](int i, S* staged, auto&& f) {
    auto visit = [&](auto whole) {
      constexpr int N = decltype(whole)::value ? V : 1, across = C::warp_columns / N, down = 16 / N;
#pragma unroll 1
      for (int at = lane; at < 16 * across; at += 32) {
        int row = e.nhwc ? at / across : at % down * N, column = e.nhwc ? at % across * N : at / down;
        int position = row0 + i * 16 + row, filter = column0 + column;
        bool exists = position < grid.rows && filter < columns;
        int64_t place = 0;
        if (exists) {
          uint32_t x, y, n = grid.by_h.divmod(grid.by_w.divmod(uint32_t(position), x), y);
          int64_t dst_y = grid.dst_h + int64_t(y) * e.step_h, dst_x = grid.dst_w + int64_t(x) * e.step_w, channel = channel0 + filter;
          place = e.nhwc ? ((n * e.h + dst_y) * e.w + dst_x) * e.channels + channel : ((n * e.channels + channel) * e.h + dst_y) * e.w + dst_x;
        }
        f(staged + (e.nhwc ? row * wide_pitch + column : column * tall_pitch + row), place, exists, whole);
      }
    };
    if (e.vectors) visit(std::true_type{});
    else visit(std::false_type{});
  };
  auto staged_of = [&](int i) { return reinterpret_cast<S*>(area + i % parts * bytes); };
  [[maybe_unused]] auto fetch = [&](int i) {
    if (i < C::m_tiles)
      each_chunk(i, staged_of(i), [&](S* to, int64_t at, bool exists, auto whole) {
        const S* from = static_cast<const S*>(e.residual) + at;
        if constexpr (whole) ptx::copy_async_16(to, from, exists ? 16 : 0);
        else *to = exists ? *from : narrow<S>(0);
      });
    ptx::copy_async_commit();
  };
  if constexpr (residual) fetch(0);
#pragma unroll
  for (int i = 0; i < C::m_tiles; ++i) {
    S* staged = staged_of(i);
    __syncwarp();  // everyone is done with what is written next
    if constexpr (residual) {
      fetch(i + 1);
      ptx::copy_async_wait<1>();
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < C::n_tiles; ++j)
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        int row = g + y * 8, column = j * 8 + 2 * t;
        Pair<S>* pair = reinterpret_cast<Pair<S>*>(staged + row * wide_pitch + column);
        S *first = staged + column * tall_pitch + row, *second = first + tall_pitch;
        float a = sum[i][j][y * 2], b = sum[i][j][y * 2 + 1];
        if constexpr (residual) {  // where this lane's sums go next
          Pair<S> add = e.nhwc ? *pair : Pair<S>{*first, *second};
          a += widen(add.x), b += widen(add.y);
          if (e.relu) a = relu(a), b = relu(b);
        }
        Pair<S> v{narrow<S>(a), narrow<S>(b)};
        if (e.nhwc) *pair = v;
        else *first = v.x, *second = v.y;
      }
    __syncwarp();
    each_chunk(i, staged, [&](const S* from, int64_t at, bool exists, auto whole) {
      if (!exists) return;
      if constexpr (whole) *reinterpret_cast<Vec<S>*>(dst + at) = *reinterpret_cast<const Vec<S>*>(from);
      else dst[at] = *from;
    });
  }
}

// An image in channels_last order with the channels of each group padded with zeros, so that every pixel of a group
// starts at 16 bytes. Source: (n, c, pixels) of either layout, `channels` a group; destination: `padded` a group.
struct Arrangement {
  const void* src;
  void* dst;
  DType dtype;
  bool nhwc;
  int64_t n, pixels, groups, channels, padded;
};
void arrange(const Arrangement&, Stream);

void conv_sm80_wgrad(const ConvArgs&, const CudaConvPlan&, Stream);

// Calls f(TensorConfig, granule bytes) with the one that the plan names, of those that are compiled: all tiles for whole
// chunks; 64 x 64 sums a warp leave no registers for the second sums of `exact`; few channels go with few filters.
template <class F> void with_config(DType dtype, const TensorPlan& plan, F&& f) {
  auto with_tile = [&]<class S, bool exact>(Tag<S>, std::bool_constant<exact>) {
    constexpr int granule = sizeof(S) == 4 ? 4 : 8;
    auto go = [&]<int tile>(std::integral_constant<int, tile>) {
      if constexpr (!(exact && kTensorTiles[tile].large())) {
        if constexpr (tile == 2 || tile == 4)
          if (plan.granules) return f(TensorConfig<S, exact, tile>{}, std::integral_constant<int, granule>{});
        return f(TensorConfig<S, exact, tile>{}, std::integral_constant<int, 16>{});
      } else {
        throw std::runtime_error("convkit: conv_sm80: the plan is of a tile that is not compiled");
      }
    };
    switch (plan.tile) {
      case 0: return go(std::integral_constant<int, 0>{});
      case 1: return go(std::integral_constant<int, 1>{});
      case 2: return go(std::integral_constant<int, 2>{});
      case 3: return go(std::integral_constant<int, 3>{});
      case 4: return go(std::integral_constant<int, 4>{});
      case 5: return go(std::integral_constant<int, 5>{});
      default: return go(std::integral_constant<int, 6>{});
    }
  };
  if (dtype == DType::bf16) with_tile(Tag<__nv_bfloat16>{}, std::false_type{});
  else if (dtype == DType::f16) with_tile(Tag<__half>{}, std::false_type{});
  else if (plan.exact) with_tile(Tag<float>{}, std::true_type{});
  else with_tile(Tag<float>{}, std::false_type{});
}

}  // namespace convkit::cuda
