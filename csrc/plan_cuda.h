// The same for GPUs as plan.h for processors: problem + device facts -> kernel, tile, splits and workspace. Pure functions.
#pragma once

#include <cstdint>
#include <string>

#include "arguments.h"
#include "cuda/device.h"
#include "problem.h"

namespace convkit {

enum class CudaKernel { depthwise_nhwc, depthwise_nchw, depthwise_generic, simt };

// A block of depthwise_nhwc takes `lanes` vectors of 16 bytes of channels (a power of two) and a tile of rows x strips of
// the output, a strip being as many neighbouring columns as a thread has accumulators for.
struct DepthwiseNhwcPlan {
  int threads, lanes, rows, strips, strip;
  int in_rows, in_pitch;        // of the source tile; the pitch is odd, so that rows start in different banks
  int64_t tiles_y, tiles_x, channel_blocks;
  int shared_bytes;
};

// A block of depthwise_nchw takes some whole planes, or a band of rows of one; a thread a column of some rows.
struct DepthwiseNchwPlan {
  int64_t planes;               // of a block
  int64_t band_rows, bands;     // rows of the output; one band where a block takes whole planes
  int segment_rows, segments;   // rows of a thread, and how many of those a band has
  int in_elements, out_elements;  // staged in shared memory, of a block (weight gradient: of a plane)
  int shared_bytes;
};

struct CudaConvPlan {
  CudaKernel kernel;
  DepthwiseNhwcPlan nhwc;
  DepthwiseNchwPlan nchw;
  int64_t splits;          // weight gradient: partial sums, added in order
  int64_t workspace_bytes;
  int chain;               // simt: products summed before they are added to a total
};

// `aligned`: source and destination start at multiples of 16 bytes. `least_workspace`: the plan that needs least, for
// when there is not enough memory for the best one.
CudaConvPlan plan_conv_cuda(const ConvProblem&, Pass, const cuda::DeviceFacts&, bool aligned = true, bool least_workspace = false);

// What is done with the values of each channel. `evaluation`: batch norm with statistics that are known.
enum class ChannelWork { sums, forward, backward, evaluation, evaluation_backward };

// How they lie: rows of memory are pixels of all channels; planes, of one channel each; or, where a plane is no whole
// number of vectors and an image is, images.
enum class ChannelRows { pixels, planes, images };

// Forward in 2 passes, backward in 3: a cluster of blocks keeps some channels in shared memory. Rows are pixels or images.
struct OnChipPlan {
  int cluster;                 // blocks of a cluster; 0: not on chip
  int units;                   // vectors of 8 values that a block takes of each row, of whole channels
  int threads;
  int64_t rows, length;        // of memory
  int64_t values;              // of a channel in a row
  int64_t rows_per_block;
  int shared_bytes;
};

// Otherwise sums over pieces of a channel, which a second kernel merges.
struct CudaChannelPlan {
  OnChipPlan chip;
  ChannelRows kind;
  int64_t rows, length;        // of memory
  int units;                   // images: as above
  int64_t steps, values;       // what a piece is so many of: pixels, values of a channel, or images; and values in each
  int64_t pieces, piece_steps;
  int64_t workspace_bytes;
  int multiprocessors;
};

// `aligned` and `least_workspace` as above.
CudaChannelPlan plan_channels_cuda(const ChannelShape&, ChannelWork, const cuda::DeviceFacts&, bool aligned = true, bool least_workspace = false);

// One line for people.
std::string describe(const ConvProblem&, Pass, const cuda::DeviceFacts&, const CudaConvPlan&);
std::string describe(const ChannelShape&, ChannelWork, const cuda::DeviceFacts&, const CudaChannelPlan&);

}  // namespace convkit
