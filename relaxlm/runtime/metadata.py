"""What a compiled library says of itself: the JSON behind its `_metadata` function."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

# Counts changes of the contract between library and runtime; they must agree.
CONTRACT = 7


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetInfo(_Strict):
    """What the code runs on; `cpu_features` are LLVM's names of extensions the code may use.

    `system` and `cpu` are those of the machine, as `runtime/cpu.py` calls them. `versions` are the
    names of those that the file holds (`runtime/multiversion.py`), from the plainest to the best;
    none in a library of one version, nor in those within another.
    """

    kind: str
    arch: list[str]
    versions: list[str]
    system: str
    cpu: str
    cpu_features: list[str]


class Limits(_Strict):
    """Counts of tokens; `sliding_window_size` is 0 where some layer attends to everything."""

    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int
    sliding_window_size: int
    attention_sink_size: int


class TensorInfo(_Strict):
    """A parameter, by its name in the weight folder, in the order of the `params` tuple."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class CacheInfo(_Strict):
    """The KV cache; `tensors` in the order of the `kv` tuple, [pages, *shape] each.

    If no layer attends, or it attends to the step itself as an encoder does, there are none, and a
    page is no more than a number (`page_size` is large). An encoder's functions take no cache.
    """

    dtype: str
    page_size: int
    num_layers: int
    tensors: list[TensorInfo]
    bytes_per_token: int


class StateInfo(_Strict):
    """What recurrent layers keep: [slots, *shape] each, in the order of the `states` tuple.

    If no layer is recurrent, there are none, and `states` and its tables are no arguments.
    """

    tensors: list[TensorInfo]
    bytes_per_sequence: int


class MemoryPlan(_Strict):
    """Bytes: all parameters; the buffers each function needs besides parameters and cache."""

    params: int
    temporary: dict[str, int]


class LibraryMetadata(_Strict):
    """
    Attributes:
        model_task: "embedding" for a library without logits.
        is_encoder: whether each text is read in one step, and no token is appended to it.
    """

    contract: int
    versions: dict[str, str]
    model_type: str
    model_task: Literal["chat", "embedding"]
    is_encoder: bool
    quantization: str
    model_config_json: dict[str, Any]
    hidden_size: int
    vocab_size: int
    target: TargetInfo
    opt: str
    limits: Limits
    kv_cache: CacheInfo
    state: StateInfo
    params: list[TensorInfo]
    memory: MemoryPlan

    @property
    def main_function(self) -> str:
        """What the library is for: its plan says how much memory running the model takes."""
        return "forward" if self.model_task == "chat" else "embeddings"

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether it has what `runtime/decode_steps.py` needs."""
        return "cuda_graph=1" in self.opt.split(";")

    @property
    def step_bytes(self) -> int:
        """Buffers of the largest step, and those that steps of decoding have for themselves."""
        temporary = self.memory.temporary
        return temporary[self.main_function] + temporary.get("decode", 0)
