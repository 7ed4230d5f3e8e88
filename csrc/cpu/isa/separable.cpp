// Depthwise -> scale, shift, ReLU -> pointwise -> scale, shift, ReLU in one pass: a block of pixels of the depthwise
// result is computed into the task's scratch, which stays in the core's cache, and is at once the operand of the matrix
// product. Any multiplier: a depthwise filter reads channel (filter / multiplier).
#include "../kernels.h"
#include "rows_tile.h"
#include "staging.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

constexpr int64_t kPixels = 126;  // of a task: 9 tiles of 14 rows, 14 of 9, 18 of 7, 21 of 6
constexpr int64_t kPixelsSlack = 16;

struct Sizes {
  int64_t width, tiles, panel, taps_wide, source, scratch, total;
  int vectors;
};

// Workspace in elements of the arithmetic's type.
template <class T> Sizes sizes(const SeparableArgs& a, int threads) {
  const ConvProblem& p = a.problem;
  Sizes s;
  constexpr int L = kLanes<T>;
  s.vectors = int(min_of<int64_t>(kMaxVectors, ceil_div(a.filters, L)));
  s.width = s.vectors * L;
  s.tiles = ceil_div(a.filters, s.width);
  s.panel = s.tiles * p.k * s.width;
  s.taps_wide = p.r * p.s * p.k;
  // Contiguous and 16-bit images are copied channels-last first.
  bool stage = storage_bytes(p.dtype) != int64_t(sizeof(T)) || (p.layout == Layout::nchw && p.c != 1 && p.h * p.w != 1);
  s.source = stage ? p.n * p.h * p.w * p.c : 0;
  s.scratch = (kPixels + kPixelsSlack) * (p.k + a.filters);
  s.total = s.panel + s.taps_wide + 2 * s.tiles * s.width + s.source + threads * s.scratch + 64;
  return s;
}

