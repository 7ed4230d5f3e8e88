#include "plan_cuda.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>

namespace convkit {

namespace {

using cuda::DeviceFacts;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t next_power(int64_t v) {
  int64_t out = 1;
  while (out < v) out *= 2;
  return out;
}

// Shared memory of a block: two blocks and more fit on a multiprocessor of every GPU since sm_80 (99 KiB at the least).
constexpr int64_t kShared = 48 << 10;
// Blocks a multiprocessor: enough that some load while others compute, and that the last wave is a small part.
constexpr int64_t kWaves = 4;

// Three by three to seven by seven at stride 1 and 2, where indices of a plane fit into 32 bits.
bool is_special(const ConvProblem& a) {
  constexpr int64_t most = int64_t(1) << 30;
  return a.groups == a.c && a.k == a.c && a.r == a.s && (a.r == 3 || a.r == 5 || a.r == 7) && a.stride_h == a.stride_w && a.stride_h <= 2 && a.dilation_h == 1 && a.dilation_w == 1 &&
         a.h < most && a.w < most && a.p < most && a.q < most && a.pad_top < most / 2 && a.pad_left < most / 2;
}

// Tiles of depthwise_nhwc, scored by what they move (halos included) and compute in vain.
bool plan_nhwc(const ConvProblem& a, Pass pass, const DeviceFacts& f, DepthwiseNhwcPlan& best) {
  int64_t V = 16 / storage_bytes(a.dtype), vectors = ceil_div(a.c, V);
  if (a.c % V != 0) return false;
  bool forward = pass == Pass::forward || a.stride_h == 1, grad = pass == Pass::input_grad;
  int64_t R = a.r, U = forward ? a.stride_h : 1, dst_h = grad ? a.h : a.p, dst_w = grad ? a.w : a.q;
  int64_t strip = R == 3 || a.stride_h == 2 ? 4 : 8, threads = R == 3 ? 256 : 128;
  double best_score = -1;
  for (int64_t lanes = 1; lanes <= std::min<int64_t>(32, next_power(vectors)); lanes *= 2)
    for (int64_t strips = 1; strips <= threads / lanes; strips *= 2) {
      int64_t rows = threads / lanes / strips, columns = strips * strip;
      if (!forward && rows % 2 != 0) continue;  // the gradient's tiles begin at rows of one phase
      int64_t in_rows = forward ? (rows - 1) * U + R : (rows - 1) / 2 + (R - 1) / 2 + 1;
      int64_t in_pitch = (forward ? (columns - 1) * U + R : (columns - 1) / 2 + (R - 1) / 2 + 1) | 1;
      int64_t shared = in_rows * in_pitch * lanes * 16 + R * R * lanes * V * compute_bytes(a.dtype);
      if (shared > std::min(kShared * 3 / 2, f.shared_bytes_per_block)) continue;
      int64_t shift_y = forward ? 0 : a.pad_top % 2, shift_x = forward ? 0 : a.pad_left % 2;
      int64_t tiles_y = ceil_div(dst_h + shift_y, rows), tiles_x = ceil_div(dst_w + shift_x, columns), blocks = ceil_div(vectors, lanes);
      if (blocks * tiles_y * tiles_x >= INT32_MAX) continue;
      double score = double(blocks * lanes) * double(tiles_y * tiles_x) * (double(in_rows * in_pitch) + double(rows * columns));
      if (lanes < 4 && lanes < vectors) score *= 2;  // less than 64 bytes in a row: sectors are fetched twice
      if (best_score >= 0 && score >= best_score) continue;
      best_score = score;
      best = {int(threads), int(lanes), int(rows), int(strips), int(strip), int(in_rows), int(in_pitch), tiles_y, tiles_x, blocks, int(shared)};
    }
  return best_score >= 0;
}

bool plan_nhwc_weight_grad(const ConvProblem& a, const DeviceFacts& f, DepthwiseNhwcPlan& best) {
  int64_t V = 16 / storage_bytes(a.dtype), vectors = ceil_div(a.c, V), R = a.r, U = a.stride_h, threads = 256;
  if (a.c % V != 0) return false;
  double best_score = -1;
  for (int64_t lanes = 1; lanes <= std::min<int64_t>(16, next_power(vectors)); lanes *= 2)
    for (int64_t rows = 1; rows <= 32; rows *= 2)
      for (int64_t columns = 4; columns <= 64; columns *= 2) {
        int64_t channels = lanes * V, pairs = channels / 2, groups = threads / pairs;
        int64_t in_rows = (rows - 1) * U + R, in_pitch = (columns - 1) * U + R;
        int64_t stages = 2 * (in_rows * in_pitch + rows * columns) * channels * storage_bytes(a.dtype);
        int64_t shared = std::max(stages, groups * R * channels * compute_bytes(a.dtype));
        if (shared > std::min(2 * kShared, f.shared_bytes_per_block)) continue;
        int64_t tiles_y = ceil_div(a.p, rows), tiles_x = ceil_div(a.q, columns), blocks = ceil_div(vectors, lanes);
        if (blocks >= INT32_MAX) continue;
        double tile = double(in_rows * in_pitch + rows * columns) + double(ceil_div(rows, groups) * groups * columns);
        double score = double(blocks * lanes) * double(tiles_y * tiles_x) * tile;
        if (lanes < 4 && lanes < vectors) score *= 2;
        if (best_score >= 0 && score >= best_score) continue;
        best_score = score;
        best = {int(threads), int(lanes), int(rows), int(columns / 4), 4, int(in_rows), int(in_pitch), tiles_y, tiles_x, blocks, int(shared)};
      }
  return best_score >= 0;
}

// Rows of the source that `rows` rows of the output meet.
int64_t source_rows(const ConvProblem& a, Pass pass, int64_t rows) {
  if (pass == Pass::input_grad) return a.stride_h == 1 ? std::min(a.p, rows - 1 + a.r) : std::min(a.p, (rows + a.r) / 2 + 1);
  return std::min(a.h, (rows - 1) * a.stride_h + a.r);
}

bool plan_nchw(const ConvProblem& a, Pass pass, const DeviceFacts& f, DepthwiseNchwPlan& b) {
  int64_t V = 16 / storage_bytes(a.dtype), element = storage_bytes(a.dtype), R = a.r;
  bool grad = pass == Pass::input_grad, weights = pass == Pass::weight_grad;
  // The weight gradient reads both and writes neither: its "output" is the gradient of y.
  int64_t src_w = grad ? a.q : a.w, dst_h = grad ? a.h : a.p, dst_w = grad ? a.w : a.q;
  auto staged = [&](int64_t elements) { return ceil_div(elements + V - 1, V) * V; };
  int64_t taps = R * R * compute_bytes(a.dtype);
  int64_t src_plane = staged((grad ? a.p : a.h) * src_w), dst_plane = staged(dst_h * dst_w);
  int64_t plane = (src_plane + dst_plane) * element + taps, wanted = kShared / 2;
  b.planes = 1, b.band_rows = dst_h, b.bands = 1;
  if (plane <= kShared) {
    // Fewer than would fit, where multiprocessors would go without.
    int64_t all = weights ? a.n : a.n * a.c, at_least = ceil_div(all, kWaves * f.multiprocessors);
    b.planes = std::clamp<int64_t>(wanted / plane, 1, weights ? all : std::max<int64_t>(1, at_least));
  } else {
    auto bytes = [&](int64_t rows) { return (staged(source_rows(a, pass, rows) * src_w) + staged(rows * dst_w)) * element + taps; };
    while (b.band_rows > 1 && bytes(b.band_rows) > wanted) b.band_rows = ceil_div(b.band_rows, 2);
    if (bytes(b.band_rows) > std::min(2 * kShared, f.shared_bytes_per_block)) return false;
    b.bands = ceil_div(dst_h, b.band_rows);
  }
  if (weights) {
    b.in_elements = int(b.bands == 1 ? src_plane : staged(source_rows(a, pass, b.band_rows) * src_w));
    b.out_elements = int(b.bands == 1 ? dst_plane : staged(b.band_rows * dst_w));
    b.shared_bytes = int(std::max<int64_t>(b.planes * (b.in_elements + b.out_elements) * element, 8 * taps));
  } else {
    b.in_elements = int(staged(b.bands == 1 ? b.planes * (grad ? a.p : a.h) * src_w : source_rows(a, pass, b.band_rows) * src_w));
    b.out_elements = int(staged(b.planes * b.band_rows * dst_w));
    b.shared_bytes = int((b.in_elements + b.out_elements) * element + b.planes * taps);
  }
  // Two columns a thread at least, and segments of four rows or more: their first rows are read twice.
  int64_t segments = std::clamp<int64_t>(ceil_div(512, b.planes * dst_w), 1, ceil_div(b.band_rows, 4));
  b.segment_rows = int(ceil_div(b.band_rows, segments));
  b.segments = int(ceil_div(b.band_rows, b.segment_rows));
  return b.shared_bytes <= f.shared_bytes_per_block && b.planes * b.segments * dst_w < INT32_MAX;
}

// Bytes that parts of a workspace take, each from a multiple of 256.
struct Workspace {
  int64_t bytes = 0;
  int64_t take(int64_t size) {
    int64_t at = bytes;
    bytes += ceil_div(size, 256) * 256;
    return at;
  }
};

// Pixels, and positions along an axis, that can be counted in 32 bits.
bool countable(const ConvProblem& a) {
  constexpr int64_t most = int64_t(1) << 28, most_pixels = INT32_MAX - 512;
  for (int64_t v : {a.h, a.w, a.p, a.q, a.pad_top, a.pad_left, a.r * a.dilation_h, a.s * a.dilation_w, a.stride_h, a.stride_w})
    if (v >= most) return false;
  return a.n * a.h * a.w <= most_pixels && a.n * a.p * a.q <= most_pixels && (a.p + a.r) * a.stride_h < most && (a.q + a.s) * a.stride_w < most;
}

// Cycles of a multiprocessor for 64 bytes of depth of a tile: products; bytes through shared memory (128 a cycle), where the
// operands are written once and read by each warp; or bytes out of the second cache (25 a cycle). `fresh`: the part of the
// left operand that comes from there.
double step_cycles(const TensorTile& tile, DType dtype, bool exact, double fresh) {
  double rate = dtype != DType::f32 ? 1024 : exact ? 512.0 / 3 : 512;  // products a cycle
  double read = double(tile.rows) * tile.warp_columns + double(tile.columns) * tile.warp_rows, written = tile.columns + (fresh > 0 ? tile.rows : 0);
  return std::max({double(tile.rows * tile.columns) * double(TensorTile::depth_bytes / storage_bytes(dtype)) / rate, (read + written) * TensorTile::depth_bytes / 128.0,
                   (tile.rows * fresh + tile.columns) * TensorTile::depth_bytes / 25.0});
}

// Where tensor cores take the problem. Tiles, and splits of the weight gradient, scored by the cycles of the busiest
// multiprocessor.
bool plan_tensor(const ConvProblem& a, Pass pass, const DeviceFacts& f, Float32 float32, bool aligned, CudaConvPlan& plan) {
  int64_t element = storage_bytes(a.dtype), V = 16 / element, channels = a.c / a.groups, filters = a.k / a.groups;
  bool forward = pass == Pass::forward, weights = pass == Pass::weight_grad, nhwc = a.layout == Layout::nhwc;
  if (a.dtype == DType::f64 || !countable(a)) return false;
  TensorPlan t{};
  t.exact = a.dtype == DType::f32 && float32 == Float32::full;
  t.phases = pass == Pass::input_grad ? int(std::min<int64_t>(a.stride_h * a.stride_w, kTensorPhases + 1)) : 1;
  if (t.phases > kTensorPhases) return false;

  // The image that is gathered by taps is x, or the gradient of y. Few channels, and those of half a chunk, are copied in
  // halves (float32: single elements); else every pixel has to start at 16 bytes, and what doesn't is laid out anew.
  int64_t gathered = pass == Pass::input_grad ? filters : channels, half = element == 4 ? 1 : 4;
  t.granules = gathered % V != 0 && (gathered < V || (nhwc && aligned && element == 2 && gathered % half == 0));
  int64_t padded = ceil_div(gathered, t.granules ? half : V) * (t.granules ? half : V);
  bool arrange = !nhwc || !aligned || padded != gathered;
  int64_t of_src = pass == Pass::forward ? a.n * a.h * a.w : a.n * a.p * a.q, of_x = a.n * a.h * a.w;
  Workspace space;
  if (weights) {
    t.src_channels = ceil_div(filters, V) * V, t.arrange_src = !nhwc || !aligned || t.src_channels != filters;
    t.x_channels = padded, t.arrange_x = arrange;
    if (t.arrange_x) t.x_offset = space.take(of_x * a.groups * t.x_channels * element);
  } else {
    t.src_channels = padded, t.arrange_src = arrange;
  }
  if (t.arrange_src) t.src_offset = space.take(of_src * a.groups * t.src_channels * element);

  int64_t taps = a.r * a.s, depth_of_step = TensorTile::depth_bytes / element;
  if (a.k * taps * padded >= INT32_MAX / 2) return false;  // weights are counted in 32 bits as well
  t.weight_pitch = ceil_div(taps * padded, V) * V;
  // fprop, dgrad: pixels of a phase x filters (channels). The phases of a gradient share the taps among them.
  int64_t dst = forward ? a.n * a.p * a.q : a.n * ceil_div(a.h, a.stride_h) * ceil_div(a.w, a.stride_w);
  int64_t rows = weights ? filters : dst, columns = weights ? t.weight_pitch : forward ? filters : channels;
  double steps = weights ? double(ceil_div(a.n * a.p * a.q, depth_of_step)) : std::max(1.0, double(taps * padded) / double(t.phases * depth_of_step));
  double fresh = weights || taps == 1 ? 1 : 1.0 / 3;  // taps of a row find most pixels in the first cache
  double best = -1;
  for (int i = 0; i < int(std::size(kTensorTiles)); ++i) {
    const TensorTile& tile = kTensorTiles[i];
    bool compiled = t.granules ? i == 2 || i == 4 : !t.exact || !tile.large();  // with_config() of conv_sm80.cuh
    if (!compiled || tile.shared_bytes() > f.shared_bytes_per_block) continue;
    int64_t blocks = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns) * a.groups * t.phases;
    double step = step_cycles(tile, a.dtype, t.exact, fresh);
    double resident = std::min(tile.threads() > 128 ? 1.0 : tile.rows * tile.columns >= 128 * 128 ? 2.0 : tile.rows * tile.columns == 128 * 64 ? 3.0 : 4.0, double(std::max<int64_t>(1, f.shared_bytes_per_block / tile.shared_bytes())));
    // Until the first stage is there, and until the sums are stored: 1500 cycles, which other blocks use.
    auto cycles = [&](int64_t blocks, double steps) {
      double here = double(ceil_div(blocks, f.multiprocessors));
      return here * steps * step + 1500 * std::max(1.0, here / resident) + (here < resident ? 0.15 * steps * step * (resident - here) : 0);
    };
    for (int64_t splits = 1; splits <= (weights ? 1024 : 1) && double(splits) <= steps; splits += std::max<int64_t>(1, splits / 4)) {
      if (blocks * splits >= INT32_MAX) break;
      double score = cycles(blocks * splits, std::ceil(steps / double(splits)));
      // Partial sums are written and read once more: about 16 bytes a cycle and multiprocessor.
      if (weights) score += 2.0 * double(splits) * double(a.k * t.weight_pitch) * 4 / (16.0 * f.multiprocessors);
      if (best >= 0 && score >= best) continue;
      best = score, t.tile = i, plan.splits = splits;
    }
  }
  if (best < 0) return false;
  if (weights) t.weight_offset = space.take(plan.splits * a.k * t.weight_pitch * 4);
  else t.weight_offset = space.take(a.groups * columns * (taps * padded + t.phases * V) * element);
  plan.kernel = CudaKernel::tensor;
  plan.tensor = t;
  plan.workspace_bytes = space.bytes;
  return true;
}

}  // namespace

