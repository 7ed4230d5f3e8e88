// The CUDA kernels as functions of plain arguments. Each runs on the caller's stream and device, allocates nothing and
// waits for nothing. They throw std::runtime_error where a launch fails.
#pragma once

#include "../arguments.h"
#include "../plan_cuda.h"

struct CUstream_st;

namespace convkit::cuda {

using Stream = CUstream_st*;  // cudaStream_t

void depthwise(const ConvArgs&, const CudaConvPlan&, Pass, Stream);
void conv_sm80(const ConvArgs&, const CudaConvPlan&, Pass, Stream);
void conv_simt(const ConvArgs&, const CudaConvPlan&, Pass, Stream);
void separable_sm80(const SeparableArgs&, const CudaSeparablePlan&, Stream);
void separable_simt(const SeparableArgs&, Stream);

void channel_sum(const ChannelShape&, const CudaChannelPlan&, const void* src, void* sums, void* workspace, Stream);
void batch_norm_relu(const BatchNormArgs&, const CudaChannelPlan&, Stream);
void batch_norm_relu_grad(const BatchNormArgs&, const CudaChannelPlan&, Stream);

// running = (1 - momentum) * running + momentum * (mean, or var * unbias), in double. Strides in elements; mean and var are
// f32 or f64.
struct RunningStatistics {
  int64_t c;
  double momentum, unbias;
  const void *mean, *var;
  DType batch_dtype, mean_dtype;
  void* running_mean;
  int64_t mean_stride;
  DType var_dtype;
  void* running_var;
  int64_t var_stride;
};
void update_running_statistics(const RunningStatistics&, Stream);

void im2col(const ColumnsArgs&, Stream);
void col2im(const ColumnsArgs&, Stream);

void max_pool(const MaxPoolArgs&, Stream);
void max_pool_grad(const MaxPoolArgs&, Stream);
void max_pool_pick(const MaxPoolArgs&, Stream);

// The kernel that the plan names.
inline void conv(const ConvArgs& a, const CudaConvPlan& plan, Pass pass, Stream stream) {
  if (plan.kernel == CudaKernel::tensor) conv_sm80(a, plan, pass, stream);
  else if (plan.kernel == CudaKernel::simt) conv_simt(a, plan, pass, stream);
  else depthwise(a, plan, pass, stream);
}

}  // namespace convkit::cuda
