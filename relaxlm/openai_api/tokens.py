"""/tokenize and /detokenize."""

from __future__ import annotations

from relaxlm.openai_api.chat_prompt import tokenize_prompt
from relaxlm.openai_api.context import ServiceContext
from relaxlm.openai_api.errors import ApiError
from relaxlm.openai_api.replies import DetokenizeResponse, TokenizeResponse
from relaxlm.openai_api.requests import DetokenizeRequest, TokenizeRequest


async def tokenize(context: ServiceContext, request: TokenizeRequest) -> TokenizeResponse:
    """
    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    context.check_model(request.model)
    ids = await context.in_thread(_encode, context, request)
    spelled = None
    if request.return_token_strs:
        spelled = [context.model.tokenizer.id_to_token(token) or "" for token in ids]
    return TokenizeResponse(
        count=len(ids),
        max_model_len=context.engine.context_window_size,
        tokens=ids,
        token_strs=spelled,
    )


def _encode(context: ServiceContext, request: TokenizeRequest) -> list[int]:
    if request.messages is not None:
        return tokenize_prompt(context, request).ids
    assert request.prompt is not None
    if request.add_special_tokens is False:
        return context.model.tokenizer.encode(request.prompt, add_special_tokens=False)
    if context.model.embeds_only:  # as /v1/embeddings reads a text
        return context.model.tokenizer.encode(request.prompt)
    return context.model.prompts.encode_text(request.prompt)


async def detokenize(context: ServiceContext, request: DetokenizeRequest) -> DetokenizeResponse:
    """
    Raises:
        RelaxLMError: whatever is wrong with the request.
    """
    context.check_model(request.model)
    limit = context.model.vocab_size
    for i, token in enumerate(request.tokens):
        if token >= limit:
            raise ApiError(
                f"tokens[{i}] = {token}: expected 0 to {limit - 1}, the vocabulary of this model",
                param=f"tokens[{i}]",
            )
    text = context.model.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)
