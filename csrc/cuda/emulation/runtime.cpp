// The emulator's threads, barriers and checks: see emulation.h. Compiled without instrumentation.
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation.h"

// The module's own zero-initialised data: where `__shared__` arrays stand, which g++ sees as static.
extern "C" {
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
}

namespace convkit::emulation {

thread_local Thread* self = nullptr;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kMostThreads = 1024, kMostCluster = 16;
constexpr size_t kArena = 256 << 10;  // address space of a block's shared memory
constexpr int kGranule = 2;           // bytes that share a shadow

// ---- switching between fibres ------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(CONVKIT_EMULATION_UCONTEXT)
struct Context {
  void* stack = nullptr;
};
extern "C" void convkit_emulation_switch(Context* from, Context* to);
asm(R"(
.text
.type convkit_emulation_switch, @function
convkit_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size convkit_emulation_switch, .-convkit_emulation_switch
)");
void switch_context(Context* from, Context* to) { convkit_emulation_switch(from, to); }
void start_context(Context* c, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  top[0] = reinterpret_cast<void*>(entry);  // popped by ret, which leaves the stack as a call would
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  c->stack = top - 6;
}
#else
struct Context {
  ucontext_t of;
};
void switch_context(Context* from, Context* to) { swapcontext(&from->of, &to->of); }
void start_context(Context* c, char* stack, void (*entry)()) {
  getcontext(&c->of);
  c->of.uc_stack.ss_sp = stack;
  c->of.uc_stack.ss_size = kStack;
  c->of.uc_link = nullptr;
  makecontext(&c->of, entry, 0);
}
#endif

// ---- what a launch consists of -----------------------------------------------------------------------------------------

struct Buffer {
  uintptr_t begin;
  uint64_t bytes;
  bool writable;
  const char* name;
};

// Who last wrote and read two bytes of shared memory, and when. Time is a count of synchronisations.
struct Shadow {
  uint32_t written, read;
  uint16_t writer, reader;  // threads of the cluster
  bool pending;             // a cp.async is on its way
  bool shared_reading;      // more than one thread read at `read`
  bool across_warps;        // and not all of one warp
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
  const void* where;
};

struct Fibre;
struct Meeting {
  uint32_t mask = 0, arrived = 0, left = 0;
  const char* kind = nullptr;
  const void* where = nullptr;
  bool done = false;
  unsigned char in[32][kPayload], out[32][kPayload];
};

struct Warp {
  uint32_t synchronised = 0;
  std::vector<std::unique_ptr<Meeting>> meetings, spare;
};

struct Block;
struct Fibre : Thread {
  Context context;
  char* stack;
  Block* owner;
  Warp* warp;
  uint16_t number;  // in the cluster
  enum { ready, at_barrier, at_cluster_barrier, in_warp, finished } state;
  const char* waits_in;
  const void* waits_at;
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;
  int barrier_result;
};

struct Block {
  uint32_t synchronised, started;
  int live, waiting, votes, running;
  std::vector<Fibre*> fibres;
};

struct State {
  LaunchFacts facts;
  void (*body)(void*);
  void* arg;
  Context scheduler;
  std::vector<Buffer> buffers;
  std::vector<Fibre*> fibres;  // kept from launch to launch with their stacks
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  Fibre* current = nullptr;
  int cluster_live = 0, cluster_waiting = 0;
  uint32_t now = 1, cluster_synchronised = 0, started = 0;
  unsigned char* arenas = nullptr;
  Shadow* shadow = nullptr;       // of the arenas
  std::vector<Shadow> statics;    // of the module's .bss
  std::string failure;
  Counters counts{};
};

std::mutex one_launch_at_a_time;
State state;
thread_local std::vector<Buffer> lent;

Fibre* me() { return static_cast<Fibre*>(self); }

// ---- reports -----------------------------------------------------------------------------------------------------------

std::string run_command(const std::string& command) {
  std::string out;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[512];
    while (fgets(line, sizeof line, pipe) != nullptr) out += line;
    pclose(pipe);
  }
  return out;
}

