// Convolutions: check arguments, fill a ConvProblem, plan, allocate, run.
#include <ATen/ops/full.h>

#include <string>
#include <string_view>

#include "operators.h"
#include "tensors.h"

namespace convkit {
namespace {

// Far from overflow in sums and products of two, and beyond any tensor that could be allocated.
constexpr int64_t kLargest = int64_t(1) << 31;

bool parse_relu(const char* op, const char* arg, const Activation& activation) {
  if (!activation.has_value()) return false;
  TORCH_CHECK_VALUE(*activation == "relu", "convkit.", op, ": ", arg, ": got '", std::string(*activation), "'; accepts None or 'relu'");
  return true;
}

void check_at_least(const char* op, const char* arg, IntArrayRef values, size_t count, int64_t least) {
  CONVKIT_CHECK(values.size() == count, op, arg, "got ", values, "; accepts ", count, " integers");
  for (int64_t v : values)
    CONVKIT_CHECK(v >= least, op, arg, "got ", values, "; accepts integers of at least ", least, least == 0 ? " (negative is not supported)" : " (non-positive is not supported)");
}

// Output size along one axis. A stride beyond the input, or the dilation of a single tap, plays no part: both are set to
// 1, so that no later product can overflow.
int64_t out_size(const char* op, const char* axis, int64_t in, int64_t before, int64_t after, int64_t taps, int64_t& stride, int64_t& dilation) {
  CONVKIT_CHECK(before <= kLargest && after <= kLargest, op, "padding", "got ", std::max(before, after), " along ", axis, "; accepts at most ", kLargest);
  if (taps == 1) dilation = 1;
  CONVKIT_CHECK(dilation <= 4 * kLargest && taps <= kLargest, op, "dilation", "got ", dilation, " along ", axis, " with a filter of ", taps, " taps: too large");
  __int128 padded = __int128(in) + before + after, reach = __int128(dilation) * (taps - 1) + 1;
  CONVKIT_CHECK(in > 0, op, "input", "got size 0 along ", axis, "; only the batch and the channels may be empty");
  CONVKIT_CHECK(padded >= reach, op, "weight", "kernel size can't be greater than the padded input: along ", axis, " the kernel reaches over ",
                int64_t(reach), " elements, the padded input has ", int64_t(padded), "; pad more, or take a smaller kernel or dilation");
  int64_t out = int64_t((padded - reach) / stride) + 1;
  if (out == 1) stride = 1;
  return out;
}

void check_weight(const char* op, const Tensor& weight, int64_t groups) {
  CONVKIT_CHECK(groups > 0, op, "groups", "got ", groups, "; accepts integers of at least 1 (non-positive is not supported)");
  CONVKIT_CHECK(weight.dim() == 4, op, "weight", "got ", weight.dim(), "-D size ", weight.sizes(), "; accepts 4-D (filters, channels / groups, height, width)");
  CONVKIT_CHECK(weight.size(0) > 0 && weight.size(0) % groups == 0, op, "weight", "got size ", weight.sizes(), " with groups=", groups,
                "; accepts a positive first dimension that is divisible by groups");
  CONVKIT_CHECK(weight.size(2) > 0 && weight.size(3) > 0, op, "weight", "got size ", weight.sizes(), "; accepts kernels of at least 1x1");
}

void check_bias(const char* op, const OptionalTensor& bias, const Tensor& input, int64_t channels) {
  if (!bias.has_value()) return;
  check_like(op, "bias", *bias, input);
  CONVKIT_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, "bias", "got size ", bias->sizes(), "; accepts 1-D with one value an output channel, [", channels, "]");
}

void check_4d(const char* op, const char* arg, const Tensor& t) {
  CONVKIT_CHECK(t.dim() == 4, op, arg, "got ", t.dim(), "-D size ", t.sizes(), "; accepts 4-D (N, C, H, W)");
}

// A per-channel scale or shift in the arithmetic's type.
Tensor per_channel(const char* op, const char* arg, const OptionalTensor& t, const Tensor& input, int64_t channels) {
  if (!t.has_value()) return Tensor();
  check_dense(op, arg, *t, input);
  CONVKIT_CHECK(t->dim() == 1 && t->size(0) == channels, op, arg, "got size ", t->sizes(), "; accepts 1-D with one value a channel, [", channels, "]");
  at::ScalarType wide = compute_type(input.scalar_type());
  CONVKIT_CHECK(t->scalar_type() == input.scalar_type() || t->scalar_type() == wide, op, arg, "got dtype ", t->scalar_type(), "; accepts ", input.scalar_type(),
                wide == input.scalar_type() ? "" : " or Float", ": convert it with .to(dtype)");
  return t->to(wide).contiguous();
}

// What is added to the output, `sizes`, brought to its order.
Tensor residual_of(const char* op, const OptionalTensor& t, const Tensor& input, IntArrayRef sizes, bool channels_last) {
  if (!t.has_value()) return Tensor();
  check_like(op, "residual", *t, input);
  CONVKIT_CHECK(t->sizes() == sizes, op, "residual", "got size ", t->sizes(), "; accepts the output's, ", sizes, ": bring it there with .expand(), which copies nothing");
  return t->contiguous(format(channels_last));
}

struct Geometry {
  IntArrayRef stride, padding, dilation;  // padding: top, bottom, left, right
  int64_t groups;
};

void check_geometry(const char* op, const Geometry& g, size_t paddings = 4) {
  check_at_least(op, "stride", g.stride, 2, 1);
  check_at_least(op, "padding", g.padding, paddings, 0);
  check_at_least(op, "dilation", g.dilation, 2, 1);
}

// x (n, c, h, w) with a weight of k filters of r x s; p and q follow.
ConvProblem problem_of(const char* op, DType dtype, bool channels_last, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t r, int64_t s, const Geometry& g) {
  ConvProblem a{};
  a.n = n, a.c = c, a.h = h, a.w = w, a.k = k, a.r = r, a.s = s;
  a.stride_h = g.stride[0], a.stride_w = g.stride[1];
  a.pad_top = g.padding[0], a.pad_left = g.padding[2];
  a.dilation_h = g.dilation[0], a.dilation_w = g.dilation[1];
  a.groups = g.groups, a.dtype = dtype, a.layout = layout(channels_last);
  a.p = out_size(op, "height", h, g.padding[0], g.padding[1], r, a.stride_h, a.dilation_h);
  a.q = out_size(op, "width", w, g.padding[2], g.padding[3], s, a.stride_w, a.dilation_w);
  return a;
}

#if defined(CONVKIT_GPU)
void run_on_gpu(const char* op, ConvArgs args, Pass pass, const Tensor& like) {
  const cuda::DeviceFacts& facts = gpu::facts(op, like);
  bool aligned = true;
  for (const void* p : {args.src, args.x, args.bias, args.scale, args.residual, static_cast<const void*>(args.dst)}) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  gpu::with_workspace([&](bool least) { return plan_conv_cuda(args.problem, pass, facts, float32_on_gpu(), aligned, least); },
                      [&](int64_t bytes) { return workspace(bytes, like); },
                      [&](const CudaConvPlan& plan, const Tensor& ws) {
                        if (printing_plans()) print_once(describe(args.problem, pass, facts, plan));
                        args.workspace = out("the workspace", ws);
                        cuda::conv(args, plan, pass, gpu::stream(like));
                      });
}
#endif

#if !defined(CONVKIT_EMULATION)
void run_on_cpu(const ConvArgs& arguments, Pass pass, const Tensor& like) {
  cpu::ConvArgs args{arguments, {}};
  cpu::Pool threads = pool();
  const cpu::Kernels& table = cpu::kernels();
  CpuFacts facts = cpu::cpu_facts(threads.threads);
  args.plan = plan_conv(args.problem, pass, facts, winograd_switch());
  if (printing_plans()) print_once(describe(args.problem, pass, facts, args.plan));
  Tensor ws = workspace(args.plan.workspace_bytes, like);
  args.workspace = ws.mutable_data_ptr();
  table.conv(args, pass, threads);
}
#endif

void run([[maybe_unused]] const char* op, const ConvArgs& args, Pass pass, const Tensor& like) {
#if defined(CONVKIT_GPU)
  if (gpu::runs(like)) return run_on_gpu(op, args, pass, like);
#endif
#if !defined(CONVKIT_EMULATION)
  run_on_cpu(args, pass, like);
#endif
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
              int64_t groups, Activation activation, const OptionalTensor& scale, const OptionalTensor& residual) {
  const char* op = "conv2d";
  check_4d(op, "input", input);
  check_dense(op, "input", input, input);
  DType dtype = dtype_of(op, "input", input);
  Geometry g{stride, padding, dilation, groups};
  check_weight(op, weight, groups);
  check_geometry(op, g);
  check_like(op, "weight", weight, input);
  CONVKIT_CHECK(__int128(weight.size(1)) * groups == input.size(1), op, "input", "got ", input.size(1), " channels in size ", input.sizes(), "; weight ", weight.sizes(),
                " with groups=", groups, " accepts ", weight.size(1) * groups, " channels");
  if (!scale.has_value()) check_bias(op, bias, input, weight.size(0));
  bool relu = parse_relu(op, "activation", activation);
  bool channels_last = is_channels_last(input) || is_channels_last(weight);
  ConvProblem a = problem_of(op, dtype, channels_last, input.size(0), input.size(1), input.size(2), input.size(3), weight.size(0), weight.size(2), weight.size(3), g);
  // Without channels the result has none either: PyTorch's rule.
  gpu::Scope scope(input);
  Tensor factor = per_channel(op, "scale", scale, input, a.k);
  Tensor b = scale.has_value() ? per_channel(op, "bias", bias, input, a.k) : bias.has_value() ? bias->contiguous() : Tensor();
  Tensor out = new_tensor({a.n, a.c == 0 ? 0 : a.k, a.p, a.q}, input, channels_last && input.numel() != 0);
  Tensor added = residual_of(op, residual, input, out.sizes(), channels_last);
  if (out.numel() == 0) return out;
  Tensor x = input.contiguous(format(channels_last));
  ConvArgs args{};
  args.problem = a;
  args.src = in("the input", x);
  args.weight = in("the weight", weight);
  args.weight_strides = weight_strides(weight);
  args.bias = in("the bias", b);
  args.scale = in("the scale", factor);
  args.residual = in("the residual", added);
  args.dst = convkit::out("the output", out);
  args.relu = relu;
  run(op, args, Pass::forward, input);
  return out;
}

// Shared by the input gradient and the transposed convolution, which are the same sum.
Tensor input_grad(const char* op, const Tensor& grad, const Tensor& weight, const OptionalTensor& bias, const ConvProblem& a, bool channels_last) {
  gpu::Scope scope(grad);
  Tensor out = new_tensor({a.n, a.c, a.h, a.w}, grad, channels_last && a.n * a.c != 0);
  if (out.numel() == 0) return out;
  Tensor g = grad.contiguous(format(channels_last)), b = bias.has_value() ? bias->contiguous() : Tensor();
  ConvArgs args{};
  args.problem = a;
  args.src = in("the gradient of the output", g);
  args.weight = in("the weight", weight);
  args.weight_strides = weight_strides(weight);
  args.bias = in("the bias", b);
  args.dst = convkit::out("the output", out);
  run(op, args, Pass::input_grad, grad);
  return out;
}

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, IntArrayRef input_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         int64_t groups, bool channels_last) {
  const char* op = "conv2d_input_grad";
  check_4d(op, "grad", grad);
  check_dense(op, "grad", grad, grad);
  DType dtype = dtype_of(op, "grad", grad);
  Geometry g{stride, padding, dilation, groups};
  check_weight(op, weight, groups);
  check_geometry(op, g);
  check_like(op, "weight", weight, grad);
  check_at_least(op, "input_size", input_size, 2, 0);
  ConvProblem a = problem_of(op, dtype, channels_last, grad.size(0), weight.size(1) * groups, input_size[0], input_size[1], weight.size(0), weight.size(2), weight.size(3), g);
  int64_t filters = a.c == 0 ? 0 : a.k;
  CONVKIT_CHECK(grad.size(1) == filters && grad.size(2) == a.p && grad.size(3) == a.q, op, "grad", "got size ", grad.sizes(), "; accepts ",
                std::vector<int64_t>({a.n, filters, a.p, a.q}), ", the convolution's output");
  return input_grad(op, grad, weight, std::nullopt, a, channels_last);
}

