#include "plan.h"

#include <algorithm>
#include <numeric>

namespace convkit {

bool streams(int64_t bytes, const CpuFacts& f) { return bytes > f.l2_bytes * f.threads / 2; }

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out workspace, a cache line aligned.
struct Workspace {
  int64_t bytes = 0;
  Piece take(int64_t size) {
    Piece p{bytes, size};
    bytes += ceil_div(size, 64) * 64;
    return p;
  }
};

// Staged copies of a few images at a time: enough that threads find work, few enough to stay in the caches.
constexpr int64_t kStagedBytes = 4 << 20;
// Output gradient and input of a block of the weight gradient: a quarter of a 2 MiB second-level cache, beside the sums.
constexpr int64_t kOuterBlockBytes = 512 << 10;
// With few channels every tap goes through the gradient of a block where it lies: half of a first-level cache.
constexpr int64_t kOuterThinBlockBytes = 28 << 10;
// Partial sums of the weight gradient: at most as much in all, or a single one.
constexpr int64_t kOuterSumsBytes = 4 << 20;
// And as much of them for one task: they stay in the second-level cache from block to block.
constexpr int64_t kOuterPartBytes = 1 << 20;
// Pixels of a block of a 1x1 filter, channels last: of so many, a run of x stays in the first-level cache for all tiles of
// rows. Contiguous planes are copied in longer runs.
constexpr int64_t kOuterPixels = 128;
// The copy of a depthwise task's part of an image: stays in the second-level cache with what it is copied from.
constexpr int64_t kDepthwiseBytes = 512 << 10;
// Taps, or sums of a weight gradient, of a depthwise block of channels: they stay in the second-level cache.
constexpr int64_t kDepthwiseTapsBytes = 256 << 10;
// Source and outputs of a depthwise task on a small contiguous image: they stay in the first-level cache.
constexpr int64_t kDepthwisePlanesBytes = 32 << 10;
// Contiguous images up to this width are copied without padding: a run of whole vectors is worth more than rows without edges.
constexpr int64_t kNarrowImage = 16;
// Where less than this part of the taps lies inside of the source, tiles of one pixel of many images leave the others out.
constexpr double kInside = 0.93;
// A table of row pointers should leave most of the first-level cache to the data.
constexpr int64_t kTableBytes = 32 << 10;
// The planes of a task of the few-channel kernel, read and written.
constexpr int64_t kPlanesBytes = 768 << 10;
// Products of an output from which sixteen registers, whose tile of planes is small, do better by the kernel of rows.
constexpr int64_t kPlanesProducts = 40;
// Below this many channels a filter row's taps and channels are worth a padded copy in which they are one run.
constexpr int64_t kFewChannels = 16;
// The panels of pixels of a task of a 1x1 convolution: a quarter of a 2 MiB second-level cache.
constexpr int64_t kPointwiseBytes = 512 << 10;
// The copy of a line of channels of a grouped task: stays in the second-level cache with what is read ahead.
constexpr int64_t kGroupedBytes = 256 << 10;
// Winograd: channels of a group from which on its blocks are not mostly empty.
constexpr int64_t kWinogradGroup = 16;
// Tiles between two looks at the sums of a weight gradient.
constexpr int64_t kWinogradTiles = 32;
// Transformed filters beyond this, or of use to few tiles, are transformed by the tasks that use them rather than stored.
constexpr int64_t kSharedFilterBytes = 12 << 20;
// Then the transformed source of so many tiles lies in the workspace.
constexpr int64_t kWinogradSourceBytes = 24 << 20;

bool multiplies_pairs(const ConvProblem& a, const CpuFacts& f) { return a.dtype == DType::bf16 && f.bf16_dots; }

// Contiguous and channels-last are the same memory where there is one channel or one pixel.
bool needs_staging(DType t, Layout l, int64_t channels, int64_t pixels) {
  return storage_bytes(t) != compute_bytes(t) || (l == Layout::nchw && channels != 1 && pixels != 1);
}

// The taps of a filter row and their channels as one run of a padded copy, which is not made where padding or stride make
// it far larger than the image.
bool can_merge_taps(const ConvProblem& a) {
  if (a.dilation_w != 1 || a.s == 1) return false;
  double area = (double(a.p - 1) * a.stride_h + double(a.r - 1) * a.dilation_h + 1) * (double(a.q - 1) * a.stride_w + a.s);
  return area < 4.0 * double(a.h * a.w) + 4096;
}
bool merge_few_channels(const ConvProblem& a) { return a.groups == 1 && a.c < kFewChannels && can_merge_taps(a); }

// Products summed in one chain before they are added to a total: the rounding error of a sum of n grows with
// sqrt(n * chain) instead of n. An addition to the total costs a tile about two steps of the loop: 3 % at 64. Short sums
// can afford more, and need it to be as exact as the dot products that PyTorch computes them with.
int64_t pick_chain(DType t, int64_t terms, bool dots = false) {
  if (t == DType::f64) return INT64_MAX / 2;
  if (dots) return 512;  // bf16's own rounding is larger than all of these
  return terms <= 32 ? 32 : terms <= 64 ? 16 : terms <= 128 ? 32 : 64;
}

// How many of `all` to take at a time, at most `wanted` and at least one, so that the last time is no much smaller than the
// others: threads would wait for each other.
int64_t evenly(int64_t all, int64_t wanted) {
  return all == 0 ? 1 : ceil_div(all, ceil_div(all, std::clamp<int64_t>(wanted, 1, all)));
}

// Vectors of columns a register tile takes: the count that wastes fewest lanes over all tiles, wider first.
int pick_vectors(int64_t columns, int64_t lanes, const CpuFacts& f) {
  int64_t needed = ceil_div(columns, lanes), best_total = -1;
  int best = 1;
  for (int v = 4; v >= 1; --v) {
    if (f.rows_for_vectors[v] == 0 || (v > needed && v > 1)) continue;
    int64_t total = ceil_div(needed, v) * v;
    if (best_total < 0 || total < best_total) best_total = total, best = v;
  }
  return best;
}

// Which part of the taps that the outputs along one axis meet lies inside of the source.
double taps_inside(int64_t outputs, int64_t source, int64_t taps, int64_t stride, int64_t pad, int64_t dilation, bool input_grad) {
  int64_t met = 0, inside = 0;
  for (int64_t i = 0; i < outputs; ++i)
    for (int64_t tap = 0; tap < taps; ++tap) {
      int64_t at = input_grad ? i + pad - tap * dilation : i * stride - pad + tap * dilation;
      if (input_grad && at % stride != 0) continue;
      if (input_grad) at /= stride;
      ++met;
      inside += at >= 0 && at < source;
    }
  return met == 0 ? 1 : double(inside) / double(met);
}

// Of small images, which part of the products the kernel of rows computes: with enough of them, it leaves taps in the padding
// out where that is worth the gathering of a tile's pixels from many images.
double products_inside(const ConvProblem& a, bool input_grad, const CpuFacts& f) {
  int64_t dst_h = input_grad ? a.h : a.p, dst_w = input_grad ? a.w : a.q;
  if (a.n < f.rows_for_vectors[2] || dst_h * dst_w > 1024) return 1;
  // Phase would follow phase, and threads with those of few taps would wait for the others.
  if (input_grad && (a.r * a.dilation_h % a.stride_h != 0 || a.s * a.dilation_w % a.stride_w != 0)) return 1;
  double part = taps_inside(dst_h, input_grad ? a.p : a.h, a.r, a.stride_h, a.pad_top, a.dilation_h, input_grad) *
                taps_inside(dst_w, input_grad ? a.q : a.w, a.s, a.stride_w, a.pad_left, a.dilation_w, input_grad);
  return part < kInside ? part : 1;
}

RowsPlan plan_rows(const ConvProblem& a, Pass pass, const CpuFacts& f, Workspace& ws) {
  RowsPlan b{};
  b.input_grad = pass == Pass::input_grad;
  b.images = a.n;
  b.src_h = b.input_grad ? a.p : a.h, b.src_w = b.input_grad ? a.q : a.w, b.src_c = b.input_grad ? a.k : a.c;
  b.dst_h = b.input_grad ? a.h : a.p, b.dst_w = b.input_grad ? a.w : a.q, b.dst_c = b.input_grad ? a.c : a.k;
  b.dots = multiplies_pairs(a, f);
  int64_t element = compute_bytes(a.dtype), lanes = f.vector_bytes / element, operand = b.dots ? 2 : element;
  b.merge_taps = !b.input_grad && merge_few_channels(a);
  b.stage_src = b.merge_taps || needs_staging(b.dots ? DType::f32 : a.dtype, a.layout, b.src_c, b.src_h * b.src_w);
  b.stage_dst = a.layout == Layout::nchw && b.dst_c != 1 && b.dst_h * b.dst_w != 1;
  b.stream = !b.stage_dst && streams(a.n * b.dst_c * b.dst_h * b.dst_w * storage_bytes(a.dtype), f);
  b.staged_h = b.merge_taps ? (a.p - 1) * a.stride_h + (a.r - 1) * a.dilation_h + 1 : b.src_h;
  b.staged_w = b.merge_taps ? (a.q - 1) * a.stride_w + a.s : b.src_w;
  b.taps = b.merge_taps ? a.r : a.r * a.s;
  b.depth = b.merge_taps ? a.s * a.c : b.src_c / a.groups;
  b.chain = pick_chain(a.dtype, b.taps * b.depth, b.dots);
  b.group_columns = b.dst_c / a.groups;
  b.vectors = pick_vectors(b.group_columns, lanes, f);
  b.rows = f.rows_for_vectors[b.vectors];
  b.column_tiles = ceil_div(b.group_columns, b.vectors * lanes);
  b.across_images = !b.merge_taps && products_inside(a, b.input_grad, f) < 1;
  b.blocks_dst = b.stage_dst && !b.across_images && (!b.input_grad || (a.stride_h == 1 && a.stride_w == 1)) && b.group_columns >= lanes;

  int64_t src_bytes = b.stage_src ? b.staged_h * b.staged_w * b.src_c * operand : 0;
  int64_t dst_bytes = b.stage_dst ? b.dst_h * b.dst_w * b.dst_c * element : 0;  // through the caches, block by block as well
  int64_t per_image = src_bytes + dst_bytes;
  b.images_per_chunk = per_image == 0 ? a.n : evenly(a.n, kStagedBytes / per_image);

  // About 16 register tiles share a pass over the weights of a column tile; fewer where the table would grow too large
  // or threads would go short of tasks.
  int64_t entry = b.taps * b.rows * 8;
  int64_t tiles = ceil_div(b.images_per_chunk * b.dst_h * b.dst_w, b.rows);
  int64_t columns = b.column_tiles * a.groups;
  int64_t wanted_blocks = ceil_div(int64_t(f.threads) * 8, columns);
  b.tiles_per_block = evenly(tiles, std::min<int64_t>({kTableBytes / entry, ceil_div(tiles, wanted_blocks), 16}));

  b.panels = ws.take(a.groups * b.column_tiles * b.taps * b.depth * b.vectors * lanes * element);
  b.zeros = ws.take((b.src_c + 2 * a.groups * b.column_tiles * b.vectors * lanes) * element);
  b.src = ws.take(b.images_per_chunk * src_bytes);
  b.block_bytes = b.blocks_dst ? b.tiles_per_block * b.rows * b.vectors * lanes * element : 0;
  b.dst = ws.take(b.blocks_dst ? f.threads * b.block_bytes : b.images_per_chunk * dst_bytes);
  b.table_bytes = ceil_div(b.tiles_per_block * ((b.taps + 1) * b.rows * 8 + 16 + b.taps * 4) + b.taps * 20 + a.s * 8, 64) * 64;
  b.tables = ws.take(f.threads * b.table_bytes);
  return b;
}

// Vectors of pixels pay where a vector of channels would be mostly empty and rows are long enough to fill some, and where
// contiguous tensors would have to be transposed for few products: then filters are taken a tile at a time.
bool use_planes(const ConvProblem& a, Pass pass, const CpuFacts& f) {
  bool input_grad = pass == Pass::input_grad;
  int64_t lanes = f.vector_bytes / compute_bytes(a.dtype);
  int64_t channels = (input_grad ? a.c : a.k) / a.groups, width = input_grad ? (a.w + a.stride_w - 1) / a.stride_w : a.q;
  int64_t reach = (input_grad ? a.q : a.w) + 2 * (a.s - 1) * a.dilation_w;
  int64_t height = (input_grad ? a.p : a.h) + 2 * (a.r - 1) * a.dilation_h;
  if (a.r * a.s == 1 || width < lanes / 2 || reach >= 16 * (a.w + 64) || height >= 16 * (a.h + 64)) return false;
  // What is left of a vector of pixels, and of filters, that is not beyond the last.
  auto filled = [&](int64_t values) { return double(values) / double(ceil_div(values, lanes) * lanes); };
  bool full = filled(width) >= 0.9 * filled(channels);
  bool too_small = f.rows_for_vectors[4] == 0 && a.c * a.r * a.s >= kPlanesProducts;
  return channels <= std::min<int64_t>(kPlanesChannels, lanes / 2) || (pass == Pass::forward && !multiplies_pairs(a, f) && a.layout == Layout::nchw && full && !too_small && merge_few_channels(a));
}

PlanesPlan plan_planes(const ConvProblem& a, Pass pass, const CpuFacts& f, Workspace& ws) {
  PlanesPlan b{};
  int64_t element = compute_bytes(a.dtype), lanes = f.vector_bytes / element;
  b.input_grad = pass == Pass::input_grad;
  int64_t src_w = b.input_grad ? a.q : a.w, src_c = (b.input_grad ? a.k : a.c) / a.groups;
  int64_t dst_h = b.input_grad ? a.h : a.p, dst_w = b.input_grad ? a.w : a.q, dst_c = (b.input_grad ? a.c : a.k) / a.groups;
  int64_t reach = a.dilation_h * (a.r - 1), reach_w = a.dilation_w * (a.s - 1);
  int64_t phases = b.input_grad ? std::min(a.stride_w, dst_w) : 1, sorted = b.input_grad ? 1 : a.stride_w;
  b.outputs = ceil_div(ceil_div(dst_w, phases), lanes) * lanes;
  // The leftmost source column that a tap of output 0 asks for, and the rightmost of the last output of a whole vector.
  int64_t leftmost = b.input_grad ? -ceil_div(std::max<int64_t>(0, reach_w - a.pad_left), a.stride_w) : -a.pad_left;
  int64_t rightmost = b.input_grad ? (phases - 1 + a.pad_left) / a.stride_w + b.outputs : (b.outputs - 1) * a.stride_w - a.pad_left + reach_w;
  b.left = std::max<int64_t>(0, -leftmost);
  b.columns = ceil_div(std::max(rightmost + 1, src_w) + b.left, sorted);
  b.stream = streams(a.n * a.groups * dst_c * dst_h * dst_w * storage_bytes(a.dtype), f);
  b.dots = multiplies_pairs(a, f) && src_c % 2 == 0;
  b.chain = pick_chain(a.dtype, src_c * a.r * a.s, b.dots);
  auto source_rows = [&](int64_t rows) {
    return b.input_grad ? (rows - 1 + reach) / a.stride_h + 2 : (rows - 1) * a.stride_h + reach + 1;
  };
  // Two cache lines of a channels-last pixel at a time.
  b.bundle = std::clamp<int64_t>(2 * lanes / std::min(src_c, dst_c), 1, a.groups);
  b.rows_per_task = dst_h;
  auto bytes = [&](int64_t rows) {
    return b.bundle * ((b.dots ? src_c / 2 : src_c) * source_rows(rows) * sorted * b.columns + dst_c * rows * phases * b.outputs) * element;
  };
  while (b.rows_per_task > 1 && (bytes(b.rows_per_task) > kPlanesBytes ||
                                 a.n * ceil_div(dst_h, b.rows_per_task) < 2 * f.threads))
    b.rows_per_task = ceil_div(b.rows_per_task, 2);
  b.rows = source_rows(b.rows_per_task);
  b.weights = ws.take(a.groups * src_c * a.r * a.s * dst_c * element);
  b.scratch_bytes = ceil_div(bytes(b.rows_per_task) + a.r * a.s * 12, 64) * 64;
  b.scratch = ws.take(f.threads * b.scratch_bytes);
  return b;
}

// Where a channels-last kernel would have to transpose what it reads and what it writes.
bool use_pointwise(const ConvProblem& a) {
  return a.r * a.s == 1 && a.layout == Layout::nchw && a.p * a.q > 1 && a.pad_top == 0 && a.pad_left == 0 &&
         (a.p - 1) * a.stride_h < a.h && (a.q - 1) * a.stride_w < a.w;
}

PointwisePlan plan_pointwise(const ConvProblem& a, Pass pass, const CpuFacts& f, Workspace& ws) {
  PointwisePlan b{};
  int64_t element = compute_bytes(a.dtype), lanes = f.vector_bytes / element;
  b.input_grad = pass == Pass::input_grad;
  int64_t depth = (b.input_grad ? a.k : a.c) / a.groups, dst_c = b.input_grad ? a.c : a.k;
  b.dots = multiplies_pairs(a, f) && depth % 2 == 0;
  int64_t vectors = f.rows_for_vectors[4] > 0 ? 3 : 2, rows = 8;
  int64_t line = std::max(lanes, 64 / storage_bytes(a.dtype)), lines = ceil_div(a.n * a.p * a.q, line);
  b.tasks = ceil_div(lines, std::max<int64_t>(1, kPointwiseBytes / (depth * line * (b.dots ? 2 : element))));
  while (b.tasks * a.groups % f.threads != 0 && b.tasks < lines) ++b.tasks;  // or threads would wait for each other
  b.pixels_per_task = ceil_div(lines, b.tasks) * line;
  b.stream = streams(a.n * a.p * a.q * dst_c * storage_bytes(a.dtype), f);
  b.chain = pick_chain(a.dtype, depth, b.dots);
  b.weights = ws.take((dst_c * depth + 2 * dst_c + rows) * element);
  b.scratch_bytes = ceil_div(b.pixels_per_task * depth * (b.dots ? 2 : element) + rows * vectors * lanes * element, 64) * 64;
  b.scratch = ws.take(f.threads * b.scratch_bytes);
  return b;
}

// Lines of 64 bytes, whatever the instruction set, and whole groups.
int64_t grouped_channels(const ConvProblem& a) { return std::max(64 / compute_bytes(a.dtype), a.c / a.groups); }

// Groups whose channels a vector holds one or more of, or that are few vectors; see conv_grouped.
bool use_grouped(const ConvProblem& a, Pass pass, const CpuFacts& f) {
  int64_t width = a.c / a.groups;
  if (a.groups == 1 || a.k != a.c || (width != 4 && width != 8 && width != 16 && width != 32) || multiplies_pairs(a, f)) return false;
  if (a.layout == Layout::nchw && width > f.vector_bytes / compute_bytes(a.dtype)) return false;  // transposing costs more than is won
  if (a.s != 3 || a.stride_h != a.stride_w || a.stride_h > 2 || (a.stride_h == 2 && a.dilation_h != 1) || a.dilation_w != 1 || a.pad_left > 2) return false;
  int64_t top = pass == Pass::input_grad ? a.dilation_h * (a.r - 1) - a.pad_top : a.pad_top;
  return a.c % grouped_channels(a) == 0 && std::abs(top) <= 64 + a.h && a.dilation_h * (a.r - 1) <= 64 + a.h;
}

GroupedPlan plan_grouped(const ConvProblem& a, Pass pass, const CpuFacts& f, Workspace& ws) {
  GroupedPlan b{};
  int64_t element = compute_bytes(a.dtype), lanes = f.vector_bytes / element;
  b.input_grad = pass == Pass::input_grad, b.stride = a.stride_h, b.reach = a.dilation_h * (a.r - 1);
  b.channels = grouped_channels(a);
  int64_t dst_h = b.input_grad ? a.h : a.p, dst_w = b.input_grad ? a.w : a.q, up = b.input_grad ? b.stride : 1;
  int64_t left = b.input_grad ? 2 - a.pad_left : a.pad_left;
  b.top = b.input_grad ? b.reach - a.pad_top : a.pad_top, b.left = left / up, b.odd = left % up != 0;
  int64_t outputs = 0;
  for (int64_t tile : {14, 8, 7, 4}) {
    // Sixteen registers hold the sums of 8 pixels. Tiles begin where a source does.
    if ((tile == 14 && f.rows_for_vectors[4] == 0) || tile % up != 0) continue;
    int64_t all = ceil_div(dst_w, tile) * tile;
    if (b.tile == 0 || all < outputs) b.tile = tile, outputs = all;
  }
  b.columns = b.input_grad ? (outputs + 1) / up + 1 : (outputs - 1) * b.stride + 3;
  auto bytes = [&](int64_t rows) { return b.source_rows(rows) * b.columns * b.channels * element; };
  b.rows_per_task = dst_h;
  while (b.rows_per_task > 1 && (bytes(b.rows_per_task) > kGroupedBytes || a.n * ceil_div(dst_h, b.rows_per_task) < 2 * f.threads)) b.rows_per_task = ceil_div(b.rows_per_task, 2);
  b.rows = b.source_rows(b.rows_per_task);
  b.stream = streams(a.n * a.c * dst_h * dst_w * storage_bytes(a.dtype), f);
  b.weights = ws.take(ceil_div(a.c, lanes) * lanes * a.r * (a.c / a.groups) * 3 * element);
  b.scratch_bytes = ceil_div(bytes(b.rows_per_task) + outputs * b.channels * element, 64) * 64;
  b.scratch = ws.take(f.threads * b.scratch_bytes);
  return b;
}

OuterPlan plan_outer(const ConvProblem& problem, const CpuFacts& f, Workspace& ws) {
  OuterPlan b{};
  ConvProblem& a = b.problem = problem;
  bool inside = a.pad_top == 0 && a.pad_left == 0 && (a.p - 1) * a.stride_h < a.h && (a.q - 1) * a.stride_w < a.w;
  b.flat = a.r * a.s == 1 && inside && (a.layout == Layout::nhwc || (a.p == a.h && a.q == a.w));
  b.dots = multiplies_pairs(a, f) && a.n % 2 == 0;
  if (b.dots) a.n /= 2;
  if (b.flat) a.h = a.p = a.n * a.p * a.q, a.n = a.w = a.q = a.stride_h = a.stride_w = 1;
  int64_t element = compute_bytes(a.dtype), lanes = f.vector_bytes / element, line = 64 / element;
  b.exchange = merge_few_channels(a);
  // Merged taps fill the vectors of few channels: worth the padding where it saves a tenth of the multiply-adds.
  int64_t channels = a.c / a.groups;
  b.merge_taps = b.exchange || (can_merge_taps(a) && 10 * ceil_div(a.s * channels, lanes) < 9 * a.s * ceil_div(channels, lanes));
  b.stage_grad = !b.exchange || needs_staging(a.dtype, a.layout, a.k, problem.p * problem.q);
  b.staged_w = b.merge_taps ? (a.q - 1) * a.stride_w + a.s : a.w;
  b.taps = b.merge_taps ? a.r : a.r * a.s;
  b.depth = b.merge_taps ? a.s * channels : channels;
  b.row_values = b.exchange ? b.depth : a.k / a.groups;
  b.column_values = b.exchange ? a.k : b.depth;
  b.columns_padded = ceil_div(b.column_values, lanes) * lanes;
  b.chain = a.n * a.p * a.q <= 256 && a.dtype != DType::f64 && !b.dots ? 16 : pick_chain(a.dtype, a.n * a.p * a.q, b.dots);
  b.vectors = f.rows_for_vectors[4] > 0 && b.columns_padded % (4 * lanes) == 0 ? 4 : b.column_values > lanes ? 2 : 1;
  b.row_tiles = ceil_div(b.row_values, f.rows_for_vectors[b.vectors]);
  b.rows = int(ceil_div(b.row_values, b.row_tiles));  // tiles of equal height rather than a short last one
  b.column_tiles = ceil_div(b.column_values, b.vectors * lanes);
  b.sums_of_split = a.groups * b.row_values * b.taps * b.columns_padded;
  int64_t units = a.groups * b.row_tiles;
  // Of contiguous planes in groups, a part takes as few as fill a vector: so many whole images are one block.
  int64_t groups = a.groups;
  if (a.layout == Layout::nchw)
    for (groups = 1; a.groups % groups != 0 || (groups < a.groups && groups * channels < lanes);) ++groups;
  int64_t of_groups = a.groups / groups;
  b.parts = std::min(ceil_div(ceil_div(b.sums_of_split * element, kOuterPartBytes), of_groups) * of_groups, units);

  // As many splits as keep a fair number of threads busy, but never a number that depends on them; nor do the blocks.
  constexpr int64_t kSplits = 8;
  auto apart = [&](int64_t values) { return values <= line ? values : (ceil_div(values, line) | 1) * line; };
  b.x_pixel = b.merge_taps ? channels : apart(groups * channels);
  b.grad_pixel = !b.stage_grad ? a.k : apart(b.exchange ? a.k : std::min(a.k, ceil_div(units, b.parts) * b.rows));
  int64_t x_values = b.merge_taps ? groups * channels : b.x_pixel;
  int64_t x_row = b.staged_w * x_values * element, grad_row = a.q * b.grad_pixel * element;
  int64_t row_bytes = std::max<int64_t>(1, grad_row + x_row * a.stride_h);
  bool thin = b.exchange && !b.stage_grad && kOuterThinBlockBytes / row_bytes >= a.r;  // or rows that blocks share add up
  int64_t rows = (thin ? kOuterThinBlockBytes : kOuterBlockBytes) / row_bytes;
  if (b.flat && a.layout == Layout::nhwc) rows = std::min(rows, kOuterPixels);
  int64_t whole = a.layout == Layout::nchw ? problem.p * problem.q : b.chain;  // images or chains
  if (b.flat && rows > whole) rows = rows / whole * whole;
  int64_t most_splits = std::clamp<int64_t>(kOuterSumsBytes / (b.sums_of_split * element), 1, kSplits);
  b.images_per_block = std::clamp<int64_t>(rows / a.p, 1, std::max<int64_t>(1, a.n / most_splits));
  int64_t most_rows = std::min(rows, ceil_div(a.n * a.p, most_splits)), step = b.flat && a.layout == Layout::nchw && most_rows >= whole ? whole : 1;
  b.rows_per_block = b.images_per_block > 1 ? a.p : std::min(a.p, evenly(ceil_div(a.p, step), most_rows / step) * step);
  int64_t blocks = ceil_div(a.n, b.images_per_block) * ceil_div(a.p, b.rows_per_block);
  // Not so many that some would have a block more than others, and threads with others wait.
  b.splits = std::min(blocks, most_splits);
  while (8 * (ceil_div(blocks, b.splits) * b.splits - blocks) >= blocks) --b.splits;
  b.parts = std::min(b.parts * (f.threads / std::gcd<int64_t>(f.threads, b.splits * b.parts)), units);

  b.sums = ws.take(b.splits * b.sums_of_split * element);
  int64_t x_rows = (b.rows_per_block - 1) * a.stride_h + (a.r - 1) * a.dilation_h + 1;
  if (!b.merge_taps) x_rows = std::min(x_rows, a.h);
  // The last vectors of a run may reach beyond it.
  b.x_elements = ceil_div(b.images_per_block * x_rows * b.staged_w * x_values, lanes) * lanes + b.vectors * lanes;
  int64_t grad_elements = b.stage_grad ? b.images_per_block * b.rows_per_block * a.q * b.grad_pixel : 0;
  b.scratch_bytes = ceil_div((b.x_elements + grad_elements) * element, 64) * 64;
  b.scratch = ws.take(f.threads * b.scratch_bytes);
  return b;
}

DepthwisePlan plan_depthwise(const ConvProblem& a, Pass pass, const CpuFacts& f, Workspace& ws) {
  DepthwisePlan b{};
  int64_t element = compute_bytes(a.dtype), lanes = f.vector_bytes / element;
  bool input_grad = pass == Pass::input_grad;
  int64_t src_h = input_grad ? a.p : a.h, src_w = input_grad ? a.q : a.w;
  int64_t dst_h = input_grad ? a.h : a.p, dst_w = input_grad ? a.w : a.q;
  int64_t reach = a.dilation_h * (a.r - 1), reach_w = a.dilation_w * (a.s - 1);

  // Channels-last values are read and written where they are.
  b.stage = a.layout == Layout::nchw && a.c != 1 && std::max(a.h * a.w, a.p * a.q) != 1;
  int64_t stored = storage_bytes(a.dtype), line = 64 / stored;  // line: values that are streamed at once
  // Memory is gone through in order: whole pixels.
  b.channel_block = b.stage ? std::max<int64_t>(16, lanes) : std::max(line, kDepthwiseTapsBytes / (a.r * a.s * element) / line * line);
  // The work of preparing a row is shared by the channels.
  while (b.stage && b.channel_block < 64 && 2 * b.channel_block * (a.h * a.w + a.p * a.q) * element <= kDepthwisePlanesBytes) b.channel_block *= 2;
  b.channel_block = std::min(b.channel_block, ceil_div(a.c, lanes) * lanes);
  int64_t block_bytes = b.channel_block * element;
  b.stream = pass != Pass::weight_grad && streams(a.n * a.c * dst_h * dst_w * stored, f);

  if (input_grad) {
    b.staged_first = std::min<int64_t>(0, -ceil_div(std::max<int64_t>(0, reach_w - a.pad_left), a.stride_w));
    b.staged_last = std::max(a.q, (a.w - 1 + a.pad_left) / a.stride_w + 1);
  } else {
    b.staged_first = -a.pad_left;
    b.staged_last = std::max((a.q - 1) * a.stride_w - a.pad_left + reach_w + 1, a.w);
  }
  // Padding or dilation far beyond the image: edges cost less than that many zeros.
  if (b.staged_last - b.staged_first > 4 * src_w + 64 || (b.stage && src_w <= kNarrowImage)) b.staged_first = 0, b.staged_last = src_w;
  int64_t width = b.staged_last - b.staged_first;
  auto source_rows = [&](int64_t rows) {
    return std::min(src_h, input_grad ? (rows - 1 + reach) / a.stride_h + 2 : (rows - 1) * a.stride_h + reach + 1);
  };
  // The weight gradient works on rows of y whatever the direction.
  int64_t row_bytes = std::max<int64_t>(1, (pass == Pass::weight_grad ? a.q : dst_w) * block_bytes);
  int64_t rows = pass == Pass::weight_grad ? a.p : dst_h;
  b.rows_per_task = rows;
  while (b.rows_per_task > 1 && b.rows_per_task * row_bytes + source_rows(b.rows_per_task) * width * block_bytes > kDepthwiseBytes)
    b.rows_per_task = b.rows_per_task > 2 ? ceil_div(b.rows_per_task, 4) * 2 : 1;  // two at a time
  b.staged_elements = b.stage ? source_rows(b.rows_per_task) * width * b.channel_block : 0;
  b.lines_bytes = ceil_div(2 * a.r * 3 * 8, 64) * 64;
  b.scratch_bytes = b.lines_bytes + (b.stage ? ceil_div(b.staged_elements * element + 2 * b.rows_per_task * row_bytes, 64) * 64 : 0);
  // A fixed number, whatever the threads: the order of the sums must not depend on them.
  b.splits = std::min<int64_t>(a.n * ceil_div(a.p, b.rows_per_task), 16);

  int64_t padded_channels = ceil_div(a.c, lanes) * lanes;
  b.weights = ws.take((a.r * a.s + 1) * padded_channels * element);
  b.partial = ws.take(pass == Pass::weight_grad ? b.splits * a.r * a.s * padded_channels * element : 0);
  b.scratch = ws.take(f.threads * b.scratch_bytes);
  return b;
}

bool is_winograd_problem(const ConvProblem& a) {
  int64_t taps = ceil_div(a.r, a.stride_h);
  if (a.dtype == DType::f64 || a.r != a.s || a.stride_h != a.stride_w || a.dilation_h != 1 || a.dilation_w != 1 || taps < 2 || taps > 5) return false;
  if (a.groups > 1) return a.stride_h == 1 && std::min(a.c, a.k) / a.groups >= kWinogradGroup;
  return a.stride_h == 1 || a.stride_h == 2 || a.stride_h == 4;
}

// Of one group: a problem of its own.
WinogradPlan plan_winograd(const ConvProblem& a, Pass pass, const CpuFacts& f, Workspace& ws) {
  WinogradPlan b{};
  b.input_grad = pass == Pass::input_grad;
  b.stride = a.stride_h;
  b.taps = int(ceil_div(a.r, b.stride)), b.tile = winograd_tile(b.taps), b.outputs = b.tile + 1 - b.taps;
  // Whole pixels of padding before the input as it is computed, and what is left of it within its first.
  int64_t top = a.pad_top / b.stride, left = a.pad_left / b.stride;
  b.first_top = a.pad_top % b.stride, b.first_left = a.pad_left % b.stride;
  int64_t h = ceil_div(a.h + b.first_top, b.stride), w = ceil_div(a.w + b.first_left, b.stride), c = a.c * b.stride * b.stride;
  b.src_h = b.input_grad ? a.p : h, b.src_w = b.input_grad ? a.q : w, b.src_c = b.input_grad ? a.k : c;
  b.dst_h = b.input_grad ? h : a.p, b.dst_w = b.input_grad ? w : a.q, b.dst_c = b.input_grad ? c : a.k;
  b.pad_top = b.input_grad ? b.taps - 1 - top : top, b.pad_left = b.input_grad ? b.taps - 1 - left : left;
  int64_t positions = b.tile * b.tile;
  b.tiles_h = ceil_div(b.dst_h, b.outputs), b.tiles_w = ceil_div(b.dst_w, b.outputs);
  b.depth_blocks = ceil_div(b.src_c, kWinogradWidth), b.column_blocks = ceil_div(b.dst_c, kWinogradWidth);
  int64_t rows = f.rows_for_vectors[4] > 0 ? f.rows_for_vectors[4] : f.rows_for_vectors[2];
  int64_t fewer_h = ceil_div(b.src_h, b.outputs), fewer_w = ceil_div(b.src_w, b.outputs), pixels = b.dst_h * b.dst_w * kWinogradWidth * 4;
  // The sums of an image lie beside a block of tiles then, and its tiles fill fewer rows of a register tile.
  b.spread = b.input_grad && b.stride == 1 && 3 * fewer_h * fewer_w < 2 * b.tiles_h * b.tiles_w && pixels <= f.l2_bytes / 8 &&
             b.depth_blocks * b.column_blocks * positions * kWinogradPanel * 4 <= kSharedFilterBytes;
  if (b.spread) b.tiles_h = fewer_h, b.tiles_w = fewer_w, b.pad_top = top, b.pad_left = left;
  b.image_groups = b.spread ? ceil_div(b.tiles_h * b.tiles_w, rows) : 1;
  b.tiles = a.n * b.tiles_h * b.tiles_w;
  b.groups = b.spread ? a.n * b.image_groups : ceil_div(b.tiles, rows);

  int64_t filter_block = positions * kWinogradPanel * 4, group = positions * rows * kWinogradWidth * 4;
  // A row of tiles of the source, or of the output, as channels-last pixels.
  bool nchw = a.layout == Layout::nchw, whole_lines = f.vector_bytes == 64 && a.dtype == DType::f32;
  bool as_stored = !nchw && b.stride == 1 && a.dtype == DType::f32;
  int64_t strip = as_stored ? 0 : std::max(b.tile * std::min(b.src_w, b.outputs * b.tiles_w + b.taps - 1), b.outputs * b.dst_w) * kWinogradWidth * 4;
  if (b.stride > 1) strip += (b.outputs * b.tiles_w + b.taps - 1) * kWinogradWidth * 4;  // and one of pixels as they were
  b.weight = ws.take(b.stride == 1 ? 0 : a.k * b.taps * b.taps * c * storage_bytes(a.dtype));
  if (pass == Pass::weight_grad) {
    b.streaming = b.stride == 1 && whole_lines && streams(a.k * a.c * a.r * a.s * 4, f);
    b.tiles_at_once = kWinogradTiles;
    // Enough tasks for a fair number of threads, but never a number that depends on them.
    int64_t blocks = b.depth_blocks * b.column_blocks;
    b.splits = std::clamp<int64_t>(16 / blocks, 1, std::min<int64_t>(8, ceil_div(b.tiles, b.tiles_at_once)));
    b.sums = ws.take(b.splits > 1 ? b.splits * blocks * filter_block : 0);
    b.scratch_bytes = 2 * positions * (b.tiles_at_once * kWinogradWidth + 16) * 4 + strip + (b.splits == 1 ? filter_block : 0);
  } else {
    b.streaming = !b.spread && !nchw && whole_lines && (b.stride == 1 || !b.input_grad) && b.dst_c % 16 == 0 && streams(a.n * b.dst_h * b.dst_w * b.dst_c * 4, f);
    int64_t filters = b.depth_blocks * b.column_blocks * filter_block;
    // Sums of a block of tiles beside a block of filters; a quarter of the cache is left to what passes by.
    int64_t groups_beside_filters = std::max<int64_t>(1, (f.l2_bytes * 3 / 4 - filter_block) / group);
    b.shared_filters = b.spread || filters <= f.l2_bytes / 3 || (filters <= kSharedFilterBytes && b.groups > 2 * groups_beside_filters);
    if (b.shared_filters) {
      // Source and sums of a block of tiles stay in the second-level cache, with the filters where they are small enough.
      int64_t room = f.l2_bytes * 3 / 4 - (filters <= f.l2_bytes / 3 ? filters : 0);
      int64_t images = b.groups / b.image_groups, image = b.image_groups * (std::min(b.depth_blocks, b.column_blocks) + 1) * group;  // or groups, each by itself
      int64_t images_at_once = std::max<int64_t>(1, room / image);
      b.groups_per_chunk = b.groups;
      b.tile_blocks = std::min(images, ceil_div(ceil_div(images, images_at_once), f.threads) * f.threads);
      b.filters = ws.take(filters);
      b.scratch_bytes = ceil_div(images, b.tile_blocks) * image + (b.spread ? std::max(strip, pixels) : strip);
    } else {
      b.groups_per_chunk = std::min(b.groups, std::max(groups_beside_filters, kWinogradSourceBytes / (b.depth_blocks * group)));
      b.tile_blocks = ceil_div(b.groups_per_chunk, groups_beside_filters);
      b.source = ws.take(b.groups_per_chunk * b.depth_blocks * group);
      b.scratch_bytes = filter_block + ceil_div(b.groups_per_chunk, b.tile_blocks) * group + strip;
    }
  }
  b.scratch_bytes = ceil_div(b.scratch_bytes, 64) * 64;
  b.scratch = ws.take(f.threads * b.scratch_bytes);
  return b;
}

// Whether the transforms cost less than the multiplications that they save. In vector multiply-adds; what a transform of
// one tile or filter costs a vector, and a call, is measured (AVX-512, operands beyond the caches), and so is the packing
// of the direct kernel's filters, which costs about as much as their transform.
bool winograd_wins(const ConvProblem& a, Pass pass, const WinogradPlan& b, const CpuFacts& f) {
  // 8 x 8 instead of 6 x 6 values, each from more; phases are gathered before, or sorted after, and so are filters.
  bool phased = b.stride > 1, planes = use_planes(a, pass, f);
  double larger = b.tile == 6 ? 1 : 2, sorting = phased ? 2 : 1, kSource = 600 * larger, kOutput = 450 * larger, kFilter = 600 * larger, kWeightGrad = 250 * larger, kRate = 0.85;
  int64_t lanes = f.vector_bytes / 4;
  double tiles = double(b.tiles), src = double(ceil_div(b.src_c, lanes)), dst = double(ceil_div(b.dst_c, lanes));
  double filters = double(b.src_c) * dst, products = tiles * double(b.tile * b.tile) * filters / kRate;
  // The direct kernels for few channels fill their vectors, bf16's may have products at twice the rate, and input gradients
  // with a stride go phase by phase, of few taps each.
  double pixels = b.input_grad ? double(a.n * a.h * a.w) / double(a.stride_h * a.stride_w) : double(a.n * a.p * a.q);
  int64_t depth = b.input_grad ? a.k : a.c, columns = b.input_grad ? a.c : a.k;
  double direct = pixels * double(a.r * a.s * depth) * (planes ? double(columns) / double(lanes) : double(ceil_div(columns, lanes)));
  if (multiplies_pairs(a, f)) direct *= planes ? 0.75 : 0.5;
  if (b.input_grad && phased && !planes) direct += 100 * double(a.n * a.h * a.w);
  if (pass != Pass::weight_grad && (a.r != 3 || phased)) direct *= products_inside(a, b.input_grad, f);
  if (pass == Pass::weight_grad) {
    if (!phased && merge_few_channels(a)) return false;
    double transforms = tiles * (src * kSource * double(b.column_blocks) * (phased ? 2 * larger : 1) + dst * kOutput * double(b.depth_blocks) * sorting);
    return products * (phased ? 1.25 : 1) + transforms + filters * kWeightGrad + (phased ? 2e6 : 2e5) < direct / 0.8;
  }
  double repeats = b.shared_filters ? 1 : double(ceil_div(b.groups, b.groups_per_chunk) * b.tile_blocks);
  (b.input_grad ? kOutput : kSource) *= sorting;
  if (b.spread) std::swap(src, dst);  // of what they cost
  return products + tiles * (src * kSource + dst * kOutput) + filters * kFilter * sorting * repeats + 4e5 < direct / 0.9 + filters * kFilter / double(b.stride * b.stride);
}

}  // namespace

