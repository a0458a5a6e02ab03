"""Fewer passes over activations on CPUs: whole groups of operators become one kernel.

    x = add(a, b); y = rms_norm(x, astype(w))          ->   x, y = add_norm(a, b, w)
    y = multiply(silu(split(x)[0]), split(x)[1])       ->   y = silu_mul(x)
    y = gelu(add(x, astype(bias)))                     ->   y = gelu(x, bias)
    q, k, v = split(reshape(add(x, astype(bias))))
    q, k = rotate(rms_norm(q, ..)), rotate(rms_norm(k, ..))
    pages = append_to_pages(k, v, slots, pages)        ->   q, pages = rope_append(x, .., pages)

Biases and the norms of q and k may be missing. A norm, gelu or silu_mul that is only read
by matmuls with rounded activations is written in their form at once, by the matmul itself where
there is a kernel for that:

    r = call_tir(round, add_norm(a, b, w)[1])          ->   x, r = add_norm_rounded(a, b, w)
    r = call_tir(round, silu_mul(rounded_matmul(..)))  ->   r = gated_matmul(..)

Runs after LowerPagedAttention, which emits the append, and LowerMatmulCPU, which rounds, and before
LegalizeOps, which would make a loop nest of each operator.
"""

import re
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relaxlm.compiler.kernels.cpu_elementwise import gelu_kernel, norm_kernel, silu_mul_kernel
from relaxlm.compiler.kernels.cpu_rope import RopeOptions, rope_append_kernel
from relaxlm.compiler.kernels.cpu_rounded import gated_matmul_kernel, supports_gated
from relaxlm.compiler.kernels.rounding import Rounding
from relaxlm.compiler.passes.lower_matmul_cpu import ROUNDING, matrix_of
from relaxlm.compiler.passes.lower_paged_attention import cache_shape
from relaxlm.compiler.passes.rewrite import rewrite_functions, variables
from relaxlm.models.config import DecoderConfig
from relaxlm.quantization.kv_cache import KVFormat


@tvm.transform.module_pass(opt_level=0, name="FuseElementwiseCPU")
class FuseElementwiseCPU:
    def __init__(self, config: DecoderConfig, format: KVFormat) -> None:
        self.shape, self.format = cache_shape(config), format

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self)
        return rewrite_functions(mod, rewriter, rewriter.rewrite)


def _is(expr: Any, operator: str) -> bool:
    return isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get(f"relax.{operator}")


