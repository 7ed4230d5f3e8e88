// One vector type for every instruction set, from the compiler's vector extensions, and loads and stores that convert
// between what is stored (double, float, bfloat16, float16) and what is computed in (double, float).
// Everything lives in a namespace named after the instruction set: a function of the same name compiled for AVX-512
// must never be picked by the linker for a machine without it. For the same reason no function from std:: is used here.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define CONVKIT_INLINE __attribute__((always_inline)) inline
#define CONVKIT_UNROLL _Pragma("GCC unroll 64")

namespace convkit::cpu::CONVKIT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class S> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
template <class S> using compute_t = typename Compute<S>::type;

template <class T> struct VecOf;
template <> struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef float loose __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes), may_alias));
};
template <> struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef double loose __attribute__((vector_size(kVectorBytes), may_alias, aligned(8)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class T> using vec = typename VecOf<T>::type;
template <class T> constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T> CONVKIT_INLINE constexpr T min_of(T a, T b) { return b < a ? b : a; }
template <class T> CONVKIT_INLINE constexpr T max_of(T a, T b) { return a < b ? b : a; }
CONVKIT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CONVKIT_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// x - 0 keeps every value, -0 and NaN included, so that the compiler turns this into a plain broadcast.
template <class T> CONVKIT_INLINE vec<T> broadcast(T x) { return x - vec<T>{}; }

// max(v, 0) that lets NaN through, as torch.relu does.
template <class T> CONVKIT_INLINE vec<T> relu(vec<T> v) { return v <= vec<T>{} ? vec<T>{} : v; }
template <class T> CONVKIT_INLINE T relu_scalar(T v) { return v <= T(0) ? T(0) : v; }

// ---- one value -----------------------------------------------------------------------------------------------------

CONVKIT_INLINE float from_bits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
CONVKIT_INLINE uint32_t to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

CONVKIT_INLINE double get(const double* p) { return *p; }
CONVKIT_INLINE float get(const float* p) { return *p; }
CONVKIT_INLINE float get(const bf16* p) { return from_bits(uint32_t(p->bits) << 16); }
CONVKIT_INLINE float get(const f16* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#else
  uint32_t h = p->bits, sign = (h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    float f = float(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

CONVKIT_INLINE void put(double* p, double v) { *p = v; }
CONVKIT_INLINE void put(float* p, float v) { *p = v; }
CONVKIT_INLINE void put(bf16* p, float v) {  // round to nearest, ties to even
  uint32_t u = to_bits(v);
  p->bits = v != v ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
CONVKIT_INLINE void put(f16* p, float v) {
#if defined(__F16C__)
  p->bits = uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t u = to_bits(v), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) {
    p->bits = uint16_t(sign | 0x7e00);
  } else if (a >= 0x477ff000) {  // rounds to infinity from 65520 on
    p->bits = uint16_t(sign | 0x7c00);
  } else if (a < 0x38800000) {  // subnormal half: adding 0.5 lets the float unit round at bit 2^-24
    float magic = from_bits(a) + 0.5f;
    p->bits = uint16_t(sign | (to_bits(magic) - 0x3f000000));
  } else {
    p->bits = uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
  }
#endif
}

// ---- one vector ----------------------------------------------------------------------------------------------------

CONVKIT_INLINE vec<double> load(const double* p) { return *reinterpret_cast<const VecOf<double>::loose*>(p); }
CONVKIT_INLINE vec<float> load(const float* p) { return *reinterpret_cast<const VecOf<float>::loose*>(p); }
CONVKIT_INLINE void store(double* p, vec<double> v) { *reinterpret_cast<VecOf<double>::loose*>(p) = v; }
CONVKIT_INLINE void store(float* p, vec<float> v) { *reinterpret_cast<VecOf<float>::loose*>(p) = v; }

// A vector at an address that is a multiple of kVectorBytes, past the caches: an ordinary store to a line that no
// cache holds reads it from memory first, so a copy of large tensors takes up to twice as long. fence() makes the lines
// seen by other threads; it belongs at the end of a task that streamed.
template <class T> requires(sizeof(T) > 2) CONVKIT_INLINE void stream(T* p, vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_stream_ps(p, (__m512)v);
  else _mm512_stream_pd(p, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) _mm256_stream_ps(p, (__m256)v);
  else _mm256_stream_pd(p, (__m256d)v);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) _mm_stream_ps(p, (__m128)v);
  else _mm_stream_pd(p, (__m128d)v);
#else
  store(p, v);
#endif
}
CONVKIT_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
CONVKIT_INLINE bool streamable(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
// A line that is written part by part goes to memory part by part if other lines are written meanwhile, which takes several
// times as long. So whole lines are streamed at once where a kernel goes from line to line, and where it goes along them,
// vectors, or of 16-bit values two of them.
template <class S> constexpr int kLine = 64 / int(sizeof(S));
template <class S> constexpr int kStreamed = kVectorBytes / int(sizeof(S));

// A line, from the first-level cache.
template <class S> CONVKIT_INLINE void stream_line(S* to, const S* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + i));
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_load_si128(reinterpret_cast<const __m128i*>(from) + i));
#else
  std::memcpy(to, from, 64);
#endif
}

// ---- a square of vectors -------------------------------------------------------------------------------------------

// One step of a transpose: in every square of 2 * D lanes, the off-diagonal halves of rows i and i + D change places.
template <int D, class V, int... I> CONVKIT_INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  V low = __builtin_shufflevector(a, b, ((I & D) ? L + I - D : I)...);
  V high = __builtin_shufflevector(a, b, ((I & D) ? L + I : I + D)...);
  a = low, b = high;
}
// The steps D, 2 * D, ... of the first kRows rows.
template <int D, int kRows, class V> CONVKIT_INLINE void transpose_steps(V* row) {
  constexpr int L = int(sizeof(V) / sizeof(row[0][0]));
  if constexpr (D < kRows) {
    CONVKIT_UNROLL for (int i = 0; i < kRows; ++i)
      if ((i & D) == 0) exchange<D>(row[i], row[i + D], std::make_integer_sequence<int, L>{});
    transpose_steps<2 * D, kRows>(row);
  }
}
// row[i][j] and row[j][i] change places; L rows of L lanes.
template <class T> CONVKIT_INLINE void transpose(vec<T>* row) { transpose_steps<1, kLanes<T>>(row); }

// Keeps a value in a register: the compiler would rather load it again for each multiply-add that takes it, and compute
// the address of every load from the start, and the loads or the decoder then bound the loop.
template <class V> CONVKIT_INLINE V held(V v) {
  if constexpr (std::is_integral_v<V> || std::is_pointer_v<V>) {
    __asm__("" : "+r"(v));
  } else {
#if defined(__x86_64__) && defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__x86_64__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
  }
  return v;
}

typedef uint16_t half_bits __attribute__((vector_size(kVectorBytes / 2), may_alias));
typedef uint32_t word_bits __attribute__((vector_size(kVectorBytes), may_alias));

template <class S> CONVKIT_INLINE vec<float> widen(half_bits h) {
#if defined(__AVX512F__)
  // One instruction for what would be two: word i to the upper half of lane i, zeros to the lower halves.
  if constexpr (std::is_same_v<S, bf16>) {
    const __m512i from = (__m512i)(word_bits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16);
    return (vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512((__m256i)h));
  }
#endif
  if constexpr (std::is_same_v<S, bf16>) return (vec<float>)(__builtin_convertvector(h, word_bits) << 16);
#if defined(__AVX512F__)
  else return (vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  else return (vec<float>)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  else return (vec<float>)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)h));
