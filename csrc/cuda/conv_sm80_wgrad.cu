// The weight gradient on tensor cores: rows are filters, columns (tap, channel), depth is the pixels of y, cut into
// splits. Both operands lie across the depth in memory. Partial sums in float32 go to the workspace, and are added in
// the order of the splits into a weight of any strides.
#include "conv_sm80.cuh"

namespace convkit::cuda {

namespace {

struct WeightGradArgs {
  const void *grad, *x;
  float* partial;                  // (split, filter, pitch)
  int filters, grad_channels;      // of a group; padded
  int channels, columns, pitch;    // of a group, padded; columns = taps * channels; pitch: padded to 16 bytes
  int groups, splits, pixels, steps, s;
  int h, w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int row_tiles, column_tiles;
  FastDiv by_p, by_q;
};

template <class C_, int granule> struct WeightGrad : WeightGradArgs {
  using C = C_;
  using S = typename C::S;
  static constexpr bool along_depth = false;

  struct Task {
    static constexpr bool exists = true;
    int row0, column0, group, split, first, steps;
    __device__ Task(const WeightGrad& p, unsigned block) {
      column0 = int(block % p.column_tiles) * C::columns, block /= p.column_tiles;
      row0 = int(block % p.row_tiles) * C::rows, block /= p.row_tiles;
      group = int(block % p.groups), split = int(block / p.groups);
      int from = int(int64_t(p.steps) * split / p.splits), to = int(int64_t(p.steps) * (split + 1) / p.splits);
      first = from * C::depth, steps = to - from;
    }
  };

  // The gradient of y: neighbouring threads copy neighbouring filters of a pixel.
  struct Left {
    static constexpr int along = C::rows / kVec<S>, down = C::threads / along, each = C::depth / down;
    static_assert(C::threads % along == 0 && C::depth % down == 0);
    const S* from;
    int pixel;
    bool inside;
    __device__ Left(const WeightGrad& p, const Task& task, unsigned char*) {
      int filter = task.row0 + threadIdx.x % along * kVec<S>;
      pixel = task.first + threadIdx.x / along;
      inside = filter < p.grad_channels;
      from = static_cast<const S*>(p.grad) + int64_t(pixel) * p.groups * p.grad_channels + int64_t(task.group) * p.grad_channels + filter;
    }
    __device__ void copy(const WeightGrad& p, const Task&, unsigned char* to) {
      int64_t pitch = int64_t(p.groups) * p.grad_channels;
#pragma unroll
      for (int i = 0; i < each; ++i) {
        bool there = inside && pixel + i * down < p.pixels;
        ptx::copy_async_16(to + across_depth_at<S, C::rows>(threadIdx.x / along + i * down, threadIdx.x % along * 16), there ? from + i * down * pitch : static_cast<const S*>(p.grad),
                           there ? 16 : 0);
      }
      pixel += C::depth, from += C::depth * pitch;
    }
  };

  // The input: a thread has one tap and channel, and some pixels of y a step.
  struct Right {
    static constexpr int along = C::columns * int(sizeof(S)) / granule, down = C::threads / along, each = C::depth / down;
    static_assert(C::threads % along == 0 && C::depth % down == 0);
    int y, x, pixel;
    int64_t channel;
    bool inside;
    __device__ Right(const WeightGrad& p, const Task& task) {
      int column = task.column0 + threadIdx.x % along * (granule / int(sizeof(S))), tap = column / p.channels;
      inside = column < p.columns;
      channel = int64_t(task.group) * p.channels + column % p.channels;
      y = tap / p.s * p.dilation_h - p.pad_top, x = tap % p.s * p.dilation_w - p.pad_left;
      pixel = task.first + threadIdx.x / along;
    }
    __device__ void copy(const WeightGrad& p, const Task&, unsigned char* to) {
#pragma unroll
      for (int i = 0; i < each; ++i) {
        uint32_t q, row, n = p.by_p.divmod(p.by_q.divmod(uint32_t(pixel + i * down), q), row);
        int at_y = int(row) * p.stride_h + y, at_x = int(q) * p.stride_w + x;
        bool there = inside && pixel + i * down < p.pixels && unsigned(at_y) < unsigned(p.h) && unsigned(at_x) < unsigned(p.w);
        const S* from = static_cast<const S*>(p.x) + (there ? ((int64_t(n) * p.h + at_y) * p.w + at_x) * p.groups * p.channels + channel : 0);
        unsigned char* place = to + across_depth_at<S, C::columns>(threadIdx.x / along + i * down, threadIdx.x % along * granule);
        ptx::copy_async_cached<granule>(place, from, there ? granule : 0);
      }
      pixel += C::depth;
    }
  };

  // Four lanes store 32 bytes of a row: whole sectors.
  __device__ void store(const Task& task, float (&sum)[C::m_tiles][C::n_tiles][4], unsigned char*) const {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int row0 = task.row0 + warp / C::tile.warp_columns * C::warp_rows, column0 = task.column0 + warp % C::tile.warp_columns * C::warp_columns;
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i)
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        int row = row0 + i * 16 + g + y * 8;
        if (row >= filters) continue;
        float* to = partial + ((int64_t(task.split) * groups + task.group) * filters + row) * pitch;
#pragma unroll
        for (int j = 0; j < C::n_tiles; ++j) {
          int column = column0 + j * 8 + 2 * t;
          if (column < pitch) *reinterpret_cast<Pair<float>*>(to + column) = {sum[i][j][y * 2], sum[i][j][y * 2 + 1]};
        }
      }
  }
};

