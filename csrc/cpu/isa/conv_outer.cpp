// Weight gradient: dw[k][tap][c] = sum over output pixels of dy[pixel][k] * x[source(pixel, tap)][c].
//
// A tile of the gradient, MR filters x NV vectors of channels for one tap, is held in registers while a block of pixels
// streams by: each step broadcasts MR neighbouring values of dy and loads NV vectors of x, nothing is gathered or packed.
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

// Three nested runs of pixels; strides in elements of dy and of x.
struct Runs {
  int64_t count[3];
  int64_t grad_stride[3], x_stride[3];

  // Runs that continue each other become one longer run: a 1x1 convolution is a single run of all pixels.
  void merge() {
    for (int again = 0; again < 2; ++again)
      for (int inner = 2; inner > 0; --inner) {
        int outer = inner - 1;
        if (count[inner] == 1) {
          grad_stride[inner] = grad_stride[outer], x_stride[inner] = x_stride[outer];
        } else if (count[outer] != 1 && (grad_stride[outer] != count[inner] * grad_stride[inner] ||
                                         x_stride[outer] != count[inner] * x_stride[inner])) {
          continue;
        }
        count[inner] *= count[outer];
        count[outer] = 1;
      }
  }
};

template <class T> struct OuterTile {
  Runs runs;
  const T *grad, *x;
  T* sums;           // [MR][row stride]
  int64_t row_stride;
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
        T* sum = a.sums + m * a.row_stride + v * L;
        store(sum, load(sum) + acc[m][v]);
        acc[m][v] = vec<T>{};
      }
    chain = 0;
  };
  int64_t grad_step = a.runs.grad_stride[2], x_step = a.runs.x_stride[2];
  // The last pixel's last vector may end beyond the tensor, so a partial vector is loaded as one.
  bool whole = a.tail == L;
  for (int64_t i = 0; i < a.runs.count[0]; ++i)
    for (int64_t j = 0; j < a.runs.count[1]; ++j) {
      const T* grad = a.grad + i * a.runs.grad_stride[0] + j * a.runs.grad_stride[1];
      const T* x = a.x + i * a.runs.x_stride[0] + j * a.runs.x_stride[1];
      for (int64_t done = 0; done < a.runs.count[2];) {
        int64_t piece = min_of(a.chain, a.runs.count[2] - done);
        if (chain + piece > a.chain && chain > 0) flush();
        chain += piece;
        done += piece;
        if (whole) {
          for (int64_t k = 0; k < piece; ++k, grad += grad_step, x += x_step) {
            vec<T> lane[NV];
            CONVKIT_UNROLL for (int v = 0; v < NV; ++v) lane[v] = load(x + v * L);
            CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
              vec<T> g = broadcast(grad[m]);
              CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] += g * lane[v];
            }
          }
        } else {
          for (int64_t k = 0; k < piece; ++k, grad += grad_step, x += x_step) {
            vec<T> lane[NV];
            CONVKIT_UNROLL for (int v = 0; v < NV - 1; ++v) lane[v] = load(x + v * L);
            lane[NV - 1] = load_n(x + (NV - 1) * L, a.tail);
            CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
              vec<T> g = broadcast(grad[m]);
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
  T* sums = reinterpret_cast<T*>(ws + plan.sums.offset);  // [k][tap][depth_padded]
  T* staged_x = reinterpret_cast<T*>(ws + plan.x.offset);
  T* staged_grad = reinterpret_cast<T*>(ws + plan.grad.offset);

  Outer(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  void block(const T* grad, const T* x, int64_t images, int64_t first_row, int64_t last_row) const {
    constexpr int L = kLanes<T>;
    int64_t grad_row = p.q * p.k, x_row = plan.staged_w * p.c;
    int64_t taps_wide = plan.merge_taps ? 1 : p.s, width = int64_t(plan.vectors) * L;
    int64_t channels_of_group = p.c / p.groups;
    parallel(pool, p.groups * plan.row_tiles * plan.taps * plan.column_tiles, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t column = i % plan.column_tiles, tap = i / plan.column_tiles % plan.taps;
        int64_t row_tile = i / plan.column_tiles / plan.taps % plan.row_tiles, group = i / plan.column_tiles / plan.taps / plan.row_tiles;
        int64_t r = tap / taps_wide, s = tap % taps_wide;
        Range rows{first_row, last_row}, columns{0, p.q};
        int64_t y0 = r * p.dilation_h, x0 = s * p.dilation_w;
        if (!plan.merge_taps) {
          y0 -= p.pad_top, x0 -= p.pad_left;
          Range valid = inside(p.p, p.stride_h, y0, p.h);
          rows = {max_of(rows.begin, valid.begin), min_of(rows.end, valid.end)};
          columns = inside(p.q, p.stride_w, x0, p.w);
        }
        if (rows.begin >= rows.end || columns.begin >= columns.end) continue;

        int64_t first_filter = row_tile * plan.rows, filters = min_of<int64_t>(plan.rows, plan.group_rows - first_filter);
        int64_t first_depth = column * width, depth = min_of(width, plan.depth - first_depth);
        int vectors = int(ceil_div(depth, L));
        OuterTile<T> tile;
        tile.runs = {{images, rows.end - rows.begin, columns.end - columns.begin},
                     {p.p * grad_row, grad_row, p.k},
                     {plan.staged_h * x_row, p.stride_h * x_row, p.stride_w * p.c}};
        tile.runs.merge();
        tile.grad = grad + rows.begin * grad_row + columns.begin * p.k + group * plan.group_rows + first_filter;
        tile.x = x + (rows.begin * p.stride_h + y0) * x_row + (columns.begin * p.stride_w + x0) * p.c + group * channels_of_group + first_depth;
        tile.chain = plan.chain;
        tile.row_stride = plan.taps * plan.depth_padded;
        tile.sums = sums + (group * plan.group_rows + first_filter) * tile.row_stride + tap * plan.depth_padded + first_depth;
        tile.tail = int(depth - (vectors - 1) * L);
        auto kernel = vectors == 1 ? outer_tile_for<T, 1>(int(filters)) : outer_tile_for<T, 2>(int(filters));
        kernel(tile);
      }
    });
  }

  void write() const {
    S* dst = static_cast<S*>(a.dst);
    const WeightStrides& st = a.weight_strides;
    int64_t channels_of_group = p.c / p.groups;
    parallel(pool, p.k, [&](int64_t begin, int64_t end, int) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t tap = 0; tap < p.r * p.s; ++tap) {
          int64_t r = tap / p.s, s = tap % p.s;
          const T* from = sums + k * plan.taps * plan.depth_padded +
                          (plan.merge_taps ? r * plan.depth_padded + s * p.c : tap * plan.depth_padded);
          S* to = dst + k * st.k + r * st.r + s * st.s;
          for (int64_t c = 0; c < channels_of_group; ++c) put(to + c * st.c, from[c]);
        }
    });
  }

  void run() const {
    fill_zero(sums, p.k * plan.taps * plan.depth_padded);
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
