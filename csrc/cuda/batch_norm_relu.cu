// Batch normalisation + ReLU with an optional residual (Ioffe and Szegedy 2015, arXiv:1502.03167), and sums over channels.
//
// Training forward: a pass for the statistics, one that normalises, adds, clips and writes, in reverse order so that it
// finds the tail of the first in the second-level cache: 3 passes over the activation (4 with a residual). Backward: one
// for the two sums, one for the gradients: 5 passes. The ReLU's mask is the sign of the same expression computed again
// from x, or, with a residual, one bit an element. Sums run over fixed pieces of a channel and are merged in order, in
// double, by a small kernel between the two: nothing waits for another block.
//
// Where the values of some channels fit into the shared memory of a cluster, batch_norm_on_chip.cu does with 2 and 3 passes.
//
// Memory is rows: pixels of all channels, planes of one channel, or images of planes (ChannelRows). Where a row is a
// multiple of 8 elements a thread takes 8 at a time by 16-byte accesses; else a warp takes 32 neighbours and writes their
// mask by a ballot.
#include "batch_norm_relu.cuh"

namespace convkit::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 4;  // vectors that a thread asks for before it adds them

// Sums of rows that hold all channels, pixels or images. A block: one piece of the rows, units x W columns of whole
// channels; a thread W columns of every so many rows.
template <Sums what, int W, class S> __global__ void __launch_bounds__(kThreads, 2) sums_by_columns(Norm<S> a, int units) {
  using T = compute_t<S>;
  double* shared = reinterpret_cast<double*>(dynamic_shared());  // [group][2][W][units], side by side for neighbours
  int groups = kThreads / units, unit = threadIdx.x % units, group = threadIdx.x / units, columns = units * W;
  int64_t length = a.plan.length, values = a.plan.values, column = int64_t(blockIdx.x) * columns + unit * W, piece = blockIdx.y;
  int64_t first = piece * a.plan.piece_steps, last = min(a.plan.rows, first + a.plan.piece_steps);
  auto shift_of_channel = [&](int64_t c) { return usable(widen(a.x[first * length + c * values])); };
  T k[3][W] = {};
  double total[2][W] = {};
  if (group < groups && column < length) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      int64_t c = (column + i) / values;
      if constexpr (what == Sums::moments) k[0][i] = shift_of_channel(c);
      if constexpr (what == Sums::gradient) k[0][i] = a.values[c], k[1][i] = a.values[a.c + c], k[2][i] = a.values[2 * a.c + c];
    }
    int64_t bits = (length + 7) / 8 * 8;
    for (int64_t row = first + group; row < last;) {
      T sum[2][W] = {};
      auto add = [&](int64_t of) {
        T out[2][W];
        int64_t at = of * length + column;
        terms<what, W>(a, a.x + at, a.grad + at, of * bits + column, k, out);
#pragma unroll
        for (int i = 0; i < W; ++i) sum[0][i] += out[0][i], sum[1][i] += out[1][i];
      };
      // Some rows at a time without a branch between them: their loads are on their way together.
      int step = 0;
      for (; step < kChain && row + (kTogether - 1) * groups < last; step += kTogether, row += kTogether * groups)
#pragma unroll
        for (int i = 0; i < kTogether; ++i) add(row + i * groups);
      for (; step < kChain && row < last; ++step, row += groups) add(row);
#pragma unroll
      for (int i = 0; i < W; ++i) total[0][i] += double(sum[0][i]), total[1][i] += double(sum[1][i]);
    }
  }
  if (group < groups) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      shared[(group * 2 + 0) * columns + i * units + unit] = total[0][i];
      shared[(group * 2 + 1) * columns + i * units + unit] = total[1][i];
    }
  }
  __syncthreads();
  double count = double(last - first) * double(values);
  auto leave = [&](int64_t c, double first_sum, double second) {
    double shift = what == Sums::moments ? double(shift_of_channel(c)) : 0;
    finish<what>(first_sum, second, shift, count, a.partial + piece * 2 * a.c + c, a.c);
  };
  int64_t first_channel = int64_t(blockIdx.x) * columns / values;
  if (values == 1) {
    for (int i = threadIdx.x; i < columns; i += kThreads) {
      int64_t channel = first_channel + i % units * W + i / units;
      if (channel >= a.c) continue;
      double first_sum = 0, second = 0;
      for (int g = 0; g < groups; ++g) first_sum += shared[g * 2 * columns + i], second += shared[(g * 2 + 1) * columns + i];
      leave(channel, first_sum, second);
    }
    return;
  }
  int each = int(values);  // columns of a channel: a warp adds them up
  for (int channel = threadIdx.x / 32; channel < columns / each && first_channel + channel < a.c; channel += kThreads / 32) {
    double first_sum = 0, second = 0;
    for (int j = threadIdx.x % 32; j < groups * each; j += 32) {
      int at = channel * each + j % each;
      const double* from = shared + j / each * 2 * columns + at % W * units + at / W;
      first_sum += from[0], second += from[columns];
    }
    first_sum = warp_sum(first_sum), second = warp_sum(second);
    if (threadIdx.x % 32 == 0) leave(first_channel + channel, first_sum, second);
  }
}

