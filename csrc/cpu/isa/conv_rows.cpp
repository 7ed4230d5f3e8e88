// Forward, input gradient and transposed convolution as one matrix product with gathered rows.
//
// A row is one output pixel; its operand is the list of source pixels under the filter's taps, given by pointers, so no
// column matrix is ever written. A pointer that would fall into the padding goes to a row of zeros; a tap whose rows all
// do is left out of the tile's list. For the input gradient of a strided convolution the output pixels are taken phase by
// phase (same remainder of row and column), so that all rows of a tile meet the same taps and the others drop out.
#include "../kernels.h"
#include "rows_tile.h"
#include "staging.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

// Walks output pixels in the order the tiles take them.
struct Cursor {
  int64_t height, width, step_h, step_w;
  int64_t images;  // where the same pixel of all images comes first; else 0, and image comes after image
  int64_t image, phase_h, phase_w, h, w;

  void seek(int64_t pixel) {
    image = images > 0 ? pixel % images : pixel / (height * width);
    pixel = images > 0 ? pixel / images : pixel % (height * width);
    for (phase_h = 0; phase_h < step_h; ++phase_h)
      for (phase_w = 0; phase_w < step_w; ++phase_w) {
        int64_t across = ceil_div(width - phase_w, step_w), count = ceil_div(height - phase_h, step_h) * across;
        if (pixel < count) {
          h = phase_h + pixel / across * step_h;
          w = phase_w + pixel % across * step_w;
          return;
        }
        pixel -= count;
      }
  }

  void next() {
    if (images > 0) {
      if (++image < images) return;
      image = 0;
    }
    if ((w += step_w) < width) return;
    w = phase_w;
    if ((h += step_h) < height) return;
    if (++phase_w == min_of(step_w, width)) {
      phase_w = 0;
      if (++phase_h == min_of(step_h, height)) phase_h = 0, ++image;
    }
    h = phase_h;
    w = phase_w;
  }
};

// Source coordinate of (output coordinate, tap), or -1 in the padding.
CONVKIT_INLINE int64_t source(int64_t i, int64_t tap, int64_t stride, int64_t pad, int64_t dilation, int64_t size, bool input_grad) {
  if (!input_grad) {
    int64_t at = i * stride - pad + tap * dilation;
    return at < 0 || at >= size ? -1 : at;
  }
  int64_t at = i + pad - tap * dilation;
  if (stride == 1) return at < 0 || at >= size ? -1 : at;  // divisions cost more than the rest of a table
  return at < 0 || at % stride != 0 || at / stride >= size ? -1 : at / stride;
}

// Weights of a column that a task packs: enough to be read as streams, few enough for many tasks.
constexpr int64_t kPackedRun = 256;

