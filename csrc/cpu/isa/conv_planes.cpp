// Forward and input gradient where a group has few output channels: vectors of pixels instead of vectors of channels.
//
// With 3 channels to compute, 13 of 16 lanes of a vector of channels would be idle. Here a lane is a pixel of a row: the
// sums of MC channels x NV vectors of neighbouring pixels stay in registers, each step loads NV vectors of a source row and
// broadcasts MC weights. 3 x 8 and 8 x 3 fill AVX-512's registers: 11 loads for 24 multiply-adds.
// A task copies its part of the source to planes with zeros around them, columns sorted by their remainder modulo the
// stride, so that neighbouring outputs read neighbouring memory whatever the stride.
#include "../kernels.h"
#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

template <class T> struct PlanesTile {
  const T* x;                // first output's source, without the taps' offsets
  int64_t channels, plane;   // source channels, and elements from one to the next
  const int64_t* offsets;    // of the taps that are inside
  const int32_t* taps;       // their numbers
  int64_t tap_count;
  const T* weights;          // [source channel][tap][MC]
  int64_t weights_of_channel;
  int64_t chain;             // source channels summed before they are added to a total
  T* out;                    // [MC][out_stride]
  int64_t out_stride;
};

template <class T, int MC, int NV> __attribute__((noinline)) void planes_tile(const PlanesTile<T>& a) {
  constexpr int L = kLanes<T>;
  vec<T> total[MC][NV] = {};
  for (int64_t first = 0; first < a.channels; first += a.chain) {
    vec<T> sum[MC][NV];
    CONVKIT_UNROLL for (int m = 0; m < MC; ++m)
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = vec<T>{};
    int64_t last = min_of(a.channels, first + a.chain);
    for (int64_t c = first; c < last; ++c) {
      const T* plane = a.x + c * a.plane;
      const T* weights = a.weights + c * a.weights_of_channel;
      for (int64_t t = 0; t < a.tap_count; ++t) {
        const T* x = plane + a.offsets[t];
        const T* w = weights + a.taps[t] * MC;
        vec<T> pixels[NV];
        CONVKIT_UNROLL for (int v = 0; v < NV; ++v) pixels[v] = held(load(x + v * L));
        CONVKIT_UNROLL for (int m = 0; m < MC; ++m) {
          vec<T> wm = broadcast(w[m]);
          CONVKIT_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] += wm * pixels[v];
        }
      }
    }
    CONVKIT_UNROLL for (int m = 0; m < MC; ++m)
      CONVKIT_UNROLL for (int v = 0; v < NV; ++v) total[m][v] += sum[m][v];
  }
  CONVKIT_UNROLL for (int m = 0; m < MC; ++m)
    CONVKIT_UNROLL for (int v = 0; v < NV; ++v) store(a.out + m * a.out_stride + v * L, total[m][v]);
}

template <class T> using PlanesTileFn = void (*)(const PlanesTile<T>&);

// Vectors of pixels that fit the registers beside MC channels.
template <int MC> constexpr int kPlanesVectors = max_of(1, min_of(8, (kVectorBytes == 64 ? 24 : 10) / MC));

template <class T, int MC, int NV = kPlanesVectors<MC>> PlanesTileFn<T> planes_tile_of(int vectors) {
  if constexpr (NV == 1) return planes_tile<T, MC, 1>;
  else return vectors >= NV ? planes_tile<T, MC, NV> : planes_tile_of<T, MC, NV - 1>(vectors);
}
template <class T, int MC = kPlanesChannels> PlanesTileFn<T> planes_tile_for(int channels, int vectors) {
  if constexpr (MC == 1) return planes_tile_of<T, 1>(vectors);
  else return channels == MC ? planes_tile_of<T, MC>(vectors) : planes_tile_for<T, MC - 1>(channels, vectors);
}
template <int MC = kPlanesChannels> int most_vectors(int channels) {
  if constexpr (MC == 1) return kPlanesVectors<1>;
  else return channels == MC ? kPlanesVectors<MC> : most_vectors<MC - 1>(channels);
}

