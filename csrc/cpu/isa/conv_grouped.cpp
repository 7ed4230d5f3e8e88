// Forward and input gradient in groups of few channels, 4, 8, 16 or 32 that go to as many, with filters three wide and stride 1
// or 2 (ResNeXt's, Xie et al. 2017, arXiv:1611.05431): vectors of neighbouring channels, of several groups where these are
// narrower.
//
// What a lane multiplies is a channel of its own group: channel i of each group of a source vector is spread over the
// lanes of its group, by one shuffle, or a broadcast where a vector has one group only, and then serves all three columns
// of the filter. The sums of up to 14 neighbouring pixels stay in registers: 1.2 shuffles for 3 multiply-adds.
// A task copies a line of channels of its rows, with zeros around them, so that tiles have no edges and the pixels, far
// apart in a channels-last image, lie side by side; contiguous planes are transposed by it.
// The input gradient is the forward pass of the flipped filter over a gradient with zeros between its rows and columns; those
// of stride 2 are not there: where the sources of a tile stand is known when it is compiled, and rows of zeros are left out.
#include "../kernels.h"
#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

constexpr int kWide = 3;  // columns of the filter

template <class T> struct GroupedTile {
  const T* x;        // source pixel under tap (0, 0) of the first output, at the first channel of its lanes' groups
  const T* weights;  // [filter row][channel of the group][kWide][lanes]
  T* out;
  int64_t pixel, row;  // elements from pixel to pixel, of source and output, and from filter row to filter row
  int64_t filter_row;  // elements from filter row to filter row of the weights
  int64_t filter_rows;
  int64_t width;       // channels of a group
};

// Columns, counted from the first tap of a tile's first output: source j stands at kSource * j + kFirst, output i at kOutput * i.
template <int source, int output, int first> struct Columns {
  static constexpr int kSource = source, kOutput = output, kFirst = first;
};

// Lane i: lane `channel` of the W lanes that i is one of.
template <int W, int channel, class V, int... I> CONVKIT_INLINE V channel_of_groups(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I / W * W + channel)...);
}

// Products of one channel of the groups with a filter row, for N pixels.
template <int N, class At, class T, class Spread> CONVKIT_INLINE void add_channel(vec<T>* sum, const T* weights, Spread&& spread) {
  vec<T> w[kWide];
  CONVKIT_UNROLL for (int s = 0; s < kWide; ++s) w[s] = held(load(weights + s * kLanes<T>));
  CONVKIT_UNROLL for (int j = 0; j <= ((N - 1) * At::kOutput + kWide - 1 - At::kFirst) / At::kSource; ++j) {
    vec<T> x = held(spread(j));
    CONVKIT_UNROLL for (int s = 0; s < kWide; ++s) {
      int at = At::kSource * j + At::kFirst - s;
      if (at >= 0 && at % At::kOutput == 0 && at / At::kOutput < N) sum[at / At::kOutput] += x * w[s];
    }
  }
}
template <int N, int W, class At, int channel = 0, class T> CONVKIT_INLINE void add_channels(vec<T>* sum, const T* x, int64_t pixel, const T* weights) {
  if constexpr (channel < W) {
    add_channel<N, At>(sum, weights + channel * kWide * kLanes<T>,
                       [&](int j) { return channel_of_groups<W, channel>(load(x + j * pixel), std::make_integer_sequence<int, kLanes<T>>{}); });
    add_channels<N, W, At, channel + 1>(sum, x, pixel, weights);
  }
}

// W: channels of a group, or 0 where they are whole vectors.
template <class T, int W, class At, int N> __attribute__((noinline)) void grouped_tile(const GroupedTile<T>& a) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kChain = 16;  // channels, 48 products, that are summed before they are added to the total
  vec<T> total[N] = {};
  for (int64_t r = 0; r < a.filter_rows; ++r)
    for (int64_t first = 0; first < (W > 0 ? 1 : a.width); first += kChain) {
      const T *x = a.x + r * a.row, *weights = a.weights + r * a.filter_row;
      vec<T> sum[N] = {};
      if constexpr (W > 0) add_channels<N, W, At>(sum, x, a.pixel, weights);
      else
        for (int64_t i = first; i < min_of(a.width, first + kChain); ++i)
          add_channel<N, At>(sum, weights + i * kWide * L, [&](int j) { return broadcast(x[j * a.pixel + i]); });
      CONVKIT_UNROLL for (int j = 0; j < N; ++j) total[j] += sum[j];
    }
  CONVKIT_UNROLL for (int j = 0; j < N; ++j) store(a.out + j * a.pixel, total[j]);
}

