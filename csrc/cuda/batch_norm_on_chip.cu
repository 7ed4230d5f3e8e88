// Batch normalisation + ReLU, training, where the values of some channels fit into the shared memory of a cluster of blocks:
// forward reads x and writes y, 2 passes over the activation; backward reads x and the gradient of y and writes that of x, 3.
//
// A cluster takes whole channels: columns of memory whose rows are pixels or images. Each of its blocks copies its rows to
// shared memory (cp.async, all of them on their way at once), adds up while the rest arrives, and leaves its sums where the
// others read them through distributed shared memory; every block merges them in the same order, and goes over its rows once
// more. A block alone is a cluster of one, on GPUs before sm_90 too.
#include "batch_norm_relu.cuh"
#include "ptx.cuh"

namespace convkit::cuda {

namespace {

constexpr int kMostThreads = 512, kWidth = 8, kBatches = 4;

template <bool backward, class S> __global__ void __launch_bounds__(kMostThreads) on_chip(Norm<S> a) {
  using T = compute_t<S>;
  constexpr int W = kWidth, kinds = backward ? 5 : 3;
  constexpr Sums what = backward ? Sums::gradient : Sums::moments;
  const OnChipPlan& b = a.plan.chip;
  int threads = blockDim.x, units = b.units, columns = units * W, groups = threads / units, unit = threadIdx.x % units, group = threadIdx.x / units;
  int channels = int(columns / b.values);
  uint32_t rank = ptx::cluster_rank();
  int64_t span = blockIdx.x / b.cluster, column = span * columns + unit * W, first_channel = span * channels;
  int64_t first = rank * b.rows_per_block, last = min(b.rows, first + b.rows_per_block);
  bool working = group < groups && column < b.length;

  // Shared memory: rows of x, and of the gradient; two sums a thread, two a column; what this block says of each channel
  // (mean or sum, squared deviations or product, plain sum); factors of each channel.
  S* kept_x = reinterpret_cast<S*>(dynamic_shared());
  S* kept_grad = kept_x + b.rows_per_block * columns;
  double* of_threads = reinterpret_cast<double*>(kept_x + (backward ? 2 : 1) * b.rows_per_block * columns);
  double *of_columns = of_threads + 2 * threads, *of_block = of_columns + 2 * columns;
  T* factors = reinterpret_cast<T*>(of_block + 3 * channels);

  constexpr int kVectors = W / kVec<S>;
  if (working) {
    int64_t batch = ceil_div(ceil_div(last - first, groups), kBatches) * groups;
#pragma unroll 1
    for (int i = 0; i < kBatches; ++i) {
      for (int64_t row = first + i * batch + group; row < min(last, first + (i + 1) * batch); row += groups) {
        int64_t at = row * b.length + column, to = (row - first) * columns + unit * W;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          ptx::copy_async_16(kept_x + to + v * kVec<S>, a.x + at + v * kVec<S>);
          if (backward) ptx::copy_async_16(kept_grad + to + v * kVec<S>, a.grad + at + v * kVec<S>);
        }
      }
      ptx::copy_async_commit();
    }
  }

  if (backward) {  // while they are on their way
    for (int i = threadIdx.x; i < channels; i += threads) {
      int64_t c = first_channel + i;
      if (c >= a.c) continue;
      factors[i] = a.mean[c], factors[channels + i] = scale_of(a, c, a.var[c]), factors[2 * channels + i] = shift_of(a, c);
    }
    __syncthreads();
  }

  // A shift that all threads of the block use: the channel's first value here.
  auto shift_of_channel = [&](int64_t c) { return usable(widen(a.x[first * b.length + c * b.values])); };
  double total[2][W] = {};
  if (working && first < last) {
    T k[3][W] = {};
#pragma unroll
    for (int i = 0; i < W; ++i) {
      int channel = int((unit * W + i) / b.values);
      if (!backward) k[0][i] = shift_of_channel(first_channel + channel);
#pragma unroll
      for (int kind = 0; kind < 3 && backward; ++kind) k[kind][i] = factors[kind * channels + channel];
    }
    auto add = [&](int64_t from, int64_t to) {
      for (int64_t row = from + group; row < to;) {
        T sum[2][W] = {};
#pragma unroll 4
        for (int step = 0; step < kChain; ++step, row += groups) {
          if (row >= to) break;
          T out[2][W];
          int64_t in = (row - first) * columns + unit * W;
          terms<what, W>(a, kept_x + in, kept_grad + in, row * b.length + column, k, out);
#pragma unroll
          for (int i = 0; i < W; ++i) sum[0][i] += out[0][i], sum[1][i] += out[1][i];
        }
#pragma unroll
        for (int i = 0; i < W; ++i) total[0][i] += double(sum[0][i]), total[1][i] += double(sum[1][i]);
      }
    };
    // The first half as soon as it is there; each thread reads what it has copied itself.
    int64_t half = first + ceil_div(ceil_div(last - first, groups), kBatches) * groups * (kBatches / 2);
    ptx::copy_async_wait<kBatches / 2>();
    add(first, min(last, half));
    ptx::copy_async_wait<0>();
    add(half, last);
  }

