"""onnxruntime-genai, int4 in every matrix.

python onnxruntime_peer.py convert CHECKPOINT FOLDER     # needs torch, transformers, onnx, onnx_ir
python onnxruntime_peer.py serve FOLDER THREADS
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from protocol import MAX_BATCH_CONTEXT, MAX_CONTEXT, StepRuntime, serve


def convert(checkpoint: Path, folder: Path) -> None:
    builder = (sys.executable, "-m", "onnxruntime_genai.models.builder")
    files = ("-i", str(checkpoint), "-o", str(folder), "-p", "int4", "-e", "cpu")
    # Groups of 32 as in the other runtimes' formats; products in int8, the fastest it has; one
    # 4-bit matrix for embedding and head.
    extra = ("int4_block_size=32", "int4_accuracy_level=4", "shared_embeddings=true")
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run((*builder, *files, "-c", cache, "--extra_options", *extra), check=True)


class OnnxRuntime(StepRuntime):
    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__()
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.prompts = np.zeros((1, 1), np.int64)

    def prefill(self, ids: np.ndarray) -> None:
        self.forget()
        self._start(ids[None])
        self.generator.get_logits()

    def prepare(self, ids: np.ndarray) -> None:
        self.prompts = ids
        self._start(ids)

    def rewind(self) -> None:
        if len(self.prompts) > 1:
            self._start(self.prompts)  # it rewinds single sequences only
        else:
            self.generator.rewind_to(self.prompts.shape[1] - 1)
            self.generator.append_tokens(self.prompts[:, -1:].astype(np.int32))

    def step(self, ids: np.ndarray) -> np.ndarray:
        # Picks the best token of the last logits itself, and then computes the next ones.
        self.generator.generate_next_token()
        return self.generator.get_next_tokens()

    def _start(self, ids: np.ndarray) -> None:
        params = self.og.GeneratorParams(self.model)
        length = MAX_CONTEXT if len(ids) == 1 else MAX_BATCH_CONTEXT
        params.set_search_options(
            batch_size=len(ids), max_length=length, min_length=length, do_sample=False
        )
        self.generator = None  # its cache, before there is another one
        self.generator = self.og.Generator(self.model, params)
        self.generator.append_tokens(ids.astype(np.int32))


def load(folder: Path, threads: int):
    runtime = OnnxRuntime(folder, threads)
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder = model["decoder"]
    heads = ("num_hidden_layers", "num_key_value_heads", "head_size")
    layers, kv_heads, head_dim = (decoder[name] for name in heads)
    about = {
        "version": f"onnxruntime-genai {runtime.og.__version__}",
        "format": "int4, groups of 32",
        "weight_bytes": (folder / "model.onnx.data").stat().st_size,
        "kv_bytes_per_token": 2 * layers * kv_heads * head_dim * 4,
    }
    return runtime, model["vocab_size"], about


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(lambda: load(Path(sys.argv[2]), int(sys.argv[3])))
