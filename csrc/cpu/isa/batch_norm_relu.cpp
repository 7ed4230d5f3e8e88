// Batch normalisation + ReLU, with an optional residual added before the ReLU (Ioffe and Szegedy 2015, arXiv:1502.03167).
//
// Training forward: one pass for the statistics, one that normalises, adds, clips and writes. Backward: one pass for the
// two sums, one for the gradients. The ReLU's mask is the sign of the same expression computed again from x, or, with a
// residual, one bit an element. All passes wait for memory: they go through it in order, ask for it ahead, and write past
// the caches what does not fit them. A contiguous channel has both its passes from one task, so that the second finds in
// the cache what the first has read. Sums are taken over fixed parts of the tensor and added in order in double, so
// results depend neither on the number of threads nor on which thread did what.
#include "../kernels.h"
#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

constexpr int kChain = 16;  // terms summed in the arithmetic's type before they go to a sum in double
constexpr int kGroup = 4;   // sums side by side, so that one addition need not wait for another
// Channels last. Pieces are rows of a partial sum: long enough that the sums are few beside what is summed, which are
// written and read once more; a task sums kBlockLanes channels of them.
constexpr int64_t kPieceRows = 128, kMaxPieces = 64, kBlockLanes = 512;
// Rows of the second pass are taken in blocks, after a first one last block first: the end of what it has read is still cached.
constexpr int64_t kBlockBytes = 32 << 10;
// Contiguous planes below this many elements are taken several channels at a time.
constexpr int64_t kSmallPlane = 256, kGroupLanes = 768;
constexpr int64_t kAheadBytes = 4096;  // memory is asked for so long before it is needed

// How the kernels see a tensor: as rows of elements. Channels last a row is a pixel, and its element j is of channel j.
// Contiguous planes are either rows each of one channel, or, where they are small, an image is a row in which channel c
// is elements [c * hw, (c + 1) * hw).
struct View {
  enum Kind { pixels, images, planes } kind;
  int64_t count, length;  // rows, elements of a row
  int64_t group;          // images, planes: channels of a task

  explicit View(const ChannelShape& s) {
    kind = s.hw == 1 || (s.c > 1 && s.layout == Layout::nhwc) ? pixels : s.hw < kSmallPlane ? images : planes;
    count = kind == pixels ? s.n * s.hw : kind == images ? s.n : s.n * s.c;
    length = kind == pixels ? s.c : kind == images ? s.c * s.hw : s.hw;
    // Groups start on whole lines of 64 bytes, whatever the instruction set.
    int64_t line = storage_bytes(s.dtype) == 2 ? 32 : 16, least = line / gcd(line, s.hw);
    group = kind == images ? min_of(s.c, least * max_of<int64_t>(1, kGroupLanes / (least * s.hw))) : 1;
  }
  int64_t mask_bytes() const { return (length + 7) / 8; }  // of a row: rows start on their own byte
};

// Channels last: rows of a piece, whose sums are added to those of the pieces before.
struct Pieces {
  int64_t rows, count, blocks;
  explicit Pieces(const ChannelShape& s) {
    View v(s);
    rows = max_of(kPieceRows, ceil_div(v.count, kMaxPieces));
    count = v.kind == View::pixels ? ceil_div(v.count, rows) : 0;
    blocks = ceil_div(s.c, kBlockLanes);
  }
};

template <class S> CONVKIT_INLINE vec<compute_t<S>> fetch(const S* p, int lanes) {
  return lanes == kLanes<compute_t<S>> ? load(p) : load_n(p, lanes);
}
// Loads, and asks for what will be needed `ahead` elements later.
template <class S> CONVKIT_INLINE vec<compute_t<S>> fetch(const S* p, int lanes, int64_t ahead) {
  __builtin_prefetch(p + ahead, 0, 2);  // to the second-level cache, which has room for it
  return fetch(p, lanes);
}

