"""What each preset and KV-cache format costs the demo model: accuracy and loss on held-out text.

    python benchmarks/quality.py                    # every preset, then every cache format
    python benchmarks/quality.py --questions 100    # quicker

Greedy replies to held-out questions, graded by the demo world; mean negative log-likelihood (NLL)
per token of held-out stories. The reference is q0f32 with a float32 cache, which equals
transformers' float32 to rounding. Prints a Markdown table, as in docs/quantization.md.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

from relaxlm import ChatModule, GenerationConfig
from relaxlm.cli.build import build
from relaxlm.demo import MODEL_DIR
from relaxlm.demo.world import Question, grade, held_out_questions, held_out_texts
from relaxlm.quantization.kv_cache import KV_FORMATS
from relaxlm.quantization.schemes import SCHEMES
from relaxlm.runtime.scoring import token_logprobs

# Preset, cache format; the reference first.
CASES = [
    ("q0f32", "float32"),
    *((preset, "float32") for preset in SCHEMES if preset != "q0f32"),
    *(("q0f32", cache) for cache in KV_FORMATS if cache != "float32"),
    ("q4f16_1", "float16"),
    ("q4f16_1", "float8_e4m3"),
]


def measure(preset: str, cache: str, questions: list[Question]) -> tuple[float, float, int, float]:
    """Accuracy, NLL per token, bytes of parameters, and cache bytes per token."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            build(MODEL_DIR, Path(folder), preset, "cpu", overrides=f"kv_cache_dtype={cache}")
        chat = ChatModule(folder, model_lib=next(Path(folder).glob("*-cpu.*")))
        settings = GenerationConfig(temperature=0.0, max_tokens=60)
        right = 0
        for question in questions:
            reply = chat.generate(list(question.messages), settings, stateless=True)
            right += grade(question.kind, str(reply), question.answer)
        chat.reset_chat()
        losses = [
            -token_logprobs(chat.generator, chat.prompts.encode_text(text)).sum()
            for text in held_out_texts()
        ]
        tokens = sum(len(chat.prompts.encode_text(text)) - 1 for text in held_out_texts())
        info = chat.library.metadata
        return (
            right / len(questions),
            float(sum(losses)) / tokens,
            info.memory.params,
            info.kv_cache.bytes_per_token,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10**6, help="at most so many questions")
    questions = held_out_questions()[: parser.parse_args().questions]
    print(f"{len(questions)} questions, {len(held_out_texts())} stories\n")
    print("| preset | KV cache | parameters | cache per token | accuracy | NLL | more than float |")
    print("|---|---|---|---|---|---|---|")
    reference = None
    for preset, cache in CASES:
        accuracy, loss, params, per_token = measure(preset, cache, questions)
        reference = loss if reference is None else reference
        print(
            f"| {preset} | {cache} | {params / 1e6:.2f} MB | {per_token} B | {accuracy:.1%} | "
            f"{loss:.4f} | {loss - reference:+.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
