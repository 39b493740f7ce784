// SigLIP's tokenizer: canonical text, characters made uniform, then the pieces of the likeliest cut.
// It gives what siglip_lib.Tokenizer does; SentencePiece's own arithmetic, in 32 bits, decides between near cuts.

const EOS = 1, UNKNOWN = 2;
const SPACE = "▁"; // a word begins
const UNKNOWN_PENALTY = 10; // below the unlikeliest piece, as in SentencePiece

/** Lower the case, drop ASCII punctuation, and leave one space between words and none around them. */
export function canonicalize(text) {
  const lower = text.toLowerCase().replace(/[!-/:-@[-`{-~]/g, "");
  // the white space of Python's str.split
  return lower.split(/[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/).filter(Boolean).join(" ");
}

export class Tokenizer {
  /** @param {{pieces: ([string, number] | null)[], characters: number[]}} model as demo.py writes it */
  constructor({ pieces, characters }, context) {
    this.context = context;
    this.pieces = new Map();
    pieces.forEach((piece, id) => piece && this.pieces.set(piece[0], { id, score: Math.fround(piece[1]) }));
    const scores = [...this.pieces.values()].map(({ score }) => score);
    this.unknownScore = Math.fround(Math.min(...scores) - UNKNOWN_PENALTY);
    this.longest = Math.max(...[...this.pieces.keys()].map((piece) => [...piece].length));
    this.characters = new CharacterTable(Uint8Array.from(characters));
  }

  /** Token ids of a text, filled up with </s> to the context's length. */
  encode(text) {
    const ids = this.cut(this.characters.normalize(canonicalize(text))).slice(0, this.context - 1);
    return [...ids, ...Array(this.context - ids.length).fill(EOS)];
  }

  /** The ids of the cut into pieces whose scores have the largest sum. */
  cut(text) {
    const characters = [...text], count = characters.length;
    const best = Array.from({ length: count + 1 }, () => ({ from: -1, score: 0, id: UNKNOWN }));
    const improve = (from, to, score, id) => {
      const sum = Math.fround(score + best[from].score);
      if (best[to].from < 0 || sum > best[to].score) best[to] = { from, score: sum, id };
    };
    for (let from = 0; from < count; from++) {
      let piece = "";
      for (let to = from + 1; to <= Math.min(count, from + this.longest); to++) {
        piece += characters[to - 1];
        const known = this.pieces.get(piece);
        if (known) improve(from, to, known.score, known.id);
      }
      if (!this.pieces.has(characters[from])) improve(from, from + 1, this.unknownScore, UNKNOWN);
    }
    const ids = [];
    for (let to = count; to > 0; to = best[to].from) {
      if (best[to].id !== UNKNOWN || ids[0] !== UNKNOWN) ids.unshift(best[to].id); // unknown ones in a row are one
    }
    return ids;
  }
}

/** What SentencePiece writes for which characters: a double-array trie over bytes, then the replacements. */
class CharacterTable {
  constructor(data) {
    const view = new DataView(data.buffer, data.byteOffset), size = view.getUint32(0, true);
    this.units = Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this.replacements = data.subarray(4 + size);
  }

  /** The text with a space before it and one between words, all written as ▁. */
  normalize(text) {
    const data = new TextEncoder().encode(text);
    let written = "";
    for (let place = 0; place < data.length; ) {
      const { size, text: part } = this.prefix(data, place);
      // of spaces in a row, one
      written += /^ /.test(part) && /(^| )$/.test(written) ? part.replace(/^ +/, "") : part;
      place += size;
    }
    written = written.replace(/ +$/, "");
    return written && SPACE + written.replaceAll(" ", SPACE);
  }

  /** The replacement of the longest sequence that has one, or else the next character. */
  prefix(data, start) {
    let found = null;
    let node = offset(this.units[0]);
    for (let place = start; place < data.length; place++) {
      node ^= data[place];
      const unit = this.units[node];
      if (unit === undefined || (unit & 0x800000ff) !== data[place]) break;
      node ^= offset(unit);
      if ((unit >>> 8) & 1) found = { size: place + 1 - start, at: this.units[node] & 0x7fffffff };
    }
    if (found) {
      const end = this.replacements.indexOf(0, found.at);
      return { size: found.size, text: new TextDecoder().decode(this.replacements.subarray(found.at, end)) };
    }
    const first = data[start], size = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    return { size, text: new TextDecoder("utf-8", { ignoreBOM: true }).decode(data.subarray(start, start + size)) };
  }
}

function offset(unit) {
  return (unit >>> 10) << ((unit & 0x200) >>> 6);
}
