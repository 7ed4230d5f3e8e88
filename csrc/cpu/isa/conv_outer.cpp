// Weight gradient: dw[k][tap][c] = sum over output pixels of dy[pixel][k] * x[source(pixel, tap)][c].
//
// A tile of the gradient, MR filters x NV vectors of channels for one tap, is held in registers while a block of pixels
// streams by: each step broadcasts MR neighbouring values of dy and loads NV vectors of x. Blocks are copied, with an odd
// number of cache lines from pixel to pixel: those a power of two apart would push each other out of the first-level cache.
// Meanwhile the tiles fetch what the next block will be copied from, or the copy would wait for memory.
// Where a vector of channels would be half empty, the taps of a filter row and their channels are one run of a padded copy
// of x, and its vectors are the columns. With very few channels the roles change too: MR values of that run are broadcast and
// NV vectors of filters loaded, from the gradient where it lies.
// 7 x 4 on AVX-512 (11 loads for 28 multiply-adds) where that leaves no vector empty, else 14 x 2 (16 loads, 14 of them from
// one or two cache lines); 6 x 2 with 16 registers.
// A task goes through its part of the pixels block by block, and copies a block no larger than half of a core's second-level
// cache before it is multiplied; tiles are kept between blocks in a float (double for f64) array of the task. How pixels are
// split, and so the order of every sum, is fixed by the problem alone; tiles may be dealt out to as many threads as there are.
#include "../kernels.h"
#include "rows_tile.h"
#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

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
  const char* ahead; // fetched meanwhile, one line a pixel
  int64_t ahead_step;
};

// kPairs: what lies in a float is a pair of bf16, of two pixels.
template <class T, bool kPairs, int MR, int NV> __attribute__((noinline)) void outer_tile(const OuterTile<T>& a) {
  using X = std::conditional_t<kPairs, bf16, T>;
  using O = Operand<X>;
  auto spread = [](const T* p) __attribute__((always_inline)) { return O::row(reinterpret_cast<const X*>(p)); };
  constexpr int L = kLanes<T>;
  vec<T> acc[MR][NV];
  CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = vec<T>{};
  CONVKIT_UNROLL for (int m = 0; m < MR; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(a.sums + m * a.sums_stride + v * L, 1);
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
  const char* ahead = a.ahead;
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
          for (int64_t k = 0; k < piece; ++k, row += row_step, column += column_step, ahead += a.ahead_step) {
            __builtin_prefetch(ahead, 0, 2);  // to the second-level cache
            vec<T> lane[NV];
            CONVKIT_UNROLL for (int v = 0; v < NV; ++v) lane[v] = load(column + v * L);
            CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
              vec<T> g = spread(row + m);
              CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = O::multiply_add(acc[m][v], g, lane[v]);
            }
          }
        } else {
          for (int64_t k = 0; k < piece; ++k, row += row_step, column += column_step) {
            vec<T> lane[NV];
            CONVKIT_UNROLL for (int v = 0; v < NV - 1; ++v) lane[v] = load(column + v * L);
            lane[NV - 1] = load_n(column + (NV - 1) * L, a.tail);
            CONVKIT_UNROLL for (int m = 0; m < MR; ++m) {
              vec<T> g = spread(row + m);
              CONVKIT_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = O::multiply_add(acc[m][v], g, lane[v]);
            }
          }
        }
      }
    }
  flush();
}

template <class T> using OuterTileFn = void (*)(const OuterTile<T>&);

template <class T, bool kPairs, int NV, int MR = kTileRows[NV]> OuterTileFn<T> outer_tile_for(int rows) {
  if constexpr (MR == 1) return outer_tile<T, kPairs, 1, NV>;
  else return rows == MR ? outer_tile<T, kPairs, MR, NV> : outer_tile_for<T, kPairs, NV, MR - 1>(rows);
}

