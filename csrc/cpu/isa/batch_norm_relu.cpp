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
constexpr int64_t kPieceElements = 4096;  // of a contiguous plane, summed at once in the arithmetic's type
constexpr int64_t kChain = 16;            // terms summed in the arithmetic's type before they go to a sum in double
constexpr int64_t kRows = 64;             // of a channels-last block: 64 rows x 4 vectors stay in the first-level cache
constexpr int kGroup = 4;                 // vectors of channels whose sums are held in registers together

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
    int64_t at_least = r.channels_last ? 4 * kRows : 1;
    rows = max_of(at_least, ceil_div(all, r.channels_last ? kMaxPieces : min_of<int64_t>(16, s.n)));
    count = ceil_div(all, rows);
  }
};

template <class S> CONVKIT_INLINE vec<compute_t<S>> fetch(const S* p, int lanes) {
  return lanes == kLanes<compute_t<S>> ? load(p) : load_n(p, lanes);
}
template <class S> CONVKIT_INLINE void emit(S* p, vec<compute_t<S>> v, int lanes) {
  if (lanes == kLanes<compute_t<S>>) store(p, v);
  else store_n(p, v, lanes);
}

template <class T> CONVKIT_INLINE double horizontal_sum(vec<T> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += double(v[i]);
  return sum;
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

// Calls f(row, offset in row, lanes, per-channel values) for every vector of every row.
template <class T, int K, class F>
CONVKIT_INLINE void each_vector(const ChannelShape& s, const Channels<T, K>& channels, const Pool& pool, F&& f) {
  Rows rows(s);
  constexpr int L = kLanes<T>;
  if (rows.channels_last) {
    parallel(pool, rows.count, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t j = 0; j < rows.length; j += L) {
          vec<T> k[K];
          CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = load(channels.of[i] + j);
          f(row, j, int(min_of<int64_t>(L, rows.length - j)), k);
        }
    });
  } else {
    parallel(pool, rows.count, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        vec<T> k[K];
        CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = broadcast(channels.of[i][row % s.c]);
        int64_t j = 0;
        for (; j + L <= rows.length; j += L) f(row, j, L, k);
        if (j < rows.length) f(row, j, int(rows.length - j), k);
      }
    });
  }
}

