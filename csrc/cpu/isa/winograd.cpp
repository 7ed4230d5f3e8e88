// Convolutions with filters of 2x2 to 5x5 taps by Winograd's F(5x5, 2x2), F(4x4, 3x3), F(5x5, 4x4) and F(4x4, 5x5): between
// a third and a sixth of the multiplications, all three passes.
//
// Tiles of 6 x 6 (8 x 8) source pixels are transformed to as many positions, each position is a matrix product of its own
// (tiles x channels times channels x filters; in the weight gradient filters x tiles times tiles x channels), and the sums
// are transformed back to 4 x 4 outputs or 3 x 3 taps. Input gradients of images with less than full padding may take fewer
// tiles the other way round: 4 x 4 pixels of y's gradient each, transformed back to the 6 x 6 that they reach.
// Everything between lies in blocks [36][rows][64] of a few tiles (or a few filters) and 64 channels, so that what a product
// reads and writes is next to each other whatever the tensor's size: rows of 64 values have the same distance in every
// operand, and a block is a part of a core's second-level cache.
//
// With stride s, the s x s pixels that the filter steps over, its phases, are channels of one pixel, and a filter of r taps
// is one of ceil(r / s) for each phase, with zeros where it has no such tap: 11x11 with stride 4 is 3x3 with 16 times the
// channels. Pixels are sorted so in rows of tiles, on their way to the transforms or from them, and filters before.
// Groups of channels go one after the other.
#include "../kernels.h"
#include "rows_tile.h"
#include "staging.h"
#include "winograd_transforms.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

using V = vec<float>;
constexpr int L = kLanes<float>;
constexpr int kWidth = kWinogradWidth;
constexpr int64_t kPanel = kWinogradPanel;

// c[m][v] (+)= sum over d of a(m, d) * b[d][v] for MR rows and NV vectors of columns: 7 x 4 accumulators of AVX-512's 32
// registers (4 loads and 7 broadcasts for 28 multiply-adds), 6 x 2 with 16 registers. Rows are kWidth apart; a is
// [m][d], or [d][m] when Transposed. What a later call reads, from `next` on, is fetched meanwhile, next_step floats a step.
template <int MR, int NV, bool Transposed>
__attribute__((noinline)) void product(const float* a, const float* b, float* c, int64_t depth, bool accumulate,
                                        const float* next, int64_t next_step) {
  V acc[MR][NV];
  CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = V{};
  for (int64_t d = 0; d < depth; ++d, a += Transposed ? kWidth : 1, b += kWidth, next += next_step) {
    __builtin_prefetch(next);
    V columns[NV];
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) columns[v] = load(b + v * L);
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
      V row = broadcast(a[Transposed ? m : m * kWidth]);
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] += row * columns[v];
    }
  }
  CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
      float* to = c + m * kWidth + v * L;
      store(to, accumulate ? load(to) + acc[m][v] : acc[m][v]);
    }
}

using ProductFn = void (*)(const float*, const float*, float*, int64_t, bool, const float*, int64_t);

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif
constexpr int kProductRows = kTileRows[kProductVectors];

template <bool Transposed, int NV, int MR = kProductRows> ProductFn product_of(int64_t rows) {
  if constexpr (MR == 1) return product<1, NV, Transposed>;
  else return rows == MR ? product<MR, NV, Transposed> : product_of<Transposed, NV, MR - 1>(rows);
}

// All columns of a block of `columns` values: as many vectors at a time as the registers hold, then the rest.
template <bool Transposed>
CONVKIT_INLINE void product_columns(int64_t rows, const float* a, const float* b, float* c, int64_t depth, int64_t columns,
                                    bool accumulate, const float* next, int64_t next_step) {
  int64_t left = ceil_div(columns, L);
  while (left > 0) {
    int64_t take = left >= kProductVectors ? kProductVectors : left >= 2 ? 2 : 1;
    ProductFn f = take == 1   ? product_of<Transposed, 1>(rows)
                  : take == 2 ? product_of<Transposed, 2>(rows)
                              : product_of<Transposed, kProductVectors>(rows);
    f(a, b, c, depth, accumulate, next, next_step);
    b += take * L, c += take * L, left -= take;
  }
}

// Values [begin, end) of part `i` when `total` are divided as evenly as can be.
CONVKIT_INLINE Range part(int64_t total, int64_t parts, int64_t i) { return {total * i / parts, total * (i + 1) / parts}; }

// Channels or filters of a block.
CONVKIT_INLINE Range block_of(int64_t total, int64_t i) { return {i * kWidth, min_of(total, (i + 1) * kWidth)}; }

