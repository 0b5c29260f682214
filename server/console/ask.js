// One prompt, sent to several models side by side.

import { call } from "./api.js";
import { answerCard, kind } from "./answer.js";
import { byId, el, showProblem } from "./dom.js";

// A browser opens six connections to a server: five answers at once leave one for the figures.
const MOST = 5;
const FEW = 12; // names that need no filter

let models = [];
let running = [];

export function startAsk() {
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
  });
  byId("stop").addEventListener("click", stopAll);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stopAll();
  });
  byId("names").addEventListener("change", limit);
  byId("filter").addEventListener("input", filter);
}

/** Shows the names that can be picked. What was picked stays so; at first it is the base and two adapters. */
export function offer(cards) {
  const kept = models.length ? picked() : cards.filter((card) => kind(card) !== "alias").slice(0, 3).map(({ id }) => id);
  models = cards;
  byId("names").replaceChildren(...cards.map((card) => chip(card, kept.includes(card.id))));
  byId("filter-field").hidden = cards.length <= FEW;
  filter();
  limit();
}

/** Asks whether the server has a chat template: without one a prompt goes as plain text. */
export async function chooseDoor() {
  const { chat_template: template } = await (await call("tokenizer_info")).json();
  byId("door").value = template ? "chat" : "completion";
  byId("door").options[0].disabled = !template;
}

function chip(card, checked) {
  const box = el("input", { type: "checkbox", name: "model", value: card.id, checked });
  return el("label", { class: "chip" }, box, el("span", {}, card.id), el("span", { class: "note" }, kind(card)));
}

function boxes() {
  return [...byId("names").querySelectorAll("input")];
}

function picked() {
  return boxes().filter((box) => box.checked).map((box) => box.value);
}

function limit() {
  const count = picked().length;
  for (const box of boxes()) box.disabled = !box.checked && count >= MOST;
  byId("picked").textContent = count >= MOST ? `${count} picked, the most at once` : `${count} picked`;
}

function filter() {
  const wanted = byId("filter").value.toLowerCase();
  for (const box of boxes()) box.parentElement.hidden = !box.checked && !box.value.toLowerCase().includes(wanted);
}

async function send() {
  if (running.length) return;
  const fault = faultOfForm();
  showProblem(byId("ask-problem"), fault);
  if (fault) return;
  const asked = picked();
  running = asked.map((id) => answerCard(models.find((model) => model.id === id), models));
  byId("answers").replaceChildren(...running.map(({ node }) => node));
  byId("answers").dataset.count = running.length;
  const count = running.length === 1 ? "1 answer" : `${running.length} answers`;
  progress(true, `${count} on the way.`);
  const { path, body } = request();
  const ends = await Promise.allSettled(running.map((answer, i) => answer.run(path, { ...body, model: asked[i] })));
  running = [];
  progress(false, `${count} ended.`);
  const failed = ends.find(({ status }) => status === "rejected");
  if (failed) throw failed.reason;
}

function faultOfForm() {
  if (!picked().length) return { message: "Nobody is picked.", todo: "Tick the base or an adapter." };
  if (!byId("prompt").value) return { message: "The prompt is empty.", todo: "Type one." };
  for (const id of ["max-tokens", "temperature"]) {
    const field = byId(id);
    if (!field.validity.valid) return { message: `${field.labels[0].textContent.trim()}:`, todo: field.validationMessage };
  }
  return null;
}

/** The door, and what is asked of it but for the model. */
function request() {
  const prompt = byId("prompt").value;
  const chat = byId("door").value === "chat";
  const body = {
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    include_route: true,
  };
  if (byId("route").value) body.route = byId("route").value;
  return chat
    ? { path: "v1/chat/completions", body: { ...body, messages: [{ role: "user", content: prompt }] } }
    : { path: "v1/completions", body: { ...body, prompt } };
}

function progress(busy, text) {
  byId("progress").textContent = text;
  byId("stop").hidden = !busy;
  byId("send").disabled = busy;
}

function stopAll() {
  for (const answer of running) answer.stop();
}
