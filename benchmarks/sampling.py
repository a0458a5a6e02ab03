"""How long choosing a token takes, per row of logits.

    python benchmarks/sampling.py [--vocab 151936] [--batch 32] [--other FILE]

FILE is another version of relaxlm/runtime/sampling.py, to be measured beside this one:
`git show v0.2:relaxlm/runtime/sampling.py > FILE`. Rows are random, of two shapes: "peaked" as
language models make them (a few nats of entropy, a long tail), and "flat" as for a temperature that
is far too high. There are more of them than caches hold, as after a step of a large batch.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np

from relaxlm.runtime import sampling
from relaxlm.runtime.generation import GenerationConfig, SamplingState

SETTINGS: dict[str, dict] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "temperature 1": {},
    "top_p 0.9": {"temperature": 0.6, "top_p": 0.9},
    "top_k 40": {"temperature": 0.8, "top_k": 40},
    "top_k 20, top_p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "min_p 0.05": {"temperature": 1.2, "min_p": 0.05},
    "greedy, repetition 1.1": {"temperature": 0, "repetition_penalty": 1.1},
    "all of them": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.01,
        "repetition_penalty": 1.05,
        "frequency_penalty": 0.2,
        "logit_bias": {5: -1.0},
    },
    "greedy, logprobs 5": {"temperature": 0, "logprobs": True, "top_logprobs": 5},
}
PROMPT = 500  # tokens that the repetition penalty looks at
SECONDS = 0.25  # for each number


def rows(shape: str, count: int, vocab: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((count, vocab), np.float32)
    if shape == "peaked":
        logits *= 2.5
        ranks = np.arange(1, min(vocab, 400) + 1)
        for row in logits:
            ids = rng.choice(vocab, len(ranks), replace=False)
            row[ids] = 21 - 2.2 * np.log(ranks) + 0.3 * rng.standard_normal(len(ranks))
    return logits


def measure(
    module: ModuleType, logits: np.ndarray, fields: dict, batch: int, masked: bool
) -> float:
    """Seconds per row, the median of many calls."""
    vocab = logits.shape[1]
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, vocab, PROMPT)
    states = [
        SamplingState(GenerationConfig(seed=i, **fields), prompt, vocab) for i in range(batch)
    ]
    if masked:
        for state in states:
            state.mask = rng.integers(0, 2**32, -(-vocab // 32), np.uint32)
    times: list[float] = []
    place, end = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        some = logits[place : place + batch]
        place = (place + batch) % (len(logits) - batch + 1)
        start = time.perf_counter()
        module.sample(some, states)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / batch


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("other_sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--batch", type=int, default=32, help="rows of the larger batch")
    parser.add_argument("--other", type=Path, help="another version of sampling.py")
    options = parser.parse_args()
    versions = [sampling] if options.other is None else [load(options.other), sampling]
    sizes = (1, options.batch)
    names = ["other", "this"][-len(versions) :]
    heads = [f"{name}, batch {size}" for size in sizes for name in names]
    print(f"Microseconds per row of {options.vocab} logits\n")
    print(f"| {'rows':6} | {'settings':26} |" + "".join(f" {head:>15} |" for head in heads))
    print(f"| {'-' * 6} | {'-' * 26} |" + f" {'-' * 14}: |" * len(heads))
    for shape in ("peaked", "flat"):
        logits = rows(shape, 2 * options.batch, options.vocab)
        for name, fields in SETTINGS.items():
            for masked in (False, True):
                if masked and name not in ("greedy", "top_k 20, top_p 0.8"):
                    continue
                numbers = [
                    1e6 * measure(module, logits, fields, size, masked)
                    for size in sizes
                    for module in versions
                ]
                label = name + ", mask" * masked
                cells = "".join(f" {number:15.0f} |" for number in numbers)
                print(f"| {shape:6} | {label:26} |{cells}", flush=True)


if __name__ == "__main__":
    main()
