"""relaxlm, q4f16_1, under the protocol of the others.

    python relaxlm_peer.py serve FOLDER THREADS

The library is compiled when the folder is loaded for the first time.
"""

import os
import sys
from pathlib import Path

import numpy as np
from protocol import StepRuntime, serve


class RelaxLM(StepRuntime):
    """What `relaxlm chat` loads, its tokenizer included; steps without sampling."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from relaxlm import ChatModule

        chat = ChatModule(folder, device="cpu")
        self.generator, self.sequences = chat.generator, chat.sequences
        self.info = chat.library.metadata
        self.held: list[int] = []
        self.length = 0

    def prefill(self, ids: np.ndarray) -> None:
        self.forget()
        self.prepare(ids[None])

    def prepare(self, ids: np.ndarray) -> None:
        for seq in self.held:
            self.sequences.free(seq)
        self.held, self.length = [self.sequences.add() for _ in ids], ids.shape[1]
        for seq, prompt in zip(self.held, ids, strict=True):
            self.generator.prefill(seq, prompt).all().argmax(-1)

    def rewind(self) -> None:
        for seq in self.held:
            self.sequences.truncate(seq, self.length)

    def step(self, ids: np.ndarray) -> np.ndarray:
        rows = np.arange(len(ids), dtype=np.int32)
        steps = [(seq, 1) for seq in self.held]
        return self.generator.step(steps, ids.astype(np.int32), rows).all().argmax(-1)


def load(folder: Path):
    from relaxlm.versions import RELAXLM_VERSION

    runtime = RelaxLM(folder)
    about = {
        "version": f"relaxlm {RELAXLM_VERSION}",
        "format": runtime.info.quantization,
        "weight_bytes": runtime.info.memory.params,
        "kv_bytes_per_token": runtime.info.kv_cache.bytes_per_token,
    }
    return runtime, runtime.info.vocab_size, about


if __name__ == "__main__":
    os.environ["TVM_NUM_THREADS"] = sys.argv[3]
    serve(lambda: load(Path(sys.argv[2])))
