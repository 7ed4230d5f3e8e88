// Max pooling with an optional ReLU, its gradient, and the gradient of that.
//
// Channels-last, a lane is a channel: the largest value of a window and its tap stay in registers while the taps go by in
// order. The gradient of a pixel is gathered from the windows that it lies in, in the order of the outputs; where windows
// lie side by side, that of an output goes to the pixels of its window.
// Contiguous, a lane is an output: a band of a plane is copied with its rows and columns sorted by their remainder modulo
// the stride and with -inf around the image. For each tap, outputs that follow each other then read what follows each
// other, across the ends of rows too, so a band is one run of whole vectors, however short its rows. The gradient is
// scattered to a copy of a band that stays in the first-level cache.
// Sums of overlapping windows are in the order of the outputs in both, which is PyTorch's.
#include "../kernels.h"
#include "staging.h"

namespace convkit::cpu::CONVKIT_ISA {

namespace {

// The copy of a band: leaves half of a first-level cache of 48 KiB to what it is copied from and to.
constexpr int64_t kBandBytes = 24 << 10;

template <class I, int N> struct Integers {
  typedef I type __attribute__((vector_size(N * sizeof(I))));
};
// By steps of twice the width or half of it: the compiler does larger ones a lane at a time.
template <int N, class From, class To> CONVKIT_INLINE typename Integers<To, N>::type resized(typename Integers<From, N>::type v) {
  constexpr bool wider = sizeof(From) < sizeof(To);
  using Next = std::conditional_t<wider, std::conditional_t<sizeof(From) == 1, int16_t, int32_t>, std::conditional_t<sizeof(From) == 8, int32_t, int16_t>>;
  if constexpr (sizeof(To) > 2 * sizeof(From) || sizeof(From) > 2 * sizeof(To))
    return resized<N, Next, To>(__builtin_convertvector(v, typename Integers<Next, N>::type));
  else
    return __builtin_convertvector(v, typename Integers<To, N>::type);
}

template <int first, class V, int... J> CONVKIT_INLINE V every_other(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, (2 * J + first)...);
}

// Contiguous planes: sizes that follow from the problem. `reach`: staged rows (columns) that the last output's taps go on.
struct Bands {
  int64_t phases_h, phases_w, reach_h, pitch, rows, input_rows;