// Sums by plane. A block: one channel and one piece of its values, image after image.
template <Sums what, int W, class S> __global__ void __launch_bounds__(kThreads) sums_by_plane(Norm<S> a) {
  using T = compute_t<S>;
  double* shared = reinterpret_cast<double*>(dynamic_shared());
  int64_t c = blockIdx.x, piece = blockIdx.y;
  int64_t of_piece = a.plan.piece_steps * a.plan.values, first = piece * of_piece, last = min(a.n * a.hw, first + of_piece);
  int64_t bits = a.plan.kind == ChannelRows::images ? a.hw : (a.hw + 7) / 8 * 8;  // of a plane in the mask
  auto at = [&](int64_t i) { return (i / a.hw * a.c + c) * a.hw + i % a.hw; };
  T shift = what == Sums::moments ? usable(widen(a.x[at(first)])) : T(0);
  T k[3][W];
#pragma unroll
  for (int i = 0; i < W; ++i) {
    k[0][i] = shift, k[1][i] = k[2][i] = 0;
    if (what == Sums::gradient) k[0][i] = a.values[c], k[1][i] = a.values[a.c + c], k[2][i] = a.values[2 * a.c + c];
  }
  double total[2] = {};
  for (int64_t n = first / a.hw; n * a.hw < last; ++n) {
    int64_t row = n * a.c + c, begin = max(int64_t(0), first - n * a.hw), end = min(a.hw, last - n * a.hw);
    for (int64_t j = begin + threadIdx.x * W; j < end;) {
      T sum[2][W] = {};
      auto add = [&](int64_t of) {
        T out[2][W];
        terms<what, W>(a, a.x + row * a.hw + of, a.grad + row * a.hw + of, row * bits + of, k, out);
#pragma unroll
        for (int i = 0; i < W; ++i) sum[0][i] += out[0][i], sum[1][i] += out[1][i];
      };
      int step = 0;
      for (; step < kChain && j + (kTogether - 1) * kThreads * W < end; step += kTogether, j += kTogether * kThreads * W)
#pragma unroll
        for (int i = 0; i < kTogether; ++i) add(j + i * kThreads * W);
      for (; step < kChain && j < end; ++step, j += kThreads * W) add(j);
#pragma unroll
      for (int i = 0; i < W; ++i) total[0] += double(sum[0][i]), total[1] += double(sum[1][i]);
    }
  }
  int warp = threadIdx.x / 32;
  double first_sum = warp_sum(total[0]), second = warp_sum(total[1]);
  if (threadIdx.x % 32 == 0) shared[warp] = first_sum, shared[8 + warp] = second;
  __syncthreads();
  if (threadIdx.x == 0) {
    first_sum = second = 0;
    for (int w = 0; w < kThreads / 32; ++w) first_sum += shared[w], second += shared[8 + w];
    finish<what>(first_sum, second, double(shift), double(last - first), a.partial + piece * 2 * a.c + c, a.c);
  }
}

