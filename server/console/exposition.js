// The few series of /metrics that the page shows.

const LINE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="([^"]*)"/g; // no value that the server writes holds a quote

/** Samples `{labels, value}` by name, of the names asked for. */
export function parse(text, names) {
  const found = new Map(names.map((name) => [name, []]));
  for (const line of text.split("\n")) {
    const samples = found.get(line.slice(0, line.search(/[ {]/)));
    const match = samples && LINE.exec(line);
    if (match) {
      const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
      samples.push({ labels, value: Number(match[3]) });
    }
  }
  return found;
}

/**
 * The median of what a histogram took in between two scrapes, linear within a bucket; null where that was nothing.
 * `before` and `after` are its cumulative buckets.
 */
export function median(before, after) {
  const grown = after.map(({ labels, value }, i) => [Number(labels.le.replace("+Inf", "Infinity")), value - (before[i]?.value ?? 0)]);
  const half = grown.length ? grown.at(-1)[1] / 2 : 0;
  if (!(half > 0)) return null;
  const i = grown.findIndex(([, count]) => count >= half);
  const [from, below] = i ? grown[i - 1] : [0, 0];
  const [to, count] = grown[i];
  return to === Infinity ? from : from + ((to - from) * (half - below)) / (count - below);
}