CudaConvPlan plan_conv_cuda(const ConvProblem& a, Pass pass, const DeviceFacts& f, Float32 float32, bool aligned, bool least_workspace) {
  CudaConvPlan plan{};
  plan.splits = 1;
  // Blocks without splits, and how finely the sums over all pixels could be cut.
  int64_t blocks = 1, pieces = 1, sums = 0;
  if (a.groups == a.c && a.c > 1 && a.k % a.c == 0) {
    bool weights = pass == Pass::weight_grad, nhwc = a.layout == Layout::nhwc, special = aligned && is_special(a);
    if (special && nhwc && (weights ? plan_nhwc_weight_grad(a, f, plan.nhwc) : plan_nhwc(a, pass, f, plan.nhwc))) {
      plan.kernel = CudaKernel::depthwise_nhwc;
      blocks = plan.nhwc.channel_blocks, pieces = a.n * plan.nhwc.tiles_y * plan.nhwc.tiles_x;
    } else if (special && !nhwc && plan_nchw(a, pass, f, plan.nchw)) {
      plan.kernel = CudaKernel::depthwise_nchw;
      blocks = a.c, pieces = ceil_div(a.n, plan.nchw.planes) * plan.nchw.bands;
    } else {
      plan.kernel = CudaKernel::depthwise_generic;
      blocks = ceil_div(a.k, nhwc ? 32 : 1) * a.r, pieces = ceil_div(a.n * a.p * a.q, 512);
    }
    if (weights) sums = a.k * a.r * a.s;
  } else if (!least_workspace && plan_tensor(a, pass, f, float32, aligned, plan)) {
    return plan;
  } else {
    plan.kernel = CudaKernel::simt;
    plan.chain = a.dtype == DType::f64 ? 1 << 30 : 32;
    if (pass == Pass::weight_grad) {
      blocks = a.groups * ceil_div(a.k / a.groups, 64) * ceil_div(a.c / a.groups * a.r * a.s, 64);
      pieces = ceil_div(a.n * a.p * a.q, 256);
      sums = a.k * (a.c / a.groups) * a.r * a.s;
    }
  }
  if (sums > 0) {
    plan.splits = least_workspace ? 1 : std::clamp<int64_t>(kWaves * f.multiprocessors / blocks, 1, std::min<int64_t>(pieces, 1024));
    bool direct = plan.kernel == CudaKernel::simt && plan.splits == 1;
    plan.workspace_bytes = direct ? 0 : plan.splits * sums * compute_bytes(a.dtype);
  }
  return plan;
}

