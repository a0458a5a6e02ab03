"""Many requests to one model at a time.

`core` is the whole of it without threads: requests in, tokens out, one step after the other.
`loop` runs a core on a thread of its own. Layers above: `relaxlm.openai_api` (OpenAI's requests
and replies) and `relaxlm.server` (HTTP).
"""
