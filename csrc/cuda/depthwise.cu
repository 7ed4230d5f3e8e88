// Depthwise convolution, all three passes. Bound by memory: each kernel stages a tile of its source in shared memory by
// 16-byte copies that pass by the registers, so that every element crosses the chip's border once (but for the rims of
// tiles, which the second-level cache has), and keeps sums and filter taps in registers.
//
//   channels_last: a thread has 16 bytes of channels and a strip of neighbouring output columns (fprop, input grad), or
//     two channels and rows of the tile (weight grad).
//   contiguous: planes are copied as they lie in memory, without padding; a thread marches down one column of a plane,
//     its row sums moving along in registers.
//   Specialised for 3x3, 5x5 and 7x7 at stride 1 and 2; everything else is depthwise_generic_*.
//
// The input gradient at stride 1 is the forward pass with the filter turned around; at stride 2 each output belongs to
// one of four phases, and only the taps of its phase are visited.
#include "common.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace convkit::cuda {

namespace {

enum class Mode { forward1, forward2, grad2 };  // stride 1 (either direction), stride 2 forward, stride 2 input gradient

struct Tile {
  const void *src, *weight, *bias, *scale, *residual;
  void* dst;
  WeightStrides strides;
  int64_t n, c;
  int src_h, src_w, dst_h, dst_w;
  int pad_top, pad_left;  // may be negative
  bool flip, relu;
};

// The filter of `lanes` vectors of channels, zero beyond the last channel, in the arithmetic's type: [tap][16 bytes of a
// vector's values][lane], so that neighbouring lanes read what lies side by side.
template <class S, int R> __device__ void stage_taps(const Tile& a, int64_t first, int lanes, compute_t<S>* to) {
  constexpr int V = kVec<S>, per = kVec<compute_t<S>>;
  for (int i = threadIdx.x; i < R * R * lanes * V; i += blockDim.x) {
    int of_lane = i / per % lanes, part = i / per / lanes % (V / per), tap = i / (lanes * V);
    int64_t k = first + of_lane * V + part * per + i % per;
    int r = tap / R, s = tap % R;
    if (a.flip) r = R - 1 - r, s = R - 1 - s;
    to[i] = k < a.c ? widen(static_cast<const S*>(a.weight)[k * a.strides.k + r * a.strides.r + s * a.strides.s]) : compute_t<S>(0);
  }
}

// What a lane needs of a tap staged so.
template <class T, int V> __device__ __forceinline__ void load_staged(const T* tap, int lanes, int lane, T (&to)[V]) {
  constexpr int per = kVec<T>;
#pragma unroll
  for (int i = 0; i < V; i += per) {
    Vec<T> v = *reinterpret_cast<const Vec<T>*>(tap + i * lanes + lane * per);
#pragma unroll
    for (int j = 0; j < per; ++j) to[i + j] = v.of[j];
  }
}

// ---- channels_last -----------------------------------------------------------------------------------------------------

// Where a tile's source begins: the source row of local row 0 for the tile whose first output row is `first`.
template <int R, Mode mode> __device__ __forceinline__ int source_begin(int first, int pad) {
  if (mode == Mode::grad2) return (first + pad) / 2 - (R - 1) / 2;  // first + pad is even
  return first * (mode == Mode::forward2 ? 2 : 1) - pad;
}
// The first output row of tile i. Phases start with the even one.
template <Mode mode> __device__ __forceinline__ int output_begin(int i, int size, int pad) {
  return mode == Mode::grad2 ? i * size - (pad & 1) : i * size;
}

// Copies rows x columns pixels of `lanes` 16-byte vectors of channels into shared memory, zeros where there is no source.
template <class S> __device__ void stage_pixels(const S* image, int h, int w, int64_t c, int y0, int x0, int64_t c0, int rows, int columns, int lanes_log2,
                                                const FastDiv& by_columns, S* to) {
  constexpr int V = kVec<S>;
  int lanes = 1 << lanes_log2, total = (rows * columns) << lanes_log2;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    uint32_t column, row = by_columns.divmod(uint32_t(i >> lanes_log2), column);
    int y = y0 + int(row), x = x0 + int(column);
    int64_t channel = c0 + (i & (lanes - 1)) * V;
    bool inside = y >= 0 && y < h && x >= 0 && x < w && channel < c;
    const S* from = inside ? image + (int64_t(y) * w + x) * c + channel : image;
    ptx::copy_async_16(to + int64_t(i) * V, from, inside ? 16 : 0);
  }
}

