export { ChatModule } from "./chat.js";
export * from "./errors.js";
export { DiskFiles, forgetFiles, WebFiles } from "./files.js";
export { RemoteChat } from "./remote.js";
