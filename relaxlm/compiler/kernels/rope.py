"""What the kernels from products to queries and pages have to do, on every target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeOptions:
    """Where q, k and v are, and what happens to them on the way.

    Attributes:
        widths: of the products that they are part of: one, or up to three.
        places: of q, k and v: the number of a product, and the first of its columns.
        biases: dtype of a bias on each product; None for none.
        norm: dtype of the weights of a norm on each query and key head; None for none.
        eps: of that norm.
        turned: how many features of each head turn, the first ones; 0 for no rotation.
        in_pairs: feature 2 i is paired with 2 i + 1, else feature i with i + turned / 2.
        scaled: whether queries are multiplied by a factor of their token.
        dtype: of products and queries.
    """

    widths: tuple[int, ...]
    places: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    biases: tuple[str | None, ...]
    norm: str | None = None
    eps: float = 0.0
    turned: int = 0
    in_pairs: bool = False
    scaled: bool = False
    dtype: str = "float32"
