"""A model of one layer, compiled for this machine and compared with NumPy: `relaxlm doctor`'s test.

    python -m relaxlm.compiler.self_test        prints one line of JSON

It goes through the same pipeline as a real model, in a process of its own: code that does not fit
the processor ends the process, and TVM's threads are counted as a fresh process counts them.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
TOKENS = 21  # more than one page
TOLERANCE = 1e-4  # of the largest logit; float32 arithmetic gives about 1e-6


def reference(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits [n, vocab] of token ids [n], in float64, as the published formulas have them."""
    heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    n, dim = len(ids), CONFIG["head_dim"]
    w = {name.removeprefix("model."): array.astype(np.float64) for name, array in weights.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * w[name]

    angles = np.outer(np.arange(n), CONFIG["rope_theta"] ** (-np.arange(0, dim, 2) / dim))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = w["embed_tokens.weight"][ids]
    y = norm(x, "layers.0.input_layernorm.weight")
    qkv = (y @ w["layers.0.self_attn.qkv_proj.weight"].T).reshape(n, -1, dim)
    q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
    q, k = rotate(q), rotate(k)
    k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
    scores += np.triu(np.full((n, n), -np.inf), 1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    attended = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
    x = x + attended @ w["layers.0.self_attn.o_proj.weight"].T
    y = norm(x, "layers.0.post_attention_layernorm.weight")
    gate, up = np.split(y @ w["layers.0.mlp.gate_up_proj.weight"].T, 2, axis=-1)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["layers.0.mlp.down_proj.weight"].T
    return norm(x, "norm.weight") @ w["lm_head.weight"].T


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 weights that keep activations near 1; the same in each run."""
    generator = np.random.default_rng(2)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = generator.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            scale = 1 if "embed" in name else shape[-1] ** -0.5
            weights[name] = (generator.standard_normal(shape) * scale).astype(np.float32)
    return weights


def run() -> dict[str, Any]:
    """Compile, link, load and run the model, and compare it with `reference`.

    Returns:
        largest_error: relative to the largest logit; `tolerance` is what is allowed.
        compile_s, run_ms: how long it took.
    """
    from relaxlm.compiler.build import compile_model
    from relaxlm.compiler.options import CompileOptions
    from relaxlm.compiler.target import resolve_device
    from relaxlm.models import load_config
    from relaxlm.quantization.schemes import get_scheme
    from relaxlm.runtime.executor import Executor
    from relaxlm.runtime.library import Library
    from relaxlm.runtime.page_pool import PagePool
    from relaxlm.runtime.sequence_table import PagedSequences

    config, scheme, device = load_config(CONFIG), get_scheme("q0f32"), resolve_device("cpu")
    options = CompileOptions.resolve(config, scheme, overrides=f"max_batch_size={TOKENS}")
    start = time.perf_counter()
    compiled = compile_model(config, CONFIG, scheme, device, options)
    with tempfile.TemporaryDirectory(prefix="relaxlm-self-test-") as folder:
        path = Path(folder) / f"model{device.suffix}"
        compiled.save(path)
        library = Library.load(path)
        compile_s = time.perf_counter() - start

        info = library.metadata
        weights = random_weights({param.name: param.shape for param in info.params})
        pool = PagePool(2 * -(-TOKENS // info.kv_cache.page_size))
        executor = Executor.from_arrays(library, weights, pool.total)
        sequences = PagedSequences(pool, info.kv_cache.page_size)
        ids = np.random.default_rng(1).integers(0, config.vocab_size, TOKENS, dtype=np.int32)
        for _ in range(2):  # the first step starts the threads
            start = time.perf_counter()
            tables = sequences.batch([(sequences.add(), TOKENS)])
            logits = executor.forward(tables, ids, np.arange(TOKENS, dtype=np.int32))
            run_ms = 1000 * (time.perf_counter() - start)
    expected = reference(weights, ids)
    return {
        "largest_error": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "tolerance": TOLERANCE,
        "compile_s": compile_s,
        "run_ms": run_ms,
    }


def facts() -> dict[str, Any]:
    """What TVM says of this machine.

    Returns:
        llvm: its major version.
        processor: LLVM's name of the processor.
        threads: that kernels run on.
        cuda_memory: bytes of each NVIDIA GPU that TVM can use.
    """
    import tvm
    import tvm_ffi
    from tvm.target import codegen

    from relaxlm.runtime import cuda
    from relaxlm.runtime.threads import set_threads

    set_threads()
    gpus = range(len(cuda.gpus())) if cuda.load_runtime() else ()
    return {
        "llvm": int(codegen.llvm_version_major()),
        "processor": str(codegen.llvm_get_system_cpu()),
        "threads": int(tvm_ffi.get_global_func("runtime.NumThreads")()),
        "cuda_memory": [int(tvm.cuda(number).total_global_memory) for number in gpus],
    }


if __name__ == "__main__":
    print(json.dumps({**facts(), **run()}))
