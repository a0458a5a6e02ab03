"""Runs steps of a compiled model: the only runtime file that holds tensors."""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from relaxlm.errors import ContextOverflowError, RequestError
from relaxlm.runtime import gpu, tvm_runtime
from relaxlm.runtime.decode_steps import DecodeSteps
from relaxlm.runtime.library import Library
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.step_inputs import SeparateInputs, SharedInputs, StepInputs
from relaxlm.runtime.step_logits import DeviceLogits, StepLogits
from relaxlm.runtime.step_tables import BatchTables, TextTables
from relaxlm.runtime.threads import set_threads


class Memory(NamedTuple):
    """Bytes on the device: weights, KV cache, recurrent states, and the largest step's buffers."""

    params: int
    kv_cache: int
    states: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(self)


class Executor:
    """A library with weights, a KV cache and the states of recurrent layers, ready for steps.

    Not thread-safe: TVM's pool of worker threads belongs to the thread that calls it.
    """

    def __init__(
        self, library: Library, weights: WeightFolder, pages: int, state_slots: int = 0
    ) -> None:
        """
        Args:
            pages: of the KV cache, `kv_cache.page_size` tokens each.
            state_slots: of recurrent layers (`runtime/state_slots.py`).

        Raises:
            WeightsError: the folder's tensors are not those that the library was compiled for.
            LibraryError: the library's device is not there.
        """
        info = library.metadata
        weights.check({param.name: (param.shape, param.dtype) for param in info.params})
        self._prepare(library, pages, state_slots)
        self._set_params([weights.load_tvm(param.name) for param in info.params])

    @classmethod
    def from_arrays(
        cls,
        library: Library,
        params: Mapping[str, np.ndarray],
        pages: int,
        state_slots: int = 0,
    ) -> "Executor":
        """The same with weights from memory: parameter name -> array."""
        self = cls.__new__(cls)
        self._prepare(library, pages, state_slots)
        arrays = (params[param.name] for param in library.metadata.params)
        self._set_params([tvm_runtime.share(_aligned_copy(array)) for array in arrays])
        return self

    def _prepare(self, library: Library, pages: int, state_slots: int) -> None:
        set_threads()
        self.library, self.metadata = library, library.metadata
        self.pages, self.state_slots = pages, state_slots
        self.device = _device(library)
        self.on_gpu = self.metadata.target.kind != "cpu"
        machine = tvm_runtime.machine(library.module, self.device)
        self._hidden, self._embeddings = machine["hidden_states"], machine["embeddings"]
        if self.metadata.model_task == "chat":
            self._forward = machine["forward"]
            self._peaks = machine["peaks"]
            if self.on_gpu:
                self._gather, self._weigh = machine["gather_logits"], machine["weigh_logits"]
        if not self.metadata.is_encoder:
            self._copy = machine["copy_pages"]
        # What `download` finds out about every tensor is known of these.
        self._read = tvm_runtime.download if self.on_gpu else np.from_dlpack
        self.limits, self.vocab_size = self.metadata.limits, self.metadata.vocab_size
        # By how many arrays a function takes, so that what is called in turns keeps its tensors.
        self._staged: dict[int, StepInputs] = {}
        cache, states = self.metadata.kv_cache.tensors, self.metadata.state.tensors
        self._kv = _array([self._zeros((pages, *tensor.shape), tensor.dtype) for tensor in cache])
        assert state_slots or not states, "recurrent layers, and no slot for their states"
        self._states = _array(
            [self._zeros((state_slots, *tensor.shape), tensor.dtype) for tensor in states]
        )
        # Tables that a step takes, and the tensors that it changes.
        self._cache: tuple[Any, ...] = (self._kv, self._states) if states else (self._kv,)
        if self.metadata.is_encoder:
            self._cache = ()
        self._tables = len(BatchTables._fields) if states else _TABLES_OF_PAGES
        self._machine = machine

    def _set_params(self, tensors: Sequence[Any]) -> None:
        if self.on_gpu:
            tensors = [tvm_runtime.copied_to(tensor, self.device) for tensor in tensors]
        self._params = _array(tensors)
        self._decode: DecodeSteps | None = None
        if self.metadata.has_cuda_graphs:
            rest = (*self._cache, self._params)
            self._decode = DecodeSteps(self._machine, self.metadata, self.device, rest)

    def memory(self) -> Memory:
        """Bytes used on the device."""
        cache = self.metadata.kv_cache
        return Memory(
            self.metadata.memory.params,
            self.pages * cache.page_size * cache.bytes_per_token,
            self.state_slots * self.metadata.state.bytes_per_sequence,
            self.metadata.step_bytes,
        )

    def forward(
        self, tables: BatchTables, input_ids: np.ndarray, logit_positions: np.ndarray
    ) -> np.ndarray:
        """Run one step for all logits of the rows wanted, [m, vocab] float32: see `compute`."""
        return self.compute(tables, input_ids, logit_positions).all()

    def compute(
        self, tables: BatchTables, input_ids: np.ndarray, logit_positions: np.ndarray
    ) -> StepLogits:
        """Run one step.

        Args:
            tables: of the step's sequences, from `PagedSequences.batch`.
            input_ids: [n] int32, the new tokens of all sequences, one after the other.
            logit_positions: [m] int32, the rows of the step whose logits are wanted.

        Returns:
            The logits [m, vocab], good until the next step.

        Raises:
            RequestError: a token id outside the vocabulary.
            ContextOverflowError: more tokens, sequences or rows than the library was compiled for.
        """
        self._check(input_ids, len(tables.kv_lengths), len(logit_positions))
        # Kernels read where they are told to.
        assert len(input_ids) == tables.row_offsets[-1] == len(tables.slots)
        first, last = _bounds(logit_positions)
        assert 0 <= first and last < len(input_ids)
        logits = self._logits((input_ids, *tables[: self._tables], logit_positions))

        def peaks() -> np.ndarray:
            return self._read(self._peaks(logits))

        if not self.on_gpu:
            return StepLogits(self._read(logits), peaks)

        def gather(places: np.ndarray) -> np.ndarray:
            return self._read(self._gather(logits, *self._inputs([places])))

        def weigh(rows: np.ndarray, references: np.ndarray, factors: np.ndarray) -> np.ndarray:
            given = [rows, references.view(np.int32), factors.view(np.int32)]
            return self._read(self._weigh(logits, *self._inputs(given)))

        return DeviceLogits(self.vocab_size, lambda: self._read(logits), peaks, gather, weigh)

    def embeddings(
        self, tables: BatchTables | TextTables, input_ids: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Run one step for states instead of logits.

        Args:
            tables: as for `forward`, or, for an encoder, of whole texts.
            rows: [r] int32, the rows of the step whose states are wanted, at least one.

        Returns:
            [r, hidden] float32, what the last layer's norm makes of them.

        Raises:
            RequestError, ContextOverflowError: as `forward` does.
        """
        self._check(input_ids, len(tables.row_offsets) - 1, 0)
        assert len(input_ids) == tables.row_offsets[-1] == len(tables.positions)
        first, last = _bounds(rows)
        assert 0 <= first and last < len(input_ids) >= len(rows)
        inputs = self._inputs((input_ids, *tables[: self._tables], rows))
        return self._read(self._embeddings(*inputs, *self._cache, self._params))

    def hidden_states(
        self, tables: BatchTables | TextTables, input_ids: np.ndarray
    ) -> list[np.ndarray]:
        """The residual stream [n, hidden] float32 before the first layer and after each, and the
        final norm's output.
        """
        self._check(input_ids, len(tables.row_offsets) - 1, 0)
        inputs = self._inputs((input_ids, *tables[: self._tables]))
        layers = self._hidden(*inputs, *self._cache, self._params)
        return [tvm_runtime.download(layer) for layer in layers]

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy whole pages in every layer, before the step that writes to the copies.

        Args:
            sources, targets: [k] int32 page numbers; no page is in both.
        """
        if len(sources) and len(self._kv):
            self._copy(self._kv, *self._inputs((sources, targets)))

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Within the block, the kernels of CUDA graphs are launched one by one."""
        if self._decode is not None:
            self._decode.by_graphs = False
        try:
            yield
        finally:
            if self._decode is not None:
                self._decode.by_graphs = True

    def _logits(self, arrays: Sequence[np.ndarray]) -> Any:
        if self._decode is not None and self._decode.can_run(arrays):
            return self._decode.logits(arrays)
        return self._forward(*self._inputs(arrays), *self._cache, self._params)

    def _check(self, input_ids: np.ndarray, sequences: int, rows: int) -> None:
        limits, tokens = self.limits, len(input_ids)
        # The planned buffers have room for this much and no more.
        if tokens > limits.prefill_chunk_size:
            raise self._too_many("tokens", tokens, "prefill_chunk_size")
        if sequences > limits.max_batch_size:
            raise self._too_many("sequences", sequences, "max_batch_size")
        if rows > limits.max_batch_size:
            raise self._too_many("rows of logits", rows, "max_batch_size")
        if tokens:
            least, most = _bounds(input_ids)
            if least < 0 or most >= self.vocab_size:
                wrong = input_ids[(input_ids < 0) | (input_ids >= self.vocab_size)][0]
                raise RequestError(
                    f"token id {wrong} is outside the model's vocabulary of {self.vocab_size}"
                )

    def _too_many(self, what: str, count: int, option: str) -> ContextOverflowError:
        return ContextOverflowError(
            f"a step with {count} {what}: {self.library.path} was compiled for "
            f'{getattr(self.limits, option)}; compile with --overrides "{option}={count}"'
        )

    def _inputs(self, arrays: Sequence[np.ndarray]) -> Sequence[Any]:
        """A step's integers as int32 tensors, good until so many are made again."""
        inputs = self._staged.get(len(arrays))
        if inputs is None:
            inputs = self._staged[len(arrays)] = self._new_inputs()
        return inputs.fill(arrays)

    def _new_inputs(self) -> StepInputs:
        kind = self.metadata.target.kind
        if kind in gpu.PLAIN_GPUS:
            return SeparateInputs(self.device)
        return SharedInputs(None if kind == "cpu" else self.device)

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor of zeros; on a CPU, memory is taken only where it is written."""
        stored = _NUMPY_BITS.get(dtype, dtype)
        size = int(np.prod(shape)) * np.dtype(stored).itemsize
        zeros = np.frombuffer(mmap.mmap(-1, max(size, 1)), stored, int(np.prod(shape)))
        host = tvm_runtime.share(zeros.reshape(shape))
        if stored != dtype:
            host = tvm_runtime.view(host, shape, dtype)
        return tvm_runtime.copied_to(host, self.device) if self.on_gpu else host


_TABLES_OF_PAGES = BatchTables._fields.index("state_sources")
_NUMPY_BITS = {"bfloat16": "uint16"}
# Up to so many numbers, a list's min and max are faster: between two steps NumPy's code has left
# the processor's caches.
_FEW = 128


def _bounds(numbers: np.ndarray) -> tuple[int, int]:
    """The least and the largest of at least one number."""
    if len(numbers) > _FEW:
        return int(numbers.min()), int(numbers.max())
    values = numbers.tolist()
    return min(values), max(values)


def _array(tensors: Sequence[Any]) -> Any:
    """A tuple of tensors that is handed to the VM at every step without being converted again."""
    import tvm_ffi

    return tvm_ffi.Array(list(tensors))


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    aligned = tvm_runtime.aligned(array.size, array.dtype).reshape(array.shape)
    aligned[...] = array
    return aligned


def _device(library: Library) -> Any:
    kind = library.metadata.target.kind
    device = tvm_runtime.device(kind)
    if kind == "cpu":
        return device
    if gpu.why_missing(kind):
        raise gpu.missing_gpu(library.path, kind)
    return device