#else
  vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) {
    f16 value{h[i]};
    v[i] = get(&value);
  }
  return v;
#endif
}
template <class S> CONVKIT_INLINE half_bits narrow(vec<float> v) {
#if defined(__AVX512F__)
  // As below in six instructions for nine. AVX512-BF16's own one takes subnormal numbers for zeros.
  if constexpr (std::is_same_v<S, bf16>) {
    __m512i u = (__m512i)v;
    __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    u = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    u = _mm512_mask_sub_epi32(u, odd, u, _mm512_set1_epi32(-1));
    u = _mm512_mask_mov_epi32(u, nan, _mm512_set1_epi32(0x7fc00000));
    const __m512i upper = (__m512i)word_bits{0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d};
    return (half_bits)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, u));
  }
#endif
  if constexpr (std::is_same_v<S, bf16>) {
    word_bits u = (word_bits)v;
    word_bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(v != v ? word_bits{} + 0x7fc0 : rounded, half_bits);
  }
#if defined(__AVX512F__)
  else return (half_bits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  else return (half_bits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  else return (half_bits)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
#else
  half_bits h;
  for (int i = 0; i < kLanes<float>; ++i) {
    f16 value;
    put(&value, v[i]);
    h[i] = value.bits;
  }
  return h;
#endif
}
template <class S> requires(sizeof(S) == 2) CONVKIT_INLINE vec<float> load(const S* p) {
  half_bits h;
  std::memcpy(&h, p, sizeof h);
  return widen<S>(h);
}
template <class S> requires(sizeof(S) == 2) CONVKIT_INLINE void store(S* p, vec<float> v) {
  half_bits h = narrow<S>(v);
  std::memcpy(p, &h, sizeof h);
}

template <class S> requires(sizeof(S) == 2) CONVKIT_INLINE void stream(S* p, half_bits first, half_bits second) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)first), (__m128i)second, 1));
#else
  std::memcpy(p, &first, sizeof first);
  std::memcpy(p + kStreamed<S> / 2, &second, sizeof second);
#endif
}