Tensor conv2d_weight_grad(const Tensor& grad, const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                          int64_t groups, bool channels_last) {
  const char* op = "conv2d_weight_grad";
  check_4d(op, "grad", grad);
  check_4d(op, "input", input);
  check_dense(op, "input", input, input);
  DType dtype = dtype_of(op, "input", input);
  check_like(op, "grad", grad, input);
  Geometry g{stride, padding, dilation, groups};
  CONVKIT_CHECK(kernel_size.size() == 3, op, "kernel_size", "got ", kernel_size, "; accepts filters, height, width");
  check_at_least(op, "kernel_size", kernel_size, 3, 1);
  CONVKIT_CHECK(groups > 0 && kernel_size[0] % groups == 0 && input.size(1) % groups == 0, op, "groups", "got ", groups, "; accepts divisors of ", kernel_size[0],
                " filters and ", input.size(1), " channels");
  check_geometry(op, g);
  ConvProblem a = problem_of(op, dtype, channels_last, input.size(0), input.size(1), input.size(2), input.size(3), kernel_size[0], kernel_size[1], kernel_size[2], g);
  CONVKIT_CHECK(grad.size(0) == a.n && grad.size(1) == (a.c == 0 ? 0 : a.k) && grad.size(2) == a.p && grad.size(3) == a.q, op, "grad", "got size ", grad.sizes(), "; accepts ",
                std::vector<int64_t>({a.n, a.k, a.p, a.q}), ", the convolution's output");
  gpu::Scope scope(input);
  Tensor out = new_tensor({a.k, a.c / groups, a.r, a.s}, input, channels_last && a.c != 0);
  if (out.numel() == 0) return out;
  if (a.n == 0) return out.zero_();
  Tensor gradient = grad.contiguous(format(channels_last)), x = input.contiguous(format(channels_last));
  ConvArgs args{};
  args.problem = a;
  args.src = in("the gradient of the output", gradient);
  args.x = in("the input", x);
  args.dst = convkit::out("the output", out);
  args.weight_strides = weight_strides(out);
  run(op, args, Pass::weight_grad, input);
  return out;
}

