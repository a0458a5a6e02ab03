"""MiniCPM 1, 2 and 4, after the `modeling_minicpm.py` that is published with their weights: Llama
with scales that keep small and large models alike in training (Hu et al. 2024, arXiv:2404.06395).
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from relaxlm.models import llama


class Config(llama.Config):
    absent: ClassVar[dict] = {
        **llama.Config.absent,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "scale_emb": 1.0,
        "scale_depth": 1.0,
        "dim_model_base": 1,
        "num_experts": 0,
        "sparse_config": None,
    }

    model_type: Literal["minicpm"]  # type: ignore[assignment]
    mlp_bias: Literal[False]
    scale_emb: PositiveFloat
    scale_depth: PositiveFloat
    dim_model_base: PositiveInt
    num_experts: Literal[0]
    sparse_config: Literal[None]

    @property
    def embedding_scale(self) -> float:
        return self.scale_emb

    @property
    def residual_scale(self) -> float:
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logits_scale(self) -> float:
        return self.dim_model_base / self.hidden_size


class Model(llama.Model):
    published_names: ClassVar[Mapping[str, str]] = {"qkv_proj": "wqkv_pack"}
