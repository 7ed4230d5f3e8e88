// What a kernel is given, on any device: a problem, pointers, and what comes after the sum. No torch.
#pragma once

#include <cstdint>

#include "problem.h"

namespace convkit {

// Strides in elements of a weight tensor (k, c, r, s); any layout is read as it is.
struct WeightStrides {
  int64_t k, c, r, s;
};

struct ConvArgs {
  ConvProblem problem;
  const void* src;     // forward: x. input grad, weight grad: the gradient of y. All in problem.layout.
  const void* weight;  // forward, input grad
  const void* x;       // weight grad: the input
  const void* bias;    // forward (k values) and input grad used as transposed convolution (c values), or null
  const void* scale;   // forward: y = act(scale * sum + bias + residual); k values of the arithmetic's type, as the bias then is; or null
  const void* residual;  // forward: in the order of y, or null
  void* dst;           // y, the input's gradient, or the weight's gradient
  WeightStrides weight_strides;  // of weight, or of dst in the weight gradient
  bool relu;
  void* workspace;     // as large as the plan says
};

// Fused depthwise -> scale, shift, ReLU -> pointwise -> scale, shift, ReLU. `problem` is the depthwise part (k = c times
// the multiplier). Scales and shifts are in the arithmetic's type (float, or double for f64), or null.
struct SeparableArgs {
  ConvProblem problem;
  int64_t filters;  // of the pointwise part
  const void *x, *depthwise_weight, *pointwise_weight;
  const void *depthwise_scale, *depthwise_shift, *scale, *shift;
  bool depthwise_relu, relu;
  WeightStrides depthwise_strides, pointwise_strides;
  void* y;
  void* workspace;
};

struct ChannelShape {
  int64_t n, c, hw;
  DType dtype;
  Layout layout;
};

// Per-channel values are in the arithmetic's type (float, or double for f64), whatever the type of the activations.
struct BatchNormArgs {
  ChannelShape shape;
  const void *x, *residual;           // residual may be null
  const void *weight, *bias;          // may be null
  void *mean, *var;                   // biased; written in training, read in evaluation and in the gradient
  double eps;
  bool training;
  bool stream;                        // CPU: write y, grad_x, grad_residual past the caches
  void* y;
  uint8_t* mask;                      // one bit an element in memory order, or null
  // gradient
  const void* grad;
  void *grad_x, *grad_residual;       // may be null
  void *grad_weight, *grad_bias;      // may be null
  void* workspace;
};

struct ColumnsArgs {
  ColumnsProblem problem;
  DType dtype;
  const void* src;
  void* dst;
};

// Which tap of its window each output was taken from, r * (filter width) + s in the order of y, is all that the gradient
// needs: a byte, or an int32_t where a window has more than 255 taps. The type's -1: none of them, and no gradient.
struct MaxPoolArgs {
  MaxPoolProblem problem;
  const void* src;  // forward: x; gradient: that of y; pick: what has x's shape
  void* taps;       // written by the forward, if not null
  void* dst;        // y, the gradient of x, or what pick takes: the value at each output's tap, 0 where it has none
  bool relu;        // forward
  bool wide_taps;   // int32_t
};

}  // namespace convkit
