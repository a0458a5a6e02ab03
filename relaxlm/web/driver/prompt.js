// From messages to the token ids that a model continues (relaxlm/runtime/prompt.py): by the model's
// own chat template, if its folder has one, and otherwise by the `conv_template`.

import { Template } from "@huggingface/jinja";

import { ConfigError, RequestError, TemplateError } from "./errors.js";
import { turnEnds } from "./turn_end.js";

const CONTENT = {
  user: "{user_message}",
  assistant: "{assistant_message}",
  tool: "{tool_message}",
};

/** Writes prompts for one model. */
export class PromptBuilder {
  /**
   * @param {object} config the content of mlc-chat-config.json
   * @param {import("./tokenizer.js").Tokenizer} tokenizer
   */
  constructor(config, tokenizer) {
    this.tokenizer = tokenizer;
    const section = config.relaxlm ?? {};
    const found = section.chat_template;
    const source = typeof found === "object" && found ? found.default : found;
    try {
      this.template = source ? new Template(source) : null;
    } catch (error) {
      throw new TemplateError(`the chat template is not valid Jinja: ${error.message}`);
    }
    this.specialTokens = { ...section.special_tokens, ...tokenizer.specialTokens };
    this.conversation = config.conv_template ?? null;
    if (typeof this.conversation === "string" && !this.template) {
      throw new ConfigError(
        `mlc-chat-config.json has the conv_template '${this.conversation}' by name only; write it ` +
          "out with `relaxlm gen_config`",
      );
    }
    const eos = [config.eos_token_id ?? []].flat();
    this.stopTokenIds = new Set([...eos, tokenizer.eosId].filter((id) => id !== undefined));
    this.stopStrings = [];
    if (this.template) {
      const render = (messages) => this.render(messages, {}, false);
      for (const id of turnEnds(source, render, tokenizer)) this.stopTokenIds.add(id);
    }
    if (!this.template && this.conversation) {
      for (const id of this.conversation.stop_token_ids ?? []) this.stopTokenIds.add(id);
      this.stopStrings = (this.conversation.stop_str ?? []).filter(Boolean);
    }
  }

  /**
   * The prompt of a conversation as text.
   *
   * @param {Array<{role: string, content: string}>} messages as in OpenAI's API
   * @param {object} variables further names that a chat template reads ("enable_thinking")
   * @param {boolean} begins whether the beginning of a reply ends it
   * @throws {RequestError} messages of another shape
   * @throws {TemplateError} the template refuses the conversation
   */
  text(messages, variables = {}, begins = true) {
    checkMessages(messages);
    if (!this.template) return this.conversationText(messages, begins);
    try {
      return this.render(messages, variables, begins);
    } catch (error) {
      throw new TemplateError(`the chat template refuses this conversation: ${error.message}`);
    }
  }

  render(messages, variables, begins) {
    return this.template.render({
      ...this.specialTokens,
      ...variables,
      messages,
      tools: null,
      documents: null,
      add_generation_prompt: begins,
    });
  }

  conversationText(messages, begins) {
    const template = this.conversation;
    if (!template) {
      throw new TemplateError("the model's folder has neither a chat template nor a conv_template");
    }
    const system = messages.filter(({ role }) => role === "system").map(({ content }) => content);
    const message = system.length ? system.join("\n\n") : (template.system_message ?? "");
    const earlier = (template.messages ?? []).filter(([, text]) => text !== null);
    const turns = messages.filter(({ role }) => role !== "system");
    let history = [...earlier, ...turns.map(({ role, content }) => [role, content])];
    if (template.strip_reasoning_in_history) history = withoutReasoning(history);

    const start = (template.system_template ?? "{system_message}").replaceAll(
      "{system_message}",
      () => message,
    );
    const { roles, seps, role_content_sep = "", role_empty_sep = "" } = template;
    const places = { ...CONTENT, ...template.role_templates };
    let text = start;
    history.forEach(([role, content], i) => {
      if (!(role in roles) || !(role in places)) {
        throw new TemplateError(`conversation template ${template.name} has no role '${role}'`);
      }
      if (i > 0 || (template.add_role_after_system_message ?? true) || !start) {
        text += roles[role] + role_content_sep;
      }
      text += places[role].replaceAll(CONTENT[role], () => content);
      text += role === "assistant" ? seps.at(-1) : seps[0];
    });
    if (begins) text += roles.assistant + role_empty_sep;
    const functions = template.function_string ?? "";
    const last = text.lastIndexOf("{function_string}");
    if (last < 0) return text;
    return (
      text.slice(0, last).replaceAll("{function_string}", "") +
      functions +
      text.slice(last + "{function_string}".length)
    );
  }

  /** The prompt of a conversation as token ids. A chat template writes BOS itself, if at all. */
  encode(messages, variables, begins = true) {
    const ids = this.tokenizer.encode(this.text(messages, variables, begins));
    const prefix = (!this.template && this.conversation?.system_prefix_token_ids) || [];
    return prefix.every((id, i) => ids[i] === id) ? ids : [...prefix, ...ids];
  }

  /** Token ids of a plain text to continue, with BOS if the model expects it. */
  encodeText(text) {
    const ids = this.tokenizer.encode(text);
    const { addsBos, bosId } = this.tokenizer;
    return !addsBos || ids[0] === bosId ? ids : [bosId, ...ids];
  }
}

function checkMessages(messages) {
  if (!Array.isArray(messages) || !messages.length) {
    throw new RequestError("the conversation has no messages");
  }
  messages.forEach((message, i) => {
    if (typeof message?.role !== "string" || typeof message.content !== "string") {
      throw new RequestError(`message ${i}: expected an object with role and content, both texts`);
    }
  });
}

function withoutReasoning(history) {
  const lastUser = history.findLastIndex(([role]) => role === "user");
  return history.map(([role, text], i) => {
    if (role !== "assistant" || i >= lastUser || !text.includes("</think>")) return [role, text];
    return [role, text.slice(text.lastIndexOf("</think>") + 8).replace(/^\n+/, "")];
  });
}
