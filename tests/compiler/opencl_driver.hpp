// Runs OpenCL kernels by the OpenCL driver of this machine's CPU, for tests/compiler/gpu_emulation.py.
//
// The driver has to take any pointer of the process as a kernel's argument, as PoCL does.
#pragma once
#include <dlfcn.h>
#include <tvm/ffi/c_api.h>

#include <cstring>
#include <map>
#include <string>

namespace driver {

template <class F>
static F* find(const char* name) {
  static void* library = dlopen("libOpenCL.so.1", RTLD_NOW);
  return library ? reinterpret_cast<F*>(dlsym(library, name)) : nullptr;
}
#define CL(result, name, ...) static auto* name = find<result(__VA_ARGS__)>(#name)
typedef void* Object;

static int fail(const std::string& what, int code) {
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", ("OpenCL: " + what + ": " + std::to_string(code)).c_str());
  return -1;
}

static Object device, queue, program;

static int start(const char* source) {
  CL(int, clGetPlatformIDs, unsigned, Object*, unsigned*);
  CL(int, clGetDeviceIDs, Object, uint64_t, unsigned, Object*, unsigned*);
  CL(Object, clCreateContext, const intptr_t*, unsigned, const Object*, void*, void*, int*);
  CL(Object, clCreateCommandQueueWithProperties, Object, Object, const uint64_t*, int*);
  CL(Object, clCreateProgramWithSource, Object, unsigned, const char**, const size_t*, int*);
  CL(int, clBuildProgram, Object, unsigned, const Object*, const char*, void*, void*);
  CL(int, clGetProgramBuildInfo, Object, Object, unsigned, size_t, void*, size_t*);
  Object platform;
  int code = clGetPlatformIDs(1, &platform, nullptr);
  if (!code) code = clGetDeviceIDs(platform, 2 /* CPU */, 1, &device, nullptr);
  if (code) return fail("no device", code);
  Object context = clCreateContext(nullptr, 1, &device, nullptr, nullptr, &code);
  queue = clCreateCommandQueueWithProperties(context, device, nullptr, &code);
  program = clCreateProgramWithSource(context, 1, &source, nullptr, &code);
  code = clBuildProgram(program, 1, &device, "", nullptr, nullptr);
  if (code) {
    std::string log(20000, ' ');
    clGetProgramBuildInfo(program, device, 0x1183 /* the log */, log.size(), &log[0], nullptr);
    return fail(log.c_str(), code);
  }
  return 0;
}

// `types` has a letter for each argument of the kernel: p, i or f. `tags` are the launch parameters.
static int run(const char* source, const char* name, const char* types, std::initializer_list<const char*> tags,
               const TVMFFIAny* args) {
  CL(Object, clCreateKernel, Object, const char*, int*);
  CL(int, clSetKernelArg, Object, unsigned, size_t, const void*);
  CL(int, clSetKernelArgSVMPointer, Object, unsigned, const void*);
  CL(int, clEnqueueNDRangeKernel, Object, Object, unsigned, const size_t*, const size_t*, const size_t*, unsigned,
     const Object*, Object*);
  CL(int, clFinish, Object);
  if (!program && start(source)) return -1;
  static std::map<std::string, Object> kernels;
  int code = 0;
  Object& kernel = kernels[name];
  if (!kernel) kernel = clCreateKernel(program, name, &code);
  unsigned count = unsigned(strlen(types));
  for (unsigned i = 0; i < count && !code; ++i) {
    int number = int(args[i].v_int64);
    float real = float(args[i].v_float64);
    code = types[i] == 'p'   ? clSetKernelArgSVMPointer(kernel, i, args[i].v_ptr)
           : types[i] == 'f' ? clSetKernelArg(kernel, i, 4, &real)
                             : clSetKernelArg(kernel, i, 4, &number);
  }
  size_t groups[3] = {1, 1, 1}, threads[3] = {1, 1, 1}, all[3];
  for (const char* tag : tags) {
    size_t value = size_t(args[count++].v_int64);
    (tag[0] == 'b' ? groups : threads)[tag[strlen(tag) - 1] - 'x'] = value;
  }
  for (int i = 0; i < 3; ++i) all[i] = groups[i] * threads[i];
  if (!code) code = clEnqueueNDRangeKernel(queue, kernel, 3, nullptr, all, threads, 0, nullptr, nullptr);
  if (!code) code = clFinish(queue);
  return code ? fail(name, code) : 0;
}

}  // namespace driver