struct Place {
  std::string function, line;
};

// The frames (innermost first, inlined ones included) that stand at an address of this module.
std::vector<Place> places(const void* at) {
  Dl_info info;
  if (dladdr(at, &info) == 0 || info.dli_fname == nullptr) return {};
  char offset[32];
  std::snprintf(offset, sizeof offset, "0x%zx", size_t(static_cast<const char*>(at) - static_cast<const char*>(info.dli_fbase)));
  std::string text = run_command("addr2line -C -f -i -e '" + std::string(info.dli_fname) + "' " + offset + " 2>/dev/null");
  std::vector<Place> out;
  for (size_t start = 0; start < text.size();) {
    size_t a = text.find('\n', start), b = a == std::string::npos ? a : text.find('\n', a + 1);
    if (b == std::string::npos) break;
    Place p{text.substr(start, a - start), text.substr(a + 1, b - a - 1)};
    p.line = p.line.substr(0, p.line.find(" ("));
    size_t slash = p.line.rfind('/');
    if (slash != std::string::npos) p.line = p.line.substr(slash + 1);
    out.push_back(p);
    start = b + 1;
  }
  return out;
}

std::string place(const void* return_address) {
  std::string out;
  for (const Place& p : places(static_cast<const char*>(return_address) - 1)) {
    bool ours = p.line.find(".cu:") != std::string::npos || p.line.find(".cuh:") != std::string::npos || p.line.find(".h:") != std::string::npos;
    if (!ours || p.line.rfind("emulation.h", 0) == 0 || p.line.find("cuda_") == 0) continue;
    out += (out.empty() ? "" : ", called at ") + p.line;
    if (p.line.find(".cu:") != std::string::npos) break;
  }
  std::string frames;
  for (const Place& p : places(static_cast<const char*>(return_address) - 1)) frames += " " + p.line;
  return out.empty() ? "an unknown line (addr2line says:" + frames + ")" : out;
}

std::string triple(const uint3& v) { return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")"; }
std::string who(const Fibre& f) { return "block " + triple(f.block) + ", thread " + triple(f.thread); }

std::string kernel_name() {
  auto found = places(state.facts.kernel);
  return found.empty() ? "an unnamed kernel" : found.back().function.substr(0, 200);
}

// Ends the launch: no fibre runs again. Called on a fibre's stack.
[[noreturn]] void stop(std::string what, const void* where) {
  Fibre* f = state.current;
  self = nullptr;
  state.failure = what + "; " + who(*f) + ", at " + place(where) + ", in " + kernel_name();
  switch_context(&f->context, &state.scheduler);
  std::abort();
}

void yield() {
  Fibre* f = me();
  self = nullptr;
  switch_context(&f->context, &state.scheduler);
  self = f;
}

// ---- accesses ----------------------------------------------------------------------------------------------------------

// Is what thread `other` of the cluster did at `time` ordered before what this one does now? A synchronisation of a block
// counts for its warps, and one of the cluster for both.
inline bool ordered(const Fibre& f, uint16_t other, uint32_t time) {
  if (other == f.number) return true;
  const Fibre& o = *state.fibres[other];
  return time < (o.warp == f.warp ? f.warp->synchronised : o.owner == f.owner ? f.owner->synchronised : state.cluster_synchronised);
}

