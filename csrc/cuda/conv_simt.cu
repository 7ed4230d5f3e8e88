// Dense convolution without tensor cores, as a matrix product whose operands are gathered (implicit GEMM): every dtype,
// geometry and number of groups, all three passes; and depthwise + affine + ReLU + pointwise in one kernel, whose left
// operand is computed instead of fetched. float64 and whatever the tensor-core kernels do not take.
//
// A block computes 64 x 64 values in steps of 16 products: both operands go to shared memory in the arithmetic's type, a
// thread has 4 x 4 sums, and the next step's elements are on their way while it multiplies. Chains of products are kept
// short: the rounding error of a sum of n grows with sqrt(n * chain) instead of n.
#include "common.cuh"
#include "kernels.h"

namespace convkit::cuda {

namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256, kPitch = kTile + 4;

// The source of an operand: which pixel and channel a position is, in a tensor (n, c, h, w) of either layout.
struct Image {
  const void* of;
  int64_t c, h, w;
  bool nhwc;
  __device__ __forceinline__ int64_t at(int64_t n, int64_t channel, int64_t y, int64_t x) const {
    return nhwc ? ((n * h + y) * w + x) * c + channel : ((n * c + channel) * h + y) * w + x;
  }
};

// Depth index <-> (channel, r, s). The channel is fastest in channels_last, the taps in contiguous tensors, as in memory.
struct DepthOf {
  bool nhwc;
  FastDiv by_channels, by_taps, by_s;
  DepthOf(bool channels_last, int64_t channels, int64_t r, int64_t s) : nhwc(channels_last), by_channels(channels), by_taps(r * s), by_s(s) {}
  __device__ __forceinline__ void operator()(uint32_t i, int64_t& channel, int64_t& r, int64_t& s) const {
    uint32_t c, tap, column;
    if (nhwc) tap = by_channels.divmod(i, c);
    else c = by_taps.divmod(i, tap);
    r = by_s.divmod(tap, column);
    s = column, channel = c;
  }
};

struct Pixel {
  int64_t n, y, x;
};
__device__ __forceinline__ Pixel pixel_of(int64_t i, int64_t h, int64_t w) { return {i / (h * w), i / w % h, i % w}; }

// Each operand pair has: rows, columns, depth (of a group); Row row(i); T left(row, depth index, group);
// T right(column, depth index, group); void store(row index, column, group, split, sum).

template <class S> struct Forward {
  using T = compute_t<S>;
  static constexpr int blocks = sizeof(T) == 8 ? 1 : 2;  // of a multiprocessor, that have to fit into its registers
  ConvArgs a;
  Image src;
  DepthOf depth_of;
  int64_t rows, columns, depth;
  explicit Forward(const ConvArgs& args)
      : a(args), src{args.src, args.problem.c, args.problem.h, args.problem.w, args.problem.layout == Layout::nhwc},
        depth_of(src.nhwc, args.problem.c / args.problem.groups, args.problem.r, args.problem.s) {
    const ConvProblem& p = args.problem;
    rows = p.n * p.p * p.q, columns = p.k / p.groups, depth = p.c / p.groups * p.r * p.s;
  }
  using Row = Pixel;
  struct Step {
    int64_t c, r, s;
  };
  __device__ Row row(int64_t i) const {
    const ConvProblem& p = a.problem;
    Pixel at = pixel_of(i, p.p, p.q);
    return {at.n, at.y * p.stride_h - p.pad_top, at.x * p.stride_w - p.pad_left};
  }
  __device__ Step step(int64_t i) const {
    Step at;
    depth_of(uint32_t(i), at.c, at.r, at.s);
    return at;
  }
  __device__ T left(const Row& row, const Step& at, int64_t group) const {
    const ConvProblem& p = a.problem;
    int64_t y = row.y + at.r * p.dilation_h, x = row.x + at.s * p.dilation_w;
    if (y < 0 || y >= p.h || x < 0 || x >= p.w) return 0;
    return widen(static_cast<const S*>(src.of)[src.at(row.n, group * (p.c / p.groups) + at.c, y, x)]);
  }
  __device__ T right(int64_t column, const Step& at, int64_t group) const {
    const WeightStrides& w = a.weight_strides;
    return widen(static_cast<const S*>(a.weight)[(group * columns + column) * w.k + at.c * w.c + at.r * w.r + at.s * w.s]);
  }
  __device__ void store(int64_t i, int64_t column, int64_t group, int64_t, T sum) const {
    const ConvProblem& p = a.problem;
    int64_t k = group * columns + column, pixels = p.p * p.q, to = src.nhwc ? i * p.k + k : (i / pixels * p.k + k) * pixels + i % pixels;
    if (a.scale != nullptr) sum *= static_cast<const T*>(a.scale)[k];
    if (a.bias != nullptr) sum += bias_at<S>(a.bias, a.scale != nullptr, k);
    if (a.residual != nullptr) sum += widen(static_cast<const S*>(a.residual)[to]);
    static_cast<S*>(a.dst)[to] = narrow<S>(a.relu ? relu(sum) : sum);
  }
};

template <class S> struct InputGrad {
  using T = compute_t<S>;
  static constexpr int blocks = sizeof(T) == 8 ? 1 : 2;  // of a multiprocessor, that have to fit into its registers
  ConvArgs a;
  Image src;
  DepthOf depth_of;
  FastDiv by_stride_h, by_stride_w;
  int64_t rows, columns, depth;
  explicit InputGrad(const ConvArgs& args)
      : a(args), src{args.src, args.problem.k, args.problem.p, args.problem.q, args.problem.layout == Layout::nhwc},
        depth_of(src.nhwc, args.problem.k / args.problem.groups, args.problem.r, args.problem.s), by_stride_h(args.problem.stride_h), by_stride_w(args.problem.stride_w) {
    const ConvProblem& p = args.problem;
    rows = p.n * p.h * p.w, columns = p.c / p.groups, depth = p.k / p.groups * p.r * p.s;
  }
  using Row = Pixel;
  struct Step {
    int64_t k, r, s;
  };
  __device__ Row row(int64_t i) const {
    Pixel at = pixel_of(i, a.problem.h, a.problem.w);
    return {at.n, at.y + a.problem.pad_top, at.x + a.problem.pad_left};
  }
  __device__ Step step(int64_t i) const {
    Step at;
    depth_of(uint32_t(i), at.k, at.r, at.s);
    return at;
  }
  __device__ T left(const Row& row, const Step& at, int64_t group) const {
    const ConvProblem& p = a.problem;
    int64_t y = row.y - at.r * p.dilation_h, x = row.x - at.s * p.dilation_w;
    if (y < 0 || x < 0 || y > (p.p - 1) * p.stride_h || x > (p.q - 1) * p.stride_w) return 0;
    if (p.stride_h > 1) {
      uint32_t rest;
      y = by_stride_h.divmod(uint32_t(y), rest);
      if (rest != 0) return 0;
    }
    if (p.stride_w > 1) {
      uint32_t rest;
      x = by_stride_w.divmod(uint32_t(x), rest);
      if (rest != 0) return 0;
    }
    return widen(static_cast<const S*>(src.of)[src.at(row.n, group * (p.k / p.groups) + at.k, y, x)]);
  }
  __device__ T right(int64_t column, const Step& at, int64_t group) const {
    const WeightStrides& w = a.weight_strides;
    return widen(static_cast<const S*>(a.weight)[(group * (a.problem.k / a.problem.groups) + at.k) * w.k + column * w.c + at.r * w.r + at.s * w.s]);
  }
  __device__ void store(int64_t i, int64_t column, int64_t group, int64_t, T sum) const {
    const ConvProblem& p = a.problem;
    int64_t c = group * columns + column, pixels = p.h * p.w;
    if (a.bias != nullptr) sum += widen(static_cast<const S*>(a.bias)[c]);
    static_cast<S*>(a.dst)[src.nhwc ? i * p.c + c : (i / pixels * p.c + c) * pixels + i % pixels] = narrow<S>(sum);
  }
};

// Rows are filters, columns (channel, r, s), depth the pixels of y.
template <class S> struct WeightGrad {
  using T = compute_t<S>;
  static constexpr int blocks = sizeof(T) == 8 ? 1 : 2;  // of a multiprocessor, that have to fit into its registers
  ConvArgs a;
  Image grad, x;
  DepthOf column_of;
  int64_t rows, columns, depth;
  bool direct;  // one split: no partial sums
  WeightGrad(const ConvArgs& args, bool one_split)
      : a(args), grad{args.src, args.problem.k, args.problem.p, args.problem.q, args.problem.layout == Layout::nhwc},
        x{args.x, args.problem.c, args.problem.h, args.problem.w, args.problem.layout == Layout::nhwc},
        column_of(x.nhwc, args.problem.c / args.problem.groups, args.problem.r, args.problem.s), direct(one_split) {
    const ConvProblem& p = args.problem;
    rows = p.k / p.groups, columns = p.c / p.groups * p.r * p.s, depth = p.n * p.p * p.q;
  }
  using Row = int64_t;
  using Step = Pixel;
  __device__ Row row(int64_t i) const { return i; }
  __device__ Step step(int64_t i) const { return pixel_of(i, a.problem.p, a.problem.q); }
  __device__ T left(Row row, const Step& at, int64_t group) const { return widen(static_cast<const S*>(grad.of)[grad.at(at.n, group * rows + row, at.y, at.x)]); }
  __device__ T right(int64_t column, const Step& at, int64_t group) const {
    const ConvProblem& p = a.problem;
    int64_t c, r, s;
    column_of(uint32_t(column), c, r, s);
    int64_t y = at.y * p.stride_h - p.pad_top + r * p.dilation_h, w = at.x * p.stride_w - p.pad_left + s * p.dilation_w;
    if (y < 0 || y >= p.h || w < 0 || w >= p.w) return 0;
    return widen(static_cast<const S*>(x.of)[x.at(at.n, group * (p.c / p.groups) + c, y, w)]);
  }
  __device__ void put(int64_t k, int64_t column, T sum) const {
    const WeightStrides& w = a.weight_strides;
    int64_t c, r, s;
    column_of(uint32_t(column), c, r, s);
    static_cast<S*>(a.dst)[k * w.k + c * w.c + r * w.r + s * w.s] = narrow<S>(sum);
  }
  __device__ void store(int64_t i, int64_t column, int64_t group, int64_t split, T sum) const {
    int64_t k = group * rows + i;
    if (direct) put(k, column, sum);
    else static_cast<T*>(a.workspace)[(split * a.problem.k + k) * columns + column] = sum;
  }
};

// The left operand is the depthwise result after its affine and ReLU, a pixel by its channels.
template <class S> struct Separable {
  using T = compute_t<S>;
  static constexpr int blocks = 1;  // of a multiprocessor, that have to fit into its registers
  SeparableArgs a;
  Image src;
  int64_t rows, columns, depth, multiplier;
  explicit Separable(const SeparableArgs& args) : a(args), src{args.x, args.problem.c, args.problem.h, args.problem.w, args.problem.layout == Layout::nhwc} {
    const ConvProblem& p = args.problem;
    rows = p.n * p.p * p.q, columns = args.filters, depth = p.k, multiplier = p.k / p.c;
  }
  using Row = Pixel;
  using Step = int64_t;
  __device__ Row row(int64_t i) const {
    const ConvProblem& p = a.problem;
    Pixel at = pixel_of(i, p.p, p.q);
    return {at.n, at.y * p.stride_h - p.pad_top, at.x * p.stride_w - p.pad_left};
  }
  __device__ Step step(int64_t i) const { return i; }
  __device__ T left(const Row& row, Step k, int64_t) const {
    const ConvProblem& p = a.problem;
    const WeightStrides& w = a.depthwise_strides;
    T sum = 0;
    for (int64_t r = 0; r < p.r; ++r) {
      int64_t y = row.y + r * p.dilation_h;
      if (y < 0 || y >= p.h) continue;
      for (int64_t s = 0; s < p.s; ++s) {
        int64_t x = row.x + s * p.dilation_w;
        if (x < 0 || x >= p.w) continue;
        sum += widen(static_cast<const S*>(src.of)[src.at(row.n, k / multiplier, y, x)]) * widen(static_cast<const S*>(a.depthwise_weight)[k * w.k + r * w.r + s * w.s]);
      }
    }
    if (a.depthwise_scale != nullptr) sum *= static_cast<const T*>(a.depthwise_scale)[k];
    if (a.depthwise_shift != nullptr) sum += static_cast<const T*>(a.depthwise_shift)[k];
    return a.depthwise_relu ? relu(sum) : sum;
  }
  __device__ T right(int64_t column, Step k, int64_t) const {
    return widen(static_cast<const S*>(a.pointwise_weight)[column * a.pointwise_strides.k + k * a.pointwise_strides.c]);
  }
  __device__ void store(int64_t i, int64_t column, int64_t, int64_t, T sum) const {
    if (a.scale != nullptr) sum *= static_cast<const T*>(a.scale)[column];
    if (a.shift != nullptr) sum += static_cast<const T*>(a.shift)[column];
    if (a.relu) sum = relu(sum);
    int64_t pixels = a.problem.p * a.problem.q;
    static_cast<S*>(a.y)[src.nhwc ? i * columns + column : (i / pixels * columns + column) * pixels + i % pixels] = narrow<S>(sum);
  }
};

// left_along_depth, right_along_depth: neighbouring threads fetch neighbours along the depth, else along rows (columns):
// whichever lies together in memory.
template <class P, bool left_along_depth, bool right_along_depth>
__global__ void __launch_bounds__(kThreads, P::blocks) product(P p, int64_t groups, int64_t splits, int chain) {
  using T = typename P::T;
  constexpr int each = kTile * kDepth / kThreads;  // elements of an operand that a thread fetches in a step
  T* left = reinterpret_cast<T*>(dynamic_shared());  // [depth][row]
  T* right = left + kDepth * kPitch;                 // [depth][column]
  int64_t row_tiles = ceil_div(p.rows, kTile), column_tiles = ceil_div(p.columns, kTile), all = row_tiles * column_tiles * groups * splits;
  int tid = threadIdx.x;
  // Element i of this thread: index along the tile, and along the depth.
  auto along_tile = [&](bool along_depth, int i) { return along_depth ? tid / kDepth + i * (kThreads / kDepth) : tid % kTile; };
  auto along = [&](bool along_depth, int i) { return along_depth ? tid % kDepth : tid / kTile + i * (kThreads / kTile); };
  for (int64_t task = blockIdx.x; task < all; task += gridDim.x) {
    int64_t column0 = task % column_tiles * kTile, rest = task / column_tiles;
    int64_t row0 = rest % row_tiles * kTile;
    rest /= row_tiles;
    int64_t group = rest % groups, split = rest / groups;
    int64_t first = p.depth * split / splits, last = p.depth * (split + 1) / splits;
    constexpr int row_count = left_along_depth ? each : 1;
    typename P::Row rows[row_count];
#pragma unroll
    for (int i = 0; i < row_count; ++i) rows[i] = p.row(min(row0 + along_tile(left_along_depth, i), p.rows - 1));

    T next_left[each], next_right[each];
    auto fetch = [&](int64_t from) {
#pragma unroll
      for (int i = 0; i < each; ++i) {
        int64_t d = from + along(left_along_depth, i);
        bool inside = d < last && row0 + along_tile(left_along_depth, i) < p.rows;
        next_left[i] = inside ? p.left(rows[left_along_depth ? i : 0], p.step(d), group) : T(0);
      }
#pragma unroll
      for (int i = 0; i < each; ++i) {
        int64_t d = from + along(right_along_depth, i), column = column0 + along_tile(right_along_depth, i);
        next_right[i] = d < last && column < p.columns ? p.right(column, p.step(d), group) : T(0);
      }
    };
    T total[4][4] = {}, sum[4][4] = {};
    int tx = tid % 16, ty = tid / 16, terms = 0;
    fetch(first);
    for (int64_t d = first; d < last; d += kDepth) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < each; ++i) {
        left[along(left_along_depth, i) * kPitch + along_tile(left_along_depth, i)] = next_left[i];
        right[along(right_along_depth, i) * kPitch + along_tile(right_along_depth, i)] = next_right[i];
      }
      __syncthreads();
      if (d + kDepth < last) fetch(d + kDepth);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        T l[4], r[4];
        load_values(left + k * kPitch + ty * 4, l);
        load_values(right + k * kPitch + tx * 4, r);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += l[i] * r[j];
      }
      terms += kDepth;
      if (terms >= chain) {
        terms = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) total[i / 4][i % 4] += sum[i / 4][i % 4], sum[i / 4][i % 4] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int64_t row = row0 + ty * 4 + i, column = column0 + tx * 4 + j;
        if (row < p.rows && column < p.columns) p.store(row, column, group, split, total[i][j] + sum[i][j]);
      }
  }
}

