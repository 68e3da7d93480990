// Runs a bundle: opens its graphs, keeps the KV cache, steps through prefill and decode. It imports nothing: it is given
// ONNX Runtime (onnxruntime-web, or onnxruntime-node) and a function that reads a file, and runs in a browser and in Node.

const VERSIONS = [3];
const CHUNK = 256; // tokens of a prompt in one run
const ARRAYS = { float32: Float32Array, int8: Int8Array };

/**
 * Open a bundle.
 *
 * @param ort ONNX Runtime's module.
 * @param read `async (name) => Uint8Array`, the content of a file of the bundle.
 * @param options Session options of ONNX Runtime, over those that the bundle asks for.
 * @returns A Bundle. Throws an Error that says what is wrong.
 */
export async function openBundle(ort, read, options = {}) {
  const manifest = checkManifest(JSON.parse(new TextDecoder().decode(await read("manifest.json"))));
  const weights = await read("weights.bin");
  const open = async (phase) => {
    const { file, session } = manifest.graphs[phase];
    return ort.InferenceSession.create(await read(file), {
      externalData: [{ path: "weights.bin", data: weights }],
      logSeverityLevel: 3, // errors: some kernels warn each time that past and present are not the same memory
      ...options,
      extra: { ...session, ...options.extra },
    });
  };
  const prefill = await open("prefill");
  const decode = manifest.graphs.decode.session_of === "prefill" ? prefill : await open("decode");
  return new Bundle(ort, manifest, prefill, decode);
}

/** The manifest, if this file can run what it describes. */
export function checkManifest(manifest) {
  if (manifest.format !== "satchel-bundle") throw new Error("manifest.json is not that of a satchel bundle");
  if (!VERSIONS.includes(manifest.version))
    throw new Error(`the bundle has version ${manifest.version}; this page reads ${VERSIONS.join(" and ")}`);
  if (manifest.target !== "cpu" || !(manifest.kv_cache.dtype in ARRAYS))
    throw new Error(`the bundle is for ${manifest.target}: export it for the target cpu`);
  return manifest;
}

export class Bundle {
  constructor(ort, manifest, prefill, decode) {
    Object.assign(this, { ort, manifest, prefill, decode });
  }

  /**
   * The tokens that follow `ids`, one at a time as they are found, until an end token, which is not given out.
   *
   * @param ids Token ids of the prompt, at least one.
   * @param limit The most new tokens.
   * @param choose From logits, a Float32Array [vocabulary], to a token id.
   */
  async *generate(ids, limit, choose = largest) {
    const { max_context, vocab_size, eos_token_ids } = this.manifest.model;
    if (!ids.length) throw new Error("the prompt has no tokens");
    if (ids.some((id) => !(Number.isInteger(id) && id >= 0 && id < vocab_size)))
      throw new Error(`a token id of the prompt is outside 0 to ${vocab_size - 1}`);
    if (ids.length + limit > max_context)
      throw new Error(`${ids.length} + ${limit} tokens do not fit the bundle's ${max_context} positions`);
    const state = { total: 0, cache: this.emptyCache(ids.length + limit) };
    const text = [...ids];
    let logits = await this.feed(state, text);
    for (let made = 0; made < limit; made++) {
      const token = choose(logits);
      if (eos_token_ids.includes(token)) return;
      yield token;
      text.push(token);
      if (made + 1 === limit) return;
      const crosses = state.total === this.manifest.model.rotary_border;
      logits = crosses ? await this.feed(state, text) : await this.step(this.decode, state, [token]);
    }
  }

  /** Feed a text from its beginning on. Beyond `rotary_border` it goes in one run, whose mask then says that it is long. */
  async feed(state, ids) {
    const whole = ids.length > (this.manifest.model.rotary_border ?? Infinity);
    state.total = 0;
    Object.assign(state.cache, this.emptyStates());
    let logits;
    for (const [start, end] of chunks(ids.length, whole ? ids.length : CHUNK))
      logits = await this.step(this.prefill, state, ids.slice(start, end));
    return logits;
  }

  /** Feed tokens after those that the state holds. Returns the logits of the last one, [vocabulary]. */
  async step(session, state, ids) {
    const { Tensor } = this.ort;
    const total = state.total + ids.length;
    const outputs = await session.run({
      ...state.cache,
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    });
    for (const layer of this.manifest.kv_cache.layers) {
      state.cache[layer.past_key] = outputs[layer.present_key];
      state.cache[layer.past_value] = outputs[layer.present_value];
    }
    for (const { past, present } of this.manifest.states ?? []) state.cache[past] = outputs[present];
    state.total = total;
    return outputs.logits.data;
  }

  /** A KV cache of zeros, by graph input, each [1, kv_heads, capacity, key_dim or value_dim]. */
  emptyCache(capacity) {
    const { dtype, layers } = this.manifest.kv_cache;
    const cache = {};
    for (const { kv_heads, key_dim, value_dim, past_key, past_value } of layers)
      for (const [name, width] of [[past_key, key_dim], [past_value, value_dim]]) {
        const zeros = new ARRAYS[dtype](kv_heads * capacity * width);
        cache[name] = new this.ort.Tensor(dtype, zeros, [1, kv_heads, capacity, width]);
      }
    return cache;
  }

  /** The states before the first token, zeros, by graph input, each [1, ...shape]. */
  emptyStates() {
    const states = {};
    for (const { past, dtype, shape } of this.manifest.states ?? []) {
      const zeros = new ARRAYS[dtype](shape.reduce((product, size) => product * size, 1));
      states[past] = new this.ort.Tensor(dtype, zeros, [1, ...shape]);
    }
    return states;
  }
}

/** The index of the largest number, the first of several. */
export function largest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

/** Spans [start, end] of up to `size` tokens; the last has more than one, as some kernels take tokens in pairs. */
export function chunks(total, size = CHUNK) {
  const spans = [];
  for (let start = 0; start < total; ) {
    const end = Math.min(start + (total - start === size + 1 && size > 3 ? size - 2 : size), total);
    spans.push([start, end]);
    start = end;
  }
  return spans;
}