namespace {

// Columns of memory: vectors of 8 that hold whole channels, and how many values each has of a row. 0: there are none.
int64_t least_units(int64_t values) {
  int64_t channels = 8 / std::gcd<int64_t>(values, 8);
  return channels * values / 8;
}

// The cheapest way to keep channels on chip by the time it takes: microseconds of a launch and of a pass over the tensor,
// which a multiprocessor moves some 23 bytes a nanosecond of. Compared with kernels of their own for sums, what follows from
// them, and the rest.
OnChipPlan plan_on_chip(const ChannelShape& s, ChannelWork work, const DeviceFacts& f) {
  OnChipPlan best{};
  bool pixels = s.c > 1 && (s.layout == Layout::nhwc || s.hw == 1), backward = work == ChannelWork::backward;
  OnChipPlan b{};
  b.rows = pixels ? s.n * s.hw : s.n, b.length = pixels ? s.c : s.c * s.hw, b.values = pixels ? 1 : s.hw;
  if (b.length % 8 != 0) return best;
  int64_t element = storage_bytes(s.dtype), columns = b.length / 8, least = least_units(b.values);
  double bytes = double(s.n * s.c * s.hw * element), pass = bytes / (23e3 * f.multiprocessors);
  double best_time = backward ? 12 + 5 * pass : 10 + 3 * pass;
  for (int64_t units = least; units <= std::min<int64_t>(columns, std::max<int64_t>(64, least)) && units <= 256; units += least) {
    if (columns % units != 0 && units % (4 * least) != 0) continue;
    int64_t channels = units * 8 / b.values, spans = ceil_div(columns, units);
    for (int64_t cluster = 1; cluster <= std::min<int64_t>(b.rows, f.largest_cluster); cluster *= 2) {
      int64_t rows = ceil_div(b.rows, cluster), slab = rows * units * 8 * element * (backward ? 2 : 1);
      for (int64_t threads : {256, 512}) {
        // Two doubles a thread and a column, and what is known of each channel.
        int64_t shared = slab + threads * 16 + units * 8 * 16 + channels * (3 * 8 + 5 * compute_bytes(s.dtype));
        int64_t resident = threads == 256 ? 2 : 1;  // blocks of a multiprocessor
        if (shared > (f.shared_bytes_per_block + 1024) / resident - 1024 || spans * cluster >= INT32_MAX) continue;
        double full = double(spans * cluster) / double(resident * f.multiprocessors);
        double waste = std::ceil(full) / full;
        if (units < columns && units * 8 * element < 32) waste *= 2;  // half a sector
        if (resident == 1) waste *= 1.15;                             // nobody computes while it loads
        waste *= 1 + 0.02 * double(cluster);                          // not every set of multiprocessors is a cluster
        double time = 5 + (cluster > 1) + (backward ? 3 : 2) * pass * waste;  // barriers of a cluster: about a microsecond
        if (time >= best_time) continue;
        best_time = time;
        best = b;
        best.cluster = int(cluster), best.units = int(units), best.threads = int(threads), best.rows_per_block = rows, best.shared_bytes = int(shared);
      }
    }
  }
  return best;
}

}  // namespace

