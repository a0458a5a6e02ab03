// The page as a whole: which conversation is open, which replies are being written, and what each
// control does. Replies go on while the reader looks at another conversation.

import { Announcer } from "./announcer.js";
import { PLACE_NOTE } from "./api.js";
import { Composer } from "./composer.js";
import { newConversation, newVersion, requestMessages, retitle, shownVersion } from "./conversation.js";
import { askForKey, confirm, startDialogs } from "./dialogs.js";
import { byId, fillIcons, h, newId } from "./dom.js";
import { closeDrawer, openSidebar, startDrawer, toggleSidebar } from "./drawer.js";
import { download, startImport } from "./files.js";
import { ModelBadge } from "./model_badge.js";
import { readReply } from "./reply.js";
import { emptySettings, readSettings, requestBody, summary } from "./settings.js";
import { SettingsDialog } from "./settings_dialog.js";
import { startShortcuts } from "./shortcuts.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { startTheme } from "./theme.js";
import { Thread } from "./thread.js";
import { toast } from "./toast.js";

const SAVE_MS = 1000; // while a reply is written
const STARTERS = ["Who are you?", "Tell me a story about a fox.", "What is 17 + 25?"];
const ANY_MODEL = "default"; // before the server has said what it has: it takes what is loaded
const STORED_SETTINGS = "relaxlm.settings";

class App {
  constructor(store) {
    this.store = store;
    this.current = null;
    this.stale = false; // whether another tab has changed it
    this.running = new Map(); // conversation id -> {conversation, message, controller}
    this.announcer = new Announcer();
    this.composer = new Composer({
      send: (text) => this.send(text),
      stop: () => this.stop(),
      editLast: () => this.thread.editLast(),
    });
    this.thread = new Thread({
      edit: (message, text) => this.edit(message, text),
      regenerate: (message) => this.regenerate(message),
      retry: (message) => this.retry(message),
      switchVersion: (message, shown) => this.switchVersion(message, shown),
    });
    this.sidebar = new Sidebar({
      open: (id) => this.open(id).then(() => closeDrawer() || this.composer.focus()),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
      search: (text) => this.store.search(text),
    });
    this.settings = new SettingsDialog((settings) => this.saveSettings(settings));
    this.model = new ModelBadge({
      needKey: (error) => this.askForKey(error.message),
      changed: () => this.showEmpty(),
    });
  }

  async start() {
    this.listen();
    this.store.onchange((id) => this.changedElsewhere(id));
    await this.open(location.hash.slice(1));
    this.composer.focus();
    this.model.load();
    if (!this.store.permanent) {
      toast("This browser stores nothing here: conversations are lost with the tab.");
    }
  }

