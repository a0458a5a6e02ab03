"""What the attention kernels of every target agree on."""

from dataclasses import dataclass

# Tokens per page. One AVX-512 register, or two to four smaller ones, hold a feature of a whole page.
PAGE_SIZE = 16


@dataclass(frozen=True)
class AttentionShape:
    """Everything that is fixed when an attention kernel is compiled.

    `window` and `sinks` are in tokens; a window of 0 means full attention. `scale` multiplies the
    scores before the softmax.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int
    sinks: int
    scale: float
    page_size: int = PAGE_SIZE


@dataclass(frozen=True)
class PageTensor:
    """One tensor of a layer's cache: [pages, *page_shape] of `dtype`."""

    name: str
    page_shape: tuple[int, ...]
    dtype: str
