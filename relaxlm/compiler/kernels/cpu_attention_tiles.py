"""AMX: products of tiles of 16 rows of 64 bytes, in registers that each thread configures.

A tile of A holds 16 rows of 32 bfloat16 numbers; one of B 16 pairs of neighbouring rows of 16
numbers, a pair in a word; their product is added to a tile of 16 x 16 float32 (Intel 64 and IA-32
Architectures Software Developer's Manual, volume 1, chapter 18).
"""

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from relaxlm.compiler.kernels.attention import AttentionShape
from relaxlm.compiler.kernels.builder import scratch
from relaxlm.compiler.kernels.cpu_attention_pages import PAGES, Round
from relaxlm.compiler.kernels.cpu_attention_products import BFLOAT16_IR, Bfloat16, put

SIZE = 16
# bfloat16 numbers in a row of a tile of A: what one product sums over.
DEPTH = 32
TILES = 8
WORDS = 16  # in a row of any tile
WORD = 4


def instruction(name: str, *operands: Expr | int) -> None:
    """One AMX instruction; plain numbers are tiles."""
    values = [tirx.const(x, "int8") if isinstance(x, int) else x for x in operands]
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    T.evaluate(T.call_llvm_intrin(intrinsic, *values, dtype="void"))


def configure() -> None:
    """Give this thread eight tiles of 16 rows of 64 bytes, until `release`."""
    config = scratch(64, "uint8")
    T.buffer_store(config, T.broadcast(T.uint8(0), 64), [T.ramp(0, 1, 64)])
    T.buffer_store(config, T.uint8(1), [0])  # palette 1
    for tile in range(TILES):
        T.buffer_store(config, T.uint8(WORDS * WORD), [16 + 2 * tile])
        T.buffer_store(config, T.uint8(SIZE), [48 + tile])
    instruction("ldtilecfg", T.address_of(config[0]))


def release() -> None:
    """Give the tiles back: a thread that holds them is slower to switch."""
    instruction("tilerelease")


def load(tile: int, buffer: tirx.Buffer, at: Expr, words: int) -> None:
    """A tile from element `at` on, rows so many words apart."""
    instruction("tileloadd64", tile, T.address_of(buffer[at]), T.int64(words * WORD))


def store(tile: int, buffer: tirx.Buffer, at: Expr, words: int) -> None:
    """The inverse of `load`."""
    instruction("tilestored64", tile, T.address_of(buffer[at]), T.int64(words * WORD))


class Tiles:
    """Blocks of two tiles of rows, against two pages or two tiles of features at a time.

    Tiles 0 to 3 are sums, 4 and 5 rows of q or weights, 6 and 7 of a panel.
    """

    rows = 2 * SIZE
    imports: Sequence[str] = (BFLOAT16_IR,)
    exact = False
    slots = 2

    def __init__(self, shape: AttentionShape) -> None:
        self.dim, self.page = shape.head_dim, shape.page_size
        self.width = PAGES * self.page
        self.gather_steps = self.dim // (2 * SIZE)
        self.operands = Bfloat16(self.dim, self.page, tiled=True)

    def scratch_bytes(self, rows: int) -> int:
        scores = self.slots * self.rows * self.width
        return 2 * (rows * self.dim + 2 * self.width * self.dim + scores) + 4 * scores

    def declare(self, rows: int) -> None:
        self.q = scratch(rows * self.dim // 2, "int32")
        self.k = scratch(self.width * self.dim // 2, "int32")
        self.v = scratch(self.width * self.dim // 2, "int32")
        self.scores = scratch(self.slots * self.rows * self.width, "float32")
        self.weights = scratch(self.slots * self.rows * self.width // 2, "int32")

    def begin(self) -> None:
        configure()

    def end(self) -> None:
        release()

    def put_query(self, row: Expr, element) -> None:
        self.operands.put_query(self.q, row, element)

    def fill(self, pages: Round, page: Expr) -> None:
        self.operands.fill(self.k, self.v, pages, page)

    def score_at(self, row: Expr, page: Expr) -> Expr:
        return row * self.width + page * self.page

    def put_weights(self, pages: Round, row: Expr, pair: Expr, weights: list[Expr]) -> None:
        at = row * (self.width // 2) + pair * self.page
        put(self.weights, at, self.operands.call("row", *weights), 16)

    def score(self, first: Expr, pair: Expr, slot: Expr | int) -> None:
        words = self.dim // 2
        for tile in range(4):
            instruction("tilezero", tile)
        for step in range(self.dim // DEPTH):
            for half in range(2):
                row = first + half * SIZE
                load(4 + half, self.q, row * words + step * WORDS, words)
                at = (2 * pair + half) * words + step * SIZE
                load(6 + half, self.k, at * WORDS, WORDS)
            self._multiply()
        for half in range(2):
            for beside in range(2):
                at = self.score_at(slot * self.rows + half * SIZE, 2 * pair + beside)
                store(2 * half + beside, self.scores, at, self.width)

    def gather(
        self, first: Expr, pairs: Expr, step: Expr, slot: Expr | int, sums: tirx.Buffer
    ) -> None:
        parts, words = self.dim // SIZE, self.width // 2

        def move(operation) -> None:
            for half in range(2):
                for beside in range(2):
                    at = (first + half * SIZE) * self.dim + (2 * step + beside) * SIZE
                    operation(2 * half + beside, sums, at, self.dim)

        move(load)
        with T.serial(pairs) as pair:
            for half in range(2):
                row = slot * self.rows + half * SIZE
                load(4 + half, self.weights, row * words + pair * WORDS, words)
                at = pair * parts + 2 * step + half
                load(6 + half, self.v, at * SIZE * WORDS, WORDS)
            self._multiply()
        move(store)

    def _multiply(self) -> None:
        for half in range(2):
            for beside in range(2):
                instruction("tdpbf16ps", 2 * half + beside, 4 + half, 6 + beside)
