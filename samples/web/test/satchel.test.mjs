// satchel.js over a stand-in for ONNX Runtime, and tokenizer.js: npm test, or node --test test/satchel.test.mjs (nothing to install)

import assert from "node:assert/strict";
import { test } from "node:test";
import { Bundle, checkManifest, chunks, largest, openBundle } from "../satchel.js";
import { IncrementalDetokenizer, allNumerals, checkTokenizer, openTokenizer } from "../tokenizer.js";

const LAYER = { kv_heads: 2, key_dim: 3, value_dim: 5, past_key: "pk", past_value: "pv", present_key: "k", present_value: "v" };
const MANIFEST = {
  format: "satchel-bundle",
  version: 3,
  target: "cpu",
  model: { vocab_size: 10, max_context: 600, eos_token_ids: [9] },
  kv_cache: { mode: "shared", dtype: "float32", layers: [LAYER] },
  graphs: {
    prefill: { file: "prefill.onnx", session: { "session.a": "1" }, session_of: null },
    decode: { file: "decode.onnx", session: {}, session_of: null },
  },
};

class Tensor {
  constructor(type, data, dims) {
    Object.assign(this, { type, data, dims });
  }
}

/** Sessions whose next token is the last one plus one; they record what they were fed. */
function standIn() {
  const runs = [];
  const session = (name) => ({
    async run(feeds) {
      runs.push({ name, feeds });
      const logits = new Float32Array(10);
      logits[Number(feeds.input_ids.data.at(-1)) + 1] = 1;
      return { logits: { data: logits }, k: `k${runs.length}`, v: `v${runs.length}` };
    },
  });
  const created = [];
  const create = async (content, options) => {
    created.push({ content, options });
    return session(new TextDecoder().decode(content));
  };
  return { ort: { Tensor, InferenceSession: { create } }, runs, created };
}

const read = (manifest) => async (name) => new TextEncoder().encode(name === "manifest.json" ? JSON.stringify(manifest) : name);

async function all(tokens) {
  const found = [];
  for await (const token of tokens) found.push(token);
  return found;
}

test("prefill takes the prompt, decode each token, and outputs become the next past", async () => {
  const { ort, runs } = standIn();
  const bundle = await openBundle(ort, read(MANIFEST));
  assert.deepEqual(await all(bundle.generate([4, 2], 3)), [3, 4, 5]);
  assert.deepEqual(runs.map((run) => run.name), ["prefill.onnx", "decode.onnx", "decode.onnx"]);
  assert.deepEqual(runs.map((run) => [...run.feeds.input_ids.data]), [[4n, 2n], [3n], [4n]]);
  assert.deepEqual(runs.map((run) => run.feeds.attention_mask.dims), [[1, 2], [1, 3], [1, 4]]);
  assert.ok(runs.every((run) => run.feeds.attention_mask.data.every((one) => one === 1n)));
  assert.deepEqual(runs[0].feeds.pk.dims, [1, 2, 5, 3]);
  assert.deepEqual(runs[0].feeds.pv.dims, [1, 2, 5, 5]);
  assert.ok(runs[0].feeds.pk.data.every((number) => number === 0));
  assert.deepEqual(runs.slice(1).map((run) => [run.feeds.pk, run.feeds.pv]), [["k1", "v1"], ["k2", "v2"]]);
});

test("states begin as zeros, outputs become the next ones, and a text that is fed again begins anew", async () => {
  const { ort, runs } = standIn();
  const states = [{ layer: 1, kind: "conv", dtype: "float32", shape: [3, 4], past: "ps", present: "k" }];
  const bundle = await openBundle(ort, read({ ...MANIFEST, states, model: { ...MANIFEST.model, rotary_border: 3 } }));
  await all(bundle.generate([1, 2], 4));
  const zeros = (run) => run.feeds.ps.data?.every((number) => number === 0) && run.feeds.ps.dims.join() === "1,3,4";
  assert.deepEqual(runs.map((run) => (zeros(run) ? "zeros" : run.feeds.ps)), ["zeros", "k1", "zeros", "k3"]);
});

test("an end token ends, and is not given out", async () => {
  const bundle = await openBundle(standIn().ort, read(MANIFEST));
  assert.deepEqual(await all(bundle.generate([6], 8)), [7, 8]);
});

test("choose takes the place of the largest", async () => {
  const { ort, runs } = standIn();
  const bundle = await openBundle(ort, read(MANIFEST));
  assert.deepEqual(await all(bundle.generate([1], 2, () => 5)), [5, 5]);
  assert.deepEqual([...runs[1].feeds.input_ids.data], [5n]);
});

test("the session entries of the bundle, the weights and own options reach ONNX Runtime", async () => {
  const { ort, created } = standIn();
  await openBundle(ort, read(MANIFEST), { executionProviders: ["wasm"], extra: { "session.b": "2" } });
  assert.deepEqual(created[0].options.extra, { "session.a": "1", "session.b": "2" });
  assert.deepEqual(created[1].options.executionProviders, ["wasm"]);
  assert.equal(created[0].options.externalData[0].path, "weights.bin");
});

