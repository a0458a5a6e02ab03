// A ChatModule in a worker of its own, with the same `chat`: see worker.js.

import * as errors from "./errors.js";

export class RemoteChat {
  /**
   * Options are those of `ChatModule.load`; `model` and `library` are addresses.
   *
   * @returns {Promise<RemoteChat>}
   */
  static async load({ model, library, contextWindowSize, onProgress = () => {} }) {
    const remote = new RemoteChat();
    const here = (address) => new URL(address, document.baseURI).href;
    const options = { model: here(model), library: here(library), contextWindowSize };
    try {
      const loaded = await remote.call("load", { options }, ({ progress }) => onProgress(progress));
      remote.metadata = loaded.metadata;
      return remote;
    } catch (error) {
      remote.dispose();
      throw error;
    }
  }

  constructor() {
    this.calls = new Map(); // number -> what its messages go to
    this.next = 0;
    this.messages = [];
    this.forgottenMessages = 0;
    this.last = null;
    this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.calls.get(data.id)?.(data);
    this.worker.onerror = (event) => {
      const message = event.message ?? "the model's worker could not be started";
      for (const receive of [...this.calls.values()]) receive({ error: { message } });
    };
  }

  /** As `ChatModule.chat`. */
  async *chat(prompt, settings = {}, { signal, variables } = {}) {
    const texts = [];
    let wake = () => {};
    let result = null;
    const id = this.next;
    const stop = () => this.worker.postMessage({ id, method: "stop" });
    const call = this.call("chat", { prompt, settings, variables }, ({ text }) => {
      texts.push(text);
      wake();
    });
    call.then(
      (done) => (result = { done }),
      (error) => (result = { error }),
    ).then(() => wake());
    signal?.addEventListener("abort", stop);
    if (signal?.aborted) stop();
    try {
      while (!result || texts.length) {
        if (texts.length) yield texts.splice(0).join("");
        else await new Promise((resolve) => (wake = resolve));
      }
      if (result.error) throw result.error;
      const { last, messages, forgotten } = result.done;
      Object.assign(this, { last, messages, forgottenMessages: forgotten });
    } finally {
      signal?.removeEventListener("abort", stop);
      if (!result) stop(); // the caller left
    }
  }

  /** Forgets the conversation. */
  async reset() {
    await this.call("reset");
    Object.assign(this, { messages: [], forgottenMessages: 0 });
  }

  dispose() {
    this.worker.terminate();
  }

  call(method, values = {}, receive = () => {}) {
    const id = this.next++;
    return new Promise((resolve, reject) => {
      this.calls.set(id, (message) => {
        if (message.error) {
          this.calls.delete(id);
          const Known = errors[message.error.name] ?? Error;
          reject(new Known(message.error.message));
        } else if (message.done) {
          this.calls.delete(id);
          resolve(message.done);
        } else {
          receive(message);
        }
      });
      this.worker.postMessage({ id, method, ...values });
    });
  }
}
