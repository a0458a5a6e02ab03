// Stop strings in text that arrives piece by piece (relaxlm/runtime/stop.py).

/**
 * Passes text on up to the first stop string that is complete, and never a part of it. Text that
 * may be the beginning of one is held back until it has turned out to be one or not.
 */
export class StopStrings {
  constructor(stops) {
    this.stops = stops;
    this.held = "";
    this.stopped = false;
  }

  /** Adds a piece; returns the text to pass on. `stopped` says whether more may follow. */
  push(piece) {
    if (this.stopped) return "";
    const text = this.held + piece;
    let found = null;
    for (const stop of this.stops) {
      const start = text.indexOf(stop);
      if (start < 0) continue;
      const end = start + stop.length;
      // Of several that end with the same character, the longest.
      if (!found || end < found.end || (end === found.end && start < found.start)) {
        found = { start, end };
      }
    }
    if (found) {
      this.stopped = true;
      this.held = "";
      return text.slice(0, found.start);
    }
    const ready = text.length - this.possibleStart(text);
    this.held = text.slice(ready);
    return text.slice(0, ready);
  }

  /** The text held back, when no more will come. */
  flush() {
    const text = this.held;
    this.held = "";
    return text;
  }

  /** Length of the longest end of `text` that a stop string begins with. */
  possibleStart(text) {
    let longest = 0;
    for (const stop of this.stops) {
      for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
        if (text.endsWith(stop.slice(0, length))) longest = length;
      }
    }
    return longest;
  }
}