// X: what its products are of.
template <class S, class X> struct Rows {
  using T = compute_t<X>;
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const RowsPlan& plan = a.plan.rows;
  char* ws = static_cast<char*>(a.workspace);
  X* panels = reinterpret_cast<X*>(ws + plan.panels.offset);
  X* zeros = reinterpret_cast<X*>(ws + plan.zeros.offset);
  X* staged_src = reinterpret_cast<X*>(ws + plan.src.offset);
  T* staged_dst = reinterpret_cast<T*>(ws + plan.dst.offset);
  int64_t width = int64_t(plan.vectors) * kLanes<T>;
  int64_t panel_size = plan.taps * whole_steps<X>(plan.depth) * width;
  int64_t src_channels_of_group = plan.src_c / p.groups;

  Rows(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  // panels[group][column tile][tap][depth][width], then bias and scale padded to whole tiles.
  T* bias() const { return reinterpret_cast<T*>(zeros) + plan.src_c; }
  T* scale() const { return bias() + p.groups * plan.column_tiles * width; }

  void pack() const {
    const S* weight = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    // The filters of a group are columns going forward and depth going back.
    int64_t column_stride = plan.input_grad ? st.c : st.k, depth_stride = plan.merge_taps ? 0 : plan.input_grad ? st.k : st.c;
    int64_t tap_stride = plan.merge_taps || st.r != p.s * st.s ? 0 : st.s, taps = plan.taps, depth = plan.depth;
    int64_t filters_of_group = p.k / p.groups, channels_of_group = p.c / p.groups;
    bool run = !plan.input_grad && st.c == 1 && st.s == channels_of_group && st.r == p.s * st.s && depth % Operand<X>::kDepth == 0;
    if (run) depth *= taps, taps = depth_stride = 1;  // a filter lies as a column of the panel does
    int64_t piece_of_depth = max_of<int64_t>(16, kPackedRun / taps / 2 * 2), pieces = ceil_div(depth, piece_of_depth);
    parallel(pool, p.groups * plan.column_tiles * pieces, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t piece = i % pieces * piece_of_depth, tile = i / pieces % plan.column_tiles, group = i / pieces / plan.column_tiles;
        int64_t first = tile * width, columns = min_of(width, plan.group_columns - first);
        const S* from = weight + group * filters_of_group * st.k + first * column_stride;
        X* panel = panels + (group * plan.column_tiles + tile) * panel_size;
        pack_panel(panel, taps, piece, min_of(depth, piece + piece_of_depth), depth, width, columns, column_stride, depth_stride, tap_stride,
                   [&](int64_t tap, int64_t d) {
                     if (run) return from + d;
                     if (plan.merge_taps) return from + tap * st.r + d / p.c * st.s + d % p.c * st.c;
                     return from + tap / p.s * st.r + tap % p.s * st.s + d * depth_stride;
                   });
      }
    });
    fill_zero(zeros, plan.src_c);
    auto pad = [&](T* to, auto&& value) {
      for (int64_t group = 0; group < p.groups; ++group)
        for (int64_t j = 0; j < plan.column_tiles * width; ++j)
          to[group * plan.column_tiles * width + j] = j < plan.group_columns ? value(group * plan.group_columns + j) : T(0);
    };
    if (a.bias != nullptr) pad(bias(), [&](int64_t channel) { return bias_of<S>(a, channel); });
    if (a.scale != nullptr) pad(scale(), [&](int64_t channel) { return static_cast<const T*>(a.scale)[channel]; });
  }

  // Pointers, taps and destinations of the tiles of one block. A tile whose rows are all clear of the padding has one
  // pointer a row, and the taps' offsets from it, the same for all such tiles, serve it: tap_count is -1.
  template <class D> struct Table {
    const X** rows;       // [tile][taps][MR]
    D** dst;              // [tile][MR]
    int64_t* tap_count;   // [tile]
    int32_t* taps;        // [tile][taps]
    int64_t *none, *all;  // [taps]: zeros; offsets of all taps
    int64_t* across;      // [filter columns]: source columns of one pixel
    int32_t* every;       // [taps]: 0, 1, 2 …
  };

  template <class D> Table<D> table_of(int thread) const {
    char* at = ws + plan.tables.offset + thread * plan.table_bytes;
    int64_t tiles = plan.tiles_per_block;
    auto take = [&](int64_t bytes) { char* here = at; at += bytes; return here; };
    Table<D> t;
    t.rows = reinterpret_cast<const X**>(take(tiles * plan.taps * plan.rows * 8));
    t.dst = reinterpret_cast<D**>(take(tiles * plan.rows * 8));
    t.tap_count = reinterpret_cast<int64_t*>(take(tiles * 8));
    t.none = reinterpret_cast<int64_t*>(take(plan.taps * 8));
    t.all = reinterpret_cast<int64_t*>(take(plan.taps * 8));
    t.across = reinterpret_cast<int64_t*>(take(p.s * 8));
    t.taps = reinterpret_cast<int32_t*>(take(tiles * plan.taps * 4));
    t.every = reinterpret_cast<int32_t*>(take(plan.taps * 4));
    int64_t columns = plan.merge_taps ? 1 : p.s;
    for (int64_t tap = 0; tap < plan.taps; ++tap) {
      t.none[tap] = 0;
      t.all[tap] = (tap / columns * p.dilation_h * plan.staged_w + tap % columns * p.dilation_w) * plan.src_c;
      t.every[tap] = int32_t(tap);
    }
    return t;
  }

  template <class D> void fill_table(const Table<D>& t, const X* src, D* dst, int64_t images, int64_t first_pixel, int64_t pixels) const {
    Cursor at{plan.dst_h, plan.dst_w, plan.input_grad ? p.stride_h : 1, plan.input_grad ? p.stride_w : 1, plan.across_images ? images : 0, 0, 0, 0, 0, 0};
    at.seek(first_pixel);
    int64_t image_size = plan.staged_h * plan.staged_w * plan.src_c, row_size = plan.staged_w * plan.src_c;
    int64_t MR = plan.rows, dst_step = plan.blocks_dst ? width : plan.dst_c;
    auto place = [&](int64_t i, const Cursor& of) { return plan.blocks_dst ? dst + i * width : dst + ((of.image * plan.dst_h + of.h) * plan.dst_w + of.w) * plan.dst_c; };
    // Forward: the first tap's source is at (h * stride - top, w * stride - left), the last one `reach` further.
    int64_t top = plan.merge_taps ? 0 : p.pad_top, left = plan.merge_taps ? 0 : p.pad_left;
    int64_t reach_h = (p.r - 1) * p.dilation_h, reach_w = plan.merge_taps ? 0 : (p.s - 1) * p.dilation_w;
    for (int64_t tile = 0; tile * MR < pixels; ++tile) {
      const X** rows = t.rows + tile * plan.taps * MR;
      int64_t valid = min_of(MR, pixels - tile * MR);
      if (!plan.input_grad && !plan.across_images) {
        Cursor start = at;
        bool clear = true;
        for (int64_t m = 0; m < valid;) {  // neighbours of a row at a time
          int64_t run = min_of(valid - m, plan.dst_w - at.w), step = p.stride_w * plan.src_c;
          int64_t y = at.h * p.stride_h - top, x = at.w * p.stride_w - left;
          clear &= y >= 0 && x >= 0 && y + reach_h < plan.staged_h && x + (run - 1) * p.stride_w + reach_w < plan.staged_w;
          const X* from = src + at.image * image_size + y * row_size + x * plan.src_c;
          D* to = place(tile * MR + m, at);
          for (int64_t j = 0; j < run; ++j, ++m, from += step, to += dst_step) rows[m] = from, t.dst[tile * MR + m] = to;
          if ((at.w += run) < plan.dst_w) continue;
          at.w = 0;
          if (++at.h == plan.dst_h) at.h = 0, ++at.image;
        }
        if (clear) {
          for (int64_t m = valid; m < MR; ++m) rows[m] = rows[0];
          t.tap_count[tile] = -1;
          continue;
        }
        at = start;
      }
      uint64_t used[4] = {};  // which taps have a row outside the padding; enough for 256 taps
      for (int64_t m = 0; m < valid; ++m, at.next()) {
        t.dst[tile * MR + m] = place(tile * MR + m, at);
        const X* image = src + at.image * image_size;
        for (int64_t s = 0; s < p.s; ++s)
          t.across[s] = source(at.w, s, p.stride_w, p.pad_left, p.dilation_w, plan.src_w, plan.input_grad);
        for (int64_t r = 0; r < p.r; ++r) {
          int64_t y = source(at.h, r, p.stride_h, p.pad_top, p.dilation_h, plan.src_h, plan.input_grad);
          for (int64_t s = 0; s < p.s; ++s) {
            int64_t tap = r * p.s + s, x = t.across[s];
            bool padding = y < 0 || x < 0;
            rows[tap * MR + m] = padding ? zeros : image + y * row_size + x * plan.src_c;
            if (!padding) used[tap >> 6 & 3] |= uint64_t(1) << (tap & 63);
          }
        }
      }
      // The last tile of a block may be short: its spare rows compute what row 0 does and store nothing.
      for (int64_t tap = 0; valid < MR && tap < plan.taps; ++tap)
        for (int64_t m = valid; m < MR; ++m) rows[tap * MR + m] = rows[tap * MR];
      int64_t count = 0;
      for (int64_t tap = 0; tap < plan.taps; ++tap)
        if (plan.taps > 256 || (used[tap >> 6] >> (tap & 63) & 1)) {
          if (count != tap)
            for (int64_t m = 0; m < MR; ++m) rows[count * MR + m] = rows[tap * MR + m];
          t.taps[tile * plan.taps + count++] = int32_t(tap);
        }
      t.tap_count[tile] = count;
    }
  }

  // Where a contiguous output is copied block by block: a thread's block, [pixel][width] of one column tile.
  T* block_of(int thread) const { return staged_dst + thread * (plan.block_bytes / int64_t(sizeof(T))); }

  // Calls f(where, done, n) for the runs within an image of pixels [first, first + count), counted from image `first_image`:
  // n pixels from `where` on, of the output's plane `channel`, after `done` others.
  template <class F> CONVKIT_INLINE void each_run(int64_t first_image, int64_t first, int64_t count, int64_t channel, F&& f) const {
    int64_t hw = plan.dst_h * plan.dst_w;
    for (int64_t done = 0, n; done < count; done += n) {
      int64_t image = (first + done) / hw, at = (first + done) % hw;
      n = min_of(hw - at, count - done);
      f(static_cast<S*>(a.dst) + ((first_image + image) * plan.dst_c + channel) * hw + at, done, n);
    }
  }

  // `dst`: the chunk's first pixel; not for blocks. `residual`: of dst's type and order, or null. `finish`: what is done when
  // a block is copied to the output.
  template <class D, class Finish = AsItIs>
  void compute(const X* src, D* dst, const D* residual, bool relu, int64_t first_image, int64_t images, Finish finish = {}) const {
    int64_t pixels = images * plan.dst_h * plan.dst_w, block_pixels = plan.tiles_per_block * plan.rows;
    int64_t blocks = ceil_div(pixels, block_pixels), columns = p.groups * plan.column_tiles;
    RowsTileFn<X, D> kernel = rows_tile_for<X, D>(plan.vectors);
    bool streamed = plan.stream && plan.group_columns % kLine<D> == 0 && width % kLine<D> == 0 && streamable(dst);
    parallel(pool, blocks * columns, [&](int64_t begin, int64_t end, int thread) {
      Table<D> table = table_of<D>(thread);
      D* to = plan.blocks_dst ? reinterpret_cast<D*>(block_of(thread)) : dst;
      int64_t in_table = -1;
      for (int64_t i = begin; i < end; ++i) {
        int64_t block = i / columns, group = i % columns / plan.column_tiles, tile_column = i % plan.column_tiles;
        int64_t first = block * block_pixels, count = min_of(block_pixels, pixels - first);
        if (block != in_table) fill_table(table, src, to, images, first, count);
        in_table = block;
        RowsTile<X, D> tile;
        tile.depth = plan.depth;
        tile.chain = plan.chain;
        tile.row_offset = plan.merge_taps ? 0 : group * src_channels_of_group;
        tile.panel = panels + (group * plan.column_tiles + tile_column) * panel_size;
        int64_t channel = group * plan.group_columns + tile_column * width;
        tile.dst_offset = plan.blocks_dst ? 0 : channel;
        tile.columns = int(min_of(width, plan.group_columns - tile_column * width));
        int64_t padded_column = (group * plan.column_tiles + tile_column) * width;
        tile.scale = a.scale == nullptr ? nullptr : scale() + padded_column;
        tile.bias = a.bias == nullptr ? nullptr : bias() + padded_column;
        tile.residual = residual, tile.origin = dst;
        tile.relu = relu;
        tile.streamed = streamed;
        tile.ahead = plan.across_images ? 0 : plan.rows * plan.src_c * (plan.input_grad ? 1 : p.stride_w);
        int64_t hw = plan.dst_h * plan.dst_w, channels_a_tile = ceil_div(tile.columns * plan.rows, count);
        for (int64_t t = 0; t * plan.rows < count; ++t) {
          // A line of the output is a wait for memory: those of a few channels are asked for with every tile of the block.
          for (int64_t c = t * channels_a_tile; plan.blocks_dst && c < min_of<int64_t>(tile.columns, (t + 1) * channels_a_tile); ++c)
            each_run(first_image, first, count, channel + c, [&](const S* line, int64_t, int64_t n) {
              for (int64_t j = 0; j < n; j += kLine<S>) __builtin_prefetch(line + j, 1);
            });
          tile.rows = table.rows + t * plan.taps * plan.rows;
          bool clear = table.tap_count[t] < 0;
          tile.rows_step = clear ? 0 : plan.rows;
          tile.offsets = clear ? table.all : table.none;
          tile.taps = clear ? table.every : table.taps + t * plan.taps;
          tile.tap_count = clear ? plan.taps : table.tap_count[t];
          tile.dst = table.dst + t * plan.rows;
          tile.valid_rows = int(min_of<int64_t>(plan.rows, count - t * plan.rows));
          kernel(tile);
        }
        if (plan.blocks_dst)
          each_run(first_image, first, count, channel, [&](S* plane, int64_t done, int64_t n) {
            transpose_block(block_of(thread) + done * width, width, plane, hw, n, tile.columns, false, finish);
          });
      }
      if (streamed) fence();
    });
  }

  void run() const {
    pack();
    for (int64_t first = 0; first < plan.images; first += plan.images_per_chunk) {
      int64_t images = min_of(plan.images_per_chunk, plan.images - first);
      const X* src = staged_src;
      if (plan.stage_src)
        stage_images(pool, static_cast<const S*>(a.src), {plan.src_h, plan.src_w, plan.src_c, p.layout}, first, images,
                     plan.merge_taps ? p.pad_top : 0, plan.merge_taps ? p.pad_left : 0, plan.staged_h, plan.staged_w, staged_src);
      else
        src = reinterpret_cast<const X*>(a.src) + first * plan.src_h * plan.src_w * plan.src_c;
      if (plan.stage_dst) {
        with_residual<S>(a, [&](auto finish) {
          compute<T>(src, staged_dst, nullptr, a.relu && a.residual == nullptr, first, images, finish);
          if (plan.blocks_dst) return;
          unstage_images(pool, staged_dst, {plan.dst_h, plan.dst_w, plan.dst_c, p.layout}, static_cast<S*>(a.dst), first, images, finish);
        });
      } else {
        int64_t at = first * plan.dst_h * plan.dst_w * plan.dst_c;
        compute<S>(src, static_cast<S*>(a.dst) + at, a.residual == nullptr ? nullptr : static_cast<const S*>(a.residual) + at, a.relu, first, images);
      }
    }
  }
};

}  // namespace

void conv_rows(const ConvArgs& a, const Pool& pool) {
#if defined(CONVKIT_DOTS)
  if (a.plan.rows.dots) return Rows<bf16, bf16>(a, pool).run();
#endif
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Rows<S, compute_t<S>>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
