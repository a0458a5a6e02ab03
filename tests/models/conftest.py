"""References by way of a checkpoint on disk."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from relaxlm import models
from relaxlm.models.config import unknown_fields
from relaxlm.quantization.convert import convert_weights
from relaxlm.quantization.schemes import get_scheme
from relaxlm.runtime.params import WeightFolder
from tests.models import parity


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Parameters come from a folder that transformers writes, by way of the converter.

    Inside, transformers 5 keeps all experts in one tensor, and has its own names for more; what it
    writes and reads is as published. Its config.json is read, too.

    Returns:
        The folder of the checkpoint, once there is one.
    """
    checkpoint, kept = tmp_path / "checkpoint", tmp_path / "kept"
    build = parity.reference_model

    def reference_model(raw: dict) -> transformers.PreTrainedModel:
        model = build(raw)
        model.save_pretrained(checkpoint)
        written = models.load_config(checkpoint)
        assert written == models.load_config({**raw, "model_type": written.model_type})
        fields = json.loads((checkpoint / "config.json").read_text())
        assert unknown_fields(written, fields) == []
        return model

    def stored_parameters(raw: dict, state: Mapping, scheme: str) -> dict[str, np.ndarray]:
        return converted(raw, checkpoint, scheme, tmp_path / "converted")

    def dequantized_state(raw: dict, state: Mapping, scheme: str) -> dict[str, torch.Tensor]:
        tensors = kept_tensors(raw, converted(raw, checkpoint, scheme, tmp_path / "again"), scheme)
        kept.mkdir()
        (kept / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        save_file(tensors, kept / "model.safetensors", {"format": "pt"})
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            kept, dtype=torch.float32, output_loading_info=True
        )
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys")), found
        return dict(model.state_dict())

    monkeypatch.setattr(parity, "reference_model", reference_model)
    monkeypatch.setattr(parity, "stored_parameters", stored_parameters)
    monkeypatch.setattr(parity, "dequantized_state", dequantized_state)
    return checkpoint


def converted(raw: dict, checkpoint: Path, scheme: str, output: Path) -> dict[str, np.ndarray]:
    """What the converter makes of a checkpoint: stored name -> array."""
    config = models.load_config(raw)
    specs, ignored = models.parameter_specs(config), models.ignored_sources(config)
    convert_weights(checkpoint, get_scheme(scheme), output, specs, ignored)
    weights = WeightFolder(output)
    return {name: weights.load(name).copy() for name in weights.records}


def kept_tensors(raw: dict, stored: Mapping, scheme_name: str) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors with the values that a scheme keeps of them."""
    scheme, kept = get_scheme(scheme_name), {}
    for spec in models.parameter_specs(models.load_config(raw)):
        arrays = {name.rpartition(".")[2]: stored[name] for name in scheme.storage(spec)}
        quant = scheme.for_role(spec.role)
        flat = quant.dequantize(arrays, spec.shape) if quant else next(iter(arrays.values()))
        flat = flat.astype(np.float32).reshape(-1)
        for source in spec.sources:
            tensor = kept.setdefault(source.name, np.zeros(source.shape, np.float32))
            source.put_back(tensor, flat[: source.size])
            flat = flat[source.size :]
    return {name: torch.from_numpy(tensor) for name, tensor in kept.items()}
