// Per-channel operators: batch normalisation + ReLU with its gradient, running statistics, bias gradient; and im2col.
#include <ATen/Dispatch.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <tuple>

#include "operators.h"
#include "tensors.h"

namespace convkit {
namespace {

ChannelShape shape_of(const Tensor& t, DType dtype, bool channels_last) {
  return {t.size(0), t.size(1), t.size(2) * t.size(3), dtype, layout(channels_last)};
}

void check_4d(const char* op, const char* arg, const Tensor& t) {
  CONVKIT_CHECK(t.dim() == 4, op, arg, "got ", t.dim(), "-D size ", t.sizes(), "; accepts 4-D (N, C, H, W)");
}

// A per-channel argument in the arithmetic's type, contiguous; undefined if absent.
Tensor per_channel(const char* op, const char* arg, const OptionalTensor& t, const Tensor& input) {
  if (!t.has_value()) return Tensor();
  check_dense(op, arg, *t, input);
  CONVKIT_CHECK(t->numel() == input.size(1), op, arg, "should contain ", input.size(1), " elements, one a channel of the input ", input.sizes(), "; got ", t->numel(),
                " in size ", t->sizes());
  at::ScalarType wide = compute_type(input.scalar_type());
  CONVKIT_CHECK(t->scalar_type() == wide || t->scalar_type() == input.scalar_type(), op, arg, "got dtype ", t->scalar_type(), "; accepts ", wide,
                wide == input.scalar_type() ? "" : " or the input's", ": convert it with .to(dtype)");
  return t->to(wide).contiguous();
}

// Room for a result a channel, which the kernels write if there is anything to sum: zeros if not.
Tensor new_channels(int64_t count, const at::TensorOptions& options, const Tensor& summed) {
  auto contiguous = options.memory_format(at::MemoryFormat::Contiguous);
  return summed.numel() == 0 ? at::zeros({count}, contiguous) : gpu::fresh(at::empty({count}, contiguous));
}

#if defined(CONVKIT_GPU)
// Calls launch(plan, workspace, stream) for work on the channels of `like`; `touched`: all that must be aligned for vectors.
template <class Launch>
void on_gpu(const char* op, const ChannelShape& shape, ChannelWork work, std::initializer_list<const void*> touched, const Tensor& like, Launch&& launch) {
  const cuda::DeviceFacts& facts = gpu::facts(op, like);
  bool aligned = true;
  for (const void* p : touched) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  gpu::with_workspace([&](bool least) { return plan_channels_cuda(shape, work, facts, aligned, least); }, [&](int64_t bytes) { return workspace(bytes, like); },
                      [&](const CudaChannelPlan& plan, const Tensor& ws) {
                        if (printing_plans()) print_once(describe(shape, work, facts, plan));
                        launch(plan, out("the workspace", ws), gpu::stream(like));
                      });
}
#endif

// Bytes of the mask: one bit an element, every row (pixel of channels, or plane of one channel) from its own byte.
int64_t mask_bytes(const Tensor& t, bool channels_last) {
  int64_t c = t.size(1), hw = t.size(2) * t.size(3);
  bool by_pixel = c > 1 && (channels_last || hw == 1);
  return by_pixel ? t.size(0) * hw * ((c + 7) / 8) : t.size(0) * c * ((hw + 7) / 8);
}

void check_eps(const char* op, double eps, bool training) {
  TORCH_CHECK_VALUE(std::isfinite(eps) && (training ? eps > 0 : eps >= 0), "convkit.", op, ": eps: got ", eps, "; accepts a finite number that is ",
                    training ? "positive" : "not negative");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const OptionalTensor& mean, const OptionalTensor& var, double eps, bool save_mask) {
  const char* op = "batch_norm_relu";
  check_4d(op, "input", input);
  check_dense(op, "input", input, input);
  DType dtype = dtype_of(op, "input", input);
  CONVKIT_CHECK(mean.has_value() == var.has_value(), op, "mean", "and var: got only one of them; accepts both (evaluation) or neither (training)");
  bool training = !mean.has_value(), channels_last = is_channels_last(input);
  check_eps(op, eps, training);
  if (residual.has_value()) {
    check_like(op, "residual", *residual, input);
    CONVKIT_CHECK(residual->sizes() == input.sizes(), op, "residual", "got size ", residual->sizes(), "; accepts the input's, ", input.sizes());
  }
  Tensor w = per_channel(op, "weight", weight, input), b = per_channel(op, "bias", bias, input);
  int64_t count = input.size(0) * input.size(2) * input.size(3);
  TORCH_CHECK_VALUE(!training || count != 1, "convkit.", op, ": input: Expected more than 1 value per channel when training, got input size ", input.sizes());
  gpu::Scope scope(input);
  auto wide = input.options().dtype(compute_type(input.scalar_type()));
  // Never an input itself: an operator's results may not share memory with its arguments.
  Tensor m = training ? new_channels(input.size(1), wide, input) : per_channel(op, "mean", mean, input).clone();
  Tensor v = training ? new_channels(input.size(1), wide, input) : per_channel(op, "var", var, input).clone();
  Tensor out = new_tensor(input.sizes(), input, channels_last);
  Tensor mask = at::empty({save_mask ? mask_bytes(input, channels_last) : 0}, input.options().dtype(at::kByte));
  if (input.numel() == 0) return {out, m, v, mask};
  Tensor x = input.contiguous(format(channels_last));
  Tensor r = residual.has_value() ? residual->contiguous(format(channels_last)) : Tensor();
  BatchNormArgs args{};
  args.shape = shape_of(x, dtype, channels_last);
  args.x = in("the input", x);
  args.residual = in("the residual", r);
  args.weight = in("the weight", w), args.bias = in("the bias", b), args.mean = convkit::out("the mean", m), args.var = convkit::out("the variance", v);
  args.eps = eps;
  args.training = training;
  args.y = convkit::out("the output", out);
  args.mask = save_mask && r.defined() ? static_cast<uint8_t*>(convkit::out("the mask", mask)) : nullptr;
#if defined(CONVKIT_GPU)
  if (gpu::runs(input)) {
    ChannelWork work = training ? ChannelWork::forward : ChannelWork::evaluation;
    on_gpu(op, args.shape, work, {args.x, args.residual, args.y}, input, [&](const CudaChannelPlan& plan, void* ws, cuda::Stream stream) {
      args.workspace = ws;
      cuda::batch_norm_relu(args, plan, stream);
    });
    return {out, m, v, mask};
  }
#endif
#if !defined(CONVKIT_EMULATION)
  args.stream = streams(x.nbytes(), cpu::cpu_facts(at::get_num_threads()));
  Tensor ws = workspace(cpu::kernels().channel_workspace(args.shape, at::get_num_threads()), input);
  args.workspace = ws.mutable_data_ptr();
  cpu::kernels().batch_norm_relu(args, pool());
#endif
  return {out, m, v, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_grad(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                                                                const Tensor& var, const OptionalTensor& mask, double eps, bool training, std::array<bool, 4> output_mask) {
  const char* op = "batch_norm_relu_grad";
  check_4d(op, "input", input);
  check_dense(op, "input", input, input);
  DType dtype = dtype_of(op, "input", input);
  check_like(op, "grad", grad, input);
  CONVKIT_CHECK(grad.sizes() == input.sizes(), op, "grad", "got size ", grad.sizes(), "; accepts the input's, ", input.sizes());
  bool channels_last = is_channels_last(input);
  if (mask.has_value()) check_dense(op, "mask", *mask, input);
  if (mask.has_value())
    CONVKIT_CHECK(mask->scalar_type() == at::kByte && mask->is_contiguous() && mask->numel() == mask_bytes(input, channels_last), op, "mask", "got ", mask->numel(),
                  " elements of ", mask->scalar_type(), "; accepts the mask that batch_norm_relu returned for this input");
  Tensor w = per_channel(op, "weight", weight, input), b = per_channel(op, "bias", bias, input);
  Tensor m = per_channel(op, "mean", mean, input), v = per_channel(op, "var", var, input);
  gpu::Scope scope(input);
  auto wide = input.options().dtype(compute_type(input.scalar_type()));
  auto like = [&](bool wanted) { return wanted ? new_tensor(input.sizes(), input, channels_last) : at::empty({0}, input.options()); };
  Tensor grad_input = like(output_mask[0]), grad_residual = like(output_mask[1]);
  Tensor grad_weight = new_channels(output_mask[2] ? input.size(1) : 0, wide, input), grad_bias = new_channels(output_mask[3] ? input.size(1) : 0, wide, input);
  if (input.numel() != 0) {
    Tensor g = grad.contiguous(format(channels_last)), x = input.contiguous(format(channels_last));
    BatchNormArgs args{};
    args.shape = shape_of(x, dtype, channels_last);
    args.x = in("the input", x);
    args.grad = in("the gradient of the output", g);
    args.weight = in("the weight", w), args.bias = in("the bias", b);
    args.mean = const_cast<void*>(in("the mean", m)), args.var = const_cast<void*>(in("the variance", v));
    args.eps = eps;
    args.training = training;
    args.mask = mask.has_value() ? static_cast<uint8_t*>(const_cast<void*>(in("the mask", *mask))) : nullptr;
    args.grad_x = output_mask[0] ? out("the gradient of the input", grad_input) : nullptr;
    args.grad_residual = output_mask[1] ? out("the gradient of the residual", grad_residual) : nullptr;
    args.grad_weight = output_mask[2] ? out("the gradient of the weight", grad_weight) : nullptr;
    args.grad_bias = output_mask[3] ? out("the gradient of the bias", grad_bias) : nullptr;
#if defined(CONVKIT_GPU)
    if (gpu::runs(input)) {
      // Without the gradient of x there is nothing to keep x for.
      ChannelWork work = training && args.grad_x != nullptr ? ChannelWork::backward : training ? ChannelWork::sums : ChannelWork::evaluation_backward;
      on_gpu(op, args.shape, work, {args.x, args.grad, args.grad_x, args.grad_residual}, input, [&](const CudaChannelPlan& plan, void* ws, cuda::Stream stream) {
        args.workspace = ws;
        cuda::batch_norm_relu_grad(args, plan, stream);
      });
    }
#endif
#if !defined(CONVKIT_EMULATION)
    if (!gpu::runs(input)) {
      args.stream = streams(x.nbytes(), cpu::cpu_facts(at::get_num_threads()));
      Tensor ws = workspace(cpu::kernels().channel_workspace(args.shape, at::get_num_threads()), input);
      args.workspace = ws.mutable_data_ptr();
      cpu::kernels().batch_norm_relu_grad(args, pool());
    }
#endif
  }
  // A gradient has its parameter's dtype.
  if (weight.has_value()) grad_weight = grad_weight.to(weight->scalar_type());
  if (bias.has_value()) grad_bias = grad_bias.to(bias->scalar_type());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

void update_running_stats_(Tensor& running_mean, Tensor& running_var, const Tensor& mean, const Tensor& var, double momentum, int64_t count) {
  const char* op = "update_running_stats_";
  for (const Tensor* t : {&running_mean, &running_var})
    CONVKIT_CHECK(t->dim() == 1 && t->size(0) == mean.size(0) && var.size(0) == mean.size(0), op, "running statistics", "got size ", t->sizes(), "; accepts [", mean.size(0), "]");
#if defined(CONVKIT_GPU)
  if (gpu::runs(running_mean) && mean.size(0) > 0) {
    for (const Tensor& t : {running_var, mean, var}) check_dense(op, "running statistics", t, running_mean);
    gpu::Scope scope(running_mean);
    gpu::facts(op, running_mean);
    at::ScalarType wide = mean.scalar_type() == at::kDouble || var.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    Tensor m = mean.to(wide).contiguous(), v = var.to(wide).contiguous();
    cuda::RunningStatistics args{mean.size(0), momentum, count > 1 ? double(count) / double(count - 1) : 1.0, in("the mean", m), in("the variance", v), dtype_of(op, "mean", m),
                                 dtype_of(op, "running_mean", running_mean), out("running_mean", running_mean), running_mean.stride(0),
                                 dtype_of(op, "running_var", running_var), out("running_var", running_var), running_var.stride(0)};
    cuda::update_running_statistics(args, gpu::stream(running_mean));
    return;
  }
#endif
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, running_mean.scalar_type(), "update_running_stats_", [&] {
    auto rm = running_mean.accessor<scalar_t, 1>(), rv = running_var.accessor<scalar_t, 1>();
    Tensor m = mean.to(at::kDouble), v = var.to(at::kDouble);
    auto am = m.accessor<double, 1>(), av = v.accessor<double, 1>();
    // The running variance is of a sample (n - 1), the one that normalises of the batch (n).
    double unbias = count > 1 ? double(count) / double(count - 1) : 1.0;
    for (int64_t c = 0; c < rm.size(0); ++c) {
      rm[c] = scalar_t((1 - momentum) * double(rm[c]) + momentum * am[c]);
      rv[c] = scalar_t((1 - momentum) * double(rv[c]) + momentum * av[c] * unbias);
    }
  });
}

Tensor channel_sum(const Tensor& grad) {
  const char* op = "channel_sum";
  check_4d(op, "grad", grad);
  check_dense(op, "grad", grad, grad);
  DType dtype = dtype_of(op, "grad", grad);
  Tensor out = new_channels(grad.size(1), grad.options(), grad);
  if (grad.numel() == 0) return out;
  gpu::Scope scope(grad);
  bool channels_last = is_channels_last(grad);
  Tensor g = grad.contiguous(format(channels_last));
  ChannelShape shape = shape_of(g, dtype, channels_last);
#if defined(CONVKIT_GPU)
  if (gpu::runs(grad)) {
    on_gpu(op, shape, ChannelWork::sums, {}, grad, [&](const CudaChannelPlan& plan, void* ws, cuda::Stream stream) {
      cuda::channel_sum(shape, plan, in("the gradient", g), convkit::out("the sums", out), ws, stream);
    });
    return out;
  }
#endif
#if !defined(CONVKIT_EMULATION)
  Tensor ws = workspace(cpu::kernels().channel_workspace(shape, at::get_num_threads()), grad);
  cpu::kernels().channel_sum(shape, g.const_data_ptr(), out.mutable_data_ptr(), ws.mutable_data_ptr(), pool());
#endif
  return out;
}

// ---- im2col, col2im ------------------------------------------------------------------------------------------------

ColumnsProblem columns_problem(const char* op, int64_t n, int64_t c, IntArrayRef size, IntArrayRef kernel, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride) {
  struct { const char* arg; IntArrayRef values; int64_t least; } all[] = {{"kernel_size", kernel, 1}, {"dilation", dilation, 1}, {"padding", padding, 0}, {"stride", stride, 1}};
  for (auto& [arg, values, least] : all)
    for (int64_t v : values)
      CONVKIT_CHECK(values.size() == 2 && v >= least && (v <= int64_t(1) << 31 || values.data() == stride.data()), op, arg, "got ", values,
                    "; accepts two integers of at least ", least, " and at most 2147483648");
  CONVKIT_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0, op, "size", "of the image: got ", size, "; accepts two positive integers");
  ColumnsProblem a{n, c, size[0], size[1], kernel[0], kernel[1], 0, 0, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  auto blocks = [&](int i) {
    __int128 room = __int128(size[i]) + 2 * padding[i] - __int128(dilation[i]) * (kernel[i] - 1) - 1;
    return room < 0 ? int64_t(0) : int64_t(room / stride[i]) + 1;
  };
  a.p = blocks(0), a.q = blocks(1);
  // The step between blocks plays no part where there is one: no later product can overflow.
  if (a.p == 1) a.stride_h = 1;
  if (a.q == 1) a.stride_w = 1;
  CONVKIT_CHECK(a.p > 0 && a.q > 0, op, "kernel_size", "got ", kernel, " with dilation ", dilation, " and padding ", padding, ": larger than the padded image ", size,
                ", which leaves ", a.p, " x ", a.q, " blocks; accepts kernels that fit");
  return a;
}

void run_columns([[maybe_unused]] const char* op, const ColumnsArgs& args, [[maybe_unused]] const Tensor& input, bool to_columns) {
#if defined(CONVKIT_GPU)
  if (gpu::runs(input)) {
    gpu::facts(op, input);
    return to_columns ? cuda::im2col(args, gpu::stream(input)) : cuda::col2im(args, gpu::stream(input));
  }
#endif
#if !defined(CONVKIT_EMULATION)
  to_columns ? cpu::kernels().im2col(args, pool()) : cpu::kernels().col2im(args, pool());
#endif
}

Tensor im2col(const Tensor& input, IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride) {
  const char* op = "im2col";
  check_4d(op, "input", input);
  check_dense(op, "input", input, input);
  CONVKIT_CHECK(input.size(1) > 0, op, "input", "got size ", input.sizes(), "; only the batch may be empty");
  DType dtype = dtype_of(op, "input", input);
  ColumnsProblem a = columns_problem(op, input.size(0), input.size(1), input.sizes().slice(2), kernel_size, dilation, padding, stride);
  gpu::Scope scope(input);
  Tensor x = input.contiguous();
  Tensor out = new_tensor({a.n, a.c * a.r * a.s, a.p * a.q}, input, false);
  if (out.numel() != 0) run_columns(op, {a, dtype, in("the input", x), convkit::out("the output", out)}, input, true);
  return out;
}

Tensor col2im(const Tensor& input, IntArrayRef output_size, IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride) {
  const char* op = "col2im";
  CONVKIT_CHECK(input.dim() == 3, op, "input", "got ", input.dim(), "-D size ", input.sizes(), "; accepts 3-D (N, C * kernel height * kernel width, blocks)");
  check_dense(op, "input", input, input);
  CONVKIT_CHECK(input.size(1) > 0 && input.size(2) > 0, op, "input", "got size ", input.sizes(), "; only the batch may be empty");
  DType dtype = dtype_of(op, "input", input);
  ColumnsProblem a = columns_problem(op, input.size(0), 0, output_size, kernel_size, dilation, padding, stride);
  CONVKIT_CHECK(input.size(1) % (a.r * a.s) == 0, op, "input", "got size ", input.sizes(), "; accepts a second dimension that is divisible by the product of kernel_size ", kernel_size);
  a.c = input.size(1) / (a.r * a.s);
  CONVKIT_CHECK(input.size(2) == a.p * a.q, op, "input", "got ", input.size(2), " blocks; output_size ", output_size, ", kernel_size ", kernel_size, ", dilation ", dilation,
                ", padding ", padding, " and stride ", stride, " make ", a.p, " * ", a.q, " = ", a.p * a.q);
  gpu::Scope scope(input);
  Tensor x = input.contiguous();
  Tensor out = new_tensor({a.n, a.c, a.h, a.w}, input, false);
  if (out.numel() != 0) run_columns(op, {a, dtype, in("the input", x), convkit::out("the output", out)}, input, false);
  return out;
}

}  // namespace

void register_channels(torch::Library& m) {
  m.impl("batch_norm_relu", batch_norm_relu);
  m.impl("batch_norm_relu_grad", batch_norm_relu_grad);
  m.impl("update_running_stats_", update_running_stats_);
  m.impl("channel_sum", channel_sum);
  m.impl("im2col", im2col);
  m.impl("col2im", col2im);
}

}  // namespace convkit
