// problem + device facts -> which kernel, tile, blocks and workspace. Pure functions: nothing is measured or remembered.
#pragma once

#include <cstdint>
#include <string>

#include "problem.h"

namespace convkit {

struct CpuFacts {
  const char* isa;
  bool bf16_dots;      // sums of two products of bf16 values in one instruction, at twice the rate of float32's
  int64_t vector_bytes;
  int64_t l2_bytes;  // of a core
  int threads;
  // Register tiles: how many rows go with 1, 2, 3, 4 vectors of columns (0: that width is not compiled).
  int rows_for_vectors[5];
};

enum class ConvKernel { rows, planes, pointwise, grouped, outer, depthwise, winograd };

// Output channels of a register tile whose lanes are pixels, and of a group up to which they are.
constexpr int kPlanesChannels = 8;

// A piece of the workspace, in bytes from its start. Pieces are cache-line aligned.
struct Piece {
  int64_t offset = 0, bytes = 0;
};

// Forward, input gradient and transposed convolution: every output pixel is a row of a matrix product whose operand
// rows are gathered through a table of pointers (indirect convolution, Dukhan 2019, arXiv:1907.02129).
struct RowsPlan {
  int64_t images, src_h, src_w, src_c, dst_h, dst_w, dst_c;
  bool input_grad;          // source pixel of (dst pixel, tap): divide by the stride instead of multiplying
  bool dots;                // of bf16 values as they are stored, two at a time
  bool merge_taps;          // few channels: the taps of a filter row and their channels are one run of a padded copy
  bool stage_src, stage_dst;  // through a channels-last copy in the arithmetic's type, a few images at a time
  bool blocks_dst;          // the copy of the output is a task's own: its pixels are neighbours in the output
  bool across_images;       // a tile takes the same pixel of many images, so that all its rows have the same taps in the padding
  bool stream;              // write past the caches
  int64_t staged_h, staged_w;  // size of a staged source image (padded when merge_taps)
  int64_t taps, depth;      // pointers a row, and channels behind each
  int64_t group_columns;    // output channels of a group
  int vectors, rows;        // register tile: rows x (vectors * lanes)
  int64_t column_tiles;     // of a group
  int64_t chain;            // products summed before they are added to a total
  int64_t images_per_chunk;
  int64_t tiles_per_block;  // row tiles whose pointer table a task makes at once
  Piece panels, zeros, src, dst, tables;
  int64_t table_bytes;      // of one thread
  int64_t block_bytes;      // of one thread, in dst: the copy of a block's columns
};

// Forward and input gradient with few channels a group: through a copy in planes, vectors of pixels.
struct PlanesPlan {
  bool input_grad;
  bool dots;                // of pairs of channels of bf16
  int64_t rows_per_task;    // of the output
  int64_t bundle;           // groups copied together, so that a copy has a vector of channels to work with
  int64_t rows, left;       // of a staged plane: rows, and zeros before column 0
  int64_t columns;          // of a staged row, for each remainder of the column modulo the forward stride
  int64_t outputs;          // of a row, for each phase of the input gradient: whole vectors
  bool stream;              // write past the caches
  int64_t chain;            // products summed before they are added to a total
  Piece weights, scratch;
  int64_t scratch_bytes;    // of one thread
};

// 1x1 filters and contiguous tensors, forward and input gradient: filters times panels of pixels.
struct PointwisePlan {
  bool input_grad;
  bool dots;                // of pairs of channels of bf16
  int64_t tasks;            // of a group: each copies its pixels as panels, and multiplies them with all filters
  int64_t pixels_per_task;  // at most
  bool stream;              // write past the caches
  int64_t chain;            // products summed before they are added to a total
  Piece weights, scratch;
  int64_t scratch_bytes;    // of one thread
};

// Forward and input gradient, groups of few channels to as many: vectors of channels, of one group or more.
struct GroupedPlan {
  bool input_grad;
  int64_t stride;           // 1 or 2
  int64_t channels;         // copied together: whole lines and whole groups
  int64_t tile;             // pixels of a register tile
  int64_t top, left;        // rows that taps reach above output 0's place, and columns of zeros before the first of the source
  bool odd;                 // input gradient of stride 2: no source column stands where the first tap of output 0 does
  int64_t reach;            // rows from the first tap to the last
  int64_t rows_per_task;    // of the output
  int64_t rows, columns;    // of the copy
  bool stream;              // write past the caches
  Piece weights, scratch;
  int64_t scratch_bytes;    // of one thread: the copy, and a row of outputs

