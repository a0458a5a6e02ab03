// relaxlm's stand-in for a header that the TVM wheel lacks: what the runtime uses of it.
#pragma once

#include <string>
#include <string_view>

namespace tvm {
namespace support {

inline bool StartsWith(const std::string& text, std::string_view start) {
  return text.compare(0, start.size(), start) == 0;
}

}  // namespace support
}  // namespace tvm
