// 1x1 convolutions of contiguous tensors: forward and input gradient.
//
// Neighbouring pixels of a channel are neighbours in memory, so here a lane is a pixel and a row of the register tile is a
// filter: what would be transposed twice for the kernel of gathered rows is copied once, as panels of a few vectors of
// pixels and all channels, and results are stored where they belong. Pixels are counted through all images, so that only
// the last panel of the batch is short; the tile of a panel that ends in another image goes by way of a scratch tile, and so
// do those whose pixels are a stride apart in the gradient of the input.
// 8 filters x 3 vectors on AVX-512: 11 loads for 24 multiply-adds, and filter counts are multiples of 8; 6 x 2 elsewhere.
#include "../kernels.h"
#include "rows_tile.h"
#include "staging.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

constexpr int kVectors = kMaxVectors == 4 ? 3 : 2, kRows = kMaxVectors == 4 ? 8 : 6;

// to[j] = from[j * step], j < n.
template <class From, class D> CONVKIT_INLINE void copy_strided(From from, int64_t step, D* to, int64_t n) {
  if (step == 1) return copy_values(from, to, n);
  for (int64_t j = 0; j < n; ++j) put(to + j, get(from + j * step));
}

// X: what its products are of. From: what panels are copied from, of bf16 pairs of channels.
template <class S, class X, class From> struct Pointwise {
  using T = compute_t<X>;
  static constexpr int64_t kRun = max_of<int64_t>(kLanes<T>, kLine<S>);  // pixels, whole lines of them: tasks begin with one
  static constexpr int L = kLanes<T>, kWidth = kVectors * L;
  const ConvArgs& a;
  const Pool& pool;
  const ConvProblem& p = a.problem;
  const PointwisePlan& plan = a.plan.pointwise;
  char* ws = static_cast<char*>(a.workspace);
  int64_t src_c = plan.input_grad ? p.k : p.c, dst_c = plan.input_grad ? p.c : p.k;
  int64_t depth = src_c / p.groups, filters = dst_c / p.groups, hw = p.h * p.w, pq = p.p * p.q, pixels = p.n * pq;
  int64_t src_plane = plan.input_grad ? pq : hw, dst_plane = plan.input_grad ? hw : pq;
  bool scattered = plan.input_grad && hw != pq;

  Pointwise(const ConvArgs& args, const Pool& threads) : a(args), pool(threads) {}

  // weights[dst channel][depth], rows of which the tile broadcasts; then scale and bias.
  X* weights() const { return reinterpret_cast<X*>(ws + plan.weights.offset); }
  T* scale() const { return reinterpret_cast<T*>(weights()) + dst_c * depth; }
  T* bias() const { return scale() + dst_c; }

  void pack() const {
    const S* from = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    constexpr int64_t kPiece = 64;
    int64_t pieces = ceil_div(filters, kPiece), filters_of_group = p.k / p.groups;
    parallel(pool, p.groups * pieces, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t group = i / pieces, first = i % pieces * kPiece, count = min_of(kPiece, filters - first);
        const S* source = from + group * filters_of_group * st.k + first * (plan.input_grad ? st.c : st.k);
        X* to = weights() + (group * filters + first) * depth;
        if (plan.input_grad && st.c == 1) transpose_block(source, st.k, to, depth, depth, count);
        else
          for (int64_t k = 0; k < count; ++k) copy_strided(source + k * (plan.input_grad ? st.c : st.k), plan.input_grad ? st.k : st.c, to + k * depth, depth);
      }
    });
    for (int64_t k = 0; a.scale != nullptr && k < dst_c; ++k) scale()[k] = static_cast<const T*>(a.scale)[k];
    for (int64_t k = 0; a.bias != nullptr && k < dst_c; ++k) bias()[k] = bias_of<S>(a, k);
  }

  // Calls f(image, first pixel of it, count, lane) for the runs of pixels [first, first + count) within images.
  template <class F> CONVKIT_INLINE void each_image(int64_t first, int64_t count, F&& f) const {
    for (int64_t lane = 0; lane < count;) {
      int64_t at = (first + lane) % pq, run = min_of(pq - at, count - lane);
      f((first + lane) / pq, at, run, lane);
      lane += run;
    }
  }

  // Vectors of pixels, dealt out to as few panels as can hold them, evenly.
  struct Panels {
    int64_t count, least, wider;  // panels; vectors of each; how many of the first have one more
    explicit Panels(int64_t vectors) : count(ceil_div(vectors, kVectors)), least(vectors / count), wider(vectors % count) {}
    int64_t width(int64_t panel) const { return (least + (panel < wider)) * L; }
  };

  // Pixels [first, first + count), all channels of a group -> panels[panel][steps of the depth][pixels].
  void stage(From src, int64_t group, int64_t first, int64_t count, T* to) const {
    int64_t steps = depth / Operand<X>::kDepth, vectors = ceil_div(count, L);
    Panels panels(vectors);
    for (int64_t step = 0; step < steps; ++step) {
      int64_t c = step * Operand<X>::kDepth, panel = 0, begin = 0, width = panels.width(0);
      auto place = [&](int64_t lane) { return to + begin * steps + step * width + lane - begin; };
      // A run of neighbours in memory, split where panels end.
      auto run = [&](From from, int64_t apart, int64_t n, int64_t lane) {
        while (n > 0) {
          if (lane == begin + width) begin = lane, width = panels.width(++panel);
          int64_t piece = min_of(n, begin + width - lane);
          copy_strided(from, apart, place(lane), piece);
          from = from + piece * apart, lane += piece, n -= piece;
        }
      };
      each_image(first, count, [&](int64_t image, int64_t at, int64_t n, int64_t lane) {
        From plane = src + (image * src_c + group * depth + c) * src_plane;
        if (src_plane == pq) return run(plane + at, 1, n, lane);
        for (int64_t row = at / p.q, column = at % p.q; n > 0; ++row, column = 0) {
          int64_t piece = min_of(p.q - column, n);
          run(plane + (row * p.stride_h * p.w + column * p.stride_w), p.stride_w, piece, lane);
          lane += piece, n -= piece;
        }
      });
      if (count < vectors * L) fill_zero(place(count), vectors * L - count);
    }
  }

  // Gradients of pixels [at, at + n) of a plane to their places in the input's plane, and `between` to the places up to the
  // next ones', which no output has met.
  void scatter(const S* from, S* plane, int64_t at, int64_t n, S between) const {
    for (int64_t row = at / p.q, column = at % p.q; n > 0; ++row, column = 0) {
      int64_t count = min_of(p.q - column, n), first = column * p.stride_w, last = column + count == p.q ? p.w : first + count * p.stride_w;
      int64_t end = row + 1 == p.p ? p.h : (row + 1) * p.stride_h;
      for (int64_t i = row * p.stride_h; i < end; ++i)
        for (int64_t j = first; j < last; ++j) plane[i * p.w + j] = between;
      S* to = plane + row * p.stride_h * p.w + first;
      for (int64_t j = 0; j < count; ++j) to[j * p.stride_w] = from[j];
      from += count, n -= count;
    }
  }

  // src: the tensor, or pairs of its neighbouring channels.
  void run(From src) const {
    pack();
    int64_t row_tiles = ceil_div(filters, kRows), runs = ceil_div(pixels, kRun);
    bool streamed = plan.stream && !scattered && pq % kLine<S> == 0 && streamable(a.dst);
    constexpr RowsTileFn<X, S> kTiles[] = {nullptr, rows_tile<X, S, kRows, 1>, rows_tile<X, S, kRows, 2>, rows_tile<X, S, kRows, kVectors>};
    parallel(pool, plan.tasks * p.groups, [&](int64_t begin, int64_t end, int thread) {
      X* staged = reinterpret_cast<X*>(ws + plan.scratch.offset + thread * plan.scratch_bytes);
      S* aside = reinterpret_cast<S*>(staged + plan.pixels_per_task * depth);
      const X* rows[kRows];
      S* dst[kRows];
      const int64_t no_offset = 0;
      const int32_t only_tap = 0;
      RowsTile<X, S> tile;
      tile.rows = rows, tile.rows_step = 0, tile.offsets = &no_offset, tile.taps = &only_tap, tile.tap_count = 1;
      tile.depth = depth, tile.chain = plan.chain, tile.row_offset = 0;
      tile.ahead = kRows * depth;
      tile.dst = dst, tile.dst_offset = 0;
      tile.scale = tile.bias = nullptr;
      tile.relu = a.relu;
      for (int64_t i = begin; i < end; ++i) {
        int64_t group = i % p.groups, task = i / p.groups, first = runs * task / plan.tasks * kRun;
        int64_t count = min_of(runs * (task + 1) / plan.tasks * kRun, pixels) - first;
        Panels panels(ceil_div(count, L));
        stage(src, group, first, count, reinterpret_cast<T*>(staged));
        for (int64_t t = 0; t < row_tiles; ++t)
          for (int64_t panel = 0, lane = 0, width; panel < panels.count; ++panel, lane += width) {
            width = panels.width(panel);
            int64_t channel = group * filters + t * kRows, at = (first + lane) % pq;
            tile.columns = int(min_of(width, count - lane));
            tile.valid_rows = int(min_of<int64_t>(kRows, filters - t * kRows));
            tile.panel = staged + lane * depth;
            tile.row_scale = a.scale == nullptr ? nullptr : scale() + channel;
            tile.row_bias = a.bias == nullptr ? nullptr : bias() + channel;
            bool direct = at + tile.columns <= pq && !scattered;
            S* out = static_cast<S*>(a.dst) + ((first + lane) / pq * dst_c + channel) * dst_plane + at;
            tile.residual = static_cast<const S*>(a.residual), tile.origin = static_cast<const S*>(a.dst);
            for (int m = 0; m < kRows; ++m) {
              rows[m] = weights() + (channel + min_of(m, tile.valid_rows - 1)) * depth;
              dst[m] = direct ? out + m * dst_plane : aside + m * kWidth;
            }
            tile.streamed = streamed && direct && at % kLine<S> == 0 && width % kLine<S> == 0;
            // Of a tile that goes aside, f(place in the tensor, place aside, bytes) for what lies together.
            auto each_run = [&](auto&& f) {
              each_image(first + lane, tile.columns, [&](int64_t image, int64_t pixel, int64_t n, int64_t from) {
                for (int m = 0; m < tile.valid_rows; ++m) f((image * dst_c + channel + m) * pq + pixel, aside + m * kWidth + from, n * sizeof(S));
              });
            };
            if (!direct && a.residual != nullptr) {
              each_run([&](int64_t place, S* to, size_t bytes) { std::memcpy(static_cast<void*>(to), static_cast<const S*>(a.residual) + place, bytes); });
              tile.residual = tile.origin = aside;
            }
            kTiles[width / L](tile);
            if (scattered)
              each_image(first + lane, tile.columns, [&](int64_t image, int64_t pixel, int64_t n, int64_t from) {
                for (int m = 0; m < tile.valid_rows; ++m) {
                  S between{};
                  if (a.bias != nullptr) put(&between, bias()[channel + m]);
                  scatter(aside + m * kWidth + from, static_cast<S*>(a.dst) + (image * dst_c + channel + m) * hw, pixel, n, between);
                }
              });
            else if (!direct)
              each_run([&](int64_t place, const S* from, size_t bytes) { std::memcpy(static_cast<void*>(static_cast<S*>(a.dst) + place), from, bytes); });
          }
      }
      if (streamed) fence();
    });
  }
};

}  // namespace

void conv_pointwise(const ConvArgs& a, const Pool& pool) {
#if defined(CONVKIT_DOTS)
  if (a.plan.pointwise.dots) {
    Pointwise<bf16, bf16, Pairs> pairs(a, pool);
    return pairs.run({static_cast<const bf16*>(a.src), pairs.src_plane});
  }
#endif
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) { Pointwise<S, compute_t<S>, const S*>(a, pool).run(static_cast<const S*>(a.src)); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
