// Lets g++ compile the .cu files of this folder and runs them on the host: for tests on machines without a GPU. Never
// installed, and never a way to compute anything: it is some thousand times slower than a GPU.
//
// How it works. The threads of a block are fibres, and run one at a time until they wait: at a barrier, or for the other
// lanes of their warp. Blocks run one after the other, those of a cluster together. The .cu files are compiled with
// -fsanitize=thread, whose calls (__tsan_read4 …) runtime.cpp answers itself: every access to memory is looked up among
// the buffers that were lent to the launch (lend(), exact to the byte) and the block's shared memory, whose shadow knows
// who wrote and read each two bytes last, and what has been synchronised since. Reported as an exception, with kernel,
// block, thread and source line:
//   - an access outside of the buffers, a write to one that was lent for reading, a misaligned vector access;
//   - a read of shared memory that nothing has written; a read or write that races with another thread's, the copies of
//     cp.async included, which land at their wait and not before;
//   - a barrier, shuffle, vote or matrix instruction that not all threads reach, or that lanes reach differently;
//   - an impossible launch (more threads or shared memory than the device has, an empty grid).
// Not seen: races in global memory, overflow from one `__shared__` array into the next (one that nothing has written is
// seen). Shared memory is poisoned by its shadow; torch's side fills fresh outputs and workspaces with NaN.
//
// To test a kernel: write it against launch.h and ptx.cuh (threads as usual, dynamic shared memory through
// dynamic_shared(), launches through launch(), inline assembly only in ptx.cuh with its twin under CONVKIT_EMULATION).
// `cmake --build … --target emulated` compiles it into the module that tests/emulated.py loads; the tests marked
// `cuda_emulated` then run the operators through it, as the real ones. tests/cuda/planted.cu shows one error of each kind.
// `__shared__` arrays become static: in a cluster use dynamic shared memory only (a static array is reported).
#pragma once

// Before the toolkit's headers: g++ has no use for these.
#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __managed__
#define __grid_constant__

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "lending.h"

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace convkit::emulation {

// What is emulated; tests change it. An H100 to begin with.
struct Device {
  int major = 9, minor = 0, multiprocessors = 132, largest_cluster = 8;
  int64_t shared_bytes_per_block = 227 << 10, l2_bytes = 50 << 20;
};
Device& device();

// Counters of this process, for tests that something ran at all.
struct Counters {
  int64_t launches, blocks, accesses;
};
Counters counters();

// ---- what the threads see ------------------------------------------------------------------------------------------

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid;
  uint32_t lane, cluster_rank, cluster_size;
  unsigned char* shared;
  int64_t shared_bytes;
};
extern thread_local Thread* self __attribute__((tls_model("initial-exec")));

[[noreturn]] void fail(const char* what);

// A barrier of the whole block. Adds up `vote` over the threads.
int barrier(int vote);
void cluster_barrier();
void* map_shared(const void* mine, uint32_t rank);

// All lanes of `mask` meet: each brings `in`, and takes away `out`, which `finish` works out once for all (in[lane],
// out[lane]). `kind` names the instruction: lanes that meet in different ones are reported.
constexpr int kPayload = 256;  // bytes: a pointer of every lane
using Finish = void (*)(uint32_t mask, const unsigned char (*in)[kPayload], unsigned char (*out)[kPayload]);
void meet(const char* kind, uint32_t mask, const void* in, int in_bytes, void* out, int out_bytes, Finish finish);
void warp_barrier(uint32_t mask);

// Says that the calling thread reads or writes (what instrumented code says of itself).
void touch(const void* at, int64_t bytes, bool write);

void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// ---- launches --------------------------------------------------------------------------------------------------------

struct LaunchFacts {
  dim3 grid, block;
  int64_t shared_bytes;
  unsigned cluster;
  const void* kernel;  // its address, for its name
  const void* arguments;
  int64_t argument_bytes;
};
void run(const LaunchFacts&, void (*body)(void*), void* arg);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared_bytes, unsigned cluster, A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  run({grid, block, shared_bytes, cluster, reinterpret_cast<const void*>(kernel), &call, sizeof call},
      [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->args); }, &call);
}

// ---- warps -----------------------------------------------------------------------------------------------------------

template <class T, class Source> T shuffle(const char* kind, uint32_t mask, T value, int source, Source) {
  struct In {
    T value;
    int source;
  } in{value, source};
  static_assert(sizeof(In) <= kPayload && std::is_trivially_copyable_v<T>);
  T out;
  meet(kind, mask, &in, sizeof in, &out, sizeof out, [](uint32_t lanes, const unsigned char(*from)[kPayload], unsigned char(*to)[kPayload]) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      In own;
      std::memcpy(&own, from[lane], sizeof own);
      int other = Source::of(lane, own.source);
      if (other < 0 || other > 31) other = lane;
      if (!(lanes >> other & 1)) fail("a shuffle takes its value from a lane that is not in its mask");
      In theirs;
      std::memcpy(&theirs, from[other], sizeof theirs);
      std::memcpy(to[lane], &theirs.value, sizeof(T));
    }
  });
  return out;
}