// What transposes in registers, or may: once for a type rather than once for a type and filter, for it is long.
template <class S>
__attribute__((noinline)) void stage_run(const S* image, Layout layout, int64_t hw, int64_t c, int64_t first, int64_t pixels,
                                         int64_t channel, int64_t channels, float* to, int64_t pixel) {
  stage_pixels(image, layout, hw, c, first, pixels, channel, channels, to, pixel);
}
template <class S, class Finish>
__attribute__((noinline)) void unstage_run(const float* from, int64_t pixel, S* image, Layout layout, int64_t hw, int64_t c, int64_t first,
                                           int64_t pixels, int64_t channel, int64_t channels, Finish finish) {
  unstage_pixels(from, pixel, image, layout, hw, c, first, pixels, channel, channels, finish);
}
template <class S, int kColumns = 0>  // columns, where they are known
__attribute__((noinline)) void transpose_run(const S* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  if constexpr (kColumns > 0) columns = kColumns;
  transpose_block(from, from_stride, to, to_stride, rows, columns);
}

// Channels of phases lie in lines (column of the phase, channel) of as many channels of the image as this, of those that are
// left, and a line for each row. A line is a divisor of kWidth, or all that is left together is less: a block holds whole lines.
CONVKIT_INLINE int64_t line_channels(int64_t left, int64_t stride) {
  if (left * stride * stride <= kWidth) return left;
  int64_t wide = kWidth / stride;
  while (wide > left) wide /= 2;
  return wide;
}

// A tensor whose pixels are cut into tiles whose first is at (ty * outputs - top, tx * outputs - left).
template <class S> struct Pixels {
  const S* data;
  int64_t h, w, c;
  int64_t first;  // channel of the group's
  int64_t top, left;
  bool phased;    // h, w and c are those of pixels of phases
};

