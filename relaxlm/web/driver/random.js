// Random numbers as NumPy draws them, so that a seed gives the same reply here as in Python:
// PCG64 (XSL RR 128/64; O'Neill, "PCG", 2014) seeded by NumPy's SeedSequence.

const BITS_64 = (1n << 64n) - 1n;
const BITS_128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

const mul = (a, b) => Math.imul(a, b) >>> 0;
const folded = (x) => (x ^ (x >>> 16)) >>> 0;

/** A hash whose constants change with every word. */
function hasher(constant, multiplier) {
  return (word) => {
    word = (word ^ constant) >>> 0;
    constant = mul(constant, multiplier);
    return folded(mul(word, constant));
  };
}

const mixed = (x, y) => folded((mul(0xca01f9dd, x) - mul(0x4973f715, y)) >>> 0);

/** Eight uint32 of state, made of a list of whole numbers (BigInt, not negative). */
function seedWords(numbers) {
  const entropy = numbers.flatMap((number) => {
    const words = [];
    do {
      words.push(Number(number & 0xffffffffn));
      number >>= 32n;
    } while (number);
    return words;
  });
  const hash = hasher(0x43b0d7e5, 0x931e8875);
  const pool = Array.from({ length: 4 }, (_, i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from !== to) pool[to] = mixed(pool[to], hash(pool[from]));
    }
  }
  for (const word of entropy.slice(4)) {
    for (let to = 0; to < 4; to++) pool[to] = mixed(pool[to], hash(word));
  }
  const output = hasher(0x8b51f9dd, 0x58f38ded);
  return Array.from({ length: 8 }, (_, i) => output(pool[i % 4]));
}

/** Uniform numbers in [0, 1). */
export class Random {
  /** @param {number | bigint | null} seed a whole number; null for a new one each time */
  constructor(seed, choice = 0) {
    if (seed === null) seed = crypto.getRandomValues(new BigUint64Array(1))[0];
    const words = seedWords([BigInt.asUintN(64, BigInt(seed)), BigInt(choice)]).map(BigInt);
    const [a, b, c, d] = [0, 2, 4, 6].map((i) => words[i] | (words[i + 1] << 32n));
    this.increment = ((((c << 64n) | d) << 1n) | 1n) & BITS_128;
    this.state = this.increment;
    this.state = (this.state + ((a << 64n) | b)) & BITS_128;
    this.step();
  }

  step() {
    this.state = (this.state * MULTIPLIER + this.increment) & BITS_128;
  }

  uniform() {
    this.step();
    const folded = (this.state >> 64n) ^ (this.state & BITS_64);
    const turn = this.state >> 122n;
    const bits = ((folded >> turn) | (folded << (64n - turn))) & BITS_64;
    return Number(bits >> 11n) / 2 ** 53;
  }
}
