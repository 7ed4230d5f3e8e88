#include "device.h"

#include <cuda_runtime.h>

#include <cstring>

namespace convkit::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* query_device(int index, DeviceFacts* facts) {
  cudaDeviceProp p;
  cudaError_t error = cudaGetDeviceProperties(&p, index);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  static_assert(sizeof facts->name == sizeof p.name);
  std::memcpy(facts->name, p.name, sizeof p.name);
  facts->major = p.major;
  facts->minor = p.minor;
  facts->multiprocessors = p.multiProcessorCount;
  facts->shared_bytes_per_block = int64_t(p.sharedMemPerBlockOptin);
  facts->l2_bytes = p.l2CacheSize;
  return nullptr;
}

}  // namespace convkit::cuda
