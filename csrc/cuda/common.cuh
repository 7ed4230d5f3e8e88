// What the kernels share: element types, 16-byte vectors, division by a fixed number, sums over a block.
#pragma once

#include "arguments.h"
#include "launch.h"

namespace convkit::cuda {

template <class S> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
// What S is computed in.
template <class S> using compute_t = typename ComputeOf<S>::type;

template <class S> struct Tag { using type = S; };

// Calls f(Tag<S>) with the storage type that `t` names.
template <class F> void with_type(DType t, F&& f) {
  switch (t) {
    case DType::f64: return f(Tag<double>{});
    case DType::f32: return f(Tag<float>{});
    case DType::bf16: return f(Tag<__nv_bfloat16>{});
    case DType::f16: return f(Tag<__half>{});
  }
}

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <class S> __device__ __forceinline__ S narrow(compute_t<S> v) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<S, __half>) return __float2half_rn(v);
  else return v;
}

// NaN goes through, as in PyTorch.
template <class T> __device__ __forceinline__ T relu(T v) { return v <= T(0) ? T(0) : v; }

// 16 bytes of S, aligned.
template <class S> struct alignas(16) Vec {
  static constexpr int size = 16 / int(sizeof(S));
  S of[size];
};
template <class S> constexpr int kVec = Vec<S>::size;

// Two neighbouring elements, accessed at once.
template <class S> struct alignas(2 * sizeof(S)) Pair {
  S x, y;
};

template <class S> __device__ __forceinline__ void load_wide(const S* from, compute_t<S> (&to)[kVec<S>]) {
  Vec<S> v = *reinterpret_cast<const Vec<S>*>(from);
#pragma unroll
  for (int i = 0; i < kVec<S>; ++i) to[i] = widen(v.of[i]);
}
template <class S> __device__ __forceinline__ void store_narrow(S* to, const compute_t<S> (&from)[kVec<S>]) {
  Vec<S> v;
#pragma unroll
  for (int i = 0; i < kVec<S>; ++i) v.of[i] = narrow<S>(from[i]);
  *reinterpret_cast<Vec<S>*>(to) = v;
}

// N values of the arithmetic's type (N * sizeof(T) a multiple of 16) by 16-byte accesses.
template <class T, int N> __device__ __forceinline__ void load_values(const T* from, T (&to)[N]) {
  constexpr int V = kVec<T>;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    Vec<T> v = *reinterpret_cast<const Vec<T>*>(from + i);
#pragma unroll
    for (int j = 0; j < V; ++j) to[i + j] = v.of[j];
  }
}

// The bias of a channel of a convolution: of the arithmetic's type beside a scale.
template <class S> __device__ __forceinline__ compute_t<S> bias_at(const void* bias, bool scaled, int64_t channel) {
  if (scaled) return static_cast<const compute_t<S>*>(bias)[channel];
  return widen(static_cast<const S*>(bias)[channel]);
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// n / divisor and n % divisor for 0 <= n < 2^31 by one multiplication (Granlund and Montgomery 1994).
struct FastDiv {
  uint32_t divisor, multiplier, shift;
  FastDiv() = default;
  explicit FastDiv(int64_t d) : divisor(uint32_t(d)) {
    shift = 0;
    while ((uint64_t(1) << shift) < uint64_t(d)) ++shift;
    multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - uint64_t(d))) / uint64_t(d) + 1);
  }
  __device__ __forceinline__ uint32_t div(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  __device__ __forceinline__ uint32_t divmod(uint32_t n, uint32_t& rest) const {
    uint32_t q = div(n);
    rest = n - q * divisor;
    return q;
  }
};

// A grid of one dimension that may be asked for more blocks than it can have: kernels take them in steps of gridDim.x.
inline dim3 grid_of(int64_t blocks) { return dim3(unsigned(blocks < INT32_MAX ? (blocks > 0 ? blocks : 1) : INT32_MAX)); }

// Weight gradients in splits, the second stage: sums of `splits` values, `step` apart. A block has kSumThreads / parts outputs,
// neighbours beside each other; of each, `parts` threads take a run of the splits, and the runs are added in order.
constexpr int kSumThreads = 256;
struct SplitSum {
  int parts;  // a power of two

  explicit SplitSum(int64_t splits) : parts(1) {
    while (parts < 16 && splits >= 16 * parts) parts *= 2;
  }
  Launch launch_of(int64_t outputs, cudaStream_t stream) const {
    return {grid_of(ceil_div(outputs, kSumThreads / parts)), dim3(kSumThreads), kSumThreads * int64_t(sizeof(double)), stream};
  }
  // The output of this thread, and whether it is the one that has its sum.
  __device__ __forceinline__ int64_t output() const { return int64_t(blockIdx.x) * (kSumThreads / parts) + threadIdx.x % (kSumThreads / parts); }
  __device__ __forceinline__ bool writes() const { return int(threadIdx.x) < kSumThreads / parts; }
  // For all threads of the block; `from` may be null.
  template <class T> __device__ __forceinline__ double sum(const T* from, int64_t step, int64_t splits) const {
    double* shared = reinterpret_cast<double*>(dynamic_shared());
    int outputs = kSumThreads / parts, part = threadIdx.x / outputs;
    double total = 0;
    if (from != nullptr) {
      int64_t last = splits * (part + 1) / parts;
#pragma unroll 8
      for (int64_t split = splits * part / parts; split < last; ++split) total += double(from[split * step]);
    }
    shared[threadIdx.x] = total;
    __syncthreads();
    if (writes())
      for (int i = 1; i < parts; ++i) total += shared[threadIdx.x + i * outputs];
    return total;
  }
};

// Sum over the lanes of a warp, in a fixed order; every lane gets it.
template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(0xffffffffu, v, by);
  return v;
}

}  // namespace convkit::cuda