  // At most, for so many rows of the output.
  int64_t source_rows(int64_t n) const { return input_grad ? (n - 1 + reach) / stride + 1 : (n - 1) * stride + reach + 1; }
};

// Weight gradient: sums of outer products of output-gradient pixels and input pixels, tile by tile of the weight. Rows of
// a tile are filters and its columns channels; with few channels it is the other way round, so that the vectors are full.
struct OuterPlan {
  ConvProblem problem;      // what is computed; flat, or as it was; with half its images where they are paired
  bool dots;                // of bf16, of pairs of pixels: one of the first half of the images, one of the second
  bool flat;                // 1x1 filters: the pixels that they meet, of all images, are one column
  bool merge_taps;          // the taps of a filter row and their channels are one run of a padded copy of x
  bool exchange;            // values of x are rows and filters columns, of the gradient where it lies if that may be
  bool stage_grad;
  int64_t staged_w;
  int64_t x_pixel, grad_pixel;  // values from pixel to pixel, of copies where there are some
  int64_t taps, depth;      // depth: channels (times filter columns when merge_taps) behind each tap
  int64_t row_values, column_values, columns_padded;  // of a group
  int vectors, rows;
  int64_t row_tiles, column_tiles;
  int64_t images_per_block, rows_per_block;
  int64_t splits;           // partial sums over parts of the blocks, added in order
  int64_t parts;            // tasks that share the tiles of a split
  int64_t chain;            // pixels summed before they are added to the sums in memory
  int64_t sums_of_split;    // elements
  Piece sums, scratch;
  int64_t x_elements;       // of a task's copy of x; the gradient's follows
  int64_t scratch_bytes;    // of one thread
};

// Depthwise, all three passes: a vector of channels at a time.
struct DepthwisePlan {
  bool stage;               // through a padded channels-last copy (contiguous layout)
  bool stream;              // write past the caches
  int64_t channel_block;    // channels a task takes
  int64_t rows_per_task;
  int64_t splits;           // weight gradient: partial sums, added in order
  int64_t staged_first, staged_last;  // columns of a staged source, zeros beyond the image's own
  int64_t staged_elements;  // of a task's staged source; the outputs (or gradients) follow
  Piece weights, partial, scratch;
  int64_t lines_bytes, scratch_bytes;  // of one thread: the table of source lines, and all with it
};

// Channels, and filters, of a block of what Winograd's transforms write.
constexpr int kWinogradWidth = 64;
// Floats of a square of them. One line more, so that the same row of all positions does not fall into the same few sets of a cache.
constexpr int64_t kWinogradPanel = kWinogradWidth * kWinogradWidth + 16;

// Pixels along an edge of a tile of the source, for filters of 2 to 5 taps along an edge; of the output, tile + 1 - taps.
constexpr int winograd_tile(int taps) { return taps <= 3 ? 6 : 8; }

// Winograd's F(5x5, 2x2), F(4x4, 3x3), F(5x5, 4x4) or F(4x4, 5x5), all three passes. With stride s, the s x s pixels that it
// steps over are channels of one pixel, and the filter takes every s-th tap for each: one of stride 1 with ceil(r / s) taps.
struct WinogradPlan {
  bool input_grad;
  int taps, tile, outputs;      // along an edge, of the filter as it is computed, and of a tile of source and output
  int64_t stride;               // of the convolution; below, its input means the one of more channels and fewer pixels
  int64_t src_h, src_w, src_c;  // what is cut into tiles of the source: the input, or y's gradient when input_grad
  int64_t dst_h, dst_w, dst_c;  // what is cut into tiles of the output; the columns of the products (weight gradient: rows)
  int64_t pad_top, pad_left;    // of the source; negative where its first pixels are not used. Spread: of the convolution
  int64_t first_top, first_left;  // rows and columns of padding in the first pixel of the input, less than the stride
  bool spread;                  // input gradient: the source is cut into tiles of outputs, and what they come to is added up
  int64_t image_groups;         // spread: groups of an image, which is one task's; else 1
  int64_t tiles_h, tiles_w, tiles;
  int64_t depth_blocks, column_blocks;  // of src_c, dst_c
  int64_t groups;               // of tiles: rows of a register tile
  bool shared_filters;          // transformed once for all; otherwise by each task, and the source once for all
  int64_t groups_per_chunk;     // tiles whose transformed source lies in memory at once
  int64_t tile_blocks;          // groups of a chunk go to tasks in so many parts
  bool streaming;               // the output is larger than the caches
  int64_t tiles_at_once;        // weight gradient: tiles between two looks at the sums
  int64_t splits;               // weight gradient: partial sums over parts of the tiles, added in order
  Piece weight, filters, source, sums, scratch;  // weight: with a stride, as it is computed, or its gradient
  int64_t scratch_bytes;        // of one thread
};

struct ConvPlan {
  ConvKernel kernel;
  RowsPlan rows;
  PlanesPlan planes;
  PointwisePlan pointwise;
  GroupedPlan grouped;
  OuterPlan outer;
  DepthwisePlan depthwise;
  WinogradPlan winograd;
  int64_t workspace_bytes;
};

// Whether to write a tensor of so many bytes past the caches: where it does not stay in them anyway.
bool streams(int64_t bytes, const CpuFacts&);

// Winograd's method has larger rounding errors. `possible`, wherever it is defined, is for tests.
enum class Winograd : int { never, faster, possible };

ConvPlan plan_conv(const ConvProblem&, Pass, const CpuFacts&, Winograd);

// One line for people: `fprop n8c64… -> rows avx512 7x64, …`.
std::string describe(const ConvProblem&, Pass, const CpuFacts&, const ConvPlan&);

}  // namespace convkit