template <class S> struct Planes {
  using T = compute_t<S>;
  static constexpr int L = kLanes<T>;
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const PlanesPlan& plan = a.plan.planes;
  char* ws = static_cast<char*>(a.workspace);
  T* weights = reinterpret_cast<T*>(ws + plan.weights.offset);  // [group][source channel][r][s][channel]
  int64_t src_h = plan.input_grad ? p.p : p.h, src_w = plan.input_grad ? p.q : p.w, src_c = plan.input_grad ? p.k : p.c;
  int64_t dst_h = plan.input_grad ? p.h : p.p, dst_w = plan.input_grad ? p.w : p.q, dst_c = plan.input_grad ? p.c : p.k;
  int64_t src_cg = src_c / p.groups, dst_cg = dst_c / p.groups, taps = p.r * p.s;
  // Forward, neighbouring outputs are a stride apart in the source; going back, a stride apart in the destination.
  int64_t sorted = plan.input_grad ? 1 : p.stride_w, phases = plan.input_grad ? min_of(p.stride_w, dst_w) : 1;
  int64_t row_size = sorted * plan.columns;

  Planes(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  void pack() const {
    const S* from = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    int64_t source_stride = plan.input_grad ? st.k : st.c, stride = plan.input_grad ? st.c : st.k;
    int64_t filters_of_group = p.k / p.groups;
    parallel(pool, p.groups * src_cg, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const S* filter = from + i / src_cg * filters_of_group * st.k + i % src_cg * source_stride;
        T* to = weights + i * taps * dst_cg;
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t m = 0; m < dst_cg; ++m) *to++ = get(filter + tap / p.s * st.r + tap % p.s * st.s + m * stride);
      }
    });
  }

  // Where column x (from -plan.left on) of a staged row stands.
  int64_t place(int64_t x) const { return sorted == 1 ? x + plan.left : (x + plan.left) % sorted * plan.columns + (x + plan.left) / sorted; }

  // Rows [first, first + rows) of one group's source channels -> planes[channel][row][place].
  void stage(const S* image, int64_t group, int64_t first, int64_t rows, T* planes) const {
    fill_zero(planes, src_cg * plan.rows * row_size);
    int64_t plane = plan.rows * row_size;
    for (int64_t i = 0; i < rows; ++i) {
      T* to = planes + i * row_size;
      if (p.layout == Layout::nchw) {
        for (int64_t c = 0; c < src_cg; ++c) {
          const S* line = image + ((group * src_cg + c) * src_h + first + i) * src_w;
          if (sorted == 1) copy_values(line, to + c * plane + plan.left, src_w);
          else for (int64_t x = 0; x < src_w; ++x) to[c * plane + place(x)] = get(line + x);
        }
      } else {
        const S* line = image + (first + i) * src_w * src_c + group * src_cg;
        if (sorted == 1) transpose_block(line, src_c, to + plan.left, plane, src_w, src_cg);
        else for (int64_t x = 0; x < src_w; ++x)
          for (int64_t c = 0; c < src_cg; ++c) to[c * plane + place(x)] = get(line + x * src_c + c);
      }
    }
  }

  // A finished row, out[channel][phase][plan.outputs], to the destination.
  void emit(const T* out, S* image, int64_t group, int64_t i) const {
    int64_t channel_size = phases * plan.outputs;
    if (phases == 1 && p.layout == Layout::nhwc)
      return transpose_block(out, channel_size, image + i * dst_w * dst_c + group * dst_cg, dst_c, dst_cg, dst_w);
    for (int64_t m = 0; m < dst_cg; ++m) {
      bool nchw = p.layout == Layout::nchw;
      S* to = image + (nchw ? ((group * dst_cg + m) * dst_h + i) * dst_w : i * dst_w * dst_c + group * dst_cg + m);
      int64_t step = nchw ? 1 : dst_c;
      if (phases == 1) {
        copy_values(out + m * channel_size, to, dst_w);
        continue;
      }
      for (int64_t phase = 0; phase < phases; ++phase)
        for (int64_t q = 0, w = phase; w < dst_w; ++q, w += phases) put(to + w * step, out[m * channel_size + phase * plan.outputs + q]);
    }
  }

  void run() const {
    pack();
    int64_t pieces = ceil_div(dst_h, plan.rows_per_task), plane = plan.rows * row_size, channel_size = phases * plan.outputs;
    int most = most_vectors(int(dst_cg));
    parallel(pool, p.n * pieces, [&](int64_t begin, int64_t end, int thread) {
      char* scratch = ws + plan.scratch.offset + thread * plan.scratch_bytes;
      T* planes = reinterpret_cast<T*>(scratch);
      T* out = planes + src_cg * plane;
      int64_t* offsets = reinterpret_cast<int64_t*>(out + dst_cg * channel_size);
      int32_t* numbers = reinterpret_cast<int32_t*>(offsets + taps);
      for (int64_t task = begin; task < end; ++task) {
        int64_t image = task / pieces, first = task % pieces * plan.rows_per_task, last = min_of(dst_h, first + plan.rows_per_task);
        Range rows = source_rows(first, last);
        for (int64_t group = 0; group < p.groups; ++group) {
          stage(static_cast<const S*>(a.src) + image * src_h * src_w * src_c, group, rows.begin, rows.end - rows.begin, planes);
          PlanesTile<T> tile;
          tile.channels = src_cg, tile.plane = plane;
          tile.offsets = offsets, tile.taps = numbers;
          tile.weights = weights + group * src_cg * taps * dst_cg;
          tile.weights_of_channel = taps * dst_cg;
          tile.out_stride = channel_size;
          for (int64_t i = first; i < last; ++i) {
            Taps down = taps_at(i, p.r, p.stride_h, p.pad_top, p.dilation_h, plan.input_grad);
            Range inside_rows = inside(down.count, down.source_step, down.source - rows.begin, rows.end - rows.begin);
            for (int64_t phase = 0; phase < phases; ++phase) {
              Taps across = taps_at(phase, p.s, p.stride_w, p.pad_left, p.dilation_w, plan.input_grad);
              tile.tap_count = 0;
              for (int64_t r = inside_rows.begin; r < inside_rows.end; ++r)
                for (int64_t s = 0; s < across.count; ++s) {
                  offsets[tile.tap_count] = (down.source + r * down.source_step - rows.begin) * row_size + place(across.source + s * across.source_step);
                  numbers[tile.tap_count++] = int32_t((down.first + r * down.step) * p.s + across.first + s * across.step);
                }
              tile.chain = sizeof(T) == 8 ? src_cg : max_of<int64_t>(1, plan.chain / max_of<int64_t>(1, tile.tap_count));
              int64_t vectors = ceil_div(ceil_div(dst_w - phase, phases), L);
              int64_t tiles = ceil_div(vectors, most), width = ceil_div(vectors, tiles);
              for (int64_t v = 0; v < vectors; v += width) {
                tile.x = planes + v * L;
                tile.out = out + phase * plan.outputs + v * L;
                planes_tile_for<T>(int(dst_cg), int(min_of(width, vectors - v)))(tile);
              }
            }
            finish(out, group);
            emit(out, static_cast<S*>(a.dst) + image * dst_h * dst_w * dst_c, group, i);
          }
        }
      }
    });
  }

  void finish(T* out, int64_t group) const {
    if (a.bias == nullptr && !a.relu) return;
    int64_t channel_size = phases * plan.outputs;
    for (int64_t m = 0; m < dst_cg; ++m) {
      T shift = a.bias == nullptr ? T(0) : T(get(static_cast<const S*>(a.bias) + group * dst_cg + m));
      for (int64_t j = 0; j < channel_size; j += L) {
        vec<T> v = load(out + m * channel_size + j) + broadcast(shift);
        store(out + m * channel_size + j, a.relu ? relu<T>(v) : v);
      }
    }
  }

  // Source rows that outputs [begin, end) reach.
  Range source_rows(int64_t begin, int64_t end) const {
    int64_t reach = p.dilation_h * (p.r - 1);
    Range rows{begin * p.stride_h - p.pad_top, (end - 1) * p.stride_h - p.pad_top + reach + 1};
    if (plan.input_grad) {
      auto floor_div = [](int64_t x, int64_t y) { return x >= 0 ? x / y : -ceil_div(-x, y); };
      rows = {floor_div(begin + p.pad_top - reach, p.stride_h), floor_div(end - 1 + p.pad_top, p.stride_h) + 1};
    }
    rows = {max_of<int64_t>(0, rows.begin), max_of<int64_t>(0, min_of(rows.end, src_h))};
    return {rows.begin, max_of(rows.begin, rows.end)};
  }
};

}  // namespace

void conv_planes(const ConvArgs& a, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Planes<S>(a, pool).run(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