template <class S, int R, Mode mode, int TW, int threads, int blocks>
__global__ void __launch_bounds__(threads, blocks) depthwise_nhwc(Tile a, DepthwiseNhwcPlan p, int lanes_log2, int rows_log2, FastDiv by_pitch, FastDiv by_channels, FastDiv by_tiles_x) {
  using T = compute_t<S>;
  constexpr int V = kVec<S>, U = mode == Mode::forward2 ? 2 : 1;
  S* tile = reinterpret_cast<S*>(dynamic_shared());
  T* taps = reinterpret_cast<T*>(tile + int64_t(p.in_rows) * p.in_pitch * p.lanes * V);
  uint32_t channel_block, tile_x, rest = by_channels.divmod(blockIdx.x, channel_block), tile_y = by_tiles_x.divmod(rest, tile_x);
  int64_t c0 = int64_t(channel_block) * p.lanes * V;
  int y0 = output_begin<mode>(int(tile_y), p.rows, a.pad_top), x0 = output_begin<mode>(int(tile_x), p.strips * TW, a.pad_left);
  int64_t n = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  if (n >= a.n) return;
  stage_pixels(static_cast<const S*>(a.src) + n * int64_t(a.src_h) * a.src_w * a.c, a.src_h, a.src_w, a.c, source_begin<R, mode>(y0, a.pad_top), source_begin<R, mode>(x0, a.pad_left), c0,
               p.in_rows, p.in_pitch, lanes_log2, by_pitch, tile);
  ptx::copy_async_commit();
  stage_taps<S, R>(a, c0, p.lanes, taps);
  ptx::copy_async_wait<0>();
  __syncthreads();

  int lane = threadIdx.x & (p.lanes - 1), row = (threadIdx.x >> lanes_log2) & (p.rows - 1), strip = threadIdx.x >> (lanes_log2 + rows_log2);
  int64_t channel = c0 + lane * V;
  T sum[TW][V] = {};
  auto line = [&](int source_row, int r, int first_column) {
    const S* from = tile + (((source_row * p.in_pitch + first_column) << lanes_log2) + lane) * V;
    T w[R][V];
#pragma unroll
    for (int s = 0; s < R; ++s) load_staged(taps + (r * R + s) * p.lanes * V, p.lanes, lane, w[s]);
    constexpr int columns = mode == Mode::grad2 ? (R - 1) / 2 + (TW - 1) / 2 + 1 : (TW - 1) * U + R;
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      T x[V];
      load_wide(from + (j << lanes_log2) * V, x);
#pragma unroll
      for (int t = 0; t < TW; ++t) {
        int s = mode == Mode::grad2 ? t - 2 * (j - (R - 1) / 2) : j - t * U;
        if (s < 0 || s >= R) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[t][v] += x[v] * w[s][v];
      }
    }
  };
  if constexpr (mode == Mode::grad2) {
    for (int r = row & 1; r < R; r += 2) line((row - r) / 2 + (R - 1) / 2, r, strip * TW / 2);
  } else {
#pragma unroll 1
    for (int r = 0; r < R; ++r) line(row * U + r, r, strip * TW * U);
  }

  int y = y0 + row, x = x0 + strip * TW;
  if (y >= 0 && y < a.dst_h && channel < a.c) {
    int64_t at = ((n * a.dst_h + y) * int64_t(a.dst_w) + x) * a.c + channel;
    S* to = static_cast<S*>(a.dst) + at;
    T bias[V] = {};  // here and not before the sums: registers are short
    if (a.scale != nullptr) {
      T scale[V];
      load_values(static_cast<const T*>(a.scale) + channel, scale);
      if (a.bias != nullptr) load_values(static_cast<const T*>(a.bias) + channel, bias);
#pragma unroll
      for (int t = 0; t < TW; ++t)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[t][v] *= scale[v];
    } else if (a.bias != nullptr) {
      load_wide(static_cast<const S*>(a.bias) + channel, bias);
    }
#pragma unroll
    for (int t = 0; t < TW; ++t) {
      if (x + t < 0 || x + t >= a.dst_w) continue;
      T add[V] = {};
      if (a.residual != nullptr) load_wide(static_cast<const S*>(a.residual) + at + t * a.c, add);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[t][v] = sum[t][v] + bias[v] + add[v];
        if (a.relu) sum[t][v] = relu(sum[t][v]);
      }
      store_narrow(to + t * a.c, sum[t]);
    }
  }
}

// ---- contiguous --------------------------------------------------------------------------------------------------------

// Copies elements [begin, end) of a tensor that ends at `limit`, from the last multiple of 16 bytes on; returns how many
// elements stand before the first that was asked for.
template <class S> __device__ int stage_flat(const S* tensor, int64_t begin, int64_t end, int64_t limit, S* to, int thread, int threads) {
  constexpr int V = kVec<S>;
  int64_t first = begin / V * V;
  int vectors = int((end - first + V - 1) / V);
  for (int i = thread; i < vectors; i += threads) {
    int64_t at = first + int64_t(i) * V, left = limit - at;
    ptx::copy_async_16(to + i * V, tensor + at, left < V ? int(left) * int(sizeof(S)) : 16);
  }
  return int(begin - first);
}

