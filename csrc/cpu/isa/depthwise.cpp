// Depthwise convolution, one filter a channel: forward, input gradient, weight gradient.
//
// A task takes an image, a block of channels and a block of rows, and goes over it in the order of memory, two rows of
// outputs at a time. Channels-last images are read and written where they are, whole pixels at a time (16-bit values are
// widened as they are loaded), while the source rows of the next two are on their way into the second-level cache: into the
// first they would wait in its few line buffers, which writing past the caches needs too. Contiguous images go through a
// channels-last copy of just the task's part, while the next task's is on its way. Small ones are copied as they are, all
// pixels in one run, larger ones row by row with the padding.
#include "../kernels.h"
#include "depthwise_run.h"
#include "staging.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

template <class S> struct Depthwise {
  using T = compute_t<S>;
  static constexpr int L = kLanes<T>;
  const ConvArgs& a;
  const Pool& pool;
  bool input_grad;
  const ConvProblem& p = a.problem;
  const DepthwisePlan& plan = a.plan.depthwise;
  char* ws = static_cast<char*>(a.workspace);
  T* weights = reinterpret_cast<T*>(ws + plan.weights.offset);  // [vector of channels][r][s][lanes]; then bias [c]
  T* partial = reinterpret_cast<T*>(ws + plan.partial.offset);  // [split][vector of channels][r][s][lanes]
  int64_t src_h = input_grad ? p.p : p.h, src_w = input_grad ? p.q : p.w;
  int64_t dst_h = input_grad ? p.h : p.p, dst_w = input_grad ? p.w : p.q;
  int64_t blocks = ceil_div(p.c, plan.channel_block), vectors = ceil_div(p.c, L), filter = p.r * p.s * L;
  // Where the caller's tensor is as the kernels want it, they read and write it themselves.
  bool direct = !plan.stage;
  bool aligned = plan.stream && (direct || sizeof(S) == sizeof(T)) && streamable(a.dst);
  bool streamed = aligned && direct && p.c % kLine<S> == 0 && plan.channel_block % kLine<S> == 0;
  // Contiguous rows of outputs are whole lines, or the images of a block's channels together are, through one more copy.
  bool streamed_planes = aligned && !direct && kLine<S> == L && dst_h * dst_w % L == 0 && plan.rows_per_task * dst_w % L == 0;
  bool streamed_block = aligned && !direct && !streamed_planes && plan.rows_per_task == dst_h && p.c * dst_h * dst_w % L == 0;

  Depthwise(const ConvArgs& args, const Pool& threads, bool backwards) : a(args), pool(threads), input_grad(backwards) {}

  template <class D, class W> DepthwiseLine<D, W>* line_table(int thread) const {
    return reinterpret_cast<DepthwiseLine<D, W>*>(ws + plan.scratch.offset + thread * plan.scratch_bytes);
  }
  T* scratch(int thread) const { return reinterpret_cast<T*>(ws + plan.scratch.offset + thread * plan.scratch_bytes + plan.lines_bytes); }
  T* bias() const { return weights + vectors * filter; }

  void pack() const {
    const S* from = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    fill_zero(weights + (vectors - 1) * filter, filter);
    for (int64_t v = 0; v < vectors; ++v) {
      int64_t channels = min_of<int64_t>(L, p.c - v * L);
      const S* first = from + v * L * st.k;
      T* to = weights + v * filter;
      if (st.s == 1 && st.r == p.s) transpose_block(first, st.k, to, L, channels, p.r * p.s);
      else for (int64_t tap = 0; tap < p.r * p.s; ++tap)
        for (int64_t l = 0; l < channels; ++l) to[tap * L + l] = get(first + l * st.k + tap / p.s * st.r + tap % p.s * st.s);
    }
    if (a.bias != nullptr)
      for (int64_t c = 0; c < p.c; ++c) bias()[c] = bias_of<S>(a, c);
  }

  // Source pixel (first_row, first_column) of a block's first channel; pixels are `pixel` and rows `row` elements apart;
  // rows x columns of them exist. D is S, or T if this is a copy.
  template <class D> struct Source {
    const D* at;
    int64_t first_row, rows, first_column, columns, pixel, row;
  };

  // What the next task reads of contiguous planes, asked for little by little while this one computes.
  struct Ahead {
    const char* at = nullptr;
    int64_t width = 0, stride = 0, planes = 0, step = 0;  // bytes of each plane, from plane to plane; lines at a time
    int64_t x = 0;
    void some() {
      for (int64_t i = 0; i < step && planes > 0; ++i) {
        __builtin_prefetch(at + x, 0, 2);
        if ((x += 64) >= width) x = 0, at += stride, --planes;
      }
    }
  };

  // The source lines under outputs of row i and, where there are two rows, i + 1; `taps` is tap (0, 0).
  template <class D, class W> void find_lines(DepthwiseLines<D, W>& to, const Source<D>& src, int64_t i, W* taps) const {
    Taps down[2];
    Range valid[2] = {};
    for (int o = 0; o < to.rows; ++o) {
      down[o] = taps_at(i + o, p.r, p.stride_h, p.pad_top, p.dilation_h, input_grad);
      valid[o] = inside(down[o].count, down[o].source_step, down[o].source - src.first_row, src.rows);
    }
    auto tap_under = [&](int o, int64_t row) -> W* {
      if (valid[o].begin == valid[o].end) return nullptr;
      int64_t k = row - down[o].source, step = down[o].source_step;
      if (step != 1) k = k % step == 0 ? k / step : -1;
      return k >= valid[o].begin && k < valid[o].end ? taps + (down[o].first + k * down[o].step) * p.s * L : nullptr;
    };
    int64_t count = 0;
    for (int part = 0; part < 3; ++part) {
      int o = part / 2;
      for (int64_t k = valid[o].begin; k < valid[o].end; ++k) {
        int64_t row = down[o].source + k * down[o].source_step;
        W* other = tap_under(1 - o, row);
        if ((other != nullptr) != (part == 1)) continue;
        auto& line = to.lines[count++];
        line.source = src.at + (row - src.first_row) * src.row;
        line.taps[o] = tap_under(o, row), line.taps[1 - o] = other;
      }
      to.upto[part] = count;
    }
    // What the next two rows of outputs will add, which may be the next image's.
    Taps newest = taps_at(i + 1, p.r, p.stride_h, p.pad_top, p.dilation_h, input_grad);
    to.ahead = src.at + (newest.source + (newest.count - 1) * newest.source_step + 1 - src.first_row) * src.row;
    to.ahead_row = src.row;
  }

  // Outputs of rows [first, last) of one block of channels; `out` is pixel (first, 0), and so is `residual`, if any.
  template <class D>
  void output_rows(const Source<D>& src, int64_t first, int64_t last, D* out, const D* residual, int64_t out_pixel, int64_t channel, int64_t channels, int thread, Ahead& coming) const {
    int64_t phases = input_grad ? min_of(p.stride_w, dst_w) : 1, out_row = dst_w * out_pixel;
    DepthwiseOutputs<D> run;
    run.lines = line_table<D, const T>(thread);
    run.tap_vector = filter;
    run.output_pixels = input_grad ? 1 : p.stride_w;
    run.pixel = src.pixel, run.columns = src.columns;
    run.channels = channels;
    run.out_row = out_row, run.out_step = out_pixel * phases;
    run.streamed = streamed;
    run.scale = a.scale != nullptr ? static_cast<const T*>(a.scale) + channel : nullptr;
    run.shift = a.bias != nullptr ? bias() + channel : nullptr;
    run.relu = a.relu && (residual != nullptr || a.residual == nullptr);
    for (int64_t i = first; i < last; i += 2) {
      coming.some();
      run.rows = int(min_of<int64_t>(2, last - i));
      find_lines(run, src, i, static_cast<const T*>(weights + channel / L * filter));
      for (int64_t phase = 0; phase < phases; ++phase) {
        Taps across = taps_at(phase, p.s, p.stride_w, p.pad_left, p.dilation_w, input_grad);
        run.taps = across.count;
        run.tap_pixels = across.source_step;
        run.tap_step = across.step * L, run.first_tap = across.first * L;
        run.origin = across.source - src.first_column;
        run.outputs = ceil_div(dst_w - phase, phases);
        run.ahead_rows = plan.stage || phase > 0 || channels != p.c ? 0 : int(input_grad ? ceil_div(2, p.stride_h) : 2 * p.stride_h);
        int64_t at = (i - first) * out_row + phase * out_pixel;
        run.out = out + at;
        run.residual = residual != nullptr ? residual + at : nullptr;
        depthwise_dispatch(run);
      }
    }
  }

  // Source rows [first, last) that outputs [begin, end) reach, before clipping to the image.
  Range source_rows(int64_t begin, int64_t end) const {
    int64_t reach = p.dilation_h * (p.r - 1);
    if (!input_grad) return {begin * p.stride_h - p.pad_top, (end - 1) * p.stride_h - p.pad_top + reach + 1};
    return {floor_div(begin + p.pad_top - reach, p.stride_h), floor_div(end - 1 + p.pad_top, p.stride_h) + 1};
  }

  static Range clipped(Range rows, int64_t size) {
    Range r{max_of<int64_t>(rows.begin, 0), max_of<int64_t>(0, min_of(rows.end, size))};
    return {r.begin, max_of(r.begin, r.end)};
  }

  void transform() const {
    pack();
    int64_t pieces = ceil_div(dst_h, plan.rows_per_task);
    const S* src = static_cast<const S*>(a.src);
    S* dst = static_cast<S*>(a.dst);
    parallel(pool, p.n * blocks * pieces, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t piece = task % pieces, channel = task / pieces % blocks * plan.channel_block, image = task / pieces / blocks;
        int64_t channels = min_of(plan.channel_block, p.c - channel);
        int64_t first = piece * plan.rows_per_task, last = min_of(dst_h, first + plan.rows_per_task);
        const S* from = src + image * src_h * src_w * p.c;
        S* to = dst + image * dst_h * dst_w * p.c;
        Ahead coming;
        if (direct) {
          int64_t at = first * dst_w * p.c + channel;
          const S* residual = a.residual == nullptr ? nullptr : static_cast<const S*>(a.residual) + (to - dst) + at;
          output_rows<S>({from + channel, 0, src_h, 0, src_w, p.c, src_w * p.c}, first, last, to + at, residual, p.c, channel, channels, thread, coming);
          continue;
        }
        Source<T> part = stage(from, clipped(source_rows(first, last), src_h), channel, channels, scratch(thread));
        if (task + 1 < end) {
          int64_t next = (task + 1) / pieces, row = (task + 1) % pieces * plan.rows_per_task;
          Range rows = clipped(source_rows(row, min_of(dst_h, row + plan.rows_per_task)), src_h);
          coming = ahead(src, next / blocks, next % blocks * plan.channel_block, rows, src_h, src_w, ceil_div(last - first, 2));
        }
        T* out = scratch(thread) + plan.staged_elements;
        output_rows<T>(part, first, last, out, nullptr, plan.channel_block, channel, channels, thread, coming);
        with_residual<S>(a, [&](auto finish) { unstage(out, to, first * dst_w, (last - first) * dst_w, channel, channels, finish); });
      }
      if (aligned) fence();
    });
  }

  template <class Finish> void unstage(const T* out, S* image, int64_t first, int64_t pixels, int64_t channel, int64_t channels, Finish finish) const {
    int64_t hw = dst_h * dst_w;
    S* to = image + channel * hw + first;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (streamed_planes) return transpose_block(out, plan.channel_block, to, hw, pixels, channels, true, finish);
      if (streamed_block) {
        T* planes = const_cast<T*>(out) + plan.channel_block * hw;
        transpose_block(out, plan.channel_block, planes, hw, pixels, channels);
        for (int64_t i = 0; i < channels * hw; i += L) stream(to + i, finish(load(planes + i), to + i, L));
        return;
      }
    }
    unstage_pixels(out, plan.channel_block, image, p.layout, hw, p.c, first, pixels, channel, channels, finish);
  }

  // Of rows of h x w planes, in so many turns.
  Ahead ahead(const S* tensor, int64_t image, int64_t channel, Range rows, int64_t h, int64_t w, int64_t turns) const {
    // Images that are copied row by row come as fast without.
    if (p.layout != Layout::nchw || plan.staged_last - plan.staged_first != src_w || plan.staged_first != 0) return {};
    constexpr int64_t bytes = sizeof(S);
    int64_t channels = min_of(plan.channel_block, p.c - channel), part = (rows.end - rows.begin) * w * bytes;
    const char* at = reinterpret_cast<const char*>(tensor + ((image * p.c + channel) * h + rows.begin) * w);
    int64_t step = ceil_div(part * channels, 64 * turns);
    if (part == h * w * bytes) return {at, part * channels, 0, 1, step};
    return {at, part, h * w * bytes, channels, step};
  }

  Source<T> stage(const S* image, Range rows, int64_t channel, int64_t channels, T* to) const {
    int64_t width = plan.staged_last - plan.staged_first, row_size = width * plan.channel_block, left = -plan.staged_first;
    if (width == src_w)
      stage_pixels(image, p.layout, src_h * src_w, p.c, rows.begin * src_w, (rows.end - rows.begin) * src_w, channel, channels, to, plan.channel_block);
    else for (int64_t r = rows.begin; r < rows.end; ++r) {
      T* line = to + (r - rows.begin) * row_size;
      fill_zero(line, left * plan.channel_block);
      stage_pixels(image, p.layout, src_h * src_w, p.c, r * src_w, src_w, channel, channels, line + left * plan.channel_block,
                   plan.channel_block);
      fill_zero(line + (left + src_w) * plan.channel_block, (width - left - src_w) * plan.channel_block);
    }
    return {to, rows.begin, rows.end - rows.begin, plan.staged_first, width, plan.channel_block, row_size};
  }

  // Sums of the splits, each over its own images and rows; then all splits in order.
  void weight_gradient() const {
    const S* grad = static_cast<const S*>(a.src);
    const S* x = static_cast<const S*>(a.x);
    int64_t pieces = ceil_div(p.p, plan.rows_per_task), units = p.n * pieces, size = vectors * filter;
    parallel(pool, plan.splits * blocks, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t split = task / blocks, channel = task % blocks * plan.channel_block;
        int64_t channels = min_of(plan.channel_block, p.c - channel);
        T* sums = partial + split * size + channel / L * filter;
        fill_zero(sums, ceil_div(channels, L) * filter);
        for (int64_t unit = units * split / plan.splits; unit < units * (split + 1) / plan.splits; ++unit) {
          int64_t image = unit / pieces, first = unit % pieces * plan.rows_per_task, last = min_of(p.p, first + plan.rows_per_task);
          const S* image_grad = grad + image * p.p * p.q * p.c;
          const S* image_x = x + image * p.h * p.w * p.c;
          Ahead coming_x, coming_grad;
          if (direct) {
            const S* part_grad = image_grad + first * p.q * p.c + channel;
            accumulate<S>({image_x + channel, 0, p.h, 0, p.w, p.c, p.w * p.c}, part_grad, p.c, first, last, channels, sums, thread, coming_x, coming_grad);
            continue;
          }
          Source<T> part = stage(image_x, clipped(source_rows(first, last), p.h), channel, channels, scratch(thread));
          T* part_grad = scratch(thread) + plan.staged_elements;
          stage_pixels(image_grad, p.layout, p.p * p.q, p.c, first * p.q, (last - first) * p.q, channel, channels, part_grad, plan.channel_block);
          if (unit + 1 < units * (split + 1) / plan.splits) {
            int64_t row = (unit + 1) % pieces * plan.rows_per_task, end_row = min_of(p.p, row + plan.rows_per_task), turns = ceil_div(last - first, 2);
            coming_x = ahead(x, (unit + 1) / pieces, channel, clipped(source_rows(row, end_row), p.h), p.h, p.w, turns);
            coming_grad = ahead(grad, (unit + 1) / pieces, channel, {row, end_row}, p.p, p.q, turns);
          }
          accumulate<T>(part, part_grad, plan.channel_block, first, last, channels, sums, thread, coming_x, coming_grad);
        }
      }
    });
    S* dst = static_cast<S*>(a.dst);
    const WeightStrides& st = a.weight_strides;
    parallel(pool, vectors, [&](int64_t begin, int64_t end, int) {
      for (int64_t v = begin; v < end; ++v)
        for (int64_t tap = 0; tap < p.r * p.s; ++tap) {
          const T* from = partial + (v * p.r * p.s + tap) * L;
          vec<T> sum = load(from);
          for (int64_t split = 1; split < plan.splits; ++split) sum += load(from + split * size);
          S* to = dst + v * L * st.k + tap / p.s * st.r + tap % p.s * st.s;
          for (int64_t l = 0; l < min_of<int64_t>(L, p.c - v * L); ++l) put(to + l * st.k, sum[l]);
        }
    });
  }

  // Adds output rows [first, last) to sums[vector of channels][r][s]; grad is pixel (first, 0).
  template <class D>
  void accumulate(const Source<D>& src, const D* grad, int64_t grad_pixel, int64_t first, int64_t last, int64_t channels, T* sums, int thread,
                  Ahead& coming_x, Ahead& coming_grad) const {
    DepthwiseGrads<D> run;
    run.lines = line_table<D, T>(thread);
    run.taps = p.s, run.tap_step = L, run.tap_vector = filter, run.first_tap = 0;
    run.tap_pixels = p.dilation_w, run.output_pixels = p.stride_w;
    run.pixel = src.pixel, run.columns = src.columns;
    run.origin = -p.pad_left - src.first_column;
    run.outputs = p.q, run.channels = channels;
    run.grad_row = p.q * grad_pixel, run.grad_pixel = grad_pixel;
    run.ahead_rows = plan.stage || channels != p.c ? 0 : int(2 * p.stride_h);
    for (int64_t i = first; i < last; i += 2) {
      coming_x.some(), coming_grad.some();
      run.rows = int(min_of<int64_t>(2, last - i));
      find_lines(run, src, i, sums);
      if (run.upto[2] == 0) continue;
      run.grad = grad + (i - first) * run.grad_row;
      depthwise_dispatch(run);
    }
  }
};

}  // namespace

void depthwise(const ConvArgs& a, Pass pass, const Pool& pool) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S>) {
    Depthwise<S> run(a, pool, pass == Pass::input_grad);
    if (pass == Pass::weight_grad) run.weight_gradient();
    else run.transform();
  });
}

}  // namespace convkit::cpu::CONVKIT_ISA