// Merges the pieces of a channel: lanes of some warps take them in turn, then come pairs of lanes, then the warps.
// The order is fixed.
template <class S> __global__ void __launch_bounds__(kThreads) merge_moments(Norm<S> a, int warps) {
  using T = compute_t<S>;
  Moments* shared = reinterpret_cast<Moments*>(dynamic_shared());  // of the block's warps
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, of_channel = warp % warps;
  int64_t c = int64_t(blockIdx.x) * (kThreads / 32 / warps) + warp / warps;
  Moments all;
  if (c < a.c)
    for (int64_t piece = of_channel * 32 + lane; piece < a.plan.pieces; piece += 32 * warps) {
      double n = double(min(a.plan.piece_steps, a.plan.steps - piece * a.plan.piece_steps)) * double(a.plan.values);
      const double* p = a.partial + piece * 2 * a.c + c;
      all.add(n, p[0], p[a.c], p[0] * n);
    }
  for (int by = 16; by > 0; by /= 2) {
    double n = __shfl_down_sync(0xffffffffu, all.count, unsigned(by)), mean_n = __shfl_down_sync(0xffffffffu, all.mean, unsigned(by));
    double m2_n = __shfl_down_sync(0xffffffffu, all.m2, unsigned(by)), plain_n = __shfl_down_sync(0xffffffffu, all.plain, unsigned(by));
    if (lane < by) all.add(n, mean_n, m2_n, plain_n);
  }
  if (lane == 0) shared[warp] = all;
  __syncthreads();
  if (lane != 0 || of_channel != 0 || c >= a.c) return;
  for (int i = 1; i < warps; ++i) {
    const Moments& next = shared[warp + i];
    all.add(next.count, next.mean, next.m2, next.plain);
  }
  a.mean[c] = T(all.final_mean());
  a.var[c] = T(all.m2 / all.count);
}

// Per-channel factors, from the statistics.
template <class S> __global__ void __launch_bounds__(kThreads) prepare(Norm<S> a) {
  int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= a.c) return;
  a.values[c] = a.mean[c];
  a.values[a.c + c] = scale_of(a, c, a.var[c]);
  a.values[2 * a.c + c] = shift_of(a, c);
}

// The two sums of the gradient, in order; the gradients of weight and bias, and what the second pass needs.
template <class S> __global__ void __launch_bounds__(kThreads) merge_gradient(Norm<S> a) {
  int64_t c = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  double sum = 0, product = 0;
  if (c < a.c)
    for (int64_t piece = threadIdx.x % 32; piece < a.plan.pieces; piece += 32) sum += a.partial[piece * 2 * a.c + c], product += a.partial[(piece * 2 + 1) * a.c + c];
  sum = warp_sum(sum), product = warp_sum(product);
  if (threadIdx.x % 32 != 0 || c >= a.c) return;
  conclude(a, c, sum, product, true, a.values[3 * a.c + c], a.values[4 * a.c + c]);
}

template <class S> __global__ void __launch_bounds__(kThreads) merge_plain(Norm<S> a) {
  int64_t c = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  double sum = 0;
  if (c < a.c)
    for (int64_t piece = threadIdx.x % 32; piece < a.plan.pieces; piece += 32) sum += a.partial[piece * 2 * a.c + c];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0 && c < a.c) a.y[c] = narrow<S>(compute_t<S>(sum));
}

// Rows that hold all channels, 8 columns a thread whose factors stay in registers.
template <bool backward, class S> __global__ void __launch_bounds__(kThreads) apply_by_columns(Norm<S> a, int units) {
  constexpr int W = 8, kinds = backward ? 5 : 3;
  int groups = kThreads / units, group = threadIdx.x / units;
  int64_t length = a.plan.length, column = (int64_t(blockIdx.x) * units + threadIdx.x % units) * W;
  if (group >= groups || column >= length) return;
  compute_t<S> k[5][W] = {};
#pragma unroll
  for (int i = 0; i < W; ++i) {
    int64_t c = (column + i) / a.plan.values;
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) k[kind][i] = a.values[kind * a.c + c];
  }
  // Each block a run of rows, the last rows first: the pass before has just read them.
  int64_t each = ceil_div(a.plan.rows, gridDim.y), block = gridDim.y - 1 - blockIdx.y;
  int64_t first = block * each, last = min(a.plan.rows, first + each);
  for (int64_t row = last - 1 - group; row >= first; row -= groups) {
    int64_t at = row * length + column;
    unsigned bits = backward && a.mask != nullptr ? a.mask[at / 8] : 0u;
    bits = apply<backward, W>(a, a.x + at, a.grad + at, at, bits, k);
    if (!backward && a.mask != nullptr) a.mask[at / 8] = uint8_t(bits);
  }
}

