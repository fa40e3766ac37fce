// The map, the search, the card of the chosen token, and pinned tokens. A token is named by its text, which is the same
// in models with different tokenizers.
const explorer = load("explorer-data");
const vocabularies = explorer.vocabularies.map(unpackedVocabulary);
const models = explorer.models.map(() => null);
const modelOf = (number) => // arrays are unpacked when a model is first shown
  (models[number] ??= unpackedModel(explorer.models[number], vocabularies[explorer.models[number].vocabulary]));
const model = () => modelOf(pair.a);
const vocabulary = () => model().vocabulary;

const pins = [...explorer.pins];
let chosen = pins[0] ?? null; // the text on the card
let hits = null; // the search's tokens, while it is open
let active = 0; // the active option of the search

const chart = new PointMap(get("map"), {
  label: (token) => visible(vocabulary().texts[token]),
  hovered: (token, x, y) => hover(token, x, y),
  chosen: (token) => show(vocabulary().texts[token]),
});

// Name → `at(token)` in [0, 1] with a title and the words for both ends, or `kind(token)`.
const spread = (values, title) => {
  const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  return { at: (token) => (values[token] - low) / (high - low || 1), title, ends: [low.toFixed(2), high.toFixed(2)] };
};
const colourings = () => {
  const { counts, kinds } = vocabulary();
  const found = {};
  if (counts) {
    const most = counts.reduce((a, b) => Math.max(a, b), 1);
    const at = (token) => Math.log1p(counts[token]) / Math.log1p(most);
    found.frequency = { at, title: `in the ${vocabulary().counted}`, ends: ["never", `${grouped(most)} times`] };
  }
  found["length |w|"] = spread(model().length, "length of the centre, |w|");
  if (model().radius) found["radius ρ"] = spread(model().radius.map(Math.log), "log of the radius, log ρ");
  found["kind of token"] = { kind: (token) => kinds[token] };
  return found;
};

const colour = () => {
  const [scale, part, colouring] = [get("map-scale").value, get("part").value, colourings()[get("colour").value]];
  const { kinds, ranks, texts } = vocabulary();
  const packed = ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;
  const grey = packed(dark.matches ? [58, 58, 58] : [220, 220, 220]);
  const table = Array.from({ length: 256 }, (_, i) => packed(shade(scale, i / 255)));
  const ofKinds = KIND_COLOURS.map((hex) => packed(rgb(hex)));
  const own = (token) =>
    (colouring.kind ? ofKinds[colouring.kind(token)] : table[Math.round(255 * colouring.at(token))]);
  const inside = (token) => part === "all"
    || (part.startsWith("top") ? ranks[token] <= Number(part.slice(3)) : kinds[token] === Number(part.slice(4)));
  chart.colours = Uint32Array.from(texts, (_, token) => (hits && !hits.has(token) ? grey : own(token)));
  chart.shown = Uint8Array.from(texts, (_, token) => inside(token));
  chart.front = hits ? [...hits] : [];
  if (colouring.kind)
    get("map-legend").replaceChildren(...KINDS.map(([title], i) => {
      const entry = element("span.kind", {}, title);
      entry.style.setProperty("--kind", KIND_COLOURS[i]);
      return entry;
    }));
  else drawLegend(get("map-legend"), colouring.title, scale, colouring.ends);
  chart.redraw();
};

const placePoints = () => {
  const components = Number(get("components").value);
  chart.setPoints(model().points, components === 3);
  const share = model().shares.slice(0, components).reduce((a, b) => a + b);
  get("share").textContent = `${components} components hold ${(100 * share).toPrecision(2)} % of the centres' variance.`;
};

// Label the hovered, the chosen and the pinned tokens. Lines lead from the hovered or else the chosen one to its neighbours.
const mark = (hovered = null) => {
  const { idOf } = vocabulary();
  const texts = [...new Set([chosen, ...pins])].filter((text) => idOf.has(text));
  chart.marked = [...(hovered === null ? [] : [hovered]), ...texts.map((text) => idOf.get(text))];
  const centre = hovered ?? idOf.get(chosen);
  chart.lines = (nearestOf(model(), "neighbours", centre) ?? []).map(([other]) => [centre, other]);
  chart.redraw();
};

const hover = (token, x, y) => {
  const box = get("hover");
  box.hidden = token === null;
  mark(token);
  if (token === null) return;
  const { texts, counts } = vocabulary();
  const near = (nearestOf(model(), "neighbours", token) ?? []).slice(0, 6);
  box.replaceChildren(code(texts[token]), counts ? ` ${grouped(counts[token])} times` : "",
    element("div.quiet", {}, near.map(([other]) => visible(texts[other])).join("  ")));
  const { clientWidth, clientHeight } = get("map");
  box.style.left = `${Math.max(0, Math.min(x + 12, clientWidth - box.offsetWidth - 4))}px`;
  box.style.top = `${y + 16 + box.offsetHeight > clientHeight ? y - box.offsetHeight - 10 : y + 16}px`;
};

