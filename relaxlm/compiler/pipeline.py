"""Every pass in order: the only file that knows the order."""

from dataclasses import dataclass, replace
from functools import partial

import tvm
from tvm import relax, tirx

from relaxlm.compiler.kernels import (
    cpu_attention,
    cpu_encoder_attention,
    cpu_latent_attention,
    cpu_rope,
    cuda_attention,
    cuda_encoder_attention,
    cuda_latent_attention,
    cuda_matmul,
    cuda_rope,
    cuda_rows,
    gpu_attention,
    gpu_encoder_attention,
    gpu_latent_attention,
    gpu_matmul,
    gpu_rope,
    gpu_rows,
)
from relaxlm.compiler.kernels.attention import PageTensor, page_tensors
from relaxlm.compiler.passes.add_decode import AddDecode
from relaxlm.compiler.passes.add_peaks import AddPeaks
from relaxlm.compiler.passes.fuse_elementwise_cpu import FuseElementwiseCPU
from relaxlm.compiler.passes.fuse_elementwise_gpu import FuseElementwiseGPU
from relaxlm.compiler.passes.fuse_rope import FuseRope
from relaxlm.compiler.passes.gpu_schedules import gpu_schedules
from relaxlm.compiler.passes.legalize_cpu import legalize_cpu
from relaxlm.compiler.passes.lower_embedding import LowerEmbedding
from relaxlm.compiler.passes.lower_encoder_attention import LowerEncoderAttention
from relaxlm.compiler.passes.lower_expert_matmul import LowerExpertMatmul
from relaxlm.compiler.passes.lower_latent_attention import LatentKernels, LowerLatentAttention
from relaxlm.compiler.passes.lower_matmul_cpu import LowerMatmulCPU
from relaxlm.compiler.passes.lower_matmul_gpu import LowerMatmulGPU
from relaxlm.compiler.passes.lower_paged_attention import (
    AttentionKernels,
    LowerPagedAttention,
    cache_shape,
)
from relaxlm.compiler.passes.lower_routing import LowerRouting
from relaxlm.compiler.passes.own_storage import OwnStorage
from relaxlm.compiler.passes.schedule_cpu import schedule_cpu
from relaxlm.compiler.passes.share_tensors import ShareTensors
from relaxlm.compiler.passes.sum_in_float32 import SumInFloat32
from relaxlm.compiler.passes.take_rows_early import TakeRowsEarly
from relaxlm.models.config import DecoderConfig
from relaxlm.models.weights import ParameterSpec
from relaxlm.quantization.kv_cache import KVFormat
from relaxlm.quantization.schemes import Scheme
from relaxlm.quantization.transform import QuantizeParameters
from relaxlm.runtime.decode_steps import DECODE

ATTENTION = {
    "cpu": AttentionKernels(
        "cpu", cpu_attention.page_tensors, cpu_attention.append_kernel, cpu_attention.attend_kernel
    ),
    "cuda": AttentionKernels(
        "cuda", page_tensors, cuda_rope.append_kernel, cuda_attention.attend_kernel
    ),
    "gpu": AttentionKernels(
        "gpu",
        gpu_attention.page_tensors,
        gpu_attention.append_kernel,
        gpu_attention.attend_kernel,
        gpu_attention.view_kernel,
        gpu_attention.partial_shape,
    ),
}


LATENT_ATTENTION = {
    kind: LatentKernels(
        kind, kernels.append_kernel, kernels.attend_kernel, kernels.head_matmul_kernel
    )
    for kind, kernels in (("cpu", cpu_latent_attention), ("cuda", cuda_latent_attention))
}
LATENT_ATTENTION["gpu"] = LatentKernels(
    "gpu",
    cuda_latent_attention.append_kernel,
    gpu_latent_attention.attend_kernel,
    gpu_latent_attention.head_matmul_kernel,
    gpu_attention.view_kernel,
    gpu_latent_attention.partial_shape,
)


@dataclass(frozen=True)
class Lowering:
    """What the passes need to know besides the IR.

    `kind` is `DeviceTarget.kernels`, `shared_memory` is the target's, `act_quant` and
    `batch_invariant` are as in `CompileOptions`. CUDA graphs are made of steps of up to
    `decode_rows` sequences; of none if it is 0.
    """

    config: DecoderConfig
    specs: list[ParameterSpec]
    scheme: Scheme
    kv_format: KVFormat
    kind: str
    act_quant: bool = False
    batch_invariant: bool = False
    shared_memory: int = 64 << 10  # what any GPU has
    decode_rows: int = 0

    def page_tensors(self) -> tuple[PageTensor, ...]:
        """The cache tensors of each layer; an encoder has none."""
        if self.config.is_encoder:
            return ()
        if self.config.latent_cache is not None:
            return cpu_latent_attention.page_tensors(*self.config.latent_cache, self.kv_format)
        return ATTENTION[self.kind].page_tensors(cache_shape(self.config), self.kv_format)


