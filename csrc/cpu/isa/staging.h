// Copies between a tensor as the caller stores it and a channels-last block in the arithmetic's type, or of what its
// products take (Operand), which is what the kernels read and write. This is where layouts and 16-bit types are dealt with,
// once. What is copied from is a pointer, or Pairs.
#pragma once

#include "../../arguments.h"
#include "../pool.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

// What is still done to a vector of n values before it is stored at `to`: nothing, or
struct AsItIs {
  template <class V, class D> CONVKIT_INLINE V operator()(V v, const D*, int) const { return v; }
};

// the end of an epilogue: the residual, which lies as dst does, is added, and ReLU. Results that are copied to where they
// belong are read with it only then, in the one pass that there is over dst.
template <class S> struct AddResidual {
  const S *residual, *dst;
  bool relu;
  CONVKIT_INLINE vec<compute_t<S>> operator()(vec<compute_t<S>> v, const S* to, int n) const {
    const S* from = residual + (to - dst);
    v += n == kLanes<compute_t<S>> ? load(from) : load_n(from, n);
    return relu ? cpu::CONVKIT_ISA::relu<compute_t<S>>(v) : v;
  }
};

// Calls f with what is left to do after scale and bias; ReLU is done with these where there is no residual.
template <class S, class F> CONVKIT_INLINE void with_residual(const convkit::ConvArgs& a, F&& f) {
  if (a.residual == nullptr) f(AsItIs{});
  else f(AddResidual<S>{static_cast<const S*>(a.residual), static_cast<const S*>(a.dst), a.relu});
}

