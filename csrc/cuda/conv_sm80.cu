// Dense convolution on tensor cores: forward and input gradient, which are one sum. Rows of the left operand are pixels
// gathered from the source, the right operand is the filters, packed beforehand so that their depth lies together.
//
// Depth is (tap, channel), or, where channels are a multiple of a step's, (block of channels, tap, channel): then a step
// reads the pixels of the one before again, one tap further, and finds them in the first cache. Tiles of 128 x 128 take 16
// KiB a step, 40 bytes a cycle and multiprocessor of an H100 whose second cache gives 25 or so to each [estimates, not
// measured]; of the left half, only what no tap has touched yet comes from there.
//
// The input gradient of stride U falls apart into U x U phases: pixels of the input whose index leaves the same rest meet
// the same taps, each pixel one and the same dense sub-filter. All phases are one launch.
//
// Contiguous images are brought into channels_last first, and so are channels_last ones whose pixels don't start at
// multiples of 16 bytes. That reads and writes an image once more; gathered in the kernel its 16-bit elements, which no
// cp.async can move alone, would take 16 times the load instructions (a thread 64 a step, beside 64 matrix products of
// its warp), and again for each tap.
#include <algorithm>

#include "conv_sm80.cuh"

namespace convkit::cuda {

namespace {

constexpr int kPackThreads = 256, kPackPitch = 33, kPackBlocks = 256;

// One dense product, with r x s taps.
struct Phase : Grid {
  int r, s;
  int tap_h, tap_w, each_h, each_w;  // the first tap in the filter, and how far to the next
  int steps, pitch;                // pitch: of a filter's depth, padded to 16 bytes
  int next_r, next_s, next_c;      // a step of depth, as taps and channels
  int64_t weight;                  // first element of the packed filters
};

struct GatherArgs {
  const void* src;
  int src_h, src_w;
  int64_t src_pitch;               // elements of a pixel
  int channels, columns, groups;   // of a group; channels are padded
  bool blocked;                    // depth is (channels of a step, tap, channel)
  int step_h, step_w, dilation_h, dilation_w;
  const void* weight;
  int row_tiles, column_tiles;     // row tiles: of the largest phase
  Epilogue epilogue;
  Phase phase[kTensorPhases];
};

template <class C_, int granule> struct Gathered : GatherArgs {
  using C = C_;
  using S = typename C::S;
  static constexpr bool along_depth = true;

  struct Task {
    int row0, column0, group, phase, steps;
    bool exists;
    __device__ Task(const Gathered& p, unsigned block) {
      column0 = int(block % p.column_tiles) * C::columns, block /= p.column_tiles;
      row0 = int(block % p.row_tiles) * C::rows, block /= p.row_tiles;
      group = int(block % p.groups), phase = int(block / p.groups);
      exists = row0 < p.phase[phase].rows, steps = p.phase[phase].steps;
    }
  };

  // Copies of `granule` bytes: a thread has one place along the depth, and some rows.
  struct Left {
    static constexpr int along = C::depth_bytes / granule, down = C::threads / along, each = C::rows / down;
    const Position* rows;
    int r, s, c;
    __device__ Left(const Gathered& p, const Task& task, unsigned char* table) {
      const Phase& phase = p.phase[task.phase];
      rows = find_positions<C::rows, C::threads>(table, phase, task.row0, p.src_h, p.src_w, p.src_pitch, p.step_h, p.step_w, int64_t(task.group) * p.channels);
      int d = threadIdx.x % along * (granule / int(sizeof(S))), tap = d / p.channels;  // blocked: tap 0
      c = d % p.channels, s = phase.s == 0 ? 0 : tap % phase.s, r = phase.s == 0 ? 0 : tap / phase.s;
    }
    __device__ void copy(const Gathered& p, const Task& task, unsigned char* to) {
      const Phase& phase = p.phase[task.phase];
      int tap_y = r * p.dilation_h, tap_x = s * p.dilation_w, byte = threadIdx.x % along * granule;
      int64_t tap = (int64_t(tap_y) * p.src_w + tap_x) * p.src_pitch + c;
      bool tap_exists = r < phase.r;
#pragma unroll
      for (int i = 0; i < each; ++i) {
        int row = threadIdx.x / along + i * down;
        Position at = rows[row];
        bool inside = tap_exists && unsigned(at.y + tap_y) < unsigned(p.src_h) && unsigned(at.x + tap_x) < unsigned(p.src_w);
        const S* from = static_cast<const S*>(p.src) + (inside ? at.offset + tap : 0);
        ptx::copy_async_cached<granule>(to + along_depth_at(row, byte), from, inside ? granule : 0);
      }
      if (p.blocked) {
        if (++s == phase.s) s = 0, ++r;
        if (r == phase.r) r = 0, c += C::depth;
        return;
      }
      c += phase.next_c, s += phase.next_s, r += phase.next_r;
      if (c >= p.channels) c -= p.channels, ++s;
      if (s >= phase.s) s -= phase.s, ++r;
    }
  };

  struct Right {
    static constexpr int down = C::threads / 4, each = C::columns / down;
    const S* weight;
    int d;
    __device__ Right(const Gathered& p, const Task& task) {
      const Phase& phase = p.phase[task.phase];
      d = threadIdx.x % 4 * kVec<S>;
      weight = static_cast<const S*>(p.weight) + phase.weight + (int64_t(task.group) * p.columns + task.column0 + threadIdx.x / 4) * phase.pitch;
    }
    __device__ void copy(const Gathered& p, const Task& task, unsigned char* to) {
      const Phase& phase = p.phase[task.phase];
#pragma unroll
      for (int i = 0; i < each; ++i) {
        int column = threadIdx.x / 4 + i * down;
        bool inside = d < phase.pitch && task.column0 + column < p.columns;
        ptx::copy_async_16(to + along_depth_at(column, threadIdx.x % 4 * 16), inside ? weight + int64_t(i * down) * phase.pitch + d : static_cast<const S*>(p.weight), inside ? 16 : 0);
      }
      d += C::depth;
    }
  };

  __device__ void store(const Task& task, float (&sum)[C::m_tiles][C::n_tiles][4], unsigned char* shared) const {
    const Phase& to = this->phase[task.phase];
    if (epilogue.residual == nullptr) store_tile<C, false>(epilogue, to, task.row0, task.column0, columns, task.group, sum, shared);
    else store_tile<C, true>(epilogue, to, task.row0, task.column0, columns, task.group, sum, shared);
  }
};

// ---- what is laid out anew beforehand ----------------------------------------------------------------------------------

// A block takes pixels x channels of an image, powers of two, through shared memory: read along one, written along the
// other.
struct ArrangeTile {
  int log_channels, log_pixels;    // 2048 elements at most
  int64_t pixel_tiles, channel_tiles;
  FastDiv by_padded;
};

template <class S> __global__ void __launch_bounds__(kPackThreads) arrange_kernel(Arrangement a, ArrangeTile tile) {
  S* staged = reinterpret_cast<S*>(dynamic_shared());  // [channel][pixel]
  int64_t all = a.groups * a.padded, source_channels = a.groups * a.channels, block = blockIdx.x;
  int64_t pixel0 = block % tile.pixel_tiles << tile.log_pixels;
  block /= tile.pixel_tiles;
  int64_t channel0 = block % tile.channel_tiles << tile.log_channels, n = block / tile.channel_tiles;
  const S* src = static_cast<const S*>(a.src) + n * source_channels * a.pixels;
  S* dst = static_cast<S*>(a.dst) + (n * a.pixels + pixel0) * all + channel0;
  int count = 1 << (tile.log_channels + tile.log_pixels), channels = 1 << tile.log_channels, pixels = 1 << tile.log_pixels, pitch = pixels + 1;
  int most_pixels = int(min(a.pixels - pixel0, int64_t(pixels))), most_channels = int(min(all - channel0, int64_t(channels)));
  for (int i = threadIdx.x; i < count; i += kPackThreads) {
    int pixel = a.nhwc ? i >> tile.log_channels : i & (pixels - 1), channel = a.nhwc ? i & (channels - 1) : i >> tile.log_pixels;
    S value = narrow<S>(0);
    if (pixel < most_pixels && channel < most_channels) {
      uint32_t of_group, group = tile.by_padded.divmod(uint32_t(channel0) + channel, of_group);
      int64_t from = group * a.channels + of_group, at = pixel0 + pixel;
      if (of_group < a.channels) value = src[a.nhwc ? at * source_channels + from : from * a.pixels + at];
    }
    staged[channel * pitch + pixel] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kPackThreads) {
    int pixel = i >> tile.log_channels, channel = i & (channels - 1);
    if (pixel < most_pixels && channel < most_channels) dst[pixel * all + channel] = staged[channel * pitch + pixel];
  }
}

struct Packing {
  const void* weight;
  WeightStrides strides;
  bool by_filter, blocked;         // columns are filters and depth is channels, or the other way round
  int step;                        // channels of a step
  int columns, depth, channels;    // of a group; channels: the depth padded
  int column_tiles, depth_tiles, groups;
  void* packed;
  Phase phase[kTensorPhases];
};

// (group, column, depth as above) of each phase; 32 columns x 32 of the depth a block, and every gridDim.y-th tap. Taps lie
// together in a contiguous weight: that line of memory is found in the cache by the next.
template <class S> __global__ void __launch_bounds__(kPackThreads, 3) pack_kernel(const __grid_constant__ Packing a) {
  S* staged = reinterpret_cast<S*>(dynamic_shared());  // [depth][column]
  unsigned block = blockIdx.x;
  int depth0 = int(block % a.depth_tiles) * 32;
  block /= a.depth_tiles;
  int column0 = int(block % a.column_tiles) * 32;
  block /= a.column_tiles;
  int group = int(block % a.groups);
  const Phase& phase = a.phase[block / a.groups];
  int fast = threadIdx.x % 32, slow = threadIdx.x / 32;
  int64_t along_columns = a.by_filter ? a.strides.k : a.strides.c, along_depth = a.by_filter ? a.strides.c : a.strides.k;
  const S* weight = static_cast<const S*>(a.weight) + int64_t(group) * (a.by_filter ? a.columns : a.depth) * a.strides.k;
  S* packed = static_cast<S*>(a.packed) + phase.weight + int64_t(group) * a.columns * phase.pitch;
  bool columns_first = along_columns < along_depth;
#pragma unroll 1
  for (int tap = int(blockIdx.y); tap < phase.r * phase.s; tap += int(gridDim.y)) {
    const S* of_tap = weight + (phase.tap_h + tap / phase.s * phase.each_h) * a.strides.r + (phase.tap_w + tap % phase.s * phase.each_w) * a.strides.s;
    for (int i = slow; i < 32; i += kPackThreads / 32) {
      int column = columns_first ? fast : i, d = columns_first ? i : fast;
      bool inside = column0 + column < a.columns && depth0 + d < a.depth;
      staged[d * kPackPitch + column] = inside ? of_tap[(column0 + column) * along_columns + (depth0 + d) * along_depth] : narrow<S>(0);
    }
    __syncthreads();
    int d = depth0 + fast, at = a.blocked ? (d / a.step * phase.r * phase.s + tap) * a.step + d % a.step : tap * a.channels + d;
    for (int i = slow; i < 32; i += kPackThreads / 32)
      if (column0 + i < a.columns && d < a.channels) packed[int64_t(column0 + i) * phase.pitch + at] = staged[fast * kPackPitch + i];
    __syncthreads();
  }
  // What the pitch has more than the taps take.
  int rest = phase.r * phase.s * a.channels;
  if (depth0 == 0 && blockIdx.y == 0 && rest + fast < phase.pitch)
    for (int i = slow; i < 32; i += kPackThreads / 32)
      if (column0 + i < a.columns) packed[int64_t(column0 + i) * phase.pitch + rest + fast] = narrow<S>(0);
}

// ---- what is launched --------------------------------------------------------------------------------------------------

int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// Positions, taps and destination of one axis. The gradient's: pixel i * stride + first meets the taps r with
// (first + pad - r * dilation) divisible by the stride.
struct Axis {
  int count, start, taps, dst, tap, each;
};
Axis forward_axis(int64_t out, int64_t pad, int64_t taps) { return {int(out), int(-pad), int(taps), 0, 0, 1}; }
Axis gradient_axis(int64_t in, int64_t pad, int64_t taps, int64_t stride, int64_t dilation, int64_t first) {
  Axis a{int((in - first + stride - 1) / stride), 0, 0, int(first), 0, int(stride) / gcd(int(stride), int(dilation))};
  for (int64_t r = 0; r < std::min(taps, stride); ++r)
    if ((first + pad - r * dilation) % stride == 0) {
      a.start = int((first + pad - r * dilation) / stride), a.tap = int(r), a.taps = int(ceil_div(taps - r, a.each));
      break;
    }
  return a;
}

template <class S> bool packed_already(const ConvArgs& a, int64_t channels, int64_t pitch) {
  const ConvProblem& p = a.problem;
  const WeightStrides& w = a.weight_strides;
  int64_t depth = p.c / p.groups;
  return channels == depth && pitch == depth * p.r * p.s && aligned16(a.weight) && (depth == 1 || w.c == 1) && (p.s == 1 || w.s == depth) && (p.r == 1 || w.r == p.s * depth) && w.k == pitch;
}

}  // namespace

void arrange(const Arrangement& a, Stream stream) {
  int64_t all = a.groups * a.padded;
  ArrangeTile tile{};
  while (tile.log_channels < 5 && int64_t(1) << tile.log_channels < all) ++tile.log_channels;
  tile.log_pixels = std::min(7, 11 - tile.log_channels);
  tile.pixel_tiles = ceil_div(a.pixels, int64_t(1) << tile.log_pixels), tile.channel_tiles = ceil_div(all, int64_t(1) << tile.log_channels);
  tile.by_padded = FastDiv(a.padded);
  int64_t shared = (int64_t(1) << tile.log_channels) * ((int64_t(1) << tile.log_pixels) + 1) * storage_bytes(a.dtype);
  Launch how{grid_of(a.n * tile.pixel_tiles * tile.channel_tiles), dim3(kPackThreads), shared, stream};
  with_type(a.dtype, [&](auto tag) { launch("arrange", arrange_kernel<typename decltype(tag)::type>, how, a, tile); });
}

void conv_sm80(const ConvArgs& args, const CudaConvPlan& plan, Pass pass, Stream stream) {
  if (pass == Pass::weight_grad) return conv_sm80_wgrad(args, plan, stream);
  const ConvProblem& p = args.problem;
  const TensorPlan& t = plan.tensor;
  bool forward = pass == Pass::forward, nhwc = p.layout == Layout::nhwc;
  unsigned char* workspace = static_cast<unsigned char*>(args.workspace);
  with_config(p.dtype, t, [&](auto config, auto granule) {
    using C = decltype(config);
    using S = typename C::S;
    Gathered<C, granule()> g{};
    g.src = args.src, g.groups = int(p.groups), g.channels = int(t.src_channels);
    g.src_h = int(forward ? p.h : p.p), g.src_w = int(forward ? p.w : p.q), g.src_pitch = p.groups * t.src_channels;
    g.columns = int((forward ? p.k : p.c) / p.groups), g.blocked = g.channels % C::depth == 0 && p.r * p.s > 1;
    if (t.arrange_src) {
      g.src = workspace + t.src_offset;
      arrange({args.src, workspace + t.src_offset, p.dtype, nhwc, p.n, int64_t(g.src_h) * g.src_w, p.groups, (forward ? p.c : p.k) / p.groups, t.src_channels}, stream);
    }
    int64_t U = forward ? 1 : p.stride_h, W = forward ? 1 : p.stride_w;
    if (forward) g.step_h = int(p.stride_h), g.step_w = int(p.stride_w), g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
    else g.step_h = g.step_w = 1, g.dilation_h = -int(p.dilation_h) / gcd(int(p.dilation_h), int(U)), g.dilation_w = -int(p.dilation_w) / gcd(int(p.dilation_w), int(W));
    int phases = 0, most_rows = 0;
    int64_t packed = 0;
    for (int64_t i = 0; i < U; ++i)
      for (int64_t j = 0; j < W; ++j) {
        Axis y = forward ? forward_axis(p.p, p.pad_top, p.r) : gradient_axis(p.h, p.pad_top, p.r, U, p.dilation_h, i);
        Axis x = forward ? forward_axis(p.q, p.pad_left, p.s) : gradient_axis(p.w, p.pad_left, p.s, W, p.dilation_w, j);
        if (y.count <= 0 || x.count <= 0) continue;
        if (y.taps == 0 || x.taps == 0) y.taps = x.taps = 0;
        Phase& f = g.phase[phases++];
        static_cast<Grid&>(f) = grid_of_positions(p.n, y.count, x.count, y.start, x.start, y.dst, x.dst);
        f.r = y.taps, f.s = x.taps, f.tap_h = y.tap, f.tap_w = x.tap, f.each_h = y.each, f.each_w = x.each;
        int depth = f.r * f.s * g.channels;
        f.pitch = int(ceil_div(depth, kVec<S>)) * kVec<S>, f.steps = int(ceil_div(depth, C::depth));
        int taps = C::depth / g.channels;
        f.next_c = C::depth % g.channels, f.next_s = f.s == 0 ? 0 : taps % f.s, f.next_r = f.s == 0 ? 0 : taps / f.s;
        f.weight = packed, packed += int64_t(g.columns) * p.groups * f.pitch;
        most_rows = std::max(most_rows, f.rows);
      }
    g.weight = args.weight;
    if (!forward || g.blocked || !packed_already<S>(args, g.channels, g.phase[0].pitch)) {
      Packing k{args.weight, args.weight_strides, forward, g.blocked, C::depth, g.columns, int((forward ? p.c : p.k) / p.groups), g.channels, 0, 0, g.groups, workspace + t.weight_offset, {}};
      for (int i = 0; i < phases; ++i) k.phase[i] = g.phase[i];
      k.column_tiles = int(ceil_div(k.columns, 32)), k.depth_tiles = int(ceil_div(k.channels, 32));
      // A block waits for memory at each of its taps: few blocks take fewer.
      unsigned blocks = unsigned(k.column_tiles) * k.depth_tiles * g.groups * phases, parts = unsigned(std::clamp<int64_t>(kPackBlocks / blocks, 1, p.r * p.s));
      launch("pack", pack_kernel<S>, {dim3(blocks, parts), dim3(kPackThreads), 32 * kPackPitch * int64_t(sizeof(S)), stream}, k);
      g.weight = k.packed;
    }
    g.row_tiles = int(ceil_div(most_rows, C::rows)), g.column_tiles = int(ceil_div(g.columns, C::columns));
    Epilogue& e = g.epilogue;
    e.dst = args.dst, e.residual = args.residual, e.relu = args.relu, e.nhwc = nhwc;
    e.scale = static_cast<const float*>(args.scale);
    if (args.scale == nullptr) e.bias = args.bias;
    else e.shift = static_cast<const float*>(args.bias);
    e.h = forward ? p.p : p.h, e.w = forward ? p.q : p.w, e.channels = forward ? p.k : p.c, e.step_h = int(U), e.step_w = int(W);
    e.vectors = aligned16(args.dst) && aligned16(args.residual) && (nhwc ? g.columns % kVec<S> == 0 : U * W == 1 && e.h * e.w % kVec<S> == 0);
    Launch how{dim3(unsigned(g.row_tiles) * g.column_tiles * g.groups * phases), dim3(C::threads), C::tile.shared_bytes(), stream};
    launch(forward ? "conv_sm80_fprop" : "conv_sm80_dgrad", product<Gathered<C, granule()>>, how, g);
  });
}

}  // namespace convkit::cuda