// What is written to, by whom and when, and that it may be; what is read, likewise.
void check_write(Fibre& f, Shadow& s, bool async, const void* where) {
  bool initialised = s.written >= state.started;
  if (initialised && !ordered(f, s.writer, s.written))
    stop("a write to shared memory that " + who(*state.fibres[s.writer]) + " has written since the last barrier", where);
  if (initialised && s.pending && !async) stop("a write to shared memory that a cp.async is still copying to (no wait has completed it)", where);
  if (s.read >= state.started) {
    const Fibre& r = *state.fibres[s.reader];
    uint32_t since = r.owner != f.owner ? state.cluster_synchronised : s.across_warps || r.warp != f.warp ? f.owner->synchronised : f.warp->synchronised;
    bool mine = s.reader == f.number && !s.shared_reading;
    if (!mine && s.read >= since) stop("a write to shared memory that " + who(r) + " has read since the last barrier", where);
  }
  s.written = state.now;
  s.writer = f.number;
  s.pending = async;
}

inline void check_read(Fibre& f, Shadow& s, const void* where) {
  if (s.written < state.started) stop("a read of shared memory that nothing in this block has written", where);
  // A barrier of this block orders only what its own threads wrote.
  bool recent = s.written >= f.owner->synchronised || state.facts.cluster > 1;
  if (s.writer != f.number && recent && !ordered(f, s.writer, s.written))
    stop("a read of shared memory that " + who(*state.fibres[s.writer]) + " has written since the last barrier", where);
  if (s.pending) stop("a read of shared memory that a cp.async is still copying to (no wait has completed it)", where);
  if (s.read < f.owner->synchronised) {
    s.shared_reading = s.across_warps = false;
  } else if (s.reader != f.number) {
    if (state.fibres[s.reader]->warp != f.warp) s.across_warps = s.shared_reading = true;
    else if (s.read >= f.warp->synchronised) s.shared_reading = true;
    else s.shared_reading = s.across_warps;  // the earlier reader of this warp is ordered before what follows
  }
  s.reader = f.number;
  s.read = state.now;
}

void check_shared(Fibre& f, Shadow* s, int64_t granules, bool write, bool async, const void* where) {
  if (write)
    for (int64_t i = 0; i < granules; ++i) check_write(f, s[i], async, where);
  else
    for (int64_t i = 0; i < granules; ++i) check_read(f, s[i], where);
}

void access(Fibre& f, uintptr_t at, uint64_t bytes, bool write, bool async, const void* where) {
  ++state.counts.accesses;
  uintptr_t arenas = reinterpret_cast<uintptr_t>(state.arenas);
  if (at - arenas < kArena * kMostCluster) {
    size_t arena = (at - arenas) / kArena, offset = (at - arenas) % kArena;
    if (arena >= state.blocks.size() || int64_t(offset + bytes) > f.shared_bytes)
      stop(std::string(write ? "a write of " : "a read of ") + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of shared memory, which has " +
               std::to_string(f.shared_bytes), where);
    if (state.blocks[arena].running == 0) stop("an access to shared memory of a block that has ended", where);
    size_t first = (at - arenas) / kGranule, last = (at - arenas + bytes - 1) / kGranule;
    return check_shared(f, state.shadow + first, int64_t(last - first + 1), write, async, where);
  }
  for (const Buffer& b : state.buffers) {
    uint64_t offset = at - b.begin;
    if (offset >= b.bytes || bytes > b.bytes - offset) continue;
    if (write && !b.writable) stop("a write to " + std::string(b.name) + ", which is only read", where);
    return;
  }
  uintptr_t statics = reinterpret_cast<uintptr_t>(__bss_start), end = reinterpret_cast<uintptr_t>(_end);
  if (at >= statics && at < end) {
    if (state.facts.cluster > 1) stop("a static __shared__ array in a cluster: only dynamic shared memory is emulated there", where);
    size_t first = (at - statics) / kGranule, last = (at - statics + bytes - 1) / kGranule;
    return check_shared(f, state.statics.data() + first, int64_t(last - first + 1), write, async, where);
  }
  uintptr_t arguments = reinterpret_cast<uintptr_t>(state.facts.arguments);
  if (!write && at - arguments < uint64_t(state.facts.argument_bytes)) return;
  // The nearest buffer is most likely the one that was meant.
  std::string nearest = "no buffer was lent to this launch";
  uint64_t distance = UINT64_MAX;
  for (const Buffer& b : state.buffers) {
    uint64_t d = at < b.begin ? b.begin - at : at - b.begin - b.bytes + bytes;
    if (d >= distance) continue;
    distance = d;
    nearest = at < b.begin ? std::to_string(b.begin - at) + " bytes before the beginning of " : std::to_string(at + bytes - b.begin - b.bytes) + " bytes beyond the end of ";
    nearest += std::string(b.name) + " (" + std::to_string(b.bytes) + " bytes)";
  }
  stop(std::string(write ? "a write of " : "a read of ") + std::to_string(bytes) + " bytes out of bounds: " + nearest, where);
}

