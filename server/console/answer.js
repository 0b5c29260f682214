// One answer: its text as it comes, how fast it came, and the route that made it.

import { Problem, stream } from "./api.js";
import { el, problemNode } from "./dom.js";
import { route as drawn } from "./plot.js";

const ENDS = { stop: "complete", length: "cut off", tool_calls: "called a function" };

/**
 * A card for the answer of `model` (a card of /v1/models, one of `models`). `run(path, body)` fills it; `stop()` ends
 * that.
 */
export function answerCard(model, models) {
  const abort = new AbortController();
  const stop = el("button", { type: "button", class: "small", onclick: () => abort.abort() }, "Stop");
  stop.setAttribute("aria-label", `Stop the answer of ${model.id}`);
  const text = el("div", { class: "text" });
  const figures = el("dl", { class: "figures" });
  const foot = el("div", { class: "foot" });
  const node = el(
    "article",
    { "aria-label": `Answer of ${model.id}`, "aria-busy": "true", "data-model": model.id },
    el("header", {}, el("h3", {}, model.id), el("p", { class: "note" }, shape(model)), stop),
    text,
    figures,
    foot,
  );
  const ended = (how) => stop.replaceWith(el("p", { class: "note" }, how));

  async function run(path, body) {
    const clock = { sent: performance.now(), first: null, last: null, tokens: 0 };
    try {
      for await (const chunk of stream(path, body, abort.signal)) take(chunk, clock);
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof Problem)) throw error;
      ended(error instanceof Problem ? "failed" : "stopped");
      if (error instanceof Problem) foot.prepend(problemNode(error));
    } finally {
      node.setAttribute("aria-busy", "false");
    }
  }

  function take(chunk, clock) {
    const choice = chunk.choices[0];
    if (choice) {
      clock.last = performance.now();
      clock.first ??= clock.last;
      const thought = choice.delta?.reasoning_content;
      if (thought) append(text, "thought", thought);
      const said = choice.delta?.content ?? choice.text;
      if (said) append(text, "said", said);
      if (choice.finish_reason) {
        ended(ENDS[choice.finish_reason] ?? choice.finish_reason);
        foot.append(choice.route ? routeNode(choice.route, models) : el("p", { class: "note" }, unrouted(model)));
      }
    }
    clock.tokens = chunk.usage?.completion_tokens ?? clock.tokens;
    figures.replaceChildren(...figureNodes(clock));
  }

  return { node, run, stop: () => abort.abort() };
}

export function kind({ parent, tucka }) {
  if (!tucka) return parent ? "alias" : "base model";
  return { tucka: "TuckA", lora: "LoRA", bank: "in a bank" }[tucka.kind];
}

/** What a model is, in a few words: of an adapter its kind, rank and experts. */
export function shape(model) {
  const { tucka } = model;
  const experts = tucka?.k ? ` · ${tucka.k} × ${tucka.t} experts` : "";
  return tucka ? `${kind(model)} · rank ${tucka.r}${experts}` : kind(model);
}

/** Appends to the last piece of the same kind, or begins one. Text stays text. */
function append(place, kind, piece) {
  if (place.lastElementChild?.className !== kind) place.append(el("p", { class: kind }));
  place.lastElementChild.append(piece);
}

function unrouted({ parent }) {
  return parent ? "A LoRA adapter has no route." : "The base has no route.";
}

function figureNodes({ sent, first, last, tokens }) {
  const seconds = (last - first) / 1000;
  const speed = tokens > 1 && seconds > 0 ? Math.round((tokens - 1) / seconds).toLocaleString("en") : "–";
  return [
    figure("First token", first === null ? "–" : Math.round(first - sent).toLocaleString("en"), "ms"),
    figure("Speed", speed, "tokens/s"),
    figure("Length", tokens.toLocaleString("en"), tokens === 1 ? "token" : "tokens"),
  ];
}

function figure(name, value, unit) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, " ", el("span", { class: "unit" }, unit)));
}

/** The adapter of a route is another than the model that was asked where that is an alias. */
function routeNode({ adapter, group, weights, scope, changes }, models) {
  const tucka = models.find(({ id }) => id === adapter)?.tucka;
  const numbers = weights.map((weight) => weight.toFixed(3));
  const told = (k) => `Group ${group} of ${k}, counted from 0; its experts weigh ${numbers.join(", ")}.`;
  const moved = changes ? ` · left it ${changes} ${changes === 1 ? "time" : "times"} while decoding` : "";
  return el(
    "div",
    { class: "routed" },
    el("p", {}, `Group ${group}`, el("span", { class: "note" }, ` by the ${scope}${moved}`)),
    tucka?.k ? drawn(tucka.k, tucka.t, group, weights, told(tucka.k)) : "",
    el("p", { class: "note" }, "Experts weigh ", el("span", { class: "weights" }, numbers.join(" · "))),
  );
}
