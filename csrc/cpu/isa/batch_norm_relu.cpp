// Batch normalisation + ReLU, with an optional residual added before the ReLU (Ioffe and Szegedy 2015, arXiv:1502.03167).
//
// Training forward: one pass for the statistics, one that normalises, adds, clips and writes. Backward: one pass for the
// two sums, one for the gradients. The ReLU's mask is the sign of the same expression computed again from x, or, with a
// residual, one bit an element. Sums run over fixed pieces of the tensor and are merged in order in double, so results
// depend neither on the number of threads nor on which thread did what.
#include "../kernels.h"
#include "staging.h"
#include "vec.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

constexpr int64_t kMaxPieces = 256;       // partial sums a channel
constexpr int64_t kPieceRows = 256;       // at least, of channels-last pixels
constexpr int64_t kPieceElements = 4096;  // at least, of a contiguous channel
constexpr int kChain = 16;                // terms summed in the arithmetic's type before they go to a sum in double
constexpr int kGroup = 4;                 // sums side by side, so that one addition need not wait for another

// Contiguous memory is rows of `length` elements: planes of one channel, or pixels of all channels.
struct Rows {
  int64_t count, length;
  bool channels_last;

  explicit Rows(const ChannelShape& s) {
    channels_last = s.c > 1 && (s.layout == Layout::nhwc || s.hw == 1);
    count = channels_last ? s.n * s.hw : s.n * s.c;
    length = channels_last ? s.c : s.hw;
  }
  int64_t mask_bytes() const { return (length + 7) / 8; }  // of a row: rows start on their own byte
};

// How the sums of a channel are cut. Channels last: pieces are blocks of pixels. Contiguous: groups of images.
struct Pieces {
  int64_t count, rows;  // rows (or images) of a piece
  explicit Pieces(const ChannelShape& s) {
    Rows r(s);
    int64_t all = r.channels_last ? r.count : s.n;
    rows = r.channels_last ? max_of(kPieceRows, ceil_div(all, kMaxPieces))
                           : min_of(s.n, max_of(ceil_div(s.n, 16), ceil_div(kPieceElements, s.hw)));
    count = ceil_div(all, rows);
  }
};

template <class S> CONVKIT_INLINE vec<compute_t<S>> fetch(const S* p, int lanes) {
  return lanes == kLanes<compute_t<S>> ? load(p) : load_n(p, lanes);
}
template <class S> CONVKIT_INLINE void emit(S* p, vec<compute_t<S>> v, int lanes, bool streamed) {
  if (lanes != kLanes<compute_t<S>>) return store_n(p, v, lanes);
  if constexpr (sizeof(S) == sizeof(compute_t<S>))
    if (streamed) return stream(p, v);
  store(p, v);
}

// The first n lanes, zero in the others.
template <class T> CONVKIT_INLINE vec<T> first_lanes(vec<T> v, int n) {
  T lanes[kLanes<T>];
  store(lanes, v);
  return load_n(lanes, n);
}

// The lanes of a vector, summed in double.
template <class T> struct DoubleSum {
  typedef double wide __attribute__((vector_size(kLanes<T> * 8), may_alias));
  wide of;
  CONVKIT_INLINE void add(vec<T> v) { of += __builtin_convertvector(v, wide); }
};

// Lane i set where bit j + i of a row's mask is.
template <class T> CONVKIT_INLINE typename VecOf<T>::mask read_mask(const uint8_t* row, int64_t j, int lanes) {
  uint32_t word = 0;
  std::memcpy(&word, row + j / 8, (lanes + 7) / 8);
  word >>= j % 8;  // vectors of fewer than eight lanes share a byte
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (typename VecOf<T>::mask)_mm512_movm_epi32(__mmask16(word));
  else return (typename VecOf<T>::mask)_mm512_movm_epi64(__mmask8(word));
#else
  typename VecOf<T>::mask out;
  CONVKIT_UNROLL for (int i = 0; i < kLanes<T>; ++i) out[i] = (word >> i & 1) ? -1 : 0;
  return out;
#endif
}
template <class T> CONVKIT_INLINE void write_mask(uint8_t* row, int64_t j, typename VecOf<T>::mask mask, int lanes) {
  uint32_t word = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) word = _mm512_movepi32_mask((__m512i)mask);
  else word = _mm512_movepi64_mask((__m512i)mask);
