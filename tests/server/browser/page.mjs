// The server's page in a headless Chromium: node page.mjs URL [PICTURE], run in samples/web, whose packages drive the browser.
// Prints one JSON object; exits with 3 where no Chromium starts. With PICTURE, only makes that screenshot of an answer.
// SATCHEL_CHROMIUM names a browser to use in place of the one that @sparticuz/chromium carries.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, picture] = process.argv.slice(2);
const packages = createRequire(`${process.cwd()}/package.json`);
const load = async (name) => (await import(pathToFileURL(packages.resolve(name)))).default;
const [chromium, puppeteer] = [await load("@sparticuz/chromium"), await load("puppeteer-core")];

async function launch() {
  try {
    const executablePath = process.env.SATCHEL_CHROMIUM ?? (await chromium.executablePath());
    const args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-zygote"];
    return await puppeteer.launch({ executablePath, args, headless: "shell", protocolTimeout: 120_000 });
  } catch (error) {
    console.error(`no Chromium starts here: ${error.message.split("\n")[0]}`);
    process.exit(3);
  }
}

const browser = await launch();
const found = {};
try {
  const page = await browser.newPage();
  const [elsewhere, errors, bodies] = [[], [], []];
  page.on("request", (sent) => {
    if (!sent.url().startsWith(url)) elsewhere.push(sent.url());
    if (sent.method() === "POST") bodies.push(JSON.parse(sent.postData()));
  });
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (told) => told.type() === "error" && !/favicon/.test(told.location().url) && errors.push(told.text()));
  const text = (selector) => page.$eval(selector, (element) => element.textContent);
  const idle = () => page.waitForFunction(() => document.getElementById("talk").getAttribute("aria-busy") === "false");
  const fill = (id, value) => page.$eval(id, (element, value) => (element.value = value), value);
  const color = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const send = async (question) => {
    await page.type("#text", question);
    await page.keyboard.press("Enter");
  };

  if (picture) {
    await page.setViewport({ width: 820, height: 600 });
    await page.goto(url);
    await page.waitForSelector("#model option");
    await send("What is the capital of Japan?");
    await page.waitForSelector(".assistant .said");
    await idle();
    await page.evaluate(() => (document.querySelectorAll("details")[1].open = true));
    await page.screenshot({ path: picture });
    await browser.close();
    process.exit(0);
  }

  await page.setViewport({ width: 360, height: 740 });
  await page.goto(url);
  await page.waitForSelector("#model option");
  found.focus = await page.evaluate(() => document.activeElement.id);
  await send("First question");
  await page.waitForSelector(".assistant .said");
  await idle();
  found.answer = await page.$eval(".assistant .said", (element) => element.innerHTML);
  found.title = await page.title();
  found.widths = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  found.figures = await text("#figures");
  await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
  found.about = await text("#about");
  found.openWidths = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  const tree = await page.accessibility.snapshot();
  const nodes = (node) => [node, ...(node.children ?? []).flatMap(nodes)];
  found.unnamed = nodes(tree).filter((node) => /button|textbox|combobox|spinbutton/.test(node.role) && !node.name).length;
  found.controls = nodes(tree).filter((node) => /button|textbox|combobox|spinbutton/.test(node.role)).length;
  await page.focus("#model");
  await page.keyboard.press("Tab");
  found.outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);

  await page.click("#again");
  await idle();
  found.regenerated = await page.$$eval(".turn", (turns) => turns.map((each) => each.className));
  await fill("#system", "Be brief.");
  await fill("#temperature", "0.5");
  await fill("#seed", "7");
  await send("Second question");
  await idle();
  found.bodies = bodies.slice();

  await fill("#temperature", "9");
  await send("Wrong setting");
  found.sentWrong = bodies.length - found.bodies.length;
  await fill("#temperature", "");
  await fill("#text", "");
  await fill("#max_tokens", "100000000000");
  await send("Refused");
  await page.waitForSelector('[role="alert"]');
  found.alert = await text('[role="alert"]');
  await fill("#max_tokens", "");

  found.light = await color();
  await page.select("#theme", "dark");
  found.dark = await color();
  await page.reload();
  found.darkAgain = await color();
  await page.waitForSelector("#model option");

  await send("slowly");
  await page.waitForFunction(() => document.querySelector(".assistant .said")?.textContent.length > 20);
  found.stopEnabled = await page.$eval("#stop", (button) => !button.disabled);
  await page.click("#stop");
  await idle();
  found.stopped = await text(".assistant .said");
  found.buttons = await page.$$eval("#send, #stop, #again", (buttons) => buttons.map((each) => each.disabled));
  await page.click("#new");
  found.cleared = await page.$$eval(".turn", (turns) => turns.length);
  console.log(JSON.stringify({ ...found, elsewhere, errors, version: await browser.version() }));
} finally {
  await browser.close();
}