Tensor conv_transpose2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef output_padding,
                        IntArrayRef dilation, int64_t groups) {
  const char* op = "conv_transpose2d";
  check_4d(op, "input", input);
  check_dense(op, "input", input, input);
  DType dtype = dtype_of(op, "input", input);
  check_weight(op, weight, groups);
  check_geometry(op, {stride, padding, dilation, groups}, 2);
  check_at_least(op, "output_padding", output_padding, 2, 0);
  check_like(op, "weight", weight, input);
  CONVKIT_CHECK(weight.size(0) == input.size(1), op, "input", "got ", input.size(1), " channels in size ", input.sizes(), "; weight ", weight.sizes(), " accepts ",
                weight.size(0), " channels");
  CONVKIT_CHECK(weight.size(1) > 0, op, "weight", "got size ", weight.sizes(), "; accepts at least one output channel a group");
  check_bias(op, bias, input, weight.size(1) * groups);
  // The image that a convolution would have to start from: its size, and the padding that remains at the far edges.
  int64_t size[2], full_padding[4];
  for (int i = 0; i < 2; ++i) {
    CONVKIT_CHECK(input.size(2 + i) > 0, op, "input", "got size ", input.sizes(), "; only the batch may be empty");
    CONVKIT_CHECK(output_padding[i] < stride[i] || output_padding[i] < dilation[i], op, "output_padding", "got ", output_padding,
                  "; output padding must be smaller than either stride ", stride, " or dilation ", dilation);
    __int128 reach = __int128(dilation[i]) * (weight.size(2 + i) - 1);
    __int128 out = __int128(input.size(2 + i) - 1) * stride[i] - 2 * __int128(padding[i]) + reach + output_padding[i] + 1;
    CONVKIT_CHECK(out > 0, op, "padding", "got ", padding, ", which leaves an output of size ", int64_t(std::max<__int128>(out, INT64_MIN)), " along ",
                  i == 0 ? "height" : "width", "; accepts padding with which at least one element is left");
    CONVKIT_CHECK(out <= kLargest, op, "stride", "got stride ", stride, " and dilation ", dilation, ": the output would have more than ", kLargest, " elements along ",
                  i == 0 ? "height" : "width");
    size[i] = int64_t(out);
    full_padding[2 * i] = padding[i];
    // Output padding takes away from the far padding; where it is more, those last rows see no input at all.
    full_padding[2 * i + 1] = std::max<int64_t>(0, padding[i] - output_padding[i]);
  }
  bool channels_last = is_channels_last(input) || is_channels_last(weight);
  ConvProblem a = problem_of(op, dtype, channels_last, input.size(0), weight.size(1) * groups, size[0], size[1], weight.size(0), weight.size(2), weight.size(3),
                             {stride, full_padding, dilation, groups});
  a.p = input.size(2), a.q = input.size(3);
  if (a.p > 1) a.stride_h = stride[0];
  if (a.q > 1) a.stride_w = stride[1];
  return input_grad(op, input, weight, bias, a, channels_last);
}

