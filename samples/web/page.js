// The page: a prompt box, streamed text, tokens per second. The bundle's address is `?bundle=`, by default bundle/.

import * as ort from "onnxruntime-web/wasm";
import { Tokenizer } from "@huggingface/tokenizers";
import { openBundle } from "./satchel.js";
import { openTokenizer, IncrementalDetokenizer } from "./tokenizer.js";

const [form, prompt, limit, go, stop, text, status] = ["form", "prompt", "limit", "go", "stop", "text", "status"].map(
  (id) => document.getElementById(id),
);
const folder = new URL(new URLSearchParams(location.search).get("bundle") ?? "bundle/", document.baseURI);
let stopped = false;

ort.env.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", document.baseURI).href;
ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;

/** The content of a file of the bundle; says how far it is. */
async function read(name) {
  const answer = await fetch(new URL(name, folder));
  if (!answer.ok) throw new Error(`${answer.url}: ${answer.status} ${answer.statusText}`);
  const size = Number(answer.headers.get("content-length"));
  if (!size) return new Uint8Array(await answer.arrayBuffer());
  const content = new Uint8Array(size);
  let got = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return content;
    content.set(value, got);
    got += value.length;
    status.textContent = `reading ${name}: ${(got / 1e6).toFixed(0)} of ${(size / 1e6).toFixed(0)} MB`;
  }
}

const readJson = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));

/** Continue the prompt, and show the text as it comes. */
async function generate({ bundle, tokenizer }, ids, most) {
  const stream = new IncrementalDetokenizer((part) => tokenizer.decode(part, { skip_special_tokens: true }));
  const begin = performance.now();
  const tokens = [];
  let first = begin;
  for await (const token of bundle.generate(ids, most)) {
    if (!tokens.length) first = performance.now();
    tokens.push(token);
    text.append(stream.push(token));
    await new Promise((then) => setTimeout(then)); // let the page draw
    if (stopped) break;
  }
  text.append(stream.end());
  const rate = (count, from, to) => (count > 0 ? ((count * 1000) / (to - from)).toFixed(1) : "-");
  status.textContent =
    `prompt ${ids.length} tokens at ${rate(ids.length, begin, first)} tokens/s, ` +
    `new ${tokens.length} at ${rate(tokens.length - 1, first, performance.now())} tokens/s`;
  return tokens;
}

async function start() {
  const bundle = await openBundle(ort, read);
  const opened = { bundle, tokenizer: await openTokenizer(Tokenizer, bundle.manifest, readJson) };
  const { source, precision } = bundle.manifest;
  status.textContent = `${source.name}, ${precision}, ${ort.env.wasm.numThreads} threads: ready`;
  stop.addEventListener("click", () => (stopped = true));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    [go.disabled, stop.disabled, stopped] = [true, false, false];
    const given = document.createElement("b");
    given.textContent = prompt.value;
    text.replaceChildren(given);
    try {
      await generate(opened, opened.tokenizer.encode(prompt.value).ids, Number(limit.value));
    } catch (error) {
      status.textContent = error.message;
    }
    [go.disabled, stop.disabled] = [false, true];
  });
  go.disabled = false;
  return opened;
}

/** For a console, and for tests: the opened bundle and its tokenizer. */
globalThis.opened = start();
globalThis.opened.catch((error) => (status.textContent = error.message));
