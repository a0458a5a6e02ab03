"""What share of its layers' time each family spends outside matrices and attention.

    python benchmarks/family_overhead.py models                   # makes what is not there yet
    python benchmarks/family_overhead.py models --models phi-2@4 --threads 1

Random weights, real widths, few layers: what stands between matrices is the same in every layer.
What a step does once (embedding, angles, head) is left out, since a deep model does it once, too.
The shortest of the rounds counts, for each kernel, so that other programs disturb less.
"""

import argparse
from pathlib import Path

from family_shapes import FAMILIES
from make_models import make

from relaxlm.profiling.profile import ROOM, StepProfile, profile_decode, profile_prefill
from relaxlm.profiling.session import Session
from relaxlm.runtime.threads import set_threads

MATRICES = ("matmul", "rounded_matmul", "gated_matmul")
ATTENTION = ("paged_attention",)


def per_layer(profile: StepProfile, layers: int) -> dict[str, float]:
    """Seconds of what every layer does: matrices, attention, and each other kernel by its name."""
    seconds = {"matrices": 0.0, "attention": 0.0}
    for part in profile.kernels:
        if part.calls < layers - 1:  # once per step, or twice
            continue
        name = part.name.rstrip("0123456789")
        name = "matrices" if name in MATRICES else "attention" if name in ATTENTION else name
        seconds[name] = seconds.get(name, 0.0) + part.seconds
    return seconds


def row(title: str, profile: StepProfile, layers: int) -> str:
    seconds = per_layer(profile, layers)
    total = sum(seconds.values())
    matrices, attention = seconds.pop("matrices"), seconds.pop("attention")
    others = sorted(seconds.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {taken / total:.1%}" for name, taken in others[:6])
    cells = (
        title,
        f"{total / layers * 1e6:.0f}",
        f"{matrices / total:.1%}",
        f"{attention / total:.1%}",
        f"{sum(seconds.values()) / total:.1%}",
        listed,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for all models")
    parser.add_argument("--models", nargs="+", default=[f"{name}@4" for name in FAMILIES])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--context", type=int, default=128)
    options = parser.parse_args()
    set_threads(options.threads)
    print("| model | step | us per layer | matrices | attention | others | of these |")
    print("|---|---|---|---|---|---|---|")
    for model in options.models:
        folder = make(options.output, model, "relaxlm", {})
        room = [(1, options.prompt), (1, options.context + 2 * options.rounds + ROOM)]
        limits = f"context_window_size=512;prefill_chunk_size={options.prompt}"
        session = Session.load(folder, None, "cpu", limits, room)
        layers = session.executor.metadata.kv_cache.num_layers
        prefill = profile_prefill(session, options.prompt, options.rounds, min)
        print(row(f"{model} | {prefill.title}", prefill, layers), flush=True)
        decode = profile_decode(session, options.context, 1, options.rounds, min)
        print(row(f"{model} | {decode.title}", decode, layers), flush=True)


if __name__ == "__main__":
    main()