// Writes elements [begin, end) of a tensor from shared memory, where they stand with the same alignment.
template <class S> __device__ void write_flat(S* tensor, int64_t begin, int64_t end, const S* from) {
  constexpr int V = kVec<S>;
  int64_t first = begin / V * V;
  int vectors = int((end - first + V - 1) / V);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    int64_t at = first + int64_t(i) * V;
    if (at >= begin && at + V <= end) {
      *reinterpret_cast<Vec<S>*>(tensor + at) = *reinterpret_cast<const Vec<S>*>(from + i * V);
    } else {
      for (int v = 0; v < V; ++v)
        if (at + v >= begin && at + v < end) tensor[at + v] = from[i * V + v];
    }
  }
}

template <class T> __device__ __forceinline__ T clamped(T v, T low, T high) { return v < low ? low : v > high ? high : v; }

// The rows of the source that rows [begin, end) of the output need.
template <int R, Mode mode> __device__ __forceinline__ void source_rows(int64_t begin, int64_t end, int pad, int64_t h, int64_t& first, int64_t& last) {
  if (mode == Mode::grad2) {
    first = (begin + pad - (R - 1) + 1) >> 1;  // rounded up, of numbers that may be negative
    last = ((end - 1 + pad) >> 1) + 1;
  } else {
    int64_t U = mode == Mode::forward2 ? 2 : 1;
    first = begin * U - pad;
    last = (end - 1) * U - pad + R;
  }
  first = clamped<int64_t>(first, 0, h), last = clamped<int64_t>(last, first, h);
}

template <class S, int R, Mode mode>
__global__ void __launch_bounds__(256, sizeof(S) == 8 ? 1 : 2) depthwise_nchw(Tile a, DepthwiseNchwPlan p, int64_t plane_blocks, FastDiv by_width, FastDiv by_segments) {
  using T = compute_t<S>;
  S* in = reinterpret_cast<S*>(dynamic_shared());
  S* out = in + p.in_elements;
  T* taps = reinterpret_cast<T*>(out + p.out_elements);
  int64_t src_hw = int64_t(a.src_h) * a.src_w, dst_hw = int64_t(a.dst_h) * a.dst_w, all = a.n * a.c;
  for (int64_t task = blockIdx.x; task < plane_blocks * p.bands; task += gridDim.x) {
    int64_t plane0 = task / p.bands * p.planes, band = task % p.bands;
    int planes = int(min(p.planes, all - plane0));
    int64_t row0 = band * p.band_rows, row1 = min(int64_t(a.dst_h), row0 + p.band_rows), y0 = 0, y1 = a.src_h;
    if (p.planes == 1) source_rows<R, mode>(row0, row1, a.pad_top, a.src_h, y0, y1);
    int64_t begin = plane0 * src_hw + y0 * a.src_w, end = (plane0 + planes - 1) * src_hw + y1 * a.src_w;
    int64_t out_begin = plane0 * dst_hw + row0 * a.dst_w, out_end = (plane0 + planes - 1) * dst_hw + row1 * a.dst_w;
    int in_shift = begin < end ? stage_flat(static_cast<const S*>(a.src), begin, end, all * src_hw, in, threadIdx.x, blockDim.x) : 0;
    if (a.residual != nullptr) stage_flat(static_cast<const S*>(a.residual), out_begin, out_end, all * dst_hw, out, threadIdx.x, blockDim.x);
    ptx::copy_async_commit();
    for (int i = threadIdx.x; i < planes * R * R; i += blockDim.x) {
      int64_t k = (plane0 + i / (R * R)) % a.c;
      int r = i % (R * R) / R, s = i % R;
      if (a.flip) r = R - 1 - r, s = R - 1 - s;
      taps[i] = widen(static_cast<const S*>(a.weight)[k * a.strides.k + r * a.strides.r + s * a.strides.s]);
    }
    ptx::copy_async_wait<0>();
    __syncthreads();

    int out_shift = int(out_begin % kVec<S>);
    int items = planes * p.segments * a.dst_w;
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      uint32_t x, segment, rest = by_width.divmod(uint32_t(item), x), plane = by_segments.divmod(rest, segment);
      int64_t first = row0 + int64_t(segment) * p.segment_rows, last = min(row1, first + p.segment_rows);
      const S* image = in + in_shift + int64_t(plane) * src_hw - y0 * a.src_w;
      S* to = out + out_shift + (int64_t(plane) * dst_hw - row0 * a.dst_w) + x;
      T w[R][R];
#pragma unroll
      for (int i = 0; i < R * R; ++i) w[i / R][i % R] = taps[plane * R * R + i];
      int64_t channel = (plane0 + plane) % a.c;
      T scale = a.scale == nullptr ? T(1) : static_cast<const T*>(a.scale)[channel];
      T bias = a.bias == nullptr ? T(0) : bias_at<S>(a.bias, a.scale != nullptr, channel);
      auto emit = [&](int64_t y, T v) {
        v = v * scale + bias;
        if (a.residual != nullptr) v += widen(to[y * a.dst_w]);  // which stands where the sum goes
        to[y * a.dst_w] = narrow<S>(a.relu ? relu(v) : v);
      };
      if constexpr (mode == Mode::forward1) {
        T sum[R] = {};  // sum[r]: of the output row that source row y meets with tap row r
        int64_t left = int64_t(x) - a.pad_left;
        for (int64_t y = first - a.pad_top; y < last - a.pad_top + R - 1; ++y) {
          if (y >= 0 && y < a.src_h) {
            const S* line = image + y * a.src_w + left;
            T v[R];
#pragma unroll
            for (int s = 0; s < R; ++s) v[s] = left + s >= 0 && left + s < a.src_w ? widen(line[s]) : T(0);
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
              for (int s = 0; s < R; ++s) sum[r] += v[s] * w[r][s];
          }
          int64_t done = y + a.pad_top - (R - 1);
          if (done >= first) emit(done, sum[R - 1]);
#pragma unroll
          for (int r = R - 1; r > 0; --r) sum[r] = sum[r - 1];
          sum[0] = 0;
        }
      } else {
        for (int64_t y = first; y < last; ++y) {
          T sum = 0;
#pragma unroll
          for (int r = 0; r < R; ++r) {
            int64_t row = mode == Mode::forward2 ? 2 * y - a.pad_top + r : y + a.pad_top - r;
            if (mode == Mode::grad2) {
              if (row & 1) continue;
              row >>= 1;
            }
            if (row < 0 || row >= a.src_h) continue;
            const S* line = image + row * a.src_w;
#pragma unroll
            for (int s = 0; s < R; ++s) {
              int64_t column = mode == Mode::forward2 ? 2 * int64_t(x) - a.pad_left + s : int64_t(x) + a.pad_left - s;
              if (mode == Mode::grad2) {
                if (column & 1) continue;
                column >>= 1;
              }
              if (column >= 0 && column < a.src_w) sum += widen(line[column]) * w[r][s];
            }
          }
          emit(y, sum);
        }
      }
    }
    __syncthreads();
    write_flat(static_cast<S*>(a.dst), out_begin, out_end, out);
    __syncthreads();
  }
}

