// Depthwise + affine + ReLU + pointwise + affine + ReLU in one kernel, the pointwise part on tensor cores. A block
// computes the depthwise result of 64 pixels and all channels once, into shared memory, where it is the left operand of
// every column tile: x is read once and the middle is never written. The pointwise filters stream through the stages of
// conv_sm80.cuh, and go on doing so while a tile is stored.
#include "conv_sm80.cuh"

namespace convkit::cuda {

namespace {

constexpr int kPrepareThreads = 256;

struct SeparableTensorArgs {
  const void* x;
  const float* taps;               // (tap, channel)
  const float *scale, *shift;      // of the depthwise part
  const void* weight;              // (filter, channel)
  bool relu;
  int x_h, x_w, given, channels;   // channels: as given, and padded
  int r, s, stride_h, stride_w, dilation_h, dilation_w;
  int filters, steps, column_tiles, column_blocks;
  Grid grid;
  Epilogue epilogue;
};

// Four rows of a chunk of channels at once: a tap's values are read for all four.
template <class C> __device__ __forceinline__ void depthwise_tile(const SeparableTensorArgs& p, const Position* positions, unsigned char* left) {
  using S = typename C::S;
  constexpr int V = kVec<S>, together = 4;
  int chunks = p.steps * 4;
  for (int i = threadIdx.x; i < chunks * (C::rows / together); i += C::threads) {
    int chunk = i % chunks, row0 = i / chunks * together, c = chunk * V;
    float sum[together][V] = {};
    if (c < p.channels) {
      for (int r = 0; r < p.r; ++r)
        for (int s = 0; s < p.s; ++s) {
          int tap_y = r * p.dilation_h, tap_x = s * p.dilation_w;
          float tap[V];
          load_values(p.taps + int64_t(r * p.s + s) * p.channels + c, tap);
          int64_t offset = (int64_t(tap_y) * p.x_w + tap_x) * p.channels + c;
#pragma unroll
          for (int j = 0; j < together; ++j) {
            Position at = positions[row0 + j];
            if (unsigned(at.y + tap_y) >= unsigned(p.x_h) || unsigned(at.x + tap_x) >= unsigned(p.x_w)) continue;
            float x[V];
            load_wide(static_cast<const S*>(p.x) + at.offset + offset, x);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[j][v] += x[v] * tap[v];
          }
        }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        bool there = c + v < p.given;
        float scale = there && p.scale != nullptr ? p.scale[c + v] : 1.0f, shift = there && p.shift != nullptr ? p.shift[c + v] : 0.0f;
#pragma unroll
        for (int j = 0; j < together; ++j) {
          float value = sum[j][v] * scale + shift;
          sum[j][v] = p.relu ? relu(value) : value;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < together; ++j) store_narrow(reinterpret_cast<S*>(left + chunk / 4 * C::rows * C::depth_bytes + along_depth_at(row0 + j, chunk % 4 * 16)), sum[j]);
  }
}

template <class C> __global__ void __launch_bounds__(C::threads, C::exact ? 2 : 3) separable(const __grid_constant__ SeparableTensorArgs p) {
  using S = typename C::S;
  constexpr int filter_stage = C::columns * C::depth_bytes;
  unsigned char* left = dynamic_shared();  // a stage of it for each step
  unsigned char* stages = left + p.steps * C::rows * C::depth_bytes;
  unsigned char* table = stages + C::stages * filter_stage;
  unsigned char* staged = table + C::rows * sizeof(Position);
  int row0 = int(blockIdx.x / p.column_blocks) * C::rows, part = int(blockIdx.x % p.column_blocks);
  int first = int(int64_t(p.column_tiles) * part / p.column_blocks), last = int(int64_t(p.column_tiles) * (part + 1) / p.column_blocks);

  int tile = first, step = 0, fetched = 0;
  auto fetch = [&] {
    unsigned char* to = stages + fetched % C::stages * filter_stage;
    int d = step * C::depth + threadIdx.x % 4 * kVec<S>;
#pragma unroll
    for (int i = threadIdx.x / 4; i < C::columns; i += C::threads / 4) {
      int column = tile * C::columns + i;
      bool inside = tile < last && column < p.filters && d < p.channels;
      ptx::copy_async_16(to + along_depth_at(i, threadIdx.x % 4 * 16), static_cast<const S*>(p.weight) + (inside ? int64_t(column) * p.channels + d : 0), inside ? 16 : 0);
    }
    if (++step == p.steps) step = 0, ++tile;
    ++fetched;
    ptx::copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < C::stages - 1; ++i) fetch();
  const Position* positions = find_positions<C::rows, C::threads>(table, p.grid, row0, p.x_h, p.x_w, p.channels, p.stride_h, p.stride_w, 0);
  __syncthreads();
  depthwise_tile<C>(p, positions, left);

  int used = 0;
#pragma unroll 1
  for (int column_tile = first; column_tile < last; ++column_tile) {
    float total[C::m_tiles][C::n_tiles][4] = {};
#pragma unroll 1
    for (int i = 0; i < p.steps; ++i, ++used) {
      ptx::copy_async_wait<C::stages - 2>();
      __syncthreads();  // the first time, of the left operand too
      fetch();
      multiply_step<C, true>(total, left + i * C::rows * C::depth_bytes, stages + used % C::stages * filter_stage);
    }
    store_tile<C, false>(p.epilogue, p.grid, row0, column_tile * C::columns, p.filters, 0, total, staged);
  }
  ptx::copy_async_wait<0>();
}

struct Filters {
  const void *depthwise, *pointwise;
  WeightStrides depthwise_strides, pointwise_strides;
  int64_t channels, padded, s, taps, filters;
  float* to_taps;
  void* to_weight;
};

template <class S> __global__ void __launch_bounds__(kPrepareThreads) pack_separable(Filters a) {
  uint32_t i = blockIdx.x * kPrepareThreads + threadIdx.x, padded = uint32_t(a.padded), row = i / padded, c = i % padded, s = uint32_t(a.s);
  bool there = c < a.channels;
  if (row < a.taps) {
    const WeightStrides& w = a.depthwise_strides;
    a.to_taps[i] = there ? widen(static_cast<const S*>(a.depthwise)[c * w.k + row / s * w.r + row % s * w.s]) : 0.0f;
  } else if (row < a.taps + a.filters) {
    row -= uint32_t(a.taps);
    static_cast<S*>(a.to_weight)[row * a.padded + c] = there ? static_cast<const S*>(a.pointwise)[row * a.pointwise_strides.k + c * a.pointwise_strides.c] : narrow<S>(0);
  }
}

}  // namespace

void separable_sm80(const SeparableArgs& a, const CudaSeparablePlan& plan, Stream stream) {
  const ConvProblem& p = a.problem;
  bool nhwc = p.layout == Layout::nhwc;
  unsigned char* workspace = static_cast<unsigned char*>(a.workspace);
  auto go = [&]<class C>(C) {
    using S = typename C::S;
    SeparableTensorArgs g{};
    g.x = a.x;
    if (plan.arrange_x) {
      g.x = workspace + plan.x_offset;
      arrange({a.x, workspace + plan.x_offset, p.dtype, nhwc, p.n, p.h * p.w, 1, p.c, plan.channels}, stream);
    }
    g.taps = reinterpret_cast<float*>(workspace + plan.taps_offset), g.weight = workspace + plan.weight_offset;
    Filters filters{a.depthwise_weight, a.pointwise_weight, a.depthwise_strides, a.pointwise_strides, p.c, plan.channels, p.s, p.r * p.s, a.filters,
                    reinterpret_cast<float*>(workspace + plan.taps_offset), workspace + plan.weight_offset};
    launch("pack_separable", pack_separable<S>, {grid_of(ceil_div((filters.taps + a.filters) * plan.channels, kPrepareThreads)), dim3(kPrepareThreads), 0, stream}, filters);
    g.scale = static_cast<const float*>(a.depthwise_scale), g.shift = static_cast<const float*>(a.depthwise_shift), g.relu = a.depthwise_relu;
    g.x_h = int(p.h), g.x_w = int(p.w), g.given = int(p.c), g.channels = int(plan.channels), g.r = int(p.r), g.s = int(p.s);
    g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w), g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
    g.filters = int(a.filters), g.steps = int(ceil_div(plan.channels, C::depth)), g.column_tiles = int(ceil_div(a.filters, C::columns)), g.column_blocks = plan.column_blocks;
    g.grid = grid_of_positions(p.n, int(p.p), int(p.q), int(-p.pad_top), int(-p.pad_left));
    Epilogue& e = g.epilogue;
    e.dst = a.y, e.scale = static_cast<const float*>(a.scale), e.shift = static_cast<const float*>(a.shift), e.relu = a.relu, e.nhwc = nhwc;
    e.h = p.p, e.w = p.q, e.channels = a.filters, e.step_h = e.step_w = 1;
    e.vectors = aligned16(a.y) && (nhwc ? a.filters : p.p * p.q) % kVec<S> == 0;
    Launch how{dim3(unsigned(ceil_div(g.grid.rows, C::rows)) * plan.column_blocks), dim3(C::threads), plan.shared_bytes, stream};
    launch("separable_sm80", separable<C>, how, g);
  };
  auto with_tile = [&]<class S, bool exact>(Tag<S>, std::bool_constant<exact>) {
    if (kTensorTiles[plan.tile].columns == 64) go(TensorConfig<S, exact, 3>{});
    else go(TensorConfig<S, exact, 5>{});
  };
  if (p.dtype == DType::bf16) with_tile(Tag<__nv_bfloat16>{}, std::false_type{});
  else if (p.dtype == DType::f16) with_tile(Tag<__half>{}, std::false_type{});
  else if (plan.exact) with_tile(Tag<float>{}, std::true_type{});
  else with_tile(Tag<float>{}, std::false_type{});
}

}  // namespace convkit::cuda
