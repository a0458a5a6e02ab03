"""Dawn, the WebGPU of Chromium, accepts kernels of ours, and they keep to WebGPU's limits.

What they compute is tested by `tests/compiler/test_gpu_*.py`, and by whole models.
"""

import re

import pytest
import tvm
from tvm import tirx

from relaxlm.compiler.kernels import (
    gpu_attention,
    gpu_encoder_attention,
    gpu_experts,
    gpu_latent_attention,
    gpu_logits,
    gpu_matmul,
    gpu_rope,
    gpu_routing,
    gpu_rows,
)
from relaxlm.compiler.kernels.attention import PAGE_SIZE, AttentionShape
from relaxlm.compiler.kernels.cpu_latent_attention import LatentShape
from relaxlm.compiler.kernels.gpu_activations import ACTIVATIONS
from relaxlm.compiler.kernels.product import Product
from relaxlm.compiler.kernels.rope import RopeOptions
from relaxlm.compiler.kernels.row_expression import Activation, Binary, Matrix, Norm, Vector
from relaxlm.compiler.kernels.row_expression import Input as Given
from relaxlm.compiler.target import GPU_LIMITS
from relaxlm.quantization.kv_cache import KV_FORMATS
from relaxlm.quantization.schemes import SCHEMES
from tests.web.conftest import RunNode

# The defaults of WebGPU, which every device has: maxComputeWorkgroupStorageSize,
# maxStorageBuffersPerShaderStage, maxComputeInvocationsPerWorkgroup.
SHARED_BYTES, BUFFERS, THREADS = 16384, 8, 256
BYTES = {"f32": 4, "i32": 4, "f16": 2}

COMPILE = """
const adapter = await navigator.gpu.requestAdapter();
const features = [...adapter.features].filter((name) => name === "shader-f16");
const device = await adapter.requestDevice({ requiredFeatures: features });
const found = [];
for (const code of input) {
  const module = device.createShaderModule({ code });
  const { messages } = await module.getCompilationInfo();
  const compute = { module };
  const made = await device.createComputePipelineAsync({ layout: "auto", compute })
    .then(() => "", (error) => String(error));
  found.push([...messages.map((m) => `${m.lineNum}: ${m.message}`), made].join("\\n").trim());
}
output(found);
"""


