// What the screen of play.js draws with: elements, cells on a canvas, and the chart of prices.

const WHOLE = 250, LEFT = 255, ROW = 18, STRIP = 15;
const KEYS = { ArrowUp: ["token", -1], ArrowDown: ["token", 1], Home: ["token", -Infinity], End: ["token", Infinity],
  ArrowLeft: ["layer", -1], ArrowRight: ["layer", 1] };
const SVG = "http://www.w3.org/2000/svg";
const MARK = "#d55e00", CURVES = ["#0072b2", "#009e73", "#cc79a7", "#e69f00"];

// On what has the focus, or JupyterLab takes its arrow keys and collapses a section.
const OWN_KEYS = "data-lm-suppress-shortcuts", CONTROLS = ["button", "input", "select", "textarea"];

function element(tag, classes = "", text = "", parent = null) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  if (CONTROLS.includes(tag)) made.setAttribute(OWN_KEYS, "true");
  parent?.append(made);
  return made;
}

function drawn(tag, parent, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  parent.append(made);
  return made;
}

const percent = (share, digits = 0) => share === null ? "–" : `${(100 * share).toFixed(digits)} %`;
const signed = share => `${share <= -0.0005 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)} %`;
const visible = text => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const quoted = text => text ? `“${visible(text)}”` : "(part of a character)";

function unpack(block) {
  const bytes = block instanceof DataView ? new Uint8Array(block.buffer, block.byteOffset, block.byteLength) : block;
  const size = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  return { ...header, shares: bytes.subarray(4 + size) };
}

function ink(colour) {
  const [r, g, b] = [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16) / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "black" : "white";
}

function cellsOn(canvas, columns, rows, height, paint) {
  const width = canvas.clientWidth, scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(rows * height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const each = width / columns, gap = each > 6 ? 1 : 0;
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const { fill, hatched, ring } = paint(row, column);
      const box = [column * each, row * height, each - gap, height - 1];
      if (fill) {
        context.fillStyle = fill;
        context.fillRect(...box);
      }
      if (hatched) {
        context.strokeStyle = "#0009";
        context.beginPath();
        context.moveTo(box[0], box[1] + height - 1);
        context.lineTo(box[0] + Math.min(each - gap, height), box[1] + 1);
        context.stroke();
      }
      if (ring) {
        context.strokeStyle = ring;
        context.lineWidth = 2;
        context.strokeRect(box[0] + 1, box[1] + 1, box[2] - 2, box[3] - 2);
        context.lineWidth = 1;
      }
    }
}

/** The highest capacity at which a token's likeliest next one is not the base's, and the next at which it is again; null
 *  where there is none. */
function tips(facts, token) {
  const best = facts.steps.map(step => step.next[token][0][0]), capacity = at => facts.steps[at]?.capacity ?? null;
  const at = best.findIndex(first => first !== best[0]), back = best.findIndex((first, i) => i > at && first === best[0]);
  return at < 0 ? [null, null] : [capacity(at), capacity(back)];
}

const namesOf = facts => [...new Set(facts.curves.map(([text]) => text))];

/** Perplexity over the base's, between measured capacities by a straight line in its logarithm. */
function measured(curves, name, capacity) {
  const rows = [...curves.filter(([text]) => text === name).map(([, c, more]) => [c, Math.log1p(more)]), [1, 0]].sort((a, b) => a[0] - b[0]);
  const over = rows.findIndex(([c]) => c >= capacity);
  if (over < 1) return Math.expm1(rows[0][1]);
  const [[c0, a], [c1, b]] = [rows[over - 1], rows[over]];
  return Math.expm1(a + (b - a) * (capacity - c0) / (c1 - c0));
}

/** The chart, on which a reader first draws what they expect. */
function drawPrice(price, facts, now, view) {
  price.replaceChildren();
  if (!facts.curves.length) return;
  const LEFTMOST = 44, BOTTOM = 176, WIDE = 400, HIGH = 160;
  const names = namesOf(facts), least = Math.min(...facts.steps.map(s => s.capacity));
  const x = capacity => LEFTMOST + WIDE * (capacity - least) / (1 - least), y = more => BOTTOM - HIGH * Math.min(Math.max(more, 0), 0.6) / 0.6;
  element("h4", "", "What does a capacity cost?", price);
  const words = element("p", "hat-faint", "", price);
  const svg = drawn("svg", price, { viewBox: "0 0 460 214", role: "img", "aria-label": "perplexity against capacity", class: "hat-frontier" });
  for (const more of [0, 0.2, 0.4, 0.6]) {
    drawn("line", svg, { x1: LEFTMOST, x2: LEFTMOST + WIDE, y1: y(more), y2: y(more), class: "hat-grid" });
    drawn("text", svg, { x: LEFTMOST - 5, y: y(more) + 4, "text-anchor": "end" }, more ? `+${100 * more} %` : "0");
  }
  for (const { capacity } of facts.steps.filter((_, i) => i % 2 === 0))
    drawn("text", svg, { x: x(capacity), y: BOTTOM + 16, "text-anchor": "middle" }, capacity.toFixed(2));
  drawn("text", svg, { x: LEFTMOST + WIDE / 2, y: BOTTOM + 33, "text-anchor": "middle" }, "capacity");
  const line = (points, more) => drawn("polyline", svg, { points: points.map(p => p.join(",")).join(" "), ...more });
  const worst = capacity => Math.max(...names.map(name => measured(facts.curves, name, capacity)));
  const guess = facts.steps.filter(s => view.guess.has(s.capacity)).map(s => s.capacity);
  line(guess.map(c => [x(c), y(view.guess.get(c))]), { class: "hat-guess", style: `stroke: ${MARK}` });
  if (view.shown) names.forEach((name, i) => {
    const rows = facts.curves.filter(([text, c]) => text === name && c >= least).sort((a, b) => a[1] - b[1]);
    const look = { class: "hat-curve", style: `stroke: ${CURVES[i % CURVES.length]}` };
    line([...rows.map(([, c, more]) => [x(c), y(more)]), [x(1), y(0)]], look);
    for (const [, c, , low, high] of rows) if (low !== null) line([[x(c), y(low)], [x(c), y(high)]], look);
    drawn("text", svg, { x: LEFTMOST + 130, y: 22 + 16 * i, style: `fill: ${CURVES[i % CURVES.length]}` }, name);
  });
  drawn("line", svg, { x1: x(now.capacity), x2: x(now.capacity), y1: 10, y2: BOTTOM, class: "hat-now" });
  const off = guess.map(c => Math.abs(view.guess.get(c) - worst(c)));
  words.textContent = !view.shown ? "Draw it first: drag over the picture to say how much worse than the base's the perplexity gets. Then look. " :
    `Perplexity over the base's, measured on ${names.length} ${names.length === 1 ? "text" : "texts"}, with 95 % intervals. `
    + (off.length ? `You were off by ${(100 * off.reduce((a, b) => a + b) / off.length).toFixed(0)} points on average, from the worst text.` : "");
  if (!view.shown) element("button", "hat-show", "Show what was measured", words).type = "button";
  svg.onpointermove = svg.onpointerdown = event => {
    if (!event.buttons && event.type === "pointermove" || view.shown) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect(), [px, py] = [460 * (event.clientX - box.left) / box.width, 214 * (event.clientY - box.top) / box.height];
    const nearest = facts.steps.map(s => s.capacity).sort((a, b) => Math.abs(x(a) - px) - Math.abs(x(b) - px))[0];
    view.guess.set(nearest, Math.min(0.6, Math.max(0, 0.6 * (BOTTOM - py) / HIGH)));
    drawPrice(price, facts, now, view);
  };
}
