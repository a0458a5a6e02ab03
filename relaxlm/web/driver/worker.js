// A model in a thread of its own, so that a page stays quick while the model computes: the other
// end of remote.js.

import { ChatModule } from "./chat.js";

let chat = null;
const stops = new Map(); // number of a request -> what ends it

const methods = {
  async load({ options }, send) {
    chat?.dispose();
    chat = null;
    const onProgress = (progress) => send({ progress });
    chat = await ChatModule.load({ ...options, onProgress, log: console.log });
    return { metadata: chat.metadata };
  },

  async chat({ id, prompt, settings, variables }, send) {
    const stop = new AbortController();
    stops.set(id, stop);
    try {
      const options = { signal: stop.signal, variables };
      for await (const text of chat.chat(prompt, settings, options)) send({ text });
    } finally {
      stops.delete(id);
    }
    return { last: chat.last, messages: chat.messages, forgotten: chat.forgottenMessages };
  },

  async reset() {
    chat.reset();
    return {};
  },
};

self.onmessage = async ({ data }) => {
  const { id, method } = data;
  if (method === "stop") {
    stops.get(id)?.abort();
    return;
  }
  const send = (message) => self.postMessage({ id, ...message });
  try {
    send({ done: await methods[method](data, send) });
  } catch (error) {
    send({ error: { name: error.name, message: error.message } });
  }
};