ConvPlan plan_conv(const ConvProblem& a, Pass pass, const CpuFacts& f, Winograd winograd) {
  ConvPlan plan{};
  Workspace ws;
  if (winograd != Winograd::never && is_winograd_problem(a)) {
    ConvProblem group = a;
    group.c /= a.groups, group.k /= a.groups, group.groups = 1;
    plan.winograd = plan_winograd(group, pass, f, ws);
    if (winograd == Winograd::possible || winograd_wins(group, pass, plan.winograd, f)) {
      plan.kernel = ConvKernel::winograd;
      plan.workspace_bytes = ws.bytes;
      return plan;
    }
    ws = {};
  }
  if (a.is_depthwise() && a.c > 1) {
    plan.kernel = ConvKernel::depthwise;
    plan.depthwise = plan_depthwise(a, pass, f, ws);
  } else if (pass == Pass::weight_grad) {
    plan.kernel = ConvKernel::outer;
    plan.outer = plan_outer(a, f, ws);
  } else if (use_pointwise(a)) {
    plan.kernel = ConvKernel::pointwise;
    plan.pointwise = plan_pointwise(a, pass, f, ws);
  } else if (use_grouped(a, pass, f)) {
    plan.kernel = ConvKernel::grouped;
    plan.grouped = plan_grouped(a, pass, f, ws);
  } else if (use_planes(a, pass, f)) {
    plan.kernel = ConvKernel::planes;
    plan.planes = plan_planes(a, pass, f, ws);
  } else {
    plan.kernel = ConvKernel::rows;
    plan.rows = plan_rows(a, pass, f, ws);
  }
  plan.workspace_bytes = ws.bytes;
  return plan;
}