// The bias of a channel: of the arithmetic's type beside a scale.
template <class S> CONVKIT_INLINE compute_t<S> bias_of(const convkit::ConvArgs& a, int64_t channel) {
  if (a.scale != nullptr) return static_cast<const compute_t<S>*>(a.bias)[channel];
  return get(static_cast<const S*>(a.bias) + channel);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns, a square of vectors at a time, in registers.
// `streamed`: whole vectors of `to` are written past the caches; it and to_stride are aligned then.
template <class From, class D, class Finish = AsItIs>
CONVKIT_INLINE void transpose_block(From from, int64_t from_stride, D* to, int64_t to_stride, int64_t rows, int64_t columns,
                                    bool streamed = false, Finish finish = {}) {
  using T = value_t<From>;
  constexpr int L = kLanes<T>;
  for (int64_t j = 0; j < columns; j += L)
    for (int64_t i = 0; i < rows; i += L) {
      int ni = int(min_of<int64_t>(L, rows - i)), nj = int(min_of<int64_t>(L, columns - j));
      From line = from + (i * from_stride + j);
      D* out = to + j * to_stride + i;
      vec<T> square[L];
      if (ni == L && nj == L) {
        CONVKIT_UNROLL for (int k = 0; k < L; ++k) square[k] = load(line + k * from_stride);
        transpose<T>(square);
        if constexpr (sizeof(D) == sizeof(T)) {
          if (streamed) {
            CONVKIT_UNROLL for (int k = 0; k < L; ++k) stream(out + k * to_stride, finish(square[k], out + k * to_stride, L));
            continue;
          }
        }
        CONVKIT_UNROLL for (int k = 0; k < L; ++k) store(out + k * to_stride, finish(square[k], out + k * to_stride, L));
      } else {
        CONVKIT_UNROLL for (int k = 0; k < L; ++k) square[k] = k < ni ? load_n(line + k * from_stride, nj) : vec<T>{};
        transpose<T>(square);
        CONVKIT_UNROLL for (int k = 0; k < L; ++k)
          if (k < nj) store_n(out + k * to_stride, finish(square[k], out + k * to_stride, ni), ni);
      }
    }
}

template <class From, class D, class Finish = AsItIs> CONVKIT_INLINE void copy_values(From from, D* to, int64_t n, Finish finish = {}) {
  if constexpr (sizeof(D) == 2 && std::is_convertible_v<From, const D*> && std::is_same_v<Finish, AsItIs>) {
    std::memcpy(to, from, n * sizeof(D));
    return;
  }
  constexpr int L = kLanes<value_t<From>>;
  int64_t j = 0;
  for (; j + L <= n; j += L) store(to + j, finish(load(from + j), to + j, L));
  if (j < n) store_n(to + j, finish(load_n(from + j, int(n - j)), to + j, int(n - j)), int(n - j));
}

template <int C, class V, int... I> CONVKIT_INLINE V strided_lanes(V v, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return __builtin_shufflevector(v, v, (I % C * (L / C) + I / C)...);
}
template <int kChannels, int C, class V, int... I> CONVKIT_INLINE V without_spare_lanes(V v, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return __builtin_shufflevector(v, v, (I / kChannels * C + I % kChannels) % L...);
}

// to[j * kChannels + i] = from[i * plane + j], j < pixels: the transpose of few planes, in which a vector of the result
// holds several pixels. With C planes, the next power of two, log2(C) of a square's steps are left of it, once lane n of a
// plane holds the pixel that goes to vector n % C.
template <int kChannels, class From, class D> __attribute__((noinline)) void interleave(From from, int64_t plane, D* to, int64_t pixels) {
  using T = value_t<From>;
  constexpr int L = kLanes<T>, C = kChannels == 3 ? 4 : kChannels;
  if constexpr (C >= L) transpose_block(from, plane, to, kChannels, kChannels, pixels);
  else {
    constexpr auto kLane = std::make_integer_sequence<int, L>{};
    constexpr int kPixels = L / C;  // of a vector
    for (int64_t j = 0; j < pixels; j += L) {
      int n = int(min_of<int64_t>(L, pixels - j));
      vec<T> row[C] = {};
      CONVKIT_UNROLL for (int i = 0; i < kChannels; ++i)
        row[i] = strided_lanes<C>(n == L ? load(from + (i * plane + j)) : load_n(from + (i * plane + j), n), kLane);
      transpose_steps<1, C>(row);
      CONVKIT_UNROLL for (int v = 0; v < C; ++v) {
        int values = min_of(kPixels, n - v * kPixels) * kChannels;
        D* out = to + (j + v * kPixels) * kChannels;
        if (values == L) store(out, row[v]);
        else if (values > 0) store_n(out, without_spare_lanes<kChannels, C>(row[v], kLane), values);
      }
    }
  }
}

// Pixels [first, first + pixels) of an image of `hw` pixels and c channels, channels [channel, channel + channels) of
// them -> channels-last, `pixel_stride` elements from pixel to pixel.
template <class From, class D>
CONVKIT_INLINE void stage_pixels(From image, Layout layout, int64_t hw, int64_t c, int64_t first, int64_t pixels,
                                 int64_t channel, int64_t channels, D* to, int64_t pixel_stride) {
  if (layout == Layout::nchw) {
    From planes = image + (channel * hw + first);
    if (pixel_stride != channels) return transpose_block(planes, hw, to, pixel_stride, channels, pixels);
    switch (channels) {
      case 1: return copy_values(planes, to, pixels);
      case 2: return interleave<2>(planes, hw, to, pixels);
      case 3: return interleave<3>(planes, hw, to, pixels);
      case 4: return interleave<4>(planes, hw, to, pixels);
      case 8: return interleave<8>(planes, hw, to, pixels);
      default: return transpose_block(planes, hw, to, pixel_stride, channels, pixels);
    }
  }
  From from = image + (first * c + channel);
  if (channels == c && pixel_stride == c) return copy_values(from, to, pixels * c);
  for (int64_t i = 0; i < pixels; ++i, from = from + c, to += pixel_stride) copy_values(from, to, channels);
}

// The inverse.
template <class S, class Finish = AsItIs>
CONVKIT_INLINE void unstage_pixels(const compute_t<S>* from, int64_t pixel_stride, S* image, Layout layout, int64_t hw, int64_t c,
                                   int64_t first, int64_t pixels, int64_t channel, int64_t channels, Finish finish = {}) {
  if (layout == Layout::nchw) return transpose_block(from, pixel_stride, image + channel * hw + first, hw, pixels, channels, false, finish);
  S* to = image + first * c + channel;
  if (channels == c && pixel_stride == c) return copy_values(from, to, pixels * c, finish);
  for (int64_t i = 0; i < pixels; ++i, from += pixel_stride, to += c) copy_values(from, to, channels, finish);
}

template <class T> CONVKIT_INLINE void fill_zero(T* to, int64_t n) { std::memset(static_cast<void*>(to), 0, n * sizeof(T)); }

struct Image {
  int64_t h, w, c;
  Layout layout;
};

constexpr int64_t kPixelsPerTask = 256;

// Channels [channel, channel + channels) of row `row` of an image -> a channels-last row of staged_w pixels of which pixel
// `left` is the image's first; zero around it, and zero all over where the image has no such row. A staged row may end before
// the image does, where no tap reaches.
template <class From, class D>
CONVKIT_INLINE void stage_row(From src, Image image, int64_t row, int64_t left, int64_t staged_w, int64_t channel, int64_t channels, D* to) {
  int64_t columns = max_of<int64_t>(0, min_of(image.w, staged_w - left));
  if (row < 0 || row >= image.h || columns == 0) return fill_zero(to, staged_w * channels);
  fill_zero(to, left * channels);
  stage_pixels(src, image.layout, image.h * image.w, image.c, row * image.w, columns, channel, channels, to + left * channels, channels);
  fill_zero(to + (left + columns) * channels, (staged_w - left - columns) * channels);
}

// Images [first, first + images) -> channels-last images of staged_h x staged_w pixels whose pixel (top, left) is the
// source's first; zero around it.
template <class S, class D>
void stage_images(const Pool& pool, const S* src, Image image, int64_t first, int64_t images, int64_t top, int64_t left,
                  int64_t staged_h, int64_t staged_w, D* staged) {
  int64_t hw = image.h * image.w;
  src += first * hw * image.c;
  if (staged_h == image.h && staged_w == image.w && top == 0 && left == 0) {
    int64_t pieces = ceil_div(hw, kPixelsPerTask);
    parallel(pool, images * pieces, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t at = i % pieces * kPixelsPerTask;
        stage_pixels(src + i / pieces * hw * image.c, image.layout, hw, image.c, at, min_of(kPixelsPerTask, hw - at), 0, image.c,
                     staged + (i / pieces * hw + at) * image.c, image.c);
      }
    });
    return;
  }
  parallel(pool, images * staged_h, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      stage_row(src + i / staged_h * hw * image.c, image, i % staged_h - top, left, staged_w, 0, image.c, staged + i * staged_w * image.c);
  });
}

