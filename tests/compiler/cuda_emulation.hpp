// Runs CUDA C++ kernels on the CPU: every CUDA thread is a coroutine, one block after the other.
//
// A thread runs until it reaches a barrier or a warp operation, then the next one runs. What a
// kernel must not do is found out rather than tolerated:
//   - shared memory starts as NaN in every block, so that reading what nobody wrote shows;
//   - the order of threads can be forward, reverse or random (environment variable
//     CUDA_EMULATION_ORDER: 0, 1, or a seed), so that a missing barrier shows;
//   - barriers that only some threads reach, or that threads reach on different lines, are errors;
//   - a wild memory access is an error that names the thread.
//   - an asynchronous copy is made when it is waited for, so that a missing wait shows.
// What relaxlm's own kernels use of PTX (kernels/cuda/ptx.cuh) is at the end, tensor cores among it.
// Not emulated: other inline PTX, clusters, grid-wide barriers.
#pragma once
#include <tvm/ffi/c_api.h>

#include "fake_cuda.hpp"

#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Static variables of a section of their own: one block runs at a time, and the section can be
// filled with NaN when a block starts.
#define __shared__ static __attribute__((section("emu_shared")))
#define __syncthreads() emu::wait_for_block(__LINE__)
#define __syncwarp(...) emu::exchange(~0u, 0, 0, __LINE__)
#define __shfl_sync(mask, value, source, ...) \
  emu::shuffle(mask, value, emu::from_index(source, ##__VA_ARGS__), __LINE__)
#define __shfl_xor_sync(mask, value, lanes, ...) \
  emu::shuffle(mask, value, emu::from_xor(lanes, ##__VA_ARGS__), __LINE__)
#define __shfl_up_sync(mask, value, delta, ...) \
  emu::shuffle(mask, value, emu::from_offset(-int(delta), ##__VA_ARGS__), __LINE__)
#define __shfl_down_sync(mask, value, delta, ...) \
  emu::shuffle(mask, value, emu::from_offset(int(delta), ##__VA_ARGS__), __LINE__)
#define __ballot_sync(mask, predicate) emu::ballot(mask, predicate, __LINE__)
#define __any_sync(mask, predicate) (emu::ballot(mask, predicate, __LINE__) != 0)
#define __all_sync(mask, predicate) (emu::ballot(mask, !(predicate), __LINE__) == 0)

#ifndef EMU_MOST_THREADS
#define EMU_MOST_THREADS 1024
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
static dim3 gridDim, blockDim, blockIdx, threadIdx;

extern "C" char __start_emu_shared[] __attribute__((weak)), __stop_emu_shared[] __attribute__((weak));

namespace emu {

enum State { READY, AT_BARRIER, IN_WARP, DONE };

struct Copy {
  void* to;
  const void* from;  // or null: zeros
};

struct Thread {
  dim3 index;
  int number;
  State state;
  bool started;
  int line;               // where it waits
  unsigned mask;          // with whom, in a warp operation
  uint64_t given, taken;  // its value, and the value that it gets
  int source;             // the lane that it gets it from
  uint32_t shown[2][8];   // what the other lanes of a warp may read, in turns
  unsigned shows;
  std::vector<std::vector<Copy>> copies;  // by group, the last one still open
  ucontext_t start;
  jmp_buf at;
};

static const size_t kStack = 256 << 10;
static std::vector<Thread> threads;
static char* stacks = nullptr;
static size_t stacks_size = 0;
static Thread* current = nullptr;
static jmp_buf scheduler;
static void (*body)(const void*) = nullptr;  // runs the kernel with these arguments
static const void* body_arguments = nullptr;
static std::string failure;
static sigjmp_buf fault;
static void* fault_address;
static std::vector<char> dynamic_shared;

__attribute__((noinline)) static void suspend() {
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

static std::string place(const Thread& t) {
  char text[128];
  snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", t.index.x, t.index.y,
           t.index.z, blockIdx.x, blockIdx.y, blockIdx.z);
  return text;
}

static void wait_for_block(int line) {
  current->state = AT_BARRIER;
  current->line = line;
  suspend();
}

static uint64_t exchange(unsigned mask, uint64_t value, int source, int line) {
  current->state = IN_WARP;
  current->line = line;
  current->mask = mask;
  current->given = value;
  current->source = source;
  suspend();
  return current->taken;
}

static int lane() { return current->number % 32; }

// Lets all lanes of a warp read what each of them shows; gives an array of 32.
template <size_t COUNT>
static const uint32_t* (*show(const uint32_t (&mine)[COUNT], int line))(int) {
  static_assert(COUNT <= 8, "more than a thread can show");
  unsigned turn = current->shows++ % 2;
  memcpy(current->shown[turn], mine, sizeof mine);
  exchange(~0u, 0, 0, line);
  // A lane that is one operation ahead writes to the other place.
  return turn ? +[](int i) -> const uint32_t* { return threads[current->number / 32 * 32 + i].shown[1]; }
              : +[](int i) -> const uint32_t* { return threads[current->number / 32 * 32 + i].shown[0]; };
}
static int from_index(int source, int width = 32) {
  return lane() / width * width + source % width;
}
static int from_xor(int mask, int width = 32) {
  int source = lane() ^ mask;
  return source / width == lane() / width ? source : lane();
}
static int from_offset(int delta, int width = 32) {
  int source = lane() + delta;
  return source >= 0 && source / width == lane() / width ? source : lane();
}
template <class T>
T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move up to eight bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}
static unsigned ballot(unsigned mask, bool predicate, int line) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    // One exchange per lane: slow, and no second kind of warp operation.
    bool there = (mask >> i & 1) && (lane() / 32 * 32 + i) < int(threads.size());
    if (there && shuffle(mask, int(predicate), i, line)) result |= 1u << i;
  }
  return result;
}

static void enter() {
  body(body_arguments);
  current->state = DONE;
  _longjmp(scheduler, 1);
}

static void resume(Thread& t) {
  current = &t;
  threadIdx = t.index;
  if (_setjmp(scheduler) == 0) {
    if (t.started) _longjmp(t.at, 1);
    t.started = true;
    setcontext(&t.start);
  }
}

// Lets the threads of one warp go on if all that the mask names have arrived; true if it did.
static bool release_warp(size_t first) {
  size_t count = std::min<size_t>(32, threads.size() - first);
  Thread* waiting = nullptr;
  for (size_t i = first; i < first + count; ++i)
    if (threads[i].state == IN_WARP && !waiting) waiting = &threads[i];
  if (!waiting) return false;
  unsigned mask = waiting->mask;
  for (size_t i = 0; i < count; ++i) {
    const Thread& t = threads[first + i];
    if (!(mask >> i & 1)) continue;
    if (t.state != IN_WARP) return false;
    if (t.line != waiting->line || t.mask != mask) {
      failure = "warp operations do not match: " + place(*waiting) + " is on line " +
                std::to_string(waiting->line) + ", " + place(t) + " on line " +
                std::to_string(t.line);
      return false;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    Thread& t = threads[first + i];
    if (!(mask >> i & 1)) continue;
    const Thread& source = threads[first + std::min<size_t>(t.source, count - 1)];
    t.taken = source.given;
    t.state = READY;
  }
  return true;
}

static bool release_block() {
  const Thread* waiting = nullptr;
  for (const Thread& t : threads) {
    if (t.state == READY || t.state == IN_WARP) return false;
    if (t.state != AT_BARRIER) continue;
    if (waiting && waiting->line != t.line) {
      failure = "__syncthreads() does not match: " + place(*waiting) + " is on line " +
                std::to_string(waiting->line) + ", " + place(t) + " on line " +
                std::to_string(t.line);
      return false;
    }
    if (!waiting) waiting = &t;
  }
  for (Thread& t : threads)
    if (t.state == AT_BARRIER) {
      t.state = READY;
    }
  return waiting != nullptr;
}

static std::string deadlock() {
  std::string text = "threads wait for each other:";
  for (State state : {AT_BARRIER, IN_WARP, DONE})
    for (const Thread& t : threads)
      if (t.state == state) {
        text += " " + place(t);
        text += state == DONE ? " has returned" : state == IN_WARP ? " is in a warp operation" : " is at __syncthreads()";
        if (state != DONE) text += " on line " + std::to_string(t.line);
        text += ";";
        break;
      }
  return text;
}

static void run_block(unsigned order) {
  size_t count = threads.size();
  if (__start_emu_shared)
    memset(__start_emu_shared, 0xFF, __stop_emu_shared - __start_emu_shared);
  std::fill(dynamic_shared.begin(), dynamic_shared.end(), char(0xFF));
  for (size_t i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.number = int(i);
    t.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
               unsigned(i / blockDim.x / blockDim.y)};
    t.state = READY;
    t.started = false;
    t.shows = 0;
    t.copies.assign(1, {});
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = stacks + i * kStack;
    t.start.uc_stack.ss_size = kStack;
    t.start.uc_link = nullptr;
    makecontext(&t.start, enter, 0);
  }
  std::vector<size_t> turns(count);
  for (size_t i = 0; i < count; ++i) turns[i] = order == 1 ? count - 1 - i : i;
  uint64_t random = order;
  for (;;) {
    for (size_t i = count; order > 1 && i > 1; --i) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      std::swap(turns[i - 1], turns[(random >> 33) % i]);
    }
    bool progress = false, finished = true;
    for (size_t i : turns)
      if (threads[i].state == READY) {
        resume(threads[i]);
        progress = true;
      }
    for (size_t first = 0; first < count; first += 32) progress |= release_warp(first);
    for (const Thread& t : threads) finished &= t.state == DONE;
    if (finished) return;
    progress |= release_block();
    if (!progress && failure.empty()) failure = deadlock();
    if (!failure.empty()) return;
  }
}

static void on_fault(int, siginfo_t* info, void*) {
  fault_address = info->si_addr;
  siglongjmp(fault, 1);
}

// Runs a whole grid; the result says what went wrong, if anything.
static const std::string& launch(dim3 grid, dim3 block, size_t shared) {
  size_t count = size_t(block.x) * block.y * block.z;
  failure.clear();
  if (grid.x * grid.y * grid.z == 0) return failure = "the grid has no blocks";
  if (count > EMU_MOST_THREADS) return failure = "too many threads in a block";
  if (grid.y > 65535 || grid.z > 65535) return failure = "more than 65535 blocks along y or z";
  if (stacks_size < count * kStack) {
    if (stacks) munmap(stacks, stacks_size);
    stacks_size = count * kStack;
    stacks = static_cast<char*>(mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  const char* setting = getenv("CUDA_EMULATION_ORDER");
  unsigned order = setting ? unsigned(atoi(setting)) : 0;
  gridDim = grid;
  blockDim = block;
  threads.assign(count, Thread());
  dynamic_shared.assign(shared, 0);
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (sigsetjmp(fault, 1) == 0) {
    for (blockIdx.z = 0; blockIdx.z < grid.z && failure.empty(); ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y && failure.empty(); ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x && failure.empty(); ++blockIdx.x)
          run_block(order);
  } else {
    char text[32];
    snprintf(text, sizeof text, "%p", fault_address);
    failure = place(*current) + " accesses invalid memory at " + text;
  }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  return failure;
}

template <class T>
T argument(const TVMFFIAny& any) {
  if constexpr (std::is_pointer_v<T>)
    return static_cast<T>(any.v_ptr);
  else if constexpr (std::is_floating_point_v<T>)
    return T(any.v_float64);
  else
    return T(any.v_int64);
}

template <class... A>
struct Call {
  void (*kernel)(A...);
  const TVMFFIAny* args;
  template <size_t... I>
  void run(std::index_sequence<I...>) const { kernel(argument<A>(args[I])...); }
  static void body(const void* self) {
    static_cast<const Call*>(self)->run(std::index_sequence_for<A...>());
  }
};

// The function that TVM's host code calls: kernel arguments, then one launch parameter per tag.
template <class... A>
int entry(const char* name, void (*kernel)(A...), std::vector<std::string> tags,
          const TVMFFIAny* args, int32_t count) {
  dim3 grid, block;
  size_t shared = 0;
  std::string error;
  if (count != int32_t(sizeof...(A) + tags.size())) error = "called with another number of arguments";
  for (size_t i = 0; i < tags.size() && error.empty(); ++i) {
    int64_t value = args[sizeof...(A) + i].v_int64;
    dim3& target = tags[i].compare(0, 8, "blockIdx") == 0 ? grid : block;
    if (tags[i].compare(1, 8, "lockIdx.") == 0 || tags[i].compare(0, 10, "threadIdx.") == 0)
      (tags[i].back() == 'x' ? target.x : tags[i].back() == 'y' ? target.y : target.z) = unsigned(value);
    else if (tags[i] == "tirx.use_dyn_shared_memory")
      shared = size_t(value);
    else
      error = "launch parameter " + tags[i] + " is not emulated";
  }
  Call<A...> call = {kernel, args};
  body = Call<A...>::body;
  body_arguments = &call;
  if (error.empty()) error = launch(grid, block, shared);
  if (error.empty()) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", ("CUDA emulation, " + std::string(name) + ": " + error).c_str());
  return -1;
}

// A launch with the arguments it was made with, for the stand-in for a driver.
template <class... A>
struct Recorded : FakeLaunch {
  void (*kernel)(A...);
  std::tuple<A...> arguments;
  template <size_t... I>
  Recorded(void (*kernel)(A...), void** given, std::index_sequence<I...>)
      : kernel(kernel), arguments(*static_cast<A*>(given[I])...) {}
  static void run_thread(const void* self) {
    std::apply(static_cast<const Recorded*>(self)->kernel, static_cast<const Recorded*>(self)->arguments);
  }
  const char* run(const unsigned grid[3], const unsigned block[3], size_t shared) override {
    body = run_thread;
    body_arguments = this;
    launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared);
    return failure.c_str();
  }
};
template <class... A>
FakeLaunch* record(void (*kernel)(A...), void** given) {
  return new Recorded<A...>(kernel, given, std::index_sequence_for<A...>());
}

// float <-> float16 and bfloat16, to nearest even.
inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
inline float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
struct Half {
  static uint16_t encode(float value) {
    uint32_t sign = bits_of(value) >> 16 & 0x8000, x = bits_of(value) & 0x7FFFFFFF;
    if (x > 0x7F800000) return 0x7FFF;
    if (x >= 0x47800000) return sign | 0x7C00;
    if (x < 0x38800000) return sign | (bits_of(float_of(x) + 0.5f) - 0x3F000000);
    return sign | ((x - (112u << 23) + 0xFFF + (x >> 13 & 1)) >> 13);
  }
  static float decode(uint16_t h) {
    uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
    float value = exponent == 31 ? float_of(0x7F800000 | mantissa << 13)
                  : exponent    ? float_of((exponent + 112) << 23 | mantissa << 13)
                                : mantissa * 0x1p-24f;
    return h & 0x8000 ? -value : value;
  }
};
struct Bfloat {
  static uint16_t encode(float value) {
    uint32_t x = bits_of(value);
    if ((x & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return uint16_t((x + 0x7FFF + (x >> 16 & 1)) >> 16);
  }
  static float decode(uint16_t h) { return float_of(uint32_t(h) << 16); }
};
template <class Format>
struct Small {
  uint16_t bits;
  Small() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  Small(T value) : bits(Format::encode(float(value))) {}
  // One conversion, so that mixed arithmetic happens in float.
  operator float() const { return Format::decode(bits); }
#define EMU_OPERATOR(op)                                                                     \
  friend Small operator op(Small a, Small b) { return Small(float(a) op float(b)); }         \
  Small& operator op##=(Small b) { return *this = *this op b; }
  EMU_OPERATOR(+) EMU_OPERATOR(-) EMU_OPERATOR(*) EMU_OPERATOR(/)
#undef EMU_OPERATOR
  friend Small operator-(Small a) { Small r; r.bits = a.bits ^ 0x8000; return r; }
};
template <class T>
struct Pair {
  T x, y;
  Pair() = default;
  Pair(T x, T y) : x(x), y(y) {}
};
}  // namespace emu

using __half = emu::Small<emu::Half>;
using half = __half;
using __half2 = emu::Pair<__half>;
using half2 = __half2;
using __nv_bfloat16 = emu::Small<emu::Bfloat>;
using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = emu::Pair<__nv_bfloat16>;
using nv_bfloat162 = __nv_bfloat162;
inline half __float2half_rn(float x) { return half(x); }
inline half __float2half(float x) { return half(x); }
inline float __half2float(half x) { return x; }
inline nv_bfloat16 __float2bfloat16(float x) { return nv_bfloat16(x); }
inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
inline float __bfloat162float(nv_bfloat16 x) { return x; }
template <class T> bool __hgt(T a, T b) { return float(a) > float(b); }
template <class T> bool __hlt(T a, T b) { return float(a) < float(b); }
template <class T> T __habs(T a) { return T(std::fabs(float(a))); }
template <class T> T hexp(T a) { return T(std::exp(float(a))); }
template <class T> T hexp2(T a) { return T(std::exp2(float(a))); }
template <class T> T hlog(T a) { return T(std::log(float(a))); }
template <class T> T hsqrt(T a) { return T(std::sqrt(float(a))); }
template <class T> T hrsqrt(T a) { return T(1 / std::sqrt(float(a))); }
template <class T> T htanh(T a) { return T(std::tanh(float(a))); }

#define EMU_VECTORS(type, name)                                                    \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                         \
  struct name##3 { type x, y, z; };                                                \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char)
EMU_VECTORS(unsigned char, uchar)
EMU_VECTORS(short, short)
EMU_VECTORS(unsigned short, ushort)
EMU_VECTORS(int, int)
EMU_VECTORS(unsigned, uint)
EMU_VECTORS(float, float)
EMU_VECTORS(long long, longlong)
EMU_VECTORS(double, double)
#undef EMU_VECTORS
inline half2 make_half2(half x, half y) { return {x, y}; }

inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
#define EMU_INTEGER(type)                                   \
  inline type max(type a, type b) { return a > b ? a : b; } \
  inline type min(type a, type b) { return a < b ? a : b; }
EMU_INTEGER(int) EMU_INTEGER(unsigned) EMU_INTEGER(long) EMU_INTEGER(unsigned long)
EMU_INTEGER(long long) EMU_INTEGER(unsigned long long)
#undef EMU_INTEGER
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __activemask() { return ~0u; }
template <class T> T __ldg(const T* p) { return *p; }
template <class T, class U> T atomicAdd(T* p, U v) { T old = *p; *p = T(old + v); return old; }
template <class T, class U> T atomicMax(T* p, U v) { T old = *p; *p = max(old, T(v)); return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> emu::Pair<T> __hsub2(emu::Pair<T> a, emu::Pair<T> b) { return {a.x - b.x, a.y - b.y}; }
template <class T> emu::Pair<T> __hmul2(emu::Pair<T> a, emu::Pair<T> b) { return {a.x * b.x, a.y * b.y}; }
template <class T> emu::Pair<T> __hfma2(emu::Pair<T> a, emu::Pair<T> b, emu::Pair<T> c) {
  return {T(float(a.x) * float(b.x) + float(c.x)), T(float(a.y) * float(b.y) + float(c.y))};
}
inline float __uint_as_float(unsigned x) { return emu::float_of(x); }
inline unsigned __float_as_uint(float x) { return emu::bits_of(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t both = a | uint64_t(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned pick = selector >> 4 * i & 15;
    if (pick > 7) emu::failure = "__byte_perm with signs is not emulated";
    result |= unsigned(both >> 8 * pick & 255) << 8 * i;
  }
  return result;
}

// In place of kernels/cuda/ptx.cuh, which says what these do.
#define RELAXLM_PTX
namespace relaxlm {
typedef unsigned int u32;

template <class T>
void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto shown = emu::show(mine, 0);
  auto element = [](uint32_t word, int high) {
    T value;
    value.bits = uint16_t(word >> 16 * high);
    return float(value);
  };
  int g = emu::lane() / 4, q = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    int row = i / 2, column = q * 2 + i % 2;  // row 1 is g + 8
    for (int k = 0; k < 16; ++k)
      d[i] += element(shown(g * 4 + k % 8 / 2)[row + k / 8 * 2], k % 2) *
              element(shown(column * 4 + k % 8 / 2)[4 + k / 8], k % 2);
  }
}

inline void check_aligned(const void* address) {
  if (uintptr_t(address) % 16 && emu::failure.empty())
    emu::failure = emu::place(*emu::current) + " copies 16 bytes to or from an odd address";
}
inline u32 select(u32 bits, u32 mask, u32 base) { return (bits & mask) | base; }

inline void load_transposed(u32 (&r)[4], const void* row) {
  check_aligned(row);
  uint64_t address = uint64_t(row);
  uint32_t mine[2] = {uint32_t(address), uint32_t(address >> 32)};
  auto shown = emu::show(mine, 0);
  int g = emu::lane() / 4, q = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    r[i] = 0;
    for (int k = 0; k < 2; ++k) {
      const uint32_t* theirs = shown(i * 8 + q * 2 + k);
      uint64_t at = theirs[0] | uint64_t(theirs[1]) << 32;
      r[i] |= uint32_t(reinterpret_cast<const uint16_t*>(at)[g]) << 16 * k;
    }
  }
}

inline uint4 load_once(const void* from) { return *static_cast<const uint4*>(from); }

inline void copy_async(void* shared, const void* global, bool valid) {
  check_aligned(shared);
  check_aligned(global);
  emu::current->copies.back().push_back({shared, valid ? global : nullptr});
}
inline void commit_copies() { emu::current->copies.emplace_back(); }
template <int PENDING>
void wait_for_copies() {
  auto& groups = emu::current->copies;
  for (; groups.size() > PENDING + 1; groups.erase(groups.begin()))
    for (const emu::Copy& copy : groups.front())
      copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
}
}  // namespace relaxlm

// Nothing here runs at the same time as anything else, and classes cannot be volatile so easily.
#define volatile
