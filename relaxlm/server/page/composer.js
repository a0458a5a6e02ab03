// The field to write in, and its button, which sends or stops.

import { byId, relabel } from "./dom.js";

export class Composer {
  /** `actions`: {send(text), stop(), editLast()}. */
  constructor(actions) {
    this.actions = actions;
    this.field = byId("prompt");
    this.button = byId("send");
    this.running = false;
    this.drafts = new Map(); // conversation id -> what was typed there
    this.id = null;
    byId("composer").addEventListener("submit", (event) => this.submit(event));
    this.field.addEventListener("input", () => this.refresh());
    this.field.addEventListener("keydown", (event) => this.keydown(event));
    this.refresh();
  }

  /** Turns to a conversation; what was typed in the other one stays there. */
  turnTo(id) {
    if (this.id !== null) this.drafts.set(this.id, this.field.value);
    this.id = id;
    this.field.value = this.drafts.get(id) ?? "";
    this.refresh();
  }

  setRunning(running) {
    this.running = running;
    this.refresh();
  }

  fill(text) {
    this.field.value = text;
    this.refresh();
    this.field.focus();
  }

  focus() {
    // On a phone the focus opens the keyboard over the reply.
    if (matchMedia("(pointer: fine)").matches) this.field.focus();
  }

  submit(event) {
    event.preventDefault();
    if (this.running) {
      this.actions.stop();
      return;
    }
    const text = this.field.value.trim();
    if (!text) return;
    this.field.value = "";
    this.refresh();
    this.actions.send(text);
  }

  keydown(event) {
    if (event.isComposing) return; // Enter chooses a candidate of an input method
    if (event.key === "Enter" && !event.shiftKey) {
      if (this.running) event.preventDefault(); // write on; sending waits for the end
      else this.submit(event);
    } else if (event.key === "ArrowUp" && !this.field.value) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  refresh() {
    const name = this.running ? "Stop" : "Send";
    if (this.button.getAttribute("aria-label") !== name) {
      relabel(this.button, this.running ? "stop" : "send", name);
    }
    this.button.title = this.running ? "Stop (Esc)" : "Send (Enter)";
    this.button.classList.toggle("stop", this.running);
    this.button.disabled = !this.running && !this.field.value.trim();
    fitHeight(this.field);
  }
}

/** Browsers without `field-sizing: content` get the height from here. */
function fitHeight(field) {
  if (CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}
