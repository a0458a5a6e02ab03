"""What a Relax function returns, written as one nested expression: IR that a test can compare."""

import re

from tvm import relax


def written_out(function: relax.Function) -> str:
    """Bindings put into their uses: "add(matmul(x, permute_dims(@dequantize(q, s))), astype(b))".

    A kernel's name has an @ in front, and not the number that makes it unique. Attributes,
    constants and shapes are left out.
    """
    bound = bindings(function)

    def text(expr: relax.Expr) -> str:
        if isinstance(expr, relax.Var):
            return text(bound[expr]) if expr in bound else expr.name
        if isinstance(expr, relax.TupleGetItem):
            return f"{text(expr.tuple_value)}[{expr.index}]"
        if isinstance(expr, relax.Tuple):
            return f"({', '.join(map(text, expr.fields))})"
        if isinstance(expr, relax.Call):
            name, arguments = expr.op.name.rpartition(".")[2], list(expr.args)
            if name in ("call_tir", "call_tir_inplace", "call_dps_packed"):
                callee = arguments[0]
                is_extern = isinstance(callee, relax.ExternFunc)
                name = callee.global_symbol if is_extern else callee.name_hint
                name = "@" + re.sub(r"\d+$", "", name)
                arguments = list(arguments[1].fields)
            return f"{name}({', '.join(filter(None, map(text, arguments)))})"
        return ""

    return text(function.body.body)


def bindings(function: relax.Function) -> dict[relax.Var, relax.Expr]:
    """Every variable of a function's body and what it is bound to, in order."""
    return {
        binding.var: binding.value
        for block in function.body.blocks
        for binding in block.bindings
        if isinstance(binding, relax.VarBinding)
    }