const cardOf = (text) => {
  const words = vocabulary();
  const token = words.idOf.get(text);
  const known = token === undefined ? "" : `token ${token}`;
  const frequency = known && words.counts
    ? `, ${grouped(words.counts[token])} times in the ${words.counted} (rank ${grouped(words.ranks[token])})` : "";
  const pinned = pins.includes(text);
  const pin = element("button.pin", { type: "button", onclick: () => togglePin(text) }, pinned ? "unpin" : "pin");
  const shown = [pair.a, pair.b].filter((number) => number !== null);
  return element("article", {},
    element("header", {}, code(text), element("span.quiet", {}, known + frequency), pin),
    element("div.models", {}, ...shown.map((number) => modelPart(modelOf(number), number, text, show))),
    ...listed("relations", relationsOf(words, token, show)));
};

const togglePin = (text) => {
  if (pins.includes(text)) pins.splice(pins.indexOf(text), 1);
  else pins.push(text);
  refresh();
  get("card").querySelector(".pin")?.focus();
};

const refresh = () => {
  const card = chosen === null ? element("p.quiet", {}, "Choose a point, or search for a token.") : cardOf(chosen);
  get("card").replaceChildren(card);
  get("pins").replaceChildren(element("h3", {}, pins.length ? "Pinned tokens" : "No token is pinned"),
    ...pins.map((text) => element("details.pinned", {}, element("summary", {}, code(text)), cardOf(text))));
  mark();
};

// Show the card of a token; `centre`: also move its point into the middle of the map.
const show = (text, centre = false) => {
  chosen = text;
  get("hover").hidden = true;
  refresh();
  get("card").scrollTop = 0;
  const token = vocabulary().idOf.get(text);
  if (centre && token !== undefined) chart.centre(token);
};

// The search is a combobox: the input keeps the focus, the arrow keys move among the options.
const activate = (number) => {
  const options = get("matches").querySelectorAll("[role=option]");
  active = Math.max(0, Math.min(number, options.length - 1));
  options.forEach((option, i) => option.setAttribute("aria-selected", String(i === active)));
  options[active]?.scrollIntoView({ block: "nearest" });
  get("search").setAttribute("aria-activedescendant", options[active]?.id ?? "");
};
const closeSearch = () => {
  hits = null;
  get("matches").replaceChildren();
  get("search").setAttribute("aria-expanded", "false");
  colour();
};
const search = () => {
  const [query, { texts }] = [get("search").value, vocabulary()];
  if (!query) return closeSearch();
  const found = matches(vocabulary(), query, texts.length);
  hits = new Set(found);
  const options = found.slice(0, 30).map((token, i) =>
    element("li", { id: `match-${i}`, role: "option", onpointerdown: () => choose(token) }, code(texts[token])));
  const note = found.length ? `${grouped(found.length)} found, coloured on the map` : "no token contains this";
  get("matches").replaceChildren(...options, element("li.quiet", {}, note));
  get("search").setAttribute("aria-expanded", "true");
  activate(0);
  colour();
};
const choose = (token) => {
  closeSearch();
  show(vocabulary().texts[token], true);
};
get("search").addEventListener("input", search);
get("search").addEventListener("blur", closeSearch);
get("search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") activate(active + 1);
  else if (event.key === "ArrowUp") activate(active - 1);
  else if (event.key === "Escape") { get("search").value = ""; closeSearch(); }
  else if (event.key === "Enter") {
    const token = matches(vocabulary(), get("search").value)[active];
    if (token !== undefined) choose(token);
  } else return;
  event.preventDefault();
});

const offerColours = () => {
  fillSelect(get("colour"), Object.keys(colourings()).map((name) => [name, name]));
  const { ranks, texts } = vocabulary();
  const tops = ranks ? [100, 1000, 10000].filter((top) => top < texts.length) : [];
  const frequent = tops.map((top) => [`top${top}`, `the ${grouped(top)} most frequent`]);
  fillSelect(get("part"), [["all", "all tokens"], ...frequent, ...KINDS.map(([title], i) => [`kind${i}`, title])]);
};
const rebuild = () => { offerColours(); placePoints(); colour(); refresh(); };

offerScales(get("map-scale"), "violet–yellow");
["colour", "map-scale", "part"].forEach((id) => get(id).addEventListener("change", colour));
get("components").addEventListener("change", placePoints);
document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
  if (button.dataset.zoom) chart.zoom(Number(button.dataset.zoom));
  else chart.reset();
}));
dark.addEventListener("change", () => { colour(); chart.draw(); }); // at once: printing does not wait for a frame
whenPairChanges.push(rebuild);
rebuild();
