// im2col and col2im, written out as the method is taught: every filter tap of every output pixel is a column entry.
// Both work on contiguous tensors; a task takes one channel of one image.
#include "../kernels.h"
#include "staging.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

// Calls f(r, s, p, rows of x, columns): for tap (r, s) and output row p, source row y (or -1) and the range of output
// columns that fall inside the image.
template <class F> CONVKIT_INLINE void each_row(const ColumnsProblem& a, F&& f) {
  for (int64_t r = 0; r < a.r; ++r)
    for (int64_t s = 0; s < a.s; ++s) {
      Range columns = inside(a.q, a.stride_w, s * a.dilation_w - a.pad_w, a.w);
      if (columns.begin >= columns.end) columns = {0, 0};
      for (int64_t p = 0; p < a.p; ++p) {
        int64_t y = p * a.stride_h - a.pad_h + r * a.dilation_h;
        bool outside = y < 0 || y >= a.h || columns.end == 0;
        f(r, s, p, outside ? int64_t(-1) : y, columns);
      }
    }
}

template <class S> void to_columns(const ColumnsArgs& args, const Pool& pool) {
  const ColumnsProblem& a = args.problem;
  parallel(pool, a.n * a.c, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const S* image = static_cast<const S*>(args.src) + i * a.h * a.w;
      S* columns_of = static_cast<S*>(args.dst) + i * a.r * a.s * a.p * a.q;
      each_row(a, [&](int64_t r, int64_t s, int64_t p, int64_t y, Range columns) {
        S* to = columns_of + ((r * a.s + s) * a.p + p) * a.q;
        if (y < 0) return fill_zero(to, a.q);
        fill_zero(to, columns.begin);
        const S* from = image + y * a.w + s * a.dilation_w - a.pad_w;
        if (a.stride_w == 1) {
          std::memcpy(static_cast<void*>(to + columns.begin), from + columns.begin, (columns.end - columns.begin) * sizeof(S));
        } else {
          for (int64_t q = columns.begin; q < columns.end; ++q) to[q] = from[q * a.stride_w];
        }
        fill_zero(to + columns.end, a.q - columns.end);
      });
    }
  });
}

// Sums in the arithmetic's type, a row of the image at a time: its taps are few, and each is added in order.
template <class S> void from_columns(const ColumnsArgs& args, const Pool& pool) {
  using T = compute_t<S>;
  constexpr int64_t kPiece = 256;  // pixels summed at once, on the stack
  const ColumnsProblem& a = args.problem;
  parallel(pool, a.n * a.c, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      S* image = static_cast<S*>(args.dst) + i * a.h * a.w;
      const S* columns_of = static_cast<const S*>(args.src) + i * a.r * a.s * a.p * a.q;
      for (int64_t y = 0; y < a.h; ++y)
        for (int64_t x0 = 0; x0 < a.w; x0 += kPiece) {
          int64_t width = min_of(kPiece, a.w - x0);
          T sum[kPiece];
          fill_zero(sum, width);
          for (int64_t r = 0; r < a.r; ++r) {
            int64_t at = y + a.pad_h - r * a.dilation_h;
            if (at < 0 || at % a.stride_h != 0 || at / a.stride_h >= a.p) continue;
            for (int64_t s = 0; s < a.s; ++s) {
              const S* from = columns_of + ((r * a.s + s) * a.p + at / a.stride_h) * a.q;
              int64_t offset = s * a.dilation_w - a.pad_w - x0;  // of output column 0 in this piece
              Range columns = inside(a.q, a.stride_w, offset, width);
              for (int64_t q = columns.begin; q < columns.end; ++q) sum[q * a.stride_w + offset] += get(from + q);
            }
          }
          for (int64_t x = 0; x < width; ++x) put(image + y * a.w + x0 + x, sum[x]);
        }
    }
  });
}

}  // namespace

void im2col(const ColumnsArgs& a, const Pool& pool) {
  with_type(a.dtype, [&]<class S>(Tag<S>) { to_columns<S>(a, pool); });
}

void col2im(const ColumnsArgs& a, const Pool& pool) {
  with_type(a.dtype, [&]<class S>(Tag<S>) { from_columns<S>(a, pool); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
