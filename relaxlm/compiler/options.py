"""What a user may choose when compiling: limits, the cache's format and the optimisation level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from relaxlm.compiler.kernels import tuning
from relaxlm.compiler.kernels.isa import NEEDS, best_isa
from relaxlm.compiler.kernels.tuning import Tuning
from relaxlm.compiler.target import DeviceTarget
from relaxlm.errors import ConfigError, UnsupportedError
from relaxlm.files import cache_folder
from relaxlm.quantization.kv_cache import KVFormat, get_kv_format
from relaxlm.quantization.schemes import Scheme

if TYPE_CHECKING:
    from relaxlm.models.config import DecoderConfig  # imports TVM

# The most tokens of one step where nothing else is said: enough to use the matrix units of a CPU
# or a GPU well, and small enough that temporary buffers stay in tens of megabytes.
DEFAULT_PREFILL_CHUNK = 2048
# Sequences that one step may hold, and rows of logits that it may return.
DEFAULT_MAX_BATCH = 16
# The same for encoders, which return no logits, and whose texts are often short.
ENCODER_MAX_BATCH = 128

# LLVM's, from 1 on: at 0, TVM's modules register themselves as the process's system library, and
# two of them in one process get in each other's way.
OPT_LEVELS = ("O1", "O2", "O3")
DEFAULT_OPT = "O2"
# Of `--opt`, as metadata has it: the runtime looks for it.
BATCH_INVARIANT = "batch_invariant=1"
CUDA_GRAPH = "cuda_graph=1"


@dataclass(frozen=True)
class CompileOptions:
    """The limits a library is compiled for; counts are in tokens.

    `sliding_window_size` 0 means what the model itself says. `opt` is what `parse_opt` makes of
    `--opt`. GPU kernels are always compiled with nvcc's default level, the highest.
    """

    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int
    sliding_window_size: int
    attention_sink_size: int
    kv_format: KVFormat
    opt: str

    @property
    def opt_level(self) -> int:
        """LLVM's."""
        return int(self.opt.partition(";")[0].removeprefix("O"))

    @property
    def act_quant(self) -> bool:
        """Whether matmuls on CPUs round their activations (`kernels/rounding.py`)."""
        return "act_quant=1" in self.opt.split(";")

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's logits may not depend on how it was computed, bit by bit.

        On neither what else was in the step, nor the steps that its prompt was cut into.
        """
        return BATCH_INVARIANT in self.opt.split(";")

    @property
    def cuda_graph(self) -> bool:
        """Whether steps of decoding can be recorded as CUDA graphs (`runtime/decode_steps.py`)."""
        return CUDA_GRAPH in self.opt.split(";")

    @property
    def tuning(self) -> Tuning:
        """Parameters of CPU kernels."""
        pairs = (part.partition("=") for part in self.opt.split(";"))
        return Tuning(**{key: int(value) for key, _, value in pairs if key in tuning.NAMES})

    @staticmethod
    def resolve(
        config: DecoderConfig,
        scheme: Scheme,
        chat: Mapping[str, Any] | None = None,
        overrides: str | None = None,
        opt: str = DEFAULT_OPT,
    ) -> CompileOptions:
        """Combine the model's own limits, mlc-chat-config.json and `--overrides`, in this order.

        Args:
            chat: mlc-chat-config.json, whose limits count unless they are -1 or null.
            overrides: "context_window_size=4096;kv_cache_dtype=fp8".
            opt: "O2", "act_quant=1" or "O2;act_quant=1;batch_invariant=1"; what is not named is
                0.

        Raises:
            ConfigError: an unknown key, a malformed value, or limits that contradict each other.
        """
        given = dict(parse_overrides(overrides))
        chat = {**(chat or {}), **((chat or {}).get("model_config") or {})} if chat else {}

        def limit(key: str, default: int) -> int:
            if key in given:
                return int(given[key])
            value = chat.get(key)
            return value if isinstance(value, int) and value > 0 else default

        context = limit("context_window_size", config.longest_text)
        window = limit("sliding_window_size", 0)
        chunk, batch = min(context, DEFAULT_PREFILL_CHUNK), DEFAULT_MAX_BATCH
        if config.is_encoder:
            _refuse_cache(given)
            # A text fits into a step, and several short ones do.
            chunk, batch = max(context, DEFAULT_PREFILL_CHUNK), ENCODER_MAX_BATCH
        options = CompileOptions(
            context,
            limit("prefill_chunk_size", chunk),
            limit("max_batch_size", batch),
            window,
            limit("attention_sink_size", config.attention_sinks),
            get_kv_format(str(given.get("kv_cache_dtype", scheme.dtype))),
            parse_opt(opt),
        )
        if options.attention_sink_size and not (window or config.sliding_window):
            raise ConfigError(
                f"attention_sink_size = {options.attention_sink_size} has no effect without a "
                "sliding window: set sliding_window_size, too, or leave it out"
            )
        if config.is_encoder and options.prefill_chunk_size < context:
            raise ConfigError(
                f"prefill_chunk_size = {options.prefill_chunk_size} is less than "
                f"context_window_size = {context}, and an encoder reads a text in one step: make "
                "the first larger, or the second smaller"
            )
        if options.cuda_graph and not config.has_head:
            raise ConfigError(
                f"--opt {CUDA_GRAPH} is for models that write, and this one makes vectors of "
                "texts. Leave it out"
            )
        return options._checked(config.is_encoder)

    def _checked(self, is_encoder: bool) -> CompileOptions:
        if self.prefill_chunk_size > self.context_window_size and not is_encoder:
            chunk = self.context_window_size
            return replace(self, prefill_chunk_size=chunk)._checked(is_encoder)
        if self.max_batch_size > self.prefill_chunk_size:
            # A step holds at least one token of each sequence.
            return replace(self, max_batch_size=self.prefill_chunk_size)
        return self


def _refuse_cache(given: Mapping[str, Any]) -> None:
    if "kv_cache_dtype" in given:
        raise ConfigError(
            f"kv_cache_dtype = {given['kv_cache_dtype']}: an encoder has no KV cache. Leave it out"
        )


def parse_opt(text: str) -> str:
    """`--opt` in its one spelling: the level, then what differs from the default.

    Raises:
        ConfigError: names the part that is wrong and what there is.
    """
    level, tuned = DEFAULT_OPT, dict[str, int]()
    act_quant = invariant = graph = False
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key in OPT_LEVELS and not equals:
            level = key
        elif key == "act_quant" and value in ("0", "1"):
            act_quant = value == "1"
        elif key == "batch_invariant" and value in ("0", "1"):
            invariant = value == "1"
        elif key == "cuda_graph" and value in ("0", "1"):
            graph = value == "1"
        elif key in tuning.NAMES and value.isdecimal():
            tuned[key] = int(value)
        else:
            raise ConfigError(
                f"--opt {text}: {part!r} is not understood, expected one of "
                f"{', '.join(OPT_LEVELS)}, act_quant=0 or act_quant=1, batch_invariant=0 or "
                "batch_invariant=1, cuda_graph=0 or cuda_graph=1, or a number for "
                f"{' or '.join(tuning.NAMES)}, several separated by ';'"
            )
    flags = (
        "act_quant=1" if act_quant else "",
        BATCH_INVARIANT if invariant else "",
        CUDA_GRAPH if graph else "",
    )
    parts = (level, *flags, str(Tuning(**tuned)))
    return ";".join(filter(None, parts))


def opt_for(opt: str | None, scheme: Scheme, device: DeviceTarget) -> str:
    """`--opt` with act_quant as it is by default: 1 wherever there are kernels for it."""
    opt = opt or DEFAULT_OPT
    if "act_quant" in opt or why_not_rounded(scheme, device):
        return parse_opt(opt)
    return parse_opt(f"{opt};act_quant=1")


def with_saved_tuning(opt: str | None, device: DeviceTarget) -> str | None:
    """`--opt` with what `relaxlm tune` found on this machine, if code is only for such machines.

    What `opt` names itself stays.

    Raises:
        ConfigError: the file with the tuning is damaged.
    """
    if device.kind != "cpu" or device.arch != ("native",):
        return opt
    parts = (opt or "").split(";")
    named = {part.partition("=")[0].strip() for part in parts}
    if wanted := [name for name in tuning.NAMES if name not in named]:
        found = tuning.saved(cache_folder())
        parts += [f"{name}={getattr(found, name)}" for name in wanted]
    return ";".join(parts)


def check_opt(options: CompileOptions, scheme: Scheme, device: DeviceTarget) -> None:
    """Refuse what there is nothing for on the device: a preset, or an option that is 1.

    Raises:
        ConfigError: an option would have no effect.
        UnsupportedError: the preset computes in a dtype that the device lacks.
    """
    if options.batch_invariant and device.kind != "cpu":
        raise ConfigError(
            f"--opt {BATCH_INVARIANT} is for device 'cpu', not '{device.kind}', whose kernels have "
            "not been shown to add up in one order. Leave it out, or compile for the CPU"
        )
    if options.cuda_graph and device.kind != "cuda":
        raise ConfigError(
            f"--opt {CUDA_GRAPH} is for device 'cuda', not '{device.kind}'. Leave it out"
        )
    if scheme.dtype == "bfloat16" and "sm_75" in device.arch:
        raise UnsupportedError(
            f"quantization '{scheme.name}' is not supported on sm_75, whose tensor cores have no "
            "bfloat16. Use a float16 preset, such as q4f16_1, or leave sm_75 out of --arch"
        )
    reason = why_not_rounded(scheme, device) if options.act_quant else None
    if reason:
        raise ConfigError(f"--opt act_quant=1 {reason}. Use act_quant=0")


def why_not_rounded(scheme: Scheme, device: DeviceTarget) -> str | None:
    """Why no matmul of a model can have rounded activations; None if some can."""
    if device.kind != "cpu":
        return f"is for device 'cpu', not '{device.kind}'"
    isa = best_isa(device.cpu_features.__contains__)
    if isa is None:
        needs = ", or ".join(" and ".join(names) for names in NEEDS.values())
        return f"needs a CPU with {needs}, which {','.join(device.arch)} is not"
    from relaxlm.compiler.kernels import cpu_rounded
    from relaxlm.compiler.kernels.stored import StoredMatrix

    roles = (scheme.linear, scheme.embedding, scheme.lm_head)
    if any(cpu_rounded.supports(StoredMatrix(512, 512, q, scheme.dtype), isa) for q in roles):
        return None
    return f"has no kernels for weights in {scheme.name} on this CPU ({isa})"


def parse_overrides(text: str | None) -> dict[str, int | str]:
    """ "a=1;b=2" as a dictionary; sizes as positive integers.

    Raises:
        ConfigError: names the part that is wrong and the keys there are.
    """
    known = (
        "context_window_size",
        "prefill_chunk_size",
        "max_batch_size",
        "sliding_window_size",
        "attention_sink_size",
        "kv_cache_dtype",
    )
    result: dict[str, int | str] = {}
    for part in (text or "").split(";"):
        if not part.strip():
            continue
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in known:
            raise ConfigError(
                f"--overrides: {part.strip()!r} is not understood, expected KEY=VALUE separated by "
                f"';' with a key of: {', '.join(known)}"
            )
        if key == "kv_cache_dtype":
            result[key] = value
            continue
        lowest = 0 if key == "attention_sink_size" else 1
        if not value.isdigit() or int(value) < lowest:
            raise ConfigError(
                f"--overrides: {key}={value!r}, expected a whole number of tokens from {lowest} on"
            )
        result[key] = int(value)
    return result
