// Text to token ids and back, over @huggingface/tokenizers and a folder's tokenizer.json.

import { Tokenizer as Backend } from "@huggingface/tokenizers";

import { decodeRules, StreamDecoder } from "./decoder.js";

const ROLES = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"];

export class Tokenizer {
  /**
   * @param {object} description the content of tokenizer.json
   * @param {object} settings the content of tokenizer_config.json
   */
  constructor(description, settings) {
    this.backend = new Backend(description, settings);
    this.decoder = description.decoder;
    /** Role ("bos_token") -> token. */
    this.specialTokens = {};
    for (const role of [...ROLES, "mask_token"]) {
      const token = settings[role]?.content ?? settings[role];
      if (typeof token === "string" && token) this.specialTokens[role] = token;
    }
    const added = [...this.backend.get_added_tokens_decoder()];
    const named = new Set(Object.values(this.specialTokens));
    this.specialIds = new Set(
      added.filter(([, token]) => token.special || named.has(token.content)).map(([id]) => id),
    );
    const ids = [...this.backend.get_vocab(true).values()];
    /** One more than the highest id: logits from there on are padding. */
    this.vocabSize = ids.reduce((highest, id) => Math.max(highest, id), -1) + 1;
    /** The ids that a text has before and behind it when special tokens are added. */
    this.frame = this.sequenceFrame();
    this.addsBos = this.bosId !== undefined && this.prefix(settings).includes(this.bosId);
  }

  /** The ids that a prompt begins with when special tokens are added. */
  prefix(settings) {
    if ("add_bos_token" in settings || "add_eos_token" in settings) {
      return settings.add_bos_token ? [this.bosId] : [];
    }
    return this.frame[0];
  }

  sequenceFrame() {
    const plain = this.encode("a");
    const ids = Array.from(this.backend.encode("a", { add_special_tokens: true }).ids);
    const start = Math.max(0, ids.indexOf(plain[0]));
    return [ids.slice(0, start), ids.slice(start + plain.length)];
  }

  /** Token ids of a text with what the model expects around it, `longest` of them at most. */
  encodeFramed(text, longest = Infinity) {
    const [prefix, suffix] = this.frame;
    const room = Math.max(0, longest - prefix.length - suffix.length);
    return [...prefix, ...this.encode(text).slice(0, room), ...suffix];
  }

  /** The id of the token that begins a sequence. */
  get bosId() {
    return this.idOf(this.specialTokens.bos_token);
  }

  get eosId() {
    return this.idOf(this.specialTokens.eos_token);
  }

  idOf(token) {
    return token === undefined ? undefined : this.backend.token_to_id(token);
  }

  /** Token ids of a text; special tokens that it spells out become their ids. */
  encode(text) {
    return Array.from(this.backend.encode(text, { add_special_tokens: false }).ids);
  }

  /** The text of ids; unfinished characters become U+FFFD. */
  decode(ids) {
    const decoder = this.stream();
    return decoder.push(ids) + decoder.finish();
  }

  /** A decoder for ids that arrive one by one. */
  stream(continuing = false) {
    this.rules ??= decodeRules(this.decoder); // encoders' are not needed, and not final
    return new StreamDecoder(
      this.rules,
      (id) => this.backend.id_to_token(id),
      this.specialIds,
      continuing,
    );
  }
}
