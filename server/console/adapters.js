// The adapters that are loaded, and loading and unloading them.

import { call } from "./api.js";
import { byId, el, showProblem } from "./dom.js";
import { shape } from "./answer.js";

/** `changed` is called when an adapter came or went by this page's doing. */
export function startAdapters(changed) {
  byId("load-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(load, changed);
  });
  const dialog = byId("unload");
  byId("unload-no").addEventListener("click", () => dialog.close());
  byId("unload-yes").addEventListener("click", () => {
    dialog.close();
    attempt(unload, changed);
  });
}

export function listAdapters(cards) {
  const items = cards.map((card) => item(card, card.tucka));
  byId("adapter-list").replaceChildren(...(items.length ? items : [el("li", { class: "note" }, "None is loaded.")]));
}

function item(card, { scope, pinned, bytes, digest, overflows }) {
  const facts = [shape(card), pinned ? `pinned to group ${pinned.group}` : scope && `routed by the ${scope}`, size(bytes)];
  const ask = () => {
    byId("unload-name").textContent = card.id;
    byId("unload").showModal();
  };
  return el(
    "li",
    { "data-model": card.id },
    el("div", {}, el("strong", {}, card.id), el("code", { title: digest }, digest.slice(0, 12))),
    el("p", { class: "note" }, facts.filter(Boolean).join(" · ")),
    overflows ? el("p", { class: "problem" }, `${overflows} requests ended because its weights overflow. Train it again.`) : null,
    el("button", { type: "button", class: "small", "aria-label": `Unload ${card.id}`, onclick: ask }, "Unload"),
  );
}

function size(bytes) {
  return bytes < 2 ** 20 ? `${Math.ceil(bytes / 2 ** 10)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/** Does it, says how it went, and shows what is loaded now. */
async function attempt(work, changed) {
  const buttons = document.querySelectorAll("#adapters button");
  showProblem(byId("adapters-problem"), null);
  byId("adapters-done").textContent = "";
  for (const button of buttons) button.disabled = true;
  try {
    byId("adapters-done").textContent = await work();
    await changed();
  } catch (problem) {
    showProblem(byId("adapters-problem"), problem);
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

async function load() {
  const [name, path] = [byId("load-name").value.trim(), byId("load-path").value.trim()];
  const body = { name, path, load_inplace: byId("load-inplace").checked };
  const response = await call("v1/adapters", { body, admin: true });
  return response.status === 201 ? `${name} is loaded.` : `${name} had this content already.`;
}

/** By name in a body, for a name may look like a step in a path. */
async function unload() {
  const name = byId("unload-name").textContent;
  await call("v1/unload_lora_adapter", { body: { lora_name: name }, admin: true });
  return `${name} is unloaded.`;
}