// Of one group of channels, for filters of kFilter x kFilter taps, as they are computed.
template <class S, int kFilter> struct Tiles {
  using Transforms = Winograd<kFilter>;
  static constexpr int kTileIn = Transforms::tile, kTileOut = Transforms::outputs, kPositions = kTileIn * kTileIn, kTaps = kFilter * kFilter;
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const WinogradPlan& plan = a.plan.winograd;
  char* ws = static_cast<char*>(a.workspace);
  bool streaming = plan.streaming && streamable(a.dst);
  // The first channel of source and output, and how many there are with those of other groups.
  int64_t src_first, dst_first, src_c = p.groups * plan.src_c, dst_c = p.groups * plan.dst_c;

  Tiles(const ConvArgs& args, int64_t channel_group, const Pool& threads)
      : a(args), pool(threads), src_first(channel_group * plan.src_c), dst_first(channel_group * plan.dst_c) {}

  float* at(const Piece& piece) const { return reinterpret_cast<float*>(ws + piece.offset); }
  // Of a row of pixels of phases.
  int64_t line_floats() const { return (kTileOut * plan.tiles_w + kFilter - 1) * kWidth; }
  float* scratch(int thread) const { return reinterpret_cast<float*>(ws + plan.scratch.offset + thread * plan.scratch_bytes); }

  // Tiles [tiles.begin, tiles.end) as runs of neighbours in a row of tiles: f(image, ty, first tx, last tx, first tile).
  template <class F> CONVKIT_INLINE void rows_of(Range tiles, F&& f) const {
    for (int64_t t = tiles.begin; t < tiles.end;) {
      int64_t tx = t % plan.tiles_w, row = t / plan.tiles_w, count = min_of(plan.tiles_w - tx, tiles.end - t);
      f(row / plan.tiles_h, row % plan.tiles_h, tx, tx + count, t);
      t += count;
    }
  }

  // The lines of phases that channels `channels` are: f(first channel of the image, how many, row of the phase, where in `channels`).
  template <class F> CONVKIT_INLINE void each_line(Range channels, F&& f) const {
    const int64_t s = plan.stride;
    int64_t c = min_of(channels.begin / (s * kWidth), p.c * s / kWidth) * (kWidth / s), at = c * s * s - channels.begin;
    for (int64_t wide; c < p.c; c += wide) {
      wide = line_channels(p.c - c, s);
      for (int64_t y = 0; y < s; ++y, at += s * wide)
        if (at >= channels.end - channels.begin) return;
        else if (at >= 0) f(c, wide, y, at);
    }
  }

  // Columns of an image's row that pixels [x, x + across) of phases hold: those that exist, counted from the first.
  Range columns_of(int64_t x, int64_t across) const {
    int64_t first = x * plan.stride - plan.first_left, begin = min_of(max_of<int64_t>(0, -first), across * plan.stride);
    return {begin, max_of(begin, min_of(across * plan.stride, p.w - first))};
  }

  // Pixels of phases, from (y, x) on: `down` rows of `across`, channels `channels` of them, `pixel` apart. Line: for a row of
  // some channels of the image.
  void stage_phases(const S* image, int64_t y, int64_t x, int64_t down, int64_t across, Range channels, float* to, int64_t pixel, float* line) const {
    const int64_t s = plan.stride;
    Range columns = columns_of(x, across);
    each_line(channels, [&](int64_t c, int64_t wide, int64_t phase, int64_t at) {
      for (int64_t i = 0; i < down; ++i) {
        int64_t row = (y + i) * s + phase - plan.first_top;
        Range inside = row >= 0 && row < p.h ? columns : Range{0, 0};
        float *pixels = to + i * across * pixel + at, *staged = s * wide == pixel ? pixels : line;
        fill_zero(staged, inside.begin * wide);
        if (inside.begin < inside.end)
          stage_run(image, p.layout, p.h * p.w, p.c, row * p.w + x * s - plan.first_left + inside.begin, inside.end - inside.begin, c, wide,
                    staged + inside.begin * wide, wide);
        fill_zero(staged + inside.end * wide, (across * s - inside.end) * wide);
        if (staged != pixels)
          for (int64_t j = 0; j < across; ++j) copy_values(staged + j * s * wide, pixels + j * pixel, s * wide);
      }
    });
  }

  // The inverse.
  void unstage_phases(const float* from, int64_t pixel, S* image, int64_t y, int64_t x, int64_t down, int64_t across, Range channels, float* line) const {
    const int64_t s = plan.stride;
    Range columns = columns_of(x, across);
    each_line(channels, [&](int64_t c, int64_t wide, int64_t phase, int64_t at) {
      for (int64_t i = 0; i < down; ++i) {
        int64_t row = (y + i) * s + phase - plan.first_top;
        if (row < 0 || row >= p.h || columns.begin == columns.end) continue;
        const float *pixels = from + i * across * pixel + at, *staged = s * wide == pixel ? pixels : line;
        if (staged != pixels)
          for (int64_t j = 0; j < across; ++j) copy_values(pixels + j * pixel, line + j * s * wide, s * wide);
        unstage_run(staged + columns.begin * wide, wide, image, p.layout, p.h * p.w, p.c, row * p.w + x * s - plan.first_left + columns.begin,
                    columns.end - columns.begin, c, wide, AsItIs{});
      }
    });
  }

  // The transforms of `tiles` and channels [channel, channel + channels): position x of tile t goes to to(t) + x * step.
  // Strip: where pixels become channels-last ones, float32, or phases, a row of tiles at a time.
  template <class Transform, int64_t kStep = 0, class To>
  CONVKIT_INLINE void transform_pixels(const Pixels<S>& from, Range tiles, int64_t channel, int64_t channels, float* strip, To&& to, int64_t step = kStep) const {
    constexpr int E = Transform::in;
    static const float zeros[kWidth] = {};
    rows_of(tiles, [&](int64_t image, int64_t ty, int64_t tx0, int64_t tx1, int64_t tile) {
      int64_t y0 = ty * kTileOut - from.top, x0 = tx0 * kTileOut - from.left;
      int64_t x_first = max_of<int64_t>(0, x0), x_last = min_of(from.w, x0 + (tx1 - tx0 - 1) * kTileOut + E);
      int64_t y_first = max_of<int64_t>(0, y0), y_last = min_of(from.h, y0 + E);
      int64_t across = max_of<int64_t>(0, x_last - x_first), down = max_of<int64_t>(0, y_last - y_first);
      // Base: pixel (y_first, x_first) of the strip, or of what is stored where that may be taken as it is.
      const float* base = strip;
      int64_t pixel = kWidth, row = across * kWidth;
      if (from.phased) {
        pixel = ceil_div(channels, L) * L, row = across * pixel;
        float* pixels = strip + line_floats();
        base = pixels;
        stage_phases(from.data + image * p.h * p.w * p.c, y_first, x_first, down, across, {channel, channel + channels}, pixels, pixel, strip);
      } else {
        const S* data = from.data + image * from.h * from.w * from.c;
        if constexpr (sizeof(S) == sizeof(float))
          if (p.layout == Layout::nhwc) base = data + (y_first * from.w + x_first) * from.c + from.first + channel, pixel = from.c, row = from.w * from.c;
        bool whole = across == from.w;  // rows that are whole are one run of pixels
        if (base == strip)
          for (int64_t y = 0; y < (whole && down > 0 ? 1 : down); ++y)
            stage_run(data, p.layout, from.h * from.w, from.c, (y_first + y) * from.w + x_first, whole ? down * across : across,
                      from.first + channel, channels, strip + y * row, kWidth);
      }
      for (int64_t tx = tx0; tx < tx1; ++tx, ++tile, x0 += kTileOut) {
        const float* at[E * E];
        for (int i = 0; i < E; ++i)
          for (int j = 0; j < E; ++j) {
            int64_t y = y0 + i, x = x0 + j;
            bool inside = y >= 0 && y < from.h && x >= 0 && x < from.w;
            at[i * E + j] = inside ? base + (y - y_first) * row + (x - x_first) * pixel : zeros;
          }
        transform_channels<Transform, kStep>(at, channels, to(tile), step);
      }
    });
  }

  // ---- forward and input gradient ------------------------------------------------------------------------------------

  // Transformed filters of one block of columns and one block of depth, rows [depth.begin, depth.end) of it:
  // to[position][depth][column].
  void transform_filters(int64_t column_block, int64_t depth_block, Range rows, float* to) const {
    const S* weight = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    // The filters are columns going forward and depth going back.
    int64_t column_stride = plan.input_grad ? st.c : st.k, depth_stride = plan.input_grad ? st.k : st.c;
    Range columns = block_of(plan.dst_c, column_block), depth = block_of(plan.src_c, depth_block);
    constexpr int64_t kDepthPiece = 16;
    float taps[kDepthPiece][kTaps][L];  // what neighbouring columns have of one depth and tap
    bool run_of_taps = st.s == 1 && st.r == kFilter;
    for (int64_t first = columns.begin; first < columns.end; first += L) {
      int64_t wide = min_of<int64_t>(L, columns.end - first);
      for (int64_t d = rows.begin; d < rows.end; d += kDepthPiece) {
        int64_t deep = min_of(kDepthPiece, rows.end - d);
        const S* from = weight + first * column_stride + (depth.begin + d) * depth_stride;
        if (column_stride == 1) {
          for (int64_t i = 0; i < deep; ++i)
            for (int t = 0; t < kTaps; ++t) {
              const S* tap = from + i * depth_stride + t / kFilter * st.r + t % kFilter * st.s;
              store(taps[i][t], wide == L ? load(tap) : load_n(tap, int(wide)));
            }
        } else if (run_of_taps && depth_stride == kTaps) {
          transpose_run(from, column_stride, taps[0][0], L, wide, deep * kTaps);
        } else if (run_of_taps) {
          for (int64_t i = 0; i < deep; ++i) transpose_run<S, kTaps>(from + i * depth_stride, column_stride, taps[i][0], L, wide, kTaps);
        } else if (depth_stride == 1) {
          for (int t = 0; t < kTaps; ++t)
            transpose_run(from + t / kFilter * st.r + t % kFilter * st.s, column_stride, taps[0][t], kTaps * L, wide, deep);
        } else {
          for (int64_t i = 0; i < deep; ++i)
            for (int t = 0; t < kTaps; ++t)
              for (int64_t j = 0; j < wide; ++j)
                taps[i][t][j] = get(from + i * depth_stride + t / kFilter * st.r + t % kFilter * st.s + j * column_stride);
        }
        for (int64_t i = 0; i < deep; ++i) {
          const float* tap[kTaps];
          for (int t = 0; t < kTaps; ++t) tap[t] = taps[i][plan.input_grad && !plan.spread ? kTaps - 1 - t : t];  // half a turn
          transform_channels<typename Transforms::Filter, kPanel>(tap, L, to + (d + i) * kWidth + (first - columns.begin));
        }
      }
    }
  }

  // Groups of tiles: the rows of one register tile. All have the same number of tiles, or one less.
  Range group(int64_t i) const { return part(plan.tiles, plan.groups, i); }
  int64_t group_of(int64_t tile) const { return ((tile + 1) * plan.groups - 1) / plan.tiles; }
  static constexpr int64_t kGroupBlock = kPositions * kProductRows * kWidth;

  // Groups of `groups`, one block of depth -> to[group][position][tile][channel].
  void transform_source(const Pixels<S>& src, Range groups, int64_t depth_block, float* to, float* strip) const {
    Range depth = block_of(plan.src_c, depth_block), tiles{group(groups.begin).begin, group(groups.end - 1).end};
    auto transform = [&]<class Transform>(Tag<Transform>) {
      transform_pixels<Transform, kProductRows * kWidth>(src, tiles, depth.begin, depth.end - depth.begin, strip, [&](int64_t tile) {
        int64_t g = group_of(tile);
        return to + (g - groups.begin) * kGroupBlock + (tile - group(g).begin) * kWidth;
      });
    };
    plan.spread ? transform(Tag<typename Transforms::Grad>{}) : transform(Tag<typename Transforms::Source>{});
  }

  // One block of depth of the products: sums[group][position][tile][column] (+)= source * filters.
  void multiply(const float* source, const float* filters, float* sums, Range groups, int64_t column_block, int64_t depth_block) const {
    Range columns = block_of(plan.dst_c, column_block), depth = block_of(plan.src_c, depth_block);
    int64_t count = groups.end - groups.begin, deep = depth.end - depth.begin;
    // Meanwhile what comes next is fetched: of the next position's filters where they come from afar, else of the source.
    int64_t share = kWidth * kWidth / count & -16;
    for (int64_t x = 0; x < kPositions; ++x)
      for (int64_t g = 0; g < count; ++g) {
        Range tiles = group(groups.begin + g);
        int64_t at = g * kGroupBlock + x * kProductRows * kWidth;
        const float* next = plan.shared_filters ? filters + (x + 1) * kPanel + g * share : source + at + kGroupBlock;
        int64_t next_step = plan.shared_filters ? 16 : 8;
        product_columns<false>(tiles.end - tiles.begin, source + at, filters + x * kPanel, sums + at, deep, columns.end - columns.begin, depth_block > 0, next, next_step);
      }
  }

  void transform_output(const float* sums, Range groups, int64_t column_block, float* strip) const {
    Range columns = block_of(plan.dst_c, column_block);
    int64_t channels = columns.end - columns.begin, h = plan.dst_h, w = plan.dst_w;
    bool phased = plan.input_grad && plan.stride > 1, direct = sizeof(S) == sizeof(float) && p.layout == Layout::nhwc && !phased;
    // What goes through the strip meets the residual, and then ReLU, on its way from there. (Gradients have neither.)
    const float* residual = direct ? static_cast<const float*>(a.residual) : nullptr;
    float biases[kWidth];
    Epilogue epilogue{a.scale == nullptr ? nullptr : static_cast<const float*>(a.scale) + dst_first + columns.begin, biases_of(columns, biases),
                      a.relu && (direct || a.residual == nullptr), streaming};
    rows_of({group(groups.begin).begin, group(groups.end - 1).end}, [&](int64_t image, int64_t ty, int64_t tx0, int64_t tx1, int64_t tile) {
      int64_t y0 = ty * kTileOut, x0 = tx0 * kTileOut, down = min_of<int64_t>(kTileOut, h - y0), across = min_of(tx1 * kTileOut, w) - x0;
      int64_t first = ((image * h + y0) * w + x0) * dst_c + dst_first + columns.begin;  // of the tensor, if pixels lie together
      float* pixels = phased ? strip + line_floats() : strip;
      OutputTile to{pixels, nullptr, across * kWidth, kWidth, down, 0};
      if (direct) to = {static_cast<float*>(a.dst) + first, residual == nullptr ? nullptr : residual + first, w * dst_c, dst_c, down, 0};
      for (int64_t tx = tx0; tx < tx1; ++tx, ++tile, to.to += kTileOut * to.pixel) {
        int64_t g = group_of(tile);
        to.right = min_of<int64_t>(kTileOut, w - tx * kTileOut);
        transform_output_tile<typename Transforms::Output>(sums + (g - groups.begin) * kGroupBlock + (tile - group(g).begin) * kWidth, kProductRows * kWidth, channels, to, epilogue);
        if (to.residual != nullptr) to.residual += kTileOut * to.pixel;
      }
      if (direct) return;
      S* out = static_cast<S*>(a.dst);
      if (phased) return unstage_phases(pixels, kWidth, out + image * p.h * p.w * p.c, y0, x0, down, across, columns, strip);
      bool whole = across == w;
      with_residual<S>(a, [&](auto finish) {
        for (int64_t y = 0; y < (whole ? 1 : down); ++y)
          unstage_run(strip + y * across * kWidth, kWidth, out + image * h * w * dst_c, p.layout, h * w, dst_c, (y0 + y) * w + x0,
                      whole ? down * across : across, dst_first + columns.begin, channels, finish);
      });
    });
    if (streaming) fence();
  }

  // Whole vectors of the biases of columns, in `values`; null if there are none.
  const float* biases_of(Range columns, float* values) const {
    if (a.bias == nullptr) return nullptr;
    fill_zero(values, kWidth);
    if (plan.input_grad && plan.stride > 1)
      each_line(columns, [&](int64_t c, int64_t wide, int64_t, int64_t at) {
        for (int64_t i = 0; i < plan.stride * wide; ++i) values[at + i] = bias_of<S>(a, c + i % wide);
      });
    else
      for (int64_t i = columns.begin; i < columns.end; ++i) values[i - columns.begin] = bias_of<S>(a, dst_first + i);
    return values;
  }

  // Of whole images: what the tiles come to at the pixels that they reach, of which neighbours share some, is added up.
  void spread_output(const float* sums, Range groups, int64_t column_block, float* pixels) const {
    Range columns = block_of(plan.dst_c, column_block);
    int64_t channels = columns.end - columns.begin, h = plan.dst_h, w = plan.dst_w, tiles = plan.tiles_h * plan.tiles_w;
    float values[kWidth];
    const float* biases = biases_of(columns, values);
    for (int64_t image = groups.begin / plan.image_groups; image < groups.end / plan.image_groups; ++image) {
      for (int64_t v = 0; v < channels; v += L) {
        V first = biases != nullptr ? load(biases + v) : V{};
        for (int64_t i = 0; i < h * w; ++i) store(pixels + i * kWidth + v, first);
      }
      for (int64_t tile = image * tiles; tile < (image + 1) * tiles; ++tile) {
        int64_t y = tile % tiles / plan.tiles_w * kTileOut - plan.pad_top, x = tile % plan.tiles_w * kTileOut - plan.pad_left, g = group_of(tile);
        spread_tile<typename Transforms::Spread>(sums + (g - groups.begin) * kGroupBlock + (tile - group(g).begin) * kWidth, kProductRows * kWidth, channels, pixels, kWidth, y, x, h, w);
      }
      unstage_run(pixels, kWidth, static_cast<S*>(a.dst) + image * h * w * dst_c, p.layout, h * w, dst_c, 0, h * w, dst_first + columns.begin, channels, AsItIs{});
    }
  }

  void forward() const {
    Pixels<S> src{static_cast<const S*>(a.src), plan.src_h, plan.src_w, src_c, src_first, plan.spread ? 0 : plan.pad_top, plan.spread ? 0 : plan.pad_left,
                  !plan.input_grad && plan.stride > 1};
    float *filters = at(plan.filters), *source = at(plan.source);
    int64_t filter_blocks = plan.column_blocks * plan.depth_blocks, block = kPositions * kPanel;
    if (plan.shared_filters) {
      constexpr int64_t kRows = 8;
      parallel(pool, filter_blocks * (kWidth / kRows), [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          int64_t first = i % (kWidth / kRows) * kRows, which = i / (kWidth / kRows);
          Range depth = block_of(plan.src_c, which % plan.depth_blocks);
          int64_t last = min_of(first + kRows, depth.end - depth.begin);
          transform_filters(which / plan.depth_blocks, which % plan.depth_blocks, {first, last}, filters + which * block);
        }
      });
      parallel(pool, plan.tile_blocks, [&](int64_t begin, int64_t end, int thread) {
        float* local = scratch(thread);
        for (int64_t i = begin; i < end; ++i) {
          Range groups = part(plan.groups / plan.image_groups, plan.tile_blocks, i);
          groups = {groups.begin * plan.image_groups, groups.end * plan.image_groups};
          int64_t size = (groups.end - groups.begin) * kGroupBlock;
          // All blocks of the source are kept and one of sums, or the other way round: whichever is less.
          float* strip = local + (min_of(plan.depth_blocks, plan.column_blocks) + 1) * size;
          auto finish = [&](const float* sums, int64_t c) { plan.spread ? spread_output(sums, groups, c, strip) : transform_output(sums, groups, c, strip); };
          auto multiply_block = [&](const float* source, float* sums, int64_t c, int64_t d) { multiply(source, filters + (c * plan.depth_blocks + d) * block, sums, groups, c, d); };
          if (plan.depth_blocks <= plan.column_blocks) {
            for (int64_t d = 0; d < plan.depth_blocks; ++d) transform_source(src, groups, d, local + (d + 1) * size, strip);
            for (int64_t c = 0; c < plan.column_blocks; ++c) {
              for (int64_t d = 0; d < plan.depth_blocks; ++d) multiply_block(local + (d + 1) * size, local, c, d);
              finish(local, c);
            }
          } else {
            for (int64_t d = 0; d < plan.depth_blocks; ++d) {
              transform_source(src, groups, d, local, strip);
              for (int64_t c = 0; c < plan.column_blocks; ++c) multiply_block(local, local + (c + 1) * size, c, d);
            }
            for (int64_t c = 0; c < plan.column_blocks; ++c) finish(local + (c + 1) * size, c);
          }
        }
      });
      return;
    }
    // Source of a chunk of tiles [depth block][group]; then tasks of one block of columns and one of tiles, which
    // transform their own filters: these are larger than the source and would be read from memory as often.
    for (int64_t first = 0; first < plan.groups; first += plan.groups_per_chunk) {
      int64_t count = min_of(plan.groups_per_chunk, plan.groups - first);
      parallel(pool, count * plan.depth_blocks, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i)
          transform_source(src, {first + i % count, first + i % count + 1}, i / count, source + i * kGroupBlock, scratch(thread));
      });
      int64_t tile_blocks = min_of(plan.tile_blocks, count);
      parallel(pool, plan.column_blocks * tile_blocks, [&](int64_t begin, int64_t end, int thread) {
        float *local = scratch(thread), *sums = local + block;
        for (int64_t i = begin; i < end; ++i) {
          int64_t column_block = i / tile_blocks;
          Range groups = part(count, tile_blocks, i % tile_blocks);
          for (int64_t d = 0; d < plan.depth_blocks; ++d) {
            Range depth = block_of(plan.src_c, d);
            transform_filters(column_block, d, {0, depth.end - depth.begin}, local);
            multiply(source + (d * count + groups.begin) * kGroupBlock, local, sums, {first + groups.begin, first + groups.end}, column_block, d);
          }
          transform_output(sums, {first + groups.begin, first + groups.end}, column_block, sums + (groups.end - groups.begin) * kGroupBlock);
        }
      });
    }
  }

  // ---- weight gradient -----------------------------------------------------------------------------------------------

  // sums[position][filter][channel] += transformed gradient * transformed input, over the tiles of one split.
  void sum_products(const Pixels<S>& x, const Pixels<S>& grad, Range tiles, Range filters, Range channels, float* sums, float* local) const {
    int64_t step = plan.tiles_at_once * kWidth + 16;  // one line more: see kPanel
    float *source = local, *gradient = source + kPositions * step, *strip = gradient + kPositions * step;
    int64_t pieces = ceil_div(tiles.end - tiles.begin, plan.tiles_at_once), wide = channels.end - channels.begin;
    int64_t row_tiles = ceil_div(filters.end - filters.begin, kProductRows);
    for (int64_t i = 0; i < pieces; ++i) {
      Range now = part(tiles.end - tiles.begin, pieces, i);
      now = {tiles.begin + now.begin, tiles.begin + now.end};
      transform_pixels<typename Transforms::Source>(x, now, channels.begin, wide, strip, [&](int64_t t) { return source + (t - now.begin) * kWidth; }, step);
      transform_pixels<typename Transforms::Grad>(grad, now, filters.begin, filters.end - filters.begin, strip, [&](int64_t t) { return gradient + (t - now.begin) * kWidth; }, step);
      for (int64_t position = 0; position < kPositions; ++position)
        for (int64_t tile = 0; tile < row_tiles; ++tile) {
          Range rows = part(filters.end - filters.begin, row_tiles, tile);
          const float* next = sums + position * kPanel + rows.end * kWidth;
          product_columns<true>(rows.end - rows.begin, gradient + position * step + rows.begin, source + position * step,
                                sums + position * kPanel + rows.begin * kWidth, now.end - now.begin, wide, i > 0, next, 16);
        }
    }
  }

  void write(S* to, const float* from, int64_t n) const {
    if constexpr (sizeof(S) == sizeof(float))
      if (streaming && streamable(to) && n % L == 0) {
        for (int64_t i = 0; i < n; i += L) stream(to + i, load(from + i));
        return;
      }
    copy_values(from, to, n);
  }

  // The sums of all splits in order, for a row of filters -> taps.
  void write_weight(const float* sums, int64_t splits, int64_t split_step, int64_t filter, Range channels, int64_t row) const {
    S* weight = static_cast<S*>(a.dst) + filter * a.weight_strides.k;
    const WeightStrides& st = a.weight_strides;
    for (int64_t first = channels.begin; first < channels.end; first += L) {
      int lanes = int(min_of<int64_t>(L, channels.end - first));
      const float* from = sums + row * kWidth + (first - channels.begin);
      float taps[kTaps][L], totals[kPositions][L];
      const float* total[kPositions];
      for (int x = 0; x < kPositions; ++x) {
        const float* sum = from + x * kPanel;
        total[x] = sum;
        if (splits == 1) continue;
        V all = load(sum);
        for (int64_t s = 1; s < splits; ++s) all += load(sum + s * split_step);
        store(totals[x], all), total[x] = totals[x];
      }
      transform_channels<typename Transforms::WeightGrad, L>(total, L, taps[0]);
      S* to = weight + first * st.c;
      if (st.c == 1) {
        CONVKIT_UNROLL for (int t = 0; t < kTaps; ++t) write(to + t / kFilter * st.r + t % kFilter * st.s, taps[t], lanes);
      } else if (st.s == 1 && st.r == kFilter && st.c == kTaps) {
        float line[L * kTaps];
        transpose_run(taps[0], L, line, kTaps, kTaps, lanes);
        write(to, line, lanes * kTaps);
      } else {
        for (int t = 0; t < kTaps; ++t)
          for (int j = 0; j < lanes; ++j) put(to + j * st.c + t / kFilter * st.r + t % kFilter * st.s, taps[t][j]);
      }
    }
  }

  void weight_grad() const {
    Pixels<S> x{static_cast<const S*>(a.x), plan.src_h, plan.src_w, src_c, src_first, plan.pad_top, plan.pad_left, plan.stride > 1};
    Pixels<S> grad{static_cast<const S*>(a.src), plan.dst_h, plan.dst_w, dst_c, dst_first, 0, 0, false};
    int64_t blocks = plan.column_blocks * plan.depth_blocks, block = kPositions * kPanel;
    auto filters_of = [&](int64_t i) { return block_of(plan.dst_c, i / plan.depth_blocks); };
    auto channels_of = [&](int64_t i) { return block_of(plan.src_c, i % plan.depth_blocks); };
    float* kept = at(plan.sums);
    parallel(pool, blocks * plan.splits, [&](int64_t begin, int64_t end, int thread) {
      float* local = scratch(thread);
      for (int64_t i = begin; i < end; ++i) {
        Range tiles = part(plan.tiles, plan.splits, i % plan.splits), filters = filters_of(i / plan.splits), channels = channels_of(i / plan.splits);
        float* sums = plan.splits == 1 ? local : kept + i * block;
        sum_products(x, grad, tiles, filters, channels, sums, plan.splits == 1 ? local + block : local);
        if (plan.splits == 1)
          for (int64_t k = filters.begin; k < filters.end; ++k) write_weight(sums, 1, 0, k, channels, k - filters.begin);
      }
      if (streaming) fence();
    });
    if (plan.splits == 1) return;
    parallel(pool, blocks * kWidth, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t which = i / kWidth, row = i % kWidth;
        Range filters = filters_of(which);
        if (filters.begin + row < filters.end)
          write_weight(kept + which * plan.splits * block, plan.splits, block, filters.begin + row, channels_of(which), row);
      }
      if (streaming) fence();
    });
  }
};

