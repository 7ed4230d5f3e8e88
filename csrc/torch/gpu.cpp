#include "gpu.h"

#if defined(CONVKIT_GPU)

#if defined(CONVKIT_TORCH_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

#include <mutex>
#include <string>

#include "tensors.h"

namespace convkit::gpu {

// "80,90a,100+PTX": machine code runs on devices of the same major version from its minor on (90a on 9.0 alone), PTX on
// every newer one (that of 100f within its major version).
bool built_for(const std::string& arches, int major, int minor) {
  for (size_t start = 0; start <= arches.size();) {
    size_t end = arches.find(',', start);
    std::string arch = arches.substr(start, end == std::string::npos ? end : end - start);
    start = end == std::string::npos ? arches.size() + 1 : end + 1;
    size_t digits = arch.find_first_not_of("0123456789");
    int number = std::atoi(arch.c_str()), device = major * 10 + minor;
    char kind = digits != std::string::npos ? arch[digits] : '+';
    bool ptx = arch.find("+PTX") != std::string::npos, same_major = number / 10 == major;
    if (number == device || (kind != 'a' && number <= device && (same_major || (ptx && kind != 'f')))) return true;
  }
  return false;
}

const cuda::DeviceFacts& facts(const char* op, const at::Tensor& input) {
  constexpr int most = 64;
  static cuda::DeviceFacts known[most];
  static bool asked[most];
  static std::mutex lock;
  int index = input.is_cuda() ? input.device().index() : 0;
  TORCH_CHECK(index >= 0 && index < most, "convkit.", op, ": input: got a tensor on device ", index, "; accepts 0 to ", most - 1);
  std::lock_guard<std::mutex> hold(lock);
  cuda::DeviceFacts& d = known[index];
#if defined(CONVKIT_EMULATION)
  asked[index] = false;  // tests change it
  const std::string arches = "80,90a";
#else
  const std::string arches = CONVKIT_CUDA_ARCHES;
#endif
  if (!asked[index]) {
    const char* error = cuda::query_device(index, &d);
    TORCH_CHECK(error == nullptr, "convkit.", op, ": input: got a tensor on ", input.device(), ", which CUDA does not describe: ", error);
    std::string capability = std::to_string(d.major) + "." + std::to_string(d.minor);
    TORCH_CHECK_NOT_IMPLEMENTED(d.major >= 8, "convkit.", op, ": input: got a tensor on ", input.device(), ", ", d.name, " of compute capability ", capability,
                                "; accepts 8.0 and newer: leave the layer to PyTorch");
    TORCH_CHECK_NOT_IMPLEMENTED(built_for(arches, d.major, d.minor), "convkit.", op, ": input: got a tensor on ", input.device(), "; built for ", arches, ", this GPU (", d.name,
                                ") is ", capability, ": rebuild with TORCH_CUDA_ARCH_LIST=", capability);
    d.largest_cluster = cuda::largest_cluster(d);
    asked[index] = true;
  }
  return d;
}

cuda::Stream stream([[maybe_unused]] const at::Tensor& input) {
#if defined(CONVKIT_TORCH_CUDA)  // not by c10::Stream::native_handle(), which torch 2.11 may not have
  return c10::cuda::getCurrentCUDAStream(input.device().index()).stream();
#else  // the emulator; or kernels compiled against a CPU build of torch, whose tensors are never on a GPU
  return nullptr;
#endif
}

}  // namespace convkit::gpu

#endif
