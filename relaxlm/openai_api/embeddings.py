"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64

import numpy as np

from relaxlm.errors import RelaxLMError
from relaxlm.openai_api.completions import TextPrompt, read_prompts
from relaxlm.openai_api.context import ServiceContext
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.replies import CreateEmbeddingResponse, Embedding, EmbeddingUsage
from relaxlm.openai_api.requests import EmbeddingRequest


async def embed(context: ServiceContext, request: EmbeddingRequest) -> CreateEmbeddingResponse:
    """Vectors of length 1, as OpenAI's are.

    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    context.check_model(request.model)
    prompts = await context.in_thread(read_prompts, context, request.input)
    vectors = await _vectors(context, prompts)
    size = len(vectors[0])
    if request.dimensions not in (None, size):
        raise ApiError(
            f"dimensions = {request.dimensions} is not supported: this model's vectors have "
            f"{size} numbers, and a part of one is no embedding",
            param="dimensions",
        )
    data = [
        Embedding(index=i, embedding=_written(vector, request.encoding_format))
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(len(prompt.ids) for prompt in prompts)
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return CreateEmbeddingResponse(data=data, model=context.name, usage=usage)


async def _vectors(context: ServiceContext, prompts: list[TextPrompt]) -> list[np.ndarray]:
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

    context.engine.embed([prompt.ids for prompt in prompts], deliver)
    return await result


def _written(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    unit = (vector / norm if norm else vector).astype("<f4")
    if encoding == "base64":
        return base64.b64encode(unit.tobytes()).decode("ascii")
    return unit.tolist()
