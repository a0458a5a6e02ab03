"""Measure how close every family is to its reference; write the tables of models.md and README.

    python -m tests.models.families                  all families
    python -m tests.models.families -k "phi or glm"  some of them; arguments are pytest's

It runs the tests of this folder and keeps what they compare: the logits of compiled models, and
those of the reference. So a row says what a test has checked, with the same variants, prefill,
chunks and single tokens, and a family whose test fails gets none. Where the first test of a family
does not quantize, the quantized model is checked after it, under the same fixtures. A row that was
not measured anew stays as it was.
"""

import datetime
import re
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from relaxlm.models import MODELS
from tests.models import parity

FOLDER = Path(__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- families: start -->", "<!-- families: end -->"
HEADER = (
    "| model_type | runs | reference | float32 | q4f16_1 | measured |",
    "|---|---|---|---|---|---|",
)
TRANSFORMERS, TRANSCRIPTION = "transformers", "NumPy transcription"
NOT_MEASURED = "not yet"
EXACT, QUANTIZED = "q0f32", "q4f16_1"

# What is published under a model_type, where the name does not say it.
RUNS = {
    "apertus": "Apertus 8B and 70B",
    "baichuan": "Baichuan 1 and 2",
    "bert": "BERT encoders for embeddings: bge, E5, GTE, MiniLM, Arctic Embed",
    "bloom": "BLOOM, BLOOMZ",
    "chatglm": "ChatGLM 2 and 3, GLM-4-9B-Chat",
    "cohere": "Command R, Command R+, Aya 23",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek-V2, V2-Lite, Coder-V2",
    "deepseek_v3": "DeepSeek-V3, V3.1, R1",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "exaone4": "EXAONE 4.0 1.2B and 32B",
    "falcon": "Falcon 7B, 40B, 180B, 11B, RW",
    "gemma": "Gemma 1, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B to 27B, text part",
    "gemma3_text": "Gemma 3 270M and 1B",
    "glm": "GLM-4-9B-Chat-HF, GLM-Edge",
    "glm4": "GLM-4-0414, GLM-Z1",
    "glm4_moe": "GLM-4.5, 4.6 and Air",
    "gpt2": "GPT-2, DistilGPT-2",
    "gpt_bigcode": "SantaCoder, StarCoder 1",
    "gpt_neox": "Pythia, Dolly 2, RedPajama-INCITE",
    "gpt_oss": "gpt-oss-20b and 120b",
    "gptj": "GPT-J 6B",
    "granite": "Granite 3 dense",
    "granitemoe": "Granite 3 1B-A400M, 3B-A800M",
    "granitemoehybrid": "Granite 4",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "internlm2": "InternLM 2 and 2.5",
    "kimi_k2": "Kimi K2",
    "lfm2": "LFM2",
    "llama": "Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2, Vicuna, Yi, DeepSeek-R1-Distill-Llama",
    "llama4": "Llama 4 Scout and Maverick, text part",
    "llama4_text": "Llama 4, text part",
    "mamba2": "Mamba 2",
    "mimo": "MiMo 7B",
    "minicpm": "MiniCPM 1 and 2",
    "minimax_m2": "MiniMax M2, M2.1, M2.5",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Mistral Nemo, Mistral Small, Zephyr",
    "mixtral": "Mixtral 8x7B and 8x22B",
    "mpt": "MPT 7B and 30B",
    "nemotron": "Nemotron-4, Minitron",
    "nemotron_h": "Nemotron-H, Nemotron 3",
    "olmo": "OLMo 1",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3 7B and 32B",
    "olmoe": "OLMoE 1B-7B",
    "opt": "OPT 125M to 66B",
    "orion": "Orion 14B",
    "phi": "Phi-1, 1.5 and 2",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    "phimoe": "Phi-3.5-MoE, Phi-mini-MoE",
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3": "Qwen3 dense, Qwen3-Embedding",
    "qwen3_5": "Qwen3.5 dense, text part",
    "qwen3_5_text": "Qwen3.5 dense, text part",
    "qwen3_5_moe": "Qwen3.5 with experts, text part",
    "qwen3_5_moe_text": "Qwen3.5 with experts, text part",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Coder",
    "qwen3_next": "Qwen3-Next",
    "roberta": "RoBERTa encoders for embeddings",
    "rwkv5": "RWKV 5",
    "rwkv6": "RWKV 6",
    "rwkv7": "RWKV 7",
    "seed_oss": "Seed-OSS 36B",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM 3B, StableLM Zephyr, StableLM 2",
    "starcoder2": "StarCoder 2",
    "xlm-roberta": "multilingual E5, BGE-M3 (dense), Arctic Embed 2",
}


@dataclass
class Measured:
    """What the tests of one family have compared.

    Attributes:
        error: scheme -> largest error of a logit, as a share of the largest logit.
        reference: what the logits were compared with.
    """

    error: dict[str, float] = field(default_factory=dict)
    reference: set[str] = field(default_factory=set)


class Recorder:
    """A plugin of pytest that looks at what tests compare."""

    def __init__(self) -> None:
        self.families: dict[str, Measured] = {}
        self.failed: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._reference = TRANSCRIPTION
        self._logits: list[tuple[np.ndarray, str, str]] = []
        self._found: list[tuple[str, str, float]] = []
        self._types: set[str] = set()
        self._exact: dict[str, dict] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self._begin()
        with pytest.MonkeyPatch.context() as patch:
            self._listen(patch)
            try:
                result = yield
                self._quantize()
            except BaseException:
                self.failed |= self._types
                raise
        for model_type, scheme, error in self._found:
            family = self.families.setdefault(model_type, Measured())
            family.error[scheme] = max(error, family.error.get(scheme, 0.0))
            family.reference.add(self._reference)
        return result

    def _quantize(self) -> None:
        """Check the quantized model of a family that was compared for the first time."""
        done = {model_type for model_type, scheme, _ in self._found if scheme == QUANTIZED}
        done |= {name for name, family in self.families.items() if QUANTIZED in family.error}
        compared = {model_type for model_type, _, _ in self._found}
        for model_type in compared - done:
            if raw := self._exact.get(model_type):
                reference = self._reference
                try:
                    parity.check_quantized(raw, QUANTIZED)
                except (KeyError, ValueError):
                    # The test brings a reference or names of its own; there, it has to quantize.
                    self._reference = reference

    def _listen(self, patch: pytest.MonkeyPatch) -> None:
        make, run = parity.Compiled.__init__, parity.Compiled.run
        kinds_of_model = (transformers.AutoModelForCausalLM, transformers.AutoModel)
        compare = np.testing.assert_allclose
        kinds: dict[int, tuple[str, str]] = {}

        def made(compiled, raw, params, scheme, overrides="", *arguments, **options):
            self._types.add(raw["model_type"])
            rounded = "kv_cache_dtype=" in overrides and "kv_cache_dtype=float32" not in overrides
            if scheme == EXACT:
                self._exact[raw["model_type"]] = raw
            kinds[id(compiled)] = (raw["model_type"], "" if rounded else scheme)
            make(compiled, raw, params, scheme, overrides, *arguments, **options)

        def ran(compiled, *arguments, **options):
            logits = run(compiled, *arguments, **options)
            self._logits += [(part, *kinds[id(compiled)]) for part in logits]
            return logits

        def built(from_config):
            def build(*arguments, **options):
                self._reference = TRANSFORMERS
                return from_config(*arguments, **options)

            return build

        def compared(actual, desired, *arguments, **options):
            for logits, model_type, scheme in self._logits:
                if logits is actual:
                    error = np.abs(actual - desired).max() / np.abs(desired).max()
                    self._found.append((model_type, scheme, float(error)))
            compare(actual, desired, *arguments, **options)

        patch.setattr(parity.Compiled, "__init__", made)
        patch.setattr(parity.Compiled, "run", ran)
        for kind in kinds_of_model:
            patch.setattr(kind, "from_config", built(kind.from_config))
        patch.setattr(np.testing, "assert_allclose", compared)


def measure(arguments: list[str]) -> tuple[dict[str, Measured], set[str]]:
    """Run the tests: what they compared, by family, and the families with a test that failed."""
    recorder = Recorder()
    files = sorted(str(path) for path in FOLDER.glob("test_*.py") if path.name != "test_table.py")
    code = pytest.main(
        ["-q", "--no-header", "--assert=plain", *files, *arguments], plugins=[recorder]
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(int(code))
    return recorder.families, recorder.failed


def row(model_type: str, measured: Measured, date: str) -> str:
    """A family's line of the table."""

    def share(scheme: str) -> str:
        return f"{measured.error[scheme]:.0e}" if scheme in measured.error else NOT_MEASURED

    reference = " and ".join(sorted(measured.reference)) or NOT_MEASURED
    cells = (
        f"`{model_type}`",
        runs(model_type),
        reference,
        share(EXACT),
        share(QUANTIZED),
        date if measured.error else NOT_MEASURED,
    )
    return f"| {' | '.join(cells)} |"


def runs(model_type: str) -> str:
    """What is published under a name: from the table above, or from the model's own file."""
    if model_type in RUNS:
        return RUNS[model_type]
    text = import_module(f"relaxlm.models.{MODELS[model_type]}").__doc__ or model_type
    return " ".join(re.split(r",? after |[.:;]", text)[0].split())


def table(families: dict[str, Measured], failed: set[str], old: str, date: str) -> str:
    """The table with a row for every family of relaxlm.

    Args:
        failed: families that keep no row of `old`.
        old: the table that this one replaces.
    """
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `([\w-]+)` \|.*$", old, re.MULTILINE)}
    for model_type in failed:
        rows.pop(model_type, None)
    for model_type in MODELS:
        measured = families.get(model_type, Measured())
        if model_type in failed:
            measured = Measured()
        if measured.error or model_type not in rows:
            rows[model_type] = row(model_type, measured, date)
    return "\n".join([*HEADER, *(rows[model_type] for model_type in sorted(MODELS))])


def short(table: str) -> str:
    """The table's columns that README shows: the type, what runs, the error and its date."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    lines = [f"| {name} | {what} | {error} | {date} |" for name, what, _, error, _, date in rows]
    return "\n".join(["| model_type | runs | error | measured |", "|---|---|---|---|", *lines])


def parts(page: Path) -> tuple[str, str, str]:
    """A page before, in and behind its table."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    return (before, *rest.split(END))


def write(page: Path, new: str) -> None:
    """Replace the table of a page."""
    before, _, after = parts(page)
    page.write_text(f"{before}{START}\n\n{new}\n\n{END}{after}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    families, failed = measure(arguments)
    new = table(families, failed, parts(PAGE)[1], datetime.date.today().isoformat())
    write(PAGE, new)
    write(README, short(new))
    print(f"docs/models.md: measured {len(families)} of {len(MODELS)} families")
    if failed:
        sys.exit(f"error: tests failed, so there is no row for {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main(sys.argv[1:])
