// A stand-in for libcuda.so.1 and libcudart.so.13: as much as TVM's CUDA runtime and relaxlm call.
//
// Memory is the CPU's. A "cubin" is the path of a library of emulated kernels
// (cuda_emulation.hpp). Work is done when it is asked for, in the order in which it is, which is one
// of the orders that a GPU may choose. What a program must not do is found out:
//   - memory starts as NaN, ends at inaccessible memory, and is inaccessible once it is freed, for
//     good: so a graph that uses freed memory crashes;
//   - while a stream captures, launches and copies on it are recorded and not made. Everything
//     that the real driver refuses then is refused, and ends the capture: memory, modules and
//     synchronisation in the capturing thread, and any use of the legacy stream.
// Not here: several devices, events that measure, capture on several streams, other kinds of nodes.
#include "fake_cuda.hpp"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

// Codes of cudaError_t, which are those of CUresult.
enum Error {
  OK = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_IMAGE = 200,
  INVALID_HANDLE = 400,
  ILLEGAL_STATE = 401,
  NOT_FOUND = 500,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_IMPLICIT = 906,
};

const char* name_of(int error) {
  switch (error) {
    case OK: return "success";
    case INVALID_VALUE: return "invalid value";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_IMAGE: return "invalid image";
    case INVALID_HANDLE: return "invalid handle";
    case ILLEGAL_STATE: return "illegal state";
    case NOT_FOUND: return "not found";
    case LAUNCH_FAILED: return "launch failed";
    case NOT_SUPPORTED: return "not supported";
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
    case CAPTURE_IMPLICIT: return "operation would depend on the legacy stream";
  }
  return "unknown error";
}

struct Dimensions {
  unsigned sizes[3];
};

struct Operation {
  // A launch, or a copy.
  std::shared_ptr<FakeLaunch> launch;
  Dimensions grid, block;
  size_t shared;
  void* to;
  const void* from;
  size_t bytes;
};

struct Graph {
  std::vector<Operation> operations;
};

enum Mode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Stream {
  bool blocking;
  Graph* graph = nullptr;  // while it captures
  Mode mode = GLOBAL;
  bool invalid = false;
};

struct Function {
  FakeKernel* kernel;
  std::string name;
};

struct Module {
  void* library;
  std::map<std::string, std::unique_ptr<Function>> functions;
};

struct Memory {
  char* start;  // of everything that is reserved
  size_t reserved, bytes;
};

const size_t kForbidden = 1 << 20, kPage = 4096, kAlignment = 256;
const char kImage[] = "FAKE:";

std::recursive_mutex lock;
std::map<void*, Memory> memories;
std::map<std::string, long> counts;
thread_local Stream* capturing = nullptr;  // by this thread
thread_local int last_error = OK;
size_t limit = size_t(1) << 40, used = 0;
bool idle = false;

int fail(int error) {
  if (error != OK) last_error = error;
  return error;
}

// Of a call that may not be made while this thread captures.
int unsafe_call() {
  if (!capturing || capturing->mode == RELAXED) return OK;
  capturing->invalid = true;
  ++counts["refused"];
  return fail(CAPTURE_UNSUPPORTED);
}

// Of a call that uses a stream.
int use(Stream* stream) {
  if (stream == nullptr && capturing) {
    capturing->invalid = true;
    ++counts["refused"];
    return fail(CAPTURE_IMPLICIT);
  }
  if (stream && stream->graph && stream->invalid) return fail(CAPTURE_INVALIDATED);
  return OK;
}

int run(const Operation& operation) {
  if (!operation.launch) {
    memmove(operation.to, operation.from, operation.bytes);
    return OK;
  }
  if (idle) return OK;
  const char* wrong =
      operation.launch->run(operation.grid.sizes, operation.block.sizes, operation.shared);
  if (!*wrong) return OK;
  fprintf(stderr, "fake CUDA: %s\n", wrong);
  return fail(LAUNCH_FAILED);
}

int add(Stream* stream, Operation operation) {
  if (int error = use(stream)) return error;
  if (stream && stream->graph) {
    stream->graph->operations.push_back(std::move(operation));
    return OK;
  }
  return run(operation);
}

}  // namespace

