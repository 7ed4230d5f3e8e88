// Picks the instruction set once, at the first call.
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace convkit::cpu {

#define CONVKIT_DECLARE(isa) namespace isa { extern const Kernels table; }
#if defined(CONVKIT_HAVE_AVX512)
CONVKIT_DECLARE(avx512)
#endif
#if defined(CONVKIT_HAVE_AVX2)
CONVKIT_DECLARE(avx2)
#endif
#if defined(CONVKIT_HAVE_NEON)
CONVKIT_DECLARE(neon)
#endif
CONVKIT_DECLARE(generic)

namespace {

struct Entry {
  const char* name;
  const Kernels* table;
  bool (*supported)();
  bool bf16_dots = false;
  bool (*preferred)() = [] { return true; };
};

#if defined(CONVKIT_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

const Entry entries[] = {
#if defined(CONVKIT_HAVE_AVX512)
    // The same kernels, which multiply bf16 as it is stored: twice as fast as in float32 on AMD's (Zen 4), half as fast on
    // the Intel Xeon that was measured. By name and not by a clock, as results must not depend on how busy a machine is.
    {"avx512_bf16", &avx512::table, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, true, [] { return bool(__builtin_cpu_is("amd")); }},
    {"avx512", &avx512::table, has_avx512},
#endif
#if defined(CONVKIT_HAVE_AVX2)
    // Every processor with AVX2 and FMA has F16C too.
    {"avx2", &avx2::table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
#if defined(CONVKIT_HAVE_NEON)
    {"neon", &neon::table, [] { return true; }},
#endif
    {"generic", &generic::table, [] { return true; }},
};

std::string names(bool only_available) {
  std::string out;
  for (const Entry& e : entries)
    if (!only_available || e.supported()) out += (out.empty() ? "" : " ") + std::string(e.name);
  return out;
}

const Entry& pick() {
  const char* wanted = std::getenv("CONVKIT_ISA");
  bool any = wanted == nullptr || *wanted == '\0';
  for (const Entry& e : entries)
    if ((any ? e.preferred() : e.name == std::string(wanted)) && e.supported()) return e;
  throw std::runtime_error("CONVKIT_ISA=" + std::string(wanted) + " is not available here; accepted on this machine: " +
                           names(true) + " (compiled in: " + names(false) + "). Unset it to take the best.");
}

const Entry& chosen() {
  static const Entry& entry = pick();
  return entry;
}

}  // namespace

const Kernels& kernels() { return *chosen().table; }
const char* isa() { return chosen().name; }

CpuFacts cpu_facts(int threads) {
  static const int64_t l2_bytes = [] {
    long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? int64_t(size) : int64_t(1) << 20;
  }();
  CpuFacts facts = kernels().facts;
  facts.isa = isa();
  facts.bf16_dots = chosen().bf16_dots;
  facts.l2_bytes = l2_bytes;
  facts.threads = threads;
  return facts;
}

const char* compiled_isas() {
  static const std::string all = names(false);
  return all.c_str();
}

const char* available_isas() {
  static const std::string usable = names(true);
  return usable.c_str();
}

}  // namespace convkit::cpu
