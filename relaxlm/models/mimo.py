"""MiMo 7B, after the `modeling_mimo.py` that is published with its weights: Qwen2 with layers that
predict further tokens, which are left out here."""

from typing import ClassVar, Literal

from relaxlm.models import qwen2


class Config(qwen2.Config):
    absent: ClassVar[dict] = {
        **qwen2.Config.absent,
        "attention_bias": True,
        "use_mrope": False,
        "num_nextn_predict_layers": 0,
    }

    model_type: Literal["mimo"]  # type: ignore[assignment]
    attention_bias: Literal[True]
    use_mrope: Literal[False]


class Model(qwen2.Model):
    ignored: ClassVar[tuple[str, ...]] = (*qwen2.Model.ignored, "model.mtp_layers.*")
