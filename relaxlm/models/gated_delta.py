"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464) as a layer.

A head's state maps keys to values. Each token first fades it, then replaces part of what it has
for the token's key by the token's value.
"""

from pydantic import PositiveInt, model_validator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from relaxlm.models.base import Step
from relaxlm.models.config import StateTensor
from relaxlm.models.layers import Float32Parameter, RMSNorm
from relaxlm.models.recurrent import HybridConfig, root_norm, softplus, step_decay
from relaxlm.models.state import causal_conv, conv_state, linear_scan, scan_state

# Under the root of the norm of queries and keys, as in the reference.
_KEY_EPSILON = 1e-6


class GatedDeltaConfig(HybridConfig):
    """Heads of the recurrent layers: each key head serves as many value heads."""

    linear_conv_kernel_dim: PositiveInt
    linear_num_key_heads: PositiveInt
    linear_num_value_heads: PositiveInt
    linear_key_head_dim: PositiveInt
    linear_value_head_dim: PositiveInt

    @model_validator(mode="after")
    def _heads_fit(self) -> "GatedDeltaConfig":
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads = {self.linear_num_value_heads} is not a multiple of "
                f"linear_num_key_heads = {self.linear_num_key_heads}"
            )
        return self

    @property
    def linear_widths(self) -> tuple[int, int, int]:
        """Features of all queries, of all keys and of all values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return keys, keys, self.linear_num_value_heads * self.linear_value_head_dim

    def layer_states(self, layer: int) -> tuple[StateTensor, ...]:
        if self.has_pages(layer):
            return ()
        heads, channels = self.linear_num_value_heads, sum(self.linear_widths)
        return (
            conv_state(channels, self.linear_conv_kernel_dim),
            scan_state(heads, self.linear_key_head_dim, self.linear_value_head_dim),
        )


class GatedDeltaNet(nn.Module):
    """[n, hidden] -> [n, hidden]."""

    def __init__(self, config: GatedDeltaConfig) -> None:
        self.config = config
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        channels, values = sum(config.linear_widths), config.linear_widths[2]
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, values, bias=False)
        self.in_proj_b = nn.Linear(hidden, heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, heads, bias=False)
        self.conv1d_weight = nn.Parameter((channels, 1, config.linear_conv_kernel_dim))
        self.dt_bias, self.A_log = Float32Parameter((heads,)), Float32Parameter((heads,))
        self.norm = RMSNorm(config.linear_value_head_dim, config.norm_eps)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        config, n = self.config, x.shape[0]
        groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        mixed = causal_conv(step, layer, self.in_proj_qkv(x), self.conv1d_weight, activation="silu")
        keys = config.linear_widths[0]
        q, k, v = op.split(mixed, [keys, 2 * keys], axis=-1)
        q = root_norm(op.reshape(q, (n, groups, key_dim)), _KEY_EPSILON, mean=False)
        k = root_norm(op.reshape(k, (n, groups, key_dim)), _KEY_EPSILON, mean=False)
        v = op.astype(op.reshape(v, (n, heads, value_dim)), "float32")
        decay = step_decay(self.A_log, softplus(self.in_proj_a(x), self.dt_bias))
        strength = op.sigmoid(op.astype(self.in_proj_b(x), "float32"))
        out = linear_scan(step, layer, q * key_dim**-0.5, k, v, decay, strength=strength)
        out = self.norm(op.astype(out, x.dtype))
        z = op.reshape(self.in_proj_z(x), (n, heads, value_dim))
        out = op.astype(op.astype(out, "float32") * op.silu(op.astype(z, "float32")), x.dtype)
        return self.out_proj(op.reshape(out, (n, heads * value_dim)))
