"""Compile a model: configuration, scheme and target in, one library out. No weights are read."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from relaxlm import models
from relaxlm.compiler.cross import zig_linker
from relaxlm.compiler.cuda import CudaBuild, check_device_code, cuda_compilation
from relaxlm.compiler.cuda_report import KernelReport
from relaxlm.compiler.kernels import tuning
from relaxlm.compiler.kernels.attention import PAGE_SIZE
from relaxlm.compiler.kernels.cpu_attention import attend_workspace_bytes
from relaxlm.compiler.kernels.cpu_encoder_attention import (
    attend_workspace_bytes as encoder_workspace_bytes,
)
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape
from relaxlm.compiler.kernels.cpu_latent_attention import (
    attend_workspace_bytes as latent_workspace_bytes,
)
from relaxlm.compiler.link import LinksObjects, export_library
from relaxlm.compiler.options import CompileOptions, check_opt
from relaxlm.compiler.passes.lower_paged_attention import cache_shape
from relaxlm.compiler.passes.own_storage import UPPER_BOUND
from relaxlm.compiler.passes.signature import state_tensors
from relaxlm.compiler.pipeline import (
    Lowering,
    compute_dtype,
    instruction_passes,
    lowering_passes,
    memory_passes,
)
from relaxlm.compiler.plain_gpu import refuse_for_plain_gpu
from relaxlm.compiler.rocm import rocm_compilation
from relaxlm.compiler.target import DeviceTarget
from relaxlm.compiler.web.link import WasmLinker
from relaxlm.errors import UnsupportedError
from relaxlm.files import format_bytes
from relaxlm.models.config import DecoderConfig
from relaxlm.quantization.schemes import Scheme
from relaxlm.runtime.decode_steps import most_sequences
from relaxlm.runtime.metadata import (
    CONTRACT,
    CacheInfo,
    LibraryMetadata,
    Limits,
    MemoryPlan,
    StateInfo,
    TargetInfo,
    TensorInfo,
)
from relaxlm.runtime.peaks import BLOCK
from relaxlm.runtime.threads import usable_cores
from relaxlm.versions import PINNED, RELAXLM_VERSION

Progress = Callable[[str, float], None]

# Tokens of a page where no layer attends: it is never touched, and the fewer there are the better.
_PAGE_OF_NUMBERS = 2**20

# Passes of TVM over loop nests that take time and find nothing to do on CPUs. The first takes
# seconds: buffers inside our kernels have the size that is used of them.
UNUSED_ON_CPU = ("s_tir.CompactBufferAllocation",)
FOR_GPUS = (
    "s_tir.InferFragment",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.InjectVirtualThread",
    "s_tir.LiftThreadBinding",
    "s_tir.LowerThreadAllreduce",
    "s_tir.ManifestSharedMemoryLocalStage",
    "s_tir.MergeSharedMemoryAllocations",
    "s_tir.ThreadSync",
    "s_tir.TransformMmaBufferLayout",
    "s_tir.UnifyThreadBinding",
)

# Layers after which the buffers of a step repeat.
PLANNED_LAYERS = 3
# Bytes that a WebAssembly module of TVM's JavaScript runtime can have: its addresses are signed.
WASM_MEMORY = 2**31


@dataclass
class CompiledModel:
    """A compiled model in memory.

    Attributes:
        executable: for `relax.VirtualMachine`.
        metadata: what the library will say of itself.
        seconds: compile time by stage.
        kernels: of a CUDA library, what each kernel takes on each architecture.
    """

    executable: Any
    metadata: LibraryMetadata
    device: DeviceTarget
    seconds: dict[str, float]
    kernels: list[KernelReport] = field(default_factory=list)

    def save(
        self,
        output: Path,
        progress: Progress = lambda stage, share: None,
        objects: Sequence[Path] = (),
    ) -> None:
        """Write the library; it appears under its name only when complete.

        Args:
            progress: called if something has to be made first that later libraries need, too.
            objects: further object files to link.

        Raises:
            ConfigError: the suffix does not fit the target.
            ToolchainError: no linker, or it failed.
            CompileError: a CUDA library without machine code for some architecture.
        """
        self.device.check_output(output)
        if self.device.suffix == ".wasm":
            linker: LinksObjects | None = WasmLinker.find(
                self.metadata.model_dump_json(),
                lambda: progress("compile TVM's runtime, once", 0.9),
            )
        else:
            platform = self.device.platform
            linker = None if platform.has_linker else zig_linker(platform)

        def check(path: Path) -> None:
            self._check(path, output)

        export_library(self.executable, output, linker, check, objects)

    def _check(self, library: Path, name: Path) -> None:
        if self.device.kind == "cuda":
            check_device_code(library, self.device.arch, name, self.device.ptx)


def compile_model(
    config: DecoderConfig,
    raw_config: Mapping[str, Any],
    scheme: Scheme,
    device: DeviceTarget,
    options: CompileOptions,
    debug_dump: Path | None = None,
    progress: Progress = lambda stage, share: None,
) -> CompiledModel:
    """Compile a model for one device.

    Args:
        config: the checked configuration.
        raw_config: config.json as read; kept in the library, so that it can be compiled again.
        debug_dump: a folder for the IR after each pass and, for CUDA, the kernels.
        progress: called with a stage's name and the share of the work done before it.

    Raises:
        CompileError: TVM, LLVM or nvcc failed.
        UnsupportedError: a model that is too large for the CPU of browsers.
    """
    config = config.with_window(options.sliding_window_size, options.attention_sink_size)
    config = config.for_context(options.context_window_size)
    target = device.tvm_target(options.opt_level)
    seconds: dict[str, float] = {}
    clock = _Stages(seconds, progress)

    clock.start("lower", 0.0)
    module, metadata = _lower(config, raw_config, scheme, device, options, debug_dump)
    if device.kind == "wasm":
        _check_wasm_memory(metadata)
    module = _add_metadata(module, metadata.model_dump_json())

    clock.start("generate code", 0.4)
    with _code_generation(device, debug_dump) as generated:
        executable = relax.build(
            module,
            target,
            relax_pipeline=tvm.transform.Sequential([]),
            system_lib=device.platform.is_static or device.suffix == ".wasm",
        )
    clock.stop()
    kernels = generated.reports if isinstance(generated, CudaBuild) else []
    return CompiledModel(executable, metadata, device, seconds, kernels)


def _check_wasm_memory(info: LibraryMetadata) -> None:
    context, cache = info.limits.context_window_size, info.kv_cache
    pages = context * cache.bytes_per_token
    needed = info.memory.params + info.memory.temporary[info.main_function] + pages
    if needed > WASM_MEMORY:
        raise UnsupportedError(
            f"device 'wasm': the model needs {format_bytes(needed)} ({format_bytes(pages)} of it "
            f"for a context of {context} tokens), and a WebAssembly module has "
            f"{format_bytes(WASM_MEMORY)}. Use a preset of fewer bits, or a smaller "
            '--overrides "context_window_size=...;prefill_chunk_size=..."'
        )


def describe_model(
    config: DecoderConfig,
    raw_config: Mapping[str, Any],
    scheme: Scheme,
    device: DeviceTarget,
    options: CompileOptions,
) -> LibraryMetadata:
    """What a library would say of itself, memory plan included; no code is generated.

    Of the memory plan, only the buffers of what the library is for are given. Layers of one kind
    use the same ones, so the first layers are lowered to find out, up to where kinds repeat.
    """
    config = config.with_window(options.sliding_window_size, options.attention_sink_size)
    config = config.for_context(options.context_window_size)
    depth = _planned_layers(config)
    shallow = config.model_copy(
        update={"num_hidden_layers": depth, "windows": config.windows[:depth]}
    )
    _, plan = _lower(shallow, raw_config, scheme, device, options, None)
    temporary = {plan.main_function: plan.memory.temporary[plan.main_function]}
    specs = models.parameter_specs(config)
    lowering = Lowering(config, specs, scheme, options.kv_format, device.kernels)
    return _metadata(config, raw_config, scheme, device, options, lowering, temporary)


def _planned_layers(config: DecoderConfig) -> int:
    """So many layers from the first on that each kind is among them twice, if it comes twice."""
    layers = range(config.num_hidden_layers)
    places: dict[Any, list[int]] = {}
    for layer in layers:
        kind = (config.has_pages(layer), config.layer_states(layer))
        places.setdefault(kind, []).append(layer)
    last = max(found[:2][-1] for found in places.values())
    return min(len(layers), max(PLANNED_LAYERS, last + 1))


def _lower(
    config: DecoderConfig,
    raw_config: Mapping[str, Any],
    scheme: Scheme,
    device: DeviceTarget,
    options: CompileOptions,
    debug_dump: Path | None,
) -> tuple[tvm.IRModule, LibraryMetadata]:
    """Run every pass; the module is ready for code generation but for `_metadata`."""
    check_opt(options, scheme, device)
    if device.kernels == "gpu":
        # Here already: an exception loses its type on its way through TVM.
        refuse_for_plain_gpu(config, scheme, options.kv_format, device.kind)
    model = models.create(config, compute_dtype(device.kernels, scheme))
    module, _ = model.export_tvm(spec=model.export_spec())
    specs = model.parameter_specs()
    lowering = Lowering(
        config,
        specs,
        scheme,
        options.kv_format,
        device.kernels,
        options.act_quant,
        options.batch_invariant,
        device.shared_memory,
        most_sequences(options.max_batch_size) if options.cuda_graph else 0,
    )
    bounds = _bounds(options, config)
    instruments = []
    if debug_dump is not None:
        debug_dump.mkdir(parents=True, exist_ok=True)
        instruments.append(tvm.ir.instrument.DumpIR(str(debug_dump)))
    context = tvm.transform.PassContext(opt_level=3, instruments=instruments)
    with device.tvm_target(options.opt_level), context, tuning.use(options.tuning):
        module = tvm.transform.Sequential(lowering_passes(lowering))(module)
        module = _bound_shapes(module, bounds)
        module = tvm.transform.Sequential(memory_passes())(module)
        temporary = _temporary_bytes(module)
        if device.kernels == "cpu":
            # Browsers run all of a step on one thread.
            threads = 1 if device.kind == "wasm" else usable_cores()
            workspace = _attention_workspace(config, options, threads)
            for name in model.export_spec():
                temporary[name] += workspace
        module = tvm.transform.Sequential(instruction_passes())(module)
    return module, _metadata(config, raw_config, scheme, device, options, lowering, temporary)


def _code_generation(
    device: DeviceTarget, debug_dump: Path | None
) -> AbstractContextManager[object]:
    """What `tvm.compile` runs in."""
    if device.kernels == "cuda":
        return cuda_compilation(device.arch, debug_dump, device.ptx)
    if device.kind == "rocm":
        return rocm_compilation(device.arch[0])
    if device.kernels == "gpu":
        return nullcontext()
    return tvm.transform.PassContext(disabled_pass=[*UNUSED_ON_CPU, *FOR_GPUS])


class _Stages:
    def __init__(self, seconds: dict[str, float], progress: Progress) -> None:
        self.seconds, self.progress, self.current = seconds, progress, ("", 0.0)

    def start(self, name: str, share: float) -> None:
        self.stop()
        self.current = (name, time.perf_counter())
        self.progress(name, share)

    def stop(self) -> None:
        if self.current[0]:
            self.seconds[self.current[0]] = time.perf_counter() - self.current[1]


def _bounds(options: CompileOptions, config: DecoderConfig) -> dict[str, int]:
    """The largest value of each symbolic length of a step (docs/architecture.md)."""
    return {
        "n": options.prefill_chunk_size,
        "m": options.max_batch_size,
        "r": options.prefill_chunk_size,
        "b": options.max_batch_size,
        "offsets": options.max_batch_size + 1,
        "p": options.max_batch_size * -(-options.context_window_size // PAGE_SIZE),
        "places": options.max_batch_size * -(-config.vocab_size // BLOCK),
    }


def _bound_shapes(module: tvm.IRModule, bounds: Mapping[str, int]) -> tvm.IRModule:
    """Tell the memory planner the largest value of each symbolic length, if it has none yet."""
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            known = (function.attrs or {}).get(UPPER_BOUND, {})
            both = {**bounds, **{length: int(most) for length, most in known.items()}}
            module[name] = function.with_attr(UPPER_BOUND, both)
    return module


def _metadata(
    config: DecoderConfig,
    raw_config: Mapping[str, Any],
    scheme: Scheme,
    device: DeviceTarget,
    options: CompileOptions,
    lowering: Lowering,
    temporary: dict[str, int],
) -> LibraryMetadata:
    params = [
        TensorInfo(name=name, shape=shape, dtype=dtype)
        for spec in lowering.specs
        for name, (shape, dtype) in scheme.storage(spec).items()
    ]
    tensors = [
        TensorInfo(name=f"{layer}.{tensor.name}", shape=tensor.page_shape, dtype=tensor.dtype)
        for layer in range(config.num_hidden_layers)
        if config.has_pages(layer)
        for tensor in lowering.page_tensors()
    ]
    states = [
        TensorInfo(name=f"{layer}.{tensor.name}", shape=tensor.shape, dtype=tensor.dtype)
        for layer, tensor in state_tensors(config)
    ]
    return LibraryMetadata(
        contract=CONTRACT,
        versions={"relaxlm": RELAXLM_VERSION, **PINNED},
        model_type=config.model_type,
        model_task=config.model_task,
        is_encoder=config.is_encoder,
        quantization=scheme.name,
        model_config_json=dict(raw_config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        target=TargetInfo(**device.describe()),
        opt=options.opt,
        limits=Limits(
            context_window_size=options.context_window_size,
            prefill_chunk_size=options.prefill_chunk_size,
            max_batch_size=options.max_batch_size,
            sliding_window_size=config.sliding_window,
            attention_sink_size=config.attention_sinks if config.sliding_window else 0,
        ),
        kv_cache=CacheInfo(
            dtype=options.kv_format.name,
            page_size=PAGE_SIZE if tensors else min(options.context_window_size, _PAGE_OF_NUMBERS),
            num_layers=config.num_hidden_layers,
            tensors=tensors,
            bytes_per_token=sum(
                math.prod(tensor.shape) // PAGE_SIZE * _itemsize(tensor.dtype) for tensor in tensors
            ),
        ),
        state=StateInfo(tensors=states, bytes_per_sequence=sum(map(_nbytes, states))),
        params=params,
        memory=MemoryPlan(
            params=sum(map(_nbytes, params)),
            temporary=temporary,
        ),
    )


def _temporary_bytes(module: tvm.IRModule) -> dict[str, int]:
    """Bytes of storage that the memory plan gives each function, at the largest lengths."""
    sizes: dict[str, int] = {}
    alloc = tvm.ir.Op.get("relax.memory.alloc_storage")
    for name, function in module.functions_items():
        if not isinstance(function, relax.Function):
            continue
        total = 0
        symbols = {var.name for var in relax.analysis.defined_symbolic_vars(function)}
        bounds = function.attrs[UPPER_BOUND].items()
        largest = {name: int(size) for name, size in bounds if name in symbols}

        def visit(expr: relax.Expr) -> None:
            nonlocal total
            if isinstance(expr, relax.Call) and expr.op == alloc:
                total += math.prod(int(extent) for extent in expr.args[0].values)

        relax.analysis.post_order_visit(function.bind_symbolic_vars(largest).body, visit)
        sizes[name.name_hint] = total
    return sizes


def _attention_workspace(config: DecoderConfig, options: CompileOptions, threads: int) -> int:
    """Bytes that attention on a CPU takes beside planned storage.

    What the other kernels take is less than a megabyte per thread.
    """
    if not any(map(config.has_pages, range(config.num_hidden_layers))):
        return 0
    if config.latent_cache is not None:
        latent = LatentShape(config.num_attention_heads, *config.latent_cache, scale=0.0)
        return latent_workspace_bytes(latent, threads)
    shape, target = cache_shape(config), tvm.target.Target.current()
    if config.is_encoder:
        batch, rounded = options.max_batch_size, options.act_quant
        return encoder_workspace_bytes(shape, batch, threads, rounded, target)
    pages = -(-options.context_window_size // PAGE_SIZE) if options.batch_invariant else None
    return attend_workspace_bytes(
        shape,
        options.kv_format,
        options.max_batch_size,
        threads,
        options.act_quant,
        target,
        pages,
    )


def _nbytes(tensor: TensorInfo) -> int:
    return math.prod(tensor.shape) * _itemsize(tensor.dtype)


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _add_metadata(module: tvm.IRModule, text: str) -> tvm.IRModule:
    builder = relax.BlockBuilder(module)
    with builder.function("_metadata", []):
        builder.emit_func_output(tvm.ir.StringImm(text))
    module = builder.finalize()
    for name, function in module.functions_items():
        if name.name_hint == "_metadata":
            module[name] = function.with_attr("global_symbol", "_metadata")
    return module
