// From a layer's value to the texts behind it, and from a text to its tokens.
const tokensOf = new Map(data.tokens.map((text, index) => [text.id, index]));
let openText = null;

for (const section of $$("section.metric")) {
  const behind = data.metrics[section.dataset.metric]?.texts;
  const place = $(".behind", section);
  if (!behind || !behind.models.some((model) => Object.keys(model).length)) continue;
  place.hidden = false;
  const list = element("ol");
  const note = element("p", { class: "fine", "aria-live": "polite" });
  const layerChoice = element("select");
  const modelChoice = element("select", {}, ...data.models.map((model, index) => element("option", { value: index }, model.label)));
  const fillLayers = () => {
    const kept = layerChoice.value;
    const layers = Object.keys(behind.models[modelChoice.value]);
    layerChoice.replaceChildren(...layers.map((layer) => element("option", { value: layer }, layer)));
    if (layers.includes(kept)) layerChoice.value = kept;
  };
  const draw = () => {
    const model = Number(modelChoice.value);
    const layer = behind.models[model][layerChoice.value];
    list.replaceChildren();
    if (!layer) return;
    const unit = behind.unit ? ` (${behind.unit})` : "";
    note.textContent = `${behind.column}${unit}${layer.group ? `, ${layer.group}` : ""}, heads averaged: mean ${number(layer.mean)} over ` +
      `${layer.n} texts` + (layer.n > layer.texts.length ? `; the ${layer.texts.length / 2} highest and lowest` : "") +
      ". The bar is the distance from the mean.";
    const largest = Math.max(...layer.texts.map(([, value]) => Math.abs(value - layer.mean))) || 1;
    list.append(...layer.texts.map(([text, value]) => {
      const share = (value - layer.mean) / largest;
      const bar = element("i");
      bar.style.left = `${share < 0 ? 50 + 50 * share : 50}%`;
      bar.style.width = `${50 * Math.abs(share)}%`;
      const open = tokensOf.has(text) ? element("button", {
        type: "button", "aria-label": `Show the tokens of ${text}`, onclick: () => showText(text, model, Number(layerChoice.value)),
      }, "Tokens") : null;
      return element("li", {}, element("span", { title: text }, text), element("span", {}, number(value)),
        element("span", { class: "deviation", "aria-hidden": "true" }, bar), open);
    }));
  };
  modelChoice.addEventListener("change", () => { fillLayers(); draw(); });
  layerChoice.addEventListener("change", draw);
  place.append(element("h3", {}, "Texts behind a layer"), element("div", { class: "controls" },
    element("label", {}, "Model", modelChoice), element("label", {}, "Layer", layerChoice)), note, list);
  fillLayers();
  draw();
  const choose = (layer) => {
    layerChoice.value = layer;
    draw();
    place.scrollIntoView({ block: "nearest" });
    announce(`Texts behind layer ${layer}`);
  };
  for (const source of $$("button.layer, .strip", section)) source.addEventListener("click", () => {
    choose(source.dataset.layer);
    if (source.matches("button")) layerChoice.focus({ preventScroll: true });
  });
}
for (const button of $$("button.layer")) {
  const behind = button.closest("section.metric") && $(".behind", button.closest("section.metric"));
  if (!behind || behind.hidden) button.replaceWith(button.textContent);
}

const view = $("#text-view");
if (view) {
  const textChoice = element("select", {}, ...data.tokens.map((text, index) => element("option", { value: index }, text.id)));
  const modelChoice = element("select", {}, ...data.models.map((model, index) => element("option", { value: index }, model.label)));
  const layerChoice = element("select");
  const words = element("div", { class: "words", tabindex: "0", role: "application", "aria-roledescription": "text by token" });
  const readout = element("output", { class: "readout" });
  const scale = element("div", { class: "keys" });
  let active = null;
  let read = () => {};
  const draw = () => {
    const model = data.tokens[textChoice.value].models[modelChoice.value];
    active = null;
    readout.textContent = "";
    words.replaceChildren();
    scale.replaceChildren();
    if (!model) {
      words.textContent = "This model has no tokens of this text.";
      return;
    }
    const kept = layerChoice.value;
    layerChoice.replaceChildren(...model.layers.map((layer) => element("option", { value: layer }, layer)));
    if (model.layers.map(String).includes(kept)) layerChoice.value = kept;
    const row = model.layers.indexOf(Number(layerChoice.value));
    const [received, norms] = [model.received[row] ?? [], model.norm[row] ?? []];
    const nulls = model.null[model.null.length === 1 ? 0 : row] ?? [];
    const present = (values) => values.filter((value) => value !== null && value !== undefined);
    const top = Math.max(0, ...present(received));
    const sizes = present(norms).filter((norm) => norm > 0).map(Math.log);
    const [low, high] = [Math.min(...sizes), Math.max(...sizes)];
    const label = data.models[modelChoice.value].label;
    words.setAttribute("aria-label", `Tokens of ${data.tokens[textChoice.value].id} in layer ${layerChoice.value} of ${label}. Arrow keys read a token.`);
    const spans = model.words.map((word, position) => {
      const span = element("span", { "data-position": position }, word);
      if (received[position] !== null && top > 0) span.style.setProperty("--t", Math.sqrt(received[position] / top).toFixed(3));
      if (norms[position] > 0) span.style.setProperty("--n", (high > low ? 0.15 + 0.85 * (Math.log(norms[position]) - low) / (high - low) : 0.5).toFixed(3));
      return span;
    });
    words.append(...spans);
    scale.append(element("span", {}, "0", element("i"), `${number(top)} attention received (square-root scale)`),
      element("span", {}, number(sizes.length ? Math.exp(low) : null), element("i", { class: "norm" }), `${number(sizes.length ? Math.exp(high) : null)} residual norm`));
    read = (position, event) => {
      spans[active]?.classList.remove("active");
      active = position;
      spans[position].classList.add("active");
      const parts = [`position ${position}: ${JSON.stringify(model.words[position])}`,
        `attention received ${number(received[position])}`, `null ${number(nulls[position])}`, `residual norm ${number(norms[position])}`];
      readout.textContent = parts.join(" · ");
      if (event) showTip(parts.join("\n"), event.clientX, event.clientY);
    };
  };
  words.addEventListener("pointermove", (event) => {
    const position = event.target.dataset?.position;
    if (position !== undefined) read(Number(position), event);
    else hideTip();
  });
  words.addEventListener("pointerleave", hideTip);
  words.addEventListener("keydown", (event) => {
    const last = words.children.length - 1;
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || last < 0) return;
    event.preventDefault();
    read(Math.min(Math.max((active ?? -1) + steps[event.key], 0), last));
  });
  for (const choice of [textChoice, modelChoice, layerChoice]) choice.addEventListener("change", draw);
  view.append(element("div", { class: "controls" }, element("label", {}, "Text", textChoice),
    element("label", {}, "Model", modelChoice), element("label", {}, "Layer", layerChoice)), scale, words, readout);
  draw();
  openText = (text, model, layer) => {
    textChoice.value = tokensOf.get(text);
    modelChoice.value = model;
    draw();
    layerChoice.value = layer;
    draw();
    $("#texts").scrollIntoView();
    words.focus({ preventScroll: true });
  };
}
function showText(text, model, layer) { if (openText) openText(text, model, layer); }