// N sums a channel of what `term(row, offset, lanes, per-channel values, out[N])` gives, into sums[N][c].
template <class T, int K, int N, class Term>
CONVKIT_INLINE void reduce(const ChannelShape& s, const Channels<T, K>& channels, double* partial, double* sums, const Pool& pool, Term&& term) {
  Rows rows(s);
  Pieces pieces(s);
  constexpr int L = kLanes<T>;
  if (rows.channels_last) {
    parallel(pool, pieces.count, [&](int64_t begin, int64_t end, int) {
      for (int64_t piece = begin; piece < end; ++piece) {
        int64_t first = piece * pieces.rows, last = min_of(rows.count, first + pieces.rows);
        for (int64_t j = 0; j < s.c; j += L * kGroup) {
          vec<T> k[kGroup][K];
          int vectors = int(min_of<int64_t>(kGroup, ceil_div(s.c - j, L)));
          for (int v = 0; v < vectors; ++v)
            CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[v][i] = load(channels.of[i] + j + v * L);
          DoubleSum<T> total[kGroup][N] = {};
          auto lanes_of = [&](int v) { return int(min_of<int64_t>(L, s.c - j - v * L)); };
          bool whole = vectors == kGroup && lanes_of(kGroup - 1) == L;
          for (int64_t row = first; row < last;) {
            int64_t end = min_of(last, row + kChain);
            vec<T> sum[kGroup][N] = {};
            if (whole) {
              for (; row < end; ++row)
                CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) {
                  vec<T> out[N];
                  term(row, j + v * L, L, k[v], out);
                  CONVKIT_UNROLL for (int n = 0; n < N; ++n) sum[v][n] += out[n];
                }
            } else {
              for (; row < end; ++row)
                for (int v = 0; v < vectors; ++v) {
                  vec<T> out[N];
                  term(row, j + v * L, lanes_of(v), k[v], out);
                  CONVKIT_UNROLL for (int n = 0; n < N; ++n) sum[v][n] += out[n];
                }
            }
            CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v)
              CONVKIT_UNROLL for (int n = 0; n < N; ++n) total[v][n].add(sum[v][n]);
          }
          for (int v = 0; v < vectors; ++v)
            for (int n = 0; n < N; ++n)
              for (int i = 0; i < lanes_of(v); ++i) partial[(piece * N + n) * s.c + j + v * L + i] = total[v][n].of[i];
        }
      }
    });
  } else {
    parallel(pool, pieces.count * s.c, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t piece = task / s.c, c = task % s.c;
        vec<T> k[K];
        CONVKIT_UNROLL for (int i = 0; i < K; ++i) k[i] = broadcast(channels.of[i][c]);
        DoubleSum<T> lanes_total[N] = {};
        for (int64_t n = piece * pieces.rows; n < min_of(s.n, (piece + 1) * pieces.rows); ++n)
          for (int64_t first = 0; first < s.hw; first += kPieceElements) {
            int64_t row = n * s.c + c, last = min_of(s.hw, first + kPieceElements), j = first;
            while (j + kGroup * L <= last) {
              vec<T> sum[kGroup][N] = {};
              int64_t end = min_of(last, j + kChain * kGroup * L);
              for (; j + kGroup * L <= end; j += kGroup * L)
                CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) {
                  vec<T> out[N];
                  term(row, j + v * L, L, k, out);
                  CONVKIT_UNROLL for (int i = 0; i < N; ++i) sum[v][i] += out[i];
                }
              CONVKIT_UNROLL for (int i = 0; i < N; ++i)
                CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) lanes_total[i].add(sum[v][i]);
            }
            for (; j < last; j += L) {
              vec<T> out[N];
              int lanes = int(min_of<int64_t>(L, last - j));
              if (lanes == L) term(row, j, L, k, out);
              else term(row, j, lanes, k, out);
              CONVKIT_UNROLL for (int i = 0; i < N; ++i) lanes_total[i].add(out[i]);
            }
          }
        for (int i = 0; i < N; ++i) {
          double total = 0;
          for (int l = 0; l < L; ++l) total += lanes_total[i].of[l];
          partial[(piece * N + i) * s.c + c] = total;
        }
      }
    });
  }
  for (int n = 0; n < N; ++n)
    for (int64_t c = 0; c < s.c; ++c) {
      double sum = 0;
      for (int64_t piece = 0; piece < pieces.count; ++piece) sum += partial[(piece * N + n) * s.c + c];
      sums[n * s.c + c] = sum;
    }
}

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

