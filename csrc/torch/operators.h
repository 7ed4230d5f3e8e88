// The operators as C++ calls them, through PyTorch's dispatcher: `op::conv2d::call(…)` is torch.ops.convkit.conv2d(…).
// Arguments, and what they mean, are those of the schemas in module.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace convkit {

using OptionalTensor = std::optional<at::Tensor>;
using Activation = std::optional<std::string_view>;

template <size_t n> struct OperatorName {
  char text[n];
  consteval OperatorName(const char (&from)[n]) { std::copy_n(from, n, text); }
};

template <OperatorName name, class Signature> struct Operator;
template <OperatorName name, class R, class... Args> struct Operator<name, R(Args...)> {
  static R call(Args... args) {
    static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name.text, "").template typed<R(Args...)>();
    return handle.call(args...);
  }
};

namespace op {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

using conv2d = Operator<"convkit::conv2d", Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                  int64_t groups, Activation activation, const OptionalTensor& scale, const OptionalTensor& residual)>;
using conv2d_input_grad = Operator<"convkit::conv2d_input_grad", Tensor(const Tensor& grad, const Tensor& weight, SymIntArrayRef input_size, IntArrayRef stride, IntArrayRef padding,
                                                                        IntArrayRef dilation, int64_t groups, bool channels_last)>;
using conv2d_weight_grad = Operator<"convkit::conv2d_weight_grad", Tensor(const Tensor& grad, const Tensor& input, SymIntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                                                          IntArrayRef dilation, int64_t groups, bool channels_last)>;
using conv_transpose2d = Operator<"convkit::conv_transpose2d", Tensor(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                                                                      IntArrayRef output_padding, IntArrayRef dilation, int64_t groups)>;
using separable_conv2d =
    Operator<"convkit::separable_conv2d",
             Tensor(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight, const OptionalTensor& depthwise_scale, const OptionalTensor& depthwise_shift,
                    Activation depthwise_activation, const OptionalTensor& scale, const OptionalTensor& shift, Activation activation, IntArrayRef stride, IntArrayRef padding,
                    IntArrayRef dilation)>;
using channel_sum = Operator<"convkit::channel_sum", Tensor(const Tensor& grad)>;

using batch_norm_relu = Operator<"convkit::batch_norm_relu", Four(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                                                                  const OptionalTensor& mean, const OptionalTensor& var, double eps, bool save_mask)>;
using batch_norm_relu_grad =
    Operator<"convkit::batch_norm_relu_grad", Four(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                                                   const Tensor& var, const OptionalTensor& mask, double eps, bool training, std::array<bool, 4> output_mask)>;

using max_pool2d = Operator<"convkit::max_pool2d", std::tuple<Tensor, Tensor>(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                                              bool ceil_mode, Activation activation, bool save_taps)>;
using max_pool2d_grad = Operator<"convkit::max_pool2d_grad", Tensor(const Tensor& grad, const Tensor& taps, SymIntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                                                                    IntArrayRef padding, IntArrayRef dilation, bool ceil_mode, bool channels_last)>;
using max_pool2d_pick = Operator<"convkit::max_pool2d_pick", Tensor(const Tensor& input, const Tensor& taps, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                                                    IntArrayRef dilation, bool ceil_mode, bool channels_last)>;

using im2col = Operator<"convkit::im2col", Tensor(const Tensor& input, IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride)>;
using col2im = Operator<"convkit::col2im",
                        Tensor(const Tensor& input, SymIntArrayRef output_size, IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride)>;

}  // namespace op
}  // namespace convkit