def compute_dtype(kind: str, scheme: Scheme) -> str:
    """The dtype of activations: CPUs convert f16 and bf16 as they read them and compute in f32."""
    return "float32" if kind == "cpu" else scheme.dtype


def lowering_passes(lowering: Lowering) -> list[tvm.transform.Pass]:
    """From a model's float IR to loop nests, one function per group of operators."""
    dtype = compute_dtype(lowering.kind, lowering.scheme)
    has_head = lowering.config.has_head
    return [
        # Nothing is computed that nobody reads.
        TakeRowsEarly(),
        # Float model -> stored weights, one cache format.
        QuantizeParameters(lowering.specs, lowering.scheme, dtype),
        _attention_pass(lowering),
        relax.transform.BundleModelParams("params"),
        # Weights -> kernels that read what is stored.
        LowerEmbedding(),
        LowerExpertMatmul(
            lowering.kind,
            lowering.shared_memory,
            lowering.act_quant and not lowering.batch_invariant,
        ),
        *(
            [
                LowerMatmulCPU(lowering.act_quant, lowering.batch_invariant),
                FuseRope(lowering.kv_format, cpu_rope.rope_append_kernel, dtype, True),
                FuseElementwiseCPU(),
            ]
            if lowering.kind == "cpu"
            else [
                *_gpu_passes(lowering, dtype),
                LowerRouting(lowering.kind),
                relax.transform.FuseTransposeMatmul(),
            ]
        ),
        # The other operators: one loop nest per group.
        legalize_cpu() if lowering.kind == "cpu" else relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        # Loop nests -> parallel loops, or grids of threads.
        schedule_cpu() if lowering.kind == "cpu" else gpu_schedules(),
        *([AddPeaks(lowering.config.vocab_size, lowering.kind)] if has_head else []),
        *([AddDecode(lowering.decode_rows)] if lowering.decode_rows else []),
        # WGSL has no 64-bit integers.
        *([tirx.transform.ForceNarrowIndexToInt32()] if lowering.kind == "gpu" else []),
    ]


def _gpu_passes(lowering: Lowering, dtype: str) -> list[tvm.transform.Pass]:
    """Kernels for whole groups of operators on GPUs."""
    if lowering.kind == "cuda":
        product = partial(cuda_matmul.product_kernel, shared_limit=lowering.shared_memory)
        return [
            LowerMatmulGPU(product),
            FuseRope(lowering.kv_format, cuda_rope.rope_append_kernel, dtype),
            FuseElementwiseGPU(cuda_rows.row_kernel, dtype),
        ]
    return [
        LowerMatmulGPU(gpu_matmul.product_kernel),
        FuseRope(lowering.kv_format, gpu_rope.rope_append_kernel, dtype, joins_tables=True),
        FuseElementwiseGPU(gpu_rows.row_kernel, dtype),
        SumInFloat32(),
    ]


def _attention_pass(lowering: Lowering) -> tvm.transform.Pass:
    """What lowers attention: encoders have no cache, and some caches hold latents."""
    config, kind = lowering.config, lowering.kind
    if config.is_encoder:
        if kind == "gpu":
            gpu = gpu_encoder_attention
            return LowerEncoderAttention(gpu.attend_kernel, gpu.view_kernel())
        if kind == "cuda":
            return LowerEncoderAttention(cuda_encoder_attention.attend_kernel)
        rounded = lowering.act_quant
        return LowerEncoderAttention(partial(cpu_encoder_attention.attend_kernel, rounded=rounded))
    if config.latent_cache is not None:
        latent = LATENT_ATTENTION[kind]
        if kind == "cuda":
            limit = lowering.shared_memory
            latent = replace(
                latent,
                attend=partial(latent.attend, shared_limit=limit),
                head_matmul=partial(latent.head_matmul, shared_limit=limit),
            )
        return LowerLatentAttention(config, lowering.kv_format, latent)
    kernels = ATTENTION[kind]
    options: dict[str, int] = {}
    if kind == "cuda":
        options = {"shared_limit": lowering.shared_memory}
    if kind == "cpu":
        options = {"rounded": lowering.act_quant, "invariant": lowering.batch_invariant}
    kernels = replace(kernels, attend=partial(kernels.attend, **options))
    return LowerPagedAttention(config, lowering.kv_format, kernels)


def memory_passes() -> list[tvm.transform.Pass]:
    """From calls that return tensors to calls that write into planned memory."""
    return [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        ShareTensors(),
        # Other names for a tensor, and tuples made to be taken apart, would be instructions.
        relax.transform.CanonicalizeBindings(),
        relax.transform.DeadCodeElimination(),
    ]


def instruction_passes() -> list[tvm.transform.Pass]:
    """From Relax with explicit memory to instructions of the VM.

    Without KillAfterLastUse: what the planner allocates lives as long as the step anyway, and to
    forget each tensor would cost the VM an instruction.
    """
    return [
        OwnStorage(DECODE),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
