// Calls one kernel of an object that TVM compiled for aarch64: driver KERNEL REQUEST RESULT.
//
// REQUEST holds int64s: the number of tensors, then for each its type code, bits, dimensions and
// shape (as in DLPack), and its bytes. RESULT gets the bytes of all tensors after the call. What
// the kernel wants of TVM's runtime is here: no threads, so the tasks of a parallel loop run one
// after the other. Tensors and workspaces end in front of forbidden memory, so that a kernel that
// goes beyond them fails, or reads up to 63 bytes of 0xFF, which are NaN.
//
// Compile with -DKERNELS="KERNEL(a) KERNEL(b)", the names in the object.
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAX_TENSORS 64
#define TASKS 3

typedef struct {
  void* sync;
  int32_t tasks;
} Group;
typedef int (*Task)(int number, Group* group, void* data);
typedef int (*Kernel)(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

#define KERNEL(name) int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
KERNELS
#undef KERNEL
#define KERNEL(name) {#name, __tvm_ffi_##name},
static const struct {
  const char* name;
  Kernel run;
} kernels[] = {KERNELS};
#undef KERNEL

// Variables of the object, if its kernels need them.
extern int (*__TVMBackendParallelLaunch)(Task, void*, int) __attribute__((weak));
extern void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void*) __attribute__((weak));

static void fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) {
    if (parts[i]) fputs(parts[i], stderr);
  }
  fputc('\n', stderr);
}

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

// Addresses are multiples of 64, as TVM promises to kernels.
static void* guarded(size_t bytes) {
  const size_t page = 4096;
  size_t size = bytes ? (bytes + 63) / 64 * 64 : 64, usable = (size + page - 1) / page * page;
  char* memory = mmap(NULL, usable + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("out of memory");
  if (mprotect(memory + page, usable, PROT_READ | PROT_WRITE)) fail("mprotect");
  memset(memory + page, 0xFF, usable);
  return memory + page + usable - size;
}

static int launch(Task task, void* data, int tasks) {
  Group group = {NULL, tasks ? tasks : TASKS};
  for (int i = 0; i < group.tasks; ++i) {
    int failed = task(i, &group, data);
    if (failed) return failed;
  }
  return 0;
}

static void* allocate(int device, int id, uint64_t bytes, int code, int bits) {
  return guarded(bytes);
}

static int release(int device, int id, void* memory) { return 0; }

static int64_t number(FILE* file) {
  int64_t value;
  if (fread(&value, sizeof value, 1, file) != 1) fail("the request ends early");
  return value;
}

int main(int count, char** words) {
  if (count != 4) fail("usage: driver KERNEL REQUEST RESULT");
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;

  static DLTensor tensors[MAX_TENSORS];
  static size_t bytes[MAX_TENSORS];
  static TVMFFIAny arguments[MAX_TENSORS];
  FILE* request = fopen(words[2], "rb");
  if (!request) fail("no request");
  int32_t given = (int32_t)number(request);
  if (given > MAX_TENSORS) fail("too many tensors");
  for (int i = 0; i < given; ++i) {
    DLTensor* tensor = &tensors[i];
    tensor->device.device_type = kDLCPU;
    tensor->dtype.code = (uint8_t)number(request);
    tensor->dtype.bits = (uint8_t)number(request);
    tensor->dtype.lanes = 1;
    tensor->ndim = (int32_t)number(request);
    tensor->shape = malloc(8 * (tensor->ndim + 1));
    tensor->strides = malloc(8 * (tensor->ndim + 1));
    bytes[i] = tensor->dtype.bits / 8;
    for (int axis = 0; axis < tensor->ndim; ++axis) tensor->shape[axis] = number(request);
    for (int axis = tensor->ndim; axis-- > 0;) {
      tensor->strides[axis] = (int64_t)(bytes[i] / (tensor->dtype.bits / 8));
      bytes[i] *= tensor->shape[axis];
    }
    tensor->data = guarded(bytes[i]);
    if (fread(tensor->data, 1, bytes[i], request) != bytes[i]) fail("the request ends early");
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = tensor;
  }
  fclose(request);

  Kernel run = NULL;
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; ++i) {
    if (!strcmp(kernels[i].name, words[1])) run = kernels[i].run;
  }
  if (!run) fail("no such kernel");
  TVMFFIAny result = {0};
  if (run(NULL, arguments, given, &result)) fail("the kernel failed");

  FILE* file = fopen(words[3], "wb");
  if (!file) fail("cannot write the result");
  for (int i = 0; i < given; ++i) fwrite(tensors[i].data, 1, bytes[i], file);
  return fclose(file);
}
