// The CPU kernels: one table of functions for each instruction set, and the arguments they take.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "../problem.h"
#include "pool.h"

namespace convkit::cpu {

// Strides in elements of a weight tensor (k, c, r, s); any layout is read as it is.
struct WeightStrides {
  int64_t k, c, r, s;
};

struct ConvArgs {
  ConvProblem problem;
  ConvPlan plan;
  const void* src;     // forward: x. input grad, weight grad: the gradient of y. All in problem.layout.
  const void* weight;  // forward, input grad
  const void* x;       // weight grad: the input
  const void* bias;    // forward (k values) and input grad used as transposed convolution (c values), or null
  void* dst;           // y, the input's gradient, or the weight's gradient
  WeightStrides weight_strides;  // of weight, or of dst in the weight gradient
  bool relu;
  void* workspace;     // plan.workspace_bytes
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
  bool stream;                        // write y, grad_x, grad_residual past the caches
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

struct Kernels {
  CpuFacts facts;  // of the instruction set; cpu_facts() adds what only the machine knows
  void (*conv)(const ConvArgs&, Pass, const Pool&);
  int64_t (*separable_workspace)(const SeparableArgs&, const Pool&);
  void (*separable)(const SeparableArgs&, const Pool&);
  int64_t (*channel_workspace)(const ChannelShape&);
  void (*channel_sum)(const ChannelShape&, const void* src, void* sums, void* workspace, const Pool&);
  void (*batch_norm_relu)(const BatchNormArgs&, const Pool&);
  void (*batch_norm_relu_grad)(const BatchNormArgs&, const Pool&);
  void (*im2col)(const ColumnsArgs&, const Pool&);
  void (*col2im)(const ColumnsArgs&, const Pool&);
};

// The table in force: the best this machine has, or the one that CONVKIT_ISA names. Throws std::runtime_error for a
// name that is unknown, not compiled in or not supported by this processor.
const Kernels& kernels();

// What plans are made from: the table in force, this machine's caches, and the threads that the caller has.
CpuFacts cpu_facts(int threads);

// Instruction sets compiled in / usable on this machine, separated by spaces, best first.
const char* compiled_isas();
const char* available_isas();

}  // namespace convkit::cpu
