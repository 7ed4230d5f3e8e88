// Weight gradient: dw[k][tap][c] = sum over output pixels of dy[pixel][k] * x[source(pixel, tap)][c].
//
// A tile of the gradient, MR filters x NV vectors of channels for one tap, is held in registers while a block of pixels
// streams by: each step broadcasts MR neighbouring values of dy and loads NV vectors of x, nothing is gathered or packed.
// With few channels the roles change: MR neighbouring values of x (a filter row's taps and channels, which are one run of
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
  T* staged_x = reinterpret_cast<T*>(ws + plan.x.offset);
  T* staged_grad = reinterpret_cast<T*>(ws + plan.grad.offset);

  Outer(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  void block(const T* grad, const T* x, int64_t images, int64_t first_row, int64_t last_row) const {
    constexpr int L = kLanes<T>;
    int64_t grad_row = p.q * p.k, x_row = plan.staged_w * p.c;
    int64_t taps_wide = plan.merge_taps ? 1 : p.s, width = int64_t(plan.vectors) * L;
    int64_t tiles = p.groups * plan.row_tiles * plan.taps * plan.column_tiles;
    parallel(pool, plan.splits * tiles, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t split = i / tiles, column_tile = i % plan.column_tiles, tap = i / plan.column_tiles % plan.taps;
        int64_t row_tile = i / plan.column_tiles / plan.taps % plan.row_tiles;
        int64_t group = i % tiles / plan.column_tiles / plan.taps / plan.row_tiles;
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
        const T* grad_at = grad + rows.begin * grad_row + columns.begin * p.k;
        const T* x_at = x + (rows.begin * p.stride_h + y0) * x_row + (columns.begin * p.stride_w + x0) * p.c;
        Runs runs{{images, rows.end - rows.begin, columns.end - columns.begin},
                  {p.p * grad_row, grad_row, p.k},
                  {plan.staged_h * x_row, p.stride_h * x_row, p.stride_w * p.c}};
        OuterTile<T> tile;
        tile.runs = runs;
        tile.rows = grad_at + group * plan.row_values + row_value;
        tile.columns = x_at + group * plan.column_values + column_value;
        if (plan.merge_taps) {
          for (int d = 0; d < 3; ++d) tile.runs.row_stride[d] = runs.column_stride[d], tile.runs.column_stride[d] = runs.row_stride[d];
          tile.rows = x_at + row_value;
          tile.columns = grad_at + column_value;
        }
        tile.runs.merge();
        tile.chain = plan.chain;
        tile.sums_stride = plan.columns_padded;
        tile.sums = sums + split * plan.sums_of_split + ((group * plan.taps + tap) * plan.row_values + row_value) * plan.columns_padded + column_value;
        tile.tail = int(column_values - (vectors - 1) * L);
        auto kernel = vectors == 1 ? outer_tile_for<T, 1>(int(row_values)) : outer_tile_for<T, 2>(int(row_values));
        kernel(tile);
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
    for (int64_t first = 0; first < p.n; first += plan.images_per_chunk) {
      int64_t images = min_of(plan.images_per_chunk, p.n - first);
      const T* grad = staged_grad;
      const T* x = staged_x;
      if (plan.stage_grad)
        stage_images(pool, static_cast<const S*>(a.src), {p.p, p.q, p.k, p.layout}, first, images, 0, 0, p.p, p.q, staged_grad);
      else
        grad = reinterpret_cast<const T*>(a.src) + first * p.p * p.q * p.k;
      if (plan.stage_x)
        stage_images(pool, static_cast<const S*>(a.x), {p.h, p.w, p.c, p.layout}, first, images, plan.merge_taps ? p.pad_top : 0,
                     plan.merge_taps ? p.pad_left : 0, plan.staged_h, plan.staged_w, staged_x);
      else
        x = reinterpret_cast<const T*>(a.x) + first * p.h * p.w * p.c;
      for (int64_t row = 0; row < p.p; row += plan.rows_per_block)
        block(grad, x, images, row, min_of(p.p, row + plan.rows_per_block));
    }
    write();
  }
};

}  // namespace

void conv_outer(const ConvArgs& a, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Outer<S>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
