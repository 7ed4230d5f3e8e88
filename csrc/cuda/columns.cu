// im2col and col2im, written out as the method is taught: every filter tap of every output pixel is a column entry. Both
// on contiguous tensors.
#include "common.cuh"
#include "kernels.h"

namespace convkit::cuda {

namespace {

constexpr int kThreads = 256;

// A block: a run of the p * q blocks of one row (n, c, r, s) of the columns; neighbouring threads, neighbouring pixels.
template <class S> __global__ void __launch_bounds__(kThreads) im2col_kernel(ColumnsArgs a, int64_t runs) {
  const ColumnsProblem& p = a.problem;
  int64_t taps = p.r * p.s, pixels = p.p * p.q, all = p.n * p.c * taps * runs;
  for (int64_t task = blockIdx.x; task < all; task += gridDim.x) {
    int64_t row = task / runs, tap = row % taps, image = row / taps;
    int64_t i = task % runs * kThreads + threadIdx.x;
    if (i >= pixels) continue;
    int64_t y = i / p.q * p.stride_h - p.pad_h + tap / p.s * p.dilation_h, x = i % p.q * p.stride_w - p.pad_w + tap % p.s * p.dilation_w;
    bool inside = y >= 0 && y < p.h && x >= 0 && x < p.w;
    static_cast<S*>(a.dst)[row * pixels + i] = inside ? static_cast<const S*>(a.src)[(image * p.h + y) * p.w + x] : narrow<S>(compute_t<S>(0));
  }
}

// A thread: one pixel of the image, and all entries that it is the sum of, in order.
template <class S> __global__ void __launch_bounds__(kThreads) col2im_kernel(ColumnsArgs a, int64_t runs) {
  const ColumnsProblem& p = a.problem;
  int64_t pixels = p.h * p.w, blocks = p.p * p.q, all = p.n * p.c * runs;
  for (int64_t task = blockIdx.x; task < all; task += gridDim.x) {
    int64_t image = task / runs, i = task % runs * kThreads + threadIdx.x;
    if (i >= pixels) continue;
    const S* columns = static_cast<const S*>(a.src) + image * p.r * p.s * blocks;
    compute_t<S> sum = 0;
    for (int64_t r = 0; r < p.r; ++r) {
      int64_t y = i / p.w + p.pad_h - r * p.dilation_h;
      if (y < 0 || y % p.stride_h != 0 || y / p.stride_h >= p.p) continue;
      for (int64_t s = 0; s < p.s; ++s) {
        int64_t x = i % p.w + p.pad_w - s * p.dilation_w;
        if (x < 0 || x % p.stride_w != 0 || x / p.stride_w >= p.q) continue;
        sum += widen(columns[(r * p.s + s) * blocks + y / p.stride_h * p.q + x / p.stride_w]);
      }
    }
    static_cast<S*>(a.dst)[image * pixels + i] = narrow<S>(sum);
  }
}

}  // namespace

void im2col(const ColumnsArgs& a, Stream stream) {
  with_type(a.dtype, [&](auto tag) {
    const ColumnsProblem& p = a.problem;
    int64_t runs = ceil_div(p.p * p.q, kThreads);
    launch("im2col", im2col_kernel<typename decltype(tag)::type>, {grid_of(p.n * p.c * p.r * p.s * runs), dim3(kThreads), 0, stream}, a, runs);
  });
}

void col2im(const ColumnsArgs& a, Stream stream) {
  with_type(a.dtype, [&](auto tag) {
    const ColumnsProblem& p = a.problem;
    int64_t runs = ceil_div(p.h * p.w, kThreads);
    launch("col2im", col2im_kernel<typename decltype(tag)::type>, {grid_of(p.n * p.c * runs), dim3(kThreads), 0, stream}, a, runs);
  });
}

}  // namespace convkit::cuda
