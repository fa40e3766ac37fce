// The text browser: one text as two models read it, coloured by a chosen quantity.
const readings = load("reading-data"); // one per model, null if it read nothing
const seenBy = (model) => readings[model].seen;
const sides = () => ["a", "b"].filter((side) => pair[side] !== null && readings[pair[side]]);
const otherOf = (side) => sides().find((other) => other !== side);
const sideBox = (side) => document.querySelector(`.side[data-side="${side}"]`);
const spansOf = (side) => sideBox(side).querySelectorAll("[data-position]");
const fixed = { a: 0, b: 0 }; // the last chosen positions

// d / d_min at the faint end of the scale: nine in ten targets are nearer.
const ratios = (readings ?? []).flatMap((reading) => reading?.seen.map((seen) => seen.ratio) ?? []);
const known = ratios.filter((ratio) => ratio !== null).sort((a, b) => a - b);
const widest = Math.max(1.01, known[Math.floor(0.9 * known.length)] ?? 0);
// Quantity → its value at a position, or null; the value on a scale of 0 to 1; the words for both ends.
const QUANTITIES = {
  probability: { of: (seen) => seen.p, place: (p) => p, ends: ["0", "1"] },
  "surprise −log p": { of: (seen) => -Math.log(seen.p), place: (loss) => loss / 10, ends: ["0", "10 nats"] },
  rank: { of: (seen) => seen.rank, place: (rank) => 1 - Math.log10(rank) / 3, ends: ["1,000", "1"] },
  "d / d_min": { of: (seen) => seen.ratio, place: (ratio) => (widest - ratio) / (widest - 1),
    ends: [widest.toFixed(2), "1"] },
  "p over the other's": { of: (seen, other) => other && Math.log2(seen.p / other.p), place: (log) => 0.5 + log / 8,
    ends: ["16 times less", "16 times more"] },
};

const bytesOf = (token) => new TextEncoder().encode(token.replace(/\\x[0-9a-f]{2}/g, "x")).length;
// The position of model `to` that covers the place in the text at which `position` of model `from` begins.
const starts = readings?.map((reading) => {
  let at = reading && bytesOf(reading.before);
  return reading?.seen.map(({ token }) => (at += bytesOf(token)) - bytesOf(token));
});
const beside = (from, position, to) =>
  Math.max(0, starts[to].findLastIndex((start) => start <= starts[from][position]));

const paintText = () => {
  const [quantity, scale] = [QUANTITIES[get("quantity").value], get("text-scale").value];
  for (const side of sides()) {
    const other = otherOf(side);
    spansOf(side).forEach((span, position) => {
      const seen = seenBy(pair[side])[position];
      const twin = other && seenBy(pair[other])[beside(pair[side], position, pair[other])];
      const value = quantity.of(seen, twin?.token === seen.token ? twin : null);
      const colour = value === null ? null : shade(scale, quantity.place(value));
      span.style.background = colour ? `rgb(${colour.join(",")})` : "";
      span.style.color = colour ? inkOn(colour) : "";
    });
  }
  drawLegend(get("text-legend"), get("quantity").value, scale, quantity.ends);
};

const showOnMap = (text) => {
  show(text, true);
  get("explorer").scrollIntoView();
};
const predictions = (seen) => {
  const row = (mark, token, p, ratio) => element("tr", {},
    element("td", {}, mark),
    element("td", {}, link(token, showOnMap)),
    element("td.number", {}, probability(p)),
    ...(ratio === null ? [] : [element("td.number", {}, ratio.toFixed(3))]));
  const names = ["", "token", "p", ...(seen.ratio === null ? [] : ["d / d_min"])];
  return element("table", {}, element("thead", {}, element("tr", {}, ...names.map((name) => element("th", {}, name)))),
    element("tbody", {}, row(`target, rank ${grouped(seen.rank)}`, seen.token, seen.p, seen.ratio),
      ...seen.nearest.map(([token, p, ratio], i) => row(`${i + 1}.`, token, p, ratio))));
};

// Show a position of a side, and the same place of the text on the other. `fix`: keep it when the pointer leaves.
const point = (side, position, fix = true) => {
  const at = { [side]: position };
  const other = otherOf(side);
  if (other) at[other] = beside(pair[side], position, pair[other]);
  if (fix) Object.assign(fixed, at);
  for (const each of sides()) {
    spansOf(each).forEach((span, i) => {
      span.classList.toggle("chosen", i === at[each]);
      span.tabIndex = each === sides()[0] && i === fixed[each] ? 0 : -1; // one tab stop
    });
    sideBox(each).querySelector(".panel").replaceChildren(predictions(seenBy(pair[each])[at[each]]));
  }
};

// The nearest token of the line above (direction −1) or below (1).
const vertical = (spans, position, direction) => {
  const here = spans[position].getBoundingClientRect();
  let [found, least] = [position, Infinity];
  spans.forEach((span, i) => {
    const box = span.getBoundingClientRect();
    const down = (box.top - here.top) * direction;
    const away = down * 10 + Math.abs(box.left - here.left);
    if (down > 5 && away < least) [found, least] = [i, away];
  });
  return found;
};

const sideText = (side) => {
  const { before, seen } = readings[pair[side]];
  const spans = seen.map(({ token }, position) => {
    const span = element("span", { tabIndex: -1 }, token);
    span.dataset.position = position;
    return span;
  });
  const text = element("div.text", {}, element("span.quiet", {}, before), ...spans);
  const pointed = ({ target: { dataset } }, fix) => dataset.position && point(side, Number(dataset.position), fix);
  text.addEventListener("mouseover", (event) => pointed(event, false));
  text.addEventListener("mouseleave", () => point(side, fixed[side]));
  text.addEventListener("click", (event) => pointed(event, true));
  text.addEventListener("keydown", (event) => {
    const now = fixed[side];
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1 }[event.key]
      ?? { ArrowDown: () => vertical(spans, now, 1), ArrowUp: () => vertical(spans, now, -1) }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    point(side, Math.max(0, Math.min(to, spans.length - 1)));
    spans[fixed[side]].focus();
  });
  return text;
};

const buildReader = () => {
  for (const side of ["a", "b"]) sideBox(side).replaceChildren();
  for (const side of sides()) {
    const title = element("h3", {}, swatch(pair[side]), labels[pair[side]]);
    sideBox(side).append(title, sideText(side), element("div.panel"));
  }
  paintText();
  if (sides().length) point(sides()[0], 0);
};

if (readings) {
  fillSelect(get("quantity"), Object.keys(QUANTITIES).map((name) => [name, name]));
  offerScales(get("text-scale"), "blue");
  ["quantity", "text-scale"].forEach((id) => get(id).addEventListener("change", paintText));
  dark.addEventListener("change", paintText);
  whenPairChanges.push(buildReader);
  buildReader();
}

addEventListener("beforeprint", () =>
  document.querySelectorAll("details:not(.pinned)").forEach((details) => { details.open = true; }));
