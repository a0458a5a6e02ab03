// Colours for code: a line and the state it begins in -> [[class or null, text], ...] and the
// state of the next line. Comments, strings, numbers, keywords: enough to read by, for languages
// that share their lexical habits. A language that is not here stays plain.

const C_WORDS =
  "abstract as async await bool boolean break byte case catch char class const constexpr continue " +
  "default defer delete do double else enum export extends extern false final finally float fn for " +
  "from func function get go goto if impl implements import in include instanceof int interface " +
  "let long loop match mod module mut namespace new nil null nullptr of operator override package " +
  "private protected pub public ref return self set short signed sizeof static string struct super " +
  "switch template this throw throws trait true try type typedef typename typeof undefined union " +
  "unsigned use using val var virtual void volatile when where while with yield";
const PYTHON_WORDS =
  "and as assert async await break case class continue def del elif else except False finally for " +
  "from global if import in is lambda match None nonlocal not or pass raise return self True try " +
  "while with yield";
const SHELL_WORDS =
  "alias break case cd do done echo elif else esac exit export fi for function if in local read " +
  "return set shift source then until unset while";
const SQL_WORDS =
  "add all alter and as asc begin between by case check column commit constraint create default " +
  "delete desc distinct drop else end exists false foreign from full group having if in index inner " +
  "insert into is join key left like limit not null on or order outer primary references right " +
  "rollback select set table then true union unique update using values view when where with";
const OTHER_WORDS =
  "and begin break case class def do else elsif end ensure false for function if in local module " +
  "next nil not or repeat require rescue return self then true unless until when while yield";

const QUOTES = ['"', "'"];
const C = { line: ["//"], block: ["/*", "*/"], quotes: [...QUOTES, "`"], words: set(C_WORDS) };
const PYTHON = { line: ["#"], triple: true, quotes: QUOTES, words: set(PYTHON_WORDS) };
const SHELL = { line: ["#"], quotes: QUOTES, words: set(SHELL_WORDS) };
const SQL = {
  line: ["--"], block: ["/*", "*/"], quotes: QUOTES, words: set(SQL_WORDS), anyCase: true,
};
const DATA = { line: ["#"], quotes: QUOTES, words: set("true false null yes no on off") };
const CSS = { line: [], block: ["/*", "*/"], quotes: QUOTES, words: set("important from to") };
const MARKUP = { line: [], block: ["<!--", "-->"], quotes: QUOTES, words: set(""), tags: true };
const OTHER = { line: ["#", "--"], quotes: QUOTES, words: set(OTHER_WORDS) };

const LANGUAGES = new Map([
  ...names(C, "c h cc cpp c++ cs csharp cuda dart go golang java javascript js jsx json5 kotlin kt"),
  ...names(C, "mjs objc php proto rs rust scala swift ts tsx typescript wgsl zig json jsonc jsonl"),
  ...names(PYTHON, "py python python3 pyi pycon gdscript"),
  ...names(SHELL, "bash sh shell zsh fish console terminal dockerfile makefile make powershell ps1"),
  ...names(SQL, "sql mysql postgres postgresql sqlite plsql"),
  ...names(DATA, "yaml yml toml ini conf cfg properties env"),
  ...names(CSS, "css scss less"),
  ...names(MARKUP, "html xml svg xhtml vue"),
  ...names(OTHER, "ruby rb lua julia jl r perl elixir ex haskell hs nim"),
]);

const WORD = /[A-Za-z_$][\w$]*/y;
const NUMBER = /(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)[a-zA-Z%]*/y;
const TAG = /<\/?[A-Za-z][\w:-]*|\/?>/y;
const SPACE = /\s+/y;
const LONGEST_LINE = 2000; // longer ones stay plain

export function knowsLanguage(language) {
  return LANGUAGES.has(language.toLowerCase());
}

/** `state` is "" or what ends the comment or string that the line begins inside. */
export function colorLine(line, language, state) {
  const rules = LANGUAGES.get(language.toLowerCase());
  if (!rules || line.length > LONGEST_LINE) return { parts: [[null, line]], state: "" };
  const parts = [];
  let at = 0;
  if (state) {
    const end = closing(line, 0, state);
    const kind = state === rules.block?.[1] ? "comment" : "string";
    if (end < 0) return { parts: [[kind, line]], state };
    parts.push([kind, line.slice(0, end)]);
    at = end;
  }
  while (at < line.length) {
    const found = token(line, at, rules);
    add(parts, found.kind, line.slice(at, found.end));
    if (found.state) return { parts, state: found.state };
    at = found.end;
  }
  return { parts, state: "" };
}

function token(line, at, rules) {
  const char = line[at];
  const block = rules.block;
  if (block && line.startsWith(block[0], at)) {
    const end = closing(line, at + block[0].length, block[1]);
    return end < 0
      ? { kind: "comment", end: line.length, state: block[1] }
      : { kind: "comment", end };
  }
  if (rules.line.some((mark) => line.startsWith(mark, at)) && startsComment(line, at)) {
    return { kind: "comment", end: line.length };
  }
  if (rules.quotes.includes(char)) return quoted(line, at, rules);
  if (rules.tags) {
    const end = matchEnd(TAG, line, at);
    if (end) return { kind: "keyword", end };
  }
  const number = /\d/.test(char) ? matchEnd(NUMBER, line, at) : 0;
  if (number) return { kind: "number", end: number };
  const word = matchEnd(WORD, line, at);
  if (word) return { kind: wordKind(line, at, word, rules), end: word };
  return { kind: null, end: matchEnd(SPACE, line, at) || at + 1 };
}

function quoted(line, at, rules) {
  const quote = line[at];
  const triple = rules.triple && line.startsWith(quote.repeat(3), at);
  const mark = triple ? quote.repeat(3) : quote;
  const end = closing(line, at + mark.length, mark);
  if (end >= 0) return { kind: "string", end };
  if (triple || quote === "`") return { kind: "string", end: line.length, state: mark };
  // An apostrophe or a lifetime, not a string.
  return { kind: quote === "'" ? null : "string", end: quote === "'" ? at + 1 : line.length };
}

function wordKind(line, at, end, rules) {
  const word = line.slice(at, end);
  if (rules.words.has(rules.anyCase ? word.toLowerCase() : word)) return "keyword";
  if (rules.tags) return line[end] === "=" ? "name" : null;
  return line[end] === "(" ? "name" : null;
}

/** Behind the closing mark, backslashes skipped; -1 if it is not on this line. */
function closing(line, at, mark) {
  for (let i = at; i < line.length; i += 1) {
    if (line[i] === "\\") i += 1;
    else if (line.startsWith(mark, i)) return i + mark.length;
  }
  return -1;
}

/** "#" is a comment at the start or after a space: not in $# or a colour. */
function startsComment(line, at) {
  return line[at] !== "#" || at === 0 || /\s/.test(line[at - 1]);
}

function matchEnd(pattern, line, at) {
  pattern.lastIndex = at;
  return pattern.test(line) ? pattern.lastIndex : 0;
}

function add(parts, kind, text) {
  const last = parts[parts.length - 1];
  if (last && last[0] === kind) last[1] += text;
  else parts.push([kind, text]);
}

function set(words) {
  return new Set(words.split(" ").filter(Boolean));
}

function names(rules, spellings) {
  return spellings.split(" ").map((name) => [name, rules]);
}