// ---- weight gradient -----------------------------------------------------------------------------------------------------

struct Grad {
  const void *x, *grad;
  void* partial;  // [split][tap][c]
  int64_t n, c, h, w, p, q;
  int pad_top, pad_left;
};

// A block: `lanes` vectors of channels, and the tiles of one split, two stages deep. A thread: two channels and some rows
// of the tile.
template <class S, int R, int U>
__global__ void __launch_bounds__(256, 1) depthwise_nhwc_wgrad(Grad a, DepthwiseNhwcPlan p, int64_t splits, int lanes_log2, FastDiv by_in, FastDiv by_out) {
  using T = compute_t<S>;
  constexpr int V = kVec<S>, Q = 4;  // columns whose x are in registers together
  int channels = p.lanes * V, pairs = channels / 2, groups = blockDim.x / pairs, out_columns = p.strips * p.strip;
  int x_elements = p.in_rows * p.in_pitch * channels, grad_elements = p.rows * out_columns * channels;
  S* stages = reinterpret_cast<S*>(dynamic_shared());
  int64_t c0 = int64_t(blockIdx.x) * channels, split = blockIdx.y;
  int64_t tiles = a.n * p.tiles_y * p.tiles_x, first = tiles * split / splits, last = tiles * (split + 1) / splits;
  auto origin = [&](int64_t tile, int64_t& n, int64_t& y, int64_t& x) {
    x = tile % p.tiles_x * out_columns, tile /= p.tiles_x;
    y = tile % p.tiles_y * p.rows, n = tile / p.tiles_y;
  };
  auto stage = [&](int64_t tile) {
    if (tile < last) {
      int64_t n, y, x;
      origin(tile, n, y, x);
      S* to = stages + (tile - first) % 2 * (x_elements + grad_elements);
      stage_pixels(static_cast<const S*>(a.x) + n * a.h * a.w * a.c, int(a.h), int(a.w), a.c, int(y) * U - a.pad_top, int(x) * U - a.pad_left, c0, p.in_rows, p.in_pitch, lanes_log2, by_in, to);
      stage_pixels(static_cast<const S*>(a.grad) + n * a.p * a.q * a.c, int(a.p), int(a.q), a.c, int(y), int(x), c0, p.rows, out_columns, lanes_log2, by_out, to + x_elements);
    }
    ptx::copy_async_commit();
  };
  int pair = threadIdx.x % pairs, group = threadIdx.x / pairs;
  T sum[R][R][2] = {};
  stage(first);
  for (int64_t tile = first; tile < last; ++tile) {
    stage(tile + 1);
    ptx::copy_async_wait<1>();
    __syncthreads();
    int64_t n, y0, x0;
    origin(tile, n, y0, x0);
    const S* xs = stages + (tile - first) % 2 * (x_elements + grad_elements) + pair * 2;
    const S* grads = xs + x_elements;
    int rows = int(min(int64_t(p.rows), a.p - y0)), columns = int(min(int64_t(out_columns), a.q - x0));
    for (int row = group; row < rows; row += groups) {
      // A product with a gradient beyond the image is left out and not a product with zero, which an infinite x would spoil.
      auto piece = [&](auto whole, int q) {
        T g[Q][2];
#pragma unroll
        for (int i = 0; i < Q; ++i) {
          Pair<S> v = *reinterpret_cast<const Pair<S>*>(grads + (row * out_columns + q + i) * channels);
          g[i][0] = widen(v.x), g[i][1] = widen(v.y);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const S* line = xs + ((row * U + r) * p.in_pitch + q * U) * channels;
#pragma unroll
          for (int j = 0; j < (Q - 1) * U + R; ++j) {
            Pair<S> v = *reinterpret_cast<const Pair<S>*>(line + j * channels);
            T x = widen(v.x), y = widen(v.y);
#pragma unroll
            for (int i = 0; i < Q; ++i) {
              int s = j - i * U;
              if (s < 0 || s >= R || (!decltype(whole)::value && q + i >= columns)) continue;
              sum[r][s][0] += x * g[i][0];
              sum[r][s][1] += y * g[i][1];
            }
          }
        }
      };
      int q = 0;
      for (; q + Q <= columns; q += Q) piece(std::true_type{}, q);
      if (q < columns) piece(std::false_type{}, q);
    }
    __syncthreads();
  }
  ptx::copy_async_wait<0>();

  // The groups' sums, one filter row at a time, in the order of the groups.
  T* shared = reinterpret_cast<T*>(dynamic_shared());
#pragma unroll
  for (int r = 0; r < R; ++r) {
    __syncthreads();
#pragma unroll
    for (int s = 0; s < R; ++s) {
      shared[(group * R + s) * channels + pair * 2] = sum[r][s][0];
      shared[(group * R + s) * channels + pair * 2 + 1] = sum[r][s][1];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < R * channels; i += blockDim.x) {
      T total = 0;
      for (int g = 0; g < groups; ++g) total += shared[g * R * channels + i];
      int64_t channel = c0 + i % channels;
      if (channel < a.c) static_cast<T*>(a.partial)[(split * R * R + r * R + i / channels) * a.c + channel] = total;
    }
  }
}

