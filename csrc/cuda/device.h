// What the planner and a bug report need to know of a GPU. No torch and no CUDA headers here.
#pragma once

#include <cstdint>

namespace convkit::cuda {

struct DeviceFacts {
  char name[256];
  int major, minor;               // compute capability
  int multiprocessors;
  int64_t shared_bytes_per_block; // with opt-in
  int64_t l2_bytes;
  int largest_cluster;            // blocks: 1 before sm_90; 0 keeps everything off the chip, for tests
};

// Devices the driver shows; 0 where there is no driver.
int device_count();

// Fills `facts`, but for the cluster; returns null, or what the runtime says is wrong.
const char* query_device(int index, DeviceFacts* facts);

// Blocks of the largest cluster that the current device takes of this build's kernels; loads their code.
int largest_cluster(const DeviceFacts&);

}  // namespace convkit::cuda
