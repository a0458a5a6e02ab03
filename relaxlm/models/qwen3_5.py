"""Qwen3.5 dense, the text part, after `transformers/models/qwen3_5/modeling_qwen3_5.py`: Qwen3-Next
with other matrices and no experts.

With pictures, rotary embeddings turn some pairs of features by other positions than a text's
(`mrope_section`). In a text all positions of a token are one, and the result is that without.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relaxlm.models import qwen3_next
from relaxlm.models.config import DecoderConfig, rope_fields, text_fields
from relaxlm.models.layers import GatedMLP

_OF_PICTURES = ("mrope_section", "mrope_interleaved")


class Config(qwen3_next.Interleaved):
    absent: ClassVar[dict] = {
        **qwen3_next.Interleaved.absent,
        "num_key_value_heads": 4,
        "attn_output_gate": True,
    }
    # Of pictures, of guesses at further tokens, and of the states' dtype, which is float32 here.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        """
        image_token_id mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings
        video_token_id vision_end_token_id vision_start_token_id
        """.split()
    )

    model_type: Literal["qwen3_5", "qwen3_5_text"]
    attn_output_gate: Literal[True]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> DecoderConfig:
        fields = text_fields(raw)
        if "text_config" in raw:  # of a model that reads pictures, its own field ties the head
            fields["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
        return super().read(fields, where)

    @classmethod
    def _rope(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        given = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kept = {name: value for name, value in given.items() if name not in _OF_PICTURES}
        return rope_fields(values, kept)


class Model(qwen3_next.InterleavedLM):
    ignored: ClassVar[tuple[str, ...]] = (
        *qwen3_next.InterleavedLM.ignored,
        "model.visual.*",
        "visual.*",
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config, lambda layer: GatedMLP(config))
