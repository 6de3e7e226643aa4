// Heatmaps of layers × heads: hover or arrow keys read a head's value and null, click or Enter pins it everywhere.
const SEQUENTIAL = ["#00204c", "#00306f", "#2b446e", "#4b596a", "#666d70", "#808379", "#9d9a75", "#bcb16b", "#ddcb55", "#fee838"];
const DIVERGING = ["#8f3f00", "#d55e00", "#eeb184", "#f5f3ef", "#8fbde0", "#0072b2", "#00466e"];
let pin = null;
const maps = [];

function mixed(colours, share) {
  const at = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
  const index = Math.min(Math.floor(at), colours.length - 2);
  const channels = [0, 1, 2].map((channel) => {
    const [low, high] = [colours[index], colours[index + 1]].map((hex) => parseInt(hex.slice(1 + 2 * channel, 3 + 2 * channel), 16));
    return Math.round(low + (high - low) * (at - index));
  });
  return `rgb(${channels.join(",")})`;
}

/** Return the range of a quantity over all models, and whether 0 is in its middle. */
function rangeOf(quantity) {
  let low = Infinity, high = -Infinity;
  for (const model of quantity.models) for (const value of model.values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low < 0) {
    const size = Math.max(-low, high);
    return { low: -size, high: size, colours: DIVERGING };
  }
  return { low: low > 0.5 * high && low !== high ? low : 0, high: high > 0 ? high : 1, colours: SEQUENTIAL };
}

const nullAt = (model, index) => (Array.isArray(model.null) ? model.null[index] : model.null);

function describe(quantity, label, model, layer, head, heads) {
  const index = layer * heads + head;
  const zero = nullAt(model, index);
  const parts = [`${label}, layer ${layer}, head ${head}`, `${quantity.column} ${number(model.values[index])}`];
  parts.push(zero === null || zero === undefined ? "no null" : `null ${number(zero)}`);
  return parts;
}

class Heatmap {
  constructor(quantity, modelIndex, readout) {
    const { label, layers, heads } = data.models[modelIndex];
    Object.assign(this, { quantity, modelIndex, label, layers, heads, readout, cursor: null });
    this.values = quantity.models[modelIndex];
    this.canvas = element("canvas", {
      tabindex: "0", role: "application", "aria-roledescription": "heatmap",
      "aria-label": `${quantity.column} of ${label} by layer and head. Arrow keys read a head, Enter pins it.`,
    });
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => {
      const cell = this.cellAt(event);
      if (cell) this.read(cell, event.clientX, event.clientY);
      else hideTip();
    });
    canvas.addEventListener("pointerleave", () => { this.cursor = null; hideTip(); this.draw(); });
    canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) pinHead(this.modelIndex, ...cell);
    });
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("focus", () => { if (!this.cursor && canvas.matches(":focus-visible")) this.read([0, 0]); });
    canvas.addEventListener("blur", () => { this.cursor = null; this.draw(); });
    this.figure = element("figure", {}, element("figcaption", {}, label), canvas);
  }

  layout() {
    const width = Math.min(this.figure.parentElement?.clientWidth || 600, 620);
    this.left = 34;
    this.cell = Math.max(4, Math.min(24, Math.floor((width - this.left - 2) / this.heads)));
    return [Math.max(130, this.left + this.cell * this.heads + 2), this.cell * this.layers + 34];
  }

  draw() {
    const [width, height] = this.layout();
    const ratio = Math.max(1, window.devicePixelRatio || 1);
    const { canvas, cell, left, values, range } = this;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, rule] = ["--ink", "--soft", "--rule"].map((name) => style.getPropertyValue(name).trim());
    for (let layer = 0; layer < this.layers; layer++) for (let head = 0; head < this.heads; head++) {
      const value = values.values[layer * this.heads + head];
      const [x, y] = [left + head * cell, layer * cell];
      if (value === null) {
        pen.strokeStyle = rule;
        pen.beginPath();
        pen.moveTo(x + 1, y + cell - 1);
        pen.lineTo(x + cell - 1, y + 1);
        pen.stroke();
      } else {
        pen.fillStyle = mixed(range.colours, (value - range.low) / (range.high - range.low || 1));
        pen.fillRect(x, y, cell - (cell > 6 ? 1 : 0), cell - (cell > 6 ? 1 : 0));
      }
    }
    pen.fillStyle = soft;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const step = Math.max(1, Math.ceil(14 / cell));
    for (let layer = 0; layer < this.layers; layer += step) pen.fillText(layer, left - 6, (layer + 0.5) * cell);
    pen.textAlign = "center";
    const across = Math.max(1, Math.ceil(24 / cell));
    for (let head = 0; head < this.heads; head += across) pen.fillText(head, left + (head + 0.5) * cell, this.layers * cell + 9);
    pen.textAlign = "left";
    pen.fillText("layer ↓  head →", left, this.layers * cell + 25);
    const ring = (at, colour, width) => {
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.strokeRect(left + at[1] * cell - 1, at[0] * cell - (at[0] ? 1 : -0.5), cell + 1, cell + (at[0] ? 1 : -0.5));
    };
    if (pin && pin.layer < this.layers && pin.head < this.heads) {
      const at = [pin.layer, pin.head];
      ring(at, "#fff", 4);
      ring(at, pin.model === this.modelIndex ? "#c4006b" : "#6b3fa0", 2);
    }
    if (this.cursor) ring(this.cursor, ink, 2);
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = box.width / parseFloat(this.canvas.style.width);
    const head = Math.floor(((event.clientX - box.left) / scale - this.left) / this.cell);
    const layer = Math.floor((event.clientY - box.top) / scale / this.cell);
    return head >= 0 && head < this.heads && layer >= 0 && layer < this.layers ? [layer, head] : null;
  }

  read(cell, x, y) {
    this.cursor = cell;
    const parts = describe(this.quantity, this.label, this.values, ...cell, this.heads);
    this.readout.textContent = parts.join(" · ");
    this.draw();
    if (x !== undefined) showTip(parts.join("\n"), x, y);
  }

  onKey(event) {
    const [layer, head] = this.cursor || [0, 0];
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -head], End: [0, this.heads] };
    if (moves[event.key]) {
      event.preventDefault();
      const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
      this.read([clamp(layer + moves[event.key][0], this.layers), clamp(head + moves[event.key][1], this.heads)]);
    } else if ((event.key === "Enter" || event.key === " ") && this.cursor) {
      event.preventDefault();
      pinHead(this.modelIndex, layer, head);
    }
  }
}

