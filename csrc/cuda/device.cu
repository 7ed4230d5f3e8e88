#include "device.h"

#include <cstring>

#include "launch.h"

namespace convkit::cuda {

#if defined(CONVKIT_EMULATION)

int device_count() { return 1; }

const char* query_device(int, DeviceFacts* facts) {
  const emulation::Device& d = emulation::device();
  std::strcpy(facts->name, "emulated");
  facts->major = d.major, facts->minor = d.minor;
  facts->multiprocessors = d.multiprocessors;
  facts->shared_bytes_per_block = d.shared_bytes_per_block;
  facts->l2_bytes = d.l2_bytes;
  return nullptr;
}

#else

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

#endif

}  // namespace convkit::cuda
