// What chats and embeddings have in common: a folder's files, a library that fits, and weights.

import { ConfigError, LibraryError } from "./errors.js";
import { WebFiles } from "./files.js";
import { Library } from "./library.js";
import { Tokenizer } from "./tokenizer.js";
import { loadWeights } from "./weights.js";

const CONFIG_FILE = "mlc-chat-config.json";

/**
 * Loads a model and makes something of it.
 *
 * @param {object} options as for `ChatModule.load`
 * @param {string} task that the library has to be for: "chat" or "embedding"
 * @param {(parts: {library, params, config, tokenizer}) => T} make
 * @returns {Promise<T>} what `make` returns; if it fails, the library's memory is given back
 * @throws {RelaxLMError} what is wrong with the folder, the library or the device
 * @template T
 */
export async function openModel({ model, library, onProgress = () => {}, log }, task, make) {
  const files = typeof model === "string" ? new WebFiles(model) : model;
  onProgress({ stage: "library" });
  const loaded = await Library.load(await bytesOf(library), log);
  try {
    const { model_task: found } = loaded.metadata;
    if (found !== task) {
      const other = task === "chat" ? "Embedder" : "ChatModule";
      throw new LibraryError(`the library is for ${found}, not for ${task}: load it with ${other}`);
    }
    const config = await files.json(CONFIG_FILE);
    if (!config) throw new ConfigError(`no ${CONFIG_FILE}: expected a folder made by relaxlm`);
    checkFits(loaded.metadata, config);
    const description = await files.json("tokenizer.json");
    if (!description) throw new ConfigError("no tokenizer.json in the model's folder");
    const tokenizer = new Tokenizer(description, (await files.json("tokenizer_config.json")) ?? {});
    const params = await loadWeights(files, loaded, (done, total) =>
      onProgress({ stage: "weights", loaded: done, total }),
    );
    return make({ library: loaded, params, config, tokenizer });
  } catch (error) {
    loaded.dispose();
    throw error;
  }
}

async function bytesOf(library) {
  if (typeof library !== "string") return library;
  const address = new URL(library, globalThis.location?.href);
  const folder = new URL(".", address);
  return new WebFiles(folder).bytes(address.pathname.split("/").at(-1));
}

function checkFits({ model_type, quantization }, config) {
  const pairs = { model_type: [model_type, config.model_type] };
  pairs.quantization = [quantization, config.quantization];
  for (const [name, [compiled, ours]] of Object.entries(pairs)) {
    if (compiled !== ours) {
      throw new ConfigError(
        `the library was compiled for ${name} = ${compiled}, but the model's folder has ${ours}`,
      );
    }
  }
}