inline void instrumented(const void* p, uint64_t bytes, bool write, const void* where, bool aligned = false) {
  Fibre* f = me();
  if (f == nullptr) return;
  uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at - reinterpret_cast<uintptr_t>(f->stack) < kStack) return;
  if (at - reinterpret_cast<uintptr_t>(f) < sizeof(Fibre) || p == &self) return;  // threadIdx and the like
  if (aligned && at % bytes != 0) stop(std::string(write ? "a write of " : "a read of ") + std::to_string(bytes) + " bytes that is not aligned to them", where);
  access(*f, at, bytes, write, false, where);
}

// ---- threads -----------------------------------------------------------------------------------------------------------

// Shared memory is gone with its block's last thread: only a barrier of the cluster keeps it until others have been there.
void end_block(const Fibre& last) {
  const Shadow* s = state.shadow + (last.shared - state.arenas) / kGranule;
  for (int64_t i = 0; i * kGranule < last.shared_bytes; ++i)
    for (auto [other, time] : {std::pair{s[i].reader, s[i].read}, {s[i].writer, s[i].written}})
      if (time >= state.cluster_synchronised && state.fibres[other]->owner != last.owner)
        stop("the block may end before " + who(*state.fibres[other]) + " has used its shared memory: no barrier of the cluster follows",
             static_cast<const char*>(state.facts.kernel) + 1);
}

void entry() {
  Fibre* f = state.current;
  self = f;
  state.body(state.arg);
  if (!f->uncommitted.empty()) stop("the thread ends with a cp.async that it has not waited for", f->uncommitted.back().where);
  for (const auto& group : f->groups)
    if (!group.empty()) stop("the thread ends with a cp.async that it has not waited for", group.back().where);
  f->state = Fibre::finished;
  if (--f->owner->running == 0 && state.facts.cluster > 1) end_block(*f);
  self = nullptr;
  switch_context(&f->context, &state.scheduler);
  std::abort();
}

void release_block(Block& b) {
  b.synchronised = ++state.now;
  for (Fibre* f : b.fibres) {
    f->warp->synchronised = state.now;
    f->barrier_result = b.votes;
    f->state = Fibre::ready;
  }
  b.waiting = b.votes = 0;
}

std::string same_line_or_both(const void* a, const void* b) {
  static std::set<std::pair<const void*, const void*>> same;
  if (a == b || same.count({a, b}) > 0) return "";
  std::string first = place(a), second = place(b);  // one barrier of the source may have become two calls
  if (first != second) return first + " and " + second;
  same.insert({a, b});
  return "";
}

// Nobody can go on: some wait for threads that have ended, or in different places.
std::string describe_deadlock(const std::vector<Fibre*>& all) {
  const Fibre *waiting = nullptr, *other = nullptr;
  for (const Fibre* f : all)
    if (f->state != Fibre::finished && waiting == nullptr) waiting = f;
  int same = 0, ended = 0, elsewhere = 0;
  for (const Fibre* f : all) {
    if (f->state == Fibre::finished) ++ended;
    else if (f->waits_in == waiting->waits_in && f->waits_at == waiting->waits_at) ++same;
    else ++elsewhere, other = other == nullptr ? f : other;
  }
  std::string out = std::string(waiting->waits_in) + " is not reached by all threads: " + std::to_string(same) + " wait in it";
  if (ended > 0) out += ", " + std::to_string(ended) + " have ended";
  if (elsewhere > 0)
    out += ", " + std::to_string(elsewhere) + " wait elsewhere (" + who(*other) + " in " + other->waits_in + " at " + place(other->waits_at) + ")";
  return out + "; " + who(*waiting) + ", at " + place(waiting->waits_at) + ", in " + kernel_name();
}

