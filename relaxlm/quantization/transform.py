"""The IR transform of a scheme: float parameters become stored ones.

    w: [N, K] float32            ->   w.q_weight: uint32, w.q_scale: float16
    y = matmul(x, permute(w))         y = matmul(x, permute(dequantize(w.q_weight, w.q_scale)))

A parameter that the scheme leaves alone is stored in the scheme's dtype and converted where it is
used. It runs first in the pipeline, on the IR as exported from `models/`, and knows a parameter by
its name and role; the stored names, shapes and dtypes come from the same scheme object that
converts the checkpoint.
"""

from collections.abc import Sequence

import tvm
from tvm import relax, te, tirx
from tvm.ir import Expr
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm_ffi import structural_equal

from relaxlm.models.weights import ParameterSpec
from relaxlm.quantization.groupwise import GroupQuant
from relaxlm.quantization.schemes import Scheme

# Attribute of a dequantize function: the format, as `format_tag` writes it.
DEQUANTIZE = "relaxlm.dequantize"


def format_tag(quant: GroupQuant) -> str:
    """A format as an attribute of the IR, read back by `read_tag`."""
    return f"{quant.bits}:{quant.group}:{quant.layout}:{quant.dtype}"


def read_tag(tag: str) -> GroupQuant:
    bits, group, layout, dtype = tag.split(":")
    return GroupQuant(int(bits), int(group), layout, dtype)  # type: ignore[arg-type]


def element(
    quant: GroupQuant,
    words: te.Tensor,
    scales: te.Tensor,
    n: Expr,
    k: Expr,
    dtype: str,
    outer: Sequence[Expr] = (),
):
    """The weight [*outer, n, k] as a TIR expression of `dtype`: (code - max_int) * scale."""
    word, group = k // quant.per_word, k // quant.group
    place = (word, n) if quant.layout == "KN" else (*outer, n, word)
    scale = scales[(group, n) if quant.layout == "KN" else (*outer, n, group)]
    shift = (k % quant.per_word * quant.bits).astype("uint32")
    code = tirx.bitwise_and(
        tirx.shift_right(words[place], shift), tirx.const((1 << quant.bits) - 1, "uint32")
    )
    centred = code.astype("int32") - tirx.const(quant.max_int, "int32")
    return centred.astype(dtype) * scale.astype(dtype)


@tvm.transform.module_pass(opt_level=0, name="QuantizeParameters")
class QuantizeParameters:
    """Replace the parameters of every function by what a scheme stores.

    Args:
        specs: the parameters of the model, for their roles and shapes.
        scheme: how each is stored.
        dtype: in which the model computes; dequantized weights have it.

    Raises:
        ValueError: a parameter is not a float parameter of the model; so it is after this pass.
    """

    def __init__(self, specs: list[ParameterSpec], scheme: Scheme, dtype: str) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.scheme, self.dtype = scheme, dtype

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.specs, self.scheme, self.dtype)
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function):
                self._check(name.name_hint, function)
                rewriter.builder_.update_func(name, rewriter.rewrite(function))
        return rewriter.builder_.finalize()

    def _check(self, name: str, function: relax.Function) -> None:
        for param in function.params[int(function.attrs["num_input"]) :]:
            spec = self.specs.get(param.name)
            expected = spec and relax.TensorType(spec.shape, self._dtype_of(spec))
            if expected is None or not structural_equal(param.ty, expected):
                raise ValueError(
                    f"{name}: parameter {param.name} of type {param.ty} is not a parameter of the "
                    f"model in {self.dtype}; has QuantizeParameters run already?"
                )

    def _dtype_of(self, spec: ParameterSpec) -> str:
        """In the model's IR, before this pass."""
        return "float32" if spec.role == "float32" else self.dtype


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod, specs: dict[str, ParameterSpec], scheme: Scheme, dtype: str) -> None:
        super().__init__(mod)
        self.specs, self.scheme, self.dtype = specs, scheme, dtype

    def rewrite(self, function: relax.Function) -> relax.Function:
        inputs = int(function.attrs["num_input"])
        params = list(function.params[:inputs])
        self.stored: dict[relax.Var, list[relax.Var]] = {}
        self.computed: dict[relax.Var, relax.Expr] = {}
        for param in function.params[inputs:]:
            variables = [
                relax.Var(name, relax.TensorType(shape, dtype))
                for name, (shape, dtype) in self.scheme.storage(self.specs[param.name]).items()
            ]
            self.stored[param] = variables
            params += variables
        body = self.visit_expr(function.body)
        return relax.Function(params, body, function.ret_ty, attrs=function.attrs)

    def visit_var_(self, var: relax.Var) -> relax.Expr:
        if var not in self.stored:
            return super().visit_var_(var)
        if var not in self.computed:
            self.computed[var] = self._float_value(var)
        return self.computed[var]

    def _float_value(self, var: relax.Var) -> relax.Expr:
        spec, stored = self.specs[var.name], self.stored[var]
        quant = self.scheme.for_role(spec.role)
        if quant is None:
            same = stored[0].ty.dtype in (self.dtype, var.ty.dtype)
            return stored[0] if same else self.builder_.emit(relax.op.astype(stored[0], self.dtype))

        def dequantize(words: te.Tensor, scales: te.Tensor) -> te.Tensor:
            return te.compute(
                spec.shape,
                lambda *i: element(quant, words, scales, i[-2], i[-1], self.dtype, i[:-2]),
                name="dequantize",
            )

        return self.builder_.emit_te(
            dequantize,
            *stored,
            primfunc_name_hint="dequantize",
            primfunc_attrs={DEQUANTIZE: format_tag(quant)},
        )
