// What the clients' scripts for Node share, as checks.py for Python: `node SCRIPT URL BASE`, a line of JSON for each check.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

export const [URL_, BASE] = process.argv.slice(2);
export const ASKS = JSON.parse(readFileSync(new URL("asks.json", import.meta.url), "utf8"));
export const { schema: SCHEMA, tool: TOOL } = ASKS;

// Runs the function, and says whether it returned.
export async function check(what, run) {
  let failed = null;
  try {
    await run();
  } catch (error) {
    console.error(error);
    failed = `${error.name}: ${error.message}`;
  }
  console.log(JSON.stringify({ check: what, failed }));
}

export function fits(value) {
  assert.deepEqual(Object.keys(value).sort(), ["kind", "urgent"]);
  assert.ok(["bug", "wish"].includes(value.kind) && typeof value.urgent === "boolean");
}

export async function answers(ask) {
  for (const name of ["base", "formats", "words"]) {
    assert.equal(await ask(ASKS[name].model, ASKS[name].prompt), ASKS[name].answer);
  }
}
