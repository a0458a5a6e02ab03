"""What kernels for GPUs that are written as TVMScript share."""

from tvm import tirx
from tvm.script import tirx as T

LANES = 32
ALL_LANES = 0xFFFFFFFF
WARPS = 4
# Below any score, but finite: a warp without tokens must not give inf - inf.
NO_SCORE = -1e30


def local(*shape: int, dtype: str = "float32") -> tirx.Buffer:
    """Registers of one thread."""
    return T.sblock_alloc_buffer(shape, dtype, scope="local")


def shared(*shape: int) -> tirx.Buffer:
    """Memory of one block, float32."""
    return T.sblock_alloc_buffer(shape, "float32", scope="shared")
