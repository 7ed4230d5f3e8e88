// The CPU kernels: one table of functions for each instruction set, and the arguments they take.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "../plan.h"
#include "../problem.h"
#include "pool.h"

namespace convkit::cpu {

struct ConvArgs : convkit::ConvArgs {
  ConvPlan plan;
};

struct Kernels {
  CpuFacts facts;  // of the instruction set; cpu_facts() adds what only the machine knows
  void (*conv)(const ConvArgs&, Pass, const Pool&);
  int64_t (*separable_workspace)(const SeparableArgs&, const Pool&);
  void (*separable)(const SeparableArgs&, const Pool&);
  int64_t (*channel_workspace)(const ChannelShape&, int threads);
  void (*channel_sum)(const ChannelShape&, const void* src, void* sums, void* workspace, const Pool&);
  void (*batch_norm_relu)(const BatchNormArgs&, const Pool&);
  void (*batch_norm_relu_grad)(const BatchNormArgs&, const Pool&);
  void (*im2col)(const ColumnsArgs&, const Pool&);
  void (*col2im)(const ColumnsArgs&, const Pool&);
  int64_t (*max_pool_workspace)(const MaxPoolArgs&, int threads);
  void (*max_pool)(const MaxPoolArgs&, void* workspace, const Pool&);
  void (*max_pool_grad)(const MaxPoolArgs&, void* workspace, const Pool&);
  void (*max_pool_pick)(const MaxPoolArgs&, const Pool&);
};

// The table in force: the best this machine has, or the one that CONVKIT_ISA names. Throws std::runtime_error for a
// name that is unknown, not compiled in or not supported by this processor.
const Kernels& kernels();
const char* isa();

// What plans are made from: the table in force, this machine's caches, and the threads that the caller has.
CpuFacts cpu_facts(int threads);

// Instruction sets compiled in / usable on this machine, separated by spaces, the most capable first.
const char* compiled_isas();
const char* available_isas();

}  // namespace convkit::cpu
