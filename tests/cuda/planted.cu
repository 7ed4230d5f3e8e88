// Kernels with one error each, and their right twins: for tests of the emulator alone.
#include "launch.h"
#include "ptx.cuh"

namespace convkit::cuda::planted {

namespace {

// Without an error: neighbours exchanged through shared memory, a warp's sum, a count over the block.
__global__ void exchange(const float* x, float* y, int n) {
  __shared__ float values[256];
  int i = threadIdx.x;
  values[i] = x[blockIdx.x * 256 + i];
  int positive = __syncthreads_count(values[i] > 0);
  float sum = values[255 - i];
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  unsigned ballot = __ballot_sync(0xffffffffu, i % 3 == 0);
  if (int(blockIdx.x) * 256 + i < n) y[blockIdx.x * 256 + i] = sum + positive * 1000 + (ballot >> (i % 32) & 1) * 0.5f;
}

__global__ void read_beyond(const float* x, float* y) {
  int i = threadIdx.x;
  y[i] = x[i + (i == 7)];
}
__global__ void write_beyond(const float* x, float* y) {
  int i = threadIdx.x;
  y[i == 5 ? -1 : i] = x[i];
}
__global__ void write_input(float* x) { x[threadIdx.x] = 1; }
__global__ void misaligned(const float* x, float* y) { reinterpret_cast<float4*>(y)[0] = *reinterpret_cast<const float4*>(x + 1); }
__global__ void shared_beyond(const float* x, float* y) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 3) s[32] = 0;
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void shared_unwritten(const float*, float* y) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x != 9) s[threadIdx.x] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void read_after_write_race(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[threadIdx.x % 32];
}
__global__ void write_after_read_race(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float other = s[63 - threadIdx.x];
  if (threadIdx.x == 62) s[5] = other;
  y[threadIdx.x] = other;
}
__global__ void missing_syncwarp(const float* x, float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void with_syncwarp(const float* x, float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void barrier_not_reached(float* y) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void barrier_in_two_places(float* y) {
  if (threadIdx.x % 2 == 0) {
    y[threadIdx.x] = 1;
    __syncthreads();
  } else {
    y[threadIdx.x] = 2;
    __syncthreads();
  }
}
__global__ void shuffle_without_a_lane(float* y) {
  float v = float(threadIdx.x);
  if (threadIdx.x != 31) v = __shfl_xor_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}
__global__ void copy_without_wait(const float* x, float* y) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  ptx::copy_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
  ptx::copy_async_commit();
  y[threadIdx.x] = s[4 * threadIdx.x];
  ptx::copy_async_wait<0>();
}
__global__ void copy_without_barrier(const float* x, float* y) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  ptx::copy_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  y[threadIdx.x] = s[4 * (threadIdx.x ^ 1)];
}
__global__ void copy_async(const float* x, float* y) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  ptx::copy_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x, 8);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = s[4 * (threadIdx.x ^ 1)] + s[4 * (threadIdx.x ^ 1) + 1] + s[4 * threadIdx.x + 3];
}