extern "C" {

// What has happened so far: "launches", "graph launches", "allocations", "copies", "refused", ...
long fake_cuda_count(const char* what) { return counts[what]; }
// Whether kernels do nothing, to measure what the CPU does.
void fake_cuda_idle(int value) { idle = value; }

// ---- the driver -------------------------------------------------------------------------------

int cuInit(unsigned) { return OK; }
int cuDeviceGetCount(int* count) { return *count = 1, OK; }
int cuDeviceGet(int* device, int index) { return *device = index, index ? INVALID_VALUE : OK; }
int cuDeviceGetName(char* name, int length, int) {
  snprintf(name, length, "Fake GPU");
  return OK;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: *value = 1024; return OK;        // threads per block
    case 8: *value = 48 << 10; return OK;    // shared memory per block
    case 10: *value = 32; return OK;         // threads per warp
    case 16: *value = 108; return OK;        // multiprocessors
    case 75: *value = 8; return OK;          // compute capability
    case 76: *value = 0; return OK;
  }
  return fail(INVALID_VALUE);
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
int cuGetErrorName(int error, const char** name) { return *name = name_of(error), OK; }
int cuGetErrorString(int error, const char** name) { return *name = name_of(error), OK; }

int cuModuleLoadData(Module** module, const void* image) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (int error = unsafe_call()) return error;
  const char* text = static_cast<const char*>(image);
  if (strncmp(text, kImage, strlen(kImage))) return fail(INVALID_IMAGE);
  const char* path = text + strlen(kImage);
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return fprintf(stderr, "fake CUDA: %s\n", dlerror()), fail(INVALID_IMAGE);
  *module = new Module{library, {}};
  return OK;
}
int cuModuleUnload(Module* module) {
  delete module;  // its code stays: graphs may still have its launches
  return OK;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto& found = module->functions[name];
  if (!found) {
    auto* kernel = (FakeKernel*)dlsym(module->library, (std::string("fake_kernel_") + name).c_str());
    if (!kernel) return fail(NOT_FOUND);
    found.reset(new Function{kernel, name});
  }
  *function = found.get();
  return OK;
}
int cuFuncSetAttribute(Function*, int, int) { return OK; }

// CUlaunchConfig of cuda.h.
struct LaunchConfig {
  Dimensions grid, block;
  unsigned shared;
  Stream* stream;
  void* attributes;
  unsigned attribute_count;
};
int cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** arguments, void**) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (config->attribute_count) return fail(NOT_SUPPORTED);
  ++counts["launches"];
  std::shared_ptr<FakeLaunch> launch(function->kernel(arguments));
  return add(config->stream, {launch, config->grid, config->block, config->shared});
}
int cuTensorMapEncodeTiled() { return fail(NOT_SUPPORTED); }

// ---- the runtime ------------------------------------------------------------------------------

int cudaGetDeviceCount(int* count) { return *count = 1, OK; }
int cudaGetDevice(int* device) { return *device = 0, OK; }
int cudaSetDevice(int device) { return device ? fail(INVALID_VALUE) : OK; }
int cudaGetDeviceProperties(char* properties, int) {
  // cudaDeviceProp: name [256], uuid [16], luid [8], unsigned, size_t totalGlobalMem, ...
  memcpy(properties + 288, &limit, sizeof limit);
  return OK;
}
const char* cudaGetErrorName(int error) { return name_of(error); }
const char* cudaGetErrorString(int error) { return name_of(error); }
int cudaPeekAtLastError() { return last_error; }
int cudaGetLastError() {
  int error = last_error;
  last_error = OK;
  return error;
}
int cudaMemGetInfo(size_t* free, size_t* total) {
  *total = limit;
  *free = limit - used;
  return OK;
}

