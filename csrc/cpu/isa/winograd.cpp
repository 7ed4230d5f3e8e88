// 3x3 and 5x5 convolutions with stride 1 by Winograd's F(4x4, 3x3) and F(4x4, 5x5): a quarter of the multiplications or
// a sixth, all three passes.
//
// Tiles of 6 x 6 (8 x 8) source pixels are transformed to as many positions, each position is a matrix product of its own
// (tiles x channels times channels x filters; in the weight gradient filters x tiles times tiles x channels), and the sums
// are transformed back to 4 x 4 outputs or 3 x 3 taps. Input gradients of images with less than full padding may take fewer
// tiles the other way round: 4 x 4 pixels of y's gradient each, transformed back to the 6 x 6 that they reach.
// Everything between lies in blocks [36][rows][64] of a few tiles (or a few filters) and 64 channels, so that what a product
// reads and writes is next to each other whatever the tensor's size: rows of 64 values have the same distance in every
// operand, and a block is a part of a core's second-level cache.
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

template <class S> CONVKIT_INLINE V load_up_to(const S* p, int64_t n) { return n >= L ? load(p) : load_n(p, int(n)); }

// Of up to a vector of channels, as bias_of gives it.
template <class S> CONVKIT_INLINE V biases_up_to(const ConvArgs& a, int64_t channel, int64_t n) {
  if (a.scale != nullptr) return load_up_to(static_cast<const float*>(a.bias) + channel, n);
  return load_up_to(static_cast<const S*>(a.bias) + channel, n);
}

// A tensor whose pixels are cut into tiles of `extent` pixels whose first is at (4 * ty - top, 4 * tx - left).
template <class S> struct Pixels {
  const S* data;
  int64_t h, w, c;
  Layout layout;
  int64_t top, left;
};

