// relaxlm's stand-in for a header that the TVM wheel lacks: values as bytes, as libraries have them.
//
// Numbers are little-endian, as WebAssembly is; texts and lists begin with their length, uint64.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#define TVM_FFI_IO_NO_ENDIAN_SWAP 1

namespace tvm {
namespace support {

// Numbers and enumerations.
template <typename T, typename>
struct Serializer {
  static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>, "no Serializer for this type");
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const T& value) {
    stream->Write(static_cast<const void*>(&value), sizeof(T));
  }
  static bool Read(Stream* stream, T* value) {
    return stream->Read(static_cast<void*>(value), sizeof(T)) == sizeof(T);
  }
};

template <>
struct Serializer<DLDataType> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const DLDataType& value) {
    stream->Write(value.code);
    stream->Write(value.bits);
    stream->Write(value.lanes);
  }
  static bool Read(Stream* stream, DLDataType* value) {
    return stream->Read(&value->code) && stream->Read(&value->bits) && stream->Read(&value->lanes);
  }
};

template <>
struct Serializer<DLDevice> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const DLDevice& value) {
    stream->Write(static_cast<int32_t>(value.device_type));
    stream->Write(static_cast<int32_t>(value.device_id));
  }
  static bool Read(Stream* stream, DLDevice* value) {
    int32_t type = 0, id = 0;
    if (!stream->Read(&type) || !stream->Read(&id)) return false;
    *value = DLDevice{static_cast<DLDeviceType>(type), id};
    return true;
  }
};

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const std::string& value) {
    stream->Write(static_cast<uint64_t>(value.size()));
    stream->Write(static_cast<const void*>(value.data()), value.size());
  }
  static bool Read(Stream* stream, std::string* value) {
    uint64_t size = 0;
    if (!stream->Read(&size)) return false;
    value->resize(static_cast<size_t>(size));
    return stream->Read(static_cast<void*>(value->data()), value->size()) == value->size();
  }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const ffi::String& value) {
    stream->Write(std::string(value.data(), value.size()));
  }
  static bool Read(Stream* stream, ffi::String* value) {
    std::string text;
    if (!stream->Read(&text)) return false;
    *value = ffi::String(std::move(text));
    return true;
  }
};

template <typename First, typename Second>
struct Serializer<std::pair<First, Second>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const std::pair<First, Second>& value) {
    stream->Write(value.first);
    stream->Write(value.second);
  }
  static bool Read(Stream* stream, std::pair<First, Second>* value) {
    return stream->Read(&value->first) && stream->Read(&value->second);
  }
};

namespace detail {

// A value to read into; objects of TVM have no default but null.
template <typename T>
T Blank() {
  if constexpr (std::is_default_constructible_v<T>) {
    return T();
  } else {
    return T(nullptr);
  }
}

// Anything that can be walked over: its length, then its items.
template <typename Items>
void WriteItems(Stream* stream, const Items& items) {
  stream->Write(static_cast<uint64_t>(items.size()));
  for (const auto& item : items) stream->Write(item);
}

// Calls `add` with each item.
template <typename Item, typename Add>
bool ReadItems(Stream* stream, Add add) {
  uint64_t size = 0;
  if (!stream->Read(&size)) return false;
  for (uint64_t i = 0; i < size; ++i) {
    Item item = Blank<Item>();
    if (!stream->Read(&item)) return false;
    add(std::move(item));
  }
  return true;
}

}  // namespace detail

template <typename T>
struct Serializer<std::vector<T>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const std::vector<T>& value) {
    detail::WriteItems(stream, value);
  }
  static bool Read(Stream* stream, std::vector<T>* value) {
    value->clear();
    return detail::ReadItems<T>(stream, [&](T item) { value->push_back(std::move(item)); });
  }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const ffi::Array<T>& value) {
    detail::WriteItems(stream, value);
  }
  static bool Read(Stream* stream, ffi::Array<T>* value) {
    *value = ffi::Array<T>();
    return detail::ReadItems<T>(stream, [&](T item) { value->push_back(std::move(item)); });
  }
};

template <typename Key, typename Value>
struct Serializer<std::unordered_map<Key, Value>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const std::unordered_map<Key, Value>& value) {
    stream->Write(static_cast<uint64_t>(value.size()));
    for (const auto& [key, item] : value) {
      stream->Write(key);
      stream->Write(item);
    }
  }
  static bool Read(Stream* stream, std::unordered_map<Key, Value>* value) {
    using Item = std::pair<Key, Value>;
    value->clear();
    return detail::ReadItems<Item>(stream, [&](Item item) { value->insert(std::move(item)); });
  }
};

template <typename Key, typename Value>
struct Serializer<ffi::Map<Key, Value>> {
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const ffi::Map<Key, Value>& value) {
    stream->Write(static_cast<uint64_t>(value.size()));
    for (const auto& [key, item] : value) {
      stream->Write(key);
      stream->Write(item);
    }
  }
  static bool Read(Stream* stream, ffi::Map<Key, Value>* value) {
    using Item = std::pair<Key, Value>;
    *value = ffi::Map<Key, Value>();
    return detail::ReadItems<Item>(stream, [&](Item item) { value->Set(item.first, item.second); });
  }
};

}  // namespace support
}  // namespace tvm
