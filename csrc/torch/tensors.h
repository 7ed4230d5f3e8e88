// What every operator needs of its tensors: dtype, layout, checks, threads, workspace.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../cpu/kernels.h"
#include "../problem.h"
#include "gpu.h"

namespace convkit {

using at::IntArrayRef;
using at::Tensor;

// The operators of conv.cpp, channels.cpp and max_pool.cpp, for any device that has kernels.
void register_conv(torch::Library&);
void register_channels(torch::Library&);
void register_max_pool(torch::Library&);

// `op` and `arg` go into the message: "convkit.conv2d: weight: got …; accepts …".
#define CONVKIT_CHECK(condition, op, arg, ...) TORCH_CHECK(condition, "convkit.", op, ": ", arg, ": ", __VA_ARGS__)

inline DType dtype_of(const char* op, const char* arg, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "convkit.", op, ": ", arg, ": got dtype ", t.scalar_type(),
                                  "; accepts float64, float32, bfloat16, float16: convert it with .to(dtype)");
  }
}

// The arithmetic's type: what per-channel values and sums are held in.
inline at::ScalarType compute_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

// PyTorch's rule: judged on strides alone, contiguous where a tensor is both.
inline bool is_channels_last(const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }
inline at::MemoryFormat format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}
inline Layout layout(bool channels_last) { return channels_last ? Layout::nhwc : Layout::nchw; }

// Dense, and on the device of `input`, which is where the operator runs.
inline void check_dense(const char* op, const char* arg, const Tensor& t, const Tensor& input) {
  CONVKIT_CHECK(t.device() == input.device(), op, arg, "got a tensor on ", t.device(), "; accepts the device of the input, ", input.device(), ": move it with .to(\"", input.device(), "\")");
  CONVKIT_CHECK(t.layout() == at::kStrided, op, arg, "got layout ", t.layout(), "; accepts dense tensors: convert it with .to_dense()");
}

inline void check_like(const char* op, const char* arg, const Tensor& t, const Tensor& input) {
  check_dense(op, arg, t, input);
  CONVKIT_CHECK(t.scalar_type() == input.scalar_type(), op, arg, "got dtype ", t.scalar_type(), "; accepts the input's, ", input.scalar_type(),
                ": convert one of them with .to(dtype)");
}

inline Tensor new_tensor(IntArrayRef sizes, const Tensor& like, bool channels_last) {
  return gpu::fresh(at::empty(sizes, like.options().memory_format(format(channels_last))));
}

// Threads are torch's own (at::parallel_for), so torch.set_num_threads holds and one OpenMP runtime does all the work.
inline cpu::Pool pool() {
  return {at::get_num_threads(), [](int64_t tasks, void (*body)(void*, int64_t, int64_t, int), void* arg) {
            at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(arg, begin, end, at::get_thread_num()); });
          }};
}

// When Winograd's method is used: CONVKIT_WINOGRAD at first, then what set_winograd() says. One switch for the process,
// as PyTorch's torch.backends are: a backward pass runs in threads of its own and must see what the caller chose.
inline std::atomic<Winograd>& winograd_switch() {
  static std::atomic<Winograd> chosen = [] {
    const char* value = std::getenv("CONVKIT_WINOGRAD");
    std::string_view text = value == nullptr || *value == '\0' ? "1" : value;
    if (text != "0" && text != "1")
      throw std::runtime_error("CONVKIT_WINOGRAD: got '" + std::string(text) + "'; accepts 0 (never) and 1 (where it is faster, as if it were not set)");
    return text == "1" ? Winograd::faster : Winograd::never;
  }();
  return chosen;
}

// Whether CONVKIT_PRINT_PLAN is set: then each plan is a line on stderr, once.
inline bool printing_plans() {
  static const bool wanted = [] {
    const char* v = std::getenv("CONVKIT_PRINT_PLAN");
    return v != nullptr && *v != '\0' && std::string_view(v) != "0";
  }();
  return wanted;
}

inline void print_once(const std::string& line) {
  static std::mutex lock;
  static std::set<std::string> printed;
  std::lock_guard<std::mutex> hold(lock);
  if (printed.insert(line).second) std::cerr << "convkit: " << line << std::endl;
}

// What PyTorch's switches (torch.backends.cudnn.allow_tf32, or torch.backends.cudnn.conv.fp32_precision and what that
// inherits from) say of float32 convolutions on a GPU: tf32, unless someone has asked for more.
inline Float32 float32_on_gpu() {
  bool tf32 = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV) == at::Float32Precision::TF32;
  return tf32 ? Float32::tf32 : Float32::full;
}

// Kernels allocate nothing: they are given their workspace, from torch's allocator.
inline Tensor workspace(int64_t bytes, const Tensor& like) {
  gpu::check_allocation(bytes);
  return gpu::fresh(at::empty({bytes}, like.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous)));
}

// What a kernel reads or writes. The name is for the emulator's reports.
inline const void* in(const char* name, const Tensor& t) {
  if (!t.defined()) return nullptr;
  gpu::lend(name, t, false);
  return t.const_data_ptr();
}
inline void* out(const char* name, const Tensor& t) {
  if (!t.defined()) return nullptr;
  gpu::lend(name, t, true);
  return t.mutable_data_ptr();
}

inline WeightStrides weight_strides(const Tensor& w) { return {w.stride(0), w.stride(1), w.stride(2), w.stride(3)}; }

}  // namespace convkit
