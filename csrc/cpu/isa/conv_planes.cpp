// Forward and input gradient where a group has few output channels, or few input channels that are planes already: vectors
// of pixels instead of vectors of channels.
//
// With 3 channels to compute, 13 of 16 lanes of a vector of channels would be idle. Here a lane is a pixel of a row: the
// sums of MC channels x NV vectors of neighbouring pixels stay in registers, each step loads NV vectors of a source row and
// broadcasts MC weights. 3 x 8 and 8 x 3 fill AVX-512's registers: 11 loads for 24 multiply-adds; 3 x 3 and 5 x 2 fit
// 16: 7 loads for 10.
// A task copies its part of the source to planes with zeros around them, columns sorted by their remainder modulo the
// stride, so that neighbouring outputs read neighbouring memory whatever the stride, and rows of the same phase see the
// same taps: the vectors of a tile come from as many rows as it takes to fill it.
#include "../kernels.h"
#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

// X: what products are of. Of bf16 a source channel is a pair of channels, and T, float, is four bytes of their values.
template <class X> struct PlanesTile {
  using T = compute_t<X>;
  const T* x;
  const int64_t *from, *to;  // each vector's offset from x, without the taps', and from out
  int64_t channels, plane;   // source channels, and elements from one to the next
  const int64_t* offsets;    // of the taps
  const int32_t* taps;       // their numbers
  int64_t tap_count;
  const X* weights;          // [source channel][tap][MC]
  int64_t weights_of_channel;
  int64_t chain;             // source channels summed before they are added to a total
  T* out;
  int64_t out_stride;        // elements from channel to channel
};

template <class X, int MC, int NV> __attribute__((noinline)) void planes_tile(const PlanesTile<X>& a) {
  using T = compute_t<X>;
  using O = Operand<X>;
  vec<T> total[MC][NV] = {};
  for (int64_t first = 0; first < a.channels; first += a.chain) {
    vec<T> sum[MC][NV];
    CONVKIT_UNROLL for (int m = 0; m < MC; ++m)
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = vec<T>{};
    int64_t last = min_of(a.channels, first + a.chain);
    for (int64_t c = first; c < last; ++c) {
      const T* plane = a.x + c * a.plane;
      const X* weights = a.weights + c * a.weights_of_channel;
      for (int64_t t = 0; t < a.tap_count; ++t) {
        const T* x = plane + a.offsets[t];
        const X* w = weights + a.taps[t] * MC * O::kDepth;
        vec<T> pixels[NV];
        CONVKIT_UNROLL for (int v = 0; v < NV; ++v) pixels[v] = held(load(x + a.from[v]));
        CONVKIT_UNROLL for (int m = 0; m < MC; ++m) {
          vec<T> wm = O::row(w + m * O::kDepth);
          CONVKIT_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = O::multiply_add(sum[m][v], wm, pixels[v]);
        }
      }
    }
    CONVKIT_UNROLL for (int m = 0; m < MC; ++m)
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) total[m][v] += sum[m][v];
  }
  CONVKIT_UNROLL for (int m = 0; m < MC; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) store(a.out + m * a.out_stride + a.to[v], total[m][v]);
}

template <class X> using PlanesTileFn = void (*)(const PlanesTile<X>&);

// Channels of a tile at most, and vectors of pixels that fit the registers beside MC channels.
constexpr int kTileChannels = kVectorBytes == 64 ? 8 : 5;
template <int MC> constexpr int kPlanesVectors = min_of(8, (kVectorBytes == 64 ? 24 : 10) / MC);

template <class X, int MC, int NV = kPlanesVectors<MC>> PlanesTileFn<X> planes_tile_of(int vectors) {
  if constexpr (NV == 1) return planes_tile<X, MC, 1>;
  else return vectors >= NV ? planes_tile<X, MC, NV> : planes_tile_of<X, MC, NV - 1>(vectors);
}
template <class X, int MC = kTileChannels> PlanesTileFn<X> planes_tile_for(int channels, int vectors) {
  if constexpr (MC == 1) return planes_tile_of<X, 1>(vectors);
  else return channels == MC ? planes_tile_of<X, MC>(vectors) : planes_tile_for<X, MC - 1>(channels, vectors);
}
template <int MC = kTileChannels> int most_vectors(int channels) {
  if constexpr (MC == 1) return kPlanesVectors<1>;
  else return channels == MC ? kPlanesVectors<MC> : most_vectors<MC - 1>(channels);
}

