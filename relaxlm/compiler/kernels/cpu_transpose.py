"""Transposing squares of 32-bit words in AVX-512 registers, as LLVM IR text for kernels' imports.

A square is 16 vectors of 16 words. Three rounds move it, 64 shuffles in all: words of pairs of
rows, then pairs of words of four rows, then 4 x 4 blocks of 128 bits across all rows.
"""

from collections.abc import Sequence

LANES = 16


def shuffle(name: str, kind: str, first: str, second: str, lanes: Sequence[int]) -> str:
    """A line of IR: lanes 0 .. 15 of `first` and 16 .. 31 of `second`, picked by number."""
    vector = f"<{LANES} x {kind}>"
    picked = ", ".join(f"i32 {lane}" for lane in lanes)
    return (
        f"  {name} = shufflevector {vector} {first}, {vector} {second}, "
        f"<{len(lanes)} x i32> <{picked}>"
    )


def transpose_lines(rows: Sequence[str], kind: str, prefix: str) -> tuple[list[str], list[str]]:
    """IR that transposes a square.

    Args:
        rows: names of 16 values of type <16 x kind>, `kind` i32 or float.
        prefix: of the names of all values made here, such as "%t".

    Returns:
        The lines, and the names of 16 values; lane r of the i-th is lane i of rows[r].
    """
    assert len(rows) == LANES
    lines: list[str] = []

    def emit(tag: str, first: str, second: str, lanes: Sequence[int]) -> str:
        name = f"{prefix}.{tag}"
        lines.append(shuffle(name, kind, first, second, lanes))
        return name

    blocks = range(0, LANES, 4)
    low = [lane for b in blocks for lane in (b, LANES + b, b + 1, LANES + b + 1)]
    high = [lane + 2 for lane in low]
    first_pair = [lane for b in blocks for lane in (b, b + 1, LANES + b, LANES + b + 1)]
    second_pair = [lane + 2 for lane in first_pair]
    pairs = [
        [emit(f"a{r}l", rows[r], rows[r + 1], low), emit(f"a{r}h", rows[r], rows[r + 1], high)]
        for r in range(0, LANES, 2)
    ]
    # fours[q][j]: block b holds word 4 b + j of rows 4 q .. 4 q + 3.
    fours = [
        [
            emit(f"b{q}{j}", pairs[2 * q][j // 2], pairs[2 * q + 1][j // 2], picked)
            for j, picked in enumerate((first_pair, second_pair, first_pair, second_pair))
        ]
        for q in range(4)
    ]
    halves = [[*range(h, h + 8), *range(LANES + h, LANES + h + 8)] for h in (0, 8)]
    evens = [b + i for b in (0, 8, 16, 24) for i in range(4)]
    odds = [lane + 4 for lane in evens]
    words = [""] * LANES
    for j in range(4):
        for h, picked in enumerate(halves):
            left = emit(f"c{j}{h}l", fours[0][j], fours[1][j], picked)
            right = emit(f"c{j}{h}r", fours[2][j], fours[3][j], picked)
            words[8 * h + j] = emit(f"d{j}{h}e", left, right, evens)
            words[8 * h + 4 + j] = emit(f"d{j}{h}o", left, right, odds)
    return lines, words
