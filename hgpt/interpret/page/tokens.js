// Tokens: their kinds, the search, and the card with neighbours, relations and contexts.
const KINDS = [
  ["words or their beginnings", /^[ ▁]\p{L}+$/u],
  ["pieces and unspaced words", /^\p{L}[\p{L}'’]*$/u],
  ["numbers", /^[ ▁]?\p{N}+$/u],
  ["white space", /^\s+$/],
  ["bytes and special tokens", /\\x[0-9a-f]{2}|^<.*>$/],
  ["punctuation and the rest", /^/],
];

const unpackedVocabulary = (vocabulary) => {
  const counts = vocabulary.counts && integers(vocabulary.counts);
  const ranks = counts && new Uint32Array(counts.length);
  const order = counts ? [...counts.keys()].sort((a, b) => counts[b] - counts[a]) : [];
  order.forEach((token, rank) => { ranks[token] = rank + 1; });
  const idOf = new Map(vocabulary.texts.map((text, token) => [text, token]));
  const kinds = vocabulary.texts.map((text) => KINDS.findIndex(([, pattern]) => pattern.test(text)));
  return { ...vocabulary, counts, ranks, idOf, kinds };
};

const unpackedModel = (model, vocabulary) => {
  const nearest = (packed) => packed && { k: packed.k, items: integers(packed.items), values: numbers(packed.values) };
  const rowOf = new Map(Array.from(integers(model.tokens), (token, row) => [token, row])); // of tokens with neighbours
  return {
    ...model, vocabulary, rowOf,
    points: model.points.map(numbers),
    length: numbers(model.length),
    radius: model.radius && numbers(model.radius),
    neighbours: nearest(model.neighbours),
    contexts: nearest(model.contexts),
    text: model.text && { ids: integers(model.text.ids), losses: numbers(model.text.losses) },
  };
};

// Up to `most` tokens for a query: the same text first, with or without a space before it, then those that begin with
// it, then those that contain it; among them the frequent first. #12 is token 12.
const matches = ({ texts, ranks }, query, most = 30) => {
  const wanted = query.replace(/␣/g, " ").replace(/⏎/g, "\n").toLowerCase();
  if (/^#\d+$/.test(wanted) && Number(wanted.slice(1)) < texts.length) return [Number(wanted.slice(1))];
  const found = [];
  if (wanted)
    texts.forEach((text, token) => {
      const lower = text.toLowerCase();
      if (!lower.includes(wanted)) return;
      const same = lower === wanted || lower.trim() === wanted.trim();
      found.push([same ? 0 : lower.trim().startsWith(wanted) ? 1 : 2, ranks?.[token] ?? token, token]);
    });
  return found.sort((a, b) => a[0] - b[0] || a[1] - b[1]).slice(0, most).map((one) => one[2]);
};

// Pairs of item and value; null for a token without neighbours.
const nearestOf = (model, kind, token) => {
  const row = model.rowOf.get(token);
  if (row === undefined || !model[kind]) return null;
  const { k, items, values } = model[kind];
  return Array.from({ length: k }, (_, i) => [items[row * k + i], values[row * k + i]]);
};

const link = (text, show) => element("button.token", { type: "button", onclick: () => show(text) }, visible(text));
const listed = (title, items) =>
  items?.length
    ? [element("h4", {}, title), element("ul", {}, ...items.map((item) => element("li", {}, ...item)))]
    : [];

// The token at an index of the text, marked, and up to 16 tokens before it. A piece of text begins without a loss.
const passage = ({ text: { ids, losses }, vocabulary: { texts } }, at) => {
  let start = at;
  while (at - start < 16 && !Number.isNaN(losses[start])) start--;
  const before = joined(Array.from(ids.subarray(start, at), (id) => texts[id])).replace(/\s*\n\s*/g, " ⏎ ");
  return [element("span.context", {}, `…${before}`), element("mark", {}, visible(texts[ids[at]]))];
};

const occurrences = (model, token, most = 5) => {
  const places = [];
  model.text?.ids.forEach((id, at) => { if (id === token && !Number.isNaN(model.text.losses[at])) places.push(at); });
  const shown = Array.from({ length: Math.min(most, places.length) }, (_, i) =>
    places[Math.floor((i * places.length) / Math.min(most, places.length))]);
  const items = shown.map((at) =>
    [...passage(model, at), `\u00a0p\u00a0${probability(Math.exp(-model.text.losses[at]))}`]);
  return listed(`in the text, ${places.length === 1 ? "once" : `${grouped(places.length)} times`}`, items);
};

const relationsOf = ({ relations, texts }, token, show) =>
  relations.flatMap(({ name, words, ids }) =>
    ids.flatMap((tokens, number) => {
      if (!tokens.includes(token)) return [];
      return [[`${name}: ${words[number].join(" → ")} `, link(texts[tokens[tokens[0] === token ? 1 : 0]], show)]];
    }));

// The part of a card about one model; `text` is the token's.
const modelPart = (model, number, text, show) => {
  const { texts, idOf } = model.vocabulary;
  const [token, title] = [idOf.get(text), element("h3", {}, swatch(number), labels[number])];
  if (token === undefined) return element("div", {}, title, "not a token of this model");
  const radius = model.radius ? `, ρ ${model.radius[token].toPrecision(3)}` : "";
  const near = nearestOf(model, "neighbours", token)?.map(([other, distance]) =>
    element("span.near", {}, link(texts[other], show), distance.toFixed(2)));
  const contexts = nearestOf(model, "contexts", token)?.map(([at, value]) =>
    [...passage(model, at), `\u00a0${value.toFixed(3)}`]);
  return element("div", {}, title, element("p.quiet", {}, `|w| ${model.length[token].toFixed(2)}${radius}`),
    element("h4", {}, `nearest centres, ${model.harmonic ? "d" : "1 − cosine"}`),
    element("p", {}, ...(near ?? [`only of the ${grouped(model.rowOf.size)} most frequent tokens`])),
    ...occurrences(model, token),
    ...listed(`contexts nearest to the centre, ${model.harmonic ? "d / d_min" : "p"}`, contexts));
};