test("a graph that shares prefill's session is not opened", async () => {
  const decode = { ...MANIFEST.graphs.decode, session_of: "prefill" };
  const { ort, created } = standIn();
  const bundle = await openBundle(ort, read({ ...MANIFEST, graphs: { ...MANIFEST.graphs, decode } }));
  assert.equal(created.length, 1);
  assert.equal(bundle.decode, bundle.prefill);
});

test("a long prompt goes in parts, whose masks count all tokens so far", async () => {
  const { ort, runs } = standIn();
  const bundle = await openBundle(ort, read(MANIFEST));
  await all(bundle.generate(new Array(300).fill(1), 1));
  assert.deepEqual(runs.map((run) => [run.feeds.input_ids.dims[1], run.feeds.attention_mask.dims[1]]), [[256, 256], [44, 300]]);
});

test("where long texts are rotated otherwise, they go in one run, and a text that becomes one is fed again", async () => {
  const { ort, runs } = standIn();
  const model = { ...MANIFEST.model, rotary_border: 280 };
  const bundle = await openBundle(ort, read({ ...MANIFEST, model }));
  const spans = () => runs.splice(0).map((run) => [run.name, run.feeds.input_ids.dims[1], run.feeds.attention_mask.dims[1]]);
  await all(bundle.generate(new Array(300).fill(1), 1));
  assert.deepEqual(spans(), [["prefill.onnx", 300, 300]]);
  await all(bundle.generate(new Array(279).fill(1), 4));
  const whole = [["decode.onnx", 1, 280], ["prefill.onnx", 281, 281], ["decode.onnx", 1, 282]];
  assert.deepEqual(spans(), [["prefill.onnx", 256, 256], ["prefill.onnx", 23, 279], ...whole]);
});

test("no part is one token alone", () => {
  assert.deepEqual(chunks(0), []);
  assert.deepEqual(chunks(1), [[0, 1]]);
  assert.deepEqual(chunks(256), [[0, 256]]);
  assert.deepEqual(chunks(257), [[0, 254], [254, 257]]);
  assert.deepEqual(chunks(513), [[0, 256], [256, 510], [510, 513]]);
});

test("what cannot be run is refused with a reason", async () => {
  assert.throws(() => checkManifest({ ...MANIFEST, format: "other" }), /not that of a satchel bundle/);
  assert.throws(() => checkManifest({ ...MANIFEST, version: 4 }), /version 4/);
  assert.throws(() => checkManifest({ ...MANIFEST, target: "cuda" }), /for cuda/);
  assert.throws(() => checkManifest({ ...MANIFEST, kv_cache: { mode: "shared", dtype: "float16" } }), /target cpu/);
  const bundle = new Bundle(standIn().ort, MANIFEST, null, null);
  await assert.rejects(all(bundle.generate([], 1)), /no tokens/);
  await assert.rejects(all(bundle.generate([10], 1)), /outside 0 to 9/);
  await assert.rejects(all(bundle.generate([1.5], 1)), /outside 0 to 9/);
  await assert.rejects(all(bundle.generate([1], 600)), /do not fit/);
});

test("the largest is the first of several", () => {
  assert.equal(largest(new Float32Array([-3, 2, 2, 1])), 1);
});

test("a tokenizer that encodes otherwise is refused", () => {
  const manifest = { tokenizer: { corpus: [{ text: "ab", ids: [1, 2] }] } };
  checkTokenizer(manifest, () => [1, 2]);
  assert.throws(() => checkTokenizer(manifest, () => [1, 3]), /"ab"/);
});

test("a bundle without a tokenizer.json is refused", async () => {
  await assert.rejects(openTokenizer(null, { tokenizer: null }), /no tokenizer.json/);
  await assert.rejects(openTokenizer(null, { tokenizer: { kind: "sentencepiece" } }), /no tokenizer.json/);
});

test("digits are all numerals", () => {
  const split = (Regex) => ({ type: "Split", pattern: { Regex }, behavior: "Isolated", invert: false });
  const before = { pre: [{ type: "Digits", individual_digits: true }, { type: "Digits", individual_digits: false }], n: null };
  assert.deepEqual(allNumerals(before), { pre: [split("\\p{N}"), split("\\p{N}+")], n: null });
  assert.deepEqual(allNumerals({ vocab: { type: 1, Digits: 2 } }), { vocab: { type: 1, Digits: 2 } });
});

test("text comes in whole characters", () => {
  const bytes = new TextEncoder().encode("aé");
  const stream = new IncrementalDetokenizer((ids) => new TextDecoder().decode(Uint8Array.from(ids)));
  assert.deepEqual([...bytes].map((byte) => stream.push(byte)), ["a", "", "é"]);
  assert.equal(stream.push(bytes[1]), "");
  assert.equal(stream.end(), "\uFFFD");
});
