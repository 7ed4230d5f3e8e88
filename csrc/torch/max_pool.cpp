// Max pooling, its gradient, and what the gradient of that takes: the values at the taps that were the largest.
#include <ATen/ops/empty.h>

#include <tuple>

#include "tensors.h"

namespace convkit {
namespace {

struct Axis {
  int64_t taps, outputs, stride, pad, dilation;
};

// One axis of a problem, checked as PyTorch does. Taps that lie in the padding for every output are left out.
Axis axis(const char* op, int i, int64_t size, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  struct { const char* arg; IntArrayRef values; int64_t least; } all[] = {{"kernel_size", kernel_size, 1}, {"stride", stride, 1}, {"padding", padding, 0}, {"dilation", dilation, 1}};
  for (auto& [arg, values, least] : all)
    CONVKIT_CHECK(values.size() == 2 && values[i] >= least, op, arg, "got ", values, "; accepts two integers of at least ", least);
  int64_t taps = kernel_size[i], pad = padding[i], dilate = dilation[i], step = stride[i];
  __int128 reach = __int128(dilate) * (taps - 1);
  CONVKIT_CHECK(pad <= (reach + 1) / 2, op, "padding", "got ", padding, "; accepts at most half of the kernel, ", kernel_size, " with dilation ", dilation);
  __int128 room = __int128(size) + 2 * __int128(pad) - reach - 1;
  CONVKIT_CHECK(size > 0 && room + (ceil_mode ? step - 1 : 0) >= 0, op, "kernel_size", "got ", kernel_size, " with dilation ", dilation, " and padding ", padding,
                ": larger than the padded image, whose ", i == 0 ? "height" : "width", " is ", size, "; accepts kernels that fit");
  __int128 outputs = (room + (ceil_mode ? step - 1 : 0)) / step + 1;
  // The last window begins in the image or before it.
  if (ceil_mode) outputs = std::min<__int128>(outputs, (__int128(size) + pad - 1) / step + 1);
  Axis out{taps, int64_t(outputs), step, pad, dilate};
  // Neither a step between windows, where there is one, nor between taps plays a part then: no later product can overflow.
  if (out.outputs == 1) out.stride = 1;
  if (taps == 1) return out.dilation = 1, out;
  int64_t last_start = (out.outputs - 1) * out.stride - pad;
  int64_t first_tap = last_start >= 0 ? 0 : std::min((-last_start + dilate - 1) / dilate, taps - 1), last_tap = std::min(taps - 1, (size - 1 + pad) / dilate);
  out.taps = std::max<int64_t>(1, last_tap - first_tap + 1);
  out.pad = pad - first_tap * dilate;
  if (out.taps == 1) out.dilation = 1;
  return out;
}

MaxPoolArgs arguments(const char* op, int64_t n, int64_t c, IntArrayRef size, DType dtype, bool channels_last, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                      IntArrayRef dilation, bool ceil_mode) {
  Axis h = axis(op, 0, size[0], kernel_size, stride, padding, dilation, ceil_mode), w = axis(op, 1, size[1], kernel_size, stride, padding, dilation, ceil_mode);
  MaxPoolArgs args{};
  args.problem = {n, c, size[0], size[1], h.taps, w.taps, h.outputs, w.outputs, h.stride, w.stride, h.pad, w.pad, h.dilation, w.dilation, dtype, layout(channels_last)};
  CONVKIT_CHECK(h.taps <= INT32_MAX / w.taps, op, "kernel_size", "got ", kernel_size, " for an image of ", size, "; accepts at most 2147483647 taps in the image");
  args.wide_taps = kernel_size[0] > 255 / kernel_size[1];
  return args;
}

void check_input(const char* op, const char* arg, const Tensor& t) {
  CONVKIT_CHECK(t.dim() == 4, op, arg, "got ", t.dim(), "-D size ", t.sizes(), "; accepts 4-D (N, C, H, W)");
  check_dense(op, arg, t, t);
  CONVKIT_CHECK(t.size(1) > 0 && t.size(2) > 0 && t.size(3) > 0, op, arg, "got size ", t.sizes(), "; only the batch may be empty");
}

// The taps as the forward wrote them for outputs of this size.
Tensor check_taps(const char* op, const MaxPoolArgs& args, const Tensor& taps, const Tensor& like, bool channels_last) {
  const MaxPoolProblem& p = args.problem;
  at::ScalarType type = args.wide_taps ? at::kInt : at::kByte;
  check_dense(op, "taps", taps, like);
  CONVKIT_CHECK(taps.sizes() == IntArrayRef({p.n, p.c, p.p, p.q}) && taps.scalar_type() == type, op, "taps", "got ", taps.scalar_type(), " of size ", taps.sizes(),
                "; accepts what max_pool2d returned for these arguments, ", type, " of size ", IntArrayRef({p.n, p.c, p.p, p.q}));
  return taps.contiguous(format(channels_last));
}

enum class Work { forward, grad, pick };

void run([[maybe_unused]] const char* op, const MaxPoolArgs& args, const Tensor& like, Work work) {
#if defined(CONVKIT_GPU)
  if (gpu::runs(like)) {
    gpu::facts(op, like);
    auto kernel = work == Work::forward ? cuda::max_pool : work == Work::grad ? cuda::max_pool_grad : cuda::max_pool_pick;
    return kernel(args, gpu::stream(like));
  }
#endif
#if !defined(CONVKIT_EMULATION)
  const cpu::Kernels& kernels = cpu::kernels();
  if (work == Work::pick) return kernels.max_pool_pick(args, pool());
  Tensor ws = workspace(kernels.max_pool_workspace(args, at::get_num_threads()), like);
  (work == Work::forward ? kernels.max_pool : kernels.max_pool_grad)(args, ws.mutable_data_ptr(), pool());
#endif
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                      std::optional<std::string_view> activation, bool save_taps) {
  const char* op = "max_pool2d";
  check_input(op, "input", input);
  TORCH_CHECK_VALUE(!activation.has_value() || *activation == "relu", "convkit.", op, ": activation: got '", std::string(*activation), "'; accepts None or 'relu'");
  bool channels_last = is_channels_last(input);
  MaxPoolArgs args = arguments(op, input.size(0), input.size(1), input.sizes().slice(2), dtype_of(op, "input", input), channels_last, kernel_size, stride, padding, dilation, ceil_mode);
  const MaxPoolProblem& p = args.problem;
  gpu::Scope scope(input);
  Tensor out = new_tensor({p.n, p.c, p.p, p.q}, input, channels_last);
  auto type = input.options().dtype(args.wide_taps ? at::kInt : at::kByte);
  Tensor taps = save_taps ? at::empty(out.sizes(), type.memory_format(format(channels_last))) : at::empty({0}, type);
  if (out.numel() == 0) return {out, taps};
  Tensor x = input.contiguous(format(channels_last));
  args.src = in("the input", x);
  args.taps = save_taps ? convkit::out("the taps", taps) : nullptr;
  args.dst = convkit::out("the output", out);
  args.relu = activation.has_value();
  run(op, args, input, Work::forward);
  return {out, taps};
}

Tensor max_pool2d_grad(const Tensor& grad, const Tensor& taps, IntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       bool ceil_mode, bool channels_last) {
  const char* op = "max_pool2d_grad";
  check_input(op, "grad", grad);
  CONVKIT_CHECK(input_size.size() == 2, op, "input_size", "got ", input_size, "; accepts two integers");
  MaxPoolArgs args = arguments(op, grad.size(0), grad.size(1), input_size, dtype_of(op, "grad", grad), channels_last, kernel_size, stride, padding, dilation, ceil_mode);
  const MaxPoolProblem& p = args.problem;
  CONVKIT_CHECK(grad.size(2) == p.p && grad.size(3) == p.q, op, "grad", "got size ", grad.sizes(), "; accepts the output's, ", IntArrayRef({p.n, p.c, p.p, p.q}));
  Tensor t = check_taps(op, args, taps, grad, channels_last);
  gpu::Scope scope(grad);
  Tensor out = new_tensor({p.n, p.c, p.h, p.w}, grad, channels_last);
  if (out.numel() == 0) return out;
  Tensor g = grad.contiguous(format(channels_last));
  args.src = in("the gradient of the output", g);
  args.taps = const_cast<void*>(in("the taps", t));
  args.dst = convkit::out("the gradient of the input", out);
  run(op, args, grad, Work::grad);
  return out;
}

Tensor max_pool2d_pick(const Tensor& input, const Tensor& taps, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode, bool channels_last) {
  const char* op = "max_pool2d_pick";
  check_input(op, "input", input);
  MaxPoolArgs args = arguments(op, input.size(0), input.size(1), input.sizes().slice(2), dtype_of(op, "input", input), channels_last, kernel_size, stride, padding, dilation, ceil_mode);
  Tensor t = check_taps(op, args, taps, input, channels_last);
  gpu::Scope scope(input);
  Tensor out = new_tensor(taps.sizes(), input, channels_last);
  if (out.numel() == 0) return out;
  Tensor x = input.contiguous(format(channels_last));
  args.src = in("the input", x);
  args.taps = const_cast<void*>(in("the taps", t));
  args.dst = convkit::out("the output", out);
  run(op, args, input, Work::pick);
  return out;
}

}  // namespace

void register_max_pool(torch::Library& m) {
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_grad", max_pool2d_grad);
  m.impl("max_pool2d_pick", max_pool2d_pick);
}

}  // namespace convkit