template <class S> void run(const SeparableArgs& a, const Pool& pool) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>;
  const ConvProblem& p = a.problem;
  Sizes z = sizes<T>(a, pool.threads);
  T* panels = static_cast<T*>(a.workspace);
  T* taps = panels + z.panel;            // [r][s][k]
  T* scale = taps + z.taps_wide;         // padded to whole tiles
  T* shift = scale + z.tiles * z.width;
  T* staged = shift + z.tiles * z.width;
  T* scratch = staged + z.source;
  int64_t multiplier = p.k / p.c, MR = kTileRows[z.vectors];

  const S* pointwise = static_cast<const S*>(a.pointwise_weight);
  for (int64_t tile = 0; tile < z.tiles; ++tile) {
    int64_t first = tile * z.width, columns = min_of(z.width, a.filters - first);
    pack_panel(panels + tile * p.k * z.width, 1, 0, p.k, p.k, z.width, columns, a.pointwise_strides.k, a.pointwise_strides.c, 0,
                  [&](int64_t, int64_t d) { return pointwise + first * a.pointwise_strides.k + d * a.pointwise_strides.c; });
  }
  const S* depthwise = static_cast<const S*>(a.depthwise_weight);
  const WeightStrides& st = a.depthwise_strides;
  for (int64_t t = 0; t < p.r * p.s; ++t)
    for (int64_t k = 0; k < p.k; ++k) taps[t * p.k + k] = get(depthwise + k * st.k + t / p.s * st.r + t % p.s * st.s);
  for (int64_t k = 0; k < z.tiles * z.width; ++k) {
    bool valid = k < a.filters;
    scale[k] = valid && a.scale != nullptr ? static_cast<const T*>(a.scale)[k] : T(1);
    shift[k] = valid && a.shift != nullptr ? static_cast<const T*>(a.shift)[k] : T(0);
  }
  const T* src = reinterpret_cast<const T*>(a.x);
  if (z.source > 0) {
    stage_images(pool, static_cast<const S*>(a.x), {p.h, p.w, p.c, p.layout}, 0, p.n, 0, 0, p.h, p.w, staged);
    src = staged;
  }

  int64_t pixels_of_image = p.p * p.q, pieces = ceil_div(pixels_of_image, kPixels);
  RowsTileFn<T, T> kernel = rows_tile_for<T, T>(z.vectors);
  parallel(pool, p.n * pieces, [&](int64_t begin, int64_t end, int thread) {
    T* middle = scratch + thread * z.scratch;               // [pixel][k]
    T* out = middle + (kPixels + kPixelsSlack) * p.k;       // [pixel][filters]
    for (int64_t task = begin; task < end; ++task) {
      int64_t image = task / pieces, first = task % pieces * kPixels, count = min_of(kPixels, pixels_of_image - first);
      const T* from = src + image * p.h * p.w * p.c;
      for (int64_t i = 0; i < count; ++i) {
        int64_t y0 = (first + i) / p.q * p.stride_h - p.pad_top, x0 = (first + i) % p.q * p.stride_w - p.pad_left;
        Range rows = inside(p.r, p.dilation_h, y0, p.h), columns = inside(p.s, p.dilation_w, x0, p.w);
        T* to = middle + i * p.k;
        for (int64_t k = 0; k < p.k; k += L) {
          int lanes = int(min_of<int64_t>(L, p.k - k));
          vec<T> sum{};
          for (int64_t r = rows.begin; r < rows.end; ++r)
            for (int64_t s = columns.begin; s < columns.end; ++s) {
              const T* pixel = from + ((y0 + r * p.dilation_h) * p.w + x0 + s * p.dilation_w) * p.c;
              vec<T> x;
              if (multiplier == 1) x = lanes == L ? load(pixel + k) : load_n(pixel + k, lanes);
              else for (int l = 0; l < L; ++l) x[l] = l < lanes ? pixel[(k + l) / multiplier] : T(0);
              const T* w = taps + (r * p.s + s) * p.k + k;
              sum += x * (lanes == L ? load(w) : load_n(w, lanes));
            }
          auto channel = [&](const void* of) { return lanes == L ? load(static_cast<const T*>(of) + k) : load_n(static_cast<const T*>(of) + k, lanes); };
          if (a.depthwise_scale != nullptr) sum *= channel(a.depthwise_scale);
          if (a.depthwise_shift != nullptr) sum += channel(a.depthwise_shift);
          if (a.depthwise_relu) sum = relu<T>(sum);
          if (lanes == L) store(to + k, sum);
          else store_n(to + k, sum, lanes);
        }
      }
      const int32_t tap = 0;
      const int64_t offset = 0;
      for (int64_t tile = 0; tile < z.tiles; ++tile)
        for (int64_t i = 0; i < count; i += MR) {
          const T* rows[kMaxTileRows];
          T* to[kMaxTileRows];
          for (int64_t m = 0; m < MR; ++m) rows[m] = middle + min_of(i + m, count - 1) * p.k, to[m] = out + (i + m) * a.filters;
          RowsTile<T, T> t;
          t.rows = rows;
          t.rows_step = 0;
          t.offsets = &offset;
          t.taps = &tap;
          t.tap_count = 1;
          t.depth = p.k;
          t.chain = sizeof(T) == 8 ? INT64_MAX / 2 : 32;
          t.row_offset = 0;
          t.panel = panels + tile * p.k * z.width;
          t.dst = to;
          t.dst_offset = tile * z.width;
          t.valid_rows = int(min_of(MR, count - i));
          t.columns = int(min_of(z.width, a.filters - tile * z.width));
          t.scale = a.scale == nullptr ? nullptr : scale + tile * z.width;
          t.bias = a.shift == nullptr ? nullptr : shift + tile * z.width;
          t.relu = a.relu;
          t.streamed = false;
          kernel(t);
        }
      unstage_pixels(out, a.filters, static_cast<S*>(a.y) + image * pixels_of_image * a.filters, p.layout, pixels_of_image, a.filters,
                     first, count, 0, a.filters);
    }
  });
}

}  // namespace

int64_t separable_workspace(const SeparableArgs& a, const Pool& pool) {
  return a.problem.dtype == DType::f64 ? sizes<double>(a, pool.threads).total * 8 : sizes<float>(a, pool.threads).total * 4;
}

void separable(const SeparableArgs& a, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { run<S>(a, pool); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
