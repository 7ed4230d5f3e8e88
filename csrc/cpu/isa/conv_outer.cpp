// Weight gradient: dw[k][tap][c] = sum over output pixels of dy[pixel][k] * x[source(pixel, tap)][c].
//
// A tile of the gradient, MR filters x NV vectors of channels for one tap, is held in registers while a block of pixels
// streams by: each step broadcasts MR neighbouring values of dy and loads NV vectors of x. Blocks are copied so that what
// a tile reads of them is contiguous: pixels a power of two apart would push each other out of the first-level cache.
// Where a vector of channels would be half empty, the taps of a filter row and their channels are one run of a padded copy
// of x, and its vectors are the columns. With very few channels the roles change too: MR values of that run are broadcast and
// NV vectors of filters loaded, from the gradient where it lies.
// 14 x 2 on AVX-512 (16 loads for 28 multiply-adds, 14 of them from one cache line), 6 x 2 with 16 registers.
// A task goes through its part of the pixels block by block, and copies a block no larger than half of a core's second-level
// cache before it is multiplied; tiles are kept between blocks in a float (double for f64) array of the task. How pixels are
// split, and so the order of every sum, is fixed by the problem alone; tiles may be dealt out to as many threads as there are.
#include "../kernels.h"
#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kOuterRows = 14;
#else
constexpr int kOuterRows = 6;
#endif

// Three nested runs of pixels; strides in elements of what is broadcast (rows of a tile) and what is loaded (columns).
struct Runs {
  int64_t count[3];
  int64_t row_stride[3], column_stride[3];

  // Runs that continue each other become one longer run: a 1x1 convolution is a single run of all pixels.
  void merge() {
    for (int again = 0; again < 2; ++again)
      for (int inner = 2; inner > 0; --inner) {
        int outer = inner - 1;
        if (count[inner] == 1) {
          row_stride[inner] = row_stride[outer], column_stride[inner] = column_stride[outer];
        } else if (count[outer] != 1 && (row_stride[outer] != count[inner] * row_stride[inner] ||
                                         column_stride[outer] != count[inner] * column_stride[inner])) {
          continue;
        }
        count[inner] *= count[outer];
        count[outer] = 1;
      }
  }
};

template <class T> struct OuterTile {
  Runs runs;
  const T *rows, *columns;
  T* sums;           // [MR][sums stride]
  int64_t sums_stride;
  int64_t chain;     // pixels summed before they are added to the sums
  int tail;          // valid lanes of the last vector
};

template <class T, int MR, int NV> __attribute__((noinline)) void outer_tile(const OuterTile<T>& a) {
  constexpr int L = kLanes<T>;
  vec<T> acc[MR][NV];
  CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = vec<T>{};
  int64_t chain = 0;
  auto flush = [&] {
    CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) {
        T* sum = a.sums + m * a.sums_stride + v * L;
        store(sum, load(sum) + acc[m][v]);
        acc[m][v] = vec<T>{};
      }
    chain = 0;
  };
  int64_t row_step = a.runs.row_stride[2], column_step = a.runs.column_stride[2];
  // The last pixel's last vector may end beyond the tensor, so a partial vector is loaded as one.
  bool whole = a.tail == L;
  for (int64_t i = 0; i < a.runs.count[0]; ++i)
    for (int64_t j = 0; j < a.runs.count[1]; ++j) {
      const T* row = a.rows + i * a.runs.row_stride[0] + j * a.runs.row_stride[1];
      const T* column = a.columns + i * a.runs.column_stride[0] + j * a.runs.column_stride[1];
      for (int64_t done = 0; done < a.runs.count[2];) {
        int64_t piece = min_of(a.chain, a.runs.count[2] - done);
        if (chain + piece > a.chain && chain > 0) flush();
        chain += piece;
        done += piece;
        if (whole) {
          for (int64_t k = 0; k < piece; ++k, row += row_step, column += column_step) {
            vec<T> lane[NV];
            CONVKIT_UNROLL for (int v = 0; v < NV; ++v) lane[v] = load(column + v * L);
            CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
              vec<T> g = broadcast(row[m]);
              CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] += g * lane[v];
            }
          }
        } else {
          for (int64_t k = 0; k < piece; ++k, row += row_step, column += column_step) {
            vec<T> lane[NV];
            CONVKIT_UNROLL for (int v = 0; v < NV - 1; ++v) lane[v] = load(column + v * L);
            lane[NV - 1] = load_n(column + (NV - 1) * L, a.tail);
            CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
              vec<T> g = broadcast(row[m]);
              CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] += g * lane[v];
            }
          }
        }
      }
    }
  flush();
}

