// Conversations in IndexedDB, which takes long ones and does not block the page.
//
// Two object stores that always change together: "summaries" for the list, and "conversations".
// Without IndexedDB (some private windows) everything lives in memory until the tab is closed.

import { matches, readConversation, summaryOf } from "./conversation.js";

const DATABASE = "relaxlm";
const SCHEMA = 1;
const STORES = ["summaries", "conversations"];

export async function openStore() {
  try {
    return new DatabaseStore(await openDatabase());
  } catch {
    return new MemoryStore();
  }
}

class DatabaseStore {
  permanent = true;

  constructor(database) {
    this.database = database;
    this.channel = new BroadcastChannel(DATABASE);
  }

  /** Calls back with a conversation's id when another tab changed it, or null for all. */
  onchange(callback) {
    this.channel.onmessage = ({ data }) => callback(data);
  }

  /** Summaries, the latest first. */
  async list() {
    const all = await this.read("summaries", (store) => store.getAll());
    return all.sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return readConversation(await this.read("conversations", (store) => store.get(id)));
  }

  async all() {
    const stored = await this.read("conversations", (store) => store.getAll());
    return stored.map(readConversation).filter(Boolean);
  }

  async put(conversation) {
    await this.write(conversation.id, (summaries, conversations) => {
      summaries.put(summaryOf(conversation), conversation.id);
      conversations.put(conversation, conversation.id);
    });
  }

  async remove(id) {
    await this.write(id, (...stores) => stores.forEach((store) => store.delete(id)));
  }

  async clear() {
    await this.write(null, (...stores) => stores.forEach((store) => store.clear()));
  }

  /** The ids of conversations with that text; one at a time is in memory. */
  search(query) {
    const found = new Set();
    return new Promise((resolve, reject) => {
      const store = this.database.transaction("conversations").objectStore("conversations");
      const cursor = store.openCursor();
      cursor.onerror = () => reject(cursor.error);
      cursor.onsuccess = () => {
        const entry = cursor.result;
        if (!entry) return resolve(found);
        const conversation = readConversation(entry.value);
        if (conversation && matches(conversation, query)) found.add(conversation.id);
        return entry.continue();
      };
    });
  }

  read(name, action) {
    return new Promise((resolve, reject) => {
      const request = action(this.database.transaction(name).objectStore(name));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  }

  async write(id, action) {
    await new Promise((resolve, reject) => {
      const transaction = this.database.transaction(STORES, "readwrite");
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
      action(...STORES.map((name) => transaction.objectStore(name)));
    });
    this.channel.postMessage(id);
  }
}

class MemoryStore {
  permanent = false;

  constructor() {
    this.conversations = new Map();
  }

  onchange() {} // no other tab can see these

  async list() {
    const all = [...this.conversations.values()].map(summaryOf);
    return all.sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return readConversation(this.conversations.get(id));
  }

  async all() {
    return [...this.conversations.values()].map(readConversation);
  }

  async put(conversation) {
    this.conversations.set(conversation.id, structuredClone(conversation));
  }

  async remove(id) {
    this.conversations.delete(id);
  }

  async clear() {
    this.conversations.clear();
  }

  async search(query) {
    const found = [...this.conversations.values()].filter((one) => matches(one, query));
    return new Set(found.map((one) => one.id));
  }
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, SCHEMA);
    request.onupgradeneeded = () => {
      for (const name of STORES) request.result.createObjectStore(name);
    };
    request.onsuccess = () => {
      // Another tab with a newer page wants to change the schema: do not stand in its way.
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab keeps an older database open"));
  });
}