#if defined(__AVX2__)
// All bits set in the first n lanes.
template <class T> CONVKIT_INLINE __m256i first_lanes_mask(int n) {
  if constexpr (sizeof(T) == 4) return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  else return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

// The first n lanes (0 < n <= lanes); the other lanes are zero on load and left alone on store. Nowhere by a call of
// memcpy, around which every vector that is held would go to memory and back.
template <class S> CONVKIT_INLINE vec<compute_t<S>> load_n(const S* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2) return widen<S>((half_bits)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  if constexpr (sizeof(S) == 4) return (vec<compute_t<S>>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  if constexpr (sizeof(S) == 8) return (vec<compute_t<S>>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return (vec<compute_t<S>>)_mm256_maskload_ps(p, first_lanes_mask<S>(n));
  if constexpr (sizeof(S) == 8) return (vec<compute_t<S>>)_mm256_maskload_pd(p, first_lanes_mask<S>(n));
#endif
  S buffer[kLanes<compute_t<S>>] = {};
  CONVKIT_UNROLL for (int i = 0; i < kLanes<compute_t<S>>; ++i)
    if (i < n) buffer[i] = p[i];
  return load(buffer);
}
template <class S> CONVKIT_INLINE void store_n(S* p, vec<compute_t<S>> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2) return _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow<S>(v));
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return _mm256_maskstore_ps(p, first_lanes_mask<S>(n), (__m256)v);
  if constexpr (sizeof(S) == 8) return _mm256_maskstore_pd(p, first_lanes_mask<S>(n), (__m256d)v);
#endif
  S buffer[kLanes<compute_t<S>>];
  store(buffer, v);
  CONVKIT_UNROLL for (int i = 0; i < kLanes<compute_t<S>>; ++i)
    if (i < n) p[i] = buffer[i];
}

// ---- two values side by side ----------------------------------------------------------------------------------------

// What a product takes: its operands' type, how many neighbours along the depth one step of it takes, and the step.
template <class X> struct Operand {
  using T = compute_t<X>;
  static constexpr int kDepth = 1;
  static CONVKIT_INLINE vec<T> columns(const X* p) { return load(p); }
  static CONVKIT_INLINE vec<T> row(const X* p) { return broadcast(*p); }
  static CONVKIT_INLINE vec<T> multiply_add(vec<T> sum, vec<T> x, vec<T> w) { return sum + x * w; }
};

// Two bf16 values of two tensors, or planes, side by side in the four bytes of a float, which is moved and never computed
// with: what copies are made of whose products are sums of two.
struct Pairs {
  const bf16* first;
  int64_t second;  // from the first to the second
  CONVKIT_INLINE Pairs operator+(int64_t n) const { return {first + n, second}; }
};

// Type of the values that are loaded from there.
template <class From> using value_t = decltype(get(std::declval<From>()));

#if defined(__AVX512BF16__)
#define CONVKIT_DOTS 1
CONVKIT_INLINE vec<float> side_by_side(half_bits first, half_bits second) {
  return (vec<float>)(__builtin_convertvector(first, word_bits) | __builtin_convertvector(second, word_bits) << 16);
}
CONVKIT_INLINE float get(Pairs p) { return from_bits(uint32_t(p.first->bits) | uint32_t(p.first[p.second].bits) << 16); }
CONVKIT_INLINE vec<float> load(Pairs p) {
  half_bits h[2];
  std::memcpy(&h[0], p.first, sizeof h[0]), std::memcpy(&h[1], p.first + p.second, sizeof h[1]);
  return side_by_side(h[0], h[1]);
}
CONVKIT_INLINE vec<float> load_n(Pairs p, int n) {
  __mmask16 lanes = __mmask16((1u << n) - 1);
  return side_by_side((half_bits)_mm256_maskz_loadu_epi16(lanes, p.first), (half_bits)_mm256_maskz_loadu_epi16(lanes, p.first + p.second));
}

// bf16 as it is stored: AVX512-BF16 adds two products to each sum, rounding each time as a multiply-add of float32 does, and
// taking numbers below 2^-126 for zeros.
template <> struct Operand<bf16> {
  using T = float;
  static constexpr int kDepth = 2;
  static CONVKIT_INLINE vec<T> columns(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
  static CONVKIT_INLINE vec<T> row(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return (vec<T>)_mm512_set1_epi32(pair);
  }
  static CONVKIT_INLINE vec<T> last_of_odd(const bf16* p) { return (vec<T>)_mm512_set1_epi32(p->bits); }
  static CONVKIT_INLINE vec<T> multiply_add(vec<T> sum, vec<T> x, vec<T> w) { return (vec<T>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
};
#endif
// Values along a depth that its steps take, zeros at the end included.
template <class X> CONVKIT_INLINE constexpr int64_t whole_steps(int64_t depth) { return ceil_div(depth, Operand<X>::kDepth) * Operand<X>::kDepth; }

// Calls f(Tag<S>) with the stored type that `dtype` names: the one place where dtypes become templates.
template <class S> struct Tag {};
template <class DT, class F> CONVKIT_INLINE void with_type(DT dtype, F&& f) {
  switch (dtype) {
    case DT::f64: return f(Tag<double>{});
    case DT::f32: return f(Tag<float>{});
    case DT::bf16: return f(Tag<bf16>{});
    case DT::f16: return f(Tag<f16>{});
  }
}

}  // namespace convkit::cpu::CONVKIT_ISA
