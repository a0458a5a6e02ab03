"""The engine on threads of its own: a handle that any thread may use."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from relaxlm.engine.config import CachePlan, EngineConfig, plan_cache
from relaxlm.engine.core import EngineCore
from relaxlm.engine.embedding import EmbeddingJob, EmbeddingQueue, Ended, Vectors
from relaxlm.engine.job import make_job
from relaxlm.engine.kept_sequences import KeptSequences
from relaxlm.engine.output import Deliver, Output
from relaxlm.engine.reuse import Reuse
from relaxlm.engine.shared_pages import SharedPages
from relaxlm.engine.speculation import NgramDrafts
from relaxlm.engine.types import EngineStats, GenerationRequest
from relaxlm.errors import (
    BusyError,
    ConfigError,
    ContextOverflowError,
    LibraryError,
    RelaxLMError,
    RequestError,
)
from relaxlm.runtime.chat_settings import ChatConfig
from relaxlm.runtime.embedding import Embedder, check_texts
from relaxlm.runtime.executor import Executor
from relaxlm.runtime.library import is_batch_invariant
from relaxlm.runtime.memory import available_memory
from relaxlm.runtime.model import ServedModel
from relaxlm.runtime.sequence_table import PagedSequences
from relaxlm.runtime.threads import set_threads

# Seconds between two snapshots of the counters while there is work.
_SNAPSHOT = 0.25
# Threads that compute masks of grammars.
_MASK_THREADS = 2
# How much of the moving mean of a request's seconds the last one makes.
_NEWEST = 0.1


class EngineLoop:
    """A running engine.

    Three kinds of threads: one runs the steps and nothing else; one turns tokens into text and
    calls the receivers; some compute masks of grammars.

    Attributes:
        context_window_size: the most tokens of prompt and reply.
        plan: sizes that follow from `config`, the library and the memory.
        failure: an error of the engine's own that has ended it; None while all is well.
    """

    def __init__(
        self, model: ServedModel, config: EngineConfig | None = None, threads: int | None = None
    ) -> None:
        """Load weights and start.

        Args:
            threads: that kernels run on; one per usable core if None.

        Raises:
            RelaxLMError: as `plan_cache` and `Executor` raise.
        """
        self.model, self.config = model, config or EngineConfig()
        info = model.library.metadata
        if self.config.batch_invariant and not is_batch_invariant(info):
            raise ConfigError(
                f"{model.library.path} was compiled without batch_invariant=1: compile it again "
                'with --opt "batch_invariant=1", or leave the setting out'
            )
        if self.config.speculative != "off" and model.embeds_only:
            raise ConfigError(
                f"speculative decoding is for replies, and {model.name} is an embedding model: "
                "leave it out"
            )
        if self.config.speculative != "off" and info.limits.sliding_window_size:
            raise ConfigError(
                "speculative decoding takes back tokens, which a sliding window may have dropped: "
                "leave one of them out"
            )
        if self.config.speculative != "off" and info.state.tensors:
            raise ConfigError(
                "speculative decoding takes back tokens, and the recurrent layers of "
                f"{info.model_type} have no state to go back to: leave it out"
            )
        self.plan: CachePlan = plan_cache(info, self.config, available_memory())
        self.context_window_size = self.plan.context
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._inbox: list[Callable[[EngineCore], None]] = []
        self._open = 0  # requests whose receivers have not had the last update
        self._seconds = 1.0  # that a request takes, a moving mean
        self._closing = self._ended = False
        self.failure: LibraryError | None = None
        self._embeddings: list[EmbeddingJob] = []  # that the step thread has not seen yet
        self._texts = EmbeddingQueue()  # the step thread's own
        self._stats = EngineStats(pages_total=self.plan.cache.pages)
        self._news: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._output = Output(
            model.tokenizer,
            lambda job, index: self._send(lambda core: core.end_reply(job, index)),
            self.cancel,
            self._count_ended,
        )
        self._workers = ThreadPoolExecutor(_MASK_THREADS, "relaxlm-grammar")
        started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._step_thread = threading.Thread(
            target=self._run, args=(started, threads), name="relaxlm-step", daemon=True
        )
        self._text_thread = threading.Thread(target=self._write, name="relaxlm-text", daemon=True)
        self._step_thread.start()
        self._text_thread.start()
        failure = started.get()
        if failure is not None:
            self._news.put(None)
            self._workers.shutdown()
            raise failure

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model_lib: str | Path | None = None,
        device: str = "auto",
        config: EngineConfig | None = None,
        chat_config: ChatConfig | None = None,
        opt: str | None = None,
        threads: int | None = None,
        progress: Callable[[str, float], None] = lambda stage, share: None,
    ) -> EngineLoop:
        """Load a model folder; arguments as for `ServedModel.load` and here.

        Raises:
            RelaxLMError: a folder, library or setting that is wrong; says what to do.
        """
        config = config or EngineConfig()
        if model_lib is None and _wants_invariance(config, device):
            opt = f"{opt};batch_invariant=1" if opt else "batch_invariant=1"
        model = ServedModel.load(folder, device, chat_config, model_lib, progress, opt)
        return cls(model, config, threads)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        """Queue a request; returns its number at once.

        Args:
            deliver: called from another thread with every `Update`; must be quick.

        Raises:
            RequestError: no token, a token outside the vocabulary, or more replies than fit.
            ContextOverflowError: the prompt leaves no room for a reply.
            BusyError: too many requests wait, or the engine is closing.
            LibraryError: the engine has failed.
        """
        limit = self.plan.limits.sequences
        if not len(request.prompt):
            raise RequestError("the prompt has no tokens, expected at least one")
        if request.config.n > limit:
            raise RequestError(
                f"n = {request.config.n}: this engine writes at most {limit} replies at a time; "
                "ask several times"
            )
        room = self.context_window_size - len(request.prompt)
        if room < 1:
            raise ContextOverflowError(
                f"the prompt has {len(request.prompt)} tokens, the context window "
                f"{self.context_window_size}: shorten the prompt"
            )
        job = make_job(next(self._ids), request, room, self.model.vocab_size)
        self._output.open(job, deliver)
        try:
            with self._lock:
                self._refuse_if_busy()
                self._open += 1
                self._inbox.append(lambda core: core.add(job))
                self._lock.notify()
        except BusyError:
            self._output.discard(job.id)
            raise
        return job.id

    def cancel(self, request_id: int) -> None:
        """Give a request up; its pages are free before the next step."""
        self._send(lambda core: core.cancel(request_id))

    def embed(self, prompts: Sequence[Sequence[int]], deliver: Vectors) -> None:
        """Compute one vector for each prompt, between the steps of other requests.

        Args:
            prompts: token ids.
            deliver: called once, from another thread, with [hidden] float32 vectors, pooled as the
                model's configuration says and of any length, or with what went wrong.

        Raises:
            RequestError: no prompt, an empty one, or a token outside the vocabulary.
            ContextOverflowError: a prompt longer than the context window.
            BusyError: too many requests wait, or the engine is closing.
        """
        check_texts(prompts, self.context_window_size, self.model.vocab_size)
        with self._lock:
            self._refuse_if_busy()
            self._open += 1
            self._embeddings.append(EmbeddingJob(prompts, deliver))
            self._lock.notify()

    def stats(self) -> EngineStats:
        """The counters as of a moment ago; a snapshot, which does not go on counting."""
        return self._stats

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, let the others go on for `drain` seconds, and end.

        Those that have not ended by then are cancelled, and their receivers told.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._open == 0 or self._ended, drain)
            self._ended = True
            self._lock.notify_all()
        self._step_thread.join()
        self._text_thread.join()
        self._workers.shutdown()

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _refuse_if_busy(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._closing:
            raise BusyError("the engine is closing: try another one", closing=True)
        waiting = self._open - self.plan.limits.sequences
        if waiting >= self.config.max_waiting:
            raise BusyError(
                f"{self._open} requests are running or waiting, and {self.config.max_waiting} may "
                "wait: try again later",
                retry_after=max(1.0, self._seconds),
            )

    def _send(self, command: Callable[[EngineCore], None]) -> None:
        with self._lock:
            self._inbox.append(command)
            self._lock.notify()

    # The step thread

    def _run(self, started: queue.SimpleQueue, threads: int | None) -> None:
        try:
            core = self._make_core(threads)
        except BaseException as error:
            started.put(error)
            return
        started.put(None)
        try:
            self._steps(core)
        except BaseException as error:
            self._fail(error)
        self._news.put(None)

    def _steps(self, core: EngineCore) -> None:
        embedder = Embedder(core.executor, core.sequences, self.model.embedding)
        texts = self._texts
        snapshot_at = 0.0
        while True:
            with self._lock:
                if not (self._inbox or self._ended or core.has_work or texts.jobs):
                    self._stats = core.stats()
                    self._lock.wait_for(lambda: self._inbox or self._ended or self._embeddings)
                if self._ended:
                    break
                inbox, self._inbox = self._inbox, []
                texts.jobs.extend(self._embeddings)
                self._embeddings.clear()
            started = time.perf_counter()
            for command in inbox:
                command(core)
            self._tell_vectors(texts.go_on(embedder, core.scheduler))
            self._step(core)
            now = time.perf_counter()
            core.counts.step_seconds += now - started
            if now - snapshot_at > _SNAPSHOT:
                snapshot_at = now
                self._stats = core.stats()
        self._finish(core)

    def _fail(self, reason: BaseException) -> None:
        """An error in the engine itself: every open request ends with it, and no more are taken."""
        text = f"the engine has failed: {type(reason).__name__}: {reason}; start it again"
        error = LibraryError(text)
        error.__cause__ = reason
        with self._lock:
            self.failure = error
        now = time.perf_counter()
        self._news.put(lambda: self._output.fail_all(now, error))
        self._give_up(error)

    def _step(self, core: EngineCore) -> None:
        if events := core.step():
            now = time.perf_counter()
            self._news.put(lambda: self._output.handle(now, events))

    def _make_core(self, threads: int | None) -> EngineCore:
        # TVM's pool of worker threads belongs to the thread that uses it.
        set_threads(threads)
        model, plan = self.model, self.plan
        pages, state_slots = plan.cache.pages, plan.cache.state_slots
        executor = Executor(model.library, model.weights, pages, state_slots)
        sequences = plan.cache.sequences(model.library.metadata)
        drafts = None
        if self.config.speculative == "ngram":
            drafts = NgramDrafts(self.config.speculative_tokens)
        return EngineCore(
            executor, sequences, plan.limits, self._workers, self._reuse(sequences), drafts
        )

    def _reuse(self, sequences: PagedSequences) -> Reuse:
        if self.config.prefix_cache and self.plan.kept:
            return KeptSequences(sequences, self.plan.kept)
        if self.config.prefix_cache and not sequences.window and sequences.states is None:
            return SharedPages(sequences)
        return Reuse(sequences)

    def _finish(self, core: EngineCore) -> None:
        for command in self._inbox:
            command(core)
        for job_id in list(core.jobs):
            core.cancel(job_id)
        self._step(core)
        self._give_up(BusyError("the engine has ended", closing=True))
        self._stats = core.stats()

    # The text thread

    def _write(self) -> None:
        while (tell := self._news.get()) is not None:
            tell()

    def _give_up(self, error: RelaxLMError) -> None:
        """Tell everyone who waits for vectors that there will be none."""
        with self._lock:
            self._texts.jobs.extend(self._embeddings)
            self._embeddings.clear()
        self._tell_vectors(self._texts.give_up(error))

    def _tell_vectors(self, ended: list[Ended]) -> None:
        def tell() -> None:
            for job, result in ended:
                with suppress(Exception):  # the receiver's own affair
                    job.deliver(result)
                self._count_ended(time.perf_counter() - job.submitted_at)

        if ended:
            self._news.put(tell)

    def _count_ended(self, seconds: float) -> None:
        with self._lock:
            self._open -= 1
            self._seconds += _NEWEST * (seconds - self._seconds)
            self._lock.notify_all()


def _wants_invariance(config: EngineConfig, device: str) -> bool:
    """Whether a library that is compiled now is to be batch-invariant."""
    if config.batch_invariant is not None:
        return config.batch_invariant
    if config.speculative == "off":
        return False
    from relaxlm.runtime.jit import target_kind

    return target_kind(device) == "cpu"
