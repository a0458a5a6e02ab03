// relaxlm's stand-in for a header that the TVM wheel lacks: base64 (RFC 4648) over another stream.
#pragma once

#include <tvm/support/io.h>

#include <cstdint>
#include <cstring>

namespace tvm {
namespace support {

inline constexpr char kBase64Letters[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

class Base64OutStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;

  explicit Base64OutStream(Stream* text) : text_(text) {}

  size_t Read(void*, size_t) final { return 0; }
  size_t Write(const void* bytes, size_t count) final {
    for (size_t i = 0; i < count; ++i) {
      group_[held_++] = static_cast<const uint8_t*>(bytes)[i];
      if (held_ == 3) Emit();
    }
    return count;
  }

  // The last group, filled up with "=".
  void Finish() {
    if (held_) Emit();
  }

 private:
  void Emit() {
    std::memset(group_ + held_, 0, 3 - held_);
    const uint32_t bits = group_[0] << 16 | group_[1] << 8 | group_[2];
    char letters[4];
    for (int i = 0; i < 4; ++i) {
      letters[i] = i <= held_ ? kBase64Letters[bits >> (18 - 6 * i) & 63] : '=';
    }
    text_->Write(static_cast<const void*>(letters), sizeof(letters));
    held_ = 0;
  }

  Stream* text_;
  uint8_t group_[3];
  int held_ = 0;
};

class Base64InStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;

  explicit Base64InStream(Stream* text) : text_(text) {}

  void InitPosition() {}

  size_t Write(const void*, size_t) final { return 0; }
  size_t Read(void* bytes, size_t count) final {
    size_t done = 0;
    while (done < count && (next_ < held_ || Take())) {
      static_cast<uint8_t*>(bytes)[done++] = group_[next_++];
    }
    return done;
  }

 private:
  // The next group of up to three bytes; letters outside the alphabet are passed over.
  bool Take() {
    uint32_t bits = 0;
    int letters = 0, padding = 0;
    while (letters < 4) {
      char letter = 0;
      if (text_->Read(static_cast<void*>(&letter), 1) != 1) return false;
      const char* found = letter ? std::strchr(kBase64Letters, letter) : nullptr;
      if (!found && letter != '=') continue;
      padding += letter == '=';
      bits = bits << 6 | (found ? static_cast<uint32_t>(found - kBase64Letters) : 0);
      ++letters;
    }
    for (int i = 0; i < 3; ++i) group_[i] = bits >> (16 - 8 * i) & 255;
    held_ = 3 - padding;
    next_ = 0;
    return held_ > 0;
  }

  Stream* text_;
  uint8_t group_[3];
  int held_ = 0;
  int next_ = 0;
};

}  // namespace support
}  // namespace tvm