template <class S, class X> struct Planes {
  using T = compute_t<X>;
  static constexpr int L = kLanes<T>, G = Operand<X>::kDepth;  // G: source channels of a step
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const PlanesPlan& plan = a.plan.planes;
  char* ws = static_cast<char*>(a.workspace);
  X* weights = reinterpret_cast<X*>(ws + plan.weights.offset);  // [group][tile][source channel / G][r][s][channel of the tile][G]
  int64_t src_h = plan.input_grad ? p.p : p.h, src_w = plan.input_grad ? p.q : p.w, src_c = plan.input_grad ? p.k : p.c;
  int64_t dst_h = plan.input_grad ? p.h : p.p, dst_w = plan.input_grad ? p.w : p.q, dst_c = plan.input_grad ? p.c : p.k;
  int64_t src_cg = src_c / p.groups, dst_cg = dst_c / p.groups, taps = p.r * p.s;
  // Forward, neighbouring outputs are a stride apart in the source; going back, a stride apart in the destination.
  int64_t sorted = plan.input_grad ? 1 : p.stride_w, phases = plan.input_grad ? min_of(p.stride_w, dst_w) : 1;
  int64_t row_size = sorted * plan.columns;
  // Rows of a contiguous output are written together where no vector reaches beyond one. What is streamed is whole lines.
  bool together = p.layout == Layout::nchw && phases == 1 && plan.outputs == dst_w;
  int64_t in_order = together ? gcd(plan.rows_per_task, dst_h) * dst_w : dst_w;  // values that follow each other
  bool streamed = plan.stream && streamable(a.dst) && (p.layout == Layout::nchw ? in_order * int64_t(sizeof(S)) % 64 == 0 : kLine<S> == L && dst_c % L == 0 && plan.bundle * dst_cg % L == 0);

  Planes(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  void pack() const {
    const S* from = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    int64_t source_stride = plan.input_grad ? st.k : st.c, stride = plan.input_grad ? st.c : st.k;
    int64_t filters_of_group = p.k / p.groups;
    parallel(pool, p.groups * src_cg, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const S* filter = from + i / src_cg * filters_of_group * st.k + i % src_cg * source_stride;
        for (int64_t first = 0; first < dst_cg; first += kTileChannels) {
          int64_t channels = min_of<int64_t>(kTileChannels, dst_cg - first);
          X* to = weights + (i / src_cg * dst_cg + first) * src_cg * taps + i % src_cg / G * G * taps * channels + i % G;
          for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t m = 0; m < channels; ++m, to += G) put(to, get(filter + tap / p.s * st.r + tap % p.s * st.s + (first + m) * stride));
        }
      }
    });
  }

  // Where column x (from -plan.left on) of a staged row stands.
  int64_t place(int64_t x) const { return sorted == 1 ? x + plan.left : (x + plan.left) % sorted * plan.columns + (x + plan.left) / sorted; }

  // A row of the image, `step` elements from pixel to pixel, to its places.
  template <class From> void sort(From line, int64_t step, T* to) const {
    for (int64_t first = 0; first < min_of(sorted, src_w); ++first) {
      T* at = to + place(first);
      for (int64_t x = first; x < src_w; x += sorted) *at++ = get(line + x * step);
    }
  }

  // G neighbouring channels of a contiguous image: of its pixels, and of one pixel where they lie together.
  auto planes_at(const S* from) const {
    if constexpr (G == 1) return from;
    else return Pairs{from, src_h * src_w};
  }
  auto pixels_at(const S* from) const {
    if constexpr (G == 1) return from;
    else return reinterpret_cast<const T*>(from);
  }

  // Rows [first, first + plan.rows) of channels [channel, channel + channels) -> planes[channel / G][row][place]. What is
  // left and right of the image is zero already.
  void stage(const S* image, int64_t channel, int64_t channels, int64_t first, T* planes) const {
    int64_t plane = plan.rows * row_size;
    for (int64_t i = 0; i < plan.rows; ++i) {
      T* to = planes + i * row_size;
      if (first + i < 0 || first + i >= src_h) {
        for (int64_t c = 0; c < channels / G; ++c) fill_zero(to + c * plane, row_size);
        continue;
      }
      if (p.layout == Layout::nchw) {
        for (int64_t c = 0; c < channels / G; ++c) {
          auto line = planes_at(image + ((channel + c * G) * src_h + first + i) * src_w);
          if (sorted == 1) copy_values(line, to + c * plane + plan.left, src_w);
          else sort(line, 1, to + c * plane);
        }
      } else {
        const S* line = image + (first + i) * src_w * src_c + channel;
        // The next bundle is beside this one, in lines too far apart for the hardware to see a stream in them.
        for (int64_t x = 0; x < src_w; ++x)
          for (int64_t c = channels; c < 2 * channels; c += 64 / int64_t(sizeof(S))) __builtin_prefetch(line + x * src_c + c, 0, 2);
        auto steps = pixels_at(line);
        if (sorted == 1) transpose_block(steps, src_c / G, to + plan.left, plane, src_w, channels / G);
        else for (int64_t c = 0; c < channels / G; ++c) sort(steps + c, src_c / G, to + c * plane);
      }
    }
  }

  template <class Finish> void write(const T* out, S* to, int64_t values, Finish finish) const {
    if constexpr (sizeof(S) == sizeof(T))
      if (streamed) {
        for (int64_t j = 0; j < values; j += L) stream(to + j, finish(load(out + j), to + j, L));
        return;
      }
    copy_values(out, to, values, finish);
  }

  // Rows out[channel][row][phase][plan.outputs] to rows [first, last) of the destination.
  template <class Finish> void emit(const T* out, S* image, int64_t channel, int64_t channels, int64_t first, int64_t last, Finish finish) const {
    int64_t row = phases * plan.outputs, channel_size = plan.rows_per_task * row;
    if (together) {
      for (int64_t m = 0; m < channels; ++m) write(out + m * channel_size, image + ((channel + m) * dst_h + first) * dst_w, (last - first) * dst_w, finish);
      return;
    }
    for (int64_t i = first; i < last; ++i, out += row) {
      if (phases == 1 && p.layout == Layout::nhwc) {
        transpose_block(out, channel_size, image + i * dst_w * dst_c + channel, dst_c, channels, dst_w, streamed, finish);
        continue;
      }
      for (int64_t m = 0; m < channels; ++m) {
        bool nchw = p.layout == Layout::nchw;
        S* to = image + (nchw ? ((channel + m) * dst_h + i) * dst_w : i * dst_w * dst_c + channel + m);
        int64_t step = nchw ? 1 : dst_c;
        if (phases == 1) {
          write(out + m * channel_size, to, dst_w, finish);
          continue;
        }
        for (int64_t phase = 0; phase < phases; ++phase)
          for (int64_t q = 0, w = phase; w < dst_w; ++q, w += phases) put(to + w * step, out[m * channel_size + phase * plan.outputs + q]);
      }
    }
  }

  // Rows [first, last) of `channels` of a group: phase by phase, vectors of all rows of a phase in turn.
  void compute(const T* planes, const X* weights, int64_t channels, int64_t first, int64_t last, T* out, int64_t* offsets, int32_t* numbers) const {
    int64_t most = most_vectors(int(channels)), out_row = phases * plan.outputs, phases_h = plan.input_grad ? p.stride_h : 1;
    PlanesTile<X> tile;
    int64_t from[8], to[8];
    tile.x = planes, tile.from = from, tile.to = to;
    tile.channels = src_cg / G, tile.plane = plan.rows * row_size;
    tile.offsets = offsets, tile.taps = numbers;
    tile.weights = weights;
    tile.weights_of_channel = taps * channels * G;
    tile.out = out, tile.out_stride = plan.rows_per_task * out_row;
    for (int64_t i = first; i < min_of(last, first + phases_h); ++i)
      for (int64_t phase = 0; phase < phases; ++phase) {
        Taps down = taps_at(i, p.r, p.stride_h, p.pad_top, p.dilation_h, plan.input_grad);
        Taps across = taps_at(phase, p.s, p.stride_w, p.pad_left, p.dilation_w, plan.input_grad);
        tile.tap_count = 0;
        for (int64_t r = 0; r < down.count; ++r)
          for (int64_t s = 0; s < across.count; ++s) {
            offsets[tile.tap_count] = (down.source + r * down.source_step - source_row(first)) * row_size + place(across.source + s * across.source_step);
            numbers[tile.tap_count++] = int32_t((down.first + r * down.step) * p.s + across.first + s * across.step);
          }
        tile.chain = sizeof(T) == 8 ? src_cg : max_of<int64_t>(1, plan.chain / max_of<int64_t>(1, tile.tap_count));
        int64_t of_row = ceil_div(ceil_div(dst_w - phase, phases), L), all = of_row * ceil_div(last - i, phases_h);
        int64_t row_step = (plan.input_grad ? 1 : p.stride_h) * row_size;
        int64_t tiles = ceil_div(all, most), row = 0, column = 0;
        for (int64_t t = 0; t < tiles; ++t) {
          int64_t count = all * (t + 1) / tiles - all * t / tiles;
          for (int64_t v = 0; v < count; ++v) {
            from[v] = row * row_step + column;
            to[v] = (i - first + row * phases_h) * out_row + phase * plan.outputs + column;
            if ((column += L) == of_row * L) column = 0, ++row;
          }
          planes_tile_for<X>(int(channels), int(count))(tile);
        }
      }
  }

  // First source row that output row i reaches, in the image or above it.
  int64_t source_row(int64_t i) const {
    if (!plan.input_grad) return i * p.stride_h - p.pad_top;
    return floor_div(i + p.pad_top - p.dilation_h * (p.r - 1), p.stride_h);
  }

  void run() const {
    pack();
    int64_t pieces = ceil_div(dst_h, plan.rows_per_task), plane = plan.rows * row_size;
    int64_t out_channel = plan.rows_per_task * phases * plan.outputs;
    parallel(pool, p.n * pieces, [&](int64_t begin, int64_t end, int thread) {
      T* planes = reinterpret_cast<T*>(ws + plan.scratch.offset + thread * plan.scratch_bytes);
      T* out = planes + plan.bundle * src_cg / G * plane;
      int64_t* offsets = reinterpret_cast<int64_t*>(out + plan.bundle * dst_cg * out_channel);
      int32_t* numbers = reinterpret_cast<int32_t*>(offsets + taps);
      fill_zero(planes, plan.bundle * src_cg / G * plane);
      for (int64_t task = begin; task < end; ++task) {
        int64_t image = task / pieces, first = task % pieces * plan.rows_per_task, last = min_of(dst_h, first + plan.rows_per_task);
        const S* src = static_cast<const S*>(a.src) + image * src_h * src_w * src_c;
        S* dst = static_cast<S*>(a.dst) + image * dst_h * dst_w * dst_c;
        for (int64_t group = 0; group < p.groups; group += plan.bundle) {
          int64_t groups = min_of(plan.bundle, p.groups - group);
          stage(src, group * src_cg, groups * src_cg, source_row(first), planes);
          for (int64_t g = 0; g < groups; ++g)
            for (int64_t m = 0; m < dst_cg; m += kTileChannels)
              compute(planes + g * src_cg / G * plane, weights + ((group + g) * dst_cg + m) * src_cg * taps, min_of<int64_t>(kTileChannels, dst_cg - m), first,
                      last, out + (g * dst_cg + m) * out_channel, offsets, numbers);
          affine(out, group * dst_cg, groups * dst_cg);
          with_residual<S>(a, [&](auto finish) { emit(out, dst, group * dst_cg, groups * dst_cg, first, last, finish); });
        }
      }
      if (streamed) fence();
    });
  }

  // Scale, bias, and ReLU where no residual comes before it.
  void affine(T* out, int64_t channel, int64_t channels) const {
    bool clamp = a.relu && a.residual == nullptr;
    if (a.scale == nullptr && a.bias == nullptr && !clamp) return;
    int64_t channel_size = plan.rows_per_task * phases * plan.outputs;
    for (int64_t m = 0; m < channels; ++m) {
      T scale = a.scale == nullptr ? T(1) : static_cast<const T*>(a.scale)[channel + m];
      T shift = a.bias == nullptr ? T(0) : bias_of<S>(a, channel + m);
      for (int64_t j = 0; j < channel_size; j += L) {
        vec<T> v = load(out + m * channel_size + j) * broadcast(scale) + broadcast(shift);
        store(out + m * channel_size + j, clamp ? relu<T>(v) : v);
      }
    }
  }
};

}  // namespace

void conv_planes(const ConvArgs& a, const Pool& pool) {
#if defined(CONVKIT_DOTS)
  if (a.plan.planes.dots) return Planes<bf16, bf16>(a, pool).run();
#endif
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Planes<S, compute_t<S>>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
