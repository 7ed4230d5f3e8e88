// The operators' schemas, their autocast rules, and the module `convkit._C`: how it was built, what a problem is planned to.
#include <ATen/autocast_mode.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <sstream>
#include <string>

#include "operators.h"
#include "tensors.h"
#if defined(CONVKIT_CUDA)
#include "../cuda/device.h"
#endif

namespace py = pybind11;

// Padding is top, bottom, left, right. The gradients take `channels_last`, the format of what they return, because their
// arguments alone don't tell it. Sizes are SymInt so that dynamic shapes trace; everything else is a property of a layer.
TORCH_LIBRARY(convkit, m) {
  m.def("conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, int groups, str? activation, Tensor? scale=None, Tensor? residual=None) -> Tensor");
  m.def("conv2d_input_grad(Tensor grad, Tensor weight, SymInt[2] input_size, int[2] stride, int[4] padding, int[2] dilation, int groups, bool channels_last) -> Tensor");
  m.def("conv2d_weight_grad(Tensor grad, Tensor input, SymInt[3] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups, bool channels_last) -> Tensor");
  m.def("conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] output_padding, int[2] dilation, int groups) -> Tensor");
  m.def(
      "separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_scale, Tensor? depthwise_shift, str? depthwise_activation, "
      "Tensor? scale, Tensor? shift, str? activation, int[2] stride, int[4] padding, int[2] dilation) -> Tensor");
  m.def("channel_sum(Tensor grad) -> Tensor");
  m.def(
      "batch_norm_relu(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, bool save_mask) -> "
      "(Tensor out, Tensor mean, Tensor var, Tensor mask)");
  m.def(
      "batch_norm_relu_grad(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? mask, float eps, bool training, bool[4] output_mask) -> "
      "(Tensor input_grad, Tensor residual_grad, Tensor weight_grad, Tensor bias_grad)");
  m.def("update_running_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, SymInt count) -> ()");
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, str? activation, bool save_taps) -> (Tensor out, Tensor taps)");
  m.def(
      "max_pool2d_grad(Tensor grad, Tensor taps, SymInt[2] input_size, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, bool channels_last) -> Tensor");
  m.def("max_pool2d_pick(Tensor input, Tensor taps, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, bool channels_last) -> Tensor");
  m.def("im2col(Tensor input, int[2] kernel_size, int[2] dilation, int[2] padding, int[2] stride) -> Tensor");
  m.def("col2im(Tensor input, SymInt[2] output_size, int[2] kernel_size, int[2] dilation, int[2] padding, int[2] stride) -> Tensor");
}

namespace convkit {
namespace {

// Autocast as PyTorch's convolutions have it: floating-point arguments are cast to the region's dtype (weights once a
// region, from its cache), and what is computed inside runs with autocast off.
template <c10::DeviceType device> struct Autocast {
  static constexpr c10::DispatchKey key = device == c10::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;

  static Tensor cast(const Tensor& t) { return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device); }
  static OptionalTensor cast(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(cast(*t)) : t; }

  // A scale, and the bias beside it, stay float32: they belong to the accumulators.
  static Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                       Activation activation, const OptionalTensor& scale, const OptionalTensor& residual) {
    c10::impl::ExcludeDispatchKeyGuard off(key);
    return op::conv2d::call(cast(input), cast(weight), scale.has_value() ? bias : cast(bias), stride, padding, dilation, groups, activation, scale, cast(residual));
  }