// The first n lanes, zero in the others.
template <class T> CONVKIT_INLINE vec<T> first_lanes(vec<T> v, int n) {
  T lanes[kLanes<T>];
  store(lanes, v);
  return load_n(lanes, n);
}

// sums[lane] += lane, in double.
template <class T> struct DoubleSum {
  typedef double wide __attribute__((vector_size(kLanes<T> * 8), may_alias));
  static CONVKIT_INLINE void add(double* sums, vec<T> v, int lanes) {
    if (lanes == kLanes<T>) {
      wide sum;
      std::memcpy(&sum, sums, sizeof sum);
      sum += __builtin_convertvector(v, wide);
      std::memcpy(sums, &sum, sizeof sum);
    } else {
      for (int l = 0; l < lanes; ++l) sums[l] += double(v[l]);
    }
  }
};

inline double sum_of(const double* p, int64_t n) {
  constexpr int L = kLanes<double>;
  vec<double> sums{};
  for (int64_t j = 0; j < n; j += L) sums += n - j >= L ? load(p + j) : load_n(p + j, int(n - j));
  double sum = 0;
  for (int l = 0; l < L; ++l) sum += sums[l];
  return sum;
}

// Lane i set where bit j + i of a row's mask is.
template <class T> CONVKIT_INLINE typename VecOf<T>::mask read_mask(const uint8_t* row, int64_t j, int lanes) {
  using Mask = typename VecOf<T>::mask;
  uint32_t word = row[j / 8];
  if (lanes > 8) std::memcpy(&word, row + j / 8, 2);
  word >>= j % 8;  // vectors of fewer than eight lanes share a byte
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Mask)_mm512_movm_epi32(__mmask16(word));
  else return (Mask)_mm512_movm_epi64(__mmask8(word));
#else
  Mask bits;
  CONVKIT_UNROLL for (int i = 0; i < kLanes<T>; ++i) bits[i] = 1 << i;
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return (bits & (Mask{} + Lane(word))) == bits;
#endif
}
template <class T> CONVKIT_INLINE void write_mask(uint8_t* row, int64_t j, typename VecOf<T>::mask mask, int lanes) {
  uint32_t word = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) word = _mm512_movepi32_mask((__m512i)mask);
  else word = _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) word = uint32_t(_mm256_movemask_ps((__m256)mask));
  else word = uint32_t(_mm256_movemask_pd((__m256d)mask));
#else
  CONVKIT_UNROLL for (int i = 0; i < kLanes<T>; ++i) word |= uint32_t(mask[i] & 1) << i;
#endif
  word &= (1u << lanes) - 1;
  if (j % 8 != 0) row[j / 8] |= uint8_t(word << j % 8);
  else if (lanes > 8) std::memcpy(row + j / 8, &word, 2);
  else row[j / 8] = uint8_t(word);
}

// Per-channel values beside the tensors, as vectors: of lane j and its neighbours, or of a whole row.
template <class T, int K> struct LaneValues {
  const T* first;
  int64_t step;  // from value to value
  CONVKIT_INLINE void at(int64_t j, vec<T>* k) const {
    CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = load(first + i * step + j);
  }
};
template <class T, int K> struct RowValues {
  vec<T> of[K];
  RowValues(const T* first, int64_t step) {
    CONVKIT_UNROLL for (int i = 0; i < K; ++i) of[i] = broadcast(first[i * step]);
  }
  CONVKIT_INLINE void at(int64_t, vec<T>* k) const {
    CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = of[i];
  }
};

// Where a pass is: the element, its row and its offset there (the mask's coordinates), how many lanes count, and how far
// ahead to ask for memory.
struct Place {
  int64_t at, row, j;
  int lanes;
  int64_t ahead;
  // 16-bit values go past the caches two vectors at a time: which of them this is, or -1, and the first one's outputs.
  int half = -1;
  half_bits* first = nullptr;
};

