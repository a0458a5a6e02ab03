"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, cast

import numpy as np

from relaxlm.errors import RelaxLMError
from relaxlm.openai_api.context import ServiceContext
from relaxlm.openai_api.replies import CreateEmbeddingResponse, Embedding, EmbeddingUsage
from relaxlm.openai_api.requests import EmbeddingRequest
from relaxlm.runtime.embedding import TextReader, check_dimensions, finish


async def embed(context: ServiceContext, request: EmbeddingRequest) -> CreateEmbeddingResponse:
    """Vectors as the model's folder says they are made, mostly of length 1, as OpenAI's are.

    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    context.check_model(request.model)
    check_dimensions(request.dimensions, context.model.library.metadata.hidden_size)
    texts = await context.in_thread(_token_ids, context, request)
    normalize = context.model.embedding.normalize
    data = [
        Embedding(
            index=i,
            embedding=_written(finish(states, normalize, request.dimensions), request),
        )
        for i, states in enumerate(await _vectors(context, texts))
    ]
    tokens = sum(map(len, texts))
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return CreateEmbeddingResponse(data=data, model=context.name, usage=usage)


def _token_ids(context: ServiceContext, request: EmbeddingRequest) -> list[list[int]]:
    """Texts or token ids, one or several, as token ids."""
    reader = TextReader(
        context.model.tokenizer,
        context.model.config.relaxlm.embedding,
        context.engine.context_window_size,
    )
    prompt, given = reader.prompt(request.prompt_name), request.input
    if isinstance(given, str):
        return [reader.ids(given, prompt, bool(request.truncate))]
    if isinstance(given[0], int):
        return [cast(list[int], given)]
    return [
        reader.ids(item, prompt, bool(request.truncate)) if isinstance(item, str) else item
        for item in cast(list[Any], given)
    ]


async def _vectors(context: ServiceContext, texts: list[list[int]]) -> list[np.ndarray]:
    loop = asyncio.get_running_loop()
    result: asyncio.Future[list[np.ndarray]] = loop.create_future()

    def arrive(vectors: list[np.ndarray] | RelaxLMError) -> None:
        if result.done():  # the client has gone
            return
        if isinstance(vectors, RelaxLMError):
            result.set_exception(vectors)
        else:
            result.set_result(vectors)

    def deliver(vectors: list[np.ndarray] | RelaxLMError) -> None:
        loop.call_soon_threadsafe(arrive, vectors)

    context.engine.embed(texts, deliver)
    return await result


def _written(vector: np.ndarray, request: EmbeddingRequest) -> list[float] | str:
    values = vector.astype("<f4")
    if request.encoding_format == "base64":
        return base64.b64encode(values.tobytes()).decode("ascii")
    return values.tolist()
