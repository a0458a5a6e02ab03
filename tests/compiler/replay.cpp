// TVM's runtime, of the sources that the wheels ship, and a program that calls a library with given
// tensors, for systems that have neither wheels nor a Python.
//
//     replay LIBRARY CALLS OUTPUT
//
// CALLS has what `test_riscv64.py` writes; OUTPUT gets the bytes of what "forward" returns, one call
// after the other.

#define TVM_FFI_USE_LIBBACKTRACE 0
#define TVM_FFI_ALWAYS_LOG_BEFORE_THROW 1

#include <algorithm>
#include <cctype>
#include <fstream>
#include <string>

// The one function of src/support/utils.h, which the wheels lack, that browsers have no use for.
namespace tvm::support {
inline bool IsNumber(const std::string& text) {
  auto digit = [](unsigned char c) { return std::isdigit(c) != 0; };
  return !text.empty() && std::all_of(text.begin(), text.end(), digit);
}
}  // namespace tvm::support

#include "3rdparty/tvm-ffi/src/ffi/backtrace.cc"
#include "3rdparty/tvm-ffi/src/ffi/container.cc"
#include "3rdparty/tvm-ffi/src/ffi/custom_allocator.cc"
#include "3rdparty/tvm-ffi/src/ffi/dtype.cc"
#include "3rdparty/tvm-ffi/src/ffi/error.cc"
#include "3rdparty/tvm-ffi/src/ffi/extra/env_c_api.cc"
#include "3rdparty/tvm-ffi/src/ffi/extra/env_context.cc"
#include "3rdparty/tvm-ffi/src/ffi/extra/json_parser.cc"
#include "3rdparty/tvm-ffi/src/ffi/extra/json_writer.cc"
#include "3rdparty/tvm-ffi/src/ffi/extra/library_module.cc"
#include "3rdparty/tvm-ffi/src/ffi/extra/library_module_dynamic_lib.cc"
#include "3rdparty/tvm-ffi/src/ffi/extra/module.cc"
#include "3rdparty/tvm-ffi/src/ffi/function.cc"
#include "3rdparty/tvm-ffi/src/ffi/init_once.cc"
#include "3rdparty/tvm-ffi/src/ffi/object.cc"
#include "3rdparty/tvm-ffi/src/ffi/tensor.cc"
#include "src/runtime/cpu_device_api.cc"
#include "src/runtime/device_api.cc"
#include "src/runtime/file_utils.cc"
#include "src/runtime/logging.cc"
#include "src/runtime/memory/memory_manager.cc"
#include "src/runtime/module.cc"
#include "src/runtime/tensor.cc"
#include "src/runtime/thread_pool.cc"
#include "src/runtime/threading_backend.cc"
#include "src/runtime/timer.cc"
#include "src/runtime/vm/builtin.cc"
#include "src/runtime/vm/bytecode.cc"
#include "src/runtime/vm/executable.cc"
#include "src/runtime/vm/vm.cc"
#include "src/runtime/workspace_pool.cc"

namespace {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::runtime::Tensor;

struct Reader {
  std::ifstream file;
  int64_t number() {
    int64_t value = 0;
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    if (!file) throw std::runtime_error("the file of calls ends early");
    return value;
  }
  std::vector<char> bytes() {
    std::vector<char> found(number());
    file.read(found.data(), found.size());
    return found;
  }
  Tensor tensor() {
    DLDataType type{static_cast<uint8_t>(number()), static_cast<uint8_t>(number()), 1};
    std::vector<int64_t> shape(number());
    for (int64_t& size : shape) size = number();
    Tensor made = Tensor::Empty(tvm::ffi::Shape(shape), type, DLDevice{kDLCPU, 0});
    std::vector<char> values = bytes();
    if (!values.empty()) made.CopyFromBytes(values.data(), values.size());
    return made;
  }
  tvm::ffi::Array<Tensor> tensors() {
    tvm::ffi::Array<Tensor> found;
    for (int64_t left = number(); left > 0; --left) found.push_back(tensor());
    return found;
  }
};

}  // namespace

int main(int, char** arguments) {
  tvm::ffi::Module library = tvm::ffi::Module::LoadFromFile(arguments[1]);
  tvm::ffi::Module vm =
      (*library->GetFunction("vm_load_executable"))().cast<tvm::ffi::Module>();
  (*vm->GetFunction("vm_initialization"))(static_cast<int>(kDLCPU), 0, 2);
  tvm::ffi::Function forward = *vm->GetFunction("forward");
  Reader calls{std::ifstream(arguments[2], std::ios::binary)};
  std::ofstream output(arguments[3], std::ios::binary);
  tvm::ffi::Array<Tensor> cache = calls.tensors(), parameters = calls.tensors();
  for (int64_t left = calls.number(); left > 0; --left) {
    tvm::ffi::Array<Tensor> inputs = calls.tensors();
    std::vector<AnyView> given(inputs.begin(), inputs.end());
    given.push_back(cache);
    given.push_back(parameters);
    Any result;
    forward.CallPacked(given.data(), given.size(), &result);
    Tensor logits = result.cast<Tensor>();
    std::vector<char> values(tvm::ffi::GetDataSize(*logits.operator->()));
    logits.CopyToBytes(values.data(), values.size());
    output.write(values.data(), values.size());
  }
}
