"""What a reply took: tokens and speeds."""

from dataclasses import dataclass, field

from relaxlm.engine.types import PromptReport, RequestTimings
from relaxlm.openai_api.replies import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Speeds,
    Usage,
)
from relaxlm.openai_api.submission import News


@dataclass
class UsageCount:
    """Adds up what the requests on behalf of one client took. `prompt_tokens` is known before."""

    prompt_tokens: int
    replies: int  # of each request
    generated_tokens: int = 0
    reasoning_tokens: int = 0
    prompts: list[PromptReport] = field(default_factory=list)
    timings: list[RequestTimings] = field(default_factory=list)

    def add(self, news: News) -> None:
        self.generated_tokens += sum(len(choice.tokens) for choice in news.choices.values())
        if news.prompt is not None:
            self.prompts.append(news.prompt)
        if news.timings is not None:
            self.timings.append(news.timings)

    def usage(self) -> Usage:
        """So far; speeds are there at the end."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated_tokens,
            total_tokens=self.prompt_tokens + self.generated_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached()),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=self.reasoning_tokens
            ),
            extra=self._speeds() if self.timings else None,
        )

    def _cached(self) -> int:
        return sum(report.cached_tokens for report in self.prompts)

    def _speeds(self) -> Speeds:
        slowest = max(self.timings, key=lambda t: t.queued + t.prefill)
        computed = sum(report.tokens for report in self.prompts) - self._cached()
        # The first token of a reply comes out of the prefill.
        decoded = sum(max(t.generated_tokens - self.replies, 0) for t in self.timings)
        return Speeds(
            queue_s=slowest.queued,
            ttft_s=slowest.queued + slowest.prefill,
            end_to_end_latency_s=max(t.queued + t.prefill + t.decode for t in self.timings),
            prefill_tokens_per_s=_speed(computed, sum(t.prefill for t in self.timings)),
            decode_tokens_per_s=_speed(decoded, sum(t.decode for t in self.timings)),
        )


def _speed(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None