Tensor separable_conv2d(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight, const OptionalTensor& depthwise_scale,
                        const OptionalTensor& depthwise_shift, Activation depthwise_activation, const OptionalTensor& scale, const OptionalTensor& shift,
                        Activation activation, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  const char* op = "separable_conv2d";
  check_4d(op, "input", input);
  check_dense(op, "input", input, input);
  DType dtype = dtype_of(op, "input", input);
  int64_t c = input.size(1);
  CONVKIT_CHECK(c > 0, op, "input", "got size ", input.sizes(), "; accepts at least one channel");
  CONVKIT_CHECK(depthwise_weight.dim() == 4 && depthwise_weight.size(0) > 0 && depthwise_weight.size(0) % c == 0 && depthwise_weight.size(1) == 1 && depthwise_weight.size(2) > 0 &&
                    depthwise_weight.size(3) > 0,
                op, "depthwise_weight", "got size ", depthwise_weight.sizes(), "; accepts (", c, " * multiplier, 1, height, width)");
  int64_t middle = depthwise_weight.size(0);
  CONVKIT_CHECK(pointwise_weight.dim() == 4 && pointwise_weight.size(0) > 0 && pointwise_weight.size(1) == middle && pointwise_weight.size(2) == 1 && pointwise_weight.size(3) == 1,
                op, "pointwise_weight", "got size ", pointwise_weight.sizes(), "; accepts (filters, ", middle, ", 1, 1)");
  check_like(op, "depthwise_weight", depthwise_weight, input);
  check_like(op, "pointwise_weight", pointwise_weight, input);
  Geometry g{stride, padding, dilation, c};
  check_geometry(op, g);
  bool channels_last = is_channels_last(input) || is_channels_last(depthwise_weight) || is_channels_last(pointwise_weight);
  SeparableArgs args{};
  args.problem = problem_of(op, dtype, channels_last, input.size(0), c, input.size(2), input.size(3), middle, depthwise_weight.size(2), depthwise_weight.size(3), g);
  args.filters = pointwise_weight.size(0);
  args.depthwise_relu = parse_relu(op, "depthwise_activation", depthwise_activation);
  args.relu = parse_relu(op, "activation", activation);
  Tensor per[4] = {per_channel(op, "depthwise_scale", depthwise_scale, input, middle), per_channel(op, "depthwise_shift", depthwise_shift, input, middle),
                   per_channel(op, "scale", scale, input, args.filters), per_channel(op, "shift", shift, input, args.filters)};
  gpu::Scope scope(input);
  Tensor out = new_tensor({args.problem.n, args.filters, args.problem.p, args.problem.q}, input, channels_last && input.numel() != 0);
  if (out.numel() == 0) return out;
  Tensor x = input.contiguous(format(channels_last));
  args.x = in("the input", x);
  args.depthwise_weight = in("the depthwise weight", depthwise_weight);
  args.pointwise_weight = in("the pointwise weight", pointwise_weight);
  args.depthwise_strides = weight_strides(depthwise_weight);
  args.pointwise_strides = weight_strides(pointwise_weight);
  args.depthwise_scale = in("depthwise_scale", per[0]), args.depthwise_shift = in("depthwise_shift", per[1]);
  args.scale = in("scale", per[2]), args.shift = in("shift", per[3]);
  args.y = convkit::out("the output", out);
#if defined(CONVKIT_GPU)
  if (gpu::runs(input)) {
    const cuda::DeviceFacts& facts = gpu::facts(op, input);
    bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0;
    gpu::with_workspace([&](bool least) { return plan_separable_cuda(args.problem, args.filters, facts, float32_on_gpu(), aligned, least); },
                        [&](int64_t bytes) { return workspace(bytes, input); },
                        [&](const CudaSeparablePlan& plan, const Tensor& ws) {
                          if (printing_plans()) print_once(describe(args.problem, args.filters, facts, plan));
                          args.workspace = convkit::out("the workspace", ws);
                          if (plan.tensor) cuda::separable_sm80(args, plan, gpu::stream(input));
                          else cuda::separable_simt(args, gpu::stream(input));
                        });
    return out;
  }
#endif
#if !defined(CONVKIT_EMULATION)
  cpu::Pool threads = pool();
  const cpu::Kernels& table = cpu::kernels();
  Tensor ws = workspace(table.separable_workspace(args, threads), input);
  args.workspace = ws.mutable_data_ptr();
  table.separable(args, threads);
#endif
  return out;
}

}  // namespace

void register_conv(torch::Library& m) {
  m.impl("conv2d", conv2d);
  m.impl("conv2d_input_grad", conv2d_input_grad);
  m.impl("conv2d_weight_grad", conv2d_weight_grad);
  m.impl("conv_transpose2d", conv_transpose2d);
  m.impl("separable_conv2d", separable_conv2d);
}

}  // namespace convkit
