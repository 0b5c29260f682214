// Brings the page up: keys, the server's state, and what is loaded.

import { listAdapters, startAdapters } from "./adapters.js";
import { call, Problem, useKeys } from "./api.js";
import { chooseDoor, offer, startAsk } from "./ask.js";
import { byId, el, showProblem } from "./dom.js";
import { look, SECONDS } from "./figures.js";

let loads = null; // what figures.look said of the adapters when they were last listed
let timer = 0;

startAsk();
startAdapters(listAll);
byId("use-keys").addEventListener("click", takeKeys);
byId("keys").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
  event.preventDefault(); // else it would open again what takeKeys closes and gives the focus to
  takeKeys();
});
document.addEventListener("visibilitychange", () => !document.hidden && watch());
watch();

function takeKeys() {
  useKeys(byId("user-key").value.trim(), byId("admin-key").value.trim());
  byId("keys").open = false;
  byId("keys").querySelector("summary").focus();
  loads = null;
  state("asking", "Asking the server …", null);
  watch();
}

/** Looks at the server now and every few seconds, while somebody looks at the page. */
async function watch() {
  clearTimeout(timer);
  try {
    const { info, loads: now } = await look();
    byId("served").textContent = info ? `${info.version} · ${info.type} · ${info.dtype} · ${info.device} · ${info.kernels} kernels` : "";
    if (now !== loads) {
      if (loads === null) await chooseDoor().catch(() => {}); // a base without a tokenizer says so when it is asked
      loads = now;
      await listAll();
    }
    await showReady();
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    showTrouble(problem);
  } finally {
    clearTimeout(timer);
    const locked = byId("state").dataset.state === "locked"; // until there is another key
    if (!document.hidden && !locked) timer = setTimeout(watch, SECONDS * 1000);
  }
}

/** Lists what is loaded, wherever it is shown. */
async function listAll() {
  const { data } = await (await call("v1/models")).json();
  offer(data);
  listAdapters(data.filter(({ tucka }) => tucka));
}

async function showReady() {
  await call("ready");
  state("ready", "Ready", null);
}

function showTrouble(problem) {
  if (problem.status === 401) {
    state("locked", "Locked", problem);
    byId("keys").open = true;
    byId("user-key").focus();
  } else if (problem.status) {
    state("waiting", "Not ready", problem);
  } else {
    state("away", "Not reachable", problem);
  }
}

function state(name, text, problem) {
  const place = byId("state");
  if (place.dataset.state === name) return; // what is written here is read aloud each time
  place.dataset.state = name;
  place.replaceChildren(el("span", {}, text));
  showProblem(byId("trouble"), problem);
}
