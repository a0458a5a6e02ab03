"""The part of `cuda_check.py` that compiles, and computes what is right."""

import argparse
import importlib
import json
import lzma
import math
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from cuda_check_run import CONTEXT, PROMPT, STEPS, logits_of, save_arrays
from make_models import MODELS

from relaxlm import models
from relaxlm.compiler.build import CompiledModel, compile_model
from relaxlm.compiler.cuda import check_device_code, cuda_compilation
from relaxlm.compiler.kernels.cuda_matmul import CudaFormat, matmul_kernel
from relaxlm.compiler.link import export_library
from relaxlm.compiler.options import CompileOptions
from relaxlm.compiler.target import DeviceTarget, resolve_device
from relaxlm.errors import RelaxLMError
from relaxlm.profiling.work import Work
from relaxlm.quantization.groupwise import FLOAT_DTYPES, round_to
from relaxlm.quantization.schemes import Scheme, get_scheme
from relaxlm.runtime.library import Library
from relaxlm.versions import PINNED

# Where the tests have tiny models: of most kinds of layers, and not of every family.
FAMILIES = (
    *("test_parity", "test_families_1", "test_families_1b", "test_families_2", "test_families_2b"),
    *("test_gemma2", "test_families_2c", "test_moe", "test_moe_2", "test_deepseek"),
    *("test_gpt_oss", "test_llama4", "test_gated_delta", "test_rwkv", "test_encoders"),
    "test_alibi",
)
# Together they have every kind of kernel: attention, experts, latents, scans and encoders.
FIRST_FAMILIES = ("llama", "qwen3_moe", "deepseek_v3", "qwen3_next", "rwkv7", "gemma2", "bert")
KERNEL_PRESETS = ("q0f32", "q0f16", "q0bf16", "q4f16_1", "q4f16_0", "q3f16_1", "q8f16_1")
KERNEL_SHAPE, KERNEL_ROWS = (264, 1024), (1, 3, 8, 17, 64, 130)
# Of kernels: what rounding the output costs, with room. Of models: activations and cache, too.
KERNEL_LIMIT = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
MODEL_LIMIT = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
TINY_LIMITS = "context_window_size=128;prefill_chunk_size=128;max_batch_size=128"
# What running takes beside NumPy, which torch has, and a CUDA runtime if torch's is another.
PACKAGES = (
    *(f"{name}=={version}" for name, version in PINNED.items()),
    *("ml_dtypes", "pydantic", "pydantic-core", "annotated-types", "typing-extensions"),
    *("typing-inspection", "jinja2", "markupsafe", "tokenizers"),
    "nvidia-cuda-runtime==13.0.*",
)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **MODELS["llama-3.2-1b"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "1b": MODELS["llama-3.2-1b"],
    "8b": {
        **MODELS["llama-3.2-1b"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


class Preparation:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder
        arch = options.arch if options.device == "cuda" else None
        # For the GPU that is named, and no other.
        self.device = replace(resolve_device(options.device, arch), ptx=False)
        self.items: list[dict[str, Any]] = [{"part": "machine", "name": "machine"}]

    def run(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.options.python:
            self._packages(self.options.python)
        if self.device.kind == "cuda":
            self._kernels()
        else:
            print("kernels: of CUDA only, left out")
        for family, raw in self._families().items():
            for preset in self.options.presets:
                self._model(family, raw, preset)
        for shape in self.options.shapes:
            self._shape(shape)
        self.items.sort(key=_place)
        manifest = {"device": self.device.kind, "arch": self.device.arch, "items": self.items}
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        archive = self.folder.with_name(f"{self.folder.name}.tar.xz")
        self._pack(archive)
        size = archive.stat().st_size / 1e6
        print(f"{archive}: {len(self.items)} items, {size:.1f} MB; tar -xf it on the GPU machine")
        if size > self.options.megabytes:
            print(f"more than {self.options.megabytes:g} MB: name fewer --families or --presets")
            return 1
        return 0

    def _pack(self, archive: Path) -> None:
        """Write the archive, and say what of it is whose."""
        with (
            archive.open("wb") as file,
            lzma.open(file, "wb", preset=9) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for path in sorted(self.folder.iterdir()):
                before = file.tell()
                # Libraries next to each other: they have most of their code in common.
                files = (
                    sorted(path.rglob("*"), key=lambda p: (p.suffix, p))
                    if path.is_dir()
                    else [path]
                )
                for one in files:
                    name = f"{self.folder.name}/{one.relative_to(self.folder)}"
                    tar.add(one, name, recursive=False, filter=_without_results)
                print(f"{path.name}: about {(file.tell() - before) / 1e6:.1f} MB")

    def _packages(self, python: str) -> None:
        target = self.folder / "packages"
        if target.is_dir():
            return
        partial = self.folder / "packages.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command += ["--only-binary", ":all:", "--python-version", python, "--target", str(partial)]
        for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
            command += ["--platform", platform]
        subprocess.run([*command, *PACKAGES], check=True)
        # Of TVM its run-time libraries are loaded by their paths, and nothing is imported.
        for path in (partial / "tvm").iterdir():
            if path.name not in ("lib", "__init__.py"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (partial / "tvm" / "lib" / "libtvm_compiler.so").unlink()
        unused_parts = ("bin", "share", "nvidia/cu13/include")
        for unused in (
            *unused_parts,
            *(f"tvm_ffi/{x}" for x in ("include", "3rdparty", "testing")),
        ):
            shutil.rmtree(partial / unused, ignore_errors=True)
        partial.rename(target)

    def _kernels(self) -> None:
        library = self.folder / "kernels.so"
        functions = {}
        for preset in KERNEL_PRESETS:
            scheme, name = get_scheme(preset), f"matmul_{preset}"
            weight = np.random.default_rng(3).normal(0, 1, KERNEL_SHAPE)
            quant = scheme.linear
            format = CudaFormat.of(KERNEL_SHAPE, quant, scheme.dtype)
            kernel = matmul_kernel(format, scheme.dtype, self.device.shared_memory)
            functions[name] = kernel.with_attr("global_symbol", name)
            if quant is None:
                stored = [weight.astype(FLOAT_DTYPES[scheme.dtype])]
                values = stored[0].astype(np.float64)
            else:
                arrays = quant.quantize(weight)
                stored = list(arrays.values())
                kept = quant.dequantize(arrays, KERNEL_SHAPE)
                values = round_to(kept, scheme.dtype).astype(np.float64)
            data = {f"stored/{i}": array for i, array in enumerate(stored)}
            for m in KERNEL_ROWS:
                x = np.random.default_rng(m).normal(0, 1, (m, KERNEL_SHAPE[1]))
                x = x.astype(FLOAT_DTYPES[scheme.dtype])
                product = x.astype(np.float64) @ values.T
                data |= {f"x/{m}": x, f"out/{m}": product.astype(np.float32)}
            file = self.folder / f"{name}.npz"
            if not file.is_file():
                save_arrays(file, data)
            self.items.append(
                {
                    "part": "kernel",
                    "name": f"matmul {preset}",
                    "library": library.name,
                    "function": name,
                    "data": file.name,
                    "stored": len(stored),
                    "rows": KERNEL_ROWS,
                    "dtype": scheme.dtype,
                    "limit": KERNEL_LIMIT[scheme.dtype],
                }
            )
        if library.is_file():
            return
        with self._clock("kernels"), cuda_compilation(self.device.arch, ptx=False):
            built = tvm.compile(tvm.IRModule(functions), target=self.device.tvm_target())
        archs = self.device.arch
        export_library(
            built, library, check=lambda path: check_device_code(path, archs, library, ptx=False)
        )

    def _families(self) -> dict[str, dict[str, Any]]:
        """model_type -> config.json of the tests' first tiny model of it."""
        found: dict[str, dict[str, Any]] = {}
        for name in FAMILIES:
            for raw in importlib.import_module(f"tests.models.{name}").VARIANTS.values():
                found.setdefault(raw["model_type"], raw)
        wanted = self.options.families
        if wanted is None:
            return found
        if unknown := [family for family in wanted if family not in found]:
            raise SystemExit(f"no family {unknown[0]}; there are {', '.join(sorted(found))}")
        return {family: found[family] for family in wanted}

    def _model(self, family: str, raw: dict[str, Any], preset: str) -> None:
        folder, scheme, name = self.folder / "models", get_scheme(preset), f"{family} {preset}"
        library, data = folder / f"{family}-{preset}.so", folder / f"{family}-{preset}.npz"
        prompts = [np.random.default_rng(n).integers(0, raw["vocab_size"], n) for n in (75, 33)]
        folder.mkdir(exist_ok=True)
        if not (library.is_file() and data.is_file()):
            cpu = resolve_device("cpu")
            params = random_parameters(raw, scheme)
            try:
                with self._clock(name):
                    exact = compiled(raw, scheme, cpu, TINY_LIMITS)
                    built = exact
                    if self.device.kind == "cuda":
                        built = compiled(raw, scheme, self.device, TINY_LIMITS)
            except RelaxLMError as error:
                print(f"{name} is left out: {error}")
                return
            built.save(library)
            reference = Library(exact.executable, exact.metadata, Path("memory"))
            arrays = {f"params/{key}": value for key, value in params.items()}
            arrays |= {f"ids/{i}": ids for i, ids in enumerate(prompts)}
            save_arrays(data, arrays | logits_of(reference, params, prompts))
        exact_here = self.device.kind == "cpu"
        self.items.append(
            {
                "part": "model",
                "name": name,
                "library": f"models/{library.name}",
                "data": f"models/{data.name}",
                "prompts": len(prompts),
                "limit": 0.0 if exact_here else MODEL_LIMIT[scheme.dtype],
            }
        )

    def _shape(self, shape: str) -> None:
        raw, folder = SHAPES[shape], self.folder / "speed"
        folder.mkdir(exist_ok=True)
        config = models.load_config(raw)
        prompt = PROMPT if self.device.kind == "cuda" else 128
        for preset in self.options.shape_presets:
            library, scheme = folder / f"{shape}-{preset}.so", get_scheme(preset)
            limits = f"context_window_size=4096;prefill_chunk_size={prompt};max_batch_size=1"
            facts = library.with_suffix(".json")
            if not (library.is_file() and facts.is_file()):
                with self._clock(f"{shape} {preset}"):
                    built = compiled(raw, scheme, self.device, limits)
                work = Work.of(built.metadata)
                known = {
                    "decode_bytes": work.decode_bytes(CONTEXT + 1 + STEPS // 2, 1),
                    "operations": work.operations(prompt, 0, 1),
                }
                facts.write_text(json.dumps(known))
                built.save(library)
            known = json.loads(facts.read_text())
            item = {"part": "speed", "name": f"{shape} {preset}", "shape": shape, **known}
            self.items.append({**item, "library": f"speed/{library.name}", "prompt": prompt})
        matrices = [
            spec.shape
            for spec in models.parameter_specs(config)
            if spec.role == "linear" and ".0." in spec.name
        ]
        common = {"shape": shape, "prompt": prompt}
        self.items.append({"part": "gemm", "name": f"gemm {shape}", **common, "matrices": matrices})
        self.items.append({"part": "torch", "name": f"torch {shape}", **common, "config": raw})

    def _clock(self, what: str) -> "_Clock":
        return _Clock(what)


def _place(item: dict[str, Any]) -> int:
    """Device time is short: first what says most."""
    first = item["part"] == "model" and item["name"].split()[0] in FIRST_FAMILIES
    order = ("machine", "kernel", "first model", "speed", "gemm", "torch", "model")
    return order.index("first model" if first else item["part"])


def _without_results(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    path = Path(member.name)
    left_out = path.name.startswith("results.") or "__pycache__" in path.parts
    return None if left_out else member


class _Clock:
    def __init__(self, what: str) -> None:
        self.what, self.start = what, time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        print(f"{self.what}: {time.perf_counter() - self.start:.1f} s", flush=True)


def compiled(
    raw: dict[str, Any], scheme: Scheme, device: DeviceTarget, limits: str
) -> CompiledModel:
    config = models.load_config(raw)
    opt = "O2;act_quant=0" if device.kind == "cpu" else "O2"
    if device.kind == "cuda" and config.has_head:
        opt += ";cuda_graph=1"
    options = CompileOptions.resolve(config, scheme, None, limits, opt)
    return compile_model(config, raw, scheme, device, options)


def random_parameters(raw: dict[str, Any], scheme: Scheme) -> dict[str, np.ndarray]:
    """Stored name -> array, with no norm at 1."""
    rng, stored = np.random.default_rng(4), {}
    for spec in models.parameter_specs(models.load_config(raw)):
        quant = scheme.for_role(spec.role)
        if "norm" in spec.name:
            values = rng.uniform(0.5, 1.5, spec.shape)
        else:
            values = rng.normal(0, 1 / math.sqrt(spec.shape[-1]), spec.shape)
        names = scheme.storage(spec)
        arrays = list(quant.quantize(values).values()) if quant is not None else [values]
        for (name, (_, dtype)), array in zip(names.items(), arrays, strict=True):
            stored[name] = array.astype(FLOAT_DTYPES.get(dtype, dtype))
    return stored
