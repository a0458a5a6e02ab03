"""RoBERTa and XLM-RoBERTa as encoders of texts, after
`transformers/models/xlm_roberta/modeling_xlm_roberta.py`.

BERT with positions that begin behind that of padding: what multilingual E5, the dense vectors of
BGE-M3 and Arctic Embed 2 are. A padding token that a text spells out counts as any other.
"""

from typing import ClassVar, Literal

from pydantic import NonNegativeInt
from tvm import te
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models import bert


class Config(bert.Config):
    absent: ClassVar[dict] = {**bert.Config.absent, "pad_token_id": 1}

    model_type: Literal["roberta", "xlm-roberta"]  # type: ignore[assignment]
    pad_token_id: NonNegativeInt

    @property
    def longest_text(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


class Model(bert.Model):
    config: Config

    base_name: ClassVar[str] = "roberta"
    ignored: ClassVar[tuple[str, ...]] = (*bert.Model.ignored, "lm_head.*", "classifier.*")

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        first = self.config.pad_token_id + 1

        def compute(position: te.Tensor) -> te.Tensor:
            return te.compute(position.shape, lambda t: position[t] + first, name="table_rows")

        return self.inputs(input_ids, op.tensor_expr_op(compute, "table_rows", [positions]))