  // Sums of the threads of a column, a few lanes each, then of the columns of a channel.
  int sharing = 32;
  while (sharing > groups) sharing /= 2;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    of_threads[2 * threadIdx.x] = total[0][i], of_threads[2 * threadIdx.x + 1] = total[1][i];
    __syncthreads();
    int of = threadIdx.x / sharing, lane = threadIdx.x % sharing;
    double one = 0, two = 0;
    for (int g = lane; g < groups && of < units; g += sharing) one += of_threads[2 * (g * units + of)], two += of_threads[2 * (g * units + of) + 1];
    for (int by = sharing / 2; by > 0; by /= 2) one += __shfl_xor_sync(0xffffffffu, one, by), two += __shfl_xor_sync(0xffffffffu, two, by);
    if (lane == 0 && of < units) of_columns[of * W + i] = one, of_columns[columns + of * W + i] = two;
    __syncthreads();
  }
  int each = int(b.values), lanes = each == 1 ? 1 : 32;
  for (int channel = threadIdx.x / lanes; channel < channels && first_channel + channel < a.c; channel += threads / lanes) {
    double one = 0, two = 0;
    for (int j = threadIdx.x % lanes; j < each; j += lanes) one += of_columns[channel * each + j], two += of_columns[columns + channel * each + j];
    if (lanes == 32) one = warp_sum(one), two = warp_sum(two);
    if (threadIdx.x % lanes == 0 && first < last) {
      double count = double(last - first) * double(each), shift = backward ? 0 : double(shift_of_channel(first_channel + channel));
      finish<what>(one, two, shift, count, of_block + channel, channels);
      of_block[2 * channels + channel] = of_block[channel] * count;
    }
  }
  ptx::cluster_sync();

  for (int i = threadIdx.x; i < channels; i += threads) {
    int64_t c = first_channel + i;
    if (c >= a.c) continue;
    Moments all;
    double sum = 0, product = 0;
    for (int r = 0; r < b.cluster; ++r) {
      int64_t count = min(b.rows, (r + 1) * b.rows_per_block) - r * b.rows_per_block;
      if (count <= 0) break;
      const double* theirs = ptx::map_shared(of_block, uint32_t(r));
      if (backward) sum += theirs[i], product += theirs[channels + i];
      else all.add(double(count) * double(each), theirs[i], theirs[channels + i], theirs[2 * channels + i]);
    }
    if (backward) {
      conclude(a, c, sum, product, rank == 0, factors[3 * channels + i], factors[4 * channels + i]);
    } else {
      T mean = T(all.final_mean()), var = T(all.m2 / all.count);
      if (rank == 0) a.mean[c] = mean, a.var[c] = var;
      factors[i] = mean, factors[channels + i] = scale_of(a, c, var), factors[2 * channels + i] = shift_of(a, c);
    }
  }
  ptx::cluster_sync();  // nobody ends while another reads its sums

  if (!working) return;
  T k[5][W] = {};
#pragma unroll
  for (int i = 0; i < W; ++i) {
    int channel = int((unit * W + i) / b.values);
#pragma unroll
    for (int kind = 0; kind < kinds; ++kind) k[kind][i] = factors[kind * channels + channel];
  }
  for (int64_t row = first + group; row < last; row += groups) {
    int64_t at = row * b.length + column, in = (row - first) * columns + unit * W;
    unsigned bits = backward && a.mask != nullptr ? a.mask[at / 8] : 0u;
    bits = apply<backward, W>(a, kept_x + in, kept_grad + in, at, bits, k);
    if (!backward && a.mask != nullptr) a.mask[at / 8] = uint8_t(bits);
  }
}

template <bool backward> void run(const BatchNormArgs& args, const CudaChannelPlan& plan, Stream stream) {
  const OnChipPlan& b = plan.chip;
  unsigned blocks = unsigned(ceil_div(b.length / kWidth, b.units) * b.cluster);
  with_type(args.shape.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    launch("batch_norm_on_chip", on_chip<backward, S>, {dim3(blocks), dim3(unsigned(b.threads)), b.shared_bytes, stream, unsigned(b.cluster)}, norm_of<S>(args, plan));
  });
}

}  // namespace

#if defined(CONVKIT_EMULATION)
int largest_cluster(const DeviceFacts&) { return emulation::device().largest_cluster; }
#else
int largest_cluster(const DeviceFacts& f) {
  auto* kernel = on_chip<true, float>;
  int found = 1;
  cudaFuncAttributes code;
  // Code made from PTX for earlier GPUs knows no clusters, on whatever GPU it runs. A part of a GPU may take smaller ones.
  if (f.major >= 9 && cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(f.shared_bytes_per_block)) == cudaSuccess) {
    for (int cluster = 8; cluster > 1 && found == 1; cluster /= 2) {  // 8: the most that needs no permission
      int clusters = 0;
      with_launch_config({dim3(unsigned(cluster)), dim3(kMostThreads), f.shared_bytes_per_block, nullptr, unsigned(cluster)}, [&](const cudaLaunchConfig_t& config) {
        if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) found = cluster;
      });
    }
  }
  cudaGetLastError();  // not to be found by the next launch
  return found;
}
#endif

void batch_norm_relu_on_chip(const BatchNormArgs& args, const CudaChannelPlan& plan, Stream stream) { run<false>(args, plan, stream); }
void batch_norm_relu_grad_on_chip(const BatchNormArgs& args, const CudaChannelPlan& plan, Stream stream) { run<true>(args, plan, stream); }

}  // namespace convkit::cuda
