#!/usr/bin/env bash
# Makes a folder with a 64-bit ARM Debian's Python and the released wheels that a runtime needs, for
# tests that run libraries for linux-arm64 on this machine, in qemu's user mode:
#
#     tools/arm64_root.sh FOLDER       (needs apt-get and dpkg-deb, pip, and the network; 150 MB)
#
# Nothing is installed on this machine. apt-get keeps its lists and packages in FOLDER, too.
set -euo pipefail
root=$1 python=${PYTHON:-python3}
[ -e "$root/ready" ] && exit 0
rm -rf "$root"
mkdir -p "$root/apt/state/lists/partial" "$root/apt/cache/archives/partial"
touch "$root/apt/status"
apt() {
    apt-get -qq -o Dir::State="$root/apt/state" -o Dir::Cache="$root/apt/cache" \
        -o Dir::State::status="$root/apt/status" -o APT::Architecture=arm64 \
        -o APT::Architectures::=arm64 -o APT::Sandbox::User=root "$@"
}
apt update
apt install -y --download-only --no-install-recommends python3 libstdc++6
for package in "$root"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
version=$(basename "$(ls "$root"/usr/bin/python3.[0-9]*)" | tr -d a-z)
"$python" - > "$root/wheels.txt" <<'P'
# The wheels of what relaxlm's runtime imports, in the releases that are installed here.
from importlib.metadata import version
for name in ("apache-tvm", "apache-tvm-ffi", "annotated-types", "jinja2", "markupsafe", "ml_dtypes",
             "numpy", "pydantic", "pydantic-core", "tokenizers", "typing-extensions",
             "typing-inspection"):
    print(f"{name}=={version(name)}")
P
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform any \
    --python-version "$version" --target "$root/packages" -r "$root/wheels.txt"
# qemu shows this file in place of this machine's; it emulates the processor that has it all.
mkdir -p "$root/proc"
echo "Features : fp asimd crc32 atomics fphp asimdhp asimdrdm jscvt fcma lrcpc asimddp i8mm bf16" \
    > "$root/proc/cpuinfo"
rm -rf "$root/apt" "$root/packages/tvm/lib/libtvm_compiler.so"
touch "$root/ready"
