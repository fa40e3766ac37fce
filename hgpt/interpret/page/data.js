// Shared by all parts of the page: packed numbers, elements, colours, and the two shown models.
const get = (id) => document.getElementById(id);
const load = (id) => JSON.parse(get(id)?.textContent ?? "null");

// The arrays of hgpt/interpret/packing.py.
const integers = ({ bits, data }) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return bits === 32 ? new Uint32Array(bytes.buffer) : new Uint16Array(bytes.buffer);
};
const numbers = (packed) =>
  Float32Array.from(integers(packed), (step) =>
    step === 65535 ? NaN : packed.low + (step / 65534) * (packed.high - packed.low));

// An element, its class, properties and children: element("p.quiet", {}, "text", another).
const element = (kind, properties = {}, ...children) => {
  const [tag, className = ""] = kind.split(".");
  const made = Object.assign(document.createElement(tag), { className, ...properties });
  made.append(...children);
  return made;
};
const fillSelect = (select, pairs) => { // pairs of value and title; keeps the choice
  const kept = select.value;
  select.replaceChildren(
    ...pairs.map(([value, title]) => element("option", { value, selected: value === kept }, title)));
};

// Each of these tokens holds part of a character, as \xe4; together they may be a character.
const joined = (texts) =>
  texts.join("").replace(/(\\x[0-9a-f]{2})+/g, (escapes) =>
    new TextDecoder().decode(Uint8Array.from(escapes.match(/[0-9a-f]{2}/g), (digits) => parseInt(digits, 16))));
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const code = (text) => element("code", {}, visible(text));
const grouped = (number) => number.toLocaleString("en");
const probability = (p) => (p >= 0.001 ? p.toFixed(3) : p.toExponential(0));

// Colours. A scale has stops from low to high for a light page and for a dark one, so that neither end is lost.
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const VIRIDIS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#e2c800"];
const BLUES = ["#eef5fb", "#9ecae1", "#4a97c9", "#1f6aa8", "#08306b"];
const GREYS = ["#f0f0f0", "#bdbdbd", "#8a8a8a", "#555555", "#202020"];
const SCALES = {
  "violet–yellow": [VIRIDIS, ["#8d5fb5", "#5f7fc4", "#21a08c", "#5ec962", "#fde725"]],
  blue: [BLUES, BLUES.toReversed()],
  "red–blue": [
    ["#b2182b", "#f4a582", "#f7f7f7", "#92c5de", "#2166ac"],
    ["#e8604f", "#8f4038", "#333333", "#2f6288", "#6db3e8"],
  ],
  grey: [GREYS, GREYS.toReversed()],
};
const KIND_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]; // Okabe & Ito

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const stopsOf = (scale) => SCALES[scale][Number(dark.matches)];
const shade = (scale, t) => { // the colour at t in [0, 1], [r, g, b]
  const stops = stopsOf(scale);
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [rgb(stops[low]), rgb(stops[low + 1])];
  return from.map((value, i) => Math.round(value + (place - low) * (to[i] - value)));
};
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff");
const drawLegend = (place, title, scale, [low, high]) => {
  const bar = element("span.bar", {});
  bar.style.background = `linear-gradient(90deg, ${stopsOf(scale).join(",")})`;
  place.replaceChildren(`${title}: ${low} `, bar, ` ${high}`);
};
const offerScales = (select, chosen) => {
  fillSelect(select, Object.keys(SCALES).map((name) => [name, name]));
  select.value = chosen;
};

// The models that the map, the cards and the text show: a, and b beside it, which may be null.
const labels = [...document.querySelectorAll("#models b")].map((label) => label.textContent);
const swatch = (model) => document.querySelectorAll("#models .swatch")[model].cloneNode(true);
const pair = { a: 0, b: labels.length > 1 ? 1 : null };
const whenPairChanges = [];
const picks = [...document.querySelectorAll("select.pick")];
const showPair = () => picks.forEach((pick) => { pick.value = String(pair[pick.dataset.side] ?? ""); });
picks.forEach((pick) => {
  const none = pick.dataset.side === "b" ? [["", "no other"]] : [];
  fillSelect(pick, [...none, ...labels.map((label, model) => [String(model), label])]);
  pick.parentElement.hidden = labels.length === 1;
  pick.addEventListener("change", () => {
    pair[pick.dataset.side] = pick.value === "" ? null : Number(pick.value);
    if (pair.a === pair.b) pair.b = null;
    showPair();
    whenPairChanges.forEach((listener) => listener());
  });
});
showPair();
