"""Kernels written as plain Python: functions that emit loops and stores through TVM's IR builder.

    def body() -> None:
        m = length("m")
        x, out = tensor("x", (m, 64), "float32"), tensor("out", (m, 64), "float32")
        with T.parallel(m) as row, T.serial(4) as i:
            T.buffer_store(out, x.vload([row, i * 16], "float32x16") * splat(2.0, 16), [row, ...])

    kernel = emit(body)

Parsing the same text as TVMScript takes twenty to fifty times as long, which every compile pays.
A Python name for an expression costs nothing here: the expression is repeated, and LLVM merges the
copies. To keep a value, store it into a `scratch` buffer.
"""

from collections.abc import Callable, Sequence

import tvm
from tvm import s_tir, tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

# Buffers below this many bytes live on the stack, where LLVM turns them into registers; larger
# ones are taken from TVM's pool of workspaces, at every pass over the place that declares them.
STACK_BYTES = 1024
# relax::OpPatternKind of TVM.
OPAQUE = 8


def emit(body: Callable[[], None], imports: Sequence[str] = ()) -> tirx.PrimFunc:
    """The kernel that `body` emits, ready for Relax.

    Args:
        body: declares the parameters by `tensor`, in order, then emits statements.
        imports: LLVM IR of functions that the kernel calls by name. Functions of one name are one
            function across a module, so whatever decides the body belongs into the name.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            # Kernels write to no tensor that they read under another name.
            T.func_attr({"tirx.noalias": True})
            body()
    function = builder.get()
    text = function.body
    for ir in imports:
        # Not of the module that the kernel is in: TVM inlines these into the kernel's own code.
        text = tirx.AttrStmt(
            tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(ir), text
        )
    # Relax passes expect a root block; a fixed symbol name would clash between kernels.
    root = s_tir.SBlock([], [], [], "root", text)
    function = function.with_body(s_tir.SBlockRealize([], tirx.const(True, "bool"), root))
    # No pass fuses one with what is around it, whatever the body looks like.
    return function.with_attrs({"tirx.is_scheduled": True, "op_pattern": OPAQUE})


def length(name: str) -> tirx.Var:
    """A length that is known when the kernel runs, int64; the first tensor with it defines it."""
    return tirx.Var(name, "int64")


def tensor(name: str, shape: Sequence[Expr | int], dtype: str) -> tirx.Buffer:
    """The next parameter of the kernel: a dense tensor."""
    return T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype)


def flat(buffer: tirx.Buffer, dtype: str | None = None) -> tirx.Buffer:
    """A tensor of constant shape with one axis, for addresses computed by hand."""
    size = 1
    for extent in buffer.shape:
        size = size * extent
    return T.decl_buffer((size,), dtype or buffer.dtype, data=buffer.data)


def scratch(size: Expr | int, dtype: str) -> tirx.Buffer:
    """Memory of this pass over the surrounding loop, one axis, not initialised."""
    return T.decl_buffer((size,), dtype, scope="global")