// A block: one channel, and some images of one split, `planes` at a time. A thread: a column of some rows.
template <class S, int R, int U>
__global__ void __launch_bounds__(256, sizeof(S) == 8 ? 1 : 2) depthwise_nchw_wgrad(Grad a, DepthwiseNchwPlan p, int64_t splits, FastDiv by_width, FastDiv by_segments) {
  using T = compute_t<S>;
  S* xs = reinterpret_cast<S*>(dynamic_shared());
  S* grads = xs + p.planes * p.in_elements;
  int64_t c = blockIdx.x, split = blockIdx.y, hw = a.h * a.w, pq = a.p * a.q;
  int64_t steps = ceil_div(a.n, p.planes) * p.bands, first = steps * split / splits, last = steps * (split + 1) / splits;
  T sum[R][R] = {};
  for (int64_t step = first; step < last; ++step) {
    int64_t n0 = step / p.bands * p.planes, row0 = step % p.bands * p.band_rows, row1 = min(a.p, row0 + p.band_rows);
    int planes = int(min(p.planes, a.n - n0));
    int64_t y0, y1;
    source_rows<R, U == 2 ? Mode::forward2 : Mode::forward1>(row0, row1, a.pad_top, a.h, y0, y1);
    for (int i = 0; i < planes; ++i) {
      int64_t plane = (n0 + i) * a.c + c;
      if (y0 < y1) stage_flat(static_cast<const S*>(a.x), plane * hw + y0 * a.w, plane * hw + y1 * a.w, a.n * a.c * hw, xs + i * p.in_elements, threadIdx.x, blockDim.x);
      stage_flat(static_cast<const S*>(a.grad), plane * pq + row0 * a.q, plane * pq + row1 * a.q, a.n * a.c * pq, grads + i * p.out_elements, threadIdx.x, blockDim.x);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    int items = planes * p.segments * int(a.q);
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      uint32_t q, segment, rest = by_width.divmod(uint32_t(item), q), i = by_segments.divmod(rest, segment);
      int64_t plane = (n0 + i) * a.c + c;
      int64_t begin = row0 + int64_t(segment) * p.segment_rows, end = min(row1, begin + p.segment_rows);
      if (begin >= end) continue;
      const S* image = xs + i * p.in_elements + int((plane * hw + y0 * a.w) % kVec<S>) - y0 * a.w;
      const S* grad = grads + i * p.out_elements + int((plane * pq + row0 * a.q) % kVec<S>) - row0 * a.q + q;
      int64_t left = int64_t(q) * U - a.pad_left;
      T g[R] = {};  // g[r]: the gradient in the row that x's row y meets with tap row r
      int64_t y_begin = begin * U - a.pad_top, y_end = (end - 1) * U - a.pad_top + R;
      for (int64_t y = y_begin; y < y_end; ++y) {
        T v[R];
        bool inside = y >= 0 && y < a.h;
#pragma unroll
        for (int s = 0; s < R; ++s) v[s] = inside && left + s >= 0 && left + s < a.w ? widen(image[y * a.w + left + s]) : T(0);
        if constexpr (U == 1) {
#pragma unroll
          for (int r = R - 1; r > 0; --r) g[r] = g[r - 1];
          int64_t row = y + a.pad_top;
          g[0] = row < end ? widen(grad[row * a.q]) : T(0);
        } else {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            int64_t row = y + a.pad_top - r;
            g[r] = (row & 1) == 0 && row >= 2 * begin && row < 2 * end ? widen(grad[(row >> 1) * a.q]) : T(0);
          }
        }
        if (!inside) continue;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          int64_t row = y + a.pad_top - r;
          // Left out, and not a product with zero: x may be infinite.
          bool meets = U == 1 ? row >= begin && row < end : (row & 1) == 0 && row >= 2 * begin && row < 2 * end;
          if (!meets) continue;
#pragma unroll
          for (int s = 0; s < R; ++s) sum[r][s] += v[s] * g[r];
        }
      }
    }
    __syncthreads();
  }
  T* shared = reinterpret_cast<T*>(dynamic_shared());
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < R * R; ++i) {
    T total = warp_sum(sum[i / R][i % R]);
    if (threadIdx.x % 32 == 0) shared[warp * R * R + i] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < R * R; i += blockDim.x) {
    T total = 0;
    for (int w = 0; w < warps; ++w) total += shared[w * R * R + i];
    static_cast<T*>(a.partial)[(split * R * R + i) * a.c + c] = total;
  }
}

