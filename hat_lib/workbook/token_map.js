// The map of a prompt: a row per token, a cell per layer, and beside it everything about the selected token.
// Words come from Python and go into the page as text, never as HTML.

const KEYS = {
  ArrowUp: ["token", -1], ArrowDown: ["token", 1], Home: ["token", -Infinity], End: ["token", Infinity],
  ArrowLeft: ["layer", -1], ArrowRight: ["layer", 1], PageUp: ["layer", -1], PageDown: ["layer", 1],
};

function element(tag, classes = "", text = "", parent = null) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  parent?.append(made);
  return made;
}

const percent = share => share === null ? "–" : `${(100 * share).toFixed(1)}%`;

function render({ model, el }) {
  const root = element("div", "hat-map", "", el);
  const legend = element("div", "hat-map-legend", "", root);
  const body = element("div", "hat-map-body", "", root);
  const tokens = element("div", "hat-map-tokens", "", body);
  const panel = element("div", "hat-map-panel", "", body);
  const tip = element("div", "hat-map-tip", "", root);
  tokens.tabIndex = 0;
  tokens.setAttribute("role", "listbox");
  tokens.setAttribute("aria-label", "tokens; arrow keys up and down pick a token, left and right a layer");
  tokens.setAttribute("data-lm-suppress-shortcuts", "true"); // else Notebook 7 takes the arrow keys for itself
  panel.setAttribute("aria-live", "polite");
  tip.hidden = true;
  const facts = () => model.get("facts");

  function paint(cell, share, protects) {
    const { low, high, colours } = facts();
    const at = high > low ? (share - low) / (high - low) : 0.5;
    if (share === null) cell.classList.add("hat-map-left");
    else cell.style.backgroundColor = colours[Math.round(Math.min(1, Math.max(0, at)) * (colours.length - 1))];
    if (protects) cell.classList.add("hat-map-protected");
  }

  function drawLegend() {
    const { low, high, colours } = facts();
    legend.replaceChildren();
    const scale = element("span", "", `executed share: ≤ ${percent(low)}`, legend);
    element("i", "hat-map-scale", "", scale).style.background = `linear-gradient(to right, ${colours.join(",")})`;
    scale.append(`≥ ${percent(high)}`);
    for (const [classes, words] of [["left", "blank: had left"], ["protected", "yellow, hatched: protected, runs in full"]]) {
      const entry = element("span", "", "", legend);
      element("i", `hat-map-${classes}`, "", entry).style.backgroundColor = classes === "left" ? "" : colours.at(-1);
      entry.append(words);
    }
  }

  function drawTokens() {
    const { share, tokens: all } = facts();
    tokens.replaceChildren();
    const axis = element("div", "hat-map-row hat-map-axis", "", tokens);
    axis.setAttribute("aria-hidden", "true");
    element("b", "", "layer", axis);
    share[0].forEach((_, layer) => element("i", "", layer % 5 ? "" : `${layer}`, axis));
    all.forEach((token, position) => {
      const row = element("div", "hat-map-row", "", tokens);
      row.setAttribute("role", "option");
      row.setAttribute("aria-label", [token.headline, ...token.lines].join(", "));
      row.id = `${model.model_id ?? "map"}-${position}`;
      element("b", "", token.label, row);
      share[position].forEach((value, layer) => {
        const cell = element("i", "", "", row);
        cell.dataset.token = position;
        cell.dataset.layer = layer;
        paint(cell, value, token.protected);
      });
    });
  }

  function drawPanel(position, layer) {
    const { sites, scored, site_share: parts, score, tokens: all } = facts();
    const token = all[position];
    panel.replaceChildren();
    element("h4", "", token.headline, panel);
    token.lines.forEach(line => element("p", "", line, panel));
    const work = table(["site", "layer by layer", "mean", `layer ${layer}`, scored], ["18%", "31%", "15%", "16%", "20%"]);
    sites.forEach((site, s) => {
      const row = element("tr", "", "", work);
      element("td", "", site, row);
      const strip = element("div", "hat-map-matrix", "", element("td", "", "", row));
      parts[position][s].forEach((value, at) => {
        const cell = element("i", at === layer ? "hat-map-picked" : "", "", strip);
        paint(cell, value, token.protected);
        cell.dataset.site = s;
        cell.dataset.token = position;
        cell.dataset.layer = at;
      });
      const over = score[position][s][layer];
      for (const text of [token.means[s], percent(parts[position][s][layer]), over === null ? "–" : over.toFixed(2)])
        element("td", "hat-map-number", text, row);
    });
    const next = table(["next: base", "", "next: adaptive", ""], ["36%", "14%", "36%", "14%"]);
    token.next.forEach((cells, rank) => {
      const row = element("tr", "", "", next);
      cells.forEach((text, column) => {
        const cell = element("td", column % 2 ? "hat-map-number" : "hat-map-odds", text, row);
        if (column % 2 === 0) cell.style.setProperty("--odds", `${100 * token.odds[column / 2][rank]}%`);
      });
    });
  }

  function table(heads, widths) {
    const made = element("table", "", "", panel);
    const row = element("tr", "", "", element("thead", "", "", made));
    heads.forEach((head, i) => {
      const cell = element("th", /^(mean|layer \d|score)/.test(head) ? "hat-map-number" : "", head, row);
      cell.style.width = widths[i];
    });
    return element("tbody", "", "", made);
  }

  function pick() {
    const { share } = facts();
    const position = Math.min(model.get("token"), share.length - 1);
    const layer = Math.min(model.get("layer"), share[0].length - 1);
    tokens.querySelectorAll(".hat-map-picked").forEach(cell => cell.classList.remove("hat-map-picked"));
    tokens.querySelectorAll("[role=option]").forEach((row, at) => {
      row.setAttribute("aria-selected", at === position);
      if (at !== position) return;
      row.children[layer + 1].classList.add("hat-map-picked");
      tokens.setAttribute("aria-activedescendant", row.id);
      const { top, bottom } = row.getBoundingClientRect(), frame = tokens.getBoundingClientRect();
      if (top < frame.top + row.offsetHeight) tokens.scrollTop -= frame.top + row.offsetHeight - top;
      else if (bottom > frame.bottom) tokens.scrollTop += bottom - frame.bottom;
    });
    drawPanel(position, layer);
  }

  function draw() {
    tip.hidden = true;
    if (!facts().share) return;
    drawLegend();
    drawTokens();
    pick();
  }

  function choose(token, layer) {
    const { share } = facts();
    model.set("token", Math.min(share.length - 1, Math.max(0, token)));
    model.set("layer", Math.min(share[0].length - 1, Math.max(0, layer)));
    model.save_changes();
  }

  root.addEventListener("pointermove", event => {
    const { token, layer, site } = event.target.dataset;
    tip.hidden = layer === undefined;
    if (tip.hidden) return;
    const { sites, share, site_share: parts, tokens: all } = facts();
    const value = site === undefined ? share[token][layer] : parts[token][site][layer];
    const what = site === undefined ? all[token].headline : sites[site];
    const ran = value === null ? "had left" : `${percent(value)} executed`;
    tip.textContent = `${what}\nlayer ${layer}: ${ran}${all[token].protected ? ", protected" : ""}`;
    const frame = root.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    const right = x > frame.width / 2, low = y > frame.height - 60;
    tip.style.transform = `translate(${right ? "-100%" : "0"}, ${low ? "-100%" : "0"})`;
    tip.style.left = `${x + (right ? -12 : 14)}px`;
    tip.style.top = `${y + (low ? -8 : 16)}px`;
  });
  root.addEventListener("pointerleave", () => { tip.hidden = true; });
  root.addEventListener("click", event => {
    const row = event.target.closest("[role=option]");
    const { token, layer } = event.target.dataset;
    if (layer !== undefined) choose(Number(token), Number(layer));
    else if (row) choose([...tokens.querySelectorAll("[role=option]")].indexOf(row), model.get("layer"));
    if (row) tokens.focus({ preventScroll: true });
  });
  tokens.addEventListener("keydown", event => {
    const [axis, step] = KEYS[event.key] ?? [];
    if (!axis || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const at = { token: model.get("token"), layer: model.get("layer") };
    at[axis] += step;
    choose(at.token, at.layer);
  });
  model.on("change:facts", draw);
  model.on("change:token", pick);
  model.on("change:layer", pick);
  draw();
  return () => {
    model.off("change:facts", draw);
    model.off("change:token", pick);
    model.off("change:layer", pick);
  };
}

export default { render };
