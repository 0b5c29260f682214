// Nodes made by hand. Text only ever becomes a text node: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element. An attribute `on...` is a listener, true and false set or leave out, null leaves out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Says what happened and what to do about it, in a place that is read aloud; nothing without a problem. */
export function showProblem(place, problem) {
  place.replaceChildren(...(problem ? [problemNode(problem)] : []));
}

export function problemNode({ message, todo = "" }) {
  const [first, ...rest] = message.split(/(?<=\.) /);
  return el("p", { class: "problem" }, el("strong", {}, first), " ", [...rest, todo].join(" "));
}