// Rows are planes: units of 8 neighbours, which are of one channel.
template <bool backward, class S> __global__ void __launch_bounds__(kThreads) apply_by_plane(Norm<S> a, FastDiv by_plane, FastDiv by_channels) {
  constexpr int W = 8, kinds = backward ? 5 : 3, each = 4;
  int64_t units = a.plan.rows * (a.hw / W), base = (int64_t(gridDim.x) - 1 - blockIdx.x) * kThreads * each;
  int64_t base_row = base / by_plane.divisor;
  uint32_t in_row = uint32_t(base % by_plane.divisor), base_channel = uint32_t(base_row % a.c);
#pragma unroll
  for (int i = 0; i < each; ++i) {
    uint32_t offset = threadIdx.x + i * kThreads, channel;
    int64_t unit = base + offset;
    if (unit >= units) break;
    by_channels.divmod(base_channel + by_plane.div(in_row + offset), channel);
    compute_t<S> k[5][W];
#pragma unroll
    for (int kind = 0; kind < 5; ++kind) {
      compute_t<S> value = kind < kinds ? a.values[kind * a.c + channel] : compute_t<S>(0);
#pragma unroll
      for (int j = 0; j < W; ++j) k[kind][j] = value;
    }
    unsigned bits = backward && a.mask != nullptr ? a.mask[unit] : 0u;
    bits = apply<backward, W>(a, a.x + unit * W, a.grad + unit * W, unit * W, bits, k);
    if (!backward && a.mask != nullptr) a.mask[unit] = uint8_t(bits);
  }
}

// Any row length: a warp takes 32 neighbours of a row.
template <bool backward, class S> __global__ void __launch_bounds__(kThreads) apply_by_warp(Norm<S> a) {
  constexpr int kinds = backward ? 5 : 3;
  int lane = threadIdx.x % 32;
  int64_t pieces = ceil_div(a.plan.length, 32), all = a.plan.rows * pieces, mask_bytes = (a.plan.length + 7) / 8;
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < all; i += int64_t(gridDim.x) * (kThreads / 32)) {
    int64_t row = i / pieces, j = i % pieces * 32 + lane, at = row * a.plan.length + j;
    int64_t channel = a.plan.kind == ChannelRows::pixels ? j : a.plan.kind == ChannelRows::images ? j / a.hw : row % a.c;
    unsigned bits = 0;
    if (j < a.plan.length) {
      compute_t<S> k[5][1] = {};
#pragma unroll
      for (int kind = 0; kind < kinds; ++kind) k[kind][0] = a.values[kind * a.c + channel];
      if (backward && a.mask != nullptr) bits = unsigned(a.mask[row * mask_bytes + j / 8]) >> j % 8;
      bits = apply<backward, 1>(a, a.x + at, a.grad + at, at, bits, k);
    }
    if (!backward && a.mask != nullptr) {
      unsigned word = __ballot_sync(0xffffffffu, bits & 1);
      int64_t byte = i % pieces * 4 + lane;
      if (lane < 4 && byte < mask_bytes) a.mask[row * mask_bytes + byte] = uint8_t(word >> 8 * lane);
    }
  }
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads) update_running(S* running, int64_t stride, const T* batch, int64_t c, double momentum, double factor) {
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= c) return;
  double v = (1 - momentum) * double(widen(running[i * stride])) + momentum * double(batch[i]) * factor;
  if constexpr (sizeof(S) == 2) running[i * stride] = narrow<S>(float(v));
  else running[i * stride] = S(v);
}

// ---- launches --------------------------------------------------------------------------------------------------------------

template <class S> bool by_units(const Norm<S>& a) {
  return a.plan.length % 8 == 0 && aligned16(a.x) && aligned16(a.y) && aligned16(a.residual) && aligned16(a.grad) && aligned16(a.grad_x) && aligned16(a.grad_residual);
}

int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

template <Sums what, class S> void run_sums(const Norm<S>& a, Stream stream) {
  unsigned pieces = unsigned(a.plan.pieces);
  bool pixels = a.plan.kind == ChannelRows::pixels, planes = a.plan.kind == ChannelRows::planes;
  auto by_columns = [&](auto kernel, int units, int w) {
    launch("sums_by_columns", kernel, {dim3(unsigned(ceil_div(a.plan.length, units * w)), pieces), dim3(kThreads), int64_t(kThreads) * 2 * w * 8, stream}, a, units);
  };
  auto by_plane = [&](auto kernel) { launch("sums_by_plane", kernel, {dim3(unsigned(a.c), pieces), dim3(kThreads), 128, stream}, a); };
  if (!planes && by_units(a)) by_columns(sums_by_columns<what, 8, S>, pixels ? lanes_for(a.c / 8) : a.plan.units, 8);
  else if (pixels) by_columns(sums_by_columns<what, 1, S>, lanes_for(a.c), 1);
  else if (planes && by_units(a)) by_plane(sums_by_plane<what, 8, S>);
  else by_plane(sums_by_plane<what, 1, S>);
}