// ---- anything else -------------------------------------------------------------------------------------------------------

// Turns an output coordinate into the source coordinate of a tap; false in the padding and between strides.
template <bool input_grad>
__device__ __forceinline__ bool find_source(int64_t& at, int64_t tap, int64_t stride, int64_t pad, int64_t dilation, int64_t size) {
  at = input_grad ? at + pad - tap * dilation : at * stride - pad + tap * dilation;
  if (input_grad) {
    if (at < 0 || at % stride != 0) return false;
    at /= stride;
  }
  return at >= 0 && at < size;
}

// One output a thread, lanes along the dimension that is dense in memory. Any size, stride, dilation and multiplier.
template <class S, bool nhwc, bool input_grad> __global__ void __launch_bounds__(256) depthwise_generic(ConvArgs a) {
  using T = compute_t<S>;
  const ConvProblem& p = a.problem;
  int64_t multiplier = p.k / p.c, dst_c = input_grad ? p.c : p.k, src_c = input_grad ? p.k : p.c;
  int64_t dst_h = input_grad ? p.h : p.p, dst_w = input_grad ? p.w : p.q, src_h = input_grad ? p.p : p.h, src_w = input_grad ? p.q : p.w;
  int64_t total = p.n * dst_c * dst_h * dst_w;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    int64_t n, channel, y, x, rest = i;
    if (nhwc) channel = rest % dst_c, rest /= dst_c;
    x = rest % dst_w, rest /= dst_w;
    y = rest % dst_h, rest /= dst_h;
    if (!nhwc) channel = rest % dst_c, rest /= dst_c;
    n = rest;
    auto source = [&](int64_t c, int64_t h, int64_t w) {
      return widen(static_cast<const S*>(a.src)[nhwc ? ((n * src_h + h) * src_w + w) * src_c + c : ((n * src_c + c) * src_h + h) * src_w + w]);
    };
    T sum = 0;
    for (int64_t m = 0; m < (input_grad ? multiplier : 1); ++m) {
      int64_t k = input_grad ? channel * multiplier + m : channel;
      const S* weight = static_cast<const S*>(a.weight) + k * a.weight_strides.k;
      for (int64_t r = 0; r < p.r; ++r) {
        int64_t row = y;
        if (!find_source<input_grad>(row, r, p.stride_h, p.pad_top, p.dilation_h, src_h)) continue;
        for (int64_t s = 0; s < p.s; ++s) {
          int64_t column = x;
          if (!find_source<input_grad>(column, s, p.stride_w, p.pad_left, p.dilation_w, src_w)) continue;
          sum += source(input_grad ? k : k / multiplier, row, column) * widen(weight[r * a.weight_strides.r + s * a.weight_strides.s]);
        }
      }
    }
    if (a.scale != nullptr) sum *= static_cast<const T*>(a.scale)[channel];
    if (a.bias != nullptr) sum += bias_at<S>(a.bias, a.scale != nullptr, channel);
    if (a.residual != nullptr) sum += widen(static_cast<const S*>(a.residual)[i]);
    static_cast<S*>(a.dst)[i] = narrow<S>(a.relu ? relu(sum) : sum);
  }
}

