// One screen for a prompt and a dial: the map of the work, what both models say next, their texts, price and speed.
// The same code draws it in a notebook and on a page. Words from a model go into the page as text, never as HTML.
//
// A host has `presets` ([name, prompt, hint]), `blocks` (one for each preset, null where there is none: see screen.py)
// and, if a model may stand behind it, `ask(question, tell)`, a promise of a block; `tell` says why it takes long.

export function mount(root, host) {
  root.classList.add("hat-play");
  let facts = null, texts = null, forced = null, cells = [], asked = 0;
  const view = { at: 4, token: 0, layer: 0, other: null, tipped: null, guess: new Map(), shown: false };

  // -- the screen ------------------------------------------------------------------------------------------

  const form = element("form", "hat-form", "", root);
  const choice = element("select", "", "", element("label", "", "Example ", form));
  host.presets.forEach(([name], i) => { element("option", "", name, choice).value = i; });
  const prompt = element(host.ask ? "textarea" : "p", "hat-prompt", "", form), content = host.ask ? "value" : "textContent";
  prompt.rows = 2;
  prompt.setAttribute("aria-label", "prompt");
  const go = element("button", "", "Read it", form);
  go.hidden = !host.ask;
  const hint = element("p", "hat-hint", "", root);
  if (!host.ask) element("p", "hat-hint", "No model runs behind this page. To read a sentence of your own, run: hat play", root);

  const dial = element("div", "hat-dial", "", root);
  const label = element("label", "", "Capacity ", dial);
  const slider = Object.assign(element("input", "", "", label), { type: "range", step: 1, min: 0 });
  const number = element("output", "hat-number", "", label);
  const relative = Object.assign(element("input"), { type: "checkbox" });
  element("label", "hat-switch", "", dial).append(relative, " colours relative to this prompt");
  const numbers = element("dl", "hat-numbers", "", root);
  const status = element("p", "hat-status", "", root);
  status.setAttribute("role", "status");
  const bar = element("progress", "hat-bar", "", root);
  bar.hidden = true;
  bar.setAttribute("aria-label", "the model is running");

  const result = element("div", "hat-result", "", root);
  const written = element("div", "hat-texts", "", result);
  const legend = element("div", "hat-legend", "", result);
  const body = element("div", "hat-body", "", result);
  const map = element("div", "hat-map", "", body);
  map.tabIndex = 0;
  map.setAttribute("role", "listbox");
  map.setAttribute("aria-label", "tokens; the arrow keys up and down pick a token, left and right a layer");
  map.setAttribute(OWN_KEYS, "true");
  const panels = element("div", "hat-panels", "", body);
  const price = element("div", "hat-price", "", body);
  const tip = element("div", "hat-tip", "", root);
  tip.hidden = true;

  // -- numbers ---------------------------------------------------------------------------------------------

  const step = () => forced?.step ?? facts.steps[view.at];
  const word = id => facts.words[id] ?? forced.words[id];

  function share(token, layer, site) {
    const [, T, L, S] = facts.shape, at = forced ? 0 : view.at;
    const value = (forced ?? facts).shares[((at * T + token) * L + layer) * S + site];
    return value === LEFT ? null : value / WHOLE;
  }

  function layerShare(token, layer) {
    const shares = facts.sites.map((_, site) => share(token, layer, site));
    return shares[0] === null ? null : shares.reduce((sum, value, site) => sum + facts.site_work[site] * value, 0);
  }

  /** Shares of the layers that a token entered. */
  const entered = token => Array.from({ length: facts.shape[2] }, (_, layer) => layerShare(token, layer)).filter(value => value !== null);

  function ends() {
    if (!relative.checked) return [0, 1];
    const found = facts.tokens.flatMap((token, t) => token.protected ? [] : entered(t)).sort((a, b) => a - b);
    return found.length ? [found[Math.floor(0.02 * found.length)], found[Math.ceil(0.98 * found.length) - 1]] : [0, 1];
  }

  function colour(value, [low, high]) {
    const at = high > low ? (value - low) / (high - low) : 1;
    return facts.colours[Math.round(Math.min(1, Math.max(0, at)) * (facts.colours.length - 1))];
  }

  // -- drawing ---------------------------------------------------------------------------------------------

  function drawNumbers() {
    const now = step(), dense = now.capacity === 1;
    number.textContent = now.capacity.toFixed(2);
    slider.setAttribute("aria-valuetext", `capacity ${now.capacity.toFixed(2)}`);
    numbers.replaceChildren();
    const about = name => facts.curves.some(([text, capacity]) => text === name && capacity === now.capacity) ? "" : "about ";
    const costs = namesOf(facts).map(name => `${about(name)}${signed(measured(facts.curves, name, now.capacity))} (${name})`);
    const rows = [["work on this prompt", `${percent(now.work)} of the base's, protected tokens included`],
      ["perplexity over the base's", dense ? "none" : costs.join(", ") || "not measured"],
      ["speed", facts.steps[view.at].speed || `${(1 / now.work).toFixed(2)}x, if time followed the work`]];
    for (const [name, words] of rows) {
      const pair = element("div", "", "", numbers);
      element("dt", "", name, pair);
      element("dd", "", words, pair);
    }
  }

  function drawLegend(scale) {
    legend.replaceChildren();
    const bar = element("span", "", `work in a layer: ${percent(scale[0])} `, legend);
    element("i", "hat-scale", "", bar).style.background = `linear-gradient(to right, ${facts.colours.join(",")})`;
    bar.append(` ${percent(scale[1])}`);
    element("span", "", "struck through: protected, runs in full", legend);
    if (facts.shares.includes(LEFT)) element("span", "", "blank: the token had left", legend);
    element("span", "", "tips: the capacity at which the next token changes (*: lower down it is the base's again)", legend);
  }

  function buildMap() {
    map.replaceChildren();
    const head = element("div", "hat-row hat-head", "", map);
    head.setAttribute("aria-hidden", "true");
    element("b", "", "layer", head);
    const axis = element("span", "hat-axis", "", head);
    for (let layer = 0; layer < facts.shape[2]; layer += 5)
      element("i", "", `${layer}`, axis).style.left = `${100 * (layer + 0.5) / facts.shape[2]}%`;
    element("em", "", "tips", head);
    facts.tokens.forEach((token, t) => {
      const row = element("div", "hat-row", "", map), [at, back] = tips(facts, t);
      row.setAttribute("role", "option");
      row.id = `hat-${root.dataset.id ??= Math.random().toString(36).slice(2)}-${t}`;
      element("b", "", visible(token.text) || "·", row);
      element("span", "", "", row);
      element("em", "", at === null ? "–" : at.toFixed(2) + (back === null ? "" : "*"), row);
    });
    const canvas = element("canvas", "", "", map);
    canvas.setAttribute("aria-hidden", "true");
  }

  function drawMap() {
    const scale = ends(), canvas = map.querySelector("canvas"), [, T, L] = facts.shape;
    canvas.style.height = `${T * ROW}px`;
    drawLegend(scale);
    cellsOn(canvas, L, T, ROW, (t, layer) => {
      const value = layerShare(t, layer);
      return { fill: value !== null && colour(value, scale), hatched: facts.tokens[t].protected,
        ring: t === view.token && layer === view.layer && MARK };
    });
    map.querySelectorAll("[role=option]").forEach((row, t) => {
      row.setAttribute("aria-selected", t === view.token);
      const ran = entered(t), mean = ran.reduce((a, b) => a + b) / ran.length;
      row.setAttribute("aria-label", `token ${t}, ${quoted(facts.tokens[t].text)}, ran ${percent(mean)}, tips at ${row.lastChild.textContent}`);
      if (t === view.token) map.setAttribute("aria-activedescendant", row.id);
    });
  }

  function panel(token, title) {
    const made = element("section", "hat-panel", "", panels), now = step(), [base] = facts.steps, [at, back] = tips(facts, token);
    element("h4", "", `${title}${quoted(facts.tokens[token].text)}`, made);
    const unsure = Math.round(Math.exp(facts.tokens[token].entropy)).toLocaleString("en");
    const lines = [facts.tokens[token].protected ? "Protected: it runs in full at every capacity." :
      at === null ? "Its likeliest next token never changes." : `Its likeliest next token changes at ${at.toFixed(2)}`
        + (back === null ? "." : `, and at ${back.toFixed(2)} it is the base's again.`),
      `The base is as unsure of what comes next as among ${unsure} equally likely tokens; skipping changes that by ${now.kl[token].toFixed(3)} nats (KL).`];
    lines.forEach(line => element("p", "", line, made));
    const table = element("table", "", "", made), head = element("tr", "", "", element("thead", "", "", table));
    for (const name of ["next, dense", "", `next, at ${now.capacity.toFixed(2)}`, ""]) element("th", "", name, head);
    const rows = element("tbody", "", "", table);
    base.next[token].forEach((pair, rank) => {
      const row = element("tr", "", "", rows);
      for (const cell of [pair, now.next[token][rank]]) {
        const said = element("td", "hat-odds", "", row), text = word(cell[0]);
        said.style.setProperty("--odds", `${100 * cell[1]}%`);
        if (host.ask) element("button", "hat-word", quoted(text), said).dataset.goes = before(token + 1) + text;
        else said.textContent = quoted(text);
        element("td", "hat-right", percent(cell[1]), row);
      }
    });
    const strip = element("div", "hat-strip", "", made), names = element("div", "hat-sites", "", strip);
    facts.sites.forEach(site => element("span", "", site, names));
    const canvas = element("canvas", "", "", strip), scale = ends();
    canvas.dataset.token = token;
    canvas.style.height = `${facts.sites.length * STRIP}px`;
    cellsOn(canvas, facts.shape[2], facts.sites.length, STRIP, (site, layer) => {
      const value = share(token, layer, site), own = cells.find(c => c[0] === token && c[1] === layer && c[2] === site);
      return { fill: value !== null && colour(value, scale), hatched: facts.tokens[token].protected, ring: own && MARK };
    });
    if (title && host.ask && !facts.tokens[token].protected) budget(made);
  }

  /** The game: the reader's own choice of what this token runs, against the router's. */
  function budget(parent) {
    const box = element("p", "hat-budget", "", parent);
    if (!cells.length || !forced) {
      box.textContent = "Your budget: click a cell above to run it in full, again to skip it, again to give it back.";
      return;
    }
    const router = facts.steps[view.at], first = Math.min(...cells.map(cell => cell[0]));
    const mean = table => table.kl.slice(first).reduce((sum, kl) => sum + kl, 0) / (table.kl.length - first);
    const [own, theirs] = [mean(forced.step), mean(router)], more = forced.step.work - router.work;
    box.textContent = `Your budget: ${cells.length} ${cells.length === 1 ? "cell" : "cells"}, work ${percent(forced.step.work, 2)} (router ${percent(router.work, 2)}), `
      + `KL from here on ${own.toFixed(4)} (router ${theirs.toFixed(4)}). `
      + (more > 5e-5 ? "You spend more than the router: skip something, too. " :
        own < theirs ? `You win by ${percent(1 - own / theirs)}. ` : `The router wins by ${percent(1 - theirs / own)}. `);
    element("button", "hat-reset", "Reset", box).type = "button";
  }

  function drawPanels() {
    panels.replaceChildren();
    panel(view.token, "pinned: ");
    if (view.other !== null && view.other !== view.token) panel(view.other, "");
  }

  const before = end => facts.tokens.slice(0, end).map(token => token.text).join("");

  function drawTexts() {
    written.replaceChildren();
    if (!texts) return;
    const list = view.at ? [texts[0], texts[view.at]] : [texts[0]];
    for (const text of list) {
      const box = element("section", "", "", written), dense = text === texts[0];
      const read = facts.megabytes * text.values.reduce((sum, share) => sum + share, 0) / 1000;
      element("h4", "", dense ? "goes on, dense" : `goes on at ${facts.steps[view.at].capacity.toFixed(2)}`, box);
      const apart = text.mark === null ? "the same text" : `first differs at token ${text.mark + 1}`;
      element("p", "hat-faint", `${read.toFixed(1)} GB of ${facts.weights} weights read${dense ? "" : `; ${apart}`}`, box);
      const line = element("p", "hat-line", "", box);
      text.tokens.forEach((token, i) => {
        const span = element(host.ask ? "button" : "span", i === text.mark ? "hat-token hat-differs" : "hat-token", visible(token), line);
        const fill = colour(text.values[i], [0, 1]);
        Object.assign(span.style, dense ? {} : { backgroundColor: fill, color: ink(fill) });
        span.title = `${percent(text.values[i])} of the base's work${host.ask ? "; click: what else could stand here?" : ""}`;
        if (host.ask) span.dataset.goes = facts.prompt + text.tokens.slice(0, i).join("");
      });
    }
  }

  function drawTip() {
    const at = view.tipped;
    tip.hidden = !at;
    if (at) tip.textContent = `${quoted(facts.tokens[at.token].text)}, layer ${at.layer}: ${percent(layerShare(at.token, at.layer))}`;
  }

  function draw() {
    if (!facts) return;
    for (const part of [drawNumbers, drawMap, drawPanels, drawTexts, drawTip]) part();
    drawPrice(price, facts, step(), view);
  }

  // -- what moves it ---------------------------------------------------------------------------------------

  function take(block) {
    facts = unpack(block);
    texts = facts.texts ?? null;
    [cells, forced, view.other, view.tipped] = [[], null, null, null];
    view.token = Math.min(view.token || Math.floor(facts.tokens.length / 2), facts.tokens.length - 1);
    view.at = Math.min(view.at, facts.steps.length - 1);
    slider.max = facts.steps.length - 1;
    slider.value = slider.max - view.at;
    if (root.ownerDocument.activeElement !== prompt) prompt[content] = facts.prompt;
    root.classList.remove("hat-stale");
    buildMap();
    draw();
  }

  function say(words, state = "") {
    status.textContent = words;
    status.dataset.state = state;
    bar.hidden = state !== "busy";
  }

  /** A block, or null if it was refused, or if another question was asked in the meantime. */
  async function ask(question, words) {
    const own = ++asked;
    say(words, "busy");
    try {
      const block = await host.ask(question, words => own === asked && say(words, "busy"));
      if (own === asked) say("");
      return own === asked ? block : null;
    } catch (error) {
      if (own === asked) say(error.message, "error");
      return null;
    }
  }

  async function read(text, help = "") {
    [prompt[content], hint.textContent] = [text, help];
    root.classList.add("hat-stale"); // what is shown is of another prompt
    const block = await ask({ ask: "map", prompt: text }, "Reading the prompt at nine capacities …");
    if (!block) return;
    take(block);
    goOn();
  }

  async function goOn() {
    const block = await ask({ ask: "texts", prompt: facts.prompt }, "Going on from it at nine capacities …");
    if (!block) return;
    texts = unpack(block).texts;
    drawTexts();
  }

  function giveBack() {
    [cells, forced] = [[], null];
    draw();
  }

  async function force() {
    if (!cells.length) return giveBack();
    const block = await ask({ ask: "forced", prompt: facts.prompt, capacity: facts.steps[view.at].capacity, cells }, "Running your budget …");
    if (!block) return;
    forced = unpack(block);
    draw();
  }

  function choose(which) {
    const [, text, help] = host.presets[which];
    view.token = 0;
    if (!host.blocks[which]) return read(text, help);
    asked++;
    say("");
    [prompt[content], hint.textContent] = [text, help];
    take(host.blocks[which]);
    if (!texts) goOn();
  }

  function pick(token, layer = view.layer) {
    view.token = Math.min(facts.tokens.length - 1, Math.max(0, token));
    view.layer = Math.min(facts.shape[2] - 1, Math.max(0, layer));
    view.other = null;
    drawMap();
    drawPanels();
    map.querySelector("[aria-selected=true]").scrollIntoView({ block: "nearest" });
  }

  function spot(event) {
    const canvas = map.querySelector("canvas").getBoundingClientRect();
    const [token, layer] = [Math.floor((event.clientY - canvas.top) / ROW), Math.floor((event.clientX - canvas.left) / canvas.width * facts.shape[2])];
    if (token < 0 || token >= facts.tokens.length) return null;
    return { token, layer: layer >= 0 && layer < facts.shape[2] ? layer : null };
  }

  choice.addEventListener("change", () => choose(Number(choice.value)));
  form.addEventListener("submit", event => {
    event.preventDefault();
    read(prompt.value);
  });
  prompt.addEventListener("keydown", event => {
    event.stopPropagation(); // a notebook's shortcuts
    if (event.key === "Enter" && !event.shiftKey && host.ask) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  slider.addEventListener("input", () => {
    view.at = slider.max - slider.value;
    giveBack();
  });
  relative.addEventListener("change", draw);
  map.addEventListener("pointermove", event => {
    const at = facts && spot(event);
    view.tipped = at && at.layer !== null ? at : null;
    drawTip();
    if (!at) return;
    if (view.other !== at.token) {
      view.other = at.token;
      drawPanels();
    }
    if (tip.hidden) return;
    const frame = root.getBoundingClientRect(), x = event.clientX - frame.left, far = x > frame.width / 2;
    Object.assign(tip.style, { transform: far ? "translateX(-100%)" : "", left: `${x + (far ? -12 : 14)}px`, top: `${event.clientY - frame.top + 16}px` });
  });
  map.addEventListener("pointerleave", () => { view.tipped = null; drawTip(); });
  map.addEventListener("click", event => {
    const at = spot(event);
    if (at) pick(at.token, at.layer ?? view.layer);
  });
  map.addEventListener("keydown", event => {
    const [axis, by] = KEYS[event.key] ?? [];
    if (!axis || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    pick(view.token + (axis === "token" ? by : 0), view.layer + (axis === "layer" ? by : 0));
  });
  result.addEventListener("click", event => {
    const { target } = event;
    if (target.dataset.goes && target.dataset.goes !== facts.prompt) {
      view.token = Infinity; // the end, from where it goes on
      read(target.dataset.goes);
    } else if (target.matches(".hat-show")) {
      view.shown = true;
      drawPrice(price, facts, step(), view);
    } else if (target.matches(".hat-reset")) {
      giveBack();
    } else if (target.matches(".hat-strip canvas") && Number(target.dataset.token) === view.token && host.ask && !facts.tokens[view.token].protected) {
      const box = target.getBoundingClientRect();
      const [layer, site] = [Math.floor((event.clientX - box.left) / box.width * facts.shape[2]), Math.floor((event.clientY - box.top) / STRIP)];
      const own = cells.find(c => c[0] === view.token && c[1] === layer && c[2] === site);
      if (!own) cells.push([view.token, layer, site, 1]);
      else if (own[3]) own[3] = 0;
      else cells.splice(cells.indexOf(own), 1);
      view.layer = layer;
      force();
    }
  });
  const watch = new ResizeObserver(() => facts && draw());
  watch.observe(map);
  choose(0);
  return () => watch.disconnect();
}