// Between filters and those of their phases, channels last, that are computed instead.
template <class S> void copy_filters(const ConvArgs& a, S* weight, S* computed, bool back, const Pool& pool) {
  const ConvProblem& p = a.problem;
  const WinogradPlan& plan = a.plan.winograd;
  const WeightStrides& st = a.weight_strides;
  parallel(pool, p.k, [&](int64_t begin, int64_t end, int) {
    for (int64_t k = begin; k < end; ++k) {
      S* to = computed + k * plan.taps * plan.taps * plan.stride * plan.stride * p.c;
      for (int64_t i = 0; i < plan.taps; ++i)
        for (int64_t j = 0; j < plan.taps; ++j)
          for (int64_t c = 0, wide; c < p.c; c += wide) {
            wide = line_channels(p.c - c, plan.stride);
            for (int64_t y = i * plan.stride; y < (i + 1) * plan.stride; ++y)
              for (int64_t x = j * plan.stride; x < (j + 1) * plan.stride; ++x, to += wide) {
                S* from = weight + k * st.k + c * st.c + y * st.r + x * st.s;
                if (y >= p.r || x >= p.s) {
                  if (!back) fill_zero(to, wide);
                } else if (back) {
                  for (int64_t l = 0; l < wide; ++l) from[l * st.c] = to[l];
                } else {
                  for (int64_t l = 0; l < wide; ++l) to[l] = from[l * st.c];
                }
              }
          }
    }
  });
}

}  // namespace