def shaders(kernels: dict[str, tirx.PrimFunc]) -> list[str]:
    """The text of each kernel that a device runs."""
    module = tvm.IRModule(
        {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    )
    target = tvm.target.Target({"kind": "webgpu", **GPU_LIMITS["webgpu"]}, host={"kind": "llvm"})
    module = tirx.transform.ForceNarrowIndexToInt32()(module)
    (device,) = tvm.compile(module, target=target).mod.imports
    parts = re.split(r"^// Function: (?=\w+\n//-+\n// F)", device.inspect_source(), flags=re.M)
    return [part.partition("\n")[2] for part in parts[1:]]


# Shapes whose kernels differ: heads per keys, head sizes, and what is done to scores.
ATTENTION = {
    "float16": [
        AttentionShape(32, 8, 128, window=0, sinks=0, scale=0.1),
        AttentionShape(12, 1, 512, window=1024, sinks=4, scale=0.1, alibi=True),
    ],
    "float32": [
        AttentionShape(4, 4, 80, window=1024, sinks=0, scale=0.1, chunked=True),
        AttentionShape(16, 1, 256, window=0, sinks=0, scale=0.1, cap=30.0, sink_logits=True),
    ],
}
LATENT = {
    "float16": LatentShape(heads=20, latent=512, rope=64, scale=0.1),
    "float32": LatentShape(heads=40, latent=256, rope=32, scale=0.1),
}
# Experts: how many, of how many rows and columns, and how many a token passes.
EXPERTS = {"q4f16_1": (128, 1536, 2048, 8), "q4f32_1": (300, 70, 90, 3)}


# Products: a preset, the shape, and what is done to the result.
PRODUCTS = [
    ("q4f16_1", (2048, 1024), {"bias": "float16", "residual": True}),
    ("q4f16_1", (16384, 1000), {"out_dtype": "float32"}),
    ("q4f16_0", (2 * 700, 512), {"activation": "silu"}),
    ("q3f16_0", (512, 1030), {}),
    ("q4f32_1", (2 * 512, 2048), {"activation": "gelu"}),
    ("q0f32", (512, 770), {"residual": True}),
]


def layer_kernels(dtype: str) -> dict[str, tirx.PrimFunc]:
    """What stands around attention in a layer, and the logits of a step."""
    kernels = {}
    for i, (preset, shape, more) in enumerate(PRODUCTS):
        scheme = SCHEMES[preset]
        if scheme.dtype == dtype:
            plain = {"out_dtype": dtype, **more}
            product = Product(shape, scheme.linear, dtype, dtype, **plain)
            kernels[f"product{i}"] = gpu_matmul.product_kernel(product)
    dim, places = 136, ((0, 0), (0, 8 * 136), (0, 10 * 136))
    options = RopeOptions((12 * dim,), places, (None,), dtype, 1e-6, turned=dim, dtype=dtype)
    shape = AttentionShape(8, 2, dim, 0, 0, 0.0)
    kernels["rope"] = gpu_rope.rope_append_kernel(shape, KV_FORMATS[dtype], options)
    value = Binary("add", Matrix(0), Matrix(1))
    norm = Norm("layer", 1e-5, Vector(2), Vector(3))
    given = (Given(5000, dtype),) * 2 + (Given(5000, dtype, True),) * 2
    kernels["norm"] = gpu_rows.row_kernel(5000, given, value, norm, True, dtype)
    for name in ACTIVATIONS:
        value = Binary("multiply", Activation(name, Matrix(0)), Matrix(1))
        kernels[name] = gpu_rows.row_kernel(70, given[:2], value, None, False, dtype)
    for kernel in ("peaks", "weigh", "gather", "highest"):
        kernels[f"{kernel}_logits"] = getattr(gpu_logits, f"{kernel}_kernel")(151936)
    return kernels


@pytest.fixture(scope="module", params=ATTENTION)
def texts(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """A dtype, and the text of its kernels."""
    dtype, kernels = request.param, {}
    for i, shape in enumerate(ATTENTION[dtype]):
        kernels[f"attend{i}"] = gpu_attention.attend_kernel(shape, KV_FORMATS[dtype], dtype)
        kernels[f"view{i}"] = gpu_attention.view_kernel(
            shape.window, shape.sinks, shape.chunked, PAGE_SIZE
        )
    latent = LATENT[dtype]
    kernels["latent"] = gpu_latent_attention.attend_kernel(latent, KV_FORMATS[dtype], dtype)
    sizes = latent.heads, 140, latent.latent
    kernels["head_matmul"] = gpu_latent_attention.head_matmul_kernel(*sizes, dtype, dtype)
    kernels["attend_text"] = gpu_encoder_attention.attend_kernel(ATTENTION[dtype][0], dtype)
    kernels["view_texts"] = gpu_encoder_attention.view_kernel()
    for preset, (experts, *matrix, each) in EXPERTS.items():
        scheme = SCHEMES[preset]
        if scheme.dtype == dtype:
            kernels["choose"] = gpu_routing.choose_kernel(experts, each)
            kernels["limit"] = gpu_routing.limit_kernel(experts, 4, 2, 2, -float("inf"))
            kernels["plan"] = gpu_experts.plan_kernel(experts, each)
            for name, linear in (("packed", scheme.linear), ("plain", None)):
                kernels[name] = gpu_experts.expert_kernel(
                    (experts, *matrix), linear, dtype, dtype, each, each
                )
    return dtype, shaders({**kernels, **layer_kernels(dtype)})


def test_kernels_keep_to_the_limits_of_every_device(texts: tuple[str, list[str]]) -> None:
    dtype, codes = texts
    # Few tokens, their parts, what merges these, many tokens; and the view. Latents: without many
    # tokens; and three sizes of products. Texts and their view; routing; three steps of a plan for
    # each size of tiles; rows alone, and in tiles.
    count = 2 * (4 + 1) + 3 + 3 + 2 + 2 + 2 * 3 + 2 * (1 + 2)
    # Three for each product: one row, few, and many.
    products = sum(SCHEMES[preset].dtype == dtype for preset, *_ in PRODUCTS)
    assert len(codes) == count + 3 * products + 2 + len(ACTIVATIONS) + 4
    for code in codes:
        arrays = re.findall(r"^var<workgroup> \w+ : array<(\w+), (\d+)>;", code, re.M)
        assert len(arrays) == code.count("var<workgroup>")
        assert sum(BYTES[kind] * int(size) for kind, size in arrays) <= SHARED_BYTES
        assert code.count("var<storage") <= BUFFERS
        (threads,) = re.findall(r"@workgroup_size\((\d+), 1, 1\)", code)
        assert int(threads) <= THREADS
        assert ("f16" in code) == (dtype == "float16") or "exp2" not in code


def test_dawn_accepts_the_kernels(
    texts: tuple[str, list[str]], webgpu_node: RunNode, software_gpu: tuple[str, str]
) -> None:
    dtype, codes = texts
    if dtype == "float16" and software_gpu[1] != dtype:
        pytest.skip("the GPU in software has no float16")
    for code, found in zip(codes, webgpu_node(COMPILE, codes), strict=True):
        assert found == "", code