void check_launch(const LaunchFacts& l) {
  auto refuse = [&](const std::string& why) { throw std::runtime_error("emulation: impossible launch of " + kernel_name() + ": " + why); };
  int64_t threads = int64_t(l.block.x) * l.block.y * l.block.z;
  if (threads < 1 || threads > kMostThreads) refuse(std::to_string(threads) + " threads a block; 1 to 1024 are possible");
  if (l.block.z > 64) refuse("a block of depth " + std::to_string(l.block.z) + "; at most 64 are possible");
  if (l.grid.x < 1 || l.grid.y < 1 || l.grid.z < 1 || l.grid.x > INT32_MAX || l.grid.y > 65535 || l.grid.z > 65535)
    refuse("a grid of " + std::to_string(l.grid.x) + " x " + std::to_string(l.grid.y) + " x " + std::to_string(l.grid.z) + "; 1 to 2147483647 x 65535 x 65535 are possible");
  if (l.shared_bytes < 0 || l.shared_bytes > device().shared_bytes_per_block)
    refuse(std::to_string(l.shared_bytes) + " bytes of shared memory; the device has " + std::to_string(device().shared_bytes_per_block));
  if (l.cluster < 1 || l.cluster > 8 || l.grid.x % l.cluster != 0) refuse("a grid of " + std::to_string(l.grid.x) + " in clusters of " + std::to_string(l.cluster) + "; at most 8, and a divisor");
  if (l.cluster > 1 && device().major < 9) refuse("clusters need compute capability 9.0");
  if (l.argument_bytes > 4096) refuse(std::to_string(l.argument_bytes) + " bytes of arguments; 4096 are possible");
}

void prepare_memory() {
  auto reserve = [](size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulation: out of memory");
    return static_cast<unsigned char*>(p);
  };
  if (state.arenas == nullptr) {
    state.arenas = reserve(kArena * kMostCluster);
    state.shadow = reinterpret_cast<Shadow*>(reserve(kArena * kMostCluster / kGranule * sizeof(Shadow)));
    state.statics.resize(size_t(_end - __bss_start) / kGranule + 1);
  }
}

void make_fibres(int count) {
  while (int(state.fibres.size()) < count) {
    Fibre* f = new Fibre;
    f->stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (f->stack == MAP_FAILED) throw std::runtime_error("emulation: out of memory");
    state.fibres.push_back(f);
  }
}