// The inverse, without padding.
template <class S, class Finish>
void unstage_images(const Pool& pool, const compute_t<S>* staged, Image image, S* dst, int64_t first, int64_t images, Finish finish) {
  int64_t hw = image.h * image.w, pieces = ceil_div(hw, kPixelsPerTask);
  dst += first * hw * image.c;
  parallel(pool, images * pieces, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t at = i % pieces * kPixelsPerTask;
      unstage_pixels(staged + (i / pieces * hw + at) * image.c, image.c, dst + i / pieces * hw * image.c, image.layout, hw, image.c,
                     at, min_of(kPixelsPerTask, hw - at), 0, image.c, finish);
    }
  });
}

// Taps of a filter that land inside: positions i in [begin, end) of `count` outputs for which i * stride + offset is in
// [0, size).
struct Range {
  int64_t begin, end;
};
CONVKIT_INLINE Range inside(int64_t count, int64_t stride, int64_t offset, int64_t size) {
  int64_t begin = offset >= 0 ? 0 : ceil_div(-offset, stride);
  int64_t end = size <= offset ? 0 : ceil_div(size - offset, stride);
  return {begin, max_of(begin, min_of(end, count))};
}

// Which taps reach an output at `position`, as a sequence with ascending source positions: tap `first + i * step`
// stands on source `source + i * source_step`. Forward: all taps. Input gradient: those whose phase fits.
struct Taps {
  int64_t first, step, count, source, source_step;
};

inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

inline Taps taps_at(int64_t position, int64_t filter, int64_t stride, int64_t pad, int64_t dilation, bool input_grad) {
  if (!input_grad) return {0, 1, filter, position * stride - pad, dilation};
  if (stride == 1) return {filter - 1, -1, filter, position + pad - (filter - 1) * dilation, dilation};
  // (position + pad - tap * dilation) must be a multiple of the stride: every `step`-th tap is one, or none is.
  int64_t step = stride / gcd(stride, dilation);
  for (int64_t tap = 0; tap < min_of(step, filter); ++tap) {
    int64_t at = position + pad - tap * dilation;
    if (at % stride != 0) continue;
    int64_t count = ceil_div(filter - tap, step), source_step = step * dilation / stride;
    return {tap + (count - 1) * step, -step, count, at / stride - (count - 1) * source_step, source_step};
  }
  return {0, 1, 0, 0, 1};
}

}  // namespace convkit::cpu::CONVKIT_ISA
