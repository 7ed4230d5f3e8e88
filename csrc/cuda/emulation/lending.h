// The part of the emulator that torch's side calls, without the toolkit's headers: see emulation.h.
#pragma once

#include <cstdint>

namespace convkit::emulation {

// The buffers that the launches of this (host) thread may touch, until take_back(). `name` is for the reports.
void lend(const void* begin, int64_t bytes, bool writable, const char* name);
void take_back();

// Workspaces larger than this can't be had, as on a GPU whose memory is full. A test sets it.
int64_t& most_workspace_bytes();

}  // namespace convkit::emulation