// A block: 32 filters (channels_last) or one (contiguous), one filter row and a split of the gradient's pixels.
template <class S, bool nhwc> __global__ void __launch_bounds__(256) depthwise_generic_wgrad(ConvArgs a, int64_t splits) {
  using T = compute_t<S>;
  __shared__ T shared[256];
  const ConvProblem& p = a.problem;
  constexpr int lanes = nhwc ? 32 : 1, groups = 256 / lanes, chain = 32;
  int64_t multiplier = p.k / p.c, blocks_k = ceil_div(p.k, lanes);
  int64_t k = blockIdx.x % blocks_k * lanes + threadIdx.x % lanes, r = blockIdx.x / blocks_k, split = blockIdx.y;
  int group = threadIdx.x / lanes;
  int64_t pixels = p.n * p.p * p.q, first = pixels * split / splits, last = pixels * (split + 1) / splits;
  for (int64_t s = 0; s < p.s; ++s) {
    T total = 0, sum = 0;
    int terms = 0;
    if (k < p.k)
      for (int64_t i = first + group; i < last; i += groups) {
        int64_t q = i % p.q, row = i / p.q % p.p, n = i / p.q / p.p;
        int64_t y = row * p.stride_h - p.pad_top + r * p.dilation_h, x = q * p.stride_w - p.pad_left + s * p.dilation_w;
        if (y < 0 || y >= p.h || x < 0 || x >= p.w) continue;
        int64_t c = k / multiplier;
        T v = widen(static_cast<const S*>(a.x)[nhwc ? ((n * p.h + y) * p.w + x) * p.c + c : ((n * p.c + c) * p.h + y) * p.w + x]);
        T g = widen(static_cast<const S*>(a.src)[nhwc ? i * p.k + k : ((n * p.k + k) * p.p + row) * p.q + q]);
        sum += v * g;
        if (++terms == chain) total += sum, sum = 0, terms = 0;
      }
    __syncthreads();
    shared[threadIdx.x] = total + sum;
    __syncthreads();
    for (int half = groups / 2; half > 0; half /= 2) {
      if (group < half) shared[threadIdx.x] += shared[threadIdx.x + half * lanes];
      __syncthreads();
    }
    if (group == 0 && k < p.k) static_cast<T*>(a.workspace)[((split * p.r + r) * p.s + s) * p.k + k] = shared[threadIdx.x];
  }
}

// The second stage: partial sums [split][tap][k] in the order of the splits.
template <class S>
__global__ void __launch_bounds__(kSumThreads) depthwise_wgrad_sum(const compute_t<S>* partial, S* dst, WeightStrides strides, int64_t k, int64_t r, int64_t s, int64_t splits, SplitSum of) {
  int64_t total = k * r * s, i = of.output();
  double sum = of.sum(i < total ? partial + i : nullptr, total, splits);
  if (i >= total || !of.writes()) return;
  int64_t tap = i / k;
  dst[i % k * strides.k + tap / s * strides.r + tap % s * strides.s] = narrow<S>(compute_t<S>(sum));
}

// ---- launches --------------------------------------------------------------------------------------------------------------

int log2_of(int64_t v) {
  int out = 0;
  while ((int64_t(1) << out) < v) ++out;
  return out;
}

template <class F> void with_filter(int64_t r, F&& f) {
  if (r == 3) f(std::integral_constant<int, 3>{});
  else if (r == 5) f(std::integral_constant<int, 5>{});
  else f(std::integral_constant<int, 7>{});
}

template <class F> void with_mode(const ConvProblem& p, Pass pass, F&& f) {
  if (p.stride_h == 1) f(std::integral_constant<Mode, Mode::forward1>{});
  else if (pass == Pass::forward) f(std::integral_constant<Mode, Mode::forward2>{});
  else f(std::integral_constant<Mode, Mode::grad2>{});
}

Tile tile_of(const ConvArgs& a, Pass pass) {
  const ConvProblem& p = a.problem;
  bool grad = pass == Pass::input_grad, flip = grad && p.stride_h == 1;
  Tile t{a.src, a.weight, a.bias, a.scale, a.residual, a.dst, a.weight_strides, p.n, p.c, int(grad ? p.p : p.h), int(grad ? p.q : p.w), int(grad ? p.h : p.p), int(grad ? p.w : p.q), int(p.pad_top), int(p.pad_left), flip, a.relu};
  if (flip) t.pad_top = int(p.r - 1 - p.pad_top), t.pad_left = int(p.s - 1 - p.pad_left);
  return t;
}

template <class S> void run_nhwc(const ConvArgs& a, const DepthwiseNhwcPlan& p, Pass pass, Stream stream) {
  Tile t = tile_of(a, pass);
  with_filter(a.problem.r, [&](auto r) {
    with_mode(a.problem, pass, [&](auto mode) {
      constexpr int R = decltype(r)::value;
      constexpr Mode M = decltype(mode)::value;
      constexpr int TW = R == 3 || M != Mode::forward1 ? 4 : 8, threads = R == 3 ? 256 : 128, blocks = R == 3 && M != Mode::forward1 ? 2 : 3;
      if (p.strip != TW || p.threads != threads) throw std::runtime_error("convkit: depthwise_nhwc: the plan is of another kernel");
      int64_t n = a.problem.n < 32768 ? a.problem.n : 32768;
      launch("depthwise_nhwc", depthwise_nhwc<S, R, M, TW, threads, blocks>,
             {dim3(unsigned(p.channel_blocks * p.tiles_y * p.tiles_x), unsigned(n), unsigned(ceil_div(a.problem.n, n))), dim3(threads), p.shared_bytes, stream}, t, p, log2_of(p.lanes), log2_of(p.rows), FastDiv(p.in_pitch),
             FastDiv(p.channel_blocks), FastDiv(p.tiles_x));
    });
  });
}

