// The page's drawings: small, without axes, each with its sentence for those who do not see it.

import { svg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 32;

/** A line through `values`, oldest first, on the scale from 0 to the largest or to `top`. `room`: how many fit. */
export function sparkline(values, room, sentence, top = 0) {
  const most = Math.max(top, ...values) || 1;
  const at = (value, i) => {
    const x = WIDTH - ((values.length - 1 - i) * WIDTH) / (room - 1);
    return `${x.toFixed(1)},${(HEIGHT - 1 - (value / most) * (HEIGHT - 3)).toFixed(1)}`;
  };
  const line = values.map(at).join(" ");
  const first = WIDTH - ((values.length - 1) * WIDTH) / (room - 1);
  return svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": sentence },
    svg("polygon", { points: `${first.toFixed(1)},${HEIGHT} ${line} ${WIDTH},${HEIGHT}` }),
    svg("polyline", { points: line }),
  );
}

/** One column for each share (of 1), numbered below from 0. */
export function columns(shares, sentence) {
  const step = 240 / shares.length;
  const most = Math.max(...shares) || 1;
  const bar = (share, i) => {
    const height = (share / most) * 30;
    const place = { x: i * step + step * 0.2, width: step * 0.6 };
    return svg(
      "g",
      {},
      svg("rect", { class: "track", ...place, y: 32, height: 2 }),
      svg("rect", { class: "bar", ...place, y: 34 - height, height }),
      shares.length > 16 ? null : svg("text", { x: (i + 0.5) * step, y: 46 }, String(i)),
    );
  };
  return svg("svg", { class: "columns", viewBox: "0 0 240 50", role: "img", "aria-label": sentence }, ...shares.map(bar));
}

/** All experts of an adapter, a box for each group, and in the chosen one each expert's weight from 0 to 1. */
export function route(groups, experts, group, weights, sentence) {
  const step = 240 / groups;
  const row = Math.max(5, Math.min(10, 40 / experts));
  const gap = groups > 12 ? 1 : 3;
  const cell = (g, e) => {
    const place = { x: g * step + gap, y: 3 + e * row, height: row - 2 };
    const width = step - 2 * gap;
    const track = svg("rect", { class: "track", ...place, width });
    return g === group ? [track, svg("rect", { class: "bar", ...place, width: width * weights[e] })] : [track];
  };
  const height = experts * row + 4;
  const box = { x: group * step + 0.5, y: 0.5, width: step - 1, height: height - 1, rx: 2 };
  return svg(
    "svg",
    { class: "route", viewBox: `0 0 240 ${height}`, role: "img", "aria-label": sentence },
    ...Array.from({ length: groups }, (_, g) => Array.from({ length: experts }, (_, e) => cell(g, e))).flat(2),
    svg("rect", { class: "chosen", ...box }),
  );
}