  static Tensor conv_transpose2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef output_padding,
                                 IntArrayRef dilation, int64_t groups) {
    c10::impl::ExcludeDispatchKeyGuard off(key);
    return op::conv_transpose2d::call(cast(input), cast(weight), cast(bias), stride, padding, output_padding, dilation, groups);
  }

  // Scales and shifts stay float32, as above.
  static Tensor separable_conv2d(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight, const OptionalTensor& depthwise_scale,
                                 const OptionalTensor& depthwise_shift, Activation depthwise_activation, const OptionalTensor& scale, const OptionalTensor& shift,
                                 Activation activation, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
    c10::impl::ExcludeDispatchKeyGuard off(key);
    return op::separable_conv2d::call(cast(input), cast(depthwise_weight), cast(pointwise_weight), depthwise_scale, depthwise_shift, depthwise_activation, scale, shift, activation, stride, padding,
                     dilation);
  }

  static void rules(torch::Library& m) {
    m.impl("conv2d", conv2d);
    m.impl("conv_transpose2d", conv_transpose2d);
    m.impl("separable_conv2d", separable_conv2d);
    // The others take what they are given, as PyTorch's batch_norm, unfold and fold do: a 16-bit input with float32
    // parameters is one of their cases.
  }
};

Pass parse_pass(const std::string& pass) {
  if (pass == "fprop") return Pass::forward;
  if (pass == "dgrad") return Pass::input_grad;
  if (pass == "wgrad") return Pass::weight_grad;
  throw std::invalid_argument("pass: got '" + pass + "'; accepts fprop, dgrad, wgrad");
}

cuda::DeviceFacts device_of(int major, int minor, int multiprocessors, int64_t shared_bytes_per_block) {
  return {"", major, minor, multiprocessors, shared_bytes_per_block, 0, major >= 9 ? 8 : 1};
}

std::string plan_cuda(const std::string& problem, const std::string& pass, int major, int minor, int multiprocessors, int64_t shared_bytes_per_block) {
  cuda::DeviceFacts facts = device_of(major, minor, multiprocessors, shared_bytes_per_block);
  ConvProblem a = parse_conv_problem(problem);
  Pass p = parse_pass(pass);
  return describe(a, p, facts, plan_conv_cuda(a, p, facts, float32_on_gpu()));
}