struct Sums {
  const float* partial;
  void* dst;
  WeightStrides strides;
  int64_t filters, padded, pitch, splits;
  uint32_t count;                  // elements of the weight
  FastDiv by_columns, by_channels, by_s;
};

template <class S> __global__ void __launch_bounds__(kSumThreads) add_splits(Sums p, SplitSum of) {
  uint32_t i = uint32_t(of.output()), column, c, s;
  uint32_t k = p.by_columns.divmod(i, column), tap = p.by_channels.divmod(column, c), r = p.by_s.divmod(tap, s);
  double sum = of.sum(i < p.count ? p.partial + k * p.pitch + tap * p.padded + c : nullptr, p.filters * p.pitch, p.splits);
  if (i >= p.count || !of.writes()) return;
  static_cast<S*>(p.dst)[k * p.strides.k + c * p.strides.c + r * p.strides.r + s * p.strides.s] = narrow<S>(float(sum));
}

}  // namespace

void conv_sm80_wgrad(const ConvArgs& args, const CudaConvPlan& plan, Stream stream) {
  const ConvProblem& p = args.problem;
  const TensorPlan& t = plan.tensor;
  bool nhwc = p.layout == Layout::nhwc;
  unsigned char* workspace = static_cast<unsigned char*>(args.workspace);
  with_config(p.dtype, t, [&](auto config, auto granule) {
    using C = decltype(config);
    using S = typename C::S;
    WeightGrad<C, granule()> g{};
    g.grad = args.src, g.x = args.x, g.partial = reinterpret_cast<float*>(workspace + t.weight_offset);
    if (t.arrange_src) {
      g.grad = workspace + t.src_offset;
      arrange({args.src, workspace + t.src_offset, p.dtype, nhwc, p.n, p.p * p.q, p.groups, p.k / p.groups, t.src_channels}, stream);
    }
    if (t.arrange_x) {
      g.x = workspace + t.x_offset;
      arrange({args.x, workspace + t.x_offset, p.dtype, nhwc, p.n, p.h * p.w, p.groups, p.c / p.groups, t.x_channels}, stream);
    }
    g.filters = int(p.k / p.groups), g.grad_channels = int(t.src_channels), g.channels = int(t.x_channels), g.columns = int(p.r * p.s * t.x_channels), g.pitch = int(t.weight_pitch);
    g.groups = int(p.groups), g.splits = int(plan.splits), g.pixels = int(p.n * p.p * p.q), g.steps = int(ceil_div(g.pixels, C::depth)), g.s = int(p.s);
    g.h = int(p.h), g.w = int(p.w), g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w), g.pad_top = int(p.pad_top), g.pad_left = int(p.pad_left);
    g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w), g.by_p = FastDiv(p.p), g.by_q = FastDiv(p.q);
    g.row_tiles = int(ceil_div(g.filters, C::rows)), g.column_tiles = int(ceil_div(g.columns, C::columns));
    Launch how{dim3(unsigned(g.row_tiles) * g.column_tiles * g.groups * g.splits), dim3(C::threads), C::tile.shared_bytes(), stream};
    launch("conv_sm80_wgrad", product<WeightGrad<C, granule()>>, how, g);
    int64_t channels = p.c / p.groups, columns = channels * p.r * p.s;
    Sums sums{g.partial, args.dst, args.weight_strides, p.k, t.x_channels, t.weight_pitch, plan.splits, uint32_t(p.k * columns), FastDiv(columns), FastDiv(channels), FastDiv(p.s)};
    SplitSum of(plan.splits);
    launch("add_splits", add_splits<S>, of.launch_of(sums.count, stream), sums, of);
  });
}

}  // namespace convkit::cuda