#else
  CONVKIT_UNROLL for (int i = 0; i < kLanes<T>; ++i) word |= uint32_t(mask[i] & 1) << i;
#endif
  word &= (1u << lanes) - 1;
  if (j % 8 != 0) row[j / 8] |= uint8_t(word << j % 8);
  else std::memcpy(row + j / 8, &word, (lanes + 7) / 8);
}

// Per-channel vectors of lanes, prepared once a call; padded so that whole vectors can be loaded.
template <class T, int K> struct Channels {
  const T* of[K];
};

// Calls f(row, offset in row, lanes, per-channel values) for every vector of every row; last row first, because the end
// of what the pass before has read is what the caches still hold.
template <class T, int K, class F>
CONVKIT_INLINE void each_vector(const ChannelShape& s, const Channels<T, K>& channels, const Pool& pool, F&& f) {
  Rows rows(s);
  constexpr int L = kLanes<T>;
  parallel(pool, rows.count, [&](int64_t begin, int64_t end, int) {
    if (rows.channels_last) {
      for (int64_t row = end; row-- > begin;) {
        int64_t j = 0;
        auto step = [&](int lanes) {
          vec<T> k[K];
          CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = load(channels.of[i] + j);
          f(row, j, lanes, k);
        };
        for (; j + L <= rows.length; j += L) step(L);
        if (j < rows.length) step(int(rows.length - j));
      }
    } else {
      int64_t c = (end - 1) % s.c;
      for (int64_t row = end; row-- > begin; c = c == 0 ? s.c - 1 : c - 1) {
        vec<T> k[K];
        CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = broadcast(channels.of[i][c]);
        int64_t j = 0;
        for (; j + L <= rows.length; j += L) f(row, j, L, k);
        if (j < rows.length) f(row, j, int(rows.length - j), k);
      }
    }
    fence();
  });
}

// N sums a channel of what `term(row, offset, lanes, per-channel values, out[N])` gives, for each piece:
// partial[piece][N][c]. `start(piece, first row, channel or 0)` is called before a piece, or a piece's channel, is read,
// and gives the per-channel values.
template <class T, int K, int N, class Start, class Term>
CONVKIT_INLINE void reduce_pieces(const ChannelShape& s, double* partial, const Pool& pool, Start&& start, Term&& term) {
  Rows rows(s);
  Pieces pieces(s);
  constexpr int L = kLanes<T>;
  if (rows.channels_last) {
    parallel(pool, pieces.count, [&](int64_t begin, int64_t end, int) {
      for (int64_t piece = begin; piece < end; ++piece) {
        int64_t first = piece * pieces.rows, last = min_of(rows.count, first + pieces.rows);
        double* sums = partial + piece * N * s.c;
        fill_zero(sums, N * s.c);
        Channels<T, K> channels = start(piece, first, int64_t(0));
        // Few rows at a time and all channels of them: memory is read in order.
        for (int64_t row = first; row < last; row += kChain) {
          int count = int(min_of<int64_t>(kChain, last - row));
          auto step = [&](int64_t j, int lanes) {
            vec<T> k[K], sum[N] = {};
            CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = load(channels.of[i] + j);
            auto add = [&](int i) {
              vec<T> out[N];
              term(row + i, j, lanes, k, out);
              CONVKIT_UNROLL for (int n = 0; n < N; ++n) sum[n] += out[n];
            };
            if (count == kChain && lanes == L)
              CONVKIT_UNROLL for (int i = 0; i < kChain; ++i) add(i);
            else
              for (int i = 0; i < count; ++i) add(i);
            CONVKIT_UNROLL for (int n = 0; n < N; ++n) {
              double* to = sums + n * s.c + j;
              if (lanes == L) {
                DoubleSum<T> total;
                std::memcpy(&total.of, to, sizeof total.of);
                total.add(sum[n]);
                std::memcpy(to, &total.of, sizeof total.of);
              } else {
                for (int l = 0; l < lanes; ++l) to[l] += double(sum[n][l]);
              }
            }
          };
          int64_t j = 0;
          for (; j + L <= s.c; j += L) step(j, L);
          if (j < s.c) step(j, int(s.c - j));
        }
      }
    });
  } else {
    parallel(pool, pieces.count * s.c, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t piece = task / s.c, c = task % s.c, first = piece * pieces.rows;
        Channels<T, K> channels = start(piece, first * s.c + c, c);
        vec<T> k[K];
        CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = broadcast(channels.of[i][c]);
        DoubleSum<T> total[N] = {};
        vec<T> sum[kGroup][N] = {};
        int chained = 0;
        auto flush = [&] {
          CONVKIT_UNROLL for (int i = 0; i < N; ++i)
            CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) total[i].add(sum[v][i]), sum[v][i] = vec<T>{};
          chained = 0;
        };
        for (int64_t n = first; n < min_of(s.n, first + pieces.rows); ++n) {
          int64_t row = n * s.c + c, j = 0;
          auto add = [&](int v, int lanes) {
            vec<T> out[N];
            term(row, j + v * L, lanes, k, out);
            CONVKIT_UNROLL for (int i = 0; i < N; ++i) sum[v][i] += out[i];
          };
          for (; j + kGroup * L <= s.hw; j += kGroup * L) {
            CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) add(v, L);
            if (++chained == kChain) flush();
          }
          for (; j < s.hw; j += L) {
            if (s.hw - j >= L) add(0, L);
            else add(0, int(s.hw - j));
            if (++chained == kChain) flush();
          }
        }
        flush();
        for (int i = 0; i < N; ++i) {
          double sum_of_lanes = 0;
          for (int l = 0; l < L; ++l) sum_of_lanes += total[i].of[l];
          partial[(piece * N + i) * s.c + c] = sum_of_lanes;
        }
      }
    });
  }
}

