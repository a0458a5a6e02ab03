"""The demo model: a toy that this project made itself, to try relaxlm without a download.

`MODEL_DIR` is an ordinary Hugging Face folder with a Llama-architecture chat model of about 1.7
million parameters. `tools/train_demo.py` trained it, from nothing, on text that the
grammar in `relaxlm.demo.world` generates: facts about sixteen made-up villagers, short stories and
sums of two-digit numbers. It knows nothing else and is no use outside that world. It contains no
other text or weights, and is licensed with the project under Apache-2.0.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""The folder with config.json, model.safetensors, tokenizer.json and the model's other files."""

__all__ = ["MODEL_DIR"]