// From: what blocks are copied from, the tensors, or pairs of values of one half of the images and of the other. The plan's
// problem has half the images then.
template <class S, class From> struct Outer {
  using T = compute_t<S>;
  static constexpr bool kPairs = !std::is_pointer_v<From>;
  static constexpr int L = kLanes<T>;
  const ConvArgs& a;
  const Pool& pool;
  const OuterPlan& plan = a.plan.outer;
  const ConvProblem& p = plan.problem;
  char* ws = static_cast<char*>(a.workspace);
  T* sums = reinterpret_cast<T*>(ws + plan.sums.offset);  // [split][group][tap][row value][columns_padded]
  int64_t width = int64_t(plan.vectors) * L;              // of a tile
  int64_t strips = ceil_div(p.p, plan.rows_per_block);    // blocks one below the other
  int64_t channels_of_group = p.c / p.groups;
  From x = images(a.x, a.problem.h * a.problem.w * p.c), grad = images(a.src, a.problem.p * a.problem.q * p.k);
  bool picked = plan.flat && (a.problem.p != a.problem.h || a.problem.q != a.problem.w);  // only the pixels of x that filters meet are copied

  Outer(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  From images(const void* tensor, int64_t size) const {
    const S* first = static_cast<const S*>(tensor);
    if constexpr (kPairs) return {first, a.problem.n / 2 * size};
    else return first;
  }

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

  // Tiles of rows [first, last), counted through the groups, of one split: their filters and groups.
  struct Part {
    int64_t first, last, filter, filters, group, groups;
  };

  Part part_at(int64_t part) const {
    int64_t units = p.groups * plan.row_tiles, first = units * part / plan.parts, last = units * (part + 1) / plan.parts;
    int64_t filter = plan.exchange ? 0 : row_value(first), end = plan.exchange ? p.k : row_value(last - 1) + rows_of(last - 1);
    int64_t group = first / plan.row_tiles;
    return {first, last, filter, end - filter, group, ceil_div(last, plan.row_tiles) - group};
  }
  int64_t rows_of(int64_t unit) const { return min_of<int64_t>(plan.rows, plan.row_values - unit % plan.row_tiles * plan.rows); }
  int64_t row_value(int64_t unit) const { return unit / plan.row_tiles * plan.row_values + unit % plan.row_tiles * plan.rows; }
  T* sums_at(int64_t split, int64_t unit, int64_t tap) const {
    int64_t group = unit / plan.row_tiles, row_value = unit % plan.row_tiles * plan.rows;
    return sums + split * plan.sums_of_split + ((group * plan.taps + tap) * plan.row_values + row_value) * plan.columns_padded;
  }
  void clear(int64_t split, const Part& part) const {
    for (int64_t unit = part.first; unit < part.last; ++unit)
      for (int64_t tap = 0; tap < plan.taps; ++tap) fill_zero(sums_at(split, unit, tap), rows_of(unit) * plan.columns_padded);
  }

  // Memory to be fetched: columns of lines, `step` bytes from one to the next below it.
  struct Ahead {
    const char* at = nullptr;
    int64_t step = 0, lines = 0, columns = 0, done = 0;  // done: lines of the first column

    // Where the next n lines are.
    const char* take(int64_t n) {
      const char* here = at + done * step;
      if ((done += n) >= lines) at += 64, --columns, done = 0;
      return here;
    }
  };
  static constexpr int kAhead = kPairs ? 4 : 2;

  // What channels [channel, channel + channels) of pixels [first, last), counted through images of hw pixels, are copied
  // from; nothing where that is not one run or one column after the other.
  Ahead ahead_of(const S* src, int64_t hw, int64_t c, int64_t first, int64_t last, int64_t channel, int64_t channels) const {
    bool nchw = p.layout == Layout::nchw;
    if (nchw && (first % hw != 0 || last % hw != 0 || (channels < c && last - first > hw))) return {};
    const char* at = reinterpret_cast<const char*>(src + first * c + channel * (nchw ? hw : 1));
    auto lines = [](int64_t values) { return ceil_div(values * int64_t(sizeof(S)), 64); };
    if (nchw || channels == c) return {at, 64, lines((last - first) * channels), 1};
    return {at, c * int64_t(sizeof(S)), last - first, lines(channels)};
  }

  // Adds what a block has to give to a part. x and grad are copies of it: x[panel][image][row][column][channel], where a
  // panel is a group when taps are merged, and the gradient likewise or where it lies. `ahead`: what the tiles fetch.
  void compute(const Block& b, int64_t split, const Part& part, const T* grad, int64_t grad_image, const T* x, Ahead* ahead) const {
    int64_t taps_wide = plan.merge_taps ? 1 : p.s, x_pixel = plan.x_pixel;
    int64_t grad_row = p.q * plan.grad_pixel, x_row = plan.staged_w * x_pixel, x_image = (b.last_x_row - b.x_row) * x_row;
    for (int64_t group = part.group; group < part.group + part.groups; ++group)
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
          const T* grad_at = grad + (rows.begin - b.row) * grad_row + columns.begin * plan.grad_pixel;
          const T* x_at = x + (group - part.group) * (plan.merge_taps ? b.images * x_image : channels_of_group) +
                          (rows.begin * p.stride_h + y0 - b.x_row) * x_row + (columns.begin * p.stride_w + x0) * x_pixel;
          OuterTile<T> tile;
          tile.runs = {{b.images, rows.end - rows.begin, columns.end - columns.begin},
                       {grad_image, grad_row, plan.grad_pixel},
                       {x_image, p.stride_h * x_row, p.stride_w * x_pixel}};
          if (plan.exchange)
            for (int d = 0; d < 3; ++d) std::swap(tile.runs.row_stride[d], tile.runs.column_stride[d]);
          tile.runs.merge();
          tile.tail = plan.exchange ? int(column_values - (vectors - 1) * L) : L;  // beyond a copy's values there are others
          tile.chain = plan.chain;
          tile.sums_stride = plan.columns_padded;
          // The tiles that share a run of x are neighbours.
          for (int64_t unit = max_of(part.first, group * plan.row_tiles); unit < min_of(part.last, (group + 1) * plan.row_tiles); ++unit) {
            tile.rows = plan.exchange ? x_at + unit * plan.rows : grad_at + row_value(unit) - part.filter;
            tile.columns = (plan.exchange ? grad_at : x_at) + column_value;
            tile.sums = sums_at(split, unit, tap) + column_value;
            tile.ahead = reinterpret_cast<const char*>(tile.sums), tile.ahead_step = 0;
            for (int i = 0; i < kAhead; ++i)
              if (ahead[i].columns > 0) {
                tile.ahead_step = ahead[i].step;
                tile.ahead = ahead[i].take(b.images * (rows.end - rows.begin) * (columns.end - columns.begin));
                break;
              }
            int tile_rows = int(rows_of(unit));
            auto kernel = vectors == 1   ? outer_tile_for<T, kPairs, 1>(tile_rows)
                          : vectors == 2 ? outer_tile_for<T, kPairs, 2>(tile_rows)
                                         : outer_tile_for<T, kPairs, kMaxVectors>(tile_rows);
            kernel(tile);
          }
        }
  }

  // Those pixels and channels -> to, pixel_stride values from pixel to pixel.
  void stage(From src, int64_t hw, int64_t c, int64_t first, int64_t last, int64_t channel, int64_t channels, T* to, int64_t pixel_stride) const {
    int64_t at_once = p.layout == Layout::nchw ? L : channels;  // few planes at a time are read as streams
    for (int64_t pixels; first < last; first += pixels, to += pixels * pixel_stride) {
      pixels = min_of(hw - first % hw, last - first);
      for (int64_t i = 0; i < channels; i += at_once)
        stage_pixels(src + (first / hw * hw * c), p.layout, hw, c, first % hw, pixels, channel + i, min_of(at_once, channels - i), to + i, pixel_stride);
    }
  }

  void stage_x(const Block& b, const Part& part, T* to) const {
    const ConvProblem& o = a.problem;
    int64_t channel = part.group * channels_of_group, channels = part.groups * channels_of_group, rows = b.last_x_row - b.x_row;
    if (picked)
      for (int64_t at = b.x_row, end; at < b.last_x_row; to += (end - at) * plan.x_pixel, at = end) {
        int64_t row = at / o.q;
        end = min_of((row + 1) * o.q, b.last_x_row);
        From from = x + ((row / o.p * o.h + row % o.p * o.stride_h) * o.w * o.c);
        stage_pixels(from, p.layout, o.q, o.stride_w * o.c, at % o.q, end - at, channel, channels, to, plan.x_pixel);
      }
    else if (plan.merge_taps)
      for (int64_t i = 0; i < b.images * rows; ++i, to += plan.staged_w * plan.x_pixel)
        for (int64_t group = 0; group < part.groups; ++group)
          stage_row(x + ((b.image + i / rows) * p.h * p.w * p.c), {p.h, p.w, p.c, p.layout}, b.x_row + i % rows - p.pad_top, p.pad_left,
                    plan.staged_w, channel + group * channels_of_group, channels_of_group, to + group * b.images * rows * plan.staged_w * plan.x_pixel);
    else
      for (int64_t image = b.image; image < b.image + b.images; ++image, to += rows * p.w * plan.x_pixel) {
        int64_t first = (image * p.h + b.x_row) * p.w;
        stage(x, o.h * o.w, p.c, first, first + rows * p.w, channel, channels, to, plan.x_pixel);
      }
  }

  // Block by block: copies what is near enough in the caches then for all tiles.
  void work(int64_t split, const Part& part, T* staged_x, T* staged_grad) const {
    clear(split, part);
    int64_t blocks = ceil_div(p.n, plan.images_per_block) * strips, end = blocks * (split + 1) / plan.splits;
    int64_t pq = a.problem.p * a.problem.q, hw = a.problem.h * a.problem.w;
    for (int64_t i = blocks * split / plan.splits; i < end; ++i) {
      Block b = block_at(i);
      int64_t first = (b.image * p.p + b.row) * p.q, pixels = ((b.images - 1) * p.p + b.last_row - b.row) * p.q;
      Ahead ahead[kAhead];
      if (i + 1 < end) {
        Block n = block_at(i + 1);
        auto pixels_of = [&](Ahead* to, From src, int64_t h, int64_t w, int64_t plane, int64_t c, int64_t row, int64_t last_row, int64_t channel,
                             int64_t channels) {
          int64_t begin = (n.image * h + max_of<int64_t>(0, row)) * w, last = ((n.image + n.images - 1) * h + min_of(h, last_row)) * w;
          if constexpr (kPairs) {
            to[0] = ahead_of(src.first, plane, c, begin, last, channel, channels);
            to[2] = ahead_of(src.first + src.second, plane, c, begin, last, channel, channels);
          } else {
            *to = ahead_of(src, plane, c, begin, last, channel, channels);
          }
        };
        int64_t top = plan.merge_taps ? p.pad_top : 0;
        pixels_of(ahead, grad, p.p, p.q, pq, p.k, n.row, n.last_row, part.filter, part.filters);
        if (!picked)
          pixels_of(ahead + 1, x, p.h, p.w, hw, p.c, n.x_row - top, n.last_x_row - top, part.group * channels_of_group, part.groups * channels_of_group);
      }
      stage_x(b, part, staged_x);
      if (plan.stage_grad) {
        stage(grad, pq, p.k, first, first + pixels, part.filter, part.filters, staged_grad, plan.grad_pixel);
        compute(b, split, part, staged_grad, pixels / b.images * plan.grad_pixel, staged_x, ahead);
      } else if constexpr (!kPairs) {
        compute(b, split, part, reinterpret_cast<const T*>(grad) + first * p.k, pq * p.k, staged_x, ahead);
      }
    }
  }

  void write() const {
    S* dst = static_cast<S*>(a.dst);
    const WeightStrides& st = a.weight_strides;
    int64_t filters_of_group = p.k / p.groups;
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
    parallel(pool, plan.splits * plan.parts, [&](int64_t begin, int64_t end, int thread) {
      T* staged_x = reinterpret_cast<T*>(ws + plan.scratch.offset + thread * plan.scratch_bytes);
      for (int64_t i = begin; i < end; ++i) work(i / plan.parts, part_at(i % plan.parts), staged_x, staged_x + plan.x_elements);
    });
    write();
  }
};

}  // namespace

void conv_outer(const ConvArgs& a, const Pool& pool) {
#if defined(CONVKIT_DOTS)
  if (a.plan.outer.dots) return Outer<bf16, Pairs>(a, pool).run();
#endif
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Outer<S, const S*>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