void winograd(const ConvArgs& args, Pass pass, const Pool& pool) {
  const WinogradPlan& plan = args.plan.winograd;
  const ConvProblem& p = args.problem;
  with_type(p.dtype, [&]<class S>(Tag<S>) {
    if constexpr (sizeof(compute_t<S>) == sizeof(float)) {
      ConvArgs a = args;
      bool back = pass == Pass::weight_grad;
      S* weight = static_cast<S*>(back ? args.dst : const_cast<void*>(args.weight));
      S* computed = reinterpret_cast<S*>(static_cast<char*>(args.workspace) + plan.weight.offset);
      auto take = [&](S* filters) {
        if (back) a.dst = filters;
        else a.weight = filters;
      };
      if (plan.stride > 1) {
        int64_t c = plan.stride * plan.stride * p.c;
        take(computed);
        a.weight_strides = {plan.taps * plan.taps * c, 1, plan.taps * c, c};
        if (!back) copy_filters<S>(args, weight, computed, false, pool);
      }
      auto run = [&](auto tiles) { back ? tiles.weight_grad() : tiles.forward(); };
      for (int64_t group = 0; group < p.groups; ++group) {
        if (p.groups > 1) take(weight + group * (p.k / p.groups) * a.weight_strides.k);
        switch (plan.taps) {
          case 2: run(Tiles<S, 2>(a, group, pool)); break;
          case 3: run(Tiles<S, 3>(a, group, pool)); break;
          case 4: run(Tiles<S, 4>(a, group, pool)); break;
          default: run(Tiles<S, 5>(a, group, pool));
        }
      }
      if (plan.stride > 1 && back) copy_filters<S>(args, weight, computed, true, pool);
    }
  });
}

}  // namespace convkit::cpu::CONVKIT_ISA