template <class T> using GroupedTileFn = void (*)(const GroupedTile<T>&);

template <class T, int W, class At> GroupedTileFn<T> grouped_tile_of(int64_t pixels) {
  switch (pixels) {
    case 4: return grouped_tile<T, W, At, 4>;
    case 7: return grouped_tile<T, W, At, 7>;
    case 8: return grouped_tile<T, W, At, 8>;
    default: return grouped_tile<T, W, At, 14>;
  }
}
template <class T, class At> GroupedTileFn<T> grouped_tile_at(int64_t width, int64_t pixels) {
  if constexpr (kLanes<T> > 4)
    if (width == 4) return grouped_tile_of<T, 4, At>(pixels);
  if constexpr (kLanes<T> > 8)
    if (width == 8) return grouped_tile_of<T, 8, At>(pixels);
  return grouped_tile_of<T, 0, At>(pixels);
}
template <class T> GroupedTileFn<T> grouped_tile_for(int64_t width, const GroupedPlan& plan) {
  if (plan.stride == 1) return grouped_tile_at<T, Columns<1, 1, 0>>(width, plan.tile);
  if (!plan.input_grad) return grouped_tile_at<T, Columns<1, 2, 0>>(width, plan.tile);
  return plan.odd ? grouped_tile_at<T, Columns<2, 1, 1>>(width, plan.tile) : grouped_tile_at<T, Columns<2, 1, 0>>(width, plan.tile);
}