CudaChannelPlan plan_channels_cuda(const ChannelShape& s, ChannelWork work, const DeviceFacts& f, bool aligned, bool least_workspace) {
  CudaChannelPlan b{};
  int64_t least = least_units(s.hw);
  b.kind = s.c > 1 && (s.layout == Layout::nhwc || s.hw == 1) ? ChannelRows::pixels
           : s.hw % 8 != 0 && s.c * s.hw % 8 == 0 && least <= 256 ? ChannelRows::images : ChannelRows::planes;
  bool pixels = b.kind == ChannelRows::pixels, images = b.kind == ChannelRows::images;
  b.multiprocessors = f.multiprocessors;
  b.rows = pixels ? s.n * s.hw : images ? s.n : s.n * s.c;
  b.length = pixels ? s.c : images ? s.c * s.hw : s.hw;
  b.steps = images ? s.n : s.n * s.hw;
  b.values = images ? s.hw : 1;
  b.units = images ? int(least * std::clamp<int64_t>(64 / least, 1, b.length / 8 / least)) : 0;
  if (aligned && (work == ChannelWork::forward || work == ChannelWork::backward)) b.chip = plan_on_chip(s, work, f);
  if (b.chip.cluster > 0) return b;
  int64_t blocks = pixels ? ceil_div(s.c, 256) : images ? ceil_div(b.length / 8, b.units) : s.c;
  int64_t most = ceil_div(b.steps, pixels ? 64 : images ? ceil_div(2048, b.units * 8) : 4096);
  b.pieces = least_workspace ? 1 : std::clamp<int64_t>(ceil_div(kWaves * f.multiprocessors, blocks), 1, std::min<int64_t>(most, 1024));
  b.piece_steps = ceil_div(b.steps, b.pieces);
  if (!images) b.piece_steps = ceil_div(b.piece_steps, 8) * 8;  // pieces of planes begin at whole vectors
  b.pieces = ceil_div(b.steps, b.piece_steps);
  b.workspace_bytes = (2 * b.pieces + 5) * s.c * 8;
  return b;
}