function colourBar(range) {
  const bar = element("canvas", { width: "120", height: "10", "aria-hidden": "true" });
  const pen = bar.getContext("2d");
  for (let x = 0; x < 120; x++) {
    pen.fillStyle = mixed(range.colours, x / 119);
    pen.fillRect(x, 0, 1, 10);
  }
  return element("div", { class: "scale" }, number(range.low), bar, number(range.high));
}

for (const section of $$("section.metric")) {
  const quantities = data.metrics[section.dataset.metric]?.heads ?? [];
  const place = $(".heads", section);
  if (!quantities.length) continue;
  place.hidden = false;
  const grids = element("div", { class: "grids" });
  const readout = element("output", { class: "readout" });
  const scale = element("div");
  const meaning = element("p", { class: "fine" });
  let current = [];
  const show = (quantity) => {
    const range = rangeOf(quantity);
    for (const map of current) maps.splice(maps.indexOf(map), 1);
    current = data.models.map((_, index) => Object.assign(new Heatmap(quantity, index, readout), { range }));
    maps.push(...current);
    grids.replaceChildren(...current.map((map) => map.figure));
    scale.replaceChildren(colourBar(range));
    meaning.textContent = `${quantity.help || quantity.column}${quantity.unit ? ` (${quantity.unit})` : ""}. Click a head to pin it in all heatmaps.`;
    readout.textContent = "";
    current.forEach((map) => map.draw());
  };
  const choice = element("select", { onchange: (event) => show(quantities[event.target.value]) },
    ...quantities.map((quantity, index) => element("option", { value: index }, `${quantity.table}.${quantity.column}`)));
  place.append(element("h3", {}, "By layer and head"),
    element("div", { class: "controls" }, element("label", {}, "Quantity", choice), scale), meaning, grids, readout);
  show(quantities[0]);
}
const redrawMaps = () => maps.forEach((map) => map.draw());
redraws.push(redrawMaps);
addEventListener("resize", redrawMaps);

/** Pin a head: ring it in every heatmap, and list its values in all metrics. The same head again takes the pin away. */
function pinHead(model, layer, head) {
  const same = pin && pin.model === model && pin.layer === layer && pin.head === head;
  pin = same ? null : { model, layer, head };
  redrawMaps();
  drawPinned();
  announce(pin ? `Pinned layer ${layer}, head ${head} of ${data.models[model].label}` : "No head is pinned");
}

function drawPinned() {
  const panel = $("#pinned");
  panel.hidden = !pin;
  if (!pin) return;
  const { label, heads } = data.models[pin.model];
  const index = pin.layer * heads + pin.head;
  const rows = [];
  for (const [name, metric] of Object.entries(data.metrics)) for (const quantity of metric.heads) {
    const model = quantity.models[pin.model];
    const value = model.values[index];
    if (value === null || value === undefined) continue;
    const larger = model.values.filter((other) => other !== null && other > value).length;
    const n = model.values.filter((other) => other !== null).length;
    rows.push(element("tr", {}, element("th", { scope: "row" }, `${name}.${quantity.table}.${quantity.column}`),
      element("td", {}, number(value)), element("td", {}, number(nullAt(model, index))), element("td", {}, `${larger + 1} of ${n}`)));
  }
  panel.replaceChildren(
    element("header", {}, element("h2", {}, `${label}, layer ${pin.layer}, head ${pin.head}`),
      element("button", { type: "button", onclick: () => pinHead(pin.model, pin.layer, pin.head) }, "Unpin")),
    element("table", {}, element("thead", {}, element("tr", {},
      ...["quantity", "value", "null", "rank"].map((title, column) => element("th", { scope: "col", class: column ? false : "left" }, title)))),
      element("tbody", {}, ...rows)));
}
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && pin) pinHead(pin.model, pin.layer, pin.head);
});
