// A bundle in Node through onnxruntime-web's WebAssembly: node test/node.mjs BUNDLE IDS TOKENS (both JSON)

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web/wasm";
import { openBundle } from "../satchel.js";
import { follow } from "./follow.mjs";

const [folder, ids, tokens] = process.argv.slice(2);
ort.env.wasm.numThreads = 1; // its threads are workers that only a browser starts
const bundle = await openBundle(ort, (name) => readFile(join(folder, name)));
const greedy = [];
for await (const token of bundle.generate(JSON.parse(ids), JSON.parse(tokens).length)) greedy.push(token);
console.log(JSON.stringify({ greedy, ...(await follow(bundle, JSON.parse(ids), JSON.parse(tokens))) }));
