// Plays customers at the shop's page: node page.mjs URL FOLDER. It talks in lines: what it did, what it is told to do.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [url, folder, playwright, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const pages = {};
const errors = [];

async function open(name) {
  const page = await browser.newPage();
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(`${url}/?customer=${name}`);
  await page.getByText("connected", { exact: true }).waitFor({ timeout: 30000 });
  pages[name] = page;
}

async function rows(name) {
  return pages[name].$$eval("#orders tr", (found) => found.map((row) => [row.cells[1].textContent, row.className]));
}

const tasks = {
  open,
  rows,
  errors: async () => errors,
  order: async (name, item) => {
    await pages[name].getByLabel("Item").selectOption(item);
    await pages[name].getByRole("button", { name: "Order" }).click();
  },
  state: async (name, state, count) => {
    await pages[name].waitForFunction(
      ([state, count]) => document.querySelectorAll(`#orders tr.${state}`).length >= Number(count),
      [state, count], { timeout: 60000 },
    );
  },
  line: async (name, text) => pages[name].getByText(text).waitFor({ timeout: 30000 }),
  picture: async (name) => pages[name].screenshot({ path: `${folder}/page.png` }).then(() => null),
};

for await (const line of createInterface({ input: process.stdin })) {
  const [task, ...args] = line.split(" ");
  try {
    console.log(JSON.stringify({ done: (await tasks[task](...args)) ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ failed: String(error) }));
  }
}
await browser.close();