// Stores at a place, the nth of the pass's outputs.
template <int N = 0, class S> CONVKIT_INLINE void emit(S* p, vec<compute_t<S>> v, const Place& place, bool streamed) {
  if (place.lanes != kLanes<compute_t<S>>) return store_n(p, v, place.lanes);
  if constexpr (sizeof(S) == sizeof(compute_t<S>)) {
    if (streamed) return stream(p, v);
  } else if (streamed && place.half >= 0) {
    if (place.half == 0) place.first[N] = narrow<S>(v);
    else stream(p - kStreamed<S> / 2, place.first[N], narrow<S>(v));
    return;
  }
  store(p, v);
}

// f(place, values) for the elements [first, last) of a row; the first `head` of them apart, so that the rest is aligned.
template <class S, int K, class Values, class F>
CONVKIT_INLINE void each_vector(int64_t row, int64_t start, int64_t first, int64_t last, int64_t head, int64_t ahead, const Values& values, F&& f) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>;
  int64_t j = first, aligned = min_of(first + head, last);
  half_bits halves[2];
  // Inlined, as a call would cost more than what it does.
  auto some = [&](int lanes, int half) __attribute__((always_inline)) {
    vec<T> k[K];
    values.at(j - first, k);
    f(Place{start + j, row, j, lanes, ahead, half, halves}, k);
    j += lanes;
  };
  while (j < aligned) some(int(min_of<int64_t>(L, aligned - j)), -1);
  while (sizeof(S) == 2 && j + 2 * L <= last) some(L, 0), some(L, 1);
  while (j + L <= last) some(L, -1);
  if (j < last) some(int(last - j), -1);
}

// sums[N][lanes] += term(place, values, out[N]) over `rows` rows, for lanes [first, last) of them.
template <class T, int K, int N, class Term>
CONVKIT_INLINE void sum_lanes(int64_t row, int64_t rows, int64_t stride, int64_t first, int64_t last, int64_t ahead, const LaneValues<T, K>& values,
                              double* sums, int64_t sums_step, Term&& term) {
  constexpr int L = kLanes<T>;
  // Few rows at a time and all lanes of them: memory is read in order.
  for (int64_t end = row + rows; row < end; row += kChain) {
    int count = int(min_of<int64_t>(kChain, end - row));
    auto step = [&](int64_t j, int lanes) {
      vec<T> k[K], sum[N] = {};
      values.at(j - first, k);
      auto add = [&](int i) {
        vec<T> out[N];
        term(Place{(row + i) * stride + j, row + i, j, lanes, ahead}, k, out);
        CONVKIT_UNROLL for (int n = 0; n < N; ++n) sum[n] += out[n];
      };
      if (count == kChain && lanes == L)
        CONVKIT_UNROLL for (int i = 0; i < kChain; ++i) add(i);
      else
        for (int i = 0; i < count; ++i) add(i);
      CONVKIT_UNROLL for (int n = 0; n < N; ++n) DoubleSum<T>::add(sums + n * sums_step + j - first, sum[n], lanes);
    };
    int64_t j = first;
    for (; j + L <= last; j += L) step(j, L);
    if (j < last) step(j, int(last - j));
  }
}

// sums[N] += the same over all elements of planes of one channel, `stride` rows apart.
template <class T, int K, int N, class Term>
CONVKIT_INLINE void sum_planes(int64_t row, int64_t rows, int64_t stride, int64_t length, int64_t ahead, const RowValues<T, K>& values, double* sums,
                               Term&& term) {
  constexpr int L = kLanes<T>;
  double totals[N][L] = {};
  vec<T> sum[kGroup][N] = {};
  int chained = 0;
  auto flush = [&] {
    CONVKIT_UNROLL for (int i = 0; i < N; ++i)
      CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) DoubleSum<T>::add(totals[i], sum[v][i], L), sum[v][i] = vec<T>{};
    chained = 0;
  };
  for (int64_t i = 0; i < rows; ++i, row += stride) {
    auto add = [&](int v, int64_t j, int lanes) {
      vec<T> out[N];
      term(Place{row * length + j, row, j, lanes, ahead}, values.of, out);
      CONVKIT_UNROLL for (int n = 0; n < N; ++n) sum[v][n] += out[n];
    };
    int64_t j = 0;
    for (; j + kGroup * L <= length; j += kGroup * L) {
      CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) add(v, j + v * L, L);
      if (++chained == kChain) flush();
    }
    for (; j < length; j += L) {
      if (length - j >= L) add(0, j, L);
      else add(0, j, int(length - j));
      if (++chained == kChain) flush();
    }
  }
  flush();
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < L; ++l) sums[i] += totals[i][l];
}

