// The same for GPUs as plan.h for processors: problem + device facts -> kernel, tile, splits and workspace. Pure functions.
#pragma once

#include <cstdint>
#include <string>

#include "arguments.h"
#include "cuda/device.h"
#include "problem.h"

namespace convkit {

enum class CudaKernel { depthwise_nhwc, depthwise_nchw, depthwise_generic, tensor, simt };

// What float32 is multiplied in where tensor cores do it: tf32 (10 bits of fraction), or three products of it that
// together have float32's accuracy.
enum class Float32 : int { full, tf32 };

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

// A tile of the matrix product of a block, and how many warps share it along its rows and columns. A warp has 64 x 64
// sums, 64 x 32 or 32 x 32. For each 32 bytes of depth it reads 64 x 64: 4 KiB of shared memory for 32 instructions of a
// matrix product, 64 x 32: 3 KiB for 16, 32 x 32: 2 KiB for 8; the first alone leaves shared memory (128 bytes a cycle)
// faster than the tensor cores (an instruction in 1.0 to 1.6 cycles of a multiprocessor: estimates, not measured).
struct TensorTile {
  int rows, columns, warp_rows, warp_columns;
  constexpr int threads() const { return 32 * warp_rows * warp_columns; }
  constexpr bool large() const { return rows * columns == 64 * 64 * warp_rows * warp_columns; }  // 64 x 64 a warp
  // Stages are of 64 bytes of depth. Four: three on their way while one is computed, 2,000 cycles or more at two blocks a
  // multiprocessor. The table behind them says where the rows are found.
  static constexpr int stages = 4, depth_bytes = 64;
  constexpr int shared_bytes() const { return stages * (rows + columns) * depth_bytes + rows * 16; }
};
inline constexpr TensorTile kTensorTiles[] = {{128, 128, 2, 2}, {256, 64, 4, 1}, {128, 64, 2, 2}, {64, 64, 2, 2}, {128, 32, 4, 1}, {64, 128, 2, 2}, {256, 128, 4, 2}};
constexpr int kTensorPhases = 16;  // of a strided input gradient: the product of both strides, at most

struct TensorPlan {
  int tile;
  bool exact;               // float32 as three products in tf32
  bool granules;            // the image is copied in 8 bytes (float32: 4), for channels that are no multiple of 16 bytes
  bool arrange_src, arrange_x;  // into channels_last, the channels of a group padded to 16 bytes
  int64_t src_channels, x_channels;  // of a group, padded
  int phases;
  int64_t weight_pitch;     // weight gradient: columns of the partial sums, padded
  // Bytes from the start of the workspace.
  int64_t src_offset, x_offset, weight_offset;
};

struct CudaConvPlan {
  CudaKernel kernel;
  TensorPlan tensor;
  DepthwiseNhwcPlan nhwc;
  DepthwiseNchwPlan nchw;
  int64_t splits;          // weight gradient: partial sums, added in order
  int64_t workspace_bytes;
  int chain;               // simt: products summed before they are added to a total
};

// `aligned`: source and destination start at multiples of 16 bytes. `least_workspace`: the plan that needs least, for
// when there is not enough memory for the best one.
CudaConvPlan plan_conv_cuda(const ConvProblem&, Pass, const cuda::DeviceFacts&, Float32, bool aligned = true, bool least_workspace = false);

// Depthwise + pointwise in one kernel. On tensor cores a block keeps the depthwise result of all channels of 64 pixels in
// shared memory, as the left operand, and takes a part of the column tiles.
struct CudaSeparablePlan {
  bool tensor, exact, arrange_x;
  int tile, column_blocks, shared_bytes;
  int64_t channels;  // padded to 16 bytes
  int64_t x_offset, taps_offset, weight_offset, workspace_bytes;
};
CudaSeparablePlan plan_separable_cuda(const ConvProblem& depthwise, int64_t filters, const cuda::DeviceFacts&, Float32, bool aligned = true, bool least_workspace = false);

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
std::string describe(const ConvProblem& depthwise, int64_t filters, const cuda::DeviceFacts&, const CudaSeparablePlan&);

}  // namespace convkit