template <class S> void run_nchw(const ConvArgs& a, const DepthwiseNchwPlan& p, Pass pass, Stream stream) {
  Tile t = tile_of(a, pass);
  int64_t plane_blocks = ceil_div(t.n * t.c, p.planes);
  with_filter(a.problem.r, [&](auto r) {
    with_mode(a.problem, pass, [&](auto mode) {
      launch("depthwise_nchw", depthwise_nchw<S, decltype(r)::value, decltype(mode)::value>, {grid_of(plane_blocks * p.bands), dim3(256), p.shared_bytes, stream}, t, p, plane_blocks,
             FastDiv(t.dst_w), FastDiv(p.segments));
    });
  });
}

template <class S> void run_weight_grad(const ConvArgs& a, const CudaConvPlan& plan, Stream stream) {
  const ConvProblem& p = a.problem;
  Grad g{a.x, a.src, a.workspace, p.n, p.c, p.h, p.w, p.p, p.q, int(p.pad_top), int(p.pad_left)};
  unsigned splits = unsigned(plan.splits);
  if (plan.kernel == CudaKernel::depthwise_generic) {
    bool nhwc = p.layout == Layout::nhwc;
    dim3 grid(unsigned(ceil_div(p.k, nhwc ? 32 : 1) * p.r), splits);
    if (nhwc) launch("depthwise_generic_wgrad", depthwise_generic_wgrad<S, true>, {grid, dim3(256), 0, stream}, a, plan.splits);
    else launch("depthwise_generic_wgrad", depthwise_generic_wgrad<S, false>, {grid, dim3(256), 0, stream}, a, plan.splits);
  } else {
    with_filter(p.r, [&](auto r) {
      auto with_stride = [&](auto u) {
        constexpr int R = decltype(r)::value, U = decltype(u)::value;
        if (plan.kernel == CudaKernel::depthwise_nhwc) {
          const DepthwiseNhwcPlan& t = plan.nhwc;
          launch("depthwise_nhwc_wgrad", depthwise_nhwc_wgrad<S, R, U>, {dim3(unsigned(t.channel_blocks), splits), dim3(unsigned(t.threads)), t.shared_bytes, stream}, g, t, plan.splits,
                 log2_of(t.lanes), FastDiv(t.in_pitch), FastDiv(t.strips * t.strip));
        } else {
          launch("depthwise_nchw_wgrad", depthwise_nchw_wgrad<S, R, U>, {dim3(unsigned(p.c), splits), dim3(256), plan.nchw.shared_bytes, stream}, g, plan.nchw, plan.splits, FastDiv(p.q),
                 FastDiv(plan.nchw.segments));
        }
      };
      if (p.stride_h == 1) with_stride(std::integral_constant<int, 1>{});
      else with_stride(std::integral_constant<int, 2>{});
    });
  }
  SplitSum of(plan.splits);
  launch("depthwise_wgrad_sum", depthwise_wgrad_sum<S>, of.launch_of(p.k * p.r * p.s, stream), static_cast<const compute_t<S>*>(a.workspace), static_cast<S*>(a.dst), a.weight_strides,
         p.k, p.r, p.s, plan.splits, of);
}

template <class S> void run_generic(const ConvArgs& a, Pass pass, Stream stream) {
  const ConvProblem& p = a.problem;
  bool nhwc = p.layout == Layout::nhwc, grad = pass == Pass::input_grad;
  int64_t total = grad ? p.n * p.c * p.h * p.w : p.n * p.k * p.p * p.q;
  auto go = [&](auto kernel) { launch("depthwise_generic", kernel, {grid_of(ceil_div(total, 256)), dim3(256), 0, stream}, a); };
  if (nhwc && grad) go(depthwise_generic<S, true, true>);
  else if (nhwc) go(depthwise_generic<S, true, false>);
  else if (grad) go(depthwise_generic<S, false, true>);
  else go(depthwise_generic<S, false, false>);
}

}  // namespace

void depthwise(const ConvArgs& a, const CudaConvPlan& plan, Pass pass, Stream stream) {
  with_type(a.problem.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (pass == Pass::weight_grad) run_weight_grad<S>(a, plan, stream);
    else if (plan.kernel == CudaKernel::depthwise_nhwc) run_nhwc<S>(a, plan.nhwc, pass, stream);
    else if (plan.kernel == CudaKernel::depthwise_nchw) run_nchw<S>(a, plan.nchw, pass, stream);
    else run_generic<S>(a, pass, stream);
  });
}

}  // namespace convkit::cuda