// Per-channel arrays are read a whole vector at a time.
int64_t padded(int64_t c) { return c + 16; }

constexpr int kValues = 5;  // per-channel values at most

// Runs the passes of one call over a tensor. What a call wants is in its functions:
//   start(first, last)        makes the values of channels [first, last) that the terms need
//   term(place, values, out)  the summands, N of them
//   finish(first, last, sums, step) takes the sums, sums[n * step + c - first], and makes the values of the second pass
//   apply(place, values)      the second pass
template <class S> struct Passes {
  using T = compute_t<S>;
  static constexpr int L = kLanes<T>;
  const ChannelShape& s;
  const Pool& pool;
  View view{s};
  Pieces pieces{s};
  // Workspace: values[kValues][padded c], then sums: of the pieces, or of a task's lanes beside the values of those.
  int64_t step = padded(s.c);
  T* values;
  double* partial;

  Passes(const ChannelShape& shape, void* workspace, const Pool& threads) : s(shape), pool(threads) {
    values = static_cast<T*>(workspace);
    partial = reinterpret_cast<double*>(values + kValues * step * (8 / sizeof(T)));
  }
  static int64_t workspace_bytes(const ChannelShape& s, int threads) {
    View view(s);
    Pieces pieces(s);
    int64_t sums = view.kind == View::pixels ? (pieces.count + 1) * 2 * padded(s.c) : threads * (2 + kValues) * padded(view.group * s.hw);
    return (kValues * padded(s.c) + sums) * int64_t(sizeof(double));
  }

  template <int KS, int KA, int N, class Start, class Term, class Finish, class Apply>
  void run(bool sums, bool second, bool streamed, Start&& start, Term&& term, Finish&& finish, Apply&& apply) const {
    // A single pass over lines of one channel each needs no more than its values; planes of fewer lines are too short for it.
    bool broadcast = view.kind == View::planes || (!sums && s.hw >= 64 && s.hw % (sizeof(S) == 2 ? 32 : 16) == 0);
    if (view.kind == View::pixels) run_pixels<KS, KA, N>(sums, second, start, term, finish, apply);
    else if (!broadcast) run_images<KS, KA, N>(sums, second, start, term, finish, apply);
    else run_planes<KS, KA, N>(sums, second, streamed, start, term, finish, apply);
  }

  template <int KS, int KA, int N, class Start, class Term, class Finish, class Apply>
  CONVKIT_INLINE void run_pixels(bool sums, bool second, Start& start, Term& term, Finish& finish, Apply& apply) const {
    auto by_channels = [&](auto&& f) {
      parallel(pool, pieces.blocks, [&](int64_t begin, int64_t end, int) { f(begin * kBlockLanes, min_of(s.c, end * kBlockLanes)); });
    };
    by_channels(start);
    double* total = partial + pieces.count * N * step;
    // The next rows, or, where these are short, some after them.
    int64_t ahead = max_of<int64_t>(kChain * s.c, 4 * kAheadBytes / sizeof(S));
    if (sums) {
      parallel(pool, pieces.count * pieces.blocks, [&](int64_t begin, int64_t end, int) {
        for (int64_t task = begin; task < end; ++task) {
          int64_t row = task / pieces.blocks * pieces.rows, first = task % pieces.blocks * kBlockLanes, last = min_of(s.c, first + kBlockLanes);
          double* to = partial + task / pieces.blocks * N * step + first;
          for (int n = 0; n < N; ++n) fill_zero(to + n * step, last - first);
          sum_lanes<T, KS, N>(row, min_of(pieces.rows, view.count - row), s.c, first, last, ahead, {values + first, step}, to, step, term);
        }
      });
    }
    by_channels([&](int64_t first, int64_t last) {
      if (sums)
        for (int n = 0; n < N; ++n) {
          double* to = total + n * step;
          fill_zero(to + first, last - first);
          for (int64_t piece = 0; piece < pieces.count; ++piece)
            for (int64_t c = first; c < last; ++c) to[c] += partial[(piece * N + n) * step + c];
        }
      finish(first, last, total + first, step);
    });
    if (!second) return;
    int64_t block = ceil_div(kBlockBytes, s.c * int64_t(sizeof(S)));
    LaneValues<T, KA> all{values, step};
    parallel(pool, ceil_div(view.count, block), [&](int64_t begin, int64_t end, int) {
      for (int64_t j = begin; j < end; ++j) {
        int64_t i = sums ? begin + end - 1 - j : j;
        for (int64_t row = i * block; row < min_of(view.count, (i + 1) * block); ++row)
          each_vector<S, KA>(row, row * s.c, 0, s.c, 0, kAheadBytes / sizeof(S), all, apply);
      }
      fence();
    });
  }

  template <int KS, int KA, int N, class Start, class Term, class Finish, class Apply>
  CONVKIT_INLINE void run_images(bool sums, bool second, Start& start, Term& term, Finish& finish, Apply& apply) const {
    int64_t lanes_step = padded(view.group * s.hw);
    parallel(pool, ceil_div(s.c, view.group), [&](int64_t begin, int64_t end, int thread) {
      double* lane_sums = partial + thread * (2 + kValues) * lanes_step;
      T* lane_values = reinterpret_cast<T*>(lane_sums + 2 * lanes_step);
      for (int64_t task = begin; task < end; ++task) {
        int64_t c0 = task * view.group, c1 = min_of(s.c, c0 + view.group), lanes = (c1 - c0) * s.hw, first = c0 * s.hw, last = first + lanes;
        auto spread = [&](int count) {
          for (int i = 0; i < count; ++i) {
            T* to = lane_values + i * lanes_step;
            for (int64_t c = c0; c < c1; ++c, to += s.hw)  // the last store of a channel reaches into the next, or the padding
              for (int64_t j = 0; j < s.hw; j += L) store(to + j, broadcast(values[i * step + c]));
          }
        };
        start(c0, c1);
        if (sums) {
          spread(KS);
          for (int n = 0; n < N; ++n) fill_zero(lane_sums + n * lanes_step, lanes);
          // Where there is a second pass, that of the group before has asked for what this first one reads.
          sum_lanes<T, KS, N>(0, s.n, view.length, first, last, second ? 0 : lanes, {lane_values, lanes_step}, lane_sums, lanes_step, term);
          for (int n = 0; n < N; ++n)
            for (int64_t c = 0; c < c1 - c0; ++c) lane_sums[n * lanes_step + c] = sum_of(lane_sums + n * lanes_step + c * s.hw, s.hw);
        }
        finish(c0, c1, lane_sums, lanes_step);
        if (!second) continue;
        spread(KA);
        LaneValues<T, KA> all{lane_values, lanes_step};
        for (int64_t row = 0; row < s.n; ++row)
          each_vector<S, KA>(row, row * view.length, first, last, 0, sums ? lanes : view.length, all, apply);
      }
      fence();
    });
  }

  template <int KS, int KA, int N, class Start, class Term, class Finish, class Apply>
  CONVKIT_INLINE void run_planes(bool sums, bool second, bool streamed, Start& start, Term& term, Finish& finish, Apply& apply) const {
    int64_t far = s.hw * int64_t(sizeof(S)) > 4 * kAheadBytes ? kAheadBytes / int64_t(sizeof(S)) : s.c * s.hw;
    auto plane = [&](int64_t image, int64_t c, const RowValues<T, KA>& all, int64_t ahead) {
      int64_t at = (image * s.c + c) * s.hw, head = streamed ? -at & (kStreamed<S> - 1) : 0;
      bool whole_image = view.kind == View::images;
      int64_t row = whole_image ? image : image * s.c + c, first = whole_image ? c * s.hw : 0;
      each_vector<S, KA>(row, at - first, first, first + s.hw, head, ahead, all, apply);
    };
    if (sums || !second) {
      parallel(pool, s.c, [&](int64_t begin, int64_t end, int) {
        for (int64_t c = begin; c < end; ++c) {
          start(c, c + 1);
          double totals[N] = {};
          if (sums) sum_planes<T, KS, N>(c, s.n, s.c, s.hw, far, RowValues<T, KS>(values + c, step), totals, term);
          finish(c, c + 1, totals, int64_t(1));
          if (!second) continue;
          RowValues<T, KA> all(values + c, step);
          for (int64_t image = s.n; image-- > 0;) plane(image, c, all, s.hw);
        }
        fence();
      });
      return;
    }
    // A pass alone goes through memory in order.
    start(0, s.c), finish(0, s.c, nullptr, 0);
    parallel(pool, s.n * s.c, [&](int64_t begin, int64_t end, int) {
      int64_t image = begin / s.c, c = begin % s.c;
      for (int64_t i = begin; i < end; ++i) {
        plane(image, c, RowValues<T, KA>(values + c, step), kAheadBytes / int64_t(sizeof(S)));
        if (++c == s.c) c = 0, ++image;
      }
      fence();
    });
  }
};

