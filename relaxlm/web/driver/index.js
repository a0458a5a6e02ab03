export { ChatModule } from "./chat.js";
export { Embedder } from "./embedder.js";
export * from "./errors.js";
export { DiskFiles, forgetFiles, WebFiles } from "./files.js";
export { RemoteChat } from "./remote.js";
