// A compiled library, instantiated: TVM's runtime and the model's code in one WebAssembly module.

import tvmjs from "@mlc-ai/web-runtime";

import { DeviceError, LibraryError } from "./errors.js";

// Counts changes of the contract between library and runtime (relaxlm/runtime/metadata.py).
const CONTRACT = 4;
const DEVICES = { wasm: "cpu", webgpu: "webgpu" };

export class Library {
  /**
   * @param {Uint8Array} bytes of the .wasm file
   * @param {(text: string) => void} log gets what the runtime prints
   * @throws {LibraryError} not a library of relaxlm, or one of another release
   * @throws {DeviceError} there is no GPU, or none that can run it
   */
  static async load(bytes, log = () => {}) {
    let tvm;
    try {
      tvm = await tvmjs.instantiate(bytes, tvmjs.createPolyfillWASI(), log);
    } catch (error) {
      throw new LibraryError(`this is no WebAssembly module of relaxlm: ${error.message}`);
    }
    const metadata = tvm.withNewScope(() => readMetadata(tvm));
    const library = new Library(tvm, metadata);
    if (library.onGpu) await library.startGpu();
    library.machine = tvm.detachFromCurrentScope(tvm.createVirtualMachine(library.device));
    if (library.onGpu) {
      await tvm.asyncLoadWebGPUPipelines(library.machine.getInternalModule());
    }
    return library;
  }

  constructor(tvm, metadata) {
    this.tvm = tvm;
    this.metadata = metadata;
    this.onGpu = metadata.target.kind === "webgpu";
    tvm.beginScope();
    this.cpu = tvm.cpu();
    this.device = this.onGpu ? tvm.webgpu() : this.cpu;
  }

  async startGpu() {
    let found;
    try {
      found = await tvmjs.detectGPUDevice();
    } catch (error) {
      throw new DeviceError(`this library runs on a GPU: ${error.message}`);
    }
    if (!found) throw new DeviceError("this library runs on a GPU, and there is no WebGPU here");
    for (const feature of this.metadata.target.arch) {
      if (feature !== "wgsl" && !found.device.features.has(feature)) {
        throw new DeviceError(
          `this library needs WebGPU's feature ${feature}, which this GPU lacks: compile the model ` +
            "with a float32 preset, such as q4f32_1, or with --device wasm",
        );
      }
    }
    this.tvm.initWebGPU(found.device);
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

function readMetadata(tvm) {
  let text;
  try {
    // The machine's byte code returns the text; no code of the model runs for it.
    text = tvm.createVirtualMachine(tvm.cpu()).getFunction("_metadata")();
  } catch (error) {
    throw new LibraryError(`this is no library that relaxlm compiled: ${error.message}`);
  }
  const metadata = JSON.parse(text);
  if (metadata.contract !== CONTRACT) {
    throw new LibraryError(
      `the library follows contract ${metadata.contract} (made by relaxlm ` +
        `${metadata.versions?.relaxlm}), this driver expects ${CONTRACT}; compile it again`,
    );
  }
  if (!(metadata.target.kind in DEVICES)) {
    throw new LibraryError(`the library was compiled for ${metadata.target.kind}, not for browsers`);
  }
  if (metadata.model_task !== "chat") {
    throw new LibraryError(`the library is for ${metadata.model_task}; this driver chats`);
  }
  if (metadata.state.tensors.length) {
    throw new LibraryError(
      `${metadata.model_type} has recurrent layers, which this driver does not run yet; use Python`,
    );
  }
  return metadata;
}
