"""OpenAI-shaped requests and replies on top of `relaxlm.engine`.

    service = ApiService(engine)                       # engine: relaxlm.engine.loop.EngineLoop
    request = ChatCompletionRequest.parse(json)        # ApiError names the wrong field
    reply = await service.chat(request)                # ChatCompletion, or a ReplyStream of chunks

`ApiService` (service.py):

    ApiService(engine, name=None, strict_model_name=False, on_update=None)
    async chat(ChatCompletionRequest)     -> ChatCompletion | ReplyStream[ChatCompletionChunk]
    async complete(CompletionRequest)     -> Completion | ReplyStream[Completion]
    async respond(ResponseRequest)        -> Response | ReplyStream[ResponseEvent]
    async embed(EmbeddingRequest)         -> CreateEmbeddingResponse
    async tokenize(TokenizeRequest)       -> TokenizeResponse
    async detokenize(DetokenizeRequest)   -> DetokenizeResponse
    models() -> ModelList;  model(name) -> Model
    close()                               # its threads; not the engine

Everything raises `ApiError` (errors.py): `status`, `body()`, `retry_after` (seconds, or None).
A stream is checked, tokenized and submitted before `await service.chat(...)` returns, so that these
errors still become an HTTP status. Cancelling the awaiting task, or `aclose()` of a stream, ends
the request in the engine at once.

`ReplyStream` (stream.py): `async for chunk in stream`, `await stream.aclose()`, and
`stream.events()`, an async iterator of `str`: the server-sent events of the whole stream, an error
in the middle and the end ("data: [DONE]") included. Replies have `as_json() -> str`.

A reader that falls behind costs no memory beyond the text of its own reply: what arrives meanwhile
is merged into the next chunk.

`Engine` and `AsyncEngine` (engine.py) are the same for Python programs.
"""