// Runs the blocks of one cluster to their end.
void run_cluster(uint64_t first_block) {
  const LaunchFacts& l = state.facts;
  int threads = int(l.block.x * l.block.y * l.block.z), warps = (threads + 31) / 32, cluster = int(l.cluster);
  make_fibres(threads * cluster);
  state.warps.resize(warps * cluster);
  state.blocks.resize(cluster);
  ++state.now;
  state.started = state.cluster_synchronised = state.now;
  state.cluster_live = threads * cluster;
  state.cluster_waiting = 0;
  std::vector<Fibre*> all;
  for (Warp& w : state.warps) {
    w.synchronised = state.now;
    w.meetings.clear();
  }
  for (int rank = 0; rank < cluster; ++rank) {
    Block& b = state.blocks[rank];
    b.synchronised = b.started = state.now;
    b.live = b.running = threads, b.waiting = b.votes = 0;
    b.fibres.clear();
    uint64_t index = first_block + rank;
    for (int t = 0; t < threads; ++t) {
      int number = rank * threads + t;
      Fibre& f = *state.fibres[number];
      f.thread = {uint32_t(t) % l.block.x, uint32_t(t) / l.block.x % l.block.y, uint32_t(t) / (l.block.x * l.block.y)};
      f.block = {uint32_t(index % l.grid.x), uint32_t(index / l.grid.x % l.grid.y), uint32_t(index / l.grid.x / l.grid.y)};
      f.block_size = l.block, f.grid = l.grid;
      f.lane = t % 32, f.cluster_rank = rank, f.cluster_size = cluster;
      f.shared = state.arenas + rank * kArena, f.shared_bytes = l.shared_bytes;
      f.owner = &b, f.warp = &state.warps[rank * warps + t / 32], f.number = uint16_t(number);
      f.state = Fibre::ready;
      f.uncommitted.clear(), f.groups.clear();
      b.fibres.push_back(&f);
      all.push_back(&f);
      start_context(&f.context, f.stack, entry);
    }
  }
  int live = int(all.size());
  while (live > 0) {
    bool progress = false;
    for (Fibre* f : all) {
      if (f->state != Fibre::ready) continue;
      progress = true;
      state.current = f;
      switch_context(&state.scheduler, &f->context);
      if (!state.failure.empty()) return;
      if (f->state == Fibre::finished) --live;
    }
    if (!progress) {
      state.failure = describe_deadlock(all);
      return;
    }
  }
}

}  // namespace

Device& device() {
  static Device d;
  return d;
}

void lend(const void* begin, int64_t bytes, bool writable, const char* name) {
  if (bytes > 0) lent.push_back({reinterpret_cast<uintptr_t>(begin), uint64_t(bytes), writable, name});
}
void take_back() { lent.clear(); }
int64_t& most_workspace_bytes() {
  static int64_t bytes = INT64_MAX;
  return bytes;
}
Counters counters() { return state.counts; }

void fail(const char* what) { stop(what, __builtin_return_address(0)); }

__attribute__((noinline)) int barrier(int vote) {
  Fibre* f = me();
  Block& b = *f->owner;
  f->waits_in = "__syncthreads()", f->waits_at = __builtin_return_address(0);
  if (b.waiting > 0) {
    // Threads of one warp must wait in one and the same barrier.
    size_t first = size_t(f->number) % b.fibres.size() / 32 * 32;
    for (size_t i = first; i < std::min(first + 32, b.fibres.size()); ++i)
      if (const Fibre* o = b.fibres[i]; o->state == Fibre::at_barrier) {
        std::string lines = same_line_or_both(o->waits_at, f->waits_at);
        if (!lines.empty()) stop("threads of one warp wait in different barriers: " + lines, f->waits_at);
        break;
      }
  }
  b.votes += vote;
  if (++b.waiting == b.live) {
    release_block(b);
    return f->barrier_result;
  }
  f->state = Fibre::at_barrier;
  yield();
  return f->barrier_result;
}

__attribute__((noinline)) void cluster_barrier() {
  Fibre* f = me();
  f->waits_in = "cluster_sync()", f->waits_at = __builtin_return_address(0);
  if (++state.cluster_waiting == state.cluster_live) {
    ++state.now;
    state.cluster_synchronised = state.now;
    state.cluster_waiting = 0;
    for (Block& b : state.blocks) {
      b.synchronised = state.now;
      for (Fibre* o : b.fibres) o->state = Fibre::ready, o->warp->synchronised = state.now;
    }
    return;
  }
  f->state = Fibre::at_cluster_barrier;
  yield();
}

void* map_shared(const void* mine, uint32_t rank) {
  Fibre* f = me();
  size_t offset = size_t(static_cast<const unsigned char*>(mine) - f->shared);
  if (int64_t(offset) > f->shared_bytes || rank >= f->cluster_size) stop("map_shared of what is not in the cluster's shared memory", __builtin_return_address(0));
  return state.arenas + rank * kArena + offset;
}

