// How a kernel is launched, on a GPU and under the emulator alike, and what every .cu file includes first.
#pragma once

#if defined(CONVKIT_EMULATION)
#include "emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace convkit::cuda {

struct Launch {
  dim3 grid, block;
  int64_t shared_bytes = 0;  // dynamic shared memory of a block
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;      // blocks of a cluster, along x
};

#if defined(CONVKIT_EMULATION)
template <class... P, class... A> void launch(const char*, void (*kernel)(P...), const Launch& how, A&&... args) {
  emulation::launch(kernel, how.grid, how.block, how.shared_bytes, how.cluster, static_cast<A&&>(args)...);
}
#else
// Calls f with the same in the runtime's words.
template <class F> void with_launch_config(const Launch& how, F&& f) {
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = size_t(how.shared_bytes);
  config.stream = how.stream;
  cudaLaunchAttribute attribute{};
  if (how.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = how.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  f(config);
}

// Throws std::runtime_error with the kernel's name. An error of an earlier, asynchronous launch shows here too.
template <class... P, class... A> void launch(const char* name, void (*kernel)(P...), const Launch& how, A&&... args) {
  auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // not to be found again by the next call
    throw std::runtime_error("convkit: CUDA kernel " + std::string(name) + ": " + cudaGetErrorString(error) + " (grid " + std::to_string(how.grid.x) + " x " +
                             std::to_string(how.grid.y) + " x " + std::to_string(how.grid.z) + ", " + std::to_string(how.block.x) + " threads, " +
                             std::to_string(how.shared_bytes) + " bytes of shared memory)");
  };
  // More than 48 KiB have to be asked for. This is a property of the function on the device, which other threads launch at the
  // same time with more or less: all ask for as much as there is.
  if (how.shared_bytes > 48 << 10) {
    int device = 0, most = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  }
  with_launch_config(how, [&](const cudaLaunchConfig_t& config) { check(cudaLaunchKernelEx(&config, kernel, static_cast<A&&>(args)...)); });
}
#endif

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared() {
#if defined(CONVKIT_EMULATION)
  return emulation::self->shared;
#else
  extern __shared__ __align__(1024) unsigned char convkit_dynamic_shared[];
  return convkit_dynamic_shared;
#endif
}

}  // namespace convkit::cuda
