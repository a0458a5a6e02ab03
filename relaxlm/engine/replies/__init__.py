"""From the text of a reply to content, reasoning and tool calls, streamed as the OpenAI API has it.

    fmt = reply_format(chat_templates, tokenizer)                   once per model
    request = tool_request(tools, tool_choice, parallel_tool_calls)  checks; None without tools
    inside = fmt.starts_in_reasoning(prompt_text)
    shown = fmt.shown_special(request)                  for GenerationRequest.shown_special

    grammar = fmt.grammar(request, inside)              GrammarSpec, None if the model is free
    grammar = fmt.after_reasoning(spec, inside)         a response_format's, with room to reason

    parser = fmt.parser(request, inside)                once per reply
    for text in ...: deltas = parser.push(text)         each Delta is a piece of one part
    deltas = parser.finish()
    message = parser.message()                          the sum of all deltas

The prompt gets `request.tools` as tools, or none if `request` is None: with `tool_choice` "none" a
model that saw the tools might call them all the same. A reply that ended by itself and has tool
calls has the finish reason "tool_calls".

What a parser promises:

- The deltas are the same, put together, for every way of cutting the text.
- No text is lost but the marks of the format, what a call's object says beside name and arguments,
  white space around reasoning and calls, and a channel's header (gpt-oss) that the end cuts off.
- What looks like a call and is none is content. A call is certain once its name is known and its
  arguments have begun. From there on its arguments are passed on as the model writes them, and may
  turn out to be cut off (a reply that ended at its limit) or to be no JSON: check them.
- A call between marks is reported under any name; an object without a mark around it (formats
  llama3 and json) is a call only if its name is one of the request's functions, because an answer
  may be JSON too.
- The time is linear in the text: after a million characters read in vain, because what looked like
  calls was none, the rest is content.
- Reasoning is only looked for at the beginning of a reply.
"""

from relaxlm.engine.replies.detect import ReplyFormat, reply_format
from relaxlm.engine.replies.parser import ReplyParser
from relaxlm.engine.replies.tools import Function, ToolRequest, tool_request
from relaxlm.engine.replies.types import Delta, ReplyMessage, ToolCall, ToolCallDelta

__all__ = [
    "Delta",
    "Function",
    "ReplyFormat",
    "ReplyMessage",
    "ReplyParser",
    "ToolCall",
    "ToolCallDelta",
    "ToolRequest",
    "reply_format",
    "tool_request",
]
