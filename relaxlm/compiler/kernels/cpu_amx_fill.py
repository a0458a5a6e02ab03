"""Filling AMX's B tiles with 4-bit weights, straight from their stored words.

A tile is 16 rows of W by one group of 32 elements of K, as bfloat16 [K / 2][row][2]. Words lie row
by row, so the four words of a group are fetched from each of 16 rows, and shuffles put word j of
eight rows into one register, each twice: the lower copy yields an element with an even number, the
upper one its neighbour. An element is looked up by its low 4 bits, times its row's scale in
float32, and two registers become the 32 values of a row of the tile in one rounding.
"""

from relaxlm.compiler.kernels.cpu_transpose import LANES, shuffle, transpose_lines

GATHER, FILL = "relaxlm_amx_gather_4", "relaxlm_amx_fill_4"
TRANSPOSE = "relaxlm_transpose_16x16"
GROUP_WORDS = 4
# int32 words that GATHER leaves for FILL: two registers for each word of a group.
GATHERED = 2 * LANES * GROUP_WORDS
# The code of zero.
ZERO = 7

_FLOATS, _WORDS = f"<{LANES} x float>", f"<{LANES} x i32>"


def gather_ir() -> str:
    """i32 GATHER(words, bytes from row to row, gathered): a group of 16 rows.

    `gathered` becomes [word][eight rows][row, twice].
    """
    lines = [
        f"define linkonce_odr i32 @{GATHER}(ptr noalias %words, i64 %stride, ptr noalias %gathered)"
        " alwaysinline nounwind {",
    ]
    for eight in range(2):
        # Words of rows 0, 2, 4, 6 of the eight in one register, those of 1, 3, 5, 7 in another.
        for odd in range(2):
            first = 8 * eight + odd
            for row in range(first, first + 8, 2):
                lines += [
                    f"  %o{row} = mul i64 %stride, {row}",
                    f"  %p{row} = getelementptr i8, ptr %words, i64 %o{row}",
                    f"  %w{row} = load <4 x i32>, ptr %p{row}, align 4",
                ]
            for row in (first, first + 4):
                lines.append(_joined(f"%h{row}", 4, f"%w{row}", f"%w{row + 2}"))
            lines.append(_joined(f"%q{first}", 8, f"%h{first}", f"%h{first + 4}"))
        even, odd_rows = f"%q{8 * eight}", f"%q{8 * eight + 1}"
        for j in range(GROUP_WORDS):
            name = f"{j}.{eight}"
            lanes = [lane + j for b in range(0, LANES, 4) for lane in (b, b, LANES + b, LANES + b)]
            lines += [
                shuffle(f"%d{name}", "i32", even, odd_rows, lanes),
                f"  %a{name} = getelementptr i8, ptr %gathered, i64 {64 * (2 * j + eight)}",
                f"  store {_WORDS} %d{name}, ptr %a{name}, align 4",
            ]
    return "\n".join([*lines, "  ret i32 0", "}", ""])


def fill_ir() -> str:
    """i32 FILL(gathered, scales, tile): the four rows of a tile that one word of a group makes.

    `gathered` are two registers, `scales` 16 floats, one per row; `tile` is aligned to 64 bytes.
    """
    values = ", ".join(f"float {float(code - ZERO)!r}" for code in range(16))
    lines = [
        f"define linkonce_odr i32 @{FILL}(ptr noalias %gathered, ptr noalias %scales, "
        "ptr noalias %tile) alwaysinline nounwind {",
        f"  %scale = load {_FLOATS}, ptr %scales, align 4",
    ]
    for eight in range(2):
        twice = [8 * eight + i // 2 for i in range(LANES)]
        lines += [
            shuffle(f"%scale{eight}", "float", "%scale", "poison", twice),
            f"  %g{eight} = getelementptr i8, ptr %gathered, i64 {64 * eight}",
            f"  %w{eight} = load {_WORDS}, ptr %g{eight}, align 4",
        ]
    for pair in range(4):
        shifts = ", ".join(f"i32 {8 * pair + 4 * (i % 2)}" for i in range(LANES))
        for eight in range(2):
            name = f"{pair}.{eight}"
            lines += [
                f"  %s{name} = lshr {_WORDS} %w{eight}, <{shifts}>",
                f"  %c{name} = call {_FLOATS} @llvm.x86.avx512.permvar.sf.512("
                f"{_FLOATS} <{values}>, {_WORDS} %s{name})",
                f"  %f{name} = fmul {_FLOATS} %c{name}, %scale{eight}",
            ]
        lines += [
            f"  %b{pair} = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512("
            f"{_FLOATS} %f{pair}.1, {_FLOATS} %f{pair}.0)",
            f"  %t{pair} = getelementptr i8, ptr %tile, i64 {64 * pair}",
            f"  store <32 x bfloat> %b{pair}, ptr %t{pair}, align 64",
        ]
    lines += [
        "  ret i32 0",
        "}",
        f"declare {_FLOATS} @llvm.x86.avx512.permvar.sf.512({_FLOATS}, {_WORDS})",
        f"declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512({_FLOATS}, {_FLOATS})",
    ]
    return "\n".join([*lines, ""])


def _joined(name: str, lanes: int, first: str, second: str) -> str:
    numbers = ", ".join(f"i32 {i}" for i in range(2 * lanes))
    vector = f"<{lanes} x i32>"
    return (
        f"  {name} = shufflevector {vector} {first}, {vector} {second}, "
        f"<{2 * lanes} x i32> <{numbers}>"
    )


def transpose_ir() -> str:
    """i32 TRANSPOSE(from, bytes from row to row, to, bytes from row to row): 16 x 16 floats."""
    lines = [
        f"define linkonce_odr i32 @{TRANSPOSE}(ptr noalias %from, i64 %stride, ptr noalias %to, "
        "i64 %step) alwaysinline nounwind {"
    ]
    for row in range(LANES):
        lines += [
            f"  %o{row} = mul i64 %stride, {row}",
            f"  %p{row} = getelementptr i8, ptr %from, i64 %o{row}",
            f"  %r{row} = load {_FLOATS}, ptr %p{row}, align 4",
        ]
    moved, columns = transpose_lines([f"%r{row}" for row in range(LANES)], "float", "%t")
    lines += moved
    for i, column in enumerate(columns):
        lines += [
            f"  %x{i} = mul i64 %step, {i}",
            f"  %y{i} = getelementptr i8, ptr %to, i64 %x{i}",
            f"  store {_FLOATS} {column}, ptr %y{i}, align 4",
        ]
    return "\n".join([*lines, "  ret i32 0", "}", ""])
