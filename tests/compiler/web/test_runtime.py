"""What TVM's runtime for browsers is compiled from; that it works is shown in `tests/web`."""

import shutil
import subprocess
from pathlib import Path

import pytest

from relaxlm.compiler.web import runtime
from relaxlm.errors import ToolchainError

# Each header's part in what libraries are read with, there and back.
ROUND_TRIP = r"""
#define TVM_FFI_DLL
#include <cassert>
#include "src/support/base64.h"
#include "src/support/bytes_io.h"
#include "src/support/ring_buffer.h"
#include "src/support/utils.h"
#include "3rdparty/compiler-rt/builtin_fp16.h"
using namespace tvm::support;

float half(uint16_t bits) {
  return __extendXfYf2__<uint16_t, uint16_t, 10, float, uint32_t, 23>(bits);
}

int main() {
  std::string bytes;
  BytesOutStream out(&bytes);
  std::vector<std::pair<std::string, int64_t>> pairs{{"one", 1}, {"", -2}};
  std::unordered_map<std::string, std::vector<double>> map{{"a", {0.5, 2}}, {"b", {}}};
  out.Write(pairs);
  out.Write(map);
  out.Write<uint32_t>(7);
  // A length is 8 bytes.
  assert(bytes.size() == 8 + (8 + 3 + 8) + (8 + 0 + 8) + 8 + (8 + 1 + 8 + 16) + (8 + 1 + 8) + 4);
  BytesInStream in(bytes);
  decltype(pairs) pairs2;
  decltype(map) map2;
  uint32_t seven = 0, more = 0;
  assert(in.Read(&pairs2) && in.Read(&map2) && in.Read(&seven) && !in.Read(&more));
  assert(pairs2 == pairs && map2 == map && seven == 7);

  for (size_t size = 0; size < 10; ++size) {
    std::string plain = std::string("\0\xff\x10qwerty\x80", 10).substr(0, size);
    std::string text, back(size, 0);
    BytesOutStream letters(&text);
    Base64OutStream encoder(&letters);
    encoder.Stream::WriteArray(plain.data(), size);
    encoder.Finish();
    if (size == 4) assert(text == "AP8QcQ==");
    text.insert(text.size() / 2, "\n");
    BytesInStream again(text);
    Base64InStream decoder(&again);
    assert(decoder.Stream::ReadArray(back.data(), size) && back == plain);
    char end;
    assert(decoder.Read(static_cast<void*>(&end), 1) == 0);
  }

  RingBuffer ring;
  for (int i = 0; i < 100; ++i) {
    ring.Write(&i, sizeof(i));
    if (i % 3 == 0) ring.WriteWithCallback([](void* p, size_t) { return size_t{0}; }, 50);
  }
  for (int i = 0, found; i < 100; ++i, assert(found == i - 1)) ring.Read(&found, sizeof(found));
  assert(ring.bytes_available() == 0);

  assert(StartsWith("abc", "ab") && !StartsWith("a", "ab") && StartsWith("a", ""));
  assert(half(0x3c00) == 1 && half(0xc000) == -2 && half(1) == 0x1p-24f);
  assert(half(0x83ff) == -1023 * 0x1p-24f);
  assert(half(0x7bff) == 65504 && half(0x7c00) == 1 / 0.0f && half(0x7e00) != half(0x7e00));
}
"""


def test_the_sources_are_complete_and_without_what_is_not_used(tmp_path: Path) -> None:
    runtime.assemble(tmp_path / "tree")
    text = (tmp_path / "tree" / "web" / "emcc" / "wasm_runtime.cc").read_text()
    assert '#include "src/runtime/vm/vm.cc"' in text
    for part in runtime.OMITTED:
        assert (tmp_path / "tree" / part).is_file(), f"{part} is no longer a part of TVM"
        assert part not in text


def test_our_headers_do_what_their_names_say(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: neither g++ nor clang++")
    tree = tmp_path / "tree"
    runtime.assemble(tree)
    (tmp_path / "test.cc").write_text(ROUND_TRIP)
    include = [f"-I{tree / path}" for path in runtime.INCLUDED]
    ffi = runtime.package_folder("tvm_ffi") / "lib"
    command = [compiler, "-std=c++17", "-UNDEBUG", *include, "test.cc", "-o", "test"]
    command += [f"-L{ffi}", "-ltvm_ffi", f"-Wl,-rpath,{ffi}"]
    subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "test"], check=True)


def test_without_emscripten_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCC", "no-such-emcc -v")
    with pytest.raises(ToolchainError, match="there is no program 'no-such-emcc'; install it"):
        runtime.find_emcc()


def test_a_failed_build_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    emcc = tmp_path / "emcc"
    emcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo emcc 1 && exit\necho "error: no"; exit 1\n'
    )
    emcc.chmod(0o755)
    monkeypatch.setenv("RELAXLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ToolchainError, match=r"failed to compile \w+\.cc of TVM's runtime .*no"):
        runtime.runtime_objects((str(emcc),))
    assert list((tmp_path / "cache" / "wasm-runtime").iterdir()) == []
