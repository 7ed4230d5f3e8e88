#include "plan_cuda.h"

#include <algorithm>
#include <cmath>
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

}  // namespace

CudaConvPlan plan_conv_cuda(const ConvProblem& a, Pass pass, const DeviceFacts& f, bool aligned, bool least_workspace) {
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