std::string plan_batch_norm_cuda(int64_t n, int64_t c, int64_t hw, const std::string& dtype, bool channels_last, const std::string& work, int major, int minor, int multiprocessors,
                                 int64_t shared_bytes_per_block) {
  constexpr std::pair<const char*, ChannelWork> works[] = {
      {"forward", ChannelWork::forward}, {"backward", ChannelWork::backward}, {"evaluation", ChannelWork::evaluation}, {"evaluation_backward", ChannelWork::evaluation_backward}};
  auto find = [](const auto& known, const std::string& wanted, const char* what) {
    std::string names;
    for (auto& [name, value] : known) {
      if (wanted == name) return value;
      names += (names.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument(std::string(what) + ": got '" + wanted + "'; accepts " + names);
  };
  constexpr std::pair<const char*, DType> dtypes[] = {{"f64", DType::f64}, {"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}};
  if (n < 1 || c < 1 || hw < 1) throw std::invalid_argument("n, c, hw: got " + std::to_string(n) + ", " + std::to_string(c) + ", " + std::to_string(hw) + "; accepts integers of at least 1");
  ChannelShape shape{n, c, hw, find(dtypes, dtype, "dtype"), layout(channels_last)};
  cuda::DeviceFacts facts = device_of(major, minor, multiprocessors, shared_bytes_per_block);
  ChannelWork what = find(works, work, "work");
  return describe(shape, what, facts, plan_channels_cuda(shape, what, facts));
}

std::string plan(const std::string& problem, const std::string& pass, int threads) {
  Pass p = parse_pass(pass);
  ConvProblem a = parse_conv_problem(problem);
  CpuFacts facts = cpu::cpu_facts(threads > 0 ? threads : at::get_num_threads());
  return describe(a, p, facts, plan_conv(a, p, facts, winograd_switch()));
}

py::list words(const char* text) {
  py::list out;
  std::istringstream in(text);
  for (std::string word; in >> word;) out.append(word);
  return out;
}

}  // namespace
}  // namespace convkit

TORCH_LIBRARY_IMPL(convkit, CPU, m) {
  convkit::register_conv(m);
  convkit::register_channels(m);
  convkit::register_max_pool(m);
}
#if defined(CONVKIT_CUDA)
TORCH_LIBRARY_IMPL(convkit, CUDA, m) {
  convkit::register_conv(m);
  convkit::register_channels(m);
  convkit::register_max_pool(m);
}
#endif
TORCH_LIBRARY_IMPL(convkit, AutocastCPU, m) { convkit::Autocast<c10::kCPU>::rules(m); }
TORCH_LIBRARY_IMPL(convkit, AutocastCUDA, m) { convkit::Autocast<c10::kCUDA>::rules(m); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "convkit's native module: operators are registered as torch.ops.convkit when it is loaded.";
  convkit::cpu::kernels();  // an impossible CONVKIT_ISA is an error now, not at the first call
  convkit::winograd_switch();  // and so is CONVKIT_WINOGRAD
  m.def("isa", [] { return std::string(convkit::cpu::isa()); }, "The instruction set in force.");
  m.def("available_isas", [] { return convkit::words(convkit::cpu::available_isas()); }, "Instruction sets usable on this machine, the most capable first; isa() is the fastest of them, or CONVKIT_ISA.");
  m.def("winograd", [] { return int(convkit::winograd_switch().load()); }, "When Winograd's method is used: see set_winograd.");
  m.def("set_winograd", [](int when) { return int(convkit::winograd_switch().exchange(convkit::Winograd(when))); }, py::arg("when"),
        "0: never, 1: where it is faster, 2: wherever it is possible (for tests). Returns what held before.");
  m.def("plan", convkit::plan, py::arg("problem"), py::arg("pass_") = "fprop", py::arg("threads") = 0,
        "The kernel, tile, blocks and workspace planned for a problem such as n8c64h56w56k64r3s3u1p1d1g1_f32_nhwc; pass_ is fprop, dgrad or wgrad.");
  m.def("plan_cuda", convkit::plan_cuda, py::arg("problem"), py::arg("pass_") = "fprop", py::arg("major") = 9, py::arg("minor") = 0, py::arg("multiprocessors") = 132,
        py::arg("shared_bytes_per_block") = 227 << 10, "The same for a GPU (an H100, if nothing else is said), which need not be there.");
  m.def("plan_batch_norm_cuda", convkit::plan_batch_norm_cuda, py::arg("n"), py::arg("c"), py::arg("hw"), py::arg("dtype"), py::arg("channels_last"), py::arg("work") = "forward",
        py::arg("major") = 9, py::arg("minor") = 0, py::arg("multiprocessors") = 132, py::arg("shared_bytes_per_block") = 227 << 10,
        "The same for batch norm; work is forward, backward, evaluation or evaluation_backward.");
  m.def("build_info", [] {
    py::dict out;
    out["convkit"] = CONVKIT_VERSION;
    out["compiler"] = CONVKIT_COMPILER;
    out["torch"] = CONVKIT_TORCH_VERSION;
    out["isas"] = convkit::words(convkit::cpu::compiled_isas());
#if defined(CONVKIT_CUDA)
    out["cuda_arches"] = CONVKIT_CUDA_ARCHES;
    for (int i = 0; i < convkit::cuda::device_count(); ++i) {
      convkit::cuda::DeviceFacts d;
      const char* error = convkit::cuda::query_device(i, &d);
      std::string text = error != nullptr ? std::string(error)
                                          : std::string(d.name) + ", sm_" + std::to_string(d.major) + std::to_string(d.minor) + ", " +
                                                std::to_string(d.multiprocessors) + " multiprocessors, " + std::to_string(d.shared_bytes_per_block >> 10) +
                                                " KiB of shared memory a block, " + std::to_string(d.l2_bytes >> 20) + " MiB of L2";
      out[("cuda device " + std::to_string(i)).c_str()] = text;
    }
#else
    out["cuda_arches"] = "none (CPU only)";
#endif
    return out;
  });
}