template <bool backward, class S> void run_apply(const Norm<S>& a, Stream stream) {
  int64_t enough = 16 * int64_t(a.plan.multiprocessors);
  if (!by_units(a)) {
    int64_t blocks = ceil_div(a.plan.rows * ceil_div(a.plan.length, 32), kThreads / 32);
    return launch("apply_by_warp", apply_by_warp<backward, S>, {grid_of(blocks < enough ? blocks : enough), dim3(kThreads), 0, stream}, a);
  }
  if (a.plan.kind != ChannelRows::planes) {
    int units = a.plan.kind == ChannelRows::pixels ? lanes_for(a.c / 8) : a.plan.units;
    int64_t across = ceil_div(a.plan.length / 8, units), down = ceil_div(enough, across), most = ceil_div(a.plan.rows, kThreads / units);
    down = down < most ? down : most;
    return launch("apply_by_columns", apply_by_columns<backward, S>, {dim3(unsigned(across), unsigned(down < 65535 ? down : 65535)), dim3(kThreads), 0, stream}, a, units);
  }
  int64_t units = a.plan.rows * (a.hw / 8);
  launch("apply_by_plane", apply_by_plane<backward, S>, {grid_of(ceil_div(units, kThreads * 4)), dim3(kThreads), 0, stream}, a, FastDiv(a.hw / 8), FastDiv(a.c));
}

template <class S> void run_small(const char* name, void (*kernel)(Norm<S>), const Norm<S>& a, int channels_a_block, Stream stream) {
  launch(name, kernel, {grid_of(ceil_div(a.c, channels_a_block)), dim3(kThreads), 0, stream}, a);
}

}  // namespace

void batch_norm_relu(const BatchNormArgs& b, const CudaChannelPlan& plan, Stream stream) {
  if (plan.chip.cluster > 0) return batch_norm_relu_on_chip(b, plan, stream);
  with_type(b.shape.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    Norm<S> a = norm_of<S>(b, plan);
    if (a.training) {
      run_sums<Sums::moments>(a, stream);
      int warps = 1;
      while (warps < kThreads / 32 && warps * 64 < a.plan.pieces) warps *= 2;
      int channels = kThreads / 32 / warps;
      launch("merge_moments", merge_moments<S>, {grid_of(ceil_div(a.c, channels)), dim3(kThreads), kThreads / 32 * int64_t(sizeof(Moments)), stream}, a, warps);
    }
    run_small("prepare", prepare<S>, a, kThreads, stream);
    run_apply<false>(a, stream);
  });
}

void batch_norm_relu_grad(const BatchNormArgs& b, const CudaChannelPlan& plan, Stream stream) {
  if (plan.chip.cluster > 0) return batch_norm_relu_grad_on_chip(b, plan, stream);
  with_type(b.shape.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    Norm<S> a = norm_of<S>(b, plan);
    run_small("prepare", prepare<S>, a, kThreads, stream);
    if (a.grad_weight != nullptr || a.grad_bias != nullptr || (a.training && a.grad_x != nullptr)) run_sums<Sums::gradient>(a, stream);
    else a.plan.pieces = 0;
    run_small("merge_gradient", merge_gradient<S>, a, kThreads / 32, stream);
    if (a.grad_x != nullptr || a.grad_residual != nullptr) run_apply<true>(a, stream);
  });
}

void channel_sum(const ChannelShape& s, const CudaChannelPlan& plan, const void* src, void* sums, void* workspace, Stream stream) {
  with_type(s.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    Norm<S> a = norm_of<S>(s, plan, workspace);
    a.x = static_cast<const S*>(src);
    run_sums<Sums::plain>(a, stream);
    a.y = static_cast<S*>(sums);
    run_small("merge_plain", merge_plain<S>, a, kThreads / 32, stream);
  });
}

void update_running_statistics(const RunningStatistics& a, Stream stream) {
  auto update = [&](DType t, void* running, int64_t stride, const void* batch, double factor) {
    with_type(t, [&](auto tag) {
      using S = typename decltype(tag)::type;
      auto from = [&](auto* values) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
        launch("update_running", update_running<S, T>, {grid_of(ceil_div(a.c, kThreads)), dim3(kThreads), 0, stream}, static_cast<S*>(running), stride, values, a.c, a.momentum, factor);
      };
      if (a.batch_dtype == DType::f64) from(static_cast<const double*>(batch));
      else from(static_cast<const float*>(batch));
    });
  };
  update(a.mean_dtype, a.running_mean, a.mean_stride, a.mean, 1);
  update(a.var_dtype, a.running_var, a.var_stride, a.var, a.unbias);
}

}  // namespace convkit::cuda
