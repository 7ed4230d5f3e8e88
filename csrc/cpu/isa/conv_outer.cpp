// Weight gradient: dw[k][tap][c] = sum over output pixels of dy[pixel][k] * x[source(pixel, tap)][c].
//
// A tile of the gradient, MR filters x NV vectors of channels for one tap, is held in registers while a block of pixels
// streams by: each step broadcasts MR neighbouring values of dy and loads NV vectors of x. Blocks are copied so that what
// a tile reads of them is contiguous: pixels a power of two apart would push each other out of the first-level cache.
// With few channels nothing is copied but x, and the roles change: MR neighbouring values of x (a filter row's taps and channels, which are one run of
// a padded copy) are broadcast and NV vectors of filters loaded.
// 14 x 2 on AVX-512 (16 loads for 28 multiply-adds, 14 of them from one cache line), 6 x 2 with 16 registers.
// Blocks are small enough for a core's second-level cache; tiles are kept between blocks in a float (double for f64)
// array, each owned by one task at a time, so the order of every sum is fixed by the problem alone.
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
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const OuterPlan& plan = a.plan.outer;
  char* ws = static_cast<char*>(a.workspace);
  T* sums = reinterpret_cast<T*>(ws + plan.sums.offset);  // [split][group][tap][row value][columns_padded]
  T* staged_x = reinterpret_cast<T*>(ws + plan.x.offset);       // merged taps: images; else [column tile][image][row][w][width]
  T* staged_grad = reinterpret_cast<T*>(ws + plan.grad.offset);  // merged taps: images; else [row tile][image][row][q][rows]

  Outer(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  // Output rows [first_row, last_row) of some images. Merged taps: grad and x are whole images; else panels whose x starts
  // at row first_x of x_rows.
  void block(const T* grad, const T* x, int64_t images, int64_t first_row, int64_t last_row, int64_t first_x, int64_t x_rows) const {
    constexpr int L = kLanes<T>;
    int64_t taps_wide = plan.merge_taps ? 1 : p.s, width = int64_t(plan.vectors) * L;
    int64_t tiles = p.groups * plan.row_tiles * plan.taps * plan.column_tiles;
    int64_t grad_pixel = plan.merge_taps ? p.k : plan.rows, x_pixel = plan.merge_taps ? p.c : width;
    int64_t grad_row = p.q * grad_pixel, x_row = plan.staged_w * x_pixel;
    int64_t grad_image = (plan.merge_taps ? p.p : last_row - first_row) * grad_row, x_image = (plan.merge_taps ? plan.staged_h : x_rows) * x_row;
    parallel(pool, plan.splits * tiles, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        // The tiles that share a panel of x are neighbours.
        int64_t split = i / tiles, row_tile = i % plan.row_tiles, tap = i / plan.row_tiles % plan.taps;
        int64_t column_tile = i / plan.row_tiles / plan.taps % plan.column_tiles;
        int64_t group = i % tiles / plan.row_tiles / plan.taps / plan.column_tiles;
        int64_t r = tap / taps_wide, s = tap % taps_wide;
        Range rows{first_row + (last_row - first_row) * split / plan.splits, first_row + (last_row - first_row) * (split + 1) / plan.splits};
        Range columns{0, p.q};
        int64_t y0 = r * p.dilation_h, x0 = s * p.dilation_w;
        if (!plan.merge_taps) {
          y0 -= p.pad_top, x0 -= p.pad_left;
          Range valid = inside(p.p, p.stride_h, y0, p.h);
          rows = {max_of(rows.begin, valid.begin), min_of(rows.end, valid.end)};
          columns = inside(p.q, p.stride_w, x0, p.w);
        }
        if (rows.begin >= rows.end || columns.begin >= columns.end) continue;

        int64_t row_value = row_tile * plan.rows, column_value = column_tile * width;
        int64_t row_values = min_of<int64_t>(plan.rows, plan.row_values - row_value);
        int64_t column_values = min_of(width, plan.column_values - column_value);
        int vectors = int(ceil_div(column_values, L));
        int64_t grad_at = (rows.begin - (plan.merge_taps ? 0 : first_row)) * grad_row + columns.begin * grad_pixel;
        int64_t x_at = (rows.begin * p.stride_h + y0 - first_x) * x_row + (columns.begin * p.stride_w + x0) * x_pixel;
        Runs runs{{images, rows.end - rows.begin, columns.end - columns.begin},
                  {grad_image, grad_row, grad_pixel},
                  {x_image, p.stride_h * x_row, p.stride_w * x_pixel}};
        OuterTile<T> tile;
        tile.runs = runs;
        tile.tail = L;  // panels end in zeros
        if (plan.merge_taps) {
          for (int d = 0; d < 3; ++d) tile.runs.row_stride[d] = runs.column_stride[d], tile.runs.column_stride[d] = runs.row_stride[d];
          tile.rows = x + x_at + row_value;
          tile.columns = grad + grad_at + column_value;
          tile.tail = int(column_values - (vectors - 1) * L);
        } else {
          tile.rows = grad + (group * plan.row_tiles + row_tile) * images * grad_image + grad_at;
          tile.columns = x + (group * plan.column_tiles + column_tile) * images * x_image + x_at;
        }
        tile.runs.merge();
        tile.chain = plan.chain;
        tile.sums_stride = plan.columns_padded;
        tile.sums = sums + split * plan.sums_of_split + ((group * plan.taps + tap) * plan.row_values + row_value) * plan.columns_padded + column_value;
        auto kernel = vectors == 1 ? outer_tile_for<T, 1>(int(row_values)) : outer_tile_for<T, 2>(int(row_values));
        kernel(tile);
      }
    });
  }

  // Rows [first_row, first_row + rows) of some images -> panels[tile][image][row][column][width], the last of a group's
  // tiles filled up with zeros.
  void stage_panels(const S* src, Image image, int64_t images, int64_t first_row, int64_t rows, int64_t group_values, int64_t tiles,
                    int64_t width, T* panels) const {
    int64_t row_size = image.w * width, tile_size = images * rows * row_size, hw = image.h * image.w;
    parallel(pool, images * rows, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t group = 0; group < p.groups; ++group)
          for (int64_t tile = 0; tile < tiles; ++tile) {
            T* to = panels + (group * tiles + tile) * tile_size + i * row_size;
            int64_t values = min_of(width, group_values - tile * width);
            if (values < width) fill_zero(to, row_size);
            stage_pixels(src + i / rows * hw * image.c, image.layout, hw, image.c, (first_row + i % rows) * image.w, image.w,
                         group * group_values + tile * width, values, to, width);
          }
    });
  }

  void write() const {
    S* dst = static_cast<S*>(a.dst);
    const WeightStrides& st = a.weight_strides;
    int64_t channels_of_group = p.c / p.groups, filters_of_group = p.k / p.groups;
    parallel(pool, p.k, [&](int64_t begin, int64_t end, int) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t r = 0; r < p.r; ++r)
          for (int64_t s = 0; s < p.s; ++s) {
            const T* from = plan.merge_taps ? sums + (r * plan.row_values + s * p.c) * plan.columns_padded + k
                                            : sums + ((k / filters_of_group * plan.taps + r * p.s + s) * plan.row_values + k % filters_of_group) *
                                                         plan.columns_padded;
            int64_t step = plan.merge_taps ? plan.columns_padded : 1;
            S* to = dst + k * st.k + r * st.r + s * st.s;
            for (int64_t c = 0; c < channels_of_group; ++c) {
              T sum = from[c * step];
              for (int64_t split = 1; split < plan.splits; ++split) sum += from[split * plan.sums_of_split + c * step];
              put(to + c * st.c, sum);
            }
          }
    });
  }

  void run() const {
    fill_zero(sums, plan.splits * plan.sums_of_split);
    const S *all_grad = static_cast<const S*>(a.src), *all_x = static_cast<const S*>(a.x);
    for (int64_t first = 0; first < p.n; first += plan.images_per_chunk) {
      int64_t images = min_of(plan.images_per_chunk, p.n - first);
      const S *chunk_grad = all_grad + first * p.p * p.q * p.k, *chunk_x = all_x + first * p.h * p.w * p.c;
      if (plan.merge_taps) {
        const T* grad = reinterpret_cast<const T*>(chunk_grad);
        if (plan.stage_grad) {
          stage_images(pool, all_grad, {p.p, p.q, p.k, p.layout}, first, images, 0, 0, p.p, p.q, staged_grad);
          grad = staged_grad;
        }
        stage_images(pool, all_x, {p.h, p.w, p.c, p.layout}, first, images, p.pad_top, p.pad_left, plan.staged_h, plan.staged_w, staged_x);
        for (int64_t row = 0; row < p.p; row += plan.rows_per_block)
          block(grad, staged_x, images, row, min_of(p.p, row + plan.rows_per_block), 0, plan.staged_h);
        continue;
      }
      for (int64_t row = 0; row < p.p; row += plan.rows_per_block) {
        int64_t last = min_of(p.p, row + plan.rows_per_block), reach = (p.r - 1) * p.dilation_h;
        int64_t first_x = max_of<int64_t>(0, min_of(row * p.stride_h - p.pad_top, p.h));
        int64_t last_x = max_of(first_x, min_of((last - 1) * p.stride_h - p.pad_top + reach + 1, p.h));
        stage_panels(chunk_grad, {p.p, p.q, p.k, p.layout}, images, row, last - row, plan.row_values, plan.row_tiles, plan.rows, staged_grad);
        stage_panels(chunk_x, {p.h, p.w, p.c, p.layout}, images, first_x, last_x - first_x, plan.column_values, plan.column_tiles,
                     int64_t(plan.vectors) * kLanes<T>, staged_x);
        block(staged_grad, staged_x, images, row, last, first_x, last_x - first_x);
      }
    }
    write();
  }
};

}  // namespace

void conv_outer(const ConvArgs& a, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Outer<S>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