// The same over all pieces, in order: sums[N][c].
template <class T, int K, int N, class Term>
CONVKIT_INLINE void reduce(const ChannelShape& s, const Channels<T, K>& channels, double* partial, double* sums, const Pool& pool, Term&& term) {
  reduce_pieces<T, K, N>(s, partial, pool, [&](int64_t, int64_t, int64_t) { return channels; }, term);
  int64_t pieces = Pieces(s).count;
  for (int64_t i = 0; i < N * s.c; ++i) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += partial[piece * N * s.c + i];
    sums[i] = sum;
  }
}

// Per-channel arrays are read a whole vector at a time.
int64_t padded(int64_t c) { return c + 16; }

// Count, mean and sum of squared deviations of part of a channel; merged as in Chan, Golub and LeVeque (1983), so that
// nothing cancels where the mean is far larger than the deviation.
struct Moments {
  double count, mean, m2;
  CONVKIT_INLINE void add(double n, double mean_n, double m2_n) {
    if (m2_n < 0) m2_n = 0;  // rounding, where all values are equal
    if (count == 0) {  // as it is: the mean of equal values must come out exactly
      *this = {n, mean_n, m2_n};
      return;
    }
    double all = count + n, delta = mean_n - mean;
    mean += delta * n / all;
    m2 += m2_n + delta * delta * count * n / all;
    count = all;
  }
};

// Mean and squared deviations of each channel: sums of x - shift and its square, where the shift is the mean of a piece's
// first values, so that nothing cancels (Chan, Golub and LeVeque 1983, section 3).
template <class S> void moments(const ChannelShape& s, const S* x, double* partial, compute_t<S>* shifts, Moments* all, const Pool& pool) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>;
  Rows rows(s);
  Pieces pieces(s);
  int64_t shift_row = padded(s.c), plane = rows.channels_last ? 1 : s.hw;
  auto start = [&](int64_t piece, int64_t row, int64_t c) {
    T* shift = shifts + piece * shift_row;
    if (rows.channels_last) {
      int64_t count = min_of<int64_t>(kChain, rows.count - row);
      for (int64_t j = 0; j < s.c; j += L) {
        int lanes = int(min_of<int64_t>(L, s.c - j));
        vec<T> sum{};
        for (int64_t i = 0; i < count; ++i) sum += fetch(x + (row + i) * s.c + j, lanes);
        store(shift + j, sum / T(count));  // reaches into the row's padding
      }
    } else {
      int64_t count = min_of<int64_t>(kChain, s.hw);
      T sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += get(x + row * s.hw + i);
      shift[c] = sum / T(count);
    }
    return Channels<T, 1>{{shift}};
  };
  reduce_pieces<T, 1, 2>(s, partial, pool, start, [&](int64_t row, int64_t j, int lanes, const vec<T>* k, vec<T>* out) {
    vec<T> d = fetch(x + row * rows.length + j, lanes) - k[0];
    if (lanes != L) d = first_lanes<T>(d, lanes);
    out[0] = d;
    out[1] = d * d;
  });
  int64_t end = rows.channels_last ? rows.count : s.n;
  for (int64_t c = 0; c < s.c; ++c) all[c] = {0, 0, 0};
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    double count = double(min_of(pieces.rows, end - piece * pieces.rows) * plane), inverse = 1 / count;
    const double* sums = partial + piece * 2 * s.c;
    const T* shift = shifts + piece * shift_row;
    for (int64_t c = 0; c < s.c; ++c) {
      double mean = sums[c] * inverse;
      all[c].add(count, double(shift[c]) + mean, sums[s.c + c] - sums[c] * mean);
    }
  }
}

