// Where a model's files come from: an address, or a folder's files in memory or on disk.

import { WeightsError } from "./errors.js";

const CACHE = "relaxlm";

/**
 * Files of one address, kept in the browser's cache.
 *
 * Weights are kept under their address and checksum, so that they are fetched once per version.
 * Small files are asked for each time, and taken from the cache when the server cannot be reached.
 */
export class WebFiles {
  /** @param {string | URL} base address of the folder */
  constructor(base) {
    this.base = new URL(String(base).replace(/\/*$/, "/"), globalThis.location?.href);
  }

  /** The content of a JSON file; undefined if there is none. */
  async json(name) {
    const response = await this.small(name);
    return response && (await response.json());
  }

  /** The bytes of a file. */
  async bytes(name, version) {
    const response = version ? await this.large(name, version) : await this.small(name);
    if (!response) throw new WeightsError(`${new URL(name, this.base)}: no such file`);
    return new Uint8Array(await response.arrayBuffer());
  }

  /** The bytes of a file of this version, piece by piece. */
  async *pieces(name, version) {
    const response = await this.large(name, version);
    const reader = response.body.getReader();
    try {
      for (;;) {
        const { done, value } = await reader.read().catch((error) => {
          throw new WeightsError(
            `${new URL(name, this.base)}: the download broke off (${error.message}); what is ` +
              "complete is kept, so try again",
          );
        });
        if (done) return;
        yield value;
      }
    } finally {
      reader.releaseLock();
    }
  }

  async small(name) {
    const address = new URL(name, this.base);
    const cache = await openCache();
    let response;
    try {
      response = await fetched(address, { cache: "no-cache" });
    } catch (error) {
      const kept = await cache?.match(address);
      if (kept) return kept;
      throw error;
    }
    if (response.status === 404) return undefined;
    if (!response.ok) throw new WeightsError(`${address}: the server answers ${response.status}`);
    await keep(cache, address, response.clone());
    return response;
  }

  async large(name, version) {
    const address = new URL(name, this.base);
    const cache = version && (await openCache());
    const key = new URL(address);
    key.searchParams.set("version", version);
    const kept = await cache?.match(key);
    if (kept) return kept;
    const response = await fetched(address);
    if (!response.ok) throw new WeightsError(`${address}: the server answers ${response.status}`);
    if (!cache) return response;
    // The cache reads along; a stream that breaks off leaves nothing in it.
    const [ours, cached] = response.body.tee();
    keep(cache, key, new Response(cached, { headers: response.headers }));
    return new Response(ours);
  }
}

/** @throws {WeightsError} the server cannot be reached */
async function fetched(address, options) {
  try {
    return await fetch(address, options);
  } catch (error) {
    throw new WeightsError(`${address} cannot be fetched: ${error.message}`);
  }
}

/** undefined where there is none: in private windows, and outside of browsers. */
async function openCache() {
  try {
    return await globalThis.caches?.open(CACHE);
  } catch {
    return undefined;
  }
}

/** A full or forbidden cache only costs time. */
async function keep(cache, address, response) {
  try {
    await cache?.put(address, response);
  } catch {
    // Fetched again next time.
  }
}

/** Removes everything that `WebFiles` has kept. */
export async function forgetFiles() {
  await globalThis.caches?.delete(CACHE);
}

/** Files of a folder on disk, for Node.js. */
export class DiskFiles {
  constructor(folder) {
    this.folder = folder;
  }

  async json(name) {
    const { readFile } = await import("node:fs/promises");
    try {
      return JSON.parse(await readFile(`${this.folder}/${name}`, "utf8"));
    } catch (error) {
      if (error.code === "ENOENT") return undefined;
      throw error;
    }
  }

  async bytes(name) {
    const { readFile } = await import("node:fs/promises");
    return new Uint8Array(await readFile(`${this.folder}/${name}`));
  }

  async *pieces(name) {
    const { createReadStream } = await import("node:fs");
    yield* createReadStream(`${this.folder}/${name}`, { highWaterMark: 1 << 20 });
  }
}
