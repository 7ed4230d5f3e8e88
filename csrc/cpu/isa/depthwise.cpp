// Depthwise convolution, one filter a channel: forward, input gradient, weight gradient.
//
// A task takes an image, a block of channels and a block of rows. Channels-last float32 and float64 images are read and
// written where they are; everything else (contiguous layout, 16-bit types, images so narrow that edges are most of
// them) goes through a channels-last copy of just the task's part, padded with zeros, that stays in the core's cache.
#include "../kernels.h"
#include "depthwise_run.h"
#include "staging.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

// Which taps reach an output at `position`, as a sequence with ascending source positions: tap `first + i * step`
// stands on source `source + i * source_step`. Forward: all taps. Input gradient: those whose phase fits.
struct Taps {
  int64_t first, step, count, source, source_step;
};

int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

Taps taps_at(int64_t position, int64_t filter, int64_t stride, int64_t pad, int64_t dilation, bool input_grad) {
  if (!input_grad) return {0, 1, filter, position * stride - pad, dilation};
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

template <class S> struct Depthwise {
  using T = compute_t<S>;
  static constexpr int L = kLanes<T>;
  const ConvArgs& a;
  const Pool& pool;
  bool input_grad;
  const ConvProblem& p = a.problem;
  const DepthwisePlan& plan = a.plan.depthwise;
  char* ws = static_cast<char*>(a.workspace);
  T* weights = reinterpret_cast<T*>(ws + plan.weights.offset);  // [r][s][c]; then bias [c]
  T* partial = reinterpret_cast<T*>(ws + plan.partial.offset);  // [split][r][s][c]
  int64_t src_h = input_grad ? p.p : p.h, src_w = input_grad ? p.q : p.w;
  int64_t dst_h = input_grad ? p.h : p.p, dst_w = input_grad ? p.w : p.q;
  int64_t blocks = ceil_div(p.c, plan.channel_block);

  Depthwise(const ConvArgs& args, const Pool& threads, bool backwards) : a(args), pool(threads), input_grad(backwards) {}

  T* scratch(int thread) const { return reinterpret_cast<T*>(ws + plan.scratch.offset + thread * plan.scratch_bytes); }

  void pack() const {
    const S* from = static_cast<const S*>(a.weight);
    const WeightStrides& st = a.weight_strides;
    for (int64_t r = 0; r < p.r; ++r)
      for (int64_t s = 0; s < p.s; ++s)
        for (int64_t c = 0; c < p.c; ++c) weights[(r * p.s + s) * p.c + c] = get(from + c * st.k + r * st.r + s * st.s);
    if (a.bias != nullptr)
      for (int64_t c = 0; c < p.c; ++c) weights[p.r * p.s * p.c + c] = get(static_cast<const S*>(a.bias) + c);
  }

  // One output row of one block of channels. `src` is source pixel (first_row, first_column) of the block's first
  // channel; pixels are `pixel` and rows `row` elements apart; src_rows x src_columns of them exist.
  struct Source {
    const T* at;
    int64_t first_row, rows, first_column, columns, pixel, row;
  };

  void output_row(const Source& src, int64_t i, T* out, int64_t out_pixel, int64_t channel, int64_t channels) const {
    Taps down = taps_at(i, p.r, p.stride_h, p.pad_top, p.dilation_h, input_grad);
    Range valid = inside(down.count, down.source_step, down.source - src.first_row, src.rows);
    const T* bias = a.bias == nullptr ? nullptr : weights + p.r * p.s * p.c + channel;
    int64_t phases = input_grad ? min_of(p.stride_w, dst_w) : 1;
    for (int64_t phase = 0; phase < phases; ++phase) {
      Taps across = taps_at(phase, p.s, p.stride_w, p.pad_left, p.dilation_w, input_grad);
      int64_t outputs = ceil_div(dst_w - phase, phases), output_step = input_grad ? 1 : p.stride_w;
      // Outputs [begin, end) have all their taps inside; the others take those that are.
      int64_t begin = across.count == 0 ? 0 : inside(outputs, output_step, across.source - src.first_column, src.columns).begin;
      int64_t end = across.count == 0 ? outputs
                                      : inside(outputs, output_step,
                                               across.source + (across.count - 1) * across.source_step - src.first_column, src.columns).end;
      end = max_of(begin, end);
      for (int64_t v = 0; v < channels; v += L) {
        const T* source_rows[kMaxDepthwiseRows];
        const T* weight_rows[kMaxDepthwiseRows];
        DepthwiseRun<T> run;
        run.rows = source_rows;
        run.weights = weight_rows;
        run.tap_step = across.source_step * src.pixel;
        run.weight_step = across.step * p.c;
        run.output_step = output_step * src.pixel;
        run.pixel = src.pixel;
        run.out_step = out_pixel * phases;
        run.scale = nullptr;
        run.lanes = int(min_of<int64_t>(L, channels - v));
        int64_t r = valid.begin;
        do {  // once, but for filters taller than kMaxDepthwiseRows; also when no row is inside
          int64_t last = min_of(valid.end, r + kMaxDepthwiseRows);
          run.row_count = int(last - r);
          run.accumulate = r != valid.begin;
          run.shift = last == valid.end && bias != nullptr ? bias + v : nullptr;
          run.relu = last == valid.end && a.relu;
          auto go = [&](int64_t first, int64_t count, int64_t tap, int64_t taps) {
            for (int64_t j = r; j < last; ++j) {
              source_rows[j - r] = src.at + (down.source + j * down.source_step - src.first_row) * src.row +
                                   (across.source + tap * across.source_step + first * output_step - src.first_column) * src.pixel + v;
              weight_rows[j - r] = weights + ((down.first + j * down.step) * p.s + across.first + tap * across.step) * p.c + channel + v;
            }
            run.taps = taps;
            run.outputs = count;
            run.out = out + (phase + first * phases) * out_pixel + v;
            depthwise_dispatch(run);
          };
          auto edge = [&](int64_t q) {
            Range t = inside(across.count, across.source_step, across.source + q * output_step - src.first_column, src.columns);
            go(q, 1, t.begin, t.end - t.begin);
          };
          for (int64_t q = 0; q < min_of(begin, outputs); ++q) edge(q);
          if (begin < end) go(begin, end - begin, 0, across.count);
          for (int64_t q = max_of(min_of(begin, outputs), end); q < outputs; ++q) edge(q);
          r = last;
        } while (r < valid.end);
      }
    }
  }

  // Source rows [first, last) that outputs [begin, end) reach, before clipping to the image.
  Range source_rows(int64_t begin, int64_t end) const {
    int64_t reach = p.dilation_h * (p.r - 1);
    if (!input_grad) return {begin * p.stride_h - p.pad_top, (end - 1) * p.stride_h - p.pad_top + reach + 1};
    auto floor_div = [](int64_t x, int64_t y) { return x >= 0 ? x / y : -ceil_div(-x, y); };
    return {floor_div(begin + p.pad_top - reach, p.stride_h), floor_div(end - 1 + p.pad_top, p.stride_h) + 1};
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
        if (!plan.stage) {
          Source whole{reinterpret_cast<const T*>(from) + channel, 0, src_h, 0, src_w, p.c, src_w * p.c};
          for (int64_t i = first; i < last; ++i)
            output_row(whole, i, reinterpret_cast<T*>(to) + i * dst_w * p.c + channel, p.c, channel, channels);
          continue;
        }
        Range rows = source_rows(first, last);
        rows = {max_of<int64_t>(rows.begin, 0), max_of<int64_t>(0, min_of(rows.end, src_h))};
        rows.end = max_of(rows.begin, rows.end);
        Source part = stage(from, rows, channel, channels, scratch(thread));
        T* out = scratch(thread) + plan.staged_elements;
        for (int64_t i = first; i < last; ++i)
          output_row(part, i, out + (i - first) * dst_w * plan.channel_block, plan.channel_block, channel, channels);
        unstage_pixels(out, plan.channel_block, to, p.layout, dst_h * dst_w, p.c, first * dst_w, (last - first) * dst_w, channel, channels);
      }
    });
  }

  Source stage(const S* image, Range rows, int64_t channel, int64_t channels, T* to) const {
    int64_t width = plan.staged_last - plan.staged_first, row_size = width * plan.channel_block, left = -plan.staged_first;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
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
    int64_t pieces = ceil_div(p.p, plan.rows_per_task), units = p.n * pieces, size = p.r * p.s * p.c;
    parallel(pool, plan.splits * blocks, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t split = task / blocks, channel = task % blocks * plan.channel_block;
        int64_t channels = min_of(plan.channel_block, p.c - channel);
        T* sums = partial + split * size + channel;
        for (int64_t tap = 0; tap < p.r * p.s; ++tap) fill_zero(sums + tap * p.c, channels);
        for (int64_t unit = units * split / plan.splits; unit < units * (split + 1) / plan.splits; ++unit) {
          int64_t image = unit / pieces, first = unit % pieces * plan.rows_per_task, last = min_of(p.p, first + plan.rows_per_task);
          const S* image_grad = grad + image * p.p * p.q * p.c;
          const S* image_x = x + image * p.h * p.w * p.c;
          if (!plan.stage) {
            Source whole{reinterpret_cast<const T*>(image_x) + channel, 0, p.h, 0, p.w, p.c, p.w * p.c};
            accumulate(whole, reinterpret_cast<const T*>(image_grad) + first * p.q * p.c + channel, p.c, first, last, channels, sums);
            continue;
          }
          Range rows = source_rows(first, last);
          rows = {max_of<int64_t>(rows.begin, 0), max_of<int64_t>(0, min_of(rows.end, p.h))};
          rows.end = max_of(rows.begin, rows.end);
          Source part = stage(image_x, rows, channel, channels, scratch(thread));
          T* staged_grad = scratch(thread) + plan.staged_elements;
          stage_pixels(image_grad, p.layout, p.p * p.q, p.c, first * p.q, (last - first) * p.q, channel, channels, staged_grad,
                       plan.channel_block);
          accumulate(part, staged_grad, plan.channel_block, first, last, channels, sums);
        }
      }
    });
    S* dst = static_cast<S*>(a.dst);
    const WeightStrides& st = a.weight_strides;
    parallel(pool, p.c, [&](int64_t begin, int64_t end, int) {
      for (int64_t tap = 0; tap < p.r * p.s; ++tap)
        for (int64_t c = begin; c < end; ++c) {
          T sum = partial[tap * p.c + c];
          for (int64_t split = 1; split < plan.splits; ++split) sum += partial[split * size + tap * p.c + c];
          put(dst + c * st.k + tap / p.s * st.r + tap % p.s * st.s, sum);
        }
    });
  }

  // Adds output rows [first, last) to sums[r][s]; grad is pixel (first, 0).
  void accumulate(const Source& src, const T* grad, int64_t grad_pixel, int64_t first, int64_t last, int64_t channels, T* sums) const {
    constexpr int64_t kRows = 4;  // as many rows at a time as stay in the first-level cache while the filter rows pass over them
    for (int64_t v = 0; v < channels; v += L)
      for (int64_t i = first; i < last; i += kRows)
        for (int64_t r = 0; r < p.r; ++r) {
          Range rows = inside(p.p, p.stride_h, r * p.dilation_h - p.pad_top - src.first_row, src.rows);
          rows = {max_of(rows.begin, i), min_of(rows.end, min_of(i + kRows, last))};
          if (rows.begin >= rows.end) continue;
          DepthwiseGradRun<T> run;
          run.rows = rows.end - rows.begin;
          run.grad_row = p.q * grad_pixel;
          run.x_row = p.stride_h * src.row;
          run.grad_step = grad_pixel;
          run.x_step = p.stride_w * src.pixel;
          run.tap_step = p.dilation_w * src.pixel;
          run.sum_step = p.c;
          run.lanes = int(min_of<int64_t>(L, channels - v));
          int64_t offset = -p.pad_left - src.first_column, reach = (p.s - 1) * p.dilation_w;
          auto go = [&](int64_t q, int64_t count, int64_t tap, int64_t taps) {
            run.grad = grad + ((rows.begin - first) * p.q + q) * grad_pixel + v;
            run.x = src.at + (rows.begin * p.stride_h - p.pad_top + r * p.dilation_h - src.first_row) * src.row +
                    (q * p.stride_w + offset + tap * p.dilation_w) * src.pixel + v;
            run.outputs = count;
            run.taps = taps;
            run.sums = sums + (r * p.s + tap) * p.c + v;
            depthwise_grad_dispatch(run);
          };
          auto edge = [&](int64_t q) {
            Range t = inside(p.s, p.dilation_w, q * p.stride_w + offset, src.columns);
            if (t.begin < t.end) go(q, 1, t.begin, t.end - t.begin);
          };
          int64_t begin = min_of(p.q, inside(p.q, p.stride_w, offset, src.columns).begin);
          int64_t end = max_of(begin, inside(p.q, p.stride_w, offset + reach, src.columns).end);
          for (int64_t q = 0; q < begin; ++q) edge(q);
          if (begin < end) go(begin, end - begin, 0, p.s);
          for (int64_t q = end; q < p.q; ++q) edge(q);
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
