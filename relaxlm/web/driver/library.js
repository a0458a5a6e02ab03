// A compiled library, instantiated: TVM's runtime and the model's code in one WebAssembly module.

import tvmjs from "@mlc-ai/web-runtime";

import { DeviceError, LibraryError } from "./errors.js";

// Counts changes of the contract between library and runtime (relaxlm/runtime/metadata.py).
const CONTRACT = 7;
const DEVICES = ["wasm", "webgpu"];
const METADATA_SECTION = "relaxlm";
const MAGIC = "0,97,115,109,1,0,0,0";

export class Library {
  /**
   * @param {Uint8Array} bytes of the .wasm file
   * @param {(text: string) => void} log gets what the runtime prints
   * @throws {LibraryError} not a library of relaxlm, or one of another release
   * @throws {DeviceError} there is no GPU, or none that can run it
   */
  static async load(bytes, log = () => {}) {
    const metadata = readMetadata(bytes);
    const gpu = metadata.target.kind === "webgpu" ? await findGpu(metadata) : null;
    const tvm = await tvmjs.instantiate(bytes, tvmjs.createPolyfillWASI(), log);
    if (gpu) tvm.initWebGPU(gpu);
    return new Library(tvm, metadata).start();
  }

  constructor(tvm, metadata) {
    this.tvm = tvm;
    this.metadata = metadata;
    this.onGpu = metadata.target.kind === "webgpu";
    tvm.beginScope();
    this.cpu = tvm.cpu();
    this.device = this.onGpu ? tvm.webgpu() : this.cpu;
  }

  async start() {
    const { tvm } = this;
    this.machine = tvm.detachFromCurrentScope(tvm.createVirtualMachine(this.device));
    if (this.onGpu) await tvm.asyncLoadWebGPUPipelines(this.machine.getInternalModule());
    return this;
  }

  /** A function of the model that lives as long as the library. */
  function(name) {
    return this.tvm.detachFromCurrentScope(this.machine.getFunction(name));
  }

  /** A tensor that lives until it is disposed of. */
  empty(shape, dtype, device) {
    return this.tvm.detachFromCurrentScope(this.tvm.empty(shape, dtype, device));
  }

  /** Tensors as one argument, which lives until it is disposed of. */
  tuple(tensors) {
    return this.tvm.detachFromCurrentScope(this.tvm.makeTVMArray(tensors));
  }

  /** Fills a tensor with bytes. */
  upload(tensor, bytes) {
    if (!this.onGpu) {
      this.tvm.memory.storeRawBytes(tensor.getCPUDataAddress(), bytes);
      return;
    }
    // Queues write whole words.
    const padded = bytes.length % 4 ? new Uint8Array(Math.ceil(bytes.length / 4) * 4) : bytes;
    if (padded !== bytes) padded.set(bytes);
    this.tvm.lib.webGPUContext.copyRawBytesToBuffer(
      padded,
      tensor.getDataPtr(),
      0,
      padded.length,
    );
  }

  dispose() {
    this.tvm.dispose();
  }
}

async function findGpu({ params, kv_cache: cache }) {
  const adapter = await globalThis.navigator?.gpu?.requestAdapter().catch(() => null);
  if (!adapter) {
    throw new DeviceError(
      "this library runs on a GPU by WebGPU, and there is none here: use a browser and a computer " +
        "that have it, or a library compiled with --device wasm",
    );
  }
  let found;
  try {
    found = await tvmjs.detectGPUDevice();
  } catch (error) {
    throw new DeviceError(`this GPU cannot run the library: ${error.message}`);
  }
  const half = [...params, ...cache.tensors].some(({ dtype }) => dtype === "float16");
  if (half && !found.device.features.has("shader-f16")) {
    throw new DeviceError(
      "this library computes in float16, and this GPU lacks WebGPU's feature shader-f16: compile " +
        "the model with a float32 preset, such as q4f32_1, or with --device wasm",
    );
  }
  return found.device;
}

/** What a library says of itself, without starting it. */
function readMetadata(bytes) {
  const text = section(bytes, METADATA_SECTION);
  if (text === null) throw new LibraryError("this is no library that relaxlm compiled for browsers");
  const metadata = JSON.parse(text);
  if (metadata.contract !== CONTRACT) {
    throw new LibraryError(
      `the library follows contract ${metadata.contract} (made by relaxlm ` +
        `${metadata.versions?.relaxlm}), this driver expects ${CONTRACT}; compile it again`,
    );
  }
  if (!DEVICES.includes(metadata.target.kind)) {
    throw new LibraryError(`the library was compiled for ${metadata.target.kind}, not for browsers`);
  }
  return metadata;
}

/** The text of a custom section of a WebAssembly module; null if there is none, or no module. */
function section(bytes, name) {
  if (String(bytes.subarray(0, 8)) !== MAGIC) return null;
  let at = 8;
  const number = () => {
    let [value, factor, byte] = [0, 1, 0];
    do {
      byte = bytes[at++];
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte & 128);
    return value;
  };
  const text = (end) => new TextDecoder().decode(bytes.subarray(at, end));
  while (at < bytes.length) {
    const kind = bytes[at++];
    const size = number();
    const end = at + size;
    if (kind === 0) {
      const nameEnd = number() + at;
      if (text(nameEnd) === name) {
        at = nameEnd;
        return text(end);
      }
    }
    at = end;
  }
  return null;
}
