"""`relaxlm compile`."""

from pathlib import Path
from typing import Annotated

import typer


def compile(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder made by gen_config, or the path of a mlc-chat-config.json or config.json."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Library to write: *.so, *.dylib, *.dll, *.a or *.wasm; *.tar for object files.",
        ),
    ],
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto (this machine's NVIDIA GPU, else its CPU), cpu, cuda; metal (of macOS), "
            "opencl, rocm; in browsers, webgpu or wasm (the CPU); or another machine's CPU: "
            "linux-arm64, linux-x86_64, linux-riscv64, android-arm64, "
            "macos-arm64, macos-x86_64, windows-x86_64, ios (docs/targets.md). "
            "--arch may follow: cuda:sm_90, rocm:gfx942, cpu:x86-64-v3, cpu:portable.",
        ),
    ] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="Preset. Default: the one in mlc-chat-config.json."),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            help="cuda: sm_80,sm_90 and so on; default: this machine's GPU. "
            "cpu: native (default), a level such as x86-64-v3, or any processor that LLVM knows, "
            "such as znver4; several, separated by commas, for one library with a version of its "
            "code for each; portable: the levels with kernels of their own (docs/targets.md). "
            "rocm: gfx90a, gfx942, gfx1100 and so on. metal, opencl: the machine "
            "that loads the library, such as ios, android-arm64.",
        ),
    ] = None,
    overrides: Annotated[
        str | None,
        typer.Option(
            "--overrides",
            help='Limits and cache format: "context_window_size=4096;prefill_chunk_size=512;'
            'max_batch_size=8;sliding_window_size=1024;attention_sink_size=4;kv_cache_dtype=fp8".',
        ),
    ] = None,
    opt: Annotated[
        str | None,
        typer.Option(
            "--opt",
            help="CPU code: LLVM's optimisation level, O1 to O3, and act_quant=0 for matmuls in "
            "float32, or 1 to round their activations, which is several times as fast: "
            '"O2;act_quant=0". Default: O2, and 1 where CPU and preset have kernels for it. '
            "batch_invariant=1: the same logits alone and in any batch, for slower prompts "
            "(docs/batch-invariance.md). cuda_graph=1: steps of replies as CUDA graphs, for CUDA "
            "(docs/performance.md).",
        ),
    ] = None,
    debug_dump: Annotated[
        Path | None,
        typer.Option("--debug-dump", help="Folder for the IR after every pass, and kernels."),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Seconds of each stage; for CUDA also registers, shared memory and spills of "
            "every kernel.",
        ),
    ] = False,
) -> None:
    """Compile a model's configuration into one library for one device."""
    from relaxlm.cli.report import compile_progress, print_kernels, print_memory, print_stages
    from relaxlm.compiler.request import CompileRequest
    from relaxlm.models.config import unknown_fields

    request = CompileRequest.read(source, quantization, device, arch, overrides, opt)
    request.device.check_output(output)
    if unknown := unknown_fields(request.config, request.raw):
        typer.echo(
            f"note: {source} has fields that relaxlm does not know and does not use: "
            f"{', '.join(unknown)}. If the model needs them, its results will be wrong."
        )
    with compile_progress(f"compile {output.name}") as progress:
        compiled = request.compile(debug_dump=debug_dump, progress=progress)
        compiled.save(output, progress)
    print_memory(compiled.metadata)
    if verbose:
        print_stages(compiled.seconds)
        if compiled.kernels:
            print_kernels(compiled.kernels)
    target = request.device
    seconds = sum(compiled.seconds.values())
    names = ",".join(arch for one in target.versions for arch in one.arch)
    typer.echo(f"wrote {output}: {target.kind} {names}, {seconds:.1f} s")