// What is computed before the ReLU, in forward and backward alike: the mask is this value's sign.
template <class T> CONVKIT_INLINE vec<T> normalise(vec<T> x, const vec<T>* k) { return (x - k[0]) * k[1] + k[2]; }

template <class S> struct BatchNorm {
  using T = compute_t<S>;
  const BatchNormArgs& a;
  const Pool& pool;
  const ChannelShape& s = a.shape;
  Rows rows{s};
  Pieces pieces{s};
  // Workspace: partial sums, then sums, then per-channel vectors.
  double* partial = static_cast<double*>(a.workspace);
  double* sums = partial + pieces.count * 2 * s.c;
  T* vectors = reinterpret_cast<T*>(sums + 3 * s.c);
  T* mean = vectors;
  T* alpha = mean + padded(s.c);
  T* beta = alpha + padded(s.c);
  T* grad_mean = beta + padded(s.c);
  T* grad_slope = grad_mean + padded(s.c);
  T* rstd = grad_slope + padded(s.c);
  T* shifts = rstd + padded(s.c);  // of every piece
  const S* x = static_cast<const S*>(a.x);

  BatchNorm(const BatchNormArgs& args, const Pool& threads) : a(args), pool(threads) {}

  int64_t at(int64_t row, int64_t j) const { return row * rows.length + j; }
  bool whole_lines(const S* p) const { return rows.length % kLanes<T> == 0 && streamable(p); }

  void prepare() const {
    const T* m = static_cast<const T*>(a.mean);
    const T *w = static_cast<const T*>(a.weight), *b = static_cast<const T*>(a.bias);
    fill_zero(vectors, 6 * padded(s.c));
    for (int64_t c = 0; c < s.c; ++c) {
      mean[c] = m[c];
      double inverse = 1.0 / __builtin_sqrt(double(static_cast<const T*>(a.var)[c]) + a.eps);
      rstd[c] = T(inverse);
      alpha[c] = w == nullptr ? T(inverse) : T(inverse * double(w[c]));
      beta[c] = b == nullptr ? T(0) : b[c];
    }
  }

  // Deviations from an infinite mean are NaN, the mean itself is infinite: as PyTorch's running mean is then.
  double plain_mean(int64_t c) const {
    double sum = 0;
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t i = 0; i < s.hw; ++i) sum += double(get(x + (rows.channels_last ? (n * s.hw + i) * s.c + c : (n * s.c + c) * s.hw + i)));
    return sum / (double(s.n) * double(s.hw));
  }

  void forward() const {
    if (a.training) {
      Moments* all = reinterpret_cast<Moments*>(sums);
      moments(s, x, partial, shifts, all, pool);
      for (int64_t c = 0; c < s.c; ++c) {
        static_cast<T*>(a.mean)[c] = T(__builtin_isfinite(all[c].mean) ? all[c].mean : plain_mean(c));
        static_cast<T*>(a.var)[c] = T(all[c].m2 / all[c].count);
      }
    }
    prepare();
    Channels<T, 3> k{{mean, alpha, beta}};
    S* y = static_cast<S*>(a.y);
    bool streamed = a.stream && whole_lines(y);
    const S* residual = static_cast<const S*>(a.residual);
    if (residual == nullptr) {
      each_vector<T, 3>(s, k, pool, [&](int64_t row, int64_t j, int lanes, const vec<T>* k) {
        emit(y + at(row, j), relu<T>(normalise<T>(fetch(x + at(row, j), lanes), k)), lanes, streamed);
      });
    } else {
      each_vector<T, 3>(s, k, pool, [&](int64_t row, int64_t j, int lanes, const vec<T>* k) {
        vec<T> v = normalise<T>(fetch(x + at(row, j), lanes), k) + fetch(residual + at(row, j), lanes);
        if (a.mask != nullptr) write_mask<T>(a.mask + row * rows.mask_bytes(), j, ~(v <= vec<T>{}), lanes);
        emit(y + at(row, j), relu<T>(v), lanes, streamed);
      });
    }
  }

  // The gradient behind the ReLU.
  CONVKIT_INLINE vec<T> masked(const S* grad, vec<T> xv, int64_t row, int64_t j, int lanes, const vec<T>* k) const {
    vec<T> g = fetch(grad + at(row, j), lanes);
    if (a.mask != nullptr) return read_mask<T>(a.mask + row * rows.mask_bytes(), j, lanes) ? g : vec<T>{};
    return normalise<T>(xv, k) <= vec<T>{} ? vec<T>{} : g;
  }

  void backward() const {
    prepare();
    const S* grad = static_cast<const S*>(a.grad);
    Channels<T, 3> k{{mean, alpha, beta}};
    bool want_sums = a.grad_weight != nullptr || a.grad_bias != nullptr || (a.training && a.grad_x != nullptr);
    if (want_sums) {
      reduce<T, 3, 2>(s, k, partial, sums, pool, [&](int64_t row, int64_t j, int lanes, const vec<T>* k, vec<T>* out) {
        vec<T> xv = fetch(x + at(row, j), lanes);
        out[0] = masked(grad, xv, row, j, lanes, k);
        out[1] = out[0] * (xv - k[0]);
      });
      double count = double(s.n) * double(s.hw);
      for (int64_t c = 0; c < s.c; ++c) {
        double sum = sums[c], product = sums[s.c + c] * double(rstd[c]);  // sum of g, and of g times normalised x
        if (a.grad_bias != nullptr) static_cast<T*>(a.grad_bias)[c] = T(sum);
        if (a.grad_weight != nullptr) static_cast<T*>(a.grad_weight)[c] = T(product);
        // The gradient of x is alpha * (g - mean of g - normalised x * mean of (g * normalised x)).
        grad_mean[c] = a.training ? T(sum / count * double(alpha[c])) : T(0);
        grad_slope[c] = a.training ? T(product * double(rstd[c]) / count * double(alpha[c])) : T(0);
      }
    }
    S *grad_x = static_cast<S*>(a.grad_x), *grad_residual = static_cast<S*>(a.grad_residual);
    if (grad_x == nullptr && grad_residual == nullptr) return;
    bool streamed = a.stream && whole_lines(grad_x) && whole_lines(grad_residual);
    Channels<T, 5> all{{mean, alpha, beta, grad_mean, grad_slope}};
    each_vector<T, 5>(s, all, pool, [&](int64_t row, int64_t j, int lanes, const vec<T>* k) {
      vec<T> xv = fetch(x + at(row, j), lanes);
      vec<T> g = masked(grad, xv, row, j, lanes, k);
      if (grad_residual != nullptr) emit(grad_residual + at(row, j), g, lanes, streamed);
      if (grad_x == nullptr) return;
      emit(grad_x + at(row, j), a.training ? g * k[1] - ((xv - k[0]) * k[4] + k[3]) : g * k[1], lanes, streamed);
    });
  }
};

}  // namespace

int64_t channel_workspace(const ChannelShape& s) {
  return (Pieces(s).count * (2 * s.c + padded(s.c)) + 3 * s.c + 6 * padded(s.c)) * int64_t(sizeof(double));
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
    double* partial = static_cast<double*>(workspace);
    double* sums = partial + Pieces(s).count * 2 * s.c;
    T* zeros = reinterpret_cast<T*>(sums + 3 * s.c);  // reduce() loads per-channel values; a plain sum has none to use
    fill_zero(zeros, padded(s.c));
    Rows rows(s);
    reduce<T, 1, 1>(s, Channels<T, 1>{{zeros}}, partial, sums, pool,
                    [&](int64_t row, int64_t j, int lanes, const vec<T>*, vec<T>* to) {
                      to[0] = fetch(static_cast<const S*>(src) + row * rows.length + j, lanes);
                    });
    for (int64_t c = 0; c < s.c; ++c) put(static_cast<S*>(out) + c, T(sums[c]));
  });
}

}  // namespace convkit::cpu::CONVKIT_ISA