CudaSeparablePlan plan_separable_cuda(const ConvProblem& a, int64_t filters, const DeviceFacts& f, Float32 float32, bool aligned, bool least_workspace) {
  CudaSeparablePlan plan{};
  int64_t element = storage_bytes(a.dtype), V = 16 / element;
  if (least_workspace || a.dtype == DType::f64 || a.k != a.c || !countable(a) || (filters + a.r * a.s) * (a.c + V) >= INT32_MAX / 2) return plan;
  plan.exact = a.dtype == DType::f32 && float32 == Float32::full;
  plan.channels = ceil_div(a.c, V) * V;
  plan.arrange_x = a.layout != Layout::nhwc || !aligned || plan.channels != a.c;
  int64_t steps = ceil_div(plan.channels * element, TensorTile::depth_bytes), rows = a.n * a.p * a.q;
  double best = -1;
  for (int i = 0; i < int(std::size(kTensorTiles)); ++i) {
    const TensorTile& tile = kTensorTiles[i];
    if (tile.rows != 64) continue;
    int64_t shared = (steps * tile.rows + TensorTile::stages * tile.columns) * TensorTile::depth_bytes + tile.rows * 16 + tile.warp_rows * tile.columns * (16 + V) * element;
    if (shared > f.shared_bytes_per_block) continue;
    int64_t row_tiles = ceil_div(rows, tile.rows), column_tiles = ceil_div(filters, tile.columns);
    // The depthwise part of a block: 64 bytes a cycle out of the first cache, a vector of a tap each.
    double depthwise = double(tile.rows * plan.channels * element * a.r * a.s) / 64, product = double(steps) * step_cycles(tile, a.dtype, plan.exact, 0) + 500;
    double alone = shared * 2 > f.shared_bytes_per_block ? 1.3 : 1;  // no other block computes while this one loads
    for (int64_t parts = 1; parts <= column_tiles; ++parts) {
      if (row_tiles * parts >= INT32_MAX) break;
      double score = double(ceil_div(row_tiles * parts, f.multiprocessors)) * (depthwise + double(ceil_div(column_tiles, parts)) * product) * alone;
      if (best >= 0 && score >= best) continue;
      best = score, plan.tensor = true, plan.tile = i, plan.column_blocks = int(parts), plan.shared_bytes = int(shared);
    }
  }
  if (!plan.tensor) return plan;
  Workspace space;
  if (plan.arrange_x) plan.x_offset = space.take(a.n * a.h * a.w * plan.channels * element);
  plan.taps_offset = space.take(a.r * a.s * plan.channels * 4);
  plan.weight_offset = space.take(filters * plan.channels * element);
  plan.workspace_bytes = space.bytes;
  return plan;
}