def _calls(expr: Any, kernel: str, operator: str = "call_tir") -> bool:
    """Whether this calls a kernel of that name, which may have a number behind it."""
    return _is(expr, operator) and bool(re.fullmatch(kernel + r"\d*", expr.args[0].name_hint))


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, fuse: FuseElementwiseCPU) -> None:
        super().__init__(mod)
        self.mod, self.fuse = mod, fuse

    def rewrite(self, function: relax.Function) -> relax.Expr:
        # Patterns are matched on the function as it was.
        self.bound: dict[relax.Var, relax.Expr] = {}
        self.rotated: dict[relax.Var, relax.Var] = {}  # the split into q, k, v -> rotated q
        if isinstance(function.body, relax.SeqExpr):
            for block in function.body.blocks:
                for binding in block.bindings:
                    self.bound[binding.var] = binding.value
        for var, value in self.bound.items():
            if _calls(value, "rotate"):
                item = self.value(self.without_norm(value.args[1].fields[0])[0])
                if isinstance(item, relax.TupleGetItem) and item.index == 0:
                    self.rotated[item.tuple_value] = var
        self.roundings = self.rounded_only()
        return self.visit_expr(function)

    def rounded_only(self) -> dict[relax.Expr, Rounding]:
        """Norms and products that are read only to be rounded, all in one way; by their value."""
        found: dict[relax.Var, set[Rounding | None]] = {}
        for value in self.bound.values():
            rounding = self.rounding(value)
            if rounding is not None:
                found.setdefault(value.args[1].fields[0], set()).add(rounding)
                continue
            for operand in variables(value):
                found.setdefault(operand, set()).add(None)
        return {
            self.bound[var]: rounding
            for var, (rounding, *others) in ((var, tuple(kinds)) for var, kinds in found.items())
            if not others and rounding is not None and isinstance(var, relax.DataflowVar)
        }

    def rounding(self, value: Any) -> Rounding | None:
        """How a call rounds; None for anything else."""
        if not _is(value, "call_tir"):
            return None
        text = (self.mod[value.args[0]].attrs or {}).get(ROUNDING)
        return None if text is None else Rounding.parse(str(text))

    def value(self, expr: relax.Expr) -> Any:
        """What a variable is bound to; None for anything else."""
        return self.bound.get(expr) if isinstance(expr, relax.Var) else None

    def stored(self, expr: relax.Expr) -> relax.Expr:
        """A parameter without the cast to float32: kernels convert what they read."""
        value = self.value(expr)
        return value.args[0] if _is(value, "astype") else expr

    def without_norm(self, expr: relax.Expr) -> tuple[relax.Expr, Any]:
        """What a norm is computed of, and the norm; (expr, None) if it is none."""
        value = self.value(expr)
        return (value.args[0], value) if _is(value, "nn.rms_norm") else (expr, None)

    def kernel(self, function: tvm.tirx.PrimFunc, name: str) -> tvm.ir.GlobalVar:
        return self.builder_.add_func(function, name)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        fused = None
        if self.rounding(call) is not None:
            x = self.visit_expr(call.args[1].fields[0])
            fused = x if str(x.ty.dtype) == "int32" else None  # it was written rounded
        elif _is(call, "nn.rms_norm"):
            fused = self.norm(call)
        elif _is(call, "multiply"):
            fused = self.silu_mul(call)
        elif _is(call, "nn.gelu"):
            fused = self.gelu(call)
        elif _calls(call, "append_to_pages", "call_tir_inplace"):
            fused = self.rope_append(call)
        return super().visit_call_(call) if fused is None else fused

    def visit_tuple_getitem_(self, item: relax.TupleGetItem) -> relax.Expr:
        item = super().visit_tuple_getitem_(item)
        if isinstance(item, relax.TupleGetItem) and isinstance(item.tuple_value, relax.Var):
            value = self.lookup_binding(item.tuple_value)
            if isinstance(value, relax.Tuple):
                return value.fields[item.index]
        return item

    def norm(self, call: relax.Call) -> relax.Expr | None:
        x, weight = call.args[0], self.stored(call.args[1])
        if not _is_float32_matrix(x) or [int(axis) for axis in call.attrs.axes] not in ([-1], [1]):
            return None
        add, size = self.value(x), int(x.ty.shape[1])
        residual = (
            _is(add, "add")
            and isinstance(x, relax.DataflowVar)
            and all(_is_float32_matrix(term) for term in add.args)
            and str(add.args[0].ty) == str(add.args[1].ty) == str(x.ty)
        )
        rounding = self.roundings.get(call)
        kernel = norm_kernel(
            size, float(call.attrs.epsilon), str(weight.ty.dtype), residual, rounding
        )
        ending, ty = _written(call.ty, rounding)
        if not residual:
            function = self.kernel(kernel, "norm" + ending)
            arguments = [self.visit_expr(x), self.visit_expr(weight)]
            return relax.call_tir(function, arguments, ty)
        function = self.kernel(kernel, "add_norm" + ending)
        arguments = [self.visit_expr(part) for part in (*add.args, weight)]
        both = self.builder_.emit(relax.call_tir(function, arguments, [x.ty, ty]))
        total = self.builder_.emit(relax.TupleGetItem(both, 0))
        self.set_var_remap(x, total)
        return relax.TupleGetItem(both, 1)

    def gelu(self, call: relax.Call) -> relax.Expr | None:
        x = call.args[0]
        if not _is_float32_matrix(x) or not isinstance(x.ty.shape[1], tvm.tirx.IntImm):
            return None
        inputs, dtype, add = [x], None, self.value(x)
        if _is(add, "add") and isinstance(x, relax.DataflowVar) and len(add.args[1].ty.shape) == 1:
            inputs = [add.args[0], self.stored(add.args[1])]
            dtype = str(inputs[1].ty.dtype)
        rounding = self.roundings.get(call)
        ending, ty = _written(call.ty, rounding)
        kernel = gelu_kernel(int(x.ty.shape[1]), dtype, rounding)
        function = self.kernel(kernel, "gelu" + ending)
        return relax.call_tir(function, [self.visit_expr(part) for part in inputs], ty)

    def silu_mul(self, call: relax.Call) -> relax.Expr | None:
        silu, up = self.value(call.args[0]), self.value(call.args[1])
        gate: Any = self.value(silu.args[0]) if _is(silu, "nn.silu") else None
        if not all(isinstance(half, relax.TupleGetItem) for half in (gate, up)):
            return None
        split = self.value(gate.tuple_value)
        if (
            gate.tuple_value != up.tuple_value
            or (gate.index, up.index) != (0, 1)
            or not _is(split, "split")
            or not _is_float32_matrix(split.args[0])
            or int(split.attrs.axis) not in (-1, 1)
            or 2 * int(call.ty.shape[1]) != int(split.args[0].ty.shape[1])
        ):
            return None
        rounding = self.roundings.get(call)
        ending, ty = _written(call.ty, rounding)
        product = None if rounding is None else self.gated_product(split, rounding)
        if product is not None:
            return product
        kernel = silu_mul_kernel(int(call.ty.shape[1]), rounding)
        function = self.kernel(kernel, "silu_mul" + ending)
        return relax.call_tir(function, [self.visit_expr(split.args[0])], ty)

    def gated_product(self, split: relax.Call, rounding: Rounding) -> relax.Expr | None:
        """The same in the matmul whose product is split, if there is a kernel for it."""
        product = self.value(split.args[0])
        if not _calls(product, "rounded_matmul") or not isinstance(
            split.args[0], relax.DataflowVar
        ):
            return None
        x, *stored = product.args[1].fields
        matrix = matrix_of(self.mod[product.args[0]])
        if rounding.invariant or not supports_gated(matrix, rounding.isa):
            return None
        function = self.kernel(gated_matmul_kernel(matrix, rounding.isa), "gated_matmul")
        ty = relax.TensorType((product.ty.shape[0], rounding.row_words), "int32")
        return relax.call_tir(function, [self.visit_expr(part) for part in (x, *stored)], ty)

    def rope_append(self, call: relax.Call) -> relax.Expr | None:
        k, v, slots, *pages = call.args[1].fields
        rotate = self.value(k)
        if not _calls(rotate, "rotate"):
            return None
        key, k_norm = self.without_norm(rotate.args[1].fields[0])
        items = (self.value(key), self.value(v))
        if not all(isinstance(item, relax.TupleGetItem) for item in items):
            return None
        split = items[0].tuple_value
        heads = self.value(split)
        if (
            split != items[1].tuple_value
            or [item.index for item in items] != [1, 2]
            or split not in self.rotated
            or not _is(heads, "split")
            or not _is(self.value(heads.args[0]), "reshape")
            or str(k.ty.dtype) != "float32"
        ):
            return None
        q = self.rotated[split]
        _, q_norm = self.without_norm(self.value(q).args[1].fields[0])
        if (q_norm is None) != (k_norm is None) or not isinstance(q, relax.DataflowVar):
            return None
        product = self.value(heads.args[0]).args[0]
        add, bias = self.value(product), None
        if _is(add, "add") and len(add.args[1].ty.shape) == 1:
            product, bias = add.args[0], self.stored(add.args[1])
        norms = [] if q_norm is None else [self.stored(n.args[1]) for n in (q_norm, k_norm)]
        options = RopeOptions(
            None if bias is None else str(bias.ty.dtype),
            str(norms[0].ty.dtype) if norms else None,
            float(q_norm.attrs.epsilon) if norms else 0.0,
        )
        function = self.kernel(
            rope_append_kernel(self.fuse.shape, self.fuse.format, options), "rope_append"
        )
        cos, sin = rotate.args[1].fields[1:]
        inputs = [product, cos, sin, slots, *([] if bias is None else [bias]), *norms]
        arguments = [self.visit_expr(part) for part in (*inputs, *pages)]
        places = [len(inputs) + i for i in range(len(pages))]
        types = [q.ty, *(page.ty for page in pages)]
        all_ = self.builder_.emit(relax.call_tir_inplace(function, arguments, [-1, *places], types))
        self.set_var_remap(q, self.builder_.emit(relax.TupleGetItem(all_, 0)))
        updated = [self.builder_.emit(relax.TupleGetItem(all_, i + 1)) for i in range(len(pages))]
        return relax.Tuple(updated)


def _is_float32_matrix(expr: relax.Expr) -> bool:
    ty = expr.ty
    return isinstance(ty, relax.TensorType) and str(ty.dtype) == "float32" and len(ty.shape) == 2


def _written(ty: relax.TensorType, rounding: Rounding | None) -> tuple[str, relax.TensorType]:
    """What a kernel's name ends with, and the type of what it writes."""
    if rounding is None:
        return "", ty
    return "_rounded", relax.TensorType((ty.shape[0], rounding.row_words), "int32")