__attribute__((noinline)) void meet(const char* kind, uint32_t mask, const void* in, int in_bytes, void* out, int out_bytes, Finish finish) {
  Fibre* f = me();
  const void* where = __builtin_return_address(0);
  if (!(mask >> f->lane & 1)) stop(std::string(kind) + " with a mask that leaves out the calling lane", where);
  int threads = int(f->owner->fibres.size()), base = f->number / 32 * 32;
  {
    int in_block = f->number % threads, warp_first = in_block / 32 * 32;
    base = f->number - in_block + warp_first;
    int lanes = std::min(32, threads - warp_first);
    if (lanes < 32) mask &= (1u << lanes) - 1;  // the full mask of a last, partial warp
  }
  Warp& w = *f->warp;
  Meeting* m = nullptr;
  for (auto& open : w.meetings)
    if (open->mask == mask && !open->done && !(open->arrived >> f->lane & 1)) m = open.get();
  if (m == nullptr) {
    if (w.spare.empty()) w.spare.push_back(std::make_unique<Meeting>());
    w.meetings.push_back(std::move(w.spare.back()));
    w.spare.pop_back();
    m = w.meetings.back().get();
    m->mask = mask, m->arrived = m->left = 0, m->kind = kind, m->where = where, m->done = false;
  }
  if (m->kind != kind && std::strcmp(m->kind, kind) != 0) stop(std::string("lanes of one warp meet in different instructions, ") + m->kind + " and " + kind, where);
  std::memcpy(m->in[f->lane], in, size_t(in_bytes));
  m->arrived |= 1u << f->lane;
  f->waits_in = kind, f->waits_at = where;
  if (m->arrived == mask) {
    self = nullptr;  // `finish` is the emulator's own code, and not to be watched
    if (finish != nullptr) finish(mask, m->in, m->out);
    self = f;
    m->done = true;
    if (finish == nullptr) {
      ++state.now;
      w.synchronised = state.now;
    }
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) state.fibres[base + lane]->state = Fibre::ready;
  } else {
    f->state = Fibre::in_warp;
    yield();
  }
  std::memcpy(out, m->out[f->lane], size_t(out_bytes));
  m->left |= 1u << f->lane;
  if (m->left == mask) {
    for (size_t i = 0; i < w.meetings.size(); ++i)
      if (w.meetings[i].get() == m) {
        w.spare.push_back(std::move(w.meetings[i]));
        w.meetings.erase(w.meetings.begin() + long(i));
        break;
      }
  }
}

__attribute__((noinline)) void warp_barrier(uint32_t mask) {
  char none = 0;
  meet("__syncwarp()", mask, &none, 0, &none, 0, nullptr);
}

__attribute__((noinline)) void touch(const void* at, int64_t bytes, bool write) { instrumented(at, uint64_t(bytes), write, __builtin_return_address(0)); }

__attribute__((noinline)) void copy_async(void* shared, const void* global, int bytes, int valid) {
  Fibre* f = me();
  const void* where = __builtin_return_address(0);
  if (bytes != 4 && bytes != 8 && bytes != 16) stop("cp.async of " + std::to_string(bytes) + " bytes; 4, 8 and 16 are possible", where);
  if (valid < 0 || valid > bytes) stop("cp.async of " + std::to_string(valid) + " valid bytes of " + std::to_string(bytes), where);
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0) stop("cp.async to a misaligned address of shared memory", where);
  if (valid > 0 && reinterpret_cast<uintptr_t>(global) % bytes != 0) stop("cp.async from a misaligned address", where);
  if (valid > 0) access(*f, reinterpret_cast<uintptr_t>(global), uint64_t(valid), false, false, where);
  access(*f, reinterpret_cast<uintptr_t>(shared), uint64_t(bytes), true, true, where);
  f->uncommitted.push_back({shared, global, bytes, valid, where});
}

