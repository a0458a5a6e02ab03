// The messages of one conversation, and where the reader is in them.

import { byId, h } from "./dom.js";
import { ReplyView, UserView } from "./message_view.js";

const FIRST_SHOWN = 40; // messages; earlier ones are made when asked for
const MORE = 200;
const BOTTOM_PX = 40; // that near to the end counts as at the end
// After a rendering that took long, the next one waits that many times as long.
const RENDER_SHARE = 3;
const SLOWEST_RENDER_MS = 500;

export class Thread {
  constructor(actions) {
    this.actions = actions;
    this.node = byId("thread");
    this.scroller = byId("scroller");
    this.toLatest = byId("to-latest");
    this.views = new Map(); // message -> view
    this.following = true; // the end of the conversation
    this.lastTop = 0;
    this.scheduled = false;
    this.changed = new Set(); // messages to render
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.toLatest.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.keepAtEnd()).observe(this.node);
    new ResizeObserver(() => this.keepAtEnd()).observe(this.scroller);
  }

  /** Shows a conversation from its end; `running` is the message that is being written. */
  show(conversation, running) {
    this.conversation = conversation;
    this.running = running;
    this.views.clear();
    this.node.replaceChildren();
    this.first = Math.max(0, conversation.messages.length - FIRST_SHOWN);
    this.sync();
    this.follow();
  }

  /** Makes the page agree with the conversation's messages and with what is running. */
  sync(running = this.running) {
    this.running = running;
    const { messages } = this.conversation;
    this.first = Math.min(this.first, Math.max(0, messages.length - 1));
    const shown = messages.slice(this.first);
    for (const [message, view] of this.views) {
      if (!shown.includes(message)) {
        view.node.remove();
        this.views.delete(message);
      }
    }
    const wanted = shown.map((message) => this.view(message).node);
    const earlier = this.first > 0 ? [this.earlierButton()] : [];
    this.node.querySelector(".earlier")?.remove();
    wanted.forEach((node, i) => {
      if (this.node.children[i] !== node) this.node.insertBefore(node, this.node.children[i]);
    });
    this.node.prepend(...earlier);
    this.refresh();
  }

  view(message) {
    let view = this.views.get(message);
    if (!view) {
      const View = message.role === "user" ? UserView : ReplyView;
      view = new View(message, this.actions);
      this.views.set(message, view);
    }
    return view;
  }

  refresh() {
    const { messages } = this.conversation;
    const lastUser = messages.findLast((message) => message.role === "user");
    const lastMessage = messages[messages.length - 1];
    for (const [message, view] of this.views) {
      const last = message === (message.role === "user" ? lastUser : lastMessage);
      const state = { last, busy: Boolean(this.running), running: message === this.running };
      const key = JSON.stringify([...Object.values(state), message.shown]);
      if (view.refreshed === key && !state.last) continue; // long conversations: most are as before
      view.refreshed = key;
      view.refresh(state);
    }
  }

  /** Renders a message's text soon: with the next frame, or later if rendering takes long. */
  update(message) {
    this.changed.add(message);
    if (this.scheduled) return;
    this.scheduled = true;
    const wait = Math.min(SLOWEST_RENDER_MS, RENDER_SHARE * (this.cost ?? 0));
    const render = () => requestAnimationFrame(() => this.render());
    if (wait < 16) render();
    else setTimeout(render, wait);
  }

  render() {
    const started = performance.now();
    this.scheduled = false;
    for (const message of this.changed) this.views.get(message)?.update();
    this.changed.clear();
    this.cost = performance.now() - started;
  }

  wait(elapsed) {
    if (this.running) this.views.get(this.running)?.wait(elapsed);
  }

  editLast() {
    const last = this.conversation.messages.findLast((message) => message.role === "user");
    if (last && !this.running) this.views.get(last)?.edit();
  }

  earlierButton() {
    const show = () => {
      const before = this.scroller.scrollHeight - this.scroller.scrollTop;
      this.following = false;
      this.first = Math.max(0, this.first - MORE);
      this.sync();
      this.scroller.scrollTop = this.scroller.scrollHeight - before; // what was read stays in place
    };
    const label = `Show earlier messages (${this.first})`;
    return h("button", { type: "button", class: "button earlier", onclick: show }, label);
  }

  /** To the end, and from now on with it. */
  follow() {
    this.following = true;
    this.keepAtEnd();
    this.toLatest.hidden = true;
  }

  keepAtEnd() {
    if (!this.following) return this.scrolled();
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.lastTop = this.scroller.scrollTop;
  }

  /** Scrolling up leaves the end, reaching it again goes on with it; growing text does neither. */
  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const below = scrollHeight - clientHeight - scrollTop;
    if (below < BOTTOM_PX && scrollTop >= this.lastTop) this.following = true;
    else if (scrollTop < this.lastTop && below > 1) this.following = false;
    this.lastTop = scrollTop;
    this.toLatest.hidden = this.following || below < BOTTOM_PX;
  }
}
