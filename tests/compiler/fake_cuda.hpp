// What a library of emulated kernels gives the stand-in for a driver: a launch with its arguments.
#pragma once
#include <cstddef>

struct FakeLaunch {
  virtual ~FakeLaunch() = default;
  // Runs the whole grid; the result says what went wrong, and is empty if nothing did.
  virtual const char* run(const unsigned grid[3], const unsigned block[3], size_t shared) = 0;
};

// A kernel's entry point in its library, named fake_kernel_NAME: copies the arguments, each of
// which is given by its address as cuLaunchKernel has it.
using FakeKernel = FakeLaunch*(void** arguments);