void copy_async_commit() {
  Fibre* f = me();
  f->groups.push_back(std::move(f->uncommitted));
  f->uncommitted.clear();
}

__attribute__((noinline)) void copy_async_wait(int pending) {
  Fibre* f = me();
  int finished = int(f->groups.size()) - pending;
  for (int i = 0; i < finished; ++i)
    for (const Copy& c : f->groups[i]) {
      access(*f, reinterpret_cast<uintptr_t>(c.to), uint64_t(c.bytes), true, true, c.where);
      size_t first = size_t(static_cast<unsigned char*>(c.to) - state.arenas) / kGranule;
      if (static_cast<unsigned char*>(c.to) >= state.arenas && first < kArena * kMostCluster / kGranule)
        for (int g = 0; g < c.bytes / kGranule; ++g) state.shadow[first + g].pending = false;
      std::memcpy(c.to, c.from, size_t(c.valid));
      std::memset(static_cast<char*>(c.to) + c.valid, 0, size_t(c.bytes - c.valid));
    }
  if (finished > 0) f->groups.erase(f->groups.begin(), f->groups.begin() + finished);
}

void run(const LaunchFacts& facts, void (*body)(void*), void* arg) {
  std::lock_guard<std::mutex> hold(one_launch_at_a_time);
  state.facts = facts, state.body = body, state.arg = arg;
  check_launch(facts);
  prepare_memory();
  if (state.now > (1u << 31)) {  // 32-bit clocks must not wrap around
    std::memset(static_cast<void*>(state.shadow), 0, kArena * kMostCluster / kGranule * sizeof(Shadow));
    std::fill(state.statics.begin(), state.statics.end(), Shadow{});
    state.now = 1;
  }
  state.buffers = lent;
  state.failure.clear();
  ++state.counts.launches;
  uint64_t blocks = uint64_t(facts.grid.x) * facts.grid.y * facts.grid.z;
  for (uint64_t b = 0; b < blocks && state.failure.empty(); b += facts.cluster) {
    state.counts.blocks += facts.cluster;
    run_cluster(b);
  }
  if (!state.failure.empty()) throw std::runtime_error("emulation: " + state.failure);
}

// ---- what -fsanitize=thread calls ----------------------------------------------------------------------------------------

#define CONVKIT_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define CONVKIT_HOOKS(bytes)                                                                                           \
  CONVKIT_HOOK __tsan_read##bytes(void* p) { instrumented(p, bytes, false, __builtin_return_address(0), true); }       \
  CONVKIT_HOOK __tsan_write##bytes(void* p) { instrumented(p, bytes, true, __builtin_return_address(0), true); }       \
  CONVKIT_HOOK __tsan_unaligned_read##bytes(void* p) { instrumented(p, bytes, false, __builtin_return_address(0)); }   \
  CONVKIT_HOOK __tsan_unaligned_write##bytes(void* p) { instrumented(p, bytes, true, __builtin_return_address(0)); }
CONVKIT_HOOKS(1)
CONVKIT_HOOKS(2)
CONVKIT_HOOKS(4)
CONVKIT_HOOKS(8)
CONVKIT_HOOKS(16)
CONVKIT_HOOK __tsan_read_range(void* p, long bytes) { instrumented(p, uint64_t(bytes), false, __builtin_return_address(0)); }
CONVKIT_HOOK __tsan_write_range(void* p, long bytes) { instrumented(p, uint64_t(bytes), true, __builtin_return_address(0)); }
CONVKIT_HOOK __tsan_func_entry(void*) {}
CONVKIT_HOOK __tsan_func_exit() {}
CONVKIT_HOOK __tsan_init() {}
CONVKIT_HOOK __tsan_vptr_update(void**, void*) {}

}  // namespace convkit::emulation
