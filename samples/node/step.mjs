// The graphs of a bundle in Node, by the steps of docs/graph-contract.md:
//
//     npm ci --ignore-scripts        (the script of onnxruntime-node fetches libraries for CUDA, which this does not use)
//     node step.mjs BUNDLE COUNT IDS
//
// IDS is a JSON list, the tokens of a prompt; prints a JSON list of up to COUNT tokens that follow.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import ort from "onnxruntime-node";

const [folder, count, prompt] = process.argv.slice(2);
const manifest = JSON.parse(await readFile(join(folder, "manifest.json"), "utf8"));

// 1. Sessions: one for both phases where the manifest says so.
const open = (graph) =>
  ort.InferenceSession.create(join(folder, graph.file), { extra: graph.session, logSeverityLevel: 3 });
const prefill = await open(manifest.graphs.prefill);
const decode = manifest.graphs.decode.session_of === "prefill" ? prefill : await open(manifest.graphs.decode);

// 2. The cache: buffers of zeros, the same as past (inputs) and as present (outputs).
let ids = JSON.parse(prompt);
const capacity = ids.length + Number(count);
const { dtype, layers } = manifest.kv_cache;
const [past, present] = [{}, {}];
const buffer = (heads, width) => {
  const zeros = new (dtype === "int8" ? Int8Array : Float32Array)(heads * capacity * width);
  return new ort.Tensor(dtype, zeros, [1, heads, capacity, width]);
};
for (const layer of layers) {
  past[layer.past_key] = present[layer.present_key] = buffer(layer.kv_heads, layer.key_dim);
  past[layer.past_value] = present[layer.present_value] = buffer(layer.kv_heads, layer.value_dim);
}
// States do not grow with the text, and have to be zeros before its first token.
for (const { past: input, present: output, dtype, shape } of manifest.states ?? []) {
  const zeros = new Float32Array(shape.reduce((product, size) => product * size, 1));
  past[input] = present[output] = new ort.Tensor(dtype, zeros, [1, ...shape]);
}

// 3. to 5. Prefill, then decode: the mask has a 1 for each token so far. A text that grows beyond `rotary_border` is fed
// again.
const tokens = [];
const text = [...ids];
for (let total = 0; tokens.length < Number(count); ) {
  const session = total === 0 ? prefill : decode;
  total += ids.length;
  const feeds = {
    ...past,
    input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
  };
  const { logits } = await session.run(feeds, { ...present, logits: null });
  const token = logits.data.reduce((best, logit, id) => (logit > logits.data[best] ? id : best), 0);
  if (manifest.model.eos_token_ids.includes(token)) break;
  tokens.push(token);
  text.push(token);
  ids = total === manifest.model.rotary_border ? [...text] : [token];
  if (ids.length > 1) {
    total = 0;
    for (const { past: input } of manifest.states ?? []) past[input].data.fill(0);
  }
}
console.log(JSON.stringify(tokens));