  listen() {
    const on = (id, action) => byId(id).addEventListener("click", action);
    on("new-conversation", () => this.create());
    on("open-settings", () => this.settings.open(this.current.settings));
    on("settings-summary", () => this.settings.open(this.current.settings));
    on("help", () => byId("help-dialog").showModal());
    on("export-all", () => this.exportAll());
    on("delete-all", () => this.removeAll());
    startImport(
      (conversations) => this.addImported(conversations),
      (message) => toast(message),
    );
    startShortcuts({
      search: () => {
        openSidebar();
        byId("search").select();
      },
      create: () => this.create(),
      sidebar: toggleSidebar,
      settings: () => this.settings.open(this.current.settings),
      regenerate: () => this.regenerateLast(),
      help: () => byId("help-dialog").showModal(),
      escape: () => closeDrawer() || this.stop(),
    });
    window.addEventListener("hashchange", () => {
      if (location.hash.slice(1) !== this.current.id) this.open(location.hash.slice(1));
    });
    window.addEventListener("focus", () => this.readAgain());
    // The last chance to keep what has come of a reply.
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) for (const run of this.running.values()) this.save(run.conversation);
    });
  }

  // Conversations

  /** Opens a stored conversation, or a new one if there is none of that id. */
  async open(id) {
    const wanted = this.running.get(id)?.conversation ?? (id ? await this.store.get(id) : null);
    this.show(wanted ?? newConversation(storedSettings()));
  }

  create() {
    closeDrawer();
    this.show(newConversation(storedSettings()));
    this.composer.focus();
  }

  show(conversation) {
    this.current = conversation;
    this.composer.turnTo(conversation.id);
    const message = this.running.get(conversation.id)?.message ?? null;
    this.thread.show(conversation, message);
    this.announcer.begin(message ? shownVersion(message).content : "");
    this.setAddress();
    this.refresh();
  }

  /** Conversations that are kept have an address of their own, for reload and back. */
  setAddress() {
    const hash = this.current.messages.length ? `#${this.current.id}` : "";
    if (location.hash !== hash) history.pushState(null, "", hash || location.pathname);
  }

  /** Title, buttons and list, as they should be now. */
  async refresh() {
    const run = this.running.get(this.current.id);
    byId("title").textContent = this.current.title;
    document.title = this.current.messages.length ? `${this.current.title} · relaxlm` : "relaxlm";
    this.composer.setRunning(Boolean(run));
    const words = summary(this.current.settings);
    byId("settings-summary").textContent = words.length ? words.join(" · ") : "Default settings";
    this.showEmpty();
    const list = await this.store.list();
    this.sidebar.show(list, this.current.id, new Set(this.running.keys()));
  }

  showEmpty() {
    const place = byId("empty");
    place.hidden = this.current.messages.length > 0;
    if (place.hidden) return;
    const starter = (text) =>
      h("button", { type: "button", class: "button", onclick: () => this.composer.fill(text) }, text);
    place.replaceChildren(
      h("img", { src: "page/icon.svg", alt: "", width: "48", height: "48" }),
      h("h2", {}, this.model.name ? `Chat with ${this.model.name}` : "Chat"),
      h("p", {}, PLACE_NOTE),
      h("div", { class: "starters" }, ...STARTERS.map(starter)),
    );
  }

  async save(conversation) {
    try {
      await this.store.put(conversation);
    } catch (error) {
      toast(`This conversation can’t be kept: ${error?.message ?? "the browser refused"}`);
    }
  }

  async rename(id, title) {
    const conversation = await this.loaded(id);
    if (!conversation) return;
    Object.assign(conversation, { title, renamed: true });
    await this.save(conversation);
    this.refresh();
  }

  async remove(id) {
    const conversation = await this.loaded(id);
    this.running.get(id)?.controller.abort();
    await this.store.remove(id);
    if (id === this.current.id) this.show(newConversation(storedSettings()));
    else this.refresh();
    const undo = async () => {
      await this.save(conversation);
      this.show(conversation);
    };
    toast(`Deleted “${conversation.title}”`, { label: "Undo", run: undo });
  }

  async removeAll() {
    const count = (await this.store.list()).length;
    if (count === 0) return toast("There are no conversations.");
    const what = count === 1 ? "one conversation" : `${count} conversations`;
    const text = `This deletes ${what} from this browser, for good. Export them first to keep them.`;
    if (!(await confirm("Delete all conversations?", text, "Delete all"))) return undefined;
    for (const run of this.running.values()) run.controller.abort();
    await this.store.clear();
    return this.create();
  }

  async exportAll() {
    const all = await this.store.all();
    if (all.length === 0) return toast("There are no conversations.");
    return download(all, `relaxlm-${new Date().toISOString().slice(0, 10)}.json`);
  }

  async addImported(conversations) {
    for (const conversation of conversations) {
      // The same conversation twice would be one: what is here already stays.
      if (await this.store.get(conversation.id)) conversation.id = newId();
      await this.save(conversation);
    }
    await this.refresh();
    toast(conversations.length === 1 ? "Imported one conversation" : `Imported ${conversations.length} conversations`);
  }

  /** The one object of a conversation that is in use, or a fresh one from the store. */
  async loaded(id) {
    if (id === this.current.id) return this.current;
    return this.running.get(id)?.conversation ?? this.store.get(id);
  }

  /** In another tab. The open conversation is read again when the reader comes back to it. */
  async changedElsewhere(id) {
    this.stale ||= id === this.current.id || id === null;
    await this.refresh();
    if (document.hasFocus()) await this.readAgain();
  }

  async readAgain() {
    const stale = this.stale && !this.running.has(this.current.id);
    this.stale = false;
    if (stale) await this.open(this.current.id);
  }

  async saveSettings(settings) {
    this.current.settings = settings;
    try {
      localStorage.setItem(STORED_SETTINGS, JSON.stringify(settings));
    } catch {
      // Storage is switched off: they hold for this conversation.
    }
    if (this.current.messages.length) await this.save(this.current);
    this.refresh();
    this.model.load(); // with the key, if it is new
  }

  async askForKey(problem) {
    const given = await askForKey(problem);
    if (given) await this.model.load();
    return given;
  }

  // Replies

  send(text) {
    this.current.messages.push({ role: "user", content: text });
    retitle(this.current);
    this.reply();
  }

  edit(message, text) {
    const { messages } = this.current;
    message.content = text;
    messages.splice(messages.indexOf(message) + 1);
    retitle(this.current);
    this.thread.show(this.current, null);
    this.reply();
  }

  /** A new message of the assistant, behind all others. */
  reply() {
    const message = { role: "assistant", versions: [newVersion(this.model.name || ANY_MODEL)], shown: 0 };
    this.current.messages.push(message);
    this.run(message);
  }

  regenerateLast() {
    const message = this.current.messages.at(-1);
    if (message?.role === "assistant" && !this.running.has(this.current.id)) this.regenerate(message);
  }

  regenerate(message) {
    message.versions.push(newVersion(this.model.name || ANY_MODEL));
    message.shown = message.versions.length - 1;
    this.run(message);
  }

  /** After an error: what had come is kept as a version of its own. */
  async retry(message) {
    const version = shownVersion(message);
    if (version.error.kind === "key" && !(await this.askForKey(version.error.message))) return;
    if (version.content || version.reasoning) {
      this.regenerate(message);
      return;
    }
    message.versions[message.shown] = newVersion(this.model.name || ANY_MODEL);
    this.run(message);
  }

  switchVersion(message, shown) {
    message.shown = shown;
    this.thread.sync();
    this.save(this.current);
  }

  stop() {
    this.running.get(this.current.id)?.controller.abort();
  }

  async run(message) {
    const conversation = this.current;
    const version = shownVersion(message);
    const controller = new AbortController();
    const body = requestBody(
      version.model,
      requestMessages(conversation, message),
      conversation.settings,
    );
    conversation.updated = Date.now();
    this.running.set(conversation.id, { conversation, message, controller });
    this.composer.setRunning(true); // at once: a second Enter is no second message
    this.thread.sync(message);
    this.thread.follow();
    this.composer.focus();
    this.announcer.begin("");
    const here = () => this.current === conversation;
    await this.save(conversation);
    if (here()) this.setAddress();
    this.refresh();
    const timers = [
      setInterval(() => this.save(conversation), SAVE_MS),
      setInterval(() => here() && this.thread.wait((Date.now() - conversation.updated) / 1000), 500),
    ];
    await readReply(version, body, {
      signal: controller.signal,
      changed: () => {
        if (!here()) return;
        this.thread.update(message);
        this.announcer.update(version.content);
      },
    });
    timers.forEach(clearInterval);
    this.running.delete(conversation.id);
    await this.finished(conversation, version);
  }

  async finished(conversation, version) {
    if (await this.store.get(conversation.id)) await this.save(conversation); // not if deleted
    if (this.current === conversation) {
      this.thread.sync(null);
      const how = version.error ? "" : version.finish === "stopped" ? "Stopped." : "End of the reply.";
      this.announcer.end(version.content, how);
      if (version.error?.kind === "key") this.retry(conversation.messages.at(-1));
    }
    this.refresh();
  }
}

function storedSettings() {
  try {
    return readSettings(JSON.parse(localStorage.getItem(STORED_SETTINGS) ?? "null"));
  } catch {
    return emptySettings();
  }
}

fillIcons();
startTheme();
startDialogs();
startDrawer();
new App(await openStore()).start();
