// Serves this folder, and a bundle under bundle/, on this machine only: node serve.mjs BUNDLE [PORT]
// The two headers let the page use threads: browsers give them to pages that are isolated from other origins.

import { createReadStream } from "node:fs";
import { realpath, stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, sep } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".json": "application/json; charset=utf-8",
  ".wasm": "application/wasm",
};
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cache-Control": "no-cache",
};

/** The file behind a path of the address, or null where there is none inside the folders that are served. */
async function find(path, bundle) {
  const inBundle = path.startsWith("/bundle/");
  const root = await realpath(inBundle ? bundle : HERE);
  const name = inBundle ? path.slice("/bundle/".length) : path.slice(1) || "index.html";
  try {
    const file = await realpath(join(root, name));
    const found = await stat(file);
    return file.startsWith(root.endsWith(sep) ? root : root + sep) && found.isFile() ? { file, size: found.size } : null;
  } catch {
    return null;
  }
}

/** A server for the page and one bundle; `port` 0 takes any that is free. */
export function serve(bundle, port) {
  const server = createServer(async (request, response) => {
    let path = "";
    try {
      path = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    } catch {
      // an address that is none is not found
    }
    const found = path.includes("\0") ? null : await find(path, bundle);
    if (!found) return response.writeHead(404, HEADERS).end("not found\n");
    const type = TYPES[extname(found.file)] ?? "application/octet-stream";
    response.writeHead(200, { ...HEADERS, "Content-Type": type, "Content-Length": found.size });
    if (request.method === "HEAD") return response.end();
    return createReadStream(found.file).pipe(response);
  });
  return new Promise((then, fail) => server.on("error", fail).listen(port, "127.0.0.1", () => then(server)));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [bundle, port = "8000"] = process.argv.slice(2);
  const manifest = bundle && (await stat(join(bundle, "manifest.json")).catch(() => null));
  if (!manifest) {
    console.error("usage: node serve.mjs BUNDLE [PORT], with the folder that `satchel export` wrote");
    process.exit(2);
  }
  const server = await serve(bundle, Number(port));
  console.log(`http://localhost:${server.address().port}/`);
}
