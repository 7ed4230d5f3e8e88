// What an operator needs to run on a GPU: its device and stream, the device's facts, a plan that fits into memory. Without
// CUDA kernels in the build nothing here runs; with the emulator in the place of a GPU (csrc/cuda/emulation) the tensors
// are on the CPU, fresh ones are filled with NaN, and what a launch may touch is written down.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>

#include "../plan_cuda.h"
#if defined(CONVKIT_CUDA) || defined(CONVKIT_EMULATION)
#define CONVKIT_GPU 1
#include "../cuda/kernels.h"
#endif
#if defined(CONVKIT_EMULATION)
#include "../cuda/emulation/lending.h"
#endif

namespace convkit::gpu {

#if defined(CONVKIT_EMULATION)

inline bool runs(const at::Tensor&) { return true; }

inline at::Tensor fresh(at::Tensor t) {
  if (t.nbytes() > 0) std::memset(t.mutable_data_ptr(), 0xff, t.nbytes());  // a NaN in every dtype
  return t;
}

inline void lend(const char* name, const at::Tensor& t, bool writable) {
  int64_t elements = 1;
  for (int64_t i = 0; i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
  emulation::lend(t.const_data_ptr(), t.numel() == 0 ? 0 : elements * t.element_size(), writable, name);
}

inline void check_allocation(int64_t bytes) {
  TORCH_CHECK_WITH(OutOfMemoryError, bytes <= emulation::most_workspace_bytes(), "emulated: out of memory, tried to allocate ", bytes, " bytes");
}

#else

inline bool runs([[maybe_unused]] const at::Tensor& t) {
#if defined(CONVKIT_GPU)
  return t.is_cuda();
#else
  return false;
#endif
}
inline at::Tensor fresh(at::Tensor t) { return t; }
inline void lend(const char*, const at::Tensor&, bool) {}
inline void check_allocation(int64_t) {}

#endif

#if defined(CONVKIT_GPU)
// Facts of the input's device, which is current. Throws where this build has no kernels for it.
const cuda::DeviceFacts& facts(const char* op, const at::Tensor& input);

// The current stream of the input's device.
cuda::Stream stream(const at::Tensor& input);
#endif

// While one lives, the input's device is current.
class Scope {
 public:
#if defined(CONVKIT_EMULATION)
  explicit Scope(const at::Tensor&) { emulation::take_back(); }
  ~Scope() { emulation::take_back(); }
#else
  explicit Scope(const at::Tensor& input) : guard_(input.is_cuda() ? c10::OptionalDeviceGuard(input.device()) : c10::OptionalDeviceGuard()) {}

 private:
  c10::OptionalDeviceGuard guard_;
#endif
};

// Calls launch(plan, workspace pointer) with the plan that make(least_workspace) gives: the best one, or, where there is
// not the memory for its workspace, the one that needs least.
template <class Make, class Allocate, class Launch> void with_workspace(Make&& make, Allocate&& allocate, Launch&& launch) {
  auto plan = make(false);
  at::Tensor workspace;
  try {
    workspace = allocate(plan.workspace_bytes);
  } catch (const c10::OutOfMemoryError&) {
    auto least = make(true);
    if (least.workspace_bytes >= plan.workspace_bytes) throw;
    plan = least;
    workspace = allocate(plan.workspace_bytes);
  }
  launch(plan, workspace);
}

}  // namespace convkit::gpu