template <class S> struct Grouped {
  using T = compute_t<S>;
  static constexpr int L = kLanes<T>;
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const GroupedPlan& plan = a.plan.grouped;
  char* ws = static_cast<char*>(a.workspace);
  T* weights = reinterpret_cast<T*>(ws + plan.weights.offset);  // [vector of channels][r][channel of the group][s][lanes]
  int64_t src_h = plan.input_grad ? p.p : p.h, src_w = plan.input_grad ? p.q : p.w;
  int64_t dst_h = plan.input_grad ? p.h : p.p, dst_w = plan.input_grad ? p.w : p.q;
  int64_t width = p.c / p.groups, filter = p.r * width * kWide * L, row = plan.columns * plan.channels;
  bool nhwc = p.layout == Layout::nhwc;
  bool streamed = plan.stream && nhwc && sizeof(S) == sizeof(T) && streamable(a.dst);

  Grouped(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  void pack() const {
    const S* from = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    parallel(pool, p.c / L, [&](int64_t begin, int64_t end, int) {
      for (int64_t channel = begin * L; channel < end * L; ++channel) {
        int64_t group = channel / width * width;
        T* to = weights + channel / L * filter + channel % L;
        for (int64_t r = 0; r < p.r; ++r)
          for (int64_t i = 0; i < width; ++i)
            for (int64_t s = 0; s < kWide; ++s, to += L)
              *to = plan.input_grad ? get(from + (group + i) * st.k + (channel - group) * st.c + (p.r - 1 - r) * st.r + (kWide - 1 - s) * st.s)
                                    : get(from + channel * st.k + i * st.c + r * st.r + s * st.s);
      }
    });
  }

  // Source rows [first, first + rows) of the channels from `channel` on. The next ones' are beside them, in lines too far
  // apart for the hardware to see a stream in them.
  void stage(const S* image, int64_t channel, int64_t first, int64_t rows, T* to) const {
    for (int64_t i = first; i < first + rows; ++i, to += row) {
      if (nhwc && i >= 0 && i < src_h && channel + plan.channels < p.c)
        for (int64_t x = 0; x < src_w; ++x) __builtin_prefetch(image + (i * src_w + x) * p.c + channel + plan.channels, 0, 2);
      stage_row(image, {src_h, src_w, p.c, p.layout}, i, plan.left, plan.columns, channel, plan.channels, to);
    }
  }

  // A row of sums to its place in the image, row i: scale, bias, and what else there is. Past the caches go whole lines, once
  // they are made.
  template <class Finish> void emit(T* out, S* image, int64_t i, int64_t channel, Finish finish) const {
    bool affine = a.scale != nullptr || a.bias != nullptr, clamp = a.relu && a.residual == nullptr;
    S* to = image + i * dst_w * p.c + channel;
    for (int64_t first = 0; first < plan.channels; first += L) {
      vec<T> scale = broadcast(T(1)), shift{};
      if (a.scale != nullptr) scale = load(static_cast<const T*>(a.scale) + channel + first);
      if (a.bias != nullptr) shift = a.scale != nullptr ? load(static_cast<const T*>(a.bias) + channel + first) : load(static_cast<const S*>(a.bias) + channel + first);
      for (int64_t q = 0; q < dst_w; ++q) {
        T* from = out + q * plan.channels + first;
        S* at = to + q * p.c + first;
        vec<T> v = load(from);
        if (affine) v = v * scale + shift;
        if (clamp) v = relu<T>(v);
        if (nhwc) v = finish(v, at, L);
        if (nhwc && !streamed) store(at, v);
        else store(from, v);
      }
    }
    if (!nhwc) return unstage_pixels(out, plan.channels, image, p.layout, dst_h * dst_w, p.c, i * dst_w, dst_w, channel, plan.channels, finish);
    if constexpr (sizeof(S) == sizeof(T))
      for (int64_t q = 0; streamed && q < dst_w; ++q)
        for (int64_t first = 0; first < plan.channels; first += kLine<S>) stream_line(to + q * p.c + first, out + q * plan.channels + first);
  }

  void run() const {
    pack();
    int64_t pieces = ceil_div(dst_h, plan.rows_per_task), of_groups = max_of<int64_t>(width, L);  // whole groups, whole vectors
    GroupedTileFn<T> tile_of_pixels = grouped_tile_for<T>(width, plan);
    int64_t up = plan.input_grad ? plan.stride : 1, down = plan.input_grad ? 1 : plan.stride;
    // The first tap of an output row that meets a source row, and the source row.
    auto tap_of = [&](int64_t i) { return up == 2 ? (i - plan.top) & 1 : 0; };
    auto source_of = [&](int64_t i) { return (i * down - plan.top + tap_of(i)) / up; };
    parallel(pool, p.n * pieces, [&](int64_t begin, int64_t end, int thread) {
      T* staged = reinterpret_cast<T*>(ws + plan.scratch.offset + thread * plan.scratch_bytes);
      T* out = staged + plan.rows * row;
      for (int64_t task = begin; task < end; ++task) {
        int64_t image = task / pieces, first = task % pieces * plan.rows_per_task, last = min_of(dst_h, first + plan.rows_per_task);
        const S* src = static_cast<const S*>(a.src) + image * src_h * src_w * p.c;
        S* dst = static_cast<S*>(a.dst) + image * dst_h * dst_w * p.c;
        for (int64_t channel = 0; channel < p.c; channel += plan.channels) {
          int64_t top = source_of(first);
          stage(src, channel, top, plan.source_rows(last - first), staged);
          for (int64_t i = first; i < last; ++i) {
            int64_t tap = tap_of(i), taps = ceil_div(p.r - tap, up), filter_row = filter / p.r;
            for (int64_t lanes = 0; lanes < plan.channels; lanes += L) {
              const T *x = staged + (source_of(i) - top) * row + lanes / of_groups * of_groups, *w = weights + (channel + lanes) / L * filter + tap * filter_row;
              for (int64_t q = 0; q < dst_w; q += plan.tile)
                tile_of_pixels({x + q * down / up * plan.channels, w, out + q * plan.channels + lanes, plan.channels, p.dilation_h * row, up * filter_row, taps, width});
            }
            with_residual<S>(a, [&](auto finish) { emit(out, dst, i, channel, finish); });
          }
        }
      }
      if (streamed) fence();
    });
  }
};

}  // namespace

void conv_grouped(const ConvArgs& a, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Grouped<S>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
