"""openvino-genai's LLMPipeline, int4 in every matrix.

    python openvino_peer.py convert CHECKPOINT FOLDER     # needs optimum-intel and nncf
    python openvino_peer.py serve FOLDER THREADS [PRECISION]

PRECISION is that of the arithmetic: by default bfloat16 where the CPU has it in hardware; f32 makes
decoding faster there, and prompts slower.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from protocol import Runtime, kv_values, serve

# The export's own script is not in the interpreter's path where an environment isn't activated.
_EXPORT = "from optimum.commands.optimum_cli import main; main()"
# The first steps after a prompt are slower than the rest.
_WARM_UP = 2


def convert(checkpoint: Path, folder: Path) -> None:
    command = (sys.executable, "-c", _EXPORT, "export", "openvino", "--model", str(checkpoint))
    # Groups of 128 are its fastest format, with 4.125 bits per weight where others have 4.5; the
    # embedding and the head are in 4 bits, too.
    weights = ("--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0")
    task = ("--task", "text-generation-with-past")
    subprocess.run((*command, *task, *weights, "--all-layers", str(folder)), check=True)


class OpenVino(Runtime):
    def __init__(self, folder: Path, threads: int, precision: str | None) -> None:
        import openvino
        import openvino_genai

        self.ov, self.genai = openvino, openvino_genai
        settings: dict[str, object] = {"INFERENCE_NUM_THREADS": threads}
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **settings)

    def prefill(self, ids: np.ndarray) -> None:
        self._generate(ids[None], 1)

    def decode(self, ids: np.ndarray, steps: int) -> float:
        # The pipeline keeps the prompt's cache: only the first call computes it.
        metrics = self._generate(ids, 1 + _WARM_UP + steps).perf_metrics.raw_metrics
        ends = np.array(metrics.m_new_token_times) / 1e3  # one per step, whatever the batch
        return float(ends[-1] - ends[_WARM_UP]) / (len(ends) - 1 - _WARM_UP)

    def _generate(self, ids: np.ndarray, tokens: int):
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        mask = np.ones(ids.shape, np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(mask))
        return self.pipeline.generate(inputs, config)


def load(folder: Path, threads: int, precision: str | None):
    runtime = OpenVino(folder, threads, precision)
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    about = {
        "version": f"openvino-genai {runtime.genai.__version__.partition('-')[0]}",
        "format": "int4 symmetric, groups of 128" + (f", {precision}" if precision else ""),
        "weight_bytes": (folder / "openvino_model.bin").stat().st_size,
        # Codes of 8 bits, and two float32 for every head's token.
        "kv_bytes_per_token": kv_values(config) + 8 * kv_values(config) // config["head_dim"],
    }
    return runtime, config["vocab_size"], about


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        precision = sys.argv[4] if len(sys.argv) > 4 else None
        serve(lambda: load(Path(sys.argv[2]), int(sys.argv[3]), precision))
