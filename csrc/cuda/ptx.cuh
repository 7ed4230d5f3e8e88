// Every piece of inline assembly, each with a twin for the emulator that does what the PTX manual says. sm_80 and newer,
// unless said otherwise.
#pragma once

#include "launch.h"

namespace convkit::cuda::ptx {

#if !defined(CONVKIT_EMULATION)
__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// ---- copies from global to shared memory that pass by the registers (cp.async) ---------------------------------------

// Copies 16 bytes past the first cache, of which the first `valid_bytes` are read and the rest are zeros. Both addresses
// are aligned to 16.
__device__ inline void copy_async_16(void* shared, const void* global, int valid_bytes = 16) {
#if defined(CONVKIT_EMULATION)
  emulation::copy_async(shared, global, 16, valid_bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
#endif
}

// The same of 4, 8 or 16 bytes, aligned to them, through the first cache: for what the block will read again.
template <int bytes> __device__ inline void copy_async_cached(void* shared, const void* global, int valid_bytes = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#if defined(CONVKIT_EMULATION)
  emulation::copy_async(shared, global, bytes, valid_bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes), "r"(valid_bytes) : "memory");
#endif
}

__device__ inline void copy_async_commit() {
#if defined(CONVKIT_EMULATION)
  emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies, but for those of the last `pending` groups. Others see them after a barrier.
template <int pending> __device__ inline void copy_async_wait() {
#if defined(CONVKIT_EMULATION)
  emulation::copy_async_wait(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- tensor cores ----------------------------------------------------------------------------------------------------
// Lane l of a warp: g = l / 4, t = l % 4. 16-bit operands are two to a register, the lower index in the lower half.


#if defined(CONVKIT_EMULATION)
namespace emulated {

using In = const unsigned char (*)[emulation::kPayload];
using Out = unsigned char (*)[emulation::kPayload];

struct Rows {
  const unsigned char* of[32];
};

inline Rows gather_rows(const char* kind, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix of a row that is not aligned to 16 bytes");
  Rows all;
  emulation::meet(kind, 0xffffffffu, &row, sizeof row, &all, sizeof all, [](uint32_t, In in, Out out) {
    Rows gathered;
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&gathered.of[lane], in[lane], sizeof(void*));
    for (int lane = 0; lane < 32; ++lane) std::memcpy(out[lane], &gathered, sizeof gathered);
  });
  return all;
}

inline uint32_t read_bytes(const unsigned char* from, int bytes) {
  emulation::touch(from, bytes, false);
  uint32_t v = 0;
  std::memcpy(&v, from, size_t(bytes));
  return v;
}

// Matrix j of 8 x 8 16-bit elements has its rows where lanes 8 j to 8 j + 7 point.
template <int matrices, bool transposed> void load_matrices(const char* kind, uint32_t* out, const void* row) {
  Rows rows = gather_rows(kind, row);
  int lane = int(emulation::self->lane), g = lane / 4, t = lane % 4;
  for (int j = 0; j < matrices; ++j) {
    if constexpr (transposed) out[j] = read_bytes(rows.of[8 * j + 2 * t] + 2 * g, 2) | read_bytes(rows.of[8 * j + 2 * t + 1] + 2 * g, 2) << 16;
    else out[j] = read_bytes(rows.of[8 * j + g] + 4 * t, 4);
  }
}

struct Operands {
  float d[4];
  uint32_t a[4], b[2];
};

template <class H> float half_of(uint32_t word, int which) {
  uint16_t bits = uint16_t(which == 0 ? word : word >> 16);
  if constexpr (std::is_same_v<H, __half>) return __half2float(__builtin_bit_cast(__half, bits));
  else return __bfloat162float(__builtin_bit_cast(__nv_bfloat16, bits));
}

// D (16 x 8) += A (16 x k) B (k x 8), all lanes' at once. `a(lane operands, i)` and `b(…)` unpack a lane's elements.
template <int depth, class Unpack> void multiply(In in, Out out, Unpack unpack) {
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    Operands o;
    std::memcpy(&o, in[lane], sizeof o);
    unpack(o, lane / 4, lane % 4, a, b);
  }
  for (int lane = 0; lane < 32; ++lane) {
    Operands o;
    std::memcpy(&o, in[lane], sizeof o);
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = o.d[i];
      for (int k = 0; k < depth; ++k) sum += double(a[row][k]) * double(b[k][column]);
      o.d[i] = float(sum);
    }
    std::memcpy(out[lane], o.d, sizeof o.d);
  }
}

}  // namespace emulated
#endif

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l points to row l % 8 of matrix l / 8. Lane (g, t) gets
// elements (g, 2 t) and (g, 2 t + 1) of each.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#if defined(CONVKIT_EMULATION)
  emulated::load_matrices<4, false>("ldmatrix.x4", out, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// The same, each matrix transposed: lane (g, t) gets elements (2 t, g) and (2 t + 1, g).
__device__ inline void ldmatrix_x4_transposed(uint32_t (&out)[4], const void* row) {
#if defined(CONVKIT_EMULATION)
  emulated::load_matrices<4, true>("ldmatrix.x4.trans", out, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// Two matrices, of which lanes 0 to 15 point to the rows.
__device__ inline void ldmatrix_x2(uint32_t (&out)[2], const void* row) {
#if defined(CONVKIT_EMULATION)
  emulated::load_matrices<2, false>("ldmatrix.x2", out, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(shared_address(row)) : "memory");
#endif
}

__device__ inline void ldmatrix_x2_transposed(uint32_t (&out)[2], const void* row) {
#if defined(CONVKIT_EMULATION)
  emulated::load_matrices<2, true>("ldmatrix.x2.trans", out, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(shared_address(row)) : "memory");
#endif
}

// d (16 x 8, f32) += a (16 x 16, row by row) b (16 x 8, column by column); H is __half or __nv_bfloat16.
//   a: (g, 2t..) (g + 8, 2t..) (g, 2t + 8..) (g + 8, 2t + 8..)   b: (2t.., g) (2t + 8.., g)   d: (g, 2t..) (g + 8, 2t..)
template <class H> __device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CONVKIT_EMULATION)
  emulated::Operands o{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulation::meet("mma.m16n8k16", 0xffffffffu, &o, sizeof o, d, sizeof d, [](uint32_t, emulated::In in, emulated::Out out) {
    emulated::multiply<16>(in, out, [](const emulated::Operands& o, int g, int t, float (*a)[16], float (*b)[8]) {
      for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = emulated::half_of<H>(o.a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = emulated::half_of<H>(o.b[i / 2], i % 2);
    });
  });
#else
  if constexpr (std::is_same_v<H, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d (16 x 8) += a (16 x 8) b (8 x 8) in tf32: of each 32-bit operand the 19 upper bits count.
//   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)   b: (t, g) (t + 4, g)   d: as above
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CONVKIT_EMULATION)
  emulated::Operands o{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulation::meet("mma.m16n8k8.tf32", 0xffffffffu, &o, sizeof o, d, sizeof d, [](uint32_t, emulated::In in, emulated::Out out) {
    emulated::multiply<8>(in, out, [](const emulated::Operands& o, int g, int t, float (*a)[8], float (*b)[8]) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = __builtin_bit_cast(float, o.a[i] & 0xffffe000u);
      for (int i = 0; i < 2; ++i) b[t + i * 4][g] = __builtin_bit_cast(float, o.b[i] & 0xffffe000u);
    });
  });
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The nearest tf32 value (10 bits of fraction, ties away from zero), as the bits of a float.
__device__ inline uint32_t to_tf32(float v) {
#if defined(CONVKIT_EMULATION)
  uint32_t bits = __builtin_bit_cast(uint32_t, v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0xffffe000u) | (std::isnan(v) ? 0x00400000u : 0u);
  return (bits + 0x1000u) & 0xffffe000u;
#else
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return out;
#endif
}

// ---- clusters (sm_90 and newer; before that each block is one) ---------------------------------------------------------

#if defined(CONVKIT_EMULATION) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline uint32_t cluster_rank() {
#if defined(CONVKIT_EMULATION)
  return emulation::self->cluster_rank;
#else
  uint32_t out;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(out));
  return out;
#endif
}

// A barrier of all threads of the cluster; what was written before it, shared memory of other blocks included, is seen
// after it.
__device__ inline void cluster_sync() {
#if defined(CONVKIT_EMULATION)
  emulation::cluster_barrier();
#else
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#endif
}

// Where what `mine` is in this block's shared memory stands in that of block `rank` of the cluster.
template <class T> __device__ inline T* map_shared(T* mine, uint32_t rank) {
#if defined(CONVKIT_EMULATION)
  return static_cast<T*>(emulation::map_shared(mine, rank));
#else
  uint64_t out;
  asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(out);
#endif
}
#else
__device__ inline uint32_t cluster_rank() { return 0; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <class T> __device__ inline T* map_shared(T* mine, uint32_t) { return mine; }
#endif

}  // namespace convkit::cuda::ptx