// Mean and squared deviations of short blocks that stay in the first-level cache while they are read twice. The
// deviations' own sum, zero but for rounding, corrects both (Chan, Golub and LeVeque 1983, equation 1.7).
template <class S> void moments(const ChannelShape& s, const S* x, Moments* partial, const Pool& pool) {
  using T = compute_t<S>;
  constexpr int L = kLanes<T>;
  Rows rows(s);
  Pieces pieces(s);
  if (rows.channels_last) {
    parallel(pool, pieces.count, [&](int64_t begin, int64_t end, int) {
      for (int64_t piece = begin; piece < end; ++piece) {
        int64_t first = piece * pieces.rows, last = min_of(rows.count, first + pieces.rows);
        Moments* out = partial + piece * s.c;
        for (int64_t c = 0; c < s.c; ++c) out[c] = {0, 0, 0};
        for (int64_t i = first; i < last; i += kRows)
          for (int64_t j = 0; j < s.c; j += L * kGroup) {
            int64_t count = min_of(kRows, last - i);
            int vectors = int(min_of<int64_t>(kGroup, ceil_div(s.c - j, L)));
            vec<T> sum[kGroup] = {}, mean[kGroup], slip[kGroup] = {}, m2[kGroup] = {};
            const S* block = x + i * s.c + j;
            if (j + L * kGroup <= s.c) {
              for (int64_t row = 0; row < count; ++row)
                CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) sum[v] += load(block + row * s.c + v * L);
              CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) mean[v] = sum[v] / T(count);
              for (int64_t row = 0; row < count; ++row)
                CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) {
                  vec<T> d = load(block + row * s.c + v * L) - mean[v];
                  slip[v] += d;
                  m2[v] += d * d;
                }
            } else {
              auto lanes_of = [&](int v) { return int(min_of<int64_t>(L, s.c - j - v * L)); };
              for (int64_t row = 0; row < count; ++row)
                for (int v = 0; v < vectors; ++v) sum[v] += fetch(block + row * s.c + v * L, lanes_of(v));
              for (int v = 0; v < vectors; ++v) mean[v] = sum[v] / T(count);
              for (int64_t row = 0; row < count; ++row)
                for (int v = 0; v < vectors; ++v) {
                  vec<T> d = fetch(block + row * s.c + v * L, lanes_of(v)) - mean[v];
                  slip[v] += d;
                  m2[v] += d * d;
                }
            }
            for (int v = 0; v < vectors; ++v)
              for (int l = 0; l < L && j + v * L + l < s.c; ++l) {
                double e = double(slip[v][l]) / double(count);
                out[j + v * L + l].add(double(count), double(mean[v][l]) + e, double(m2[v][l]) - e * e * double(count));
              }
          }
      }
    });
  } else {
    parallel(pool, pieces.count * s.c, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t piece = task / s.c, c = task % s.c;
        Moments out{0, 0, 0};
        for (int64_t n = piece * pieces.rows; n < min_of(s.n, (piece + 1) * pieces.rows); ++n)
          for (int64_t first = 0; first < s.hw; first += kPieceElements) {
            const S* block = x + (n * s.c + c) * s.hw + first;
            int64_t count = min_of(kPieceElements, s.hw - first), whole = count / (kGroup * L) * (kGroup * L);
            vec<T> sum[kGroup] = {}, slip[kGroup] = {}, m2[kGroup] = {};
            for (int64_t j = 0; j < whole; j += kGroup * L)
              CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) sum[v] += load(block + j + v * L);
            for (int64_t j = whole; j < count; j += L) sum[0] += fetch(block + j, int(min_of<int64_t>(L, count - j)));
            T mean_of_block = T(horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) / double(count));
            vec<T> mean = broadcast(mean_of_block);
            for (int64_t j = 0; j < whole; j += kGroup * L)
              CONVKIT_UNROLL for (int v = 0; v < kGroup; ++v) {
                vec<T> d = load(block + j + v * L) - mean;
                slip[v] += d;
                m2[v] += d * d;
              }
            double rest = 0, rest_slip = 0;
            for (int64_t j = whole; j < count; ++j) {
              double d = double(get(block + j)) - double(mean_of_block);
              rest_slip += d;
              rest += d * d;
            }
            double e = (rest_slip + horizontal_sum<T>((slip[0] + slip[1]) + (slip[2] + slip[3]))) / double(count);
            double squares = rest + horizontal_sum<T>((m2[0] + m2[1]) + (m2[2] + m2[3]));
            out.add(double(count), double(mean_of_block) + e, squares - e * e * double(count));
          }
        partial[piece * s.c + c] = out;
      }
    });
  }
}

// What is computed before the ReLU, in forward and backward alike: the mask is this value's sign.
template <class T> CONVKIT_INLINE vec<T> normalise(vec<T> x, const vec<T>* k) { return (x - k[0]) * k[1] + k[2]; }

int64_t padded(int64_t c) { return c + 16; }

