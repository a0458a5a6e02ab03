"""What a flood of long prompts does to a reply being written, and to a short request behind it.

    relaxlm serve FOLDER --mode server &
    python benchmarks/serving_flood.py http://127.0.0.1:8000 --prompts 16 --tokens 512

Printed: the time between pieces of the reply before the flood and in it; when the flood's replies
began; how long the late request waited.
"""

import argparse
import asyncio
import random
import time

from relaxlm.profiling.serving_client import Exchange, Server, exchange
from relaxlm.profiling.serving_prompts import get_to_know
from relaxlm.profiling.serving_report import Spread

_SHORT = 32  # tokens of the prompts that are not of the flood
_FLOOD_REPLY, _LATE_REPLY = 16, 4
_LIMIT = 600.0  # seconds of a reply


async def measure(server: Server, prompts: int, tokens: int, early_tokens: int) -> list[str]:
    dialect, maker = await get_to_know(server, None, "chat", _LIMIT, random.Random(time.time()))

    def ask(length: int, reply: int) -> asyncio.Task[Exchange]:
        text = maker.make(length)
        return asyncio.create_task(exchange(server, dialect, text, length, reply, _LIMIT))

    early = ask(_SHORT, early_tokens)
    await asyncio.sleep(1)
    began = asyncio.get_running_loop().time()
    flood = [ask(tokens, _FLOOD_REPLY) for _ in range(prompts)]
    await asyncio.sleep(0.1)
    late = await ask(_SHORT, _LATE_REPLY)
    first, *others = await asyncio.gather(early, *flood)
    for one in (first, late, *others):
        if one.error:
            raise SystemExit(one.error)
    last_prompt = max(one.pieces[0] for one in others)
    gaps = list(zip(first.pieces, first.pieces[1:], strict=False))
    return [
        f"between tokens before the flood: {_ms([b - a for a, b in gaps if b < began])}",
        f"in the flood:                    "
        f"{_ms([b - a for a, b in gaps if a >= began and b <= last_prompt])}",
        f"first tokens of the flood: {_ms([one.pieces[0] - began for one in others])}",
        f"first token of the late request: {(late.pieces[0] - late.start) * 1e3:.0f} ms",
    ]


def _ms(seconds: list[float]) -> str:
    spread = Spread.of(seconds)
    if spread is None:
        return "none; ask for more --early tokens"
    return f"p50 {spread.p50 * 1e3:.0f} ms, p99 {spread.p99 * 1e3:.0f} ms, {len(seconds)} of them"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--prompts", type=int, default=16, help="of the flood")
    parser.add_argument("--tokens", type=int, default=512, help="of each")
    parser.add_argument("--early", type=int, default=200, help="tokens of the reply being written")
    options = parser.parse_args()
    server = Server.parse(options.url)
    for line in asyncio.run(measure(server, options.prompts, options.tokens, options.early)):
        print(line)


if __name__ == "__main__":
    main()
