// The page in a headless Chromium: node test/browser.mjs BUNDLE REQUEST, with REQUEST a JSON object of `prompt` (a text),
// `ids` (its tokens) and `tokens` (what follows). Prints one JSON object; exits with 3 where no Chromium starts.
// SATCHEL_CHROMIUM names a browser to use in place of the one that @sparticuz/chromium carries.

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";
import { serve } from "../serve.mjs";

const [folder, request] = process.argv.slice(2);
const { prompt, ids, tokens } = JSON.parse(request);

async function launch() {
  try {
    const executablePath = process.env.SATCHEL_CHROMIUM ?? (await chromium.executablePath());
    const args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-zygote"];
    return await puppeteer.launch({ executablePath, args, headless: "shell", protocolTimeout: 600_000 });
  } catch (error) {
    console.error(`no Chromium starts here: ${error.message.split("\n")[0]}`);
    process.exit(3);
  }
}

const browser = await launch();
const server = await serve(folder, 0);
try {
  const page = await browser.newPage();
  const origin = `http://localhost:${server.address().port}`;
  const [elsewhere, errors] = [[], []];
  page.on("request", (sent) => /^(data|blob):/.test(sent.url()) || sent.url().startsWith(origin) || elsewhere.push(sent.url()));
  page.on("pageerror", (error) => errors.push(error.message));
  await page.goto(origin);
  await page.evaluate(() => globalThis.opened.then(() => null));
  const ready = await page.$eval("#status", (element) => element.textContent);
  await page.$eval("#prompt", (box, value) => (box.value = value), prompt);
  const found = await page.evaluate(async (ids, tokens) => {
    const { follow } = await import("./test/follow.mjs");
    const { bundle, tokenizer } = await globalThis.opened;
    return { encoded: tokenizer.encode(document.getElementById("prompt").value).ids, ...(await follow(bundle, ids, tokens)) };
  }, ids, tokens);
  await page.$eval("#limit", (box, value) => (box.value = value), tokens.length);
  await page.click("#go");
  await page.waitForFunction(() => !document.getElementById("go").disabled, { timeout: 600_000 });
  const text = await page.$eval("#text", (element) => element.textContent);
  const status = await page.$eval("#status", (element) => element.textContent);
  console.log(JSON.stringify({ ...found, text, status, ready, elsewhere, errors, version: await browser.version() }));
} finally {
  await browser.close();
  server.close();
}
