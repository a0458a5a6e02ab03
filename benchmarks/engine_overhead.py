"""What a step of the engine takes besides the model: planning, tables, sampling, in Python.

    python benchmarks/engine_overhead.py FOLDER [--model-lib LIB]

Replies of a fixed length are written, 1 and 8 at a time, greedy and with top-k and top-p. `model`
is the time inside the compiled model's call with its inputs and outputs, `other` the rest of a
step.
"""

import argparse
import threading
import time

from relaxlm.engine.config import EngineConfig
from relaxlm.engine.loop import EngineLoop
from relaxlm.engine.types import EngineStats, GenerationRequest, Update
from relaxlm.runtime.generation import GenerationConfig

STEPS = 100
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "top_k 20, top_p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
}


def write(engine: EngineLoop, replies: int, config: GenerationConfig) -> None:
    """Run requests to their ends."""
    done = threading.Semaphore(0)

    def deliver(update: Update) -> None:
        if update.error is not None:
            print(f"failed: {update.error}")
        if update.finished:
            done.release()

    for i in range(replies):
        ids = engine.model.prompts.encode_text(f"Number {i}: once upon a time")
        engine.submit(GenerationRequest(ids, config), deliver)
    for _ in range(replies):
        done.acquire()


def idle(engine: EngineLoop) -> EngineStats:
    """The counters once the last step has been counted."""
    while (stats := engine.stats()).running or stats.waiting:
        time.sleep(0.01)
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--model-lib")
    options = parser.parse_args()
    config = EngineConfig(mode="server", prefix_cache=False)
    with EngineLoop.load(options.folder, options.model_lib, config=config) as engine:
        write(engine, 8, GenerationConfig(max_tokens=10, temperature=0.0, ignore_eos=True))
        print(f"{'replies':>7}  {'sampling':<20} {'model':>9} {'other':>9} {'share':>6}")
        for replies in (1, 8):
            for name, fields in SAMPLINGS.items():
                before = idle(engine)
                settings = GenerationConfig(max_tokens=STEPS, ignore_eos=True, **fields)
                write(engine, replies, settings)
                after = idle(engine)
                steps = after.steps - before.steps
                model = (after.forward_seconds - before.forward_seconds) / steps
                other = (after.step_seconds - before.step_seconds) / steps - model
                share = other / (model + other)
                print(
                    f"{replies:>7}  {name:<20} {1e3 * model:>6.2f} ms {1e6 * other:>6.0f} us "
                    f"{share:>6.1%}"
                )


if __name__ == "__main__":
    main()