std::string describe(const ConvProblem& a, int64_t filters, const DeviceFacts& f, const CudaSeparablePlan& plan) {
  auto num = [](int64_t v) { return std::to_string(v); };
  std::string out = "separable " + to_string(a) + " to " + num(filters) + " filters -> ";
  if (plan.tensor)
    out += "separable_sm80_64x" + num(kTensorTiles[plan.tile].columns) + (a.dtype == DType::f32 ? plan.exact ? "_3xtf32" : "_tf32" : "") + ", " + num(plan.column_blocks) + " blocks of columns, " +
           num(plan.shared_bytes) + " bytes of shared memory" + (plan.arrange_x ? ", laid out anew" : "");
  else out += "separable_simt_64x64x16";
  return out + ", " + num(plan.workspace_bytes) + " bytes of workspace, sm_" + num(f.major) + num(f.minor) + " with " + num(f.multiprocessors) + " multiprocessors";
}

std::string describe(const ConvProblem& a, Pass pass, const DeviceFacts& f, const CudaConvPlan& plan) {
  std::string out = std::string(name(pass)) + " " + to_string(a) + " -> ";
  auto num = [](int64_t v) { return std::to_string(v); };
  switch (plan.kernel) {
    case CudaKernel::depthwise_nhwc: {
      const DepthwiseNhwcPlan& b = plan.nhwc;
      out += "depthwise_nhwc_" + num(a.r) + "x" + num(a.s) + "u" + num(a.stride_h) + ", " + num(b.lanes * 16 / storage_bytes(a.dtype)) + " channels x " + num(b.rows) + " rows x " +
             num(b.strips * b.strip) + " columns a block, " + num(b.shared_bytes) + " bytes of shared memory";
      break;
    }
    case CudaKernel::depthwise_nchw: {
      const DepthwiseNchwPlan& b = plan.nchw;
      out += "depthwise_nchw_" + num(a.r) + "x" + num(a.s) + "u" + num(a.stride_h) + ", " + num(b.planes) + " planes x " + num(b.band_rows) + " rows a block, " +
             num(b.segment_rows) + " rows a thread, " + num(b.shared_bytes) + " bytes of shared memory";
      break;
    }
    case CudaKernel::depthwise_generic: out += "depthwise_generic_" + std::string(name(a.layout)); break;
    case CudaKernel::tensor: {
      const TensorTile& b = kTensorTiles[plan.tensor.tile];
      out += "sm80_" + num(b.rows) + "x" + num(b.columns) + "x" + num(TensorTile::depth_bytes / storage_bytes(a.dtype)) + (a.dtype == DType::f32 ? plan.tensor.exact ? "_3xtf32" : "_tf32" : "") + ", " +
             num(TensorTile::stages) + " stages, " + num(b.shared_bytes()) + " bytes of shared memory";
      if (plan.tensor.phases > 1) out += ", " + num(plan.tensor.phases) + " phases";
      if (plan.tensor.granules) out += ", in granules of " + num(a.dtype == DType::f32 ? 4 : 8) + " bytes";
      if (plan.tensor.arrange_src || plan.tensor.arrange_x) out += ", laid out anew";
      break;
    }
    case CudaKernel::simt: out += "simt_64x64x16"; break;
  }
  if (pass == Pass::weight_grad) out += ", " + num(plan.splits) + " splits";
  return out + ", " + num(plan.workspace_bytes) + " bytes of workspace, sm_" + num(f.major) + num(f.minor) + " with " + num(f.multiprocessors) + " multiprocessors";
}