int cudaMalloc(void** pointer, size_t bytes) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (int error = unsafe_call()) return error;
  if (used + bytes > limit) return fail(OUT_OF_MEMORY);
  size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment + (bytes == 0) * kAlignment;
  size_t usable = (size + kPage - 1) / kPage * kPage, reserved = usable + 2 * kForbidden;
  char* start = static_cast<char*>(
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (start == MAP_FAILED) return fail(OUT_OF_MEMORY);
  char* memory = start + kForbidden;
  mprotect(memory, usable, PROT_READ | PROT_WRITE);
  memset(memory, 0xFF, usable);
  // It ends where forbidden memory begins.
  *pointer = memory + usable - size;
  memories[*pointer] = {start, reserved, bytes};
  used += bytes;
  ++counts["allocations"];
  return OK;
}
int cudaFree(void* pointer) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (int error = unsafe_call()) return error;
  if (!pointer) return OK;
  auto found = memories.find(pointer);
  if (found == memories.end()) return fail(INVALID_VALUE);
  const Memory& memory = found->second;
  // The addresses are never given out again.
  mmap(memory.start, memory.reserved, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  used -= memory.bytes;
  memories.erase(found);
  ++counts["frees"];
  return OK;
}
int cudaMallocHost(void** pointer, size_t bytes) {
  if (int error = unsafe_call()) return error;
  *pointer = aligned_alloc(kPage, (bytes + kPage) / kPage * kPage);
  return OK;
}
int cudaFreeHost(void* pointer) {
  if (int error = unsafe_call()) return error;
  free(pointer);
  return OK;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, Stream* stream) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  ++counts["copies"];
  return add(stream, {nullptr, {}, {}, 0, to, from, bytes});
}
int cudaMemcpyPeerAsync() { return fail(NOT_SUPPORTED); }

int cudaStreamCreateWithFlags(Stream** stream, unsigned flags) {
  if (int error = unsafe_call()) return error;
  *stream = new Stream{flags == 0};
  return OK;
}
int cudaStreamCreate(Stream** stream) { return cudaStreamCreateWithFlags(stream, 0); }
int cudaStreamDestroy(Stream* stream) {
  if (!stream || stream->graph) return fail(INVALID_HANDLE);
  delete stream;
  return OK;
}
int cudaStreamSynchronize(Stream* stream) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  ++counts["synchronisations"];
  if (int error = use(stream)) return error;
  if (stream && stream->graph) {
    stream->invalid = true;
    ++counts["refused"];
    return fail(CAPTURE_UNSUPPORTED);
  }
  return OK;
}
int cudaStreamWaitEvent(Stream* stream, void*, unsigned) { return fail(use(stream)); }
int cudaEventCreate(void** event) { return *event = new char, OK; }
int cudaEventDestroy(char* event) { return delete event, OK; }
int cudaEventRecord(void*, Stream* stream) {
  return stream && stream->graph ? fail(NOT_SUPPORTED) : fail(use(stream));
}
int cudaEventSynchronize(void*) { return unsafe_call(); }
int cudaEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 1, OK; }

int cudaStreamBeginCapture(Stream* stream, int mode) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (!stream) return fail(CAPTURE_UNSUPPORTED);
  if (stream->graph || capturing) return fail(ILLEGAL_STATE);
  stream->graph = new Graph;
  stream->mode = Mode(mode);
  stream->invalid = false;
  capturing = stream;
  return OK;
}
int cudaStreamEndCapture(Stream* stream, Graph** graph) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (!stream || !stream->graph) return fail(ILLEGAL_STATE);
  *graph = stream->graph;
  stream->graph = nullptr;
  capturing = nullptr;
  if (!stream->invalid) return OK;
  delete *graph;
  *graph = nullptr;
  return fail(CAPTURE_INVALIDATED);
}
int cudaGraphInstantiate(Graph** executable, const Graph* graph, unsigned long long flags) {
  if (int error = unsafe_call()) return error;
  if (!graph || flags) return fail(INVALID_VALUE);
  ++counts["graphs"];
  *executable = new Graph(*graph);
  return OK;
}
int cudaGraphLaunch(const Graph* executable, Stream* stream) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (int error = use(stream)) return error;
  if (stream && stream->graph) return fail(NOT_SUPPORTED);
  ++counts["graph launches"];
  for (const Operation& operation : executable->operations)
    if (int error = run(operation)) return error;
  return OK;
}
int cudaGraphDestroy(Graph* graph) { return delete graph, OK; }
int cudaGraphExecDestroy(Graph* executable) {
  --counts["graphs"];
  return delete executable, OK;
}

}  // extern "C"