template <class S> struct BatchNorm {
  using T = compute_t<S>;
  const BatchNormArgs& a;
  const Pool& pool;
  const ChannelShape& s = a.shape;
  Rows rows{s};
  Pieces pieces{s};
  // Workspace: partial sums, then sums, then per-channel vectors.
  double* partial = static_cast<double*>(a.workspace);
  double* sums = partial + pieces.count * 3 * s.c;
  T* vectors = reinterpret_cast<T*>(sums + 3 * s.c);
  T* mean = vectors;
  T* alpha = mean + padded(s.c);
  T* beta = alpha + padded(s.c);
  T* grad_mean = beta + padded(s.c);
  T* grad_slope = grad_mean + padded(s.c);
  T* rstd = grad_slope + padded(s.c);
  const S* x = static_cast<const S*>(a.x);

  BatchNorm(const BatchNormArgs& args, const Pool& threads) : a(args), pool(threads) {}

  int64_t at(int64_t row, int64_t j) const { return row * rows.length + j; }

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
      Moments* parts = reinterpret_cast<Moments*>(partial);
      moments(s, x, parts, pool);
      for (int64_t c = 0; c < s.c; ++c) {
        Moments all{0, 0, 0};
        for (int64_t piece = 0; piece < pieces.count; ++piece) {
          const Moments& m = parts[piece * s.c + c];
          all.add(m.count, m.mean, m.m2);
        }
        static_cast<T*>(a.mean)[c] = T(__builtin_isfinite(all.mean) ? all.mean : plain_mean(c));
        static_cast<T*>(a.var)[c] = T(all.m2 / all.count);
      }
    }
    prepare();
    Channels<T, 3> k{{mean, alpha, beta}};
    S* y = static_cast<S*>(a.y);
    const S* residual = static_cast<const S*>(a.residual);
    if (residual == nullptr) {
      each_vector<T, 3>(s, k, pool, [&](int64_t row, int64_t j, int lanes, const vec<T>* k) {
        emit(y + at(row, j), relu<T>(normalise<T>(fetch(x + at(row, j), lanes), k)), lanes);
      });
    } else {
      each_vector<T, 3>(s, k, pool, [&](int64_t row, int64_t j, int lanes, const vec<T>* k) {
        vec<T> v = normalise<T>(fetch(x + at(row, j), lanes), k) + fetch(residual + at(row, j), lanes);
        if (a.mask != nullptr) write_mask<T>(a.mask + row * rows.mask_bytes(), j, ~(v <= vec<T>{}), lanes);
        emit(y + at(row, j), relu<T>(v), lanes);
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
        grad_mean[c] = a.training ? T(sum / count) : T(0);
        grad_slope[c] = a.training ? T(product * double(rstd[c]) / count) : T(0);
      }
    }
    S *grad_x = static_cast<S*>(a.grad_x), *grad_residual = static_cast<S*>(a.grad_residual);
    if (grad_x == nullptr && grad_residual == nullptr) return;
    Channels<T, 5> all{{mean, alpha, beta, grad_mean, grad_slope}};
    each_vector<T, 5>(s, all, pool, [&](int64_t row, int64_t j, int lanes, const vec<T>* k) {
      vec<T> xv = fetch(x + at(row, j), lanes);
      vec<T> g = masked(grad, xv, row, j, lanes, k);
      if (grad_residual != nullptr) emit(grad_residual + at(row, j), g, lanes);
      if (grad_x == nullptr) return;
      emit(grad_x + at(row, j), a.training ? (g - k[3] - (xv - k[0]) * k[4]) * k[1] : g * k[1], lanes);
    });
  }
};

}  // namespace

int64_t channel_workspace(const ChannelShape& s) {
  return (Pieces(s).count * 3 * s.c + 3 * s.c + 6 * padded(s.c)) * int64_t(sizeof(double));
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
    double* sums = partial + Pieces(s).count * 3 * s.c;
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