// y (16 x 8) = a (16 x 16) b (16 x 8), row by row, by ldmatrix and mma; a warp.
template <class H> __global__ void matrix(const H* a, const H* b, float* y) {
  H* s = reinterpret_cast<H*>(dynamic_shared());
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) s[256 + i] = b[i];
  __syncwarp();
  int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t fa[4], fb[2];
  ptx::ldmatrix_x4(fa, s + (lane % 16) * 16 + lane / 16 * 8);
  ptx::ldmatrix_x2_transposed(fb, s + 256 + (lane % 16) * 8);
  float d[4] = {};
  ptx::mma_m16n8k16<H>(d, fa, fb);
  for (int i = 0; i < 4; ++i) y[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

__global__ void matrix_tf32(const float* a, const float* b, float* y) {  // (16 x 8) (8 x 8)
  int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = ptx::to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fb[i] = ptx::to_tf32(b[(t + i * 4) * 8 + g]);
  float d[4] = {};
  ptx::mma_m16n8k8_tf32(d, fa, fb);
  for (int i = 0; i < 4; ++i) y[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// The sum over a cluster of two, each block adding what the other has in its shared memory.
template <bool synchronise> __global__ void cluster_sum(const float* x, float* y) {
#if defined(CONVKIT_EMULATION) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  float* s = reinterpret_cast<float*>(dynamic_shared());
  int i = blockIdx.x * 32 + threadIdx.x;
  s[threadIdx.x] = x[i];
  if (synchronise) ptx::cluster_sync();
  else __syncthreads();
  y[i] = s[threadIdx.x] + *ptx::map_shared(s + threadIdx.x, ptx::cluster_rank() ^ 1);
  ptx::cluster_sync();
#endif
}

// The second block of a cluster copies what the first has in its shared memory.
template <bool synchronise, bool stay> __global__ void cluster_copy(const float* x, float* y) {
#if defined(CONVKIT_EMULATION) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  float* s = reinterpret_cast<float*>(dynamic_shared());
  s[threadIdx.x] = x[threadIdx.x];
  if (synchronise) ptx::cluster_sync();
  else __syncthreads();
  if (ptx::cluster_rank() == 1) y[threadIdx.x] = *ptx::map_shared(s + threadIdx.x, 0);
  if (stay) ptx::cluster_sync();
#endif
}

}  // namespace

// Runs the kernel of that name on x and y, where it has them. False: there is no such kernel.
bool run(const std::string& name, const void* input, void* output, int n) {
  const float* x = static_cast<const float*>(input);
  float* y = static_cast<float*>(output);
  auto go = [&](auto kernel, int threads, int64_t shared, auto... args) { launch(name.c_str(), kernel, {dim3(1), dim3(unsigned(threads)), shared}, args...); };
  if (name == "exchange") launch("exchange", exchange, {dim3(unsigned(n + 255) / 256), dim3(256)}, x, y, n);
  else if (name == "read_beyond") go(read_beyond, 8, 0, x, y);
  else if (name == "write_beyond") go(write_beyond, 8, 0, x, y);
  else if (name == "write_input") go(write_input, 8, 0, const_cast<float*>(x));
  else if (name == "misaligned") go(misaligned, 1, 0, x, y);
  else if (name == "shared_beyond") go(shared_beyond, 32, 128, x, y);
  else if (name == "shared_unwritten") go(shared_unwritten, 32, 128, x, y);
  else if (name == "read_after_write_race") go(read_after_write_race, 64, 0, x, y);
  else if (name == "write_after_read_race") go(write_after_read_race, 64, 0, x, y);
  else if (name == "missing_syncwarp") go(missing_syncwarp, 32, 0, x, y);
  else if (name == "with_syncwarp") go(with_syncwarp, 32, 0, x, y);
  else if (name == "barrier_not_reached") go(barrier_not_reached, 64, 0, y);
  else if (name == "barrier_in_two_places") go(barrier_in_two_places, 64, 0, y);
  else if (name == "shuffle_without_a_lane") go(shuffle_without_a_lane, 32, 0, y);
  else if (name == "copy_without_wait") go(copy_without_wait, 8, 128, x, y);
  else if (name == "copy_without_barrier") go(copy_without_barrier, 8, 128, x, y);
  else if (name == "copy_async") go(copy_async, 8, 128, x, y);
  else if (name == "matrix_f16") go(matrix<__half>, 32, 768, static_cast<const __half*>(input), static_cast<const __half*>(input) + 256, y);
  else if (name == "matrix_bf16") go(matrix<__nv_bfloat16>, 32, 768, static_cast<const __nv_bfloat16*>(input), static_cast<const __nv_bfloat16*>(input) + 256, y);
  else if (name == "matrix_tf32") go(matrix_tf32, 32, 0, x, x + 128, y);
  else if (name == "cluster_sum") launch("cluster_sum", cluster_sum<true>, {dim3(2), dim3(32), 128, nullptr, 2}, x, y);
  else if (name == "cluster_race") launch("cluster_race", cluster_sum<false>, {dim3(2), dim3(32), 128, nullptr, 2}, x, y);
  else if (name == "cluster_late_race") launch("cluster_late_race", cluster_copy<false, true>, {dim3(2), dim3(32), 128, nullptr, 2}, x, y);
  else if (name == "cluster_left") launch("cluster_left", cluster_copy<true, false>, {dim3(2), dim3(32), 128, nullptr, 2}, x, y);
  else if (name == "cluster_stayed") launch("cluster_stayed", cluster_copy<true, true>, {dim3(2), dim3(32), 128, nullptr, 2}, x, y);
  else if (name == "too_many_threads") go(with_syncwarp, 2048, 0, x, y);
  else if (name == "too_much_shared") go(with_syncwarp, 32, 1 << 20, x, y);
  else return false;
  return true;
}

}  // namespace convkit::cuda::planted