// What is computed before the ReLU, in forward and backward alike: the mask is this value's sign.
template <class T> CONVKIT_INLINE vec<T> normalise(vec<T> x, const vec<T>* k) { return (x - k[0]) * k[1] + k[2]; }

template <class S> struct BatchNorm {
  using T = compute_t<S>;
  static constexpr int L = kLanes<T>;
  const BatchNormArgs& a;
  const Pool& pool;
  const ChannelShape& s = a.shape;
  Passes<S> passes{s, a.workspace, pool};
  const View& view = passes.view;
  T* mean = passes.values;
  T* alpha = mean + passes.step;
  T* beta = alpha + passes.step;
  T* grad_mean = beta + passes.step;
  T* grad_slope = grad_mean + passes.step;
  const S* x = static_cast<const S*>(a.x);

  BatchNorm(const BatchNormArgs& args, const Pool& threads) : a(args), pool(threads) {}

  // Rows are whole lines, or are made so by their heads, which the mask's rows have not.
  bool streams(const S* p) const {
    return a.stream && streamable(p) && (view.length % kStreamed<S> == 0 || (view.kind == View::planes && a.mask == nullptr));
  }

  // mean is made by the caller.
  void prepare(int64_t c) const {
    const T *w = static_cast<const T*>(a.weight), *b = static_cast<const T*>(a.bias);
    double rstd = inverse_deviation(c);
    alpha[c] = w == nullptr ? T(rstd) : T(rstd * double(w[c]));
    beta[c] = b == nullptr ? T(0) : b[c];
  }
  double inverse_deviation(int64_t c) const { return 1.0 / __builtin_sqrt(double(static_cast<const T*>(a.var)[c]) + a.eps); }

  const S* element(int64_t pixel, int64_t c) const {
    return x + (view.kind == View::pixels ? pixel * s.c + c : (pixel / s.hw * s.c + c) * s.hw + pixel % s.hw);
  }

  // The mean of a few values all over a channel: sums of x - shift and its square are as exact as those of deviations from
  // the mean (Chan, Golub and LeVeque 1983, section 3), as nothing cancels.
  void shift(int64_t first, int64_t last) const {
    constexpr int kPlaces = 4, kNeighbours = 4;  // neighbours share a line, and a place is a wait for memory
    for (int64_t c = first; c < last; ++c) mean[c] = T(0);
    int64_t pixels = s.n * s.hw;
    for (int i = 0; i < kPlaces * kNeighbours; ++i) {
      double golden = (i / kNeighbours + 0.5) * 0.6180339887498949;  // spread evenly, in step with no image
      int64_t pixel = min_of(pixels - 1, int64_t((golden - double(int64_t(golden))) * double(pixels)) + i % kNeighbours);
      for (int64_t c = first; c < last; ++c) mean[c] += get(element(pixel, c));
    }
    for (int64_t c = first; c < last; ++c) mean[c] /= T(kPlaces * kNeighbours);
  }

  // Deviations from an infinite mean are NaN, the mean itself is infinite: as PyTorch's running mean is then.
  double plain_mean(int64_t c) const {
    double sum = 0;
    for (int64_t i = 0; i < s.n * s.hw; ++i) sum += double(get(element(i, c)));
    return sum / (double(s.n) * double(s.hw));
  }

  void forward() const {
    double inverse = 1 / (double(s.n) * double(s.hw));
    S* y = static_cast<S*>(a.y);
    bool streamed = streams(y);
    const S* residual = static_cast<const S*>(a.residual);
    auto start = [&](int64_t first, int64_t last) {
      if (a.training) shift(first, last);
    };
    auto term = [&](const Place& p, const vec<T>* k, vec<T>* out) {
      vec<T> d = fetch(x + p.at, p.lanes, p.ahead) - k[0];
      if (p.lanes != L) d = first_lanes<T>(d, p.lanes);
      out[0] = d;
      out[1] = d * d;
    };
    auto finish = [&](int64_t first, int64_t last, const double* sums, int64_t step) {
      T *m = static_cast<T*>(a.mean), *v = static_cast<T*>(a.var);
      for (int64_t c = first; c < last; ++c) {
        if (a.training) {
          double sum = sums[c - first], from_shift = sum * inverse, exact = double(mean[c]) + from_shift, squares = sums[step + c - first] - sum * from_shift;
          m[c] = T(__builtin_isfinite(exact) ? exact : plain_mean(c));
          v[c] = squares < 0 ? T(0) : T(squares * inverse);  // below zero by rounding, where all values are equal
        }
        mean[c] = m[c];
        prepare(c);
      }
    };
    if (residual == nullptr)
      passes.template run<1, 3, 2>(a.training, true, streamed, start, term, finish, [&](const Place& p, const vec<T>* k) __attribute__((always_inline)) {
        emit(y + p.at, relu<T>(normalise<T>(fetch(x + p.at, p.lanes, p.ahead), k)), p, streamed);
      });
    else
      passes.template run<1, 3, 2>(a.training, true, streamed, start, term, finish, [&](const Place& p, const vec<T>* k) __attribute__((always_inline)) {
        vec<T> v = normalise<T>(fetch(x + p.at, p.lanes, p.ahead), k) + fetch(residual + p.at, p.lanes, p.ahead);
        if (a.mask != nullptr) write_mask<T>(a.mask + p.row * view.mask_bytes(), p.j, ~(v <= vec<T>{}), p.lanes);
        emit(y + p.at, relu<T>(v), p, streamed);
      });
    // The mask has room for planes that start on their own bytes; nobody may see what was in memory before.
    int64_t used = view.count * view.mask_bytes(), room = s.n * s.c * ((s.hw + 7) / 8);
    if (a.mask != nullptr && view.kind == View::images) fill_zero(a.mask + used, room - used);
  }

  // The gradient behind the ReLU.
  CONVKIT_INLINE vec<T> masked(const S* grad, vec<T> xv, const Place& p, const vec<T>* k) const {
    vec<T> g = fetch(grad + p.at, p.lanes, p.ahead);
    if (a.mask != nullptr) return read_mask<T>(a.mask + p.row * view.mask_bytes(), p.j, p.lanes) ? g : vec<T>{};
    return normalise<T>(xv, k) <= vec<T>{} ? vec<T>{} : g;
  }

  void backward() const {
    const S* grad = static_cast<const S*>(a.grad);
    S *grad_x = static_cast<S*>(a.grad_x), *grad_residual = static_cast<S*>(a.grad_residual);
    bool want_sums = a.grad_weight != nullptr || a.grad_bias != nullptr || (a.training && grad_x != nullptr);
    bool streamed = streams(grad_x) && streams(grad_residual);
    double count = double(s.n) * double(s.hw);
    auto start = [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) mean[c] = static_cast<const T*>(a.mean)[c], prepare(c);
    };
    auto term = [&](const Place& p, const vec<T>* k, vec<T>* out) {
      vec<T> xv = fetch(x + p.at, p.lanes, p.ahead);
      out[0] = masked(grad, xv, p, k);
      out[1] = out[0] * (xv - k[0]);
    };
    auto finish = [&](int64_t first, int64_t last, const double* sums, int64_t step) {
      for (int64_t c = first; want_sums && c < last; ++c) {
        double rstd = inverse_deviation(c), sum = sums[c - first], product = sums[step + c - first] * rstd;  // sum of g, and of g times normalised x
        if (a.grad_bias != nullptr) static_cast<T*>(a.grad_bias)[c] = T(sum);
        if (a.grad_weight != nullptr) static_cast<T*>(a.grad_weight)[c] = T(product);
        // The gradient of x is alpha * (g - mean of g - normalised x * mean of (g * normalised x)).
        grad_mean[c] = T(sum / count * double(alpha[c]));
        grad_slope[c] = T(product * rstd / count * double(alpha[c]));
      }
    };
    passes.template run<3, 5, 2>(want_sums, grad_x != nullptr || grad_residual != nullptr, streamed, start, term, finish, [&](const Place& p, const vec<T>* k) __attribute__((always_inline)) {
      vec<T> xv = fetch(x + p.at, p.lanes, p.ahead);
      vec<T> g = masked(grad, xv, p, k);
      if (grad_residual != nullptr) emit<1>(grad_residual + p.at, g, p, streamed);
      if (grad_x == nullptr) return;
      emit(grad_x + p.at, a.training ? g * k[1] - ((xv - k[0]) * k[4] + k[3]) : g * k[1], p, streamed);
    });
  }
};

}  // namespace

