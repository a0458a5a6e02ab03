// relaxlm's stand-in for a header that the TVM wheel lacks: memory that is given back all at once.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace tvm {
namespace support {

class Arena {
 public:
  // Not initialised; for types without a destructor.
  template <typename T>
  T* allocate_(size_t count = 1) {
    // `new char[]` is aligned for every fundamental type.
    blocks_.emplace_back(new char[count * sizeof(T)]);
    return reinterpret_cast<T*>(blocks_.back().get());
  }

  void RecycleAll() { blocks_.clear(); }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

}  // namespace support
}  // namespace tvm