// The second stage of the weight gradient: partial sums in the order of the splits.
template <class S> __global__ void __launch_bounds__(kThreads) add_splits(WeightGrad<S> p, int64_t splits) {
  int64_t all = p.a.problem.k * p.columns;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    double sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += double(static_cast<const compute_t<S>*>(p.a.workspace)[split * all + i]);
    p.put(i / p.columns, i % p.columns, compute_t<S>(sum));
  }
}

template <bool left_along_depth, bool right_along_depth, class P> void run(const char* name, const P& p, int64_t groups, int64_t splits, int chain, Stream stream) {
  int64_t blocks = ceil_div(p.rows, kTile) * ceil_div(p.columns, kTile) * groups * splits;
  launch(name, product<P, left_along_depth, right_along_depth>, {grid_of(blocks), dim3(kThreads), 2 * kDepth * kPitch * int64_t(sizeof(typename P::T)), stream}, p, groups, splits, chain);
}

}  // namespace

void conv_simt(const ConvArgs& a, const CudaConvPlan& plan, Pass pass, Stream stream) {
  with_type(a.problem.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    bool nhwc = a.problem.layout == Layout::nhwc;
    int64_t groups = a.problem.groups;
    if (pass == Pass::forward) {
      Forward<S> p(a);
      if (nhwc) run<true, true>("conv_simt_fprop", p, groups, 1, plan.chain, stream);
      else run<false, true>("conv_simt_fprop", p, groups, 1, plan.chain, stream);
    } else if (pass == Pass::input_grad) {
      InputGrad<S> p(a);
      if (nhwc) run<true, false>("conv_simt_dgrad", p, groups, 1, plan.chain, stream);
      else run<false, false>("conv_simt_dgrad", p, groups, 1, plan.chain, stream);
    } else {
      WeightGrad<S> p(a, plan.splits == 1);
      if (nhwc) run<false, false>("conv_simt_wgrad", p, groups, plan.splits, plan.chain, stream);
      else run<true, true>("conv_simt_wgrad", p, groups, plan.splits, plan.chain, stream);
      if (plan.splits > 1) launch("add_splits", add_splits<S>, {grid_of(ceil_div(a.problem.k * p.columns, kThreads)), dim3(kThreads), 0, stream}, p, plan.splits);
    }
  });
}

void separable_simt(const SeparableArgs& a, Stream stream) {
  with_type(a.problem.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    Separable<S> p(a);
    int chain = std::is_same_v<S, double> ? 1 << 30 : 32;
    if (a.problem.layout == Layout::nhwc) run<true, true>("separable_simt", p, 1, 1, chain, stream);
    else run<false, true>("separable_simt", p, 1, 1, chain, stream);
  });
}

}  // namespace convkit::cuda
