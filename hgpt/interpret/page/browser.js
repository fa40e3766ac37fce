// The text browser: pointing at a token, tapping it or reaching it with Tab shows each model's predictions for it.
(() => {
  const groups = JSON.parse(document.getElementById("readings").textContent);
  const swatches = document.querySelectorAll("#models .swatch");
  const visible = (token) => token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  const cell = (row, text, number) => {
    const td = row.insertCell();
    td.textContent = text;
    if (number) td.className = "number";
  };
  const line = (table, mark, token, p, ratio) => {
    const row = table.insertRow();
    cell(row, mark);
    cell(row, visible(token));
    cell(row, p >= 0.001 ? p.toFixed(3) : p.toExponential(0), true);
    if (ratio !== null) cell(row, ratio.toFixed(3), true);
  };
  const show = (panel, group, position) => {
    panel.replaceChildren();
    const head = document.createElement("div");
    head.className = "quiet";
    head.textContent = `position ${position + 1}: the next token is “${visible(group.models[0].reading[position].token)}”`;
    const models = document.createElement("div");
    models.className = "models";
    for (const model of group.models) {
      const seen = model.reading[position];
      const box = document.createElement("div");
      const title = document.createElement("h3");
      title.append(swatches[model.number].cloneNode(true), model.label);
      const table = document.createElement("table");
      const header = table.createTHead().insertRow();
      const names = ["", "token", "p"].concat(seen.ratio === null ? [] : ["d / d_min"]);
      for (const name of names) header.appendChild(Object.assign(document.createElement("th"), { textContent: name }));
      const body = table.createTBody();
      line(body, `target, rank ${seen.rank}`, seen.token, seen.p, seen.ratio);
      seen.nearest.forEach(([token, p, ratio], i) => line(body, `${i + 1}.`, token, p, ratio));
      box.append(title, table);
      models.append(box);
    }
    panel.append(head, models);
  };
  groups.forEach((group, number) => {
    const text = document.getElementById(`text-${number}`);
    const panel = document.getElementById(`panel-${number}`);
    const spans = [...text.querySelectorAll("span")];
    const choose = (span) => {
      spans.forEach((other) => other.classList.toggle("chosen", other === span));
      show(panel, group, Number(span.dataset.position));
    };
    spans.forEach((span) => ["mouseover", "focus", "click"].forEach((kind) => span.addEventListener(kind, () => choose(span))));
    if (spans.length) choose(spans[0]);
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => { details.open = true; }));
})();
