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
    def __init__(self, folder: Path) -> None:
        super().__init__()
        from relaxlm import ChatModule

        chat = ChatModule(folder, device="cpu")
        self.executor, self.sequences = chat.executor, chat.sequences
        self.info = chat.library.metadata
        self.held: list[int] = []
        self.length = 0

    def prefill(self, ids: np.ndarray) -> None:
        self.forget()
        self._start(ids[None])

    def prepare(self, ids: np.ndarray) -> None:
        self._start(ids)

    def rewind(self) -> None:
        for seq in self.held:
            self.sequences.truncate(seq, self.length)

    def step(self, ids: np.ndarray) -> np.ndarray:
        tables = self.sequences.batch([(seq, 1) for seq in self.held])
        rows = np.arange(len(ids), dtype=np.int32)
        return self.executor.forward(tables, ids.astype(np.int32), rows).argmax(-1)

    def _start(self, ids: np.ndarray) -> None:
        """The prompts [batch, n], and nothing else, in the cache."""
        for seq in self.held:
            self.sequences.free(seq)
        self.held, self.length = [self.sequences.add() for _ in ids], ids.shape[1]
        chunk = self.info.limits.prefill_chunk_size
        for seq, prompt in zip(self.held, ids.astype(np.int32), strict=True):
            for start in range(0, len(prompt), chunk):
                part = prompt[start : start + chunk]
                tables = self.sequences.batch([(seq, len(part))])
                last = np.array([len(part) - 1], np.int32)
                self.executor.forward(tables, part, last).argmax(-1)


def load(folder: Path):
    from relaxlm.versions import RELAXLM_VERSION

    runtime = RelaxLM(folder)
    about = {"version": f"relaxlm {RELAXLM_VERSION}", "format": runtime.info.quantization}
    about |= {
        "weight_bytes": runtime.info.memory.params,
        "kv_bytes_per_token": runtime.info.kv_cache.bytes_per_token,
    }
    return runtime, runtime.executor.vocab_size, about


if __name__ == "__main__":
    os.environ["TVM_NUM_THREADS"] = sys.argv[3]
    serve(lambda: load(Path(sys.argv[2])))
