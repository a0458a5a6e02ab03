// Weights of a folder, streamed into tensors of the runtime (relaxlm/runtime/params.py).

import { WeightsError } from "./errors.js";

const INDEX_NAMES = ["tensor-cache.json", "ndarray-cache.json"];
const BITS = {
  float32: 32,
  uint32: 32,
  int32: 32,
  float16: 16,
  bfloat16: 16,
  uint16: 16,
  int16: 16,
  float8_e4m3fn: 8,
  float8_e5m2: 8,
  uint8: 8,
  int8: 8,
};

/**
 * Loads all parameters of a library.
 *
 * @param files of the folder: `WebFiles` or `DiskFiles`
 * @param {import("./library.js").Library} library
 * @param {(loaded: number, total: number) => void} onProgress bytes
 * @returns the tensors, in the library's order
 * @throws {WeightsError} no index, or tensors that are not those that the library asks for
 */
export async function loadWeights(files, library, onProgress = () => {}) {
  const shards = await readIndex(files);
  const records = new Map(shards.flatMap((shard) => shard.records).map((r) => [r.name, r]));
  checkFit(records, library.metadata.params);
  const tensors = new Map();
  for (const { name, shape, dtype } of library.metadata.params) {
    tensors.set(name, library.empty(shape, dtype, library.device));
  }
  const total = shards.reduce((sum, { nbytes }) => sum + nbytes, 0);
  let loaded = 0;
  for (const { dataPath, nbytes, md5sum, records } of shards) {
    const writers = records
      .toSorted((a, b) => a.byteOffset - b.byteOffset)
      .map((record) => ({ record, writer: writerFor(library, tensors.get(record.name), record) }));
    let position = 0;
    let next = 0; // the first tensor that is not complete
    for await (const piece of files.pieces(dataPath, md5sum)) {
      for (let i = next; i < writers.length; i++) {
        const { record, writer } = writers[i];
        const start = record.byteOffset - position;
        if (start >= piece.length) break;
        const end = Math.min(start + record.nbytes, piece.length);
        if (end > 0) writer.write(piece.subarray(Math.max(start, 0), end));
        if (start + record.nbytes <= piece.length) {
          writer.finish();
          next = i + 1;
        }
      }
      position += piece.length;
      onProgress(Math.min(loaded + position, total), total);
    }
    if (position !== nbytes) {
      throw new WeightsError(`${dataPath}: ${position} bytes, expected ${nbytes} as the index says`);
    }
    loaded += nbytes;
  }
  return library.metadata.params.map(({ name }) => tensors.get(name));
}

async function readIndex(files) {
  for (const name of INDEX_NAMES) {
    const index = await files.json(name);
    if (!index) continue;
    for (const { dataPath, format, records } of index.records) {
      if (format !== "raw-shard") {
        throw new WeightsError(`${name}: ${dataPath} has format '${format}', expected 'raw-shard'`);
      }
      for (const record of records) checkRecord(record, name);
    }
    return index.records;
  }
  throw new WeightsError(
    `no ${INDEX_NAMES[0]} (or ${INDEX_NAMES[1]}): expected a folder of converted weights, made by ` +
      "`relaxlm convert_weight`",
  );
}

function checkRecord({ name, shape, dtype, format, nbytes }, where) {
  if (!(dtype in BITS)) throw new WeightsError(`${where}: ${name} has dtype '${dtype}'`);
  if (format !== "raw" && format !== "f32-to-bf16") {
    throw new WeightsError(`${where}: ${name} has format '${format}'`);
  }
  const bits = isShortened({ dtype, format }) ? 16 : BITS[dtype];
  const expected = (shape.reduce((a, b) => a * b, 1) * bits) / 8;
  if (nbytes !== expected) {
    throw new WeightsError(`${where}: ${name} has ${nbytes} bytes, expected ${expected}`);
  }
}

/** Whether float32 values are stored as bfloat16. */
const isShortened = ({ dtype, format }) => format === "f32-to-bf16" && dtype === "float32";

function checkFit(records, params) {
  const wanted = new Map(params.map((param) => [param.name, param]));
  const faults = [];
  const list = (names) => `${names.slice(0, 3).join("; ")}${names.length > 3 ? "; and more" : ""}`;
  const missing = [...wanted.keys()].filter((name) => !records.has(name));
  const unused = [...records.keys()].filter((name) => !wanted.has(name));
  const unlike = params
    .filter(({ name }) => records.has(name))
    .filter(({ name, shape, dtype }) => {
      const record = records.get(name);
      return record.dtype !== dtype || String(record.shape) !== String(shape);
    })
    .map(({ name, shape, dtype }) => {
      const found = records.get(name);
      return `${name}: ${found.dtype} [${found.shape}], expected ${dtype} [${shape}]`;
    });
  for (const [fault, names] of Object.entries({ missing, unused, unlike })) {
    if (names.length) faults.push(`${names.length} ${fault} (${list(names)})`);
  }
  if (faults.length) {
    throw new WeightsError(
      `the weights do not fit the model: ${faults.join(", ")}. Were both made from the same model ` +
        "with the same quantization?",
    );
  }
}

/** Where the stored bytes of one tensor go, in order. */
function writerFor(library, tensor, record) {
  if (library.onGpu || isShortened(record)) return new Staged(library, tensor, record);
  return new Direct(library, tensor);
}

/** Straight into the memory of the WebAssembly module. */
class Direct {
  constructor(library, tensor) {
    this.memory = library.tvm.memory;
    this.address = tensor.getCPUDataAddress();
  }

  write(bytes) {
    this.memory.storeRawBytes(this.address, bytes);
    this.address += bytes.length;
  }

  finish() {}
}

/** Gathered first: a GPU's buffers are written whole, and shortened values have to be widened. */
class Staged {
  constructor(library, tensor, record) {
    Object.assign(this, { library, tensor, record, filled: 0, bytes: null });
  }

  write(bytes) {
    this.bytes ??= new Uint8Array(this.record.nbytes);
    this.bytes.set(bytes, this.filled);
    this.filled += bytes.length;
  }

  finish() {
    const bytes = isShortened(this.record) ? widened(this.bytes) : this.bytes;
    this.library.upload(this.tensor, bytes);
    this.bytes = null;
  }
}

/** bfloat16 to float32. */
function widened(bytes) {
  const values = new Uint32Array(new Uint16Array(bytes.buffer, 0, bytes.length / 2));
  return new Uint8Array(values.map((bits) => bits << 16).buffer);
}