  Bands(const MaxPoolProblem& p, int64_t element) {
    int64_t window_h = (p.r - 1) * p.dilation_h, window_w = (p.s - 1) * p.dilation_w;
    phases_h = min_of(p.stride_h, window_h + 1), phases_w = min_of(p.stride_w, window_w + 1);
    reach_h = window_h / p.stride_h;
    pitch = p.q + window_w / p.stride_w;
    rows = max_of<int64_t>(1, min_of(p.p, kBandBytes / (phases_h * phases_w * pitch * element) - reach_h));
    input_rows = max_of<int64_t>(1, min_of(p.h, kBandBytes / (p.w * element)));
  }
};

template <class S, class I> struct MaxPool {
  using T = compute_t<S>;
  using Index = typename VecOf<T>::mask;
  static constexpr int L = kLanes<T>;
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Taps = typename Integers<I, L>::type;
  const MaxPoolArgs& a;
  const Pool& pool;
  char* workspace;
  const MaxPoolProblem& p = a.problem;
  const S* src = static_cast<const S*>(a.src);
  I* taps = static_cast<I*>(a.taps);
  S* dst = static_cast<S*>(a.dst);
  Bands bands{p, int64_t(sizeof(T))};

  MaxPool(const MaxPoolArgs& args, const Pool& threads, void* ws = nullptr) : a(args), pool(threads), workspace(static_cast<char*>(ws)) {}

  struct Largest {
    vec<T> value = broadcast(-T(__builtin_inf()));
    Index tap;

    // The first of equals, and the last NaN: what PyTorch takes.
    CONVKIT_INLINE void meet(vec<T> x, Index its_tap) {
      Index newer = (x > value) | (x != x);
      value = newer ? x : value;
      tap = newer ? its_tap : tap;
    }
    // The ReLU's gradient is that of a value that came from nowhere.
    CONVKIT_INLINE void relu() {
      Index off = value <= vec<T>{};
      value = off ? vec<T>{} : value;
      tap = off ? every(-1) : tap;
    }
  };
  static CONVKIT_INLINE Index every(int64_t tap) { return Index{} + decltype(Index{}[0] + 0)(tap); }

  static CONVKIT_INLINE void put_taps(I* to, Index tap) {
#if defined(__AVX512F__)
    Taps narrow = __builtin_convertvector(tap, Taps);  // one instruction
#else
    Taps narrow = resized<L, Lane, I>((typename Integers<Lane, L>::type)tap);
#endif
    std::memcpy(to, &narrow, sizeof narrow);
  }
  static CONVKIT_INLINE Index get_taps(const I* from) {
#if defined(__AVX512F__)
    if constexpr (sizeof(I) == 1 && sizeof(T) == 4) return (Index)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    if constexpr (sizeof(I) == 1 && sizeof(T) == 4) return (Index)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
    Taps narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    return (Index)resized<L, I, Lane>(narrow);
  }

  // Taps of a window from `first` on that lie inside.
  static CONVKIT_INLINE Range valid(int64_t first, int64_t taps, int64_t dilation, int64_t size) {
    if (first >= 0 && first + (taps - 1) * dilation < size) return {0, taps};
    return inside(taps, dilation, first, size);
  }

  // ---- channels-last

  // N vectors of channels, whole ones or a single shorter one.
  template <int N, bool whole> struct Vectors {
    int64_t at[N];  // where each begins
    int lanes;

    CONVKIT_INLINE vec<T> load_at(const S* from, int v) const { return whole ? load(from + at[v]) : load_n(from, lanes); }
    CONVKIT_INLINE void store_at(S* to, int v, vec<T> value) const { whole ? store(to + at[v], value) : store_n(to, value, lanes); }
    CONVKIT_INLINE Index taps_at(const I* from, int v) const {
      if (whole) return get_taps(from + at[v]);
      I some[L] = {};
      std::memcpy(some, from, lanes * sizeof(I));
      return get_taps(some);
    }
    CONVKIT_INLINE void put_taps_at(I* to, int v, Index tap) const {
      if (whole) return put_taps(to + at[v], tap);
      I some[L];
      put_taps(some, tap);
      std::memcpy(to, some, lanes * sizeof(I));
    }
  };

  // Calls f(Vectors) for all channels. The last vector ends with the last channel, so that it may hold channels which the
  // one before it has too.
  template <class F> CONVKIT_INLINE void channels(F&& f) const {
    if (p.c < L) return f(Vectors<1, false>{{0}, int(p.c)});
    for (int64_t c = 0; c < p.c; c += 2 * L) {
      int64_t first = min_of(c, p.c - L), second = min_of(c + L, p.c - L);
      if (p.c - c > L) f(Vectors<2, true>{{first, second}, L});
      else f(Vectors<1, true>{{first}, L});
    }
  }

  void forward_by_pixels() const {
    int64_t row_step = p.dilation_h * p.w * p.c, pixel_step = p.dilation_w * p.c, ahead = p.stride_h * p.w * p.c;
    parallel(pool, p.n * p.p, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t y = task % p.p * p.stride_h - p.pad_h;
        Range rows = valid(y, p.r, p.dilation_h, p.h);
        const S* image = src + task / p.p * p.h * p.w * p.c;
        for (int64_t q = 0; q < p.q; ++q) {
          int64_t x = q * p.stride_w - p.pad_w, out = (task * p.q + q) * p.c;
          Range columns = valid(x, p.s, p.dilation_w, p.w);
          bool none = rows.begin == rows.end || columns.begin == columns.end;
          const S* window = image + (y * p.w + x) * p.c;
          channels([&]<int N, bool whole>(const Vectors<N, whole>& of) __attribute__((always_inline)) {
            Largest largest[N];
            CONVKIT_UNROLL for (int v = 0; v < N; ++v) largest[v].tap = every(none ? -1 : rows.begin * p.s + columns.begin);
            for (int64_t r = rows.begin; r < rows.end; ++r)
              for (int64_t s = columns.begin; s < columns.end; ++s) {
                const S* from = window + r * row_step + s * pixel_step;
                // What the windows below will meet first: of a row of outputs, memory is read a little here and a little there.
                if (r + p.stride_h >= p.r && s + p.stride_w >= p.s)
                  CONVKIT_UNROLL for (int v = 0; v < N; ++v) __builtin_prefetch(from + of.at[v] + ahead);
                CONVKIT_UNROLL for (int v = 0; v < N; ++v) largest[v].meet(of.load_at(from, v), every(r * p.s + s));
              }
            CONVKIT_UNROLL for (int v = 0; v < N; ++v) {
              if (a.relu) largest[v].relu();
              of.store_at(dst + out, v, largest[v].value);
              if (taps != nullptr) of.put_taps_at(taps + out, v, largest[v].tap);
            }
          });
        }
      }
    });
  }

  // Windows side by side: each output's gradient and tap are read once, for all pixels of its window.
  void grad_by_windows() const {
    parallel(pool, p.n * p.p, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t image = task / p.p, y = task % p.p * p.r, used = p.q * p.s, ahead = p.r * p.w * p.c;
        S* rows = dst + (image * p.h + y) * p.w * p.c;
        for (int64_t q = 0; q < p.q; ++q)
          channels([&]<int N, bool whole>(const Vectors<N, whole>& of) __attribute__((always_inline)) {
            vec<T> grad[N];
            Index tap[N];
            int64_t out = (task * p.q + q) * p.c;
            CONVKIT_UNROLL for (int v = 0; v < N; ++v) grad[v] = of.load_at(src + out, v), tap[v] = of.taps_at(taps + out, v);
            for (int64_t r = 0; r < p.r; ++r)
              for (int64_t s = 0; s < p.s; ++s) {
                S* to = rows + (r * p.w + q * p.s + s) * p.c;
                CONVKIT_UNROLL for (int v = 0; v < N; ++v) {
                  __builtin_prefetch(to + of.at[v] + ahead, 1);
                  of.store_at(to, v, tap[v] == every(r * p.s + s) ? grad[v] : vec<T>{});
                }
              }
          });
        for (int64_t r = 0; r < p.r && used < p.w; ++r) fill_zero(rows + (r * p.w + used) * p.c, (p.w - used) * p.c);
        if (y + p.r == p.p * p.r) fill_zero(rows + p.r * p.w * p.c, (p.h - p.p * p.r) * p.w * p.c);
      }
    });
  }

  // A window that a pixel lies in: where its output is, and which tap the pixel is of it. Listed once for all channels.
  struct Meeting {
    int64_t out, tap;
  };
  static int64_t meeting_bytes(const MaxPoolProblem& p) { return ceil_div(min_of(p.r, p.p) * min_of(p.s, p.q) * int64_t(sizeof(Meeting)), 64) * 64; }

  void grad_by_pixels() const {
    bool side_by_side = p.stride_h == p.r && p.stride_w == p.s && p.dilation_h == 1 && p.dilation_w == 1 && p.pad_h == 0 && p.pad_w == 0;
    if (side_by_side && p.p * p.r <= p.h && p.q * p.s <= p.w) return grad_by_windows();
    int64_t bytes = meeting_bytes(p);
    parallel(pool, p.n * p.h, [&](int64_t begin, int64_t end, int thread) {
      Meeting* meetings = reinterpret_cast<Meeting*>(workspace + thread * bytes);
      for (int64_t task = begin; task < end; ++task) {
        int64_t first_row = task / p.h * p.p;
        auto down = taps_at(task % p.h, p.r, p.stride_h, p.pad_h, p.dilation_h, true);
        // Pixels a stride apart are met by the same taps, of outputs next to each other.
        for (int64_t phase = 0; phase < min_of(p.stride_w, p.w); ++phase) {
          auto across = taps_at(phase, p.s, p.stride_w, p.pad_w, p.dilation_w, true);
          for (int64_t x = phase, q0 = across.source; x < p.w; x += p.stride_w, ++q0) {
            int64_t count = 0;
            for (int64_t i = 0; i < down.count; ++i) {
              int64_t row = down.source + i * down.source_step;
              if (row < 0 || row >= p.p) continue;
              for (int64_t j = 0; j < across.count; ++j) {
                int64_t q = q0 + j * across.source_step;
                if (q < 0 || q >= p.q) continue;
                meetings[count++] = {((first_row + row) * p.q + q) * p.c, (down.first + i * down.step) * p.s + across.first + j * across.step};
              }
            }
            channels([&]<int N, bool whole>(const Vectors<N, whole>& of) __attribute__((always_inline)) {
              vec<T> sum[N] = {};
              for (int64_t i = 0; i < count; ++i) {
                auto [out, its_tap] = meetings[i];
                Index tap = every(its_tap);
                CONVKIT_UNROLL for (int v = 0; v < N; ++v) sum[v] += of.taps_at(taps + out, v) == tap ? of.load_at(src + out, v) : vec<T>{};
              }
              CONVKIT_UNROLL for (int v = 0; v < N; ++v) of.store_at(dst + (task * p.w + x) * p.c, v, sum[v]);
            });
          }
        }
      }
    });
  }

  // ---- contiguous

  static void fill_low(T* to, int64_t n) {
    for (int64_t j = 0; j < n; ++j) to[j] = -T(__builtin_inf());
  }

  // A row of the image to its columns of phase 0, 1 …, phase_size apart, -inf on either side. What follows a row of a phase
  // may be overwritten, by less than a vector.
  void stage_row(const S* from, const Range* columns, T* to, int64_t phase_size) const {
    constexpr auto lanes = std::make_integer_sequence<int, L>{};
    bool pairs = p.stride_w == 2 && bands.phases_w == 2 && p.pad_w >= 0;
    if (pairs) {
      T* even = to + p.pad_w % 2 * phase_size + p.pad_w / 2;
      T* odd = to + (p.pad_w + 1) % 2 * phase_size + (p.pad_w + 1) / 2;
      int64_t last = min_of(p.w, 2 * (bands.pitch - p.pad_w / 2));  // what is beyond, no window reaches
      for (int64_t x = 0; x < last; x += 2 * L, even += L, odd += L) {
        int64_t left = p.w - x;
        vec<T> low = left >= L ? load(from + x) : load_n(from + x, int(left)), high = {};
        if (left > L) high = left >= 2 * L ? load(from + x + L) : load_n(from + x + L, int(left - L));
        store(even, every_other<0>(low, high, lanes));
        store(odd, every_other<1>(low, high, lanes));
      }
    }
    for (int64_t j = 0; j < bands.phases_w; ++j, to += phase_size) {
      auto [begin, end] = columns[j];
      fill_low(to, begin);
      if (p.stride_w == 1) copy_values(from + begin - p.pad_w, to + begin, end - begin);
      else if (!pairs)
        for (int64_t i = begin; i < end; ++i) to[i] = get(from + i * p.stride_w + j - p.pad_w);
      fill_low(to + end, bands.pitch - end);
    }
  }

  // What outputs [first, first + rows) of a plane are taken from -> staged[row phase][column phase][row][pitch].
  void stage(const S* plane, const Range* columns, int64_t first, int64_t rows, T* staged, int64_t phase_size) const {
    for (int64_t row = 0; row < rows + bands.reach_h; ++row)
      for (int64_t i = 0; i < bands.phases_h; ++i) {
        int64_t y = (first + row) * p.stride_h + i - p.pad_h;
        T* to = staged + i * bands.phases_w * phase_size + row * bands.pitch;
        if (y >= 0 && y < p.h) stage_row(plane + y * p.w, columns, to, phase_size);
        else
          for (int64_t j = 0; j < bands.phases_w; ++j) fill_low(to + j * phase_size, bands.pitch);
      }
  }

  static constexpr int kAtOnce = 4;  // vectors of outputs: their comparisons don't wait for each other

  // With room for what is read and written beyond the last row.
  static int64_t phase_size(const Bands& b, int64_t rows) { return (rows + b.reach_h) * b.pitch + (kAtOnce + 2) * L; }

  static int64_t forward_bytes(const MaxPoolProblem& p, const Bands& b) {
    int64_t staged = b.phases_h * b.phases_w * phase_size(b, b.rows), outputs = b.rows * b.pitch + kAtOnce * L;
    return ceil_div(p.r * p.s * int64_t(sizeof(int64_t)) + b.phases_w * int64_t(sizeof(Range)) + (staged + outputs) * int64_t(sizeof(T)) + outputs * int64_t(sizeof(I)), 64) * 64;
  }

  // N vectors of outputs, each tap of which is an offset away.
  template <int N> void compare(const T* staged, const int64_t* offsets, T* out, I* out_taps) const {
    Largest largest[N];
    CONVKIT_UNROLL for (int v = 0; v < N; ++v) largest[v].tap = every(-1);
    for (int64_t tap = 0; tap < p.r * p.s; ++tap)
      CONVKIT_UNROLL for (int v = 0; v < N; ++v) largest[v].meet(load(staged + offsets[tap] + v * L), every(tap));
    CONVKIT_UNROLL for (int v = 0; v < N; ++v) {
      if (a.relu) largest[v].relu();
      store(out + v * L, largest[v].value);
      put_taps(out_taps + v * L, largest[v].tap);
    }
  }

  void forward_by_planes() const {
    int64_t pieces = ceil_div(p.p, bands.rows), all_taps = p.r * p.s, bytes = forward_bytes(p, bands);
    parallel(pool, p.n * p.c * pieces, [&](int64_t begin, int64_t end, int thread) {
      int64_t* offsets = reinterpret_cast<int64_t*>(workspace + thread * bytes);
      Range* columns = reinterpret_cast<Range*>(offsets + all_taps);
      T* staged = reinterpret_cast<T*>(columns + bands.phases_w);
      for (int64_t j = 0; j < bands.phases_w; ++j) {
        columns[j] = inside(bands.pitch, p.stride_w, j - p.pad_w, p.w);
        if (columns[j].begin >= columns[j].end) columns[j] = {0, 0};
      }
      int64_t offsets_for = -1;
      for (int64_t task = begin; task < end; ++task) {
        int64_t first = task % pieces * bands.rows, rows = min_of(bands.rows, p.p - first), outputs = rows * bands.pitch;
        int64_t phase = phase_size(bands, rows);
        T* out = staged + bands.phases_h * bands.phases_w * phase;
        I* out_taps = reinterpret_cast<I*>(out + outputs + kAtOnce * L);
        if (offsets_for != rows)
          for (int64_t tap = 0; tap < all_taps; ++tap) {
            int64_t y = tap / p.s * p.dilation_h, x = tap % p.s * p.dilation_w;
            offsets[tap] = (y % p.stride_h * bands.phases_w + x % p.stride_w) * phase + y / p.stride_h * bands.pitch + x / p.stride_w;
          }
        offsets_for = rows;
        stage(src + task / pieces * p.h * p.w, columns, first, rows, staged, phase);
        for (int64_t j = 0; j < outputs; j += kAtOnce * L) {
          int64_t vectors = ceil_div(outputs - j, L);
          if (vectors == 1) compare<1>(staged + j, offsets, out + j, out_taps + j);
          else if (vectors == 2) compare<2>(staged + j, offsets, out + j, out_taps + j);
          else if (vectors == 3) compare<3>(staged + j, offsets, out + j, out_taps + j);
          else compare<kAtOnce>(staged + j, offsets, out + j, out_taps + j);
        }
        emit(out, out_taps, first, rows, (task / pieces * p.p + first) * p.q);
      }
    });
  }

  void emit(const T* out, I* out_taps, int64_t first, int64_t rows, int64_t at) const {
    // Only -inf leaves the first tap, that of a window which lies in the image, to be found.
    if (taps != nullptr && !a.relu)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t q = 0; q < p.q; ++q) {
          I& tap = out_taps[i * bands.pitch + q];
          if (tap != I(-1)) continue;
          Range down = valid((first + i) * p.stride_h - p.pad_h, p.r, p.dilation_h, p.h), across = valid(q * p.stride_w - p.pad_w, p.s, p.dilation_w, p.w);
          if (down.begin < down.end && across.begin < across.end) tap = I(down.begin * p.s + across.begin);
        }
    int64_t runs = bands.pitch == p.q ? 1 : rows, length = bands.pitch == p.q ? rows * p.q : p.q;
    for (int64_t i = 0; i < runs; ++i, at += length) {
      copy_values(out + i * bands.pitch, dst + at, length);
      if (taps != nullptr) std::memcpy(taps + at, out_taps + i * bands.pitch, length * sizeof(I));
    }
  }

  static int64_t grad_bytes(const MaxPoolProblem& p, const Bands& b) {
    return ceil_div(p.r * p.s * int64_t(sizeof(int64_t)) + (b.input_rows * p.w + 1) * int64_t(sizeof(T)), 64) * 64;
  }

  void grad_by_planes() const {
    int64_t pieces = ceil_div(p.h, bands.input_rows), all_taps = p.r * p.s, bytes = grad_bytes(p, bands);
    parallel(pool, p.n * p.c * pieces, [&](int64_t begin, int64_t end, int thread) {
      int64_t* offsets = reinterpret_cast<int64_t*>(workspace + thread * bytes);
      T* band = reinterpret_cast<T*>(offsets + all_taps);
      for (int64_t tap = 0; tap < all_taps; ++tap) offsets[tap] = tap / p.s * p.dilation_h * p.w + tap % p.s * p.dilation_w;
      for (int64_t task = begin; task < end; ++task) {
        int64_t first = task % pieces * bands.input_rows, rows = min_of(bands.input_rows, p.h - first), plane = task / pieces;
        uint64_t size = uint64_t(rows * p.w);
        fill_zero(band, rows * p.w);
        // Output rows whose windows reach into the band; of those, what lies beyond it goes to a place behind it.
        int64_t begin_row = max_of<int64_t>(0, ceil_div(max_of<int64_t>(0, first + p.pad_h - (p.r - 1) * p.dilation_h), p.stride_h));
        int64_t end_row = min_of(p.p, (first + rows - 1 + p.pad_h) / p.stride_h + 1);
        for (int64_t i = begin_row; i < end_row; ++i) {
          int64_t out = (plane * p.p + i) * p.q, origin = (i * p.stride_h - p.pad_h - first) * p.w - p.pad_w;
          for (int64_t q = 0; q < p.q; ++q, origin += p.stride_w) {
            uint64_t tap = uint64_t(taps[out + q]);
            uint64_t at = tap < uint64_t(all_taps) ? uint64_t(origin + offsets[tap]) : size;
            band[min_of(at, size)] += get(src + out + q);
          }
        }
        copy_values(band, dst + (plane * p.h + first) * p.w, rows * p.w);
      }
    });
  }

  // ---- either

  void pick() const {
    bool last = p.layout == Layout::nhwc;
    int64_t step = last ? p.c : 1, planes = last ? p.n : p.n * p.c;  // elements from pixel to pixel
    parallel(pool, planes * p.p, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        const S* plane = src + task / p.p * p.h * p.w * step;
        for (int64_t q = 0; q < p.q; ++q)
          for (int64_t c = 0; c < step; ++c) {
            int64_t at = (task * p.q + q) * step + c, tap = int64_t(taps[at]);
            int64_t y = task % p.p * p.stride_h - p.pad_h + tap / p.s * p.dilation_h, x = q * p.stride_w - p.pad_w + tap % p.s * p.dilation_w;
            bool some = tap >= 0 && tap < p.r * p.s && y >= 0 && y < p.h && x >= 0 && x < p.w;
            if (some) dst[at] = plane[(y * p.w + x) * step + c];
            else put(dst + at, T(0));
          }
      }
    });
  }
};

