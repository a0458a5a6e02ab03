// What screen readers hear of a reply: whole sentences as they become complete, not every token.

import { byId, h } from "./dom.js";

const PAUSE_MS = 1500; // between announcements, so that speech keeps up
const KEPT = 20;
const SENTENCE_END = /[.!?…:。！？]["')\]]*\s|\n/g;

export class Announcer {
  constructor() {
    this.region = byId("announcer");
    this.said = 0; // characters of the reply
    this.text = "";
    this.timer = 0;
  }

  say(text) {
    const words = text.trim();
    if (!words) return;
    this.region.append(h("p", {}, words));
    while (this.region.children.length > KEPT) this.region.firstElementChild.remove();
  }

  /** A reply begins, or the reader turns to one that already has this text. */
  begin(text) {
    clearTimeout(this.timer);
    this.timer = 0;
    this.said = text.length;
    this.text = text;
  }

  /** The reply so far. */
  update(text) {
    this.text = text;
    this.timer ||= setTimeout(() => this.sayComplete(), PAUSE_MS);
  }

  /** The reply has ended; `how` says so. */
  end(text, how) {
    clearTimeout(this.timer);
    this.timer = 0;
    this.say(text.slice(this.said));
    this.say(how);
  }

  sayComplete() {
    this.timer = 0;
    const open = this.text.slice(this.said);
    let end = 0;
    for (const match of open.matchAll(SENTENCE_END)) end = match.index + match[0].length;
    this.say(open.slice(0, end));
    this.said += end;
  }
}