// For filters of kFilter x kFilter taps.
template <class S, int kFilter> struct Tiles {
  using Transforms = Winograd<kFilter>;
  static constexpr int kTileIn = Transforms::tile, kPositions = kTileIn * kTileIn, kTaps = kFilter * kFilter;
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const WinogradPlan& plan = a.plan.winograd;
  char* ws = static_cast<char*>(a.workspace);
  bool streaming = plan.streaming && streamable(a.dst);

  Tiles(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  float* at(const Piece& piece) const { return reinterpret_cast<float*>(ws + piece.offset); }
  float* scratch(int thread) const { return reinterpret_cast<float*>(ws + plan.scratch.offset + thread * plan.scratch_bytes); }

  // Tiles [tiles.begin, tiles.end) as runs of neighbours in a row of tiles: f(image, ty, first tx, last tx, first tile).
  template <class F> CONVKIT_INLINE void rows_of(Range tiles, F&& f) const {
    for (int64_t t = tiles.begin; t < tiles.end;) {
      int64_t tx = t % plan.tiles_w, row = t / plan.tiles_w, count = min_of(plan.tiles_w - tx, tiles.end - t);
      f(row / plan.tiles_h, row % plan.tiles_h, tx, tx + count, t);
      t += count;
    }
  }

  // The transforms of `tiles` and channels [channel, channel + channels): position x of tile t goes to
  // to(t) + x * step. Strip: where contiguous pixels are turned into channels-last ones, a row of tiles at a time.
  template <class Transform, class To>
  CONVKIT_INLINE void transform_pixels(const Pixels<S>& from, Range tiles, int64_t channel, int64_t channels, float* strip, int64_t step, To&& to) const {
    constexpr int E = Transform::in;
    rows_of(tiles, [&](int64_t image, int64_t ty, int64_t tx0, int64_t tx1, int64_t tile) {
      int64_t y0 = ty * kTileOut - from.top, x0 = tx0 * kTileOut - from.left;
      int64_t x_first = max_of<int64_t>(0, x0), x_last = min_of(from.w, x0 + (tx1 - tx0 - 1) * kTileOut + E);
      int64_t y_first = max_of<int64_t>(0, y0), y_last = min_of(from.h, y0 + E);
      // Base: pixel (y_first, x_first) of what is stored, or of the strip.
      auto transform_row = [&]<class P>(const P* base, int64_t pixel, int64_t row) {
        static const P zeros[kWidth] = {};
        for (int64_t tx = tx0; tx < tx1; ++tx, ++tile) {
          const P* pixels[E][E];
          for (int i = 0; i < E; ++i)
            for (int j = 0; j < E; ++j) {
              int64_t y = y0 + i, x = x0 + (tx - tx0) * kTileOut + j;
              bool inside = y >= 0 && y < from.h && x >= 0 && x < from.w;
              pixels[i][j] = inside ? base + (y - y_first) * row + (x - x_first) * pixel : zeros;
            }
          float* target = to(tile);
          int64_t v = 0;
          for (; v + L <= channels; v += L)
            transform_tile<Transform>([&](int i, int j) { return load(pixels[i][j] + v); },
                                      [&](int i, int j, V value) { store(target + (i * kTileIn + j) * step + v, value); });
          if (v < channels)
            transform_tile<Transform>([&](int i, int j) { return load_n(pixels[i][j] + v, int(channels - v)); },
                                      [&](int i, int j, V value) { store(target + (i * kTileIn + j) * step + v, value); });
        }
      };
      const S* data = from.data + image * from.h * from.w * from.c;
      if (from.layout == Layout::nhwc) return transform_row(data + (y_first * from.w + x_first) * from.c + channel, from.c, from.w * from.c);
      // Rows that are whole are one run of pixels.
      int64_t across = max_of<int64_t>(0, x_last - x_first), down = max_of<int64_t>(0, y_last - y_first);
      bool whole = across == from.w;
      const S* plane = data + (channel * from.h + y_first) * from.w + x_first;
      for (int64_t y = 0; y < (whole && down > 0 ? 1 : down); ++y)
        transpose_block(plane + y * from.w, from.h * from.w, strip + y * across * kWidth, kWidth, channels, whole ? down * across : across);
      transform_row(static_cast<const float*>(strip), kWidth, across * kWidth);
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
        bool direct = column_stride == 1 && wide == L;
        if (direct) {
        } else if (run_of_taps && depth_stride == kTaps) {
          transpose_block(from, column_stride, taps[0][0], L, wide, deep * kTaps);
        } else if (run_of_taps) {
          for (int64_t i = 0; i < deep; ++i) transpose_block(from + i * depth_stride, column_stride, taps[i][0], L, wide, kTaps);
        } else if (depth_stride == 1) {
          for (int t = 0; t < kTaps; ++t)
            transpose_block(from + t / kFilter * st.r + t % kFilter * st.s, column_stride, taps[0][t], kTaps * L, wide, deep);
        } else {
          for (int64_t i = 0; i < deep; ++i)
            for (int t = 0; t < kTaps; ++t)
              for (int64_t j = 0; j < wide; ++j)
                taps[i][t][j] = get(from + i * depth_stride + t / kFilter * st.r + t % kFilter * st.s + j * column_stride);
        }
        for (int64_t i = 0; i < deep; ++i) {
          float* target = to + (d + i) * kWidth + (first - columns.begin);
          auto keep = [&](int y, int x, V value) { store(target + (y * kTileIn + x) * kPanel, value); };
          auto transform = [&](const auto* tap, int64_t row, int64_t column) {
            if (plan.input_grad && !plan.spread) tap += (row + column) * (kFilter - 1), row = -row, column = -column;  // half a turn
            int n = int(wide);
            if (wide == L) transform_tile<typename Transforms::Filter>([&](int y, int x) { return load(tap + y * row + x * column); }, keep);
            else transform_tile<typename Transforms::Filter>([&](int y, int x) { return load_n(tap + y * row + x * column, n); }, keep);
          };
          if (direct) transform(from + i * depth_stride, st.r, st.s);
          else transform(taps[i][0], kFilter * L, L);
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
      transform_pixels<Transform>(src, tiles, depth.begin, depth.end - depth.begin, strip, kProductRows * kWidth, [&](int64_t tile) {
        int64_t g = group_of(tile);
        return to + (g - groups.begin) * kGroupBlock + (tile - group(g).begin) * kWidth;
      });
    };
    plan.spread ? transform(Tag<typename Transforms::Grad>{}) : transform(Tag<typename Transforms::Source>{});
  }

  // One block of depth of the 36 products: sums[group][position][tile][column] (+)= source * filters.
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
    const float* scale = a.scale == nullptr ? nullptr : static_cast<const float*>(a.scale) + columns.begin;
    bool nchw = p.layout == Layout::nchw;
    // Contiguous pixels meet the residual, and then ReLU, on their way from the strip.
    const S* residual = nchw ? nullptr : static_cast<const S*>(a.residual);
    bool relu_here = a.relu && !(nchw && a.residual != nullptr);
    rows_of({group(groups.begin).begin, group(groups.end - 1).end}, [&](int64_t image, int64_t ty, int64_t tx0, int64_t tx1, int64_t tile) {
      int64_t y0 = ty * kTileOut, x0 = tx0 * kTileOut, down = min_of<int64_t>(kTileOut, h - y0), across = min_of(tx1 * kTileOut, w) - x0;
      int64_t first = ((image * h + y0) * w + x0) * plan.dst_c + columns.begin;  // of the tensor, if pixels lie together
      // Base: where the row's first output goes, in the tensor or in the strip.
      auto transform_row = [&]<class P>(P* base, int64_t pixel, int64_t row) {
        for (int64_t tx = tx0, at = first; tx < tx1; ++tx, ++tile, base += kTileOut * pixel, at += kTileOut * pixel) {
          int64_t g = group_of(tile), right = min_of<int64_t>(kTileOut, w - tx * kTileOut);
          const float* from = sums + (g - groups.begin) * kGroupBlock + (tile - group(g).begin) * kWidth;
          bool whole = down == kTileOut && right == kTileOut;
          for (int64_t v = 0; v < channels; v += L) {
            int64_t lanes = min_of<int64_t>(L, channels - v);
            V y[kTileOut][kTileOut];
            transform_tile<typename Transforms::Output>([&](int i, int j) { return load(from + (i * kTileIn + j) * (kProductRows * kWidth) + v); },
                                                        [&](int i, int j, V value) { y[i][j] = value; });
            if (scale != nullptr) {
              V factor = load_up_to(scale + v, lanes);
              CONVKIT_UNROLL for (int i = 0; i < kTileOut; ++i)
                CONVKIT_UNROLL for (int j = 0; j < kTileOut; ++j) y[i][j] *= factor;
            }
            if (a.bias != nullptr) {
              V add = biases_up_to<S>(a, columns.begin + v, lanes);
              CONVKIT_UNROLL for (int i = 0; i < kTileOut; ++i)
                CONVKIT_UNROLL for (int j = 0; j < kTileOut; ++j) y[i][j] += add;
            }
            if (residual != nullptr)
              CONVKIT_UNROLL for (int i = 0; i < kTileOut; ++i)
                CONVKIT_UNROLL for (int j = 0; j < kTileOut; ++j)
                  if (i < down && j < right) y[i][j] += load_up_to(residual + at + i * row + j * pixel + v, lanes);
            if (relu_here)
              CONVKIT_UNROLL for (int i = 0; i < kTileOut; ++i)
                CONVKIT_UNROLL for (int j = 0; j < kTileOut; ++j) y[i][j] = relu<float>(y[i][j]);
            if constexpr (kLine<P> == L)
              if (whole && streaming) {
                CONVKIT_UNROLL for (int i = 0; i < kTileOut; ++i)
                  CONVKIT_UNROLL for (int j = 0; j < kTileOut; ++j) stream(base + i * row + j * pixel + v, y[i][j]);
                continue;
              }
            if (whole && lanes == L) {
              CONVKIT_UNROLL for (int i = 0; i < kTileOut; ++i)
                CONVKIT_UNROLL for (int j = 0; j < kTileOut; ++j) store(base + i * row + j * pixel + v, y[i][j]);
            } else {
              CONVKIT_UNROLL for (int i = 0; i < kTileOut; ++i)
                CONVKIT_UNROLL for (int j = 0; j < kTileOut; ++j) {
                  if (i >= down || j >= right) continue;
                  if (lanes == L) store(base + i * row + j * pixel + v, y[i][j]);
                  else store_n(base + i * row + j * pixel + v, y[i][j], int(lanes));
                }
            }
          }
        }
      };
      S* out = static_cast<S*>(a.dst) + image * h * w * plan.dst_c;
      if (p.layout == Layout::nhwc) return transform_row(out + (y0 * w + x0) * plan.dst_c + columns.begin, plan.dst_c, w * plan.dst_c);
      transform_row(strip, kWidth, across * kWidth);
      S* plane = out + (columns.begin * h + y0) * w + x0;
      bool whole = across == w;
      with_residual<S>(a, [&](auto finish) {
        for (int64_t y = 0; y < (whole ? 1 : down); ++y)
          transpose_block(strip + y * across * kWidth, kWidth, plane + y * w, h * w, whole ? down * across : across, channels, false, finish);
      });
    });
    if (streaming) fence();
  }

  // Of whole images: what the tiles come to at the pixels that they reach, of which neighbours share some, is added up.
  void spread_output(const float* sums, Range groups, int64_t column_block, float* pixels) const {
    Range columns = block_of(plan.dst_c, column_block);
    int64_t channels = columns.end - columns.begin, h = plan.dst_h, w = plan.dst_w, tiles = plan.tiles_h * plan.tiles_w;
    for (int64_t image = groups.begin / plan.image_groups; image < groups.end / plan.image_groups; ++image) {
      for (int64_t v = 0; v < channels; v += L) {
        V first = a.bias != nullptr ? biases_up_to<S>(a, columns.begin + v, channels - v) : V{};
        for (int64_t i = 0; i < h * w; ++i) store(pixels + i * kWidth + v, first);
      }
      for (int64_t tile = image * tiles; tile < (image + 1) * tiles; ++tile) {
        int64_t y0 = tile % tiles / plan.tiles_w * kTileOut - plan.pad_top, x0 = tile % plan.tiles_w * kTileOut - plan.pad_left, g = group_of(tile);
        const float* from = sums + (g - groups.begin) * kGroupBlock + (tile - group(g).begin) * kWidth;
        uint32_t rows = 0, across = 0;  // bit i: does row, does column i of the tile exist?
        for (int i = 0; i < kTileIn; ++i) rows |= uint32_t(y0 + i >= 0 && y0 + i < h) << i, across |= uint32_t(x0 + i >= 0 && x0 + i < w) << i;
        for (int64_t v = 0; v < channels; v += L)
          transform_tile<typename Transforms::Spread>([&](int i, int j) { return load(from + (i * kTileIn + j) * (kProductRows * kWidth) + v); },
                                                      [&](int i, int j, V value) {
                                                        if ((rows >> i & across >> j & 1) == 0) return;
                                                        float* pixel = pixels + ((y0 + i) * w + x0 + j) * kWidth + v;
                                                        store(pixel, load(pixel) + value);
                                                      });
      }
      unstage_pixels(pixels, kWidth, static_cast<S*>(a.dst) + image * h * w * plan.dst_c, p.layout, h * w, plan.dst_c, 0, h * w, columns.begin, channels);
    }
  }

  void forward() const {
    Pixels<S> src{static_cast<const S*>(a.src), plan.src_h, plan.src_w, plan.src_c, p.layout, plan.spread ? 0 : plan.pad_top, plan.spread ? 0 : plan.pad_left};
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
          float *sums = local + plan.depth_blocks * size, *strip = sums + size;
          for (int64_t d = 0; d < plan.depth_blocks; ++d) transform_source(src, groups, d, local + d * size, strip);
          for (int64_t c = 0; c < plan.column_blocks; ++c) {
            for (int64_t d = 0; d < plan.depth_blocks; ++d)
              multiply(local + d * size, filters + (c * plan.depth_blocks + d) * block, sums, groups, c, d);
            plan.spread ? spread_output(sums, groups, c, strip) : transform_output(sums, groups, c, strip);
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
      transform_pixels<typename Transforms::Source>(x, now, channels.begin, wide, strip, step, [&](int64_t t) { return source + (t - now.begin) * kWidth; });
      transform_pixels<typename Transforms::Grad>(grad, now, filters.begin, filters.end - filters.begin, strip, step,
                                      [&](int64_t t) { return gradient + (t - now.begin) * kWidth; });
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
      float taps[kTaps][L];
      transform_tile<typename Transforms::WeightGrad>(
          [&](int i, int j) {
            const float* sum = from + (i * kTileIn + j) * kPanel;
            V total = load(sum);
            for (int64_t s = 1; s < splits; ++s) total += load(sum + s * split_step);
            return total;
          },
          [&](int i, int j, V value) { store(taps[i * kFilter + j], value); });
      S* to = weight + first * st.c;
      if (st.c == 1) {
        CONVKIT_UNROLL for (int t = 0; t < kTaps; ++t) write(to + t / kFilter * st.r + t % kFilter * st.s, taps[t], lanes);
      } else if (st.s == 1 && st.r == kFilter && st.c == kTaps) {
        float line[L * kTaps];
        transpose_block(taps[0], L, line, kTaps, kTaps, lanes);
        write(to, line, lanes * kTaps);
      } else {
        for (int t = 0; t < kTaps; ++t)
          for (int j = 0; j < lanes; ++j) put(to + j * st.c + t / kFilter * st.r + t % kFilter * st.s, taps[t][j]);
      }
    }
  }

  void weight_grad() const {
    Pixels<S> x{static_cast<const S*>(a.x), plan.src_h, plan.src_w, plan.src_c, p.layout, plan.pad_top, plan.pad_left};
    Pixels<S> grad{static_cast<const S*>(a.src), plan.dst_h, plan.dst_w, plan.dst_c, p.layout, 0, 0};
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

}  // namespace

void winograd(const ConvArgs& a, Pass pass, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) {
    if constexpr (sizeof(compute_t<S>) == sizeof(float)) {
      auto run = [&](auto tiles) { pass == Pass::weight_grad ? tiles.weight_grad() : tiles.forward(); };
      if (a.problem.r == 3) run(Tiles<S, 3>(a, pool));
      else run(Tiles<S, 5>(a, pool));
    }
  });
}

}  // namespace convkit::cpu::CONVKIT_ISA