std::string describe(const ConvProblem& a, Pass pass, const CpuFacts& f, const ConvPlan& plan) {
  int64_t lanes = f.vector_bytes / compute_bytes(a.dtype);
  std::string out = std::string(name(pass)) + " " + to_string(a) + " -> ";
  auto num = [](int64_t v) { return std::to_string(v); };
  switch (plan.kernel) {
    case ConvKernel::rows: {
      const RowsPlan& b = plan.rows;
      out += "rows_" + std::string(f.isa) + "_" + num(b.rows) + "x" + num(b.vectors * lanes) + ", " + num(b.taps) + " taps of " +
             num(b.depth) + (b.dots ? " in pairs" : "") + (b.merge_taps ? " (filter rows merged)" : "") + (b.across_images ? " across images" : "") + ", " + num(b.tiles_per_block) + " tiles a block, " +
             num(b.images_per_chunk) + " images a chunk";
      if (b.stage_src || b.stage_dst)
        out += std::string(", staged") + (b.stage_src ? " source" : "") + (b.blocks_dst ? " output, block by block" : b.stage_dst ? " output" : "");
      break;
    }
    case ConvKernel::planes: {
      const PlanesPlan& b = plan.planes;
      out += "planes_" + std::string(f.isa) + ", " + num(b.rows_per_task) + " rows a task, staged planes of " + num(b.rows) + " x " + num(b.columns) + (b.dots ? ", channels in pairs" : "");
      break;
    }
    case ConvKernel::pointwise: {
      out += "pointwise_" + std::string(f.isa) + ", " + num(plan.pointwise.pixels_per_task) + " pixels a task" + (plan.pointwise.dots ? ", channels in pairs" : "");
      break;
    }
    case ConvKernel::grouped: {
      const GroupedPlan& b = plan.grouped;
      out += "grouped_" + std::string(f.isa) + "_" + num(b.tile) + "x" + num(lanes) + ", " + num(b.channels) + " channels x " + num(b.rows_per_task) + " rows a task" + (b.stream ? ", streamed" : "");
      break;
    }
    case ConvKernel::outer: {
      const OuterPlan& b = plan.outer;
      out += "outer_" + std::string(f.isa) + "_" + num(b.rows) + "x" + num(b.vectors * lanes) + ", " + num(b.taps) + " taps of " +
             num(b.depth) + (b.merge_taps ? " (filter rows merged)" : "") + (b.exchange ? " as rows" : "") + ", " + (b.flat ? "" : num(b.images_per_block) + " images x ") +
             num(b.rows_per_block) + (b.flat ? " pixels" : " rows") + " a block";
      if (b.dots) out += ", images in pairs";
      if (b.splits > 1) out += ", " + num(b.splits) + " splits";
      if (b.parts > 1) out += " x " + num(b.parts) + " parts";
      out += b.stage_grad ? ", staged input and gradient" : ", staged input";
      break;
    }
    case ConvKernel::depthwise: {
      const DepthwisePlan& b = plan.depthwise;
      out += "depthwise_" + std::string(f.isa) + ", " + num(b.channel_block) + " channels x " + num(b.rows_per_task) + " rows a task";
      if (pass == Pass::weight_grad) out += ", " + num(b.splits) + " splits";
      if (b.stage) out += ", staged";
      if (b.stream) out += ", streamed";
      break;
    }
    case ConvKernel::winograd: {
      const WinogradPlan& b = plan.winograd;
      out += "winograd_" + std::string(f.isa) + "_" + num(b.outputs) + "x" + num(b.outputs) + "_of_" + num(b.taps) + "x" + num(b.taps) + " taps, ";
      if (b.stride > 1) out += num(b.stride * b.stride) + " phases, ";
      if (a.groups > 1) out += num(a.groups) + " groups one by one, ";
      out += num(b.tiles) + " tiles, " + num(b.depth_blocks) + " x " + num(b.column_blocks) + " blocks";
      if (pass == Pass::weight_grad) out += ", " + num(b.splits) + " splits";
      else out += ", " + num(b.tile_blocks) + " blocks of tiles" + (b.spread ? ", spread" : "") + (b.shared_filters ? "" : ", filters transformed by block");
      break;
    }
  }
  return out + ", " + num(plan.workspace_bytes) + " bytes of workspace, " + num(f.threads) + " threads";
}

}  // namespace convkit
