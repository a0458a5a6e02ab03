"""Puts load on a server and measures what its clients see.

Either a number of clients ask one request after another (a closed loop), or requests arrive at
random at some rate, whether or not earlier ones are done (an open loop: a Poisson process).
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from relaxlm.errors import RequestError
from relaxlm.profiling.serving_client import Dialect, Exchange, Route, Server, exchange
from relaxlm.profiling.serving_prompts import Prompts, get_to_know
from relaxlm.profiling.serving_report import Measured, measure


@dataclass(frozen=True)
class Load:
    """How requests come: `concurrency` clients, or `rate` per second (inf: all at once).

    Exactly one of the two is set.
    """

    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} at a time"
        return "all at once" if self.rate == math.inf else f"{self.rate:g} per second"


class Range(NamedTuple):
    """Numbers of tokens, both ends included, drawn evenly."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"

    @classmethod
    def parse(cls, text: str) -> "Range":
        """From "256" or "100:400".

        Raises:
            RequestError: neither, or numbers below 1.
        """
        low, _, high = text.partition(":")
        try:
            found = cls(int(low), int(high or low))
        except ValueError:
            found = cls(0, 0)
        if not 1 <= found.low <= found.high:
            raise RequestError(f"{text!r}: expected a number of tokens, or two such as 100:400")
        return found


@dataclass(frozen=True)
class Traffic:
    """What every load consists of.

    Attributes:
        requests: of each load.
        shared_prefix: tokens that all prompts begin with.
        seed: of lengths, words and arrivals.
        limit: seconds that a reply may take.
    """

    requests: int
    prompt: Range
    output: Range
    shared_prefix: int
    seed: int
    limit: float


class Job(NamedTuple):
    """One request to be sent."""

    text: str
    prompt_tokens: int
    max_tokens: int


Ask = Callable[[Job], Awaitable[Exchange]]


async def run_load(load: Load, jobs: Sequence[Job], ask: Ask, rng: random.Random) -> list[Exchange]:
    """Send all jobs; the results are in the order of the jobs."""
    if load.concurrency is not None:
        return await _closed_loop(load.concurrency, jobs, ask)
    assert load.rate is not None
    return await _open_loop(load.rate, jobs, ask, rng)


async def _closed_loop(clients: int, jobs: Sequence[Job], ask: Ask) -> list[Exchange]:
    made: dict[int, Exchange] = {}
    left = iter(enumerate(jobs))

    async def client() -> None:
        for i, job in left:  # shared: each client takes the next one that nobody has taken
            made[i] = await ask(job)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [made[i] for i in range(len(jobs))]


async def _open_loop(
    rate: float, jobs: Sequence[Job], ask: Ask, rng: random.Random
) -> list[Exchange]:
    clock = asyncio.get_running_loop().time
    due, tasks = clock(), []
    for job in jobs:
        await asyncio.sleep(max(due - clock(), 0))
        tasks.append(asyncio.ensure_future(ask(job)))
        due += 0 if rate == math.inf else rng.expovariate(rate)
    return await asyncio.gather(*tasks)


@dataclass(frozen=True)
class ServingBenchmark:
    """What `run` found.

    Attributes:
        exact: prompts were counted by the server's tokenizer before they were sent.
        loads: one result for each, with what it was measured from.
    """

    dialect: Dialect
    exact: bool
    traffic: Traffic
    loads: list[tuple[Measured, list[Exchange]]]

    @property
    def title(self) -> str:
        traffic = self.traffic
        shared = f", {traffic.shared_prefix} of them shared" if traffic.shared_prefix else ""
        return (
            f"{traffic.requests} requests of {'' if self.exact else 'about '}{traffic.prompt} "
            f"tokens{shared}, replies of {traffic.output}; seed {traffic.seed}"
        )

    def as_json(self) -> dict[str, Any]:
        """All numbers; moments are in seconds since a load's first request."""
        loads = []
        for measured, made in self.loads:
            start = min(one.start for one in made)
            moments = [
                {
                    **asdict(one),
                    "start": one.start - start,
                    "end": one.end - start,
                    "pieces": [piece - start for piece in one.pieces],
                }
                for one in made
            ]
            loads.append({**asdict(measured), "exchanges": moments})
        return {
            "dialect": asdict(self.dialect),
            "exact": self.exact,
            "traffic": asdict(self.traffic),
            "loads": loads,
        }


class LoadGenerator:
    """Measures one load after another on a server.

    No two prompts are alike but for the shared prefix, in all loads together.
    """

    def __init__(
        self,
        server: Server,
        traffic: Traffic,
        dialect: Dialect,
        prompts: Prompts,
        rng: random.Random,
        progress: Callable[[str], None],
    ) -> None:
        self.traffic, self.dialect, self.prompts = traffic, dialect, prompts
        self._server, self._rng, self._progress = server, rng, progress

    @classmethod
    async def connect(
        cls,
        server: Server,
        traffic: Traffic,
        model: str | None = None,
        route: Route = "chat",
        progress: Callable[[str], None] = lambda text: None,
    ) -> "LoadGenerator":
        """Get to know a server, and let it answer one request that does not count.

        Args:
            model: the name to ask for; None: the first that the server lists.

        Raises:
            RequestError: the server can't be reached or does not reply.
        """
        rng = random.Random(traffic.seed)
        progress("ask what the server understands")
        dialect, prompts = await get_to_know(server, model, route, traffic.limit, rng)
        prompts.share(traffic.shared_prefix)
        made = cls(server, traffic, dialect, prompts, rng, progress)
        progress("first request")
        await made._ask(made._job())
        return made

    async def measure(
        self, load: Load, requests: int | None = None
    ) -> tuple[Measured, list[Exchange]]:
        """Put a load on the server, of as many requests as the traffic says or as given here."""
        jobs = [self._job() for _ in range(requests or self.traffic.requests)]
        done = 0

        async def ask(job: Job) -> Exchange:
            nonlocal done
            made = await self._ask(job)
            done += 1
            self._progress(f"{load.name}: {done} of {len(jobs)}")
            return made

        made = await run_load(load, jobs, ask, self._rng)
        return measure(load.name, made), made

    def _ask(self, job: Job) -> Awaitable[Exchange]:
        return exchange(self._server, self.dialect, *job, self.traffic.limit)

    def _job(self) -> Job:
        traffic = self.traffic
        tokens = self._rng.randint(*traffic.prompt)
        return Job(self.prompts.make(tokens), tokens, self._rng.randint(*traffic.output))


async def run(
    server: Server,
    loads: Sequence[Load],
    traffic: Traffic,
    model: str | None = None,
    route: Route = "chat",
    progress: Callable[[str], None] = lambda text: None,
) -> ServingBenchmark:
    """Measure each load. Arguments and errors are those of `LoadGenerator.connect`."""
    generator = await LoadGenerator.connect(server, traffic, model, route, progress)
    found = [await generator.measure(load) for load in loads]
    return ServingBenchmark(generator.dialect, generator.prompts.exact, traffic, found)
