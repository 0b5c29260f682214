// Live figures, from /metrics.

import { call } from "./api.js";
import { byId, el } from "./dom.js";
import { median, parse } from "./exposition.js";
import { columns, sparkline } from "./plot.js";

export const SECONDS = 2; // between two looks
const ROOM = 60; // looks that a plot holds; it begins with LEAST of them
const LEAST = 15;
const MOST = 12; // adapters whose experts are drawn

const TTFT = "tucka_time_to_first_token_seconds_bucket";
const SELECTIONS = "tucka_adapter_group_selections_total";
const BALANCE = "tucka_adapter_load_balance";
const GENERATION = "tucka_adapter_generation";
const NAMES = [
  "tucka_generation_tokens_total", "tucka_requests_running", "tucka_requests_waiting", "tucka_kv_blocks_used",
  "tucka_kv_blocks", "tucka_engine_info", "tucka_engine_restarts_total", TTFT, SELECTIONS, BALANCE, GENERATION,
];

const TILES = [
  { id: "speed", name: "Speed", unit: "tokens/s", digits: 0 },
  { id: "running", name: "Running", unit: "sequences", digits: 0 },
  { id: "first", name: "First token, median", unit: "ms", digits: 0 },
  { id: "cache", name: "KV cache in use", unit: "%", digits: 1, top: 100 },
];

const history = new Map(TILES.map(({ id }) => [id, []]));
let before = null;

/**
 * Looks once, draws, and returns `{info, loads}`: what the engine says it is, and a text that changes whenever an
 * adapter is loaded or unloaded, by whomever. A key that may not see figures sees why. Throws Problem.
 */
export async function look() {
  const response = await call("metrics").catch((problem) => {
    if (problem.status !== 403) throw problem;
    byId("tiles").replaceChildren(el("p", { class: "note" }, problem.message));
  });
  if (!response) return { loads: "" };
  const found = parse(await response.text(), NAMES);
  const now = { found, at: performance.now() };
  draw(figures(before, now));
  drawExperts(found);
  before = now;
  const loads = found.get(GENERATION).map(({ labels, value }) => `${labels.model} ${value}`).join("\n");
  return { info: found.get("tucka_engine_info")[0]?.labels, loads };
}

function one({ found }, name) {
  return found.get(name)[0]?.value ?? 0;
}

/** What the tiles show; null where there is nothing to say. */
function figures(before, now) {
  const rose = before ? one(now, "tucka_generation_tokens_total") - one(before, "tucka_generation_tokens_total") : 0;
  const first = before && median(before.found.get(TTFT), now.found.get(TTFT));
  return {
    speed: before ? Math.max(rose, 0) / ((now.at - before.at) / 1000) : 0,
    running: one(now, "tucka_requests_running"),
    waiting: one(now, "tucka_requests_waiting"),
    first: first === null ? null : first * 1000,
    cache: (100 * one(now, "tucka_kv_blocks_used")) / (one(now, "tucka_kv_blocks") || 1),
  };
}

function draw(values) {
  byId("tiles").replaceChildren(...TILES.map((tile) => {
    const past = history.get(tile.id);
    if (values[tile.id] !== null) past.push(values[tile.id]);
    if (past.length > ROOM) past.shift();
    return tileNode(tile, past, tile.id === "running" && values.waiting ? ` · ${values.waiting} waiting` : "");
  }));
}

function tileNode({ id, name, unit, digits, top }, past, more) {
  const said = (value) => value.toLocaleString("en", { maximumFractionDigits: digits });
  const now = past.length ? said(past.at(-1)) : "–";
  const sentence = past.length ? `${name}: ${now} ${unit}, at most ${said(Math.max(...past))} lately` : `${name}: nothing yet`;
  return el(
    "div",
    { class: "tile", "data-figure": id },
    el("p", { class: "name" }, name),
    el("p", { class: "value" }, now, " ", el("span", { class: "unit" }, unit + more)),
    sparkline(past, Math.max(past.length, LEAST), sentence, top),
  );
}

function drawExperts(found) {
  const groups = Map.groupBy(found.get(SELECTIONS), ({ labels }) => labels.model);
  const balance = new Map(found.get(BALANCE).map(({ labels, value }) => [labels.model, value]));
  const total = (samples) => samples.reduce((sum, { value }) => sum + value, 0);
  const rows = [...groups].map(([model, samples]) => ({ model, samples, passes: total(samples) }));
  rows.sort((a, b) => b.passes - a.passes);
  const nodes = rows.slice(0, MOST).map((row) => expertsNode(row, balance.get(row.model)));
  if (rows.length > MOST) nodes.push(el("p", { class: "note" }, `The ${MOST} busiest of ${rows.length}.`));
  if (!rows.length) nodes.push(el("p", { class: "note" }, "No adapter with experts is loaded."));
  byId("experts").replaceChildren(...nodes);
}

function expertsNode({ model, samples, passes }, balance) {
  const shares = samples.map(({ value }) => (passes ? value / passes : 0));
  const said = shares.map((share, group) => `group ${group} ${Math.round(share * 100)} %`).join(", ");
  const even = passes ? ` · balance ${(balance ?? 0).toFixed(2)}` : "";
  return el(
    "div",
    { class: "experts", "data-model": model },
    el("p", {}, model, el("span", { class: "note" }, passes ? `${passes.toLocaleString("en")} passes${even}` : "not used yet")),
    columns(shares, passes ? `${model}: ${said}` : `${model}: not used yet`),
  );
}
