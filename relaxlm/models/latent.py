"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434).

Keys and values of all heads are made of one short vector per token, the latent, and only that is
cached, with one rotated key that all heads share. What makes a key of a latent is multiplied into
the query instead, and what makes a value of it follows the attention: the heads' keys and values
never exist.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PositiveInt, model_validator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import Step
from relaxlm.models.config import DecoderConfig
from relaxlm.models.layers import RMSNorm
from relaxlm.models.rope import YarnRope, yarn_mscale
from relaxlm.models.weights import Source

# An abstract operator, which `compiler/passes/lower_latent_attention.py` turns into a kernel.
HEAD_MATMUL = "relaxlm.head_matmul"

# Of the norms of latents, whatever the others have; config.json does not say.
LATENT_NORM_EPS = 1e-6


class LatentConfig(DecoderConfig):
    """Sizes of latent attention; a head's query has features of its own (nope) and rotated ones.

    Without `q_lora_rank`, queries are made of the residual stream directly.
    """

    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    # The sum of the two, which transformers 5 writes out.
    qk_head_dim: PositiveInt
    v_head_dim: PositiveInt
    attention_bias: bool

    # What transformers fills in if config.json does not have the field; null stands for none.
    absent_q_lora_rank: ClassVar[int]

    @model_validator(mode="after")
    def _heads_fit(self) -> "LatentConfig":
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads}: with latent attention expected "
                f"as many as num_attention_heads = {self.num_attention_heads}"
            )
        both = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.qk_head_dim != both:
            raise ValueError(
                f"qk_head_dim = {self.qk_head_dim}, expected the sum of qk_nope_head_dim and "
                f"qk_rope_head_dim, {both}"
            )
        return self

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> "DecoderConfig":
        values = {"q_lora_rank": cls.absent_q_lora_rank, **cls.absent, **raw}
        nope, rope = values.get("qk_nope_head_dim"), values.get("qk_rope_head_dim")
        if isinstance(nope, int) and isinstance(rope, int):
            values.setdefault("qk_head_dim", nope + rope)
        # What turns is a head of its own.
        return super().read({**values, "head_dim": values.get("qk_rope_head_dim")}, where)

    @property
    def latent_cache(self) -> tuple[int, int]:
        return self.kv_lora_rank, self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        if isinstance(self.rope, YarnRope) and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.scale, self.rope.mscale_all_dim) ** 2
        return scale


class LatentAttention(nn.Module):
    """[n, hidden] -> [n, hidden]."""

    def __init__(self, config: LatentConfig) -> None:
        self.config = config
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        nope, rope, size = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, size + rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(size, LATENT_NORM_EPS)
        self.w_uk = nn.Parameter((heads, size, nope))
        self.w_uv = nn.Parameter((heads, config.v_head_dim, size))
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        config, n = self.config, x.shape[0]
        nope, rope, heads = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.num_attention_heads,
        )
        if config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q, q_rope = op.split(op.reshape(q, (n, heads, nope + rope)), [nope], axis=-1)
        latent, k_rope = op.split(self.kv_a_proj_with_mqa(x), [config.kv_lora_rank], axis=-1)
        k_rope = step.rotary(op.reshape(k_rope, (n, 1, rope)), layer)
        found = step.latent_attention(
            layer,
            head_matmul(q, self.w_uk),
            step.rotary(q_rope, layer),
            self.kv_a_layernorm(latent),
            op.reshape(k_rope, (n, rope)),
            step.scale,
        )
        return self.o_proj(
            op.reshape(head_matmul(found, self.w_uv), (n, heads * config.v_head_dim))
        )


def head_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, heads, K] with every head's own matrix, weight [heads, N, K]: [n, heads, N]."""
    shape = (x.shape[0], x.shape[1], weight.shape[1])
    return op.extern(HEAD_MATMUL, [x, weight], Tensor.placeholder(shape, x.dtype))


def projection_source(name: str, config: LatentConfig) -> Source:
    """Where `w_uk` and `w_uv` come from: of the checkpoint's kv_b_proj, every head's first rows
    make keys of a latent, the others values."""
    attention, _, part = name.rpartition(".")
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    rows, size = nope + config.v_head_dim, config.kv_lora_rank

    def view(tensor):
        by_head = tensor.reshape(heads, rows, size)
        return by_head[:, :nope].transpose(0, 2, 1) if part == "w_uk" else by_head[:, nope:]

    return Source(f"{attention}.kv_b_proj.weight", (heads * rows, size), view=view)