std::string describe(const ChannelShape& s, ChannelWork work, const DeviceFacts& f, const CudaChannelPlan& plan) {
  auto num = [](int64_t v) { return std::to_string(v); };
  const char* names[] = {"sums", "forward", "backward", "evaluation", "evaluation_backward"};
  std::string out = std::string(names[int(work)]) + " of n" + num(s.n) + "c" + num(s.c) + " with " + num(s.hw) + " pixels, " + name(s.dtype) + " " + name(s.layout) + " -> ";
  const OnChipPlan& b = plan.chip;
  if (b.cluster > 0) {
    out += "batch_norm_on_chip, " + num(b.units * 8 / b.values) + " channels in " + num(b.cluster) + (b.cluster == 1 ? " block" : " blocks") + ", " + num(b.threads) + " threads, " +
           num(b.shared_bytes) + " bytes of shared memory";
  } else {
    const char* kinds[] = {"pixels", "planes", "images"};
    out += std::string("batch_norm_by_") + kinds[int(plan.kind)];
    if (work != ChannelWork::evaluation) out += ", " + num(plan.pieces) + (plan.pieces == 1 ? " piece" : " pieces") + " of a channel";
  }
  return out + ", " + num(plan.workspace_bytes) + " bytes of workspace, sm_" + num(f.major) + num(f.minor) + " with " + num(f.multiprocessors) + " multiprocessors";
}

}  // namespace convkit
