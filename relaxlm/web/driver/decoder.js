// From token ids back to text, one token at a time (relaxlm/runtime/token_decoding.py).
//
// What `push` returns is final: an unfinished UTF-8 character is held back, at most three bytes.

import { ConfigError } from "./errors.js";

const BYTE_TOKEN = /^<0x[0-9A-Fa-f]{2}>$/;

/** The byte of each letter of a byte-level vocabulary. */
const LETTERS = (() => {
  const printable = (byte) =>
    (byte >= 0x21 && byte < 0x7f) || (byte >= 0xa1 && byte < 0xad) || byte >= 0xae;
  const letters = new Map();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    letters.set(String.fromCharCode(printable(byte) ? byte : next++), byte);
  }
  return letters;
})();

/**
 * What the `decoder` of a tokenizer.json comes to.
 *
 * @throws {ConfigError} a decoder that rewrites earlier text
 */
export function decodeRules(decoder) {
  const chain = decoder?.type === "Sequence" ? decoder.decoders : [decoder];
  const kinds = chain.map((link) => link?.type);
  if (kinds.length === 1 && kinds[0] === "ByteLevel") return { byteLevel: true };
  const rules = { byteLevel: false, byteFallback: false, replacements: [], strip: 0, drop: "" };
  let fused = false;
  for (const link of chain) {
    if (link?.type === "Replace" && !fused && typeof link.pattern.String === "string") {
      rules.replacements.push([link.pattern.String, link.content]);
    } else if (link?.type === "ByteFallback" && !rules.byteFallback && !fused) {
      rules.byteFallback = true;
    } else if (link?.type === "Metaspace" && !fused) {
      // Old files have `add_prefix_space` in place of `prepend_scheme`.
      const drops = (link.prepend_scheme ?? "always") !== "never";
      if (drops && (link.add_prefix_space ?? true)) rules.drop = link.replacement;
      rules.replacements.push([link.replacement, " "]);
    } else if (link?.type === "Fuse") {
      fused = true;
    } else if (link?.type === "Strip" && fused && link.content === " " && link.stop === 0) {
      rules.strip += link.start;
    } else {
      throw new ConfigError(
        `tokenizer.json: decoder ${kinds.join(" + ")} cannot be streamed: supported are ByteLevel, ` +
          "Metaspace, and chains of Replace, ByteFallback, Fuse and Strip",
      );
    }
  }
  return rules;
}

/** Bytes of one character and more, decoded as they come; see `invalid` for what is none. */
class Utf8 {
  /** @param {boolean} perByte one U+FFFD for each byte of no character, as SentencePiece does */
  constructor(perByte) {
    this.perByte = perByte;
    this.held = [];
  }

  push(bytes) {
    let text = "";
    for (const byte of bytes) {
      if (this.held.length) {
        if (continues(this.held, byte)) {
          this.held.push(byte);
          if (this.held.length === sizeOf(this.held[0])) {
            text += new TextDecoder().decode(new Uint8Array(this.held));
            this.held = [];
          }
          continue;
        }
        text += this.finish();
      }
      if (byte < 0x80) text += String.fromCharCode(byte);
      else if (sizeOf(byte)) this.held = [byte];
      else text += "\ufffd";
    }
    return text;
  }

  /** What is left of an unfinished character, as U+FFFD. */
  finish() {
    const count = this.held.length && (this.perByte ? this.held.length : 1);
    this.held = [];
    return "\ufffd".repeat(count);
  }
}

/** Bytes of the character that begins with `byte`; 0 if none does. */
function sizeOf(byte) {
  if (byte >= 0xc2 && byte <= 0xdf) return 2;
  if (byte >= 0xe0 && byte <= 0xef) return 3;
  return byte >= 0xf0 && byte <= 0xf4 ? 4 : 0;
}

/** Whether a byte goes on with the beginning of a character (Unicode, table 3-7). */
function continues(held, byte) {
  let [low, high] = [0x80, 0xbf];
  if (held.length === 1) {
    if (held[0] === 0xe0) low = 0xa0;
    if (held[0] === 0xed) high = 0x9f;
    if (held[0] === 0xf0) low = 0x90;
    if (held[0] === 0xf4) high = 0x8f;
  }
  return byte >= low && byte <= high;
}

export class StreamDecoder {
  /**
   * @param rules from `decodeRules`
   * @param {(id: number) => string | undefined} token the string of an id in the vocabulary
   * @param {Set<number>} skip ids that give no text
   * @param {boolean} continuing the ids go on with a text: their leading space is one of the text
   */
  constructor(rules, token, skip, continuing = false) {
    this.rules = rules;
    this.token = token;
    this.skip = skip;
    this.strip = continuing ? 0 : (rules.strip ?? 0);
    this.drop = continuing ? "" : (rules.drop ?? "");
    this.utf8 = new Utf8(!rules.byteLevel);
  }

  /** The text that these ids make final, possibly empty. */
  push(ids) {
    let text = "";
    for (const id of ids) {
      let token = this.skip.has(id) ? undefined : this.token(id);
      if (token === undefined) continue;
      if (this.drop) token = token.replaceAll(this.drop, "");
      this.drop = "";
      const piece = this.piece(token);
      text += typeof piece === "string" ? this.utf8.finish() + piece : this.utf8.push(piece);
    }
    return this.stripped(text);
  }

  /** The rest: what is left of an unfinished character. */
  finish() {
    return this.stripped(this.utf8.finish());
  }

  /** A token's contribution: bytes, which may be part of a character, or finished text. */
  piece(token) {
    const { byteLevel, byteFallback, replacements } = this.rules;
    if (byteLevel) {
      // Added tokens are written as themselves; they rarely consist of the 256 letters only.
      const letters = [...token];
      return letters.every((letter) => LETTERS.has(letter))
        ? letters.map((letter) => LETTERS.get(letter))
        : new TextEncoder().encode(token);
    }
    if (byteFallback && BYTE_TOKEN.test(token)) return [parseInt(token.slice(3, 5), 16)];
    return replacements.reduce((text, [old, replacement]) => text.replaceAll(old, replacement), token);
  }

  stripped(text) {
    if (!text || !this.strip) return text;
    const spaces = text.length - text.replace(/^ +/, "").length;
    const dropped = Math.min(this.strip, spaces);
    this.strip = spaces < text.length ? 0 : this.strip - dropped;
    return text.slice(dropped);
  }
}