template <class T> using OuterTileFn = void (*)(const OuterTile<T>&);

template <class T, int NV, int MR = kOuterRows> OuterTileFn<T> outer_tile_for(int rows) {
  if constexpr (MR == 1) return outer_tile<T, 1, NV>;
  else return rows == MR ? outer_tile<T, MR, NV> : outer_tile_for<T, NV, MR - 1>(rows);
}

template <class S> struct Outer {
  using T = compute_t<S>;
  static constexpr int L = kLanes<T>;
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const OuterPlan& plan = a.plan.outer;
  char* ws = static_cast<char*>(a.workspace);
  T* sums = reinterpret_cast<T*>(ws + plan.sums.offset);  // [split][group][tap][row value][columns_padded]
  int64_t width = int64_t(plan.vectors) * L;              // of a tile
  int64_t strips = ceil_div(p.p, plan.rows_per_block);    // blocks one below the other
  // Values of a pixel of staged x: a vector or two of channels, or all of a group (exchanged, there is one).
  int64_t panel_width() const { return plan.merge_taps ? p.c / p.groups : width; }

  Outer(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  // Some images' rows [row, last_row) of the gradient, and the rows [x_row, last_x_row) of x that its taps reach (of the
  // padded image when taps are merged).
  struct Block {
    int64_t image, images, row, last_row, x_row, last_x_row;
  };

  Block block_at(int64_t i) const {
    Block b;
    b.image = i / strips * plan.images_per_block, b.images = min_of(plan.images_per_block, p.n - b.image);
    b.row = i % strips * plan.rows_per_block, b.last_row = min_of(p.p, b.row + plan.rows_per_block);
    b.x_row = b.row * p.stride_h, b.last_x_row = (b.last_row - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
    if (!plan.merge_taps) {
      b.x_row = max_of<int64_t>(0, min_of(b.x_row - p.pad_top, p.h));
      b.last_x_row = max_of(b.x_row, min_of(b.last_x_row - p.pad_top, p.h));
    }
    return b;
  }

  // Tiles of rows [first, last), counted through the groups, of one split.
  void clear(int64_t split, int64_t first, int64_t last) const {
    for (int64_t unit = first; unit < last; ++unit)
      for (int64_t tap = 0; tap < plan.taps; ++tap) fill_zero(sums_at(split, unit, tap), rows_of(unit) * plan.columns_padded);
  }
  int64_t rows_of(int64_t unit) const { return min_of<int64_t>(plan.rows, plan.row_values - unit % plan.row_tiles * plan.rows); }
  T* sums_at(int64_t split, int64_t unit, int64_t tap) const {
    int64_t group = unit / plan.row_tiles, row_value = unit % plan.row_tiles * plan.rows;
    return sums + split * plan.sums_of_split + ((group * plan.taps + tap) * plan.row_values + row_value) * plan.columns_padded;
  }

  // Adds what a block has to give to the tiles of rows [first, last). x and grad are copies of the block in panels, x's from
  // the first tile's group on; exchanged, x[image][row][column][channel] and the gradient, where it lies or likewise.
  void compute(const Block& b, int64_t split, int64_t first, int64_t last, const T* grad, int64_t grad_image, const T* x) const {
    int64_t taps_wide = plan.merge_taps ? 1 : p.s;
    int64_t grad_pixel = plan.exchange ? p.k : plan.rows, x_pixel = panel_width();
    int64_t grad_row = p.q * grad_pixel, x_row = plan.staged_w * x_pixel, x_image = (b.last_x_row - b.x_row) * x_row;
    int64_t first_group = first / plan.row_tiles;
    for (int64_t group = first_group; group * plan.row_tiles < last; ++group)
      for (int64_t column_tile = 0; column_tile < plan.column_tiles; ++column_tile)
        for (int64_t tap = 0; tap < plan.taps; ++tap) {
          Range rows{b.row, b.last_row}, columns{0, p.q};
          int64_t y0 = tap / taps_wide * p.dilation_h, x0 = tap % taps_wide * p.dilation_w;
          if (!plan.merge_taps) {
            y0 -= p.pad_top, x0 -= p.pad_left;
            Range valid = inside(p.p, p.stride_h, y0, p.h);
            rows = {max_of(rows.begin, valid.begin), min_of(rows.end, valid.end)};
            columns = inside(p.q, p.stride_w, x0, p.w);
          }
          if (rows.begin >= rows.end || columns.begin >= columns.end) continue;
          int64_t column_value = column_tile * width, column_values = min_of(width, plan.column_values - column_value);
          int vectors = int(ceil_div(column_values, L));
          int64_t grad_at = (rows.begin - b.row) * grad_row + columns.begin * grad_pixel;
          int64_t x_at = (rows.begin * p.stride_h + y0 - b.x_row) * x_row + (columns.begin * p.stride_w + x0) * x_pixel;
          OuterTile<T> tile;
          tile.runs = {{b.images, rows.end - rows.begin, columns.end - columns.begin},
                       {grad_image, grad_row, grad_pixel},
                       {x_image, p.stride_h * x_row, p.stride_w * x_pixel}};
          if (plan.exchange)
            for (int d = 0; d < 3; ++d) std::swap(tile.runs.row_stride[d], tile.runs.column_stride[d]);
          tile.runs.merge();
          tile.tail = plan.exchange ? int(column_values - (vectors - 1) * L) : L;  // beyond a panel's values there are others
          tile.chain = plan.chain;
          tile.sums_stride = plan.columns_padded;
          // The tiles that share a panel of x are neighbours.
          for (int64_t unit = max_of(first, group * plan.row_tiles); unit < min_of(last, (group + 1) * plan.row_tiles); ++unit) {
            if (plan.exchange) {
              tile.rows = x + x_at + unit * plan.rows;
              tile.columns = grad + grad_at + column_value;
            } else {
              int64_t panel = plan.merge_taps ? group - first_group : (group - first_group) * plan.column_tiles + column_tile;
              tile.rows = grad + (unit - first) * b.images * grad_image + grad_at;
              tile.columns = x + panel * b.images * x_image + x_at + (plan.merge_taps ? column_value : 0);
            }
            tile.sums = sums_at(split, unit, tap) + column_value;
            auto kernel = vectors == 1 ? outer_tile_for<T, 1>(int(rows_of(unit))) : outer_tile_for<T, 2>(int(rows_of(unit)));
            kernel(tile);
          }
        }
  }

  // Rows [row, last) of images from `src` on -> panels[tile][image][row][staged column][width], tiles [first, last_tile)
  // counted through the groups, of which the last of each is filled up with zeros. Column `left` is the image's first; zero
  // around the image.
  void stage_panels(const S* src, Image image, int64_t images, int64_t row, int64_t last, int64_t left, int64_t staged_w, int64_t group_values,
                    int64_t tiles, int64_t first, int64_t last_tile, int64_t width, T* panels) const {
    constexpr int64_t kAhead = 4096 / sizeof(S);  // memory is fetched a page ahead
    int64_t rows = last - row, panel = images * rows * staged_w * width, hw = image.h * image.w;
    auto channel = [&](int64_t tile) { return tile / tiles * group_values + tile % tiles * width; };
    auto values = [&](int64_t tile) { return min_of(width, group_values - tile % tiles * width); };
    int64_t columns = min_of(image.w, staged_w - left), begin = max_of<int64_t>(0, row), end = min_of(image.h, last);
    bool whole_rows = staged_w == image.w && left == 0, covered = whole_rows && begin == row && end == last;
    for (int64_t tile = first; tile < last_tile; ++tile)
      if (values(tile) < width || !covered) fill_zero(panels + (tile - first) * panel, panel);
    // Pixels that are neighbours here and there.
    auto run = [&](const S* of, int64_t at, int64_t pixels, T* to) {
      if (image.layout == Layout::nchw) {
        for (int64_t tile = first; tile < last_tile; ++tile)
          transpose_block(of + channel(tile) * hw + at, hw, to + (tile - first) * panel, width, values(tile), pixels);
        return;
      }
      const S* from = of + at * image.c;
      for (int64_t j = 0; j < pixels; ++j, from += image.c, to += width) {  // in the order of the memory
        const S* here = from + channel(first);
        T* there = to;
        // Tiles follow each other through the groups; how many values they have left is counted, not divided.
        for (int64_t tile = first, left_in_group = group_values - first % tiles * width; tile < last_tile; ++tile, there += panel) {
          int64_t count = min_of(width, left_in_group);
          for (int64_t line = 0; line < count * int64_t(sizeof(S)); line += 64) __builtin_prefetch(reinterpret_cast<const char*>(here + kAhead) + line);
          copy_values(here, there, count);
          here += count, left_in_group -= count;
          if (left_in_group == 0) left_in_group = group_values;
        }
      }
    };
    for (int64_t i = 0; i < images && columns > 0 && begin < end; ++i, src += hw * image.c, panels += rows * staged_w * width) {
      if (whole_rows) run(src, begin * image.w, (end - begin) * image.w, panels + (begin - row) * staged_w * width);
      else
        for (int64_t y = begin; y < end; ++y) run(src, y * image.w, columns, panels + ((y - row) * staged_w + left) * width);
    }
  }

  // Block by block: copies what is near enough in the caches then for all tiles.
  void work(int64_t split, int64_t first, int64_t last, T* x, T* grad) const {
    clear(split, first, last);
    int64_t blocks = ceil_div(p.n, plan.images_per_block) * strips, grad_pixels = p.p * p.q, x_pixels = p.h * p.w;
    Image grad_shape{p.p, p.q, p.k, p.layout}, x_shape{p.h, p.w, p.c, p.layout};
    for (int64_t i = blocks * split / plan.splits; i < blocks * (split + 1) / plan.splits; ++i) {
      Block b = block_at(i);
      const S* src_grad = static_cast<const S*>(a.src) + b.image * grad_pixels * p.k;
      const S* src_x = static_cast<const S*>(a.x) + b.image * x_pixels * p.c;
      int64_t rows = b.last_row - b.row, x_rows = b.last_x_row - b.x_row;
      if (!plan.exchange) {
        int64_t first_group = first / plan.row_tiles, last_group = ceil_div(last, plan.row_tiles), tiles = plan.merge_taps ? 1 : plan.column_tiles;
        int64_t top = plan.merge_taps ? p.pad_top : 0, left = plan.merge_taps ? p.pad_left : 0;
        stage_panels(src_grad, grad_shape, b.images, b.row, b.last_row, 0, p.q, plan.row_values, plan.row_tiles, first, last, plan.rows, grad);
        stage_panels(src_x, x_shape, b.images, b.x_row - top, b.last_x_row - top, left, plan.staged_w, p.c / p.groups, tiles, first_group * tiles,
                     last_group * tiles, panel_width(), x);
        compute(b, split, first, last, grad, rows * p.q * plan.rows, x);
        continue;
      }
      for (int64_t j = 0; j < b.images * x_rows; ++j)
        stage_row(src_x + j / x_rows * x_pixels * p.c, x_shape, b.x_row + j % x_rows - p.pad_top, p.pad_left, plan.staged_w, x + j * plan.staged_w * p.c);
      if (!plan.stage_grad) {
        compute(b, split, first, last, reinterpret_cast<const T*>(src_grad) + b.row * p.q * p.k, grad_pixels * p.k, x);
        continue;
      }
      for (int64_t j = 0; j < b.images; ++j)
        stage_pixels(src_grad + j * grad_pixels * p.k, p.layout, grad_pixels, p.k, b.row * p.q, rows * p.q, 0, p.k, grad + j * rows * p.q * p.k, p.k);
      compute(b, split, first, last, grad, rows * p.q * p.k, x);
    }
  }

  void write() const {
    S* dst = static_cast<S*>(a.dst);
    const WeightStrides& st = a.weight_strides;
    int64_t channels_of_group = p.c / p.groups, filters_of_group = p.k / p.groups;
    parallel(pool, p.k, [&](int64_t begin, int64_t end, int) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t r = 0; r < p.r; ++r)
          for (int64_t s = 0; s < p.s; ++s) {
            int64_t tap = plan.merge_taps ? r : r * p.s + s, run = plan.merge_taps ? s * channels_of_group : 0;
            const T* from = plan.exchange ? sums + (tap * plan.row_values + run) * plan.columns_padded + k
                                          : sums + ((k / filters_of_group * plan.taps + tap) * plan.row_values + k % filters_of_group) * plan.columns_padded + run;
            int64_t step = plan.exchange ? plan.columns_padded : 1, c = 0;
            S* to = dst + k * st.k + r * st.r + s * st.s;
            if (step == 1 && st.c == 1)
              for (; c + L <= channels_of_group; c += L) {
                vec<T> sum = load(from + c);
                for (int64_t split = 1; split < plan.splits; ++split) sum += load(from + split * plan.sums_of_split + c);
                store(to + c, sum);
              }
            for (; c < channels_of_group; ++c) {
              T sum = from[c * step];
              for (int64_t split = 1; split < plan.splits; ++split) sum += from[split * plan.sums_of_split + c * step];
              put(to + c * st.c, sum);
            }
          }
    });
  }

  void run() const {
    int64_t units = p.groups * plan.row_tiles;
    parallel(pool, plan.splits * plan.parts, [&](int64_t begin, int64_t end, int thread) {
      T* x = reinterpret_cast<T*>(ws + plan.scratch.offset + thread * plan.scratch_bytes);
      T* grad = x + plan.x_elements;
      for (int64_t i = begin; i < end; ++i) {
        int64_t split = i / plan.parts, part = i % plan.parts;
        work(split, units * part / plan.parts, units * (part + 1) / plan.parts, x, grad);
      }
    });
    write();
  }
};

}  // namespace

void conv_outer(const ConvArgs& a, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Outer<S>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