inline uint32_t vote(const char* kind, uint32_t mask, int predicate) {
  uint32_t out;
  meet(kind, mask, &predicate, sizeof predicate, &out, sizeof out, [](uint32_t lanes, const unsigned char(*from)[kPayload], unsigned char(*to)[kPayload]) {
    uint32_t ballot = 0;
    for (int lane = 0; lane < 32; ++lane) {
      int p = 0;
      if (lanes >> lane & 1) std::memcpy(&p, from[lane], sizeof p);
      if (p) ballot |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) std::memcpy(to[lane], &ballot, sizeof ballot);
  });
  return out;
}

struct SourceXor { static int of(int lane, int by) { return lane ^ by; } };
struct SourceDown { static int of(int lane, int by) { return lane + by; } };
struct SourceUp { static int of(int lane, int by) { return lane - by; } };
struct SourceLane { static int of(int, int lane) { return lane & 31; } };

template <class T, class F> T atomic(T* at, F&& next) {
  touch(at, sizeof(T), false);
  T old;
  std::memcpy(&old, at, sizeof old);
  T value = next(old);
  touch(at, sizeof(T), true);
  std::memcpy(at, &value, sizeof value);
  return old;
}

}  // namespace convkit::emulation

using std::isfinite;
using std::max;
using std::min;

#define threadIdx (::convkit::emulation::self->thread)
#define blockIdx (::convkit::emulation::self->block)
#define blockDim (::convkit::emulation::self->block_size)
#define gridDim (::convkit::emulation::self->grid)
#define warpSize 32

inline void __syncthreads() { ::convkit::emulation::barrier(0); }
inline int __syncthreads_count(int p) { return ::convkit::emulation::barrier(p != 0); }
inline int __syncthreads_or(int p) { return ::convkit::emulation::barrier(p != 0) != 0; }
inline int __syncthreads_and(int p) { return ::convkit::emulation::barrier(p == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::convkit::emulation::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_sync(unsigned mask, T v, int lane) { return ::convkit::emulation::shuffle("__shfl_sync", mask, v, lane, ::convkit::emulation::SourceLane{}); }
template <class T> T __shfl_xor_sync(unsigned mask, T v, int by) { return ::convkit::emulation::shuffle("__shfl_xor_sync", mask, v, by, ::convkit::emulation::SourceXor{}); }
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by) { return ::convkit::emulation::shuffle("__shfl_down_sync", mask, v, int(by), ::convkit::emulation::SourceDown{}); }
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by) { return ::convkit::emulation::shuffle("__shfl_up_sync", mask, v, int(by), ::convkit::emulation::SourceUp{}); }
inline unsigned __ballot_sync(unsigned mask, int p) { return ::convkit::emulation::vote("__ballot_sync", mask, p); }
inline int __any_sync(unsigned mask, int p) { return ::convkit::emulation::vote("__any_sync", mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return ::convkit::emulation::vote("__all_sync", mask, p == 0) == 0; }
inline unsigned __activemask() { return 0xffffffffu; }

template <class T> T __ldg(const T* p) { return *p; }
inline unsigned __popc(unsigned v) { return unsigned(__builtin_popcount(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline float __uint_as_float(unsigned v) { return __builtin_bit_cast(float, v); }
inline unsigned __float_as_uint(float v) { return __builtin_bit_cast(unsigned, v); }

template <class T, class V> T atomicAdd(T* at, V v) {
  static_assert(std::is_integral_v<T>, "sums of floating-point atomics depend on their order");
  return ::convkit::emulation::atomic(at, [&](T old) { return T(old + v); });
}
template <class T, class V> T atomicMax(T* at, V v) {
  static_assert(std::is_integral_v<T>);
  return ::convkit::emulation::atomic(at, [&](T old) { return old < T(v) ? T(v) : old; });
}
template <class T, class V> T atomicMin(T* at, V v) {
  static_assert(std::is_integral_v<T>);
  return ::convkit::emulation::atomic(at, [&](T old) { return T(v) < old ? T(v) : old; });
}
template <class T, class V> T atomicOr(T* at, V v) {
  return ::convkit::emulation::atomic(at, [&](T old) { return T(old | v); });
}
template <class T, class V> T atomicExch(T* at, V v) {
  return ::convkit::emulation::atomic(at, [&](T) { return T(v); });
}
template <class T, class U, class V> T atomicCAS(T* at, U expected, V v) {
  return ::convkit::emulation::atomic(at, [&](T old) { return old == T(expected) ? T(v) : old; });
}
