// A bundle's tokenizer: from text to token ids, and text out of tokens as they come. Imports nothing.

/**
 * @param Tokenizer The class of @huggingface/tokenizers.
 * @param readJson `async (name) => object`, the content of a JSON file of the bundle.
 * @returns The tokenizer. Throws an Error where it is not the one that the model was made with.
 */
export async function openTokenizer(Tokenizer, manifest, readJson) {
  if (manifest.tokenizer?.kind !== "tokenizer.json") throw new Error("the bundle has no tokenizer.json");
  const config = "tokenizer_config.json" in manifest.files ? await readJson("tokenizer_config.json") : {};
  const tokenizer = new Tokenizer(allNumerals(await readJson(manifest.tokenizer.file)), config);
  checkTokenizer(manifest, (text) => tokenizer.encode(text).ids);
  return tokenizer;
}

/** The same tokenizer, whose step `Digits` is written so that it splits at all numerals: the library's knows 0 to 9. */
export function allNumerals(part) {
  if (Array.isArray(part)) return part.map(allNumerals);
  if (part === null || typeof part !== "object") return part;
  if (part.type !== "Digits" || !("individual_digits" in part))
    return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, allNumerals(value)]));
  const pattern = { Regex: part.individual_digits ? "\\p{N}" : "\\p{N}+" };
  return { type: "Split", pattern, behavior: "Isolated", invert: false };
}

/** Throws unless `encode`, from a text to ids, gives what the checkpoint's own tokenizer gave at export. */
export function checkTokenizer(manifest, encode) {
  for (const { text, ids } of manifest.tokenizer.corpus)
    if (JSON.stringify(encode(text)) !== JSON.stringify(ids))
      throw new Error(`this tokenizer encodes ${JSON.stringify(text)} otherwise than the model's own`);
}

/** Text of tokens as they come: `push` returns what is new, and holds back a character that is not whole yet. */
export class IncrementalDetokenizer {
  #ids = [];
  #shown = 0;

  /** @param decode From token ids to text. */
  constructor(decode) {
    this.decode = decode;
  }

  push(id) {
    this.#ids.push(id);
    return this.#beyond(this.decode(this.#ids).replace(/\uFFFD+$/, ""));
  }

  /** What was held back. */
  end() {
    return this.#beyond(this.decode(this.#ids));
  }

  #beyond(text) {
    const piece = text.slice(this.#shown);
    this.#shown = Math.max(this.#shown, text.length);
    return piece;
  }
}
