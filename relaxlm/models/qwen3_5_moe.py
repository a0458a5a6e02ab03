"""Qwen3.5 with experts, the text part, after
`transformers/models/qwen3_5_moe/modeling_qwen3_5_moe.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from relaxlm.models import qwen2_moe, qwen3_5, qwen3_next
from relaxlm.models.config import DecoderConfig, text_fields
from relaxlm.models.weights import Source


class Config(qwen3_5.Config, qwen2_moe.SharedExpert):
    absent: ClassVar[dict] = {
        **qwen3_5.Config.absent,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 8,
        "num_experts": 256,
        # Of training only.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }

    model_type: Literal["qwen3_5_moe", "qwen3_5_moe_text"]  # type: ignore[assignment]
    moe_intermediate_size: PositiveInt

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        inner = {**cls.absent, **text_fields(raw)}["moe_intermediate_size"]
        # No layer has a single MLP, and files do not say how wide it would be.
        return super().read({**raw, "intermediate_size": inner}, where)

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size


class Model(qwen3_next.InterleavedLM):
    ignored: ClassVar[tuple[str, ...]] = qwen3_5.Model.ignored

    def __init__(self, config: Config) -> None:
        super().__init__(config, lambda layer: qwen2_moe.SharedMLP(config))

    def _other_sources(self, name: str, shape: tuple[int, ...]) -> list[tuple[Source, ...]]:
        """Published checkpoints have all experts in one tensor; transformers writes them apart."""
        for part in self.stacked:
            if f".{part}." in name:
                joined = name.replace(part, part.replace("moe_", "experts.", 1))
                checkpoint = self._checkpoint_name(joined.removesuffix(".weight"))
                return [(Source(checkpoint, shape),)]
        return []