int64_t channel_workspace(const ChannelShape& s, int threads) {
  return compute_bytes(s.dtype) == 8 ? Passes<double>::workspace_bytes(s, threads) : Passes<float>::workspace_bytes(s, threads);
}

void batch_norm_relu(const BatchNormArgs& a, const Pool& pool) {
  with_type(a.shape.dtype, [&]<class S>(Tag<S>) { BatchNorm<S>(a, pool).forward(); });
}

void batch_norm_relu_grad(const BatchNormArgs& a, const Pool& pool) {
  with_type(a.shape.dtype, [&]<class S>(Tag<S>) { BatchNorm<S>(a, pool).backward(); });
}

// sums[c], in the stored type: the gradient of a bias.
void channel_sum(const ChannelShape& s, const void* src, void* out, void* workspace, const Pool& pool) {
  with_type(s.dtype, [&]<class S>(Tag<S>) {
    using T = compute_t<S>;
    Passes<S>(s, workspace, pool).template run<1, 1, 1>(
        true, false, false, [](int64_t, int64_t) {},
        [&](const Place& p, const vec<T>*, vec<T>* to) { to[0] = fetch(static_cast<const S*>(src) + p.at, p.lanes, p.ahead); },
        [&](int64_t first, int64_t last, const double* sums, int64_t) {
          for (int64_t c = first; c < last; ++c) put(static_cast<S*>(out) + c, T(sums[c - first]));
        },
        [](const Place&, const vec<T>*) {});
  });
}

}  // namespace convkit::cpu::CONVKIT_ISA
