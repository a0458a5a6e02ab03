"""Random-weight models with the shapes of real ones, in every form that `compare.py` measures.

    python benchmarks/make_models.py models                         # checkpoint and relaxlm's form
    python benchmarks/make_models.py models --forms llama.cpp --peer-python llama.cpp=PYTHON

Per model, OUTPUT/MODEL/checkpoint is a Hugging Face folder (float16 safetensors, a tokenizer with
as many tokens as the real one), from which every other form is made: OUTPUT/MODEL/relaxlm (q4f16_1)
and OUTPUT/MODEL/PEER by peers/PEER_peer.py under the peer's own Python. All store the layers, the
embedding and the output head in 4 bits. Speed doesn't depend on the values of weights, so that
random ones say as much as trained ones; what the models say is noise.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from family_shapes import FAMILIES

from relaxlm.models import load_config, parameter_specs

PEERS = ("llama.cpp", "openvino", "onnxruntime")
PRESET = "q4f16_1"
STD = 0.02  # of weights, as models are initialised

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": STD,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "attention_dropout": 0.0,
}
# The shapes that decide speed are those of the real models; scaled rotation (llama3) is left out.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "use_sliding_window": False,
        "sliding_window": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "vocab_size": 151936,
    },
    "llama-3.2-1b": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "vocab_size": 128256,
    },
}
BOS, EOS = "<|begin|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors: name -> shape, [out, in] for matrices."""
    specs = parameter_specs(load_config(config))
    return {source.name: source.shape for spec in specs for source in spec.sources}


def write_weights(config: dict[str, Any], path: Path) -> None:
    """One safetensors file of float16: 8 bytes of length, a JSON header, the tensors' bytes."""
    shapes = tensor_shapes(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, np.float32) * np.float32(STD)
            if len(shape) == 1 and name.endswith("weight"):  # of a norm
                values += 1
            file.write(values.astype(np.float16).tobytes())


def write_tokenizer(config: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE of the model's size: every byte, then pairs and triples of ASCII.

    So nearly every token is text by itself, as in real ones; a part of a character would be held
    back until the rest comes.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable]
    letters += [chr(256 + i) for i in range(256 - len(printable))]
    size = config["vocab_size"] - 2
    tokens, merges = list(letters), []
    grown = ascii_letters = [chr(256 + ord(" ")), *(chr(byte) for byte in range(33, 127))]
    while len(tokens) < size:
        pairs = [(a, b) for a in grown for b in ascii_letters][: size - len(tokens)]
        merges += pairs
        grown = [a + b for a, b in pairs]
        tokens += grown
    special = [
        {
            "id": size + i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in enumerate((BOS, EOS))
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": load_config(config).max_position_embeddings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def configuration(name: str) -> dict[str, Any]:
    """config.json of one of MODELS or FAMILIES; "NAME@3" has three layers of it."""
    name, _, layers = name.partition("@")
    config = MODELS.get(name) or {"torch_dtype": "float16", **FAMILIES[name]}
    if layers:
        (depth,) = {"num_hidden_layers", "n_layer"} & set(config)
        config = {**config, depth: int(layers)}
    return config


def make_checkpoint(name: str, folder: Path) -> None:
    config = configuration(name)
    ids = {"bos_token_id": config["vocab_size"] - 2, "eos_token_id": config["vocab_size"] - 1}
    content = json.dumps({**config, **ids}, indent=2)
    (folder / "config.json").write_text(content + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    write_tokenizer(config, folder)
    write_weights(config, folder / "model.safetensors")


def make_relaxlm(checkpoint: Path, folder: Path) -> None:
    relaxlm = (sys.executable, "-m", "relaxlm")
    common = (str(checkpoint), "--quantization", PRESET, "--output", str(folder))
    subprocess.run((*relaxlm, "convert_weight", *common), check=True)
    subprocess.run((*relaxlm, "gen_config", *common), check=True)


def make_peer(peer: str, python: str, checkpoint: Path, folder: Path) -> None:
    script = Path(__file__).parent / "peers" / f"{peer.replace('.', '')}_peer.py"
    command = (python, str(script), "convert", str(checkpoint), str(folder))
    subprocess.run(command, check=True)


def make(root: Path, model: str, form: str, pythons: dict[str, str]) -> Path:
    """The folder of one form of a model, made if it is not there yet.

    Args:
        form: "checkpoint", "relaxlm" or one of PEERS.
        pythons: peer -> the Python that has its packages.

    Raises:
        subprocess.CalledProcessError: a conversion failed; it has printed why.
    """
    folder = root / model / form
    if folder.is_dir():
        return folder
    checkpoint = None if form == "checkpoint" else make(root, model, "checkpoint", pythons)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.perf_counter()
    if checkpoint is None:
        make_checkpoint(model, partial)
    elif form == "relaxlm":
        make_relaxlm(checkpoint, partial)
    else:
        make_peer(form, pythons.get(form, sys.executable), checkpoint, partial)
    partial.rename(folder)
    print(f"made {folder} in {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def peer_pythons(given: list[str]) -> dict[str, str]:
    """`PEER=PYTHON` arguments; a lone PYTHON is that of every peer that has none of its own."""
    pythons: dict[str, str] = {}
    for text in given:
        peer, equals, python = text.partition("=")
        if equals and peer in PEERS:
            pythons[peer] = python
        else:
            pythons.update({name: text for name in PEERS if name not in pythons})
    return pythons


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for all models")
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        help=f"of {', '.join((*MODELS, *FAMILIES))}; NAME@3 has three layers",
    )
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=("checkpoint", "relaxlm", *PEERS),
        default=["checkpoint", "relaxlm"],
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="[PEER=]PYTHON",
        help="Python with a peer's packages; may be given several times",
    )
    options = parser.parse_args()
    for model in options.models:
        for form in options.forms:
            make(options.output, model, form, peer_pythons(options.peer_python))


if __name__ == "__main__":
    main()
