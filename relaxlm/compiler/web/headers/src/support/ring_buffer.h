// relaxlm's stand-in for a header that the TVM wheel lacks: bytes, first in, first out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace tvm {
namespace support {

class RingBuffer {
 public:
  size_t bytes_available() const { return bytes_.size() - position_; }

  void Reserve(size_t count) { bytes_.reserve(position_ + count); }

  // The buffer must hold that much.
  void Read(void* bytes, size_t count) {
    std::memcpy(bytes, bytes_.data() + position_, count);
    Advance(count);
  }

  void Write(const void* bytes, size_t count) {
    const char* start = static_cast<const char*>(bytes);
    bytes_.insert(bytes_.end(), start, start + count);
  }

  // `send` takes bytes and tells how many; so does this.
  template <typename Send>
  size_t ReadWithCallback(Send send, size_t most) {
    const size_t taken = send(bytes_.data() + position_, std::min(most, bytes_available()));
    Advance(taken);
    return taken;
  }

  // `receive` writes bytes and tells how many; so does this.
  template <typename Receive>
  size_t WriteWithCallback(Receive receive, size_t most) {
    const size_t before = bytes_.size();
    bytes_.resize(before + most);
    const size_t received = receive(bytes_.data() + before, most);
    bytes_.resize(before + received);
    return received;
  }

 private:
  void Advance(size_t count) {
    position_ += count;
    if (position_ == bytes_.size()) {
      bytes_.clear();
      position_ = 0;
    }
  }

  std::vector<char> bytes_;
  size_t position_ = 0;
};

}  // namespace support
}  // namespace tvm
