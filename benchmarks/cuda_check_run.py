"""The part of `cuda_check.py` that runs what was prepared; needs neither TVM's compiler nor models.

Each item runs in a worker process that runs the next one, too, unless it fails: a kernel that
reads where it must not takes all of CUDA in its process with it.
"""

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np

from relaxlm.profiling.session import Session
from relaxlm.runtime import cuda, tvm_runtime
from relaxlm.runtime.cache_size import CacheSize, pages_for
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import Library
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.step_tables import text_tables

CONTEXT, PROMPT = 128, 2048  # of the speeds
STEPS, ROUNDS = 24, 5
GRAPH_STEPS = 6  # the third of which runs as a CUDA graph for the first time
SCRIPT = Path(__file__).with_name("cuda_check.py")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote: names may have dtypes that files of NumPy do not know."""
    arrays = {}
    with np.load(path) as file:
        for name in file.files:
            plain, _, dtype = name.partition("|")
            arrays[plain] = file[name].view(dtype) if dtype else file[name]
    return arrays


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    plain = {}
    for name, array in arrays.items():
        own = array.dtype.kind in "iuf"
        key = name if own else f"{name}|{array.dtype.name}"
        plain[key] = array if own else array.view(f"u{array.dtype.itemsize}")
    np.savez_compressed(path, **plain)


def logits_of(
    library: Library, params: dict[str, np.ndarray], prompts: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What a model computes of several sequences: in chunks, token by token, and layer by layer.

    Returns:
        logits/i: [n, vocab] float32 of a decoder, [n, hidden] of an encoder, of each sequence.
        layers/j: [n, hidden] float32 of the first sequence, before the layers and after each.
    """
    info, found = library.metadata, {}
    pages = len(prompts) * pages_for(info, max(map(len, prompts)) + GRAPH_STEPS)
    size = CacheSize.of(info, pages, len(prompts))
    executor = Executor.from_arrays(library, params, size.pages, size.state_slots)
    if info.is_encoder:
        tables = text_tables([len(prompt) for prompt in prompts])
        flat = np.concatenate(prompts).astype(np.int32)
        states = executor.embeddings(tables, flat, np.arange(len(flat), dtype=np.int32))
        parts = np.split(states, tables.row_offsets[1:-1])
        found |= {f"logits/{i}": part for i, part in enumerate(parts)}
        layers = executor.hidden_states(text_tables([len(prompts[0])]), prompts[0])
        return found | {f"layers/{i}": layer for i, layer in enumerate(layers)}
    sequences = size.sequences(info)
    held = [sequences.add() for _ in prompts]
    rows: list[list[np.ndarray]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for share in (0.6, 0.0, 0.0, 1.0):  # a large part of each, two single tokens, the rest
        pieces = []
        for i, prompt in enumerate(prompts):
            left = len(prompt) - done[i]
            count = max(1, min(left, round(share * left)))
            pieces.append(prompt[done[i] : done[i] + count].astype(np.int32))
            done[i] += count
        tables = sequences.batch([(s, len(p)) for s, p in zip(held, pieces, strict=True)])
        executor.copy_pages(*sequences.take_copies())
        flat = np.concatenate(pieces)
        logits = executor.forward(tables, flat, np.arange(len(flat), dtype=np.int32))
        for i, part in enumerate(np.split(logits, tables.row_offsets[1:-1])):
            rows[i].append(part.copy())
    found |= {f"logits/{i}": np.concatenate(parts) for i, parts in enumerate(rows)}
    if info.has_cuda_graphs and not info.state.tensors:
        found["graphs/0"] = _off_by_graphs(executor, sequences, held)
    for seq in held:
        sequences.free(seq)
    first = sequences.add()
    tables = sequences.batch([(first, len(prompts[0]))])
    executor.copy_pages(*sequences.take_copies())
    layers = executor.hidden_states(tables, prompts[0].astype(np.int32))
    return found | {f"layers/{i}": layer for i, layer in enumerate(layers)}


def _off_by_graphs(executor: Executor, sequences: PagedSequences, held: list[int]) -> np.ndarray:
    """By how much logits change when steps run as CUDA graphs, [steps]; 0 is right.

    A step is repeated, which writes the same to the same pages.
    """
    off = []
    for step in range(GRAPH_STEPS):
        tables = sequences.batch([(seq, 1) for seq in held])
        executor.copy_pages(*sequences.take_copies())
        ids = np.arange(len(held), dtype=np.int32) + step
        rows = np.arange(len(held), dtype=np.int32)
        logits = executor.forward(tables, ids, rows).copy()
        with executor.without_graphs():
            single = executor.forward(tables, ids, rows)
        off.append(np.abs(logits - single).max())
    return np.array(off)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest error as a share of the largest value; infinite if something is not finite."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    largest = float(np.abs(expected).max())
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(error) / max(largest, 1e-30)


class Runner:
    """Runs items of a prepared folder in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.kind = self.manifest["device"]
        if self.kind == "cuda" and not cuda.load_runtime():
            raise SystemExit("no usable NVIDIA GPU is here, or no libcudart.so.13")
        self.device = tvm_runtime.device(self.kind)

    def run(self, item: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"_{item['part']}")(item)

    def _machine(self, item: dict[str, Any]) -> dict[str, Any]:
        """Bytes per second of reading or copying a large array, whichever is more."""
        name = cuda.gpus()[0].name if self.kind == "cuda" else "CPU"
        return {"device": name, **(_torch_bandwidth() if self.kind == "cuda" else _bandwidth())}

    def _kernel(self, item: dict[str, Any]) -> dict[str, Any]:
        arrays = load_arrays(self.folder / item["data"])
        module = tvm_runtime.load_module(self.folder / item["library"])
        stored = [self._upload(arrays[f"stored/{i}"]) for i in range(item["stored"])]
        errors = {}
        for m in item["rows"]:
            expected = arrays[f"out/{m}"]
            out = tvm_runtime.empty(expected.shape, item["dtype"], self.device)
            module[item["function"]](self._upload(arrays[f"x/{m}"]), *stored, out)
            errors[m] = relative(tvm_runtime.download(out).astype(np.float64), expected)
        return {"error": max(errors.values()), "limit": item["limit"], "rows": errors}

    def _model(self, item: dict[str, Any]) -> dict[str, Any]:
        arrays = load_arrays(self.folder / item["data"])
        params = {n.partition("/")[2]: a for n, a in arrays.items() if n.startswith("params/")}
        prompts = [arrays[f"ids/{i}"] for i in range(item["prompts"])]
        found = logits_of(Library.load(self.folder / item["library"]), params, prompts)
        graphs = found.pop("graphs/0", None)
        errors = {name: relative(values, arrays[name]) for name, values in found.items()}
        logits = max(error for name, error in errors.items() if name.startswith("logits"))
        layers = [error for name, error in errors.items() if name.startswith("layers")]
        result = {"error": logits, "limit": item["limit"], "layers": layers}
        if graphs is not None and not (graphs == 0).all():
            # Whatever they compute, it is not what the same kernels do.
            result |= {"error": float("inf"), "graphs": graphs.tolist()}
        return result

    def _speed(self, item: dict[str, Any]) -> dict[str, Any]:
        library = Library.load(self.folder / item["library"])
        info = library.metadata
        start = time.perf_counter()
        pages = pages_for(info, max(PROMPT, CONTEXT + STEPS + 8))
        size = CacheSize.of(info, pages, 1, kept=1)
        params = {tensor.name: _random_like(tensor.shape, tensor.dtype) for tensor in info.params}
        executor = Executor.from_arrays(library, params, size.pages, size.state_slots)
        del params
        session = Session(executor, size.sequences(info))
        prompt = item["prompt"]
        loaded = time.perf_counter() - start
        session.prefill(prompt)
        prefill = [session.prefill(prompt) for _ in range(ROUNDS)]
        session.decode(CONTEXT, 1, 2)
        decode = [session.decode(CONTEXT, 1, STEPS) for _ in range(ROUNDS)]
        graphs = {}
        if info.has_cuda_graphs:
            with executor.without_graphs():
                single = [session.decode(CONTEXT, 1, STEPS) for _ in range(ROUNDS)]
            graphs = {"decode_single_s": statistics.median(single)}
        return {
            "load_s": loaded,
            "prefill_s": statistics.median(prefill),
            "decode_s": statistics.median(decode),
            **graphs,
            "prompt": prompt,
            "decode_bytes": item["decode_bytes"],
            "operations": item["operations"],
        }

    def _gemm(self, item: dict[str, Any]) -> dict[str, Any]:
        """Operations per second of a library's products at the shapes of a model's layers."""
        torch, device = _torch(self.kind)
        dtype = torch.float16 if self.kind == "cuda" else torch.float32
        operations, seconds = 0, 0.0
        for n, k in item["matrices"]:
            x = torch.randn(item["prompt"], k, device=device, dtype=dtype)
            w = torch.randn(n, k, device=device, dtype=dtype)
            seconds += _fastest(torch, lambda x=x, w=w: torch.nn.functional.linear(x, w))
            operations += 2 * item["prompt"] * n * k
        return {"operations_per_s": operations / seconds, "dtype": str(dtype)}

    def _torch(self, item: dict[str, Any]) -> dict[str, Any]:
        """The same shapes in transformers, in float16 (float32 on a CPU), as it comes."""
        torch, device = _torch(self.kind)
        import transformers

        dtype = torch.float16 if self.kind == "cuda" else torch.float32
        config = transformers.AutoConfig.for_model(**item["config"])
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), torch.no_grad():
                model = transformers.AutoModelForCausalLM.from_config(config).eval()
        finally:
            torch.set_default_dtype(default)
        ids = torch.randint(0, config.vocab_size, (1, item["prompt"]), device=device)
        with torch.no_grad():
            prefill = _fastest(torch, lambda: model(ids, use_cache=True, logits_to_keep=1))
            output = model(ids[:, :CONTEXT], use_cache=True, logits_to_keep=1)
            cache, times = output.past_key_values, []
            for _ in range(STEPS):
                start = time.perf_counter()
                output = model(ids[:, :1], past_key_values=cache, use_cache=True)
                output.logits.argmax(-1).item()
                times.append(time.perf_counter() - start)
        return {"prefill_s": prefill, "decode_s": statistics.median(times), "dtype": str(dtype)}

    def _upload(self, array: np.ndarray) -> Any:
        buffer = np.empty(array.nbytes + tvm_runtime.ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % tvm_runtime.ALIGNMENT
        aligned = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        aligned[...] = array
        return tvm_runtime.copied_to(tvm_runtime.share(aligned), self.device)


def _torch(kind: str) -> tuple[Any, str]:
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this torch has no CUDA")
    return torch, kind


def _fastest(torch: Any, run: Any) -> float:
    """Seconds of the fastest of several calls, once the device is done."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = []
    for _ in range(ROUNDS + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _torch_bandwidth() -> dict[str, Any]:
    torch, device = _torch("cuda")
    a = torch.empty(1 << 30, device=device, dtype=torch.float32).normal_()
    b = torch.empty_like(a)
    size = a.numel() * 4
    read = size / _fastest(torch, lambda: a.sum())
    copied = 2 * size / _fastest(torch, lambda: b.copy_(a))
    return {"read_bytes_per_s": read, "copy_bytes_per_s": copied, "torch": torch.__version__}


def _bandwidth() -> dict[str, Any]:
    a = np.ones(1 << 26, np.float32)
    b = np.ones_like(a)
    speeds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        np.copyto(b, a)
        speeds.append(2 * a.nbytes / (time.perf_counter() - start))
    return {"copy_bytes_per_s": max(speeds)}


_BLOCK = 1 << 24  # random numbers that larger tensors repeat


def _random_like(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Codes of any value, scales and weights about as large as a model's."""
    rng, count = np.random.default_rng(1), int(np.prod(shape))
    few = min(count, _BLOCK)
    if dtype.startswith("uint"):
        block = rng.integers(0, np.iinfo(dtype).max, few, dtype, endpoint=True)
    else:
        block = (0.01 * rng.standard_normal(few, np.float32)).astype(dtype)
    return np.resize(block, count).reshape(shape)


def work(folder: Path, numbers: Sequence[int]) -> None:
    """What a worker does: one line of JSON per item, and it ends at the first that fails."""
    runner = Runner(folder)
    for number in numbers:
        item = runner.manifest["items"][number]
        start = time.perf_counter()
        try:
            result = runner.run(item)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            result = {"failed": f"{type(error).__name__}: {text[-1]}"}
        result["seconds"] = time.perf_counter() - start
        print(f"RESULT {number} {json.dumps(result)}", flush=True)
        if "failed" in result:
            # CUDA may be unusable; nor is it worth waiting for its end.
            os._exit(1)


def run(folder: Path, output: Path, parts: Sequence[str], seconds: float, limit: float) -> bool:
    """Run what has no result yet, at most so long; write results.json and results.md.

    Returns:
        Whether all kernels and models that ran are right.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    items = manifest["items"]
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    waiting = [
        number
        for number, item in enumerate(items)
        if (item["part"] in parts or not parts)
        and ("failed" in results.get(item["name"], {"failed": ""}))
    ]
    end = time.monotonic() + seconds
    while waiting and time.monotonic() < end:
        part = items[waiting[0]]["part"]
        # A process per part: what one leaves in memory and in threads is not the next one's. In
        # the order of the list, where a part may have its most valuable items in front of others.
        together = list(takewhile(lambda n, part=part: items[n]["part"] == part, waiting))
        for number, result in _worker(folder, together, end, limit):
            results[items[number]["name"]] = result
            waiting.remove(number)
            print(f"{items[number]['name']}: {_brief(result)}", flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    table = report(items, results)
    (output / "results.md").write_text(table)
    left = sum(item["name"] not in results for item in items)
    print(f"\n{table}\n{left} of {len(items)} items did not run yet; results in {path}")
    checked = [item["name"] for item in items if item["part"] in ("kernel", "model")]
    return not any(_is_wrong(results[name]) for name in checked if name in results)


def _worker(folder: Path, numbers: Sequence[int], end: float, limit: float):
    """Start a process for items and give each one's result, until one fails or time is over."""
    command = [sys.executable, str(SCRIPT), "worker", str(folder), *map(str, numbers)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    lines: queue.Queue[str | None] = queue.Queue()
    complaints: list[str] = []

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def listen() -> None:
        complaints.extend(process.stderr)

    threads = [threading.Thread(target=target, daemon=True) for target in (read, listen)]
    for thread in threads:
        thread.start()
    try:
        for number in numbers:
            patience = time.monotonic() + limit
            while True:
                wait = min(patience, end) - time.monotonic()
                try:
                    line = lines.get(timeout=max(0.0, wait))
                except queue.Empty:
                    if time.monotonic() < end:
                        yield number, {"failed": f"no result within {limit:.0f} s"}
                    return
                if line is None:
                    process.wait()
                    threads[1].join(2)
                    last = next((text.strip() for text in reversed(complaints) if text.strip()), "")
                    yield number, {"failed": f"ended with status {process.returncode}: {last}"}
                    return
                if line.startswith("RESULT "):
                    _, printed, text = line.split(" ", 2)
                    assert int(printed) == number, "results come in order"
                    result = json.loads(text)
                    yield number, result
                    if "failed" in result:
                        return
                    break
    finally:
        process.kill()
        process.wait()
        for thread, pipe in zip(threads, (process.stdout, process.stderr), strict=True):
            thread.join()
            pipe.close()


def _is_wrong(result: dict[str, Any]) -> bool:
    return "failed" in result or ("limit" in result and not result["error"] <= result["limit"])


def _brief(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    if "limit" in result:
        verdict = "WRONG" if _is_wrong(result) else "right"
        return f"{verdict}, off by {result['error']:.1e} of at most {result['limit']:.0e}"
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
    )


def report(items: Sequence[dict[str, Any]], results: dict[str, Any]) -> str:
    """The results as Markdown: correctness, then speeds as shares of what the device can do."""
    checked = [item["name"] for item in items if item["part"] in ("kernel", "model")]
    done = [name for name in checked if name in results]
    wrong = [name for name in done if _is_wrong(results[name])]
    lines = [
        f"{len(done) - len(wrong)} of {len(checked)} kernels and models are right; "
        f"{len(wrong)} are not, {len(checked) - len(done)} did not run.",
        "",
        "| kernel or model | error | at most | first layer that is off |",
        "|---|---|---|---|",
    ]
    for name in sorted(done, key=lambda name: (name not in wrong, name)):
        result = results[name]
        if "failed" in result:
            lines.append(f"| {name} | {result['failed']} | | |")
            continue
        layers = result.get("layers", [])
        off = next((str(i) for i, e in enumerate(layers) if not e <= result["limit"]), "")
        lines.append(f"| {name} | {result['error']:.1e} | {result['limit']:.0e} | {off} |")
    machine = results.get("machine", {})
    speeds = [machine[k] for k in ("read_bytes_per_s", "copy_bytes_per_s") if k in machine]
    bandwidth = max(speeds, default=None)
    if bandwidth:
        lines += ["", f"{machine['device']}: memory {bandwidth / 1e9:.0f} GB/s, measured"]
    lines += [
        "",
        "| model | decode tok/s | GB/s | of memory | without graphs | prefill tok/s | Tops/s "
        "| of torch's GEMM | torch decode tok/s | torch prefill tok/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in items:
        result = results.get(item["name"], {})
        if item["part"] != "speed" or "decode_s" not in result:
            continue
        gemm = results.get(f"gemm {item['shape']}", {}).get("operations_per_s")
        torch = results.get(f"torch {item['shape']}", {})
        read = result["decode_bytes"] / result["decode_s"]
        rate = result["operations"] / result["prefill_s"]
        cells = [
            item["name"],
            f"{1 / result['decode_s']:.1f}",
            f"{read / 1e9:.1f}",
            f"{read / bandwidth:.1%}" if bandwidth else "",
            f"{1 / result['decode_single_s']:.1f}" if "decode_single_s" in result else "",
            f"{result['prompt'] / result['prefill_s']:.0f}",
            f"{rate / 1e12:.2f}",
            f"{rate / gemm:.1%}" if gemm else "",
            f"{1 / torch['decode_s']:.1f}" if "decode_s" in torch else "",
            f"{result['prompt'] / torch['prefill_s']:.0f}" if "prefill_s" in torch else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [
        f"- {item['name']}: {results[item['name']]['failed']}"
        for item in items
        if item["part"] not in ("kernel", "model") and "failed" in results.get(item["name"], {})
    ]
    return "\n".join([*lines, "", *failed]).rstrip() + "\n"