// Calls f(Tag<S>, Tag<I>) for the types of the values and of the taps.
template <class F> void with_types(const MaxPoolArgs& a, F&& f) {
  with_type(a.problem.dtype, [&]<class S>(Tag<S> tag) {
    if (a.wide_taps) f(tag, Tag<int32_t>{});
    else f(tag, Tag<uint8_t>{});
  });
}

}  // namespace

int64_t max_pool_workspace(const MaxPoolArgs& a, int threads) {
  int64_t bytes = 0;
  with_types(a, [&]<class S, class I>(Tag<S>, Tag<I>) {
    using Run = MaxPool<S, I>;
    Bands bands(a.problem, sizeof(compute_t<S>));
    if (a.problem.layout == Layout::nhwc) bytes = Run::meeting_bytes(a.problem);
    else bytes = max_of(Run::forward_bytes(a.problem, bands), Run::grad_bytes(a.problem, bands));
  });
  return threads * bytes;
}

void max_pool(const MaxPoolArgs& a, void* workspace, const Pool& pool) {
  with_types(a, [&]<class S, class I>(Tag<S>, Tag<I>) {
    MaxPool<S, I> run(a, pool, workspace);
    a.problem.layout == Layout::nhwc ? run.forward_by_pixels() : run.forward_by_planes();
  });
}

void max_pool_grad(const MaxPoolArgs& a, void* workspace, const Pool& pool) {
  with_types(a, [&]<class S, class I>(Tag<S>, Tag<I>) {
    MaxPool<S, I> run(a, pool, workspace);
    a.problem.layout == Layout::nhwc ? run.grad_by_pixels() : run.grad_by_planes();
  });
}

void max_pool_pick(const MaxPoolArgs& a, const Pool& pool) {
  with_types(a, [&]<class S, class I>(Tag<S>, Tag<I>) { MaxPool<S, I>(a, pool).pick(); });
}

}  // namespace convkit::cpu::CONVKIT_ISA
