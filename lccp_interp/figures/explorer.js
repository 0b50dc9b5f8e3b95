// The head explorer's face: a map of heads, one head's trajectory, its attention over a prompt.
// Everything is drawn from the traits of explorer.py. All text of a run goes through textContent or setAttribute, never
// into markup, and nothing is loaded from anywhere.

const SVG = "http://www.w3.org/2000/svg";
const N_CHARS_PX = 6.3; // width of a character of a tick, for leaving out labels that would touch

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(parent, tag, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

// JupyterLab takes arrow keys from whatever has the focus, unless that very element says otherwise.
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };

const digits = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(value >= 0.9995 ? 4 : 3))) : "undefined");
const percent = (value) => (value < 0.001 ? (value > 0 ? "under 0.1 %" : "0 %") : `${value >= 0.0995 ? Math.round(100 * value) : Number((100 * value).toFixed(1))} %`);

function mixed(scale, fraction) {
  const place = Math.min(Math.max(fraction, 0), 1) * (scale.length - 1);
  const left = Math.min(Math.floor(place), scale.length - 2);
  const part = (colour, i) => parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16);
  return [0, 1, 2].map((i) => {
    const low = part(scale[left], i);
    return Math.round(low + (part(scale[left + 1], i) - low) * (place - left));
  });
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;
// Relative luminance decides between the two inks; 0.18 is where both have the same contrast.
function isLight(rgb) {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18;
}

function niceTicks(low, high, target) {
  const raw = (high - low) / target;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((value) => value >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

// On a dark page the element that gives the background is dark; themes need not announce themselves.
function isDarkPage(element) {
  for (let at = element; at; at = at.parentElement) {
    const rgba = (getComputedStyle(at).backgroundColor.match(/[\d.]+/g) || []).map(Number);
    if (rgba.length >= 3 && (rgba.length === 3 || rgba[3] > 0.5)) return !isLight(rgba.slice(0, 3));
  }
  return false;
}

function render({ model, el }) {
  const about = model.get("_about");
  const bytes = model.get("_scores");
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  const [nStatistics, nMetrics, nCheckpoints, nLayers, nHeads] = about.shape;
  const nPlaces = nCheckpoints * nLayers * nHeads;
  const values = new Float32Array(buffer, 0, nStatistics * nMetrics * nPlaces);
  const retrieves = new Uint8Array(buffer, 4 * values.length, nPlaces);
  const [SCORE, LOW, HIGH, N] = [0, 1, 2, 3];

  let scale = about.colours.light;
  let focused = [0, 0];
  const unlisten = [];
  const on = (names, handler) => {
    model.on(names, handler);
    unlisten.push(() => model.off(names, handler));
  };

  // What is selected, as indices.
  const metricAt = () => about.metrics.indexOf(model.get("metric"));
  const checkpointAt = () => about.checkpoints.findIndex((one) => one.name === model.get("checkpoint"));
  const selected = () => [about.layers.indexOf(model.get("layer")), about.heads.indexOf(model.get("head"))];
  const placeAt = (c, row, column) => (c * nLayers + row) * nHeads + column;
  const valueAt = (statistic, c, row, column) => values[(statistic * nMetrics + metricAt()) * nPlaces + placeAt(c, row, column)];
  const headName = (row, column) => `${about.layers[row]}-${about.heads[column]}`;

  let pending = 0;
  const save = (wait_ms = 0) => {
    clearTimeout(pending);
    if (wait_ms) pending = setTimeout(() => model.save_changes(), wait_ms);
    else model.save_changes();
  };

  // ---------------------------------------------------------------- the page
  const root = make("section", { class: "lccp-explorer", "aria-label": "Head explorer" });
  const status = make("p", { class: "lccp-hidden", role: "status", "aria-live": "polite" });

  // A label that holds its control would be read with all of the control's options.
  const metricBox = make("select", { "aria-label": "Metric", ...OWN_KEYS });
  for (const name of about.metrics) metricBox.append(make("option", { value: name }, name));
  const slider = make("input", { type: "range", min: 0, max: nCheckpoints - 1, step: 1, "aria-label": "Checkpoint", ...OWN_KEYS });
  const where = make("output", { class: "lccp-where" });
  const controls = make(
    "div", { class: "lccp-controls" },
    make("label", { class: "lccp-field" }, make("span", {}, "Metric"), metricBox),
    make("label", { class: "lccp-field lccp-wide" }, make("span", {}, "Checkpoint"), slider),
    where,
  );

  const grid = make("div", { class: "lccp-grid", role: "grid", "aria-readonly": "true" });
  const readout = make("p", { class: "lccp-readout" });
  const bar = make("div", { class: "lccp-bar" });
  const mapPanel = make("div", { class: "lccp-panel lccp-map" }, grid, bar, readout);

  const plotTitle = make("h3");
  const story = make("p", { class: "lccp-note" });
  const plotPlace = make("div", { class: "lccp-plot" });
  const plotPanel = make("div", { class: "lccp-panel lccp-trajectory" }, plotTitle, plotPlace, story);

  const textTitle = make("h3");
  const caseBox = make("select", { "aria-label": `Case of ${about.length} tokens`, ...OWN_KEYS });
  const eventBox = make("select", { "aria-label": "Copy event", ...OWN_KEYS });
  const choices = make(
    "div", { class: "lccp-controls" },
    make("label", { class: "lccp-field lccp-wide" }, make("span", {}, `Case of ${about.length} tokens`), caseBox),
    make("label", { class: "lccp-field" }, make("span", {}, "Copy event"), eventBox),
  );
  const textBody = make("div", { class: "lccp-body" });
  const textPanel = make("div", { class: "lccp-panel lccp-attention" }, textTitle, choices, textBody);
  root.append(controls, make("div", { class: "lccp-columns" }, mapPanel, plotPanel), textPanel, status);

  // ---------------------------------------------------------------- the map
  const cells = [];
  function buildGrid() {
    const step = (n, most) => 2 ** Math.max(0, Math.ceil(Math.log2(n / most)));
    const columnStep = step(nHeads, 12);
    const rowStep = step(nLayers, 24);
    grid.style.setProperty("--n-heads", nHeads);
    grid.classList.toggle("lccp-dense", nHeads > 20);
    grid.setAttribute("aria-rowcount", nLayers + 1);
    grid.setAttribute("aria-colcount", nHeads + 1);
    const top = make("div", { role: "row", "aria-rowindex": 1 });
    top.append(make("div", { role: "columnheader", class: "lccp-corner", "aria-label": "layer" }, "layer"));
    about.heads.forEach((head, j) => {
      const shown = j % columnStep === 0 ? String(head) : "";
      top.append(make("div", { role: "columnheader", class: "lccp-tick", "aria-label": `head ${head}` }, shown));
    });
    grid.append(top);
    about.layers.forEach((layer, i) => {
      const line = make("div", { role: "row", "aria-rowindex": i + 2 });
      const shown = i % rowStep === 0 ? String(layer) : "";
      line.append(make("div", { role: "rowheader", class: "lccp-tick lccp-layer", "aria-label": `layer ${layer}` }, shown));
      cells.push(
        about.heads.map((head, j) => {
          const cell = make("div", { role: "gridcell", class: "lccp-cell", "aria-colindex": j + 2, tabindex: -1, ...OWN_KEYS });
          cell.dataset.at = `${i} ${j}`;
          line.append(cell);
          return cell;
        }),
      );
      grid.append(line);
    });
  }

  function tell(row, column) {
    const c = checkpointAt();
    const score = valueAt(SCORE, c, row, column);
    const interval = Number.isFinite(valueAt(LOW, c, row, column))
      ? `, 95 % interval ${digits(valueAt(LOW, c, row, column))} to ${digits(valueAt(HIGH, c, row, column))}`
      : "";
    const n = valueAt(N, c, row, column);
    const cases = Number.isFinite(score) && n > 0 ? `, n = ${n}` : "";
    const kind = retrieves[placeAt(c, row, column)] ? ", retrieval head" : "";
    return `head ${headName(row, column)}: ${model.get("metric")} ${digits(score)}${interval}${cases}${kind}`;
  }

  function paintMap() {
    const c = checkpointAt();
    const [low, high] = about.scales[model.get("metric")];
    const [row, column] = selected();
    cells.forEach((line, i) =>
      line.forEach((cell, j) => {
        const score = valueAt(SCORE, c, i, j);
        const undefinedScore = !Number.isFinite(score);
        const rgb = undefinedScore ? null : mixed(scale, (score - low) / (high - low));
        cell.classList.toggle("lccp-undefined", undefinedScore);
        cell.classList.toggle("lccp-retrieves", retrieves[placeAt(c, i, j)] === 1);
        const chosen = i === row && j === column;
        cell.classList.toggle("lccp-chosen", chosen);
        cell.classList.toggle("lccp-on-light", rgb !== null && isLight(rgb));
        cell.setAttribute("aria-selected", String(chosen));
        cell.setAttribute("aria-label", tell(i, j));
        cell.style.background = rgb ? css(rgb) : "";
      }),
    );
    grid.setAttribute("aria-label", `${model.get("metric")} of all heads at ${model.get("checkpoint")}; arrow keys move, Enter selects`);
    const one = about.checkpoints[c];
    where.replaceChildren(make("strong", {}, one.name), ` ${one.tokens} tokens`);
    slider.value = c;
    slider.setAttribute("aria-valuetext", `${one.name}, ${one.tokens} tokens`);
    metricBox.value = model.get("metric");
    paintBar(low, high);
    readout.textContent = tell(...selected());
  }

  function paintBar(low, high) {
    const steps = Array.from({ length: 13 }, (_, i) => css(mixed(scale, i / 12)));
    const strip = make("div", { class: "lccp-strip" });
    strip.style.background = `linear-gradient(to right, ${steps.join(", ")})`;
    const ticks = make("div", { class: "lccp-bar-ticks", "aria-hidden": "true" });
    for (const value of niceTicks(low, high, 4)) {
      const tick = make("span", {}, digits(value));
      tick.style.left = `${(100 * (value - low)) / (high - low)}%`;
      ticks.append(tick);
    }
    const key = make("div", { class: "lccp-keys" }, make("span", { class: "lccp-key" }, make("i", { class: "lccp-swatch lccp-retrieves" }), `retrieval head (${about.rule})`));
    if (root.querySelector(".lccp-cell.lccp-undefined")) {
      key.append(make("span", { class: "lccp-key" }, make("i", { class: "lccp-swatch lccp-undefined" }), "undefined"));
    }
    bar.replaceChildren(make("div", { class: "lccp-scale" }, make("span", {}, `${model.get("metric")} score`), make("div", { class: "lccp-ruler" }, strip, ticks)), key);
  }

  function focusOn(row, column, take = true) {
    cells[focused[0]][focused[1]].tabIndex = -1;
    focused = [Math.min(Math.max(row, 0), nLayers - 1), Math.min(Math.max(column, 0), nHeads - 1)];
    const cell = cells[focused[0]][focused[1]];
    cell.tabIndex = 0;
    if (take) cell.focus({ preventScroll: false });
  }

  function select(row, column) {
    model.set("layer", about.layers[row]);
    model.set("head", about.heads[column]);
    save();
    status.textContent = `${tell(row, column)}, selected`;
  }

  const KEYS = {
    ArrowUp: ([r, c]) => [r - 1, c], ArrowDown: ([r, c]) => [r + 1, c],
    ArrowLeft: ([r, c]) => [r, c - 1], ArrowRight: ([r, c]) => [r, c + 1],
    Home: ([r, c], all) => [all ? 0 : r, 0], End: ([r, c], all) => [all ? nLayers : r, nHeads],
    PageUp: ([r, c]) => [r - 5, c], PageDown: ([r, c]) => [r + 5, c],
  };
  grid.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || event.shiftKey) return;
    if (event.key in KEYS) focusOn(...KEYS[event.key](focused, event.ctrlKey));
    else if (event.key === "Enter" || event.key === " ") select(...focused);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const cellOf = (event) => event.target.dataset && event.target.dataset.at && event.target.dataset.at.split(" ").map(Number);
  grid.addEventListener("click", (event) => {
    const at = cellOf(event);
    if (at) {
      focusOn(...at);
      select(...at);
    }
  });
  for (const kind of ["pointerover", "focusin"]) {
    grid.addEventListener(kind, (event) => {
      const at = cellOf(event);
      if (at) readout.textContent = tell(...at);
    });
  }
  for (const kind of ["pointerleave", "focusout"]) grid.addEventListener(kind, () => (readout.textContent = tell(...selected())));

  slider.addEventListener("input", () => {
    model.set("checkpoint", about.checkpoints[Number(slider.value)].name);
    save(150); // not every step of a drag is worth a message, or a model
  });
  metricBox.addEventListener("change", () => {
    model.set("metric", metricBox.value);
    save();
  });

  // ---------------------------------------------------------------- the trajectory
  function paintPlot() {
    const [row, column] = selected();
    const metric = model.get("metric");
    const width = Math.max(240, plotPlace.clientWidth || 480);
    const height = Math.round(Math.min(290, Math.max(200, width * 0.5)));
    const pad = { left: 40, right: 14, top: 20, bottom: 40 };
    const [low, top] = about.scales[metric];
    const defined = (c) => Number.isFinite(valueAt(SCORE, c, row, column));
    let high = Math.max(top, metric === about.judge ? about.threshold : top);
    for (let c = 0; c < nCheckpoints; c++) if (Number.isFinite(valueAt(HIGH, c, row, column))) high = Math.max(high, valueAt(HIGH, c, row, column));
    const x = (c) => pad.left + 6 + about.checkpoints[c].x * (width - pad.left - pad.right - 12);
    const xAt = (place) => pad.left + 6 + place * (width - pad.left - pad.right - 12);
    const y = (value) => height - pad.bottom - ((value - low) / (high - low)) * (height - pad.bottom - pad.top);
    const life = about.stories[headName(row, column)];
    plotTitle.textContent = `Head ${headName(row, column)} over training`;
    const told = life || "at no time a settled retrieval head";
    story.textContent = `${told[0].toUpperCase()}${told.slice(1)} (by its ${about.judge} score).`;

    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("width", "100%");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${metric} score of head ${headName(row, column)} against tokens: ${[...Array(nCheckpoints).keys()].map((c) => `${about.checkpoints[c].name} ${digits(valueAt(SCORE, c, row, column))}`).join(", ")}. ${story.textContent}`);
    if (about.stage && about.stage.x > 0) {
      const left = xAt(about.stage.x);
      draw(svg, "rect", { class: "lccp-stage", x: left, y: pad.top, width: width - pad.right - left, height: height - pad.bottom - pad.top });
      draw(svg, "text", { class: "lccp-faint", x: left + 4, y: pad.top - 6 }, `${about.stage.name} →`);
    }
    for (const tick of niceTicks(low, high, 4)) {
      draw(svg, "line", { class: "lccp-gridline", x1: pad.left, x2: width - pad.right, y1: y(tick), y2: y(tick) });
      draw(svg, "text", { x: pad.left - 6, y: y(tick) + 4, "text-anchor": "end" }, digits(tick));
    }
    if (metric === about.judge) {
      draw(svg, "line", { class: "lccp-threshold", x1: pad.left, x2: width - pad.right, y1: y(about.threshold), y2: y(about.threshold) });
    }
    let free = -Infinity;
    about.axis.at.forEach((place, i) => {
      const half = (about.axis.text[i].length * N_CHARS_PX) / 2;
      const at = xAt(place);
      draw(svg, "line", { class: "lccp-axis", x1: at, x2: at, y1: height - pad.bottom, y2: height - pad.bottom + 4 });
      if (at - half < free + 5) return;
      free = at + half;
      draw(svg, "text", { x: at, y: height - pad.bottom + 16, "text-anchor": "middle" }, about.axis.text[i]);
    });
    draw(svg, "line", { class: "lccp-axis", x1: pad.left, x2: width - pad.right, y1: height - pad.bottom, y2: height - pad.bottom });
    draw(svg, "text", { class: "lccp-faint", x: (pad.left + width - pad.right) / 2, y: height - 6, "text-anchor": "middle" }, about.axis.label);

    const now = checkpointAt();
    draw(svg, "line", { class: "lccp-now", x1: x(now), x2: x(now), y1: pad.top, y2: height - pad.bottom });
    // A gap where a score is undefined: each stretch of defined ones is drawn for itself.
    let stretch = [];
    for (let c = 0; c <= nCheckpoints; c++) {
      if (c < nCheckpoints && defined(c)) {
        stretch.push(c);
        continue;
      }
      if (stretch.length) {
        const banded = stretch.filter((i) => Number.isFinite(valueAt(LOW, i, row, column)));
        const edge = [...banded.map((i) => [x(i), y(valueAt(HIGH, i, row, column))]), ...banded.reverse().map((i) => [x(i), y(valueAt(LOW, i, row, column))])];
        if (edge.length > 2) draw(svg, "polygon", { class: "lccp-band", points: edge.map((p) => p.join(",")).join(" ") });
        draw(svg, "polyline", { class: "lccp-line", points: stretch.map((i) => `${x(i)},${y(valueAt(SCORE, i, row, column))}`).join(" ") });
      }
      stretch = [];
    }
    for (let c = 0; c < nCheckpoints; c++) {
      if (!defined(c)) continue;
      const dot = draw(svg, "circle", { class: c === now ? "lccp-dot lccp-dot-now" : "lccp-dot", cx: x(c), cy: y(valueAt(SCORE, c, row, column)), r: c === now ? 5 : 3 });
      const interval = Number.isFinite(valueAt(LOW, c, row, column)) ? ` [${digits(valueAt(LOW, c, row, column))}, ${digits(valueAt(HIGH, c, row, column))}]` : "";
      draw(dot, "title", {}, `${about.checkpoints[c].name}, ${about.checkpoints[c].tokens} tokens: ${digits(valueAt(SCORE, c, row, column))}${interval}`);
      dot.addEventListener("click", () => {
        model.set("checkpoint", about.checkpoints[c].name);
        save();
      });
    }
    const kinds = new Map();
    for (const event of about.events) {
      if (event.layer !== about.layers[row] || event.head !== about.heads[column] || !defined(event.checkpoint)) continue;
      const label = event.kind + (event.provisional ? " (provisional)" : "");
      const mark = eventMark(svg, event, x(event.checkpoint), y(valueAt(SCORE, event.checkpoint, row, column)));
      draw(mark, "title", {}, `${label} at ${about.checkpoints[event.checkpoint].name}, ${about.checkpoints[event.checkpoint].tokens} tokens`);
      kinds.set(label, event);
    }
    const legend = make("div", { class: "lccp-keys" });
    const line = make("span", { class: "lccp-key" }, make("i", { class: "lccp-swatch lccp-swatch-band" }), "mean, 95 % interval");
    legend.append(line);
    for (const [label, event] of kinds) {
      const sign = document.createElementNS(SVG, "svg");
      sign.setAttribute("viewBox", "0 0 16 16");
      sign.setAttribute("class", "lccp-sign");
      eventMark(sign, event, 8, 8);
      legend.append(make("span", { class: "lccp-key" }, sign, label));
    }
    if (metric === about.judge) legend.append(make("span", { class: "lccp-key" }, make("i", { class: "lccp-swatch lccp-swatch-threshold" }), `threshold ${about.threshold}`));
    plotPlace.replaceChildren(svg, legend);
  }

  function eventMark(parent, event, x, y) {
    const kind = `lccp-${event.kind}${event.provisional ? " lccp-provisional" : ""}`;
    if (event.kind === "birth") return draw(parent, "circle", { class: kind, cx: x, cy: y, r: 6 });
    return draw(parent, "path", { class: kind, d: `M${x - 5} ${y - 5}L${x + 5} ${y + 5}M${x - 5} ${y + 5}L${x + 5} ${y - 5}` });
  }

  // ---------------------------------------------------------------- the attention
  function buildCases() {
    caseBox.append(make("option", { value: "" }, "choose a case …"));
    for (const [id, label] of about.cases) caseBox.append(make("option", { value: id }, label));
  }
  caseBox.addEventListener("change", () => {
    model.set("case_id", caseBox.value);
    model.set("event", -1);
    save();
    paintText();
  });
  eventBox.addEventListener("change", () => {
    model.set("event", Number(eventBox.value));
    save();
    paintText();
  });

  function paintText() {
    const [row, column] = selected();
    caseBox.value = model.get("case_id");
    textTitle.textContent = `Where head ${headName(row, column)} looks`;
    if (about.attention === "none") {
      choices.hidden = true;
      const code = (text) => make("code", {}, text);
      textBody.replaceChildren(
        make("p", { class: "lccp-note" }, "Attention needs a model. Pass ", code("model=load_model(…)"), " for one checkpoint, or ", code("checkpoints=\"FOLDER\""), " for the run's checkpoints, which then follow the slider."),
      );
      return;
    }
    const found = model.get("_attention");
    if (!model.get("case_id")) {
      eventBox.replaceChildren(make("option", {}, "–"));
      eventBox.disabled = true;
      textBody.replaceChildren(make("p", { class: "lccp-note" }, "Choose a case to see what the head attends to while the model reads the answer."));
      return;
    }
    const key = [model.get("case_id"), model.get("layer"), model.get("head"), model.get("event")];
    if (about.attention === "folder") key.push(model.get("checkpoint"));
    const fresh = JSON.stringify(found.key) === JSON.stringify(key);
    textBody.classList.toggle("lccp-stale", !fresh);
    textPanel.setAttribute("aria-busy", String(!fresh));
    if (!fresh) {
      if (!textBody.querySelector(".lccp-text")) textBody.replaceChildren(make("p", { class: "lccp-note" }, "Reading attention …"));
      return;
    }
    if (found.problem) {
      textBody.replaceChildren(make("p", { class: "lccp-problem", role: "alert" }, found.problem));
      return;
    }
    eventBox.disabled = false;
    eventBox.replaceChildren(make("option", { value: -1 }, `mean over ${found.events.length}`));
    found.events.forEach((text, i) => eventBox.append(make("option", { value: i }, `${i + 1}: predicts ${quoted(text)}${found.hits[i] ? " ✓" : ""}`)));
    eventBox.value = found.event;
    textBody.replaceChildren(summary(found), tokens(found), topList(found), textLegend(found));
    status.textContent = `Attention of head ${headName(row, column)}: ${percent(found.source_mass)} on the source`;
  }

  const quoted = (text) => `“${visible(text)}”`;
  const visible = (text) =>
    text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/[\u0000-\u001f]/g, (c) => String.fromCodePoint(0x2400 + c.codePointAt(0)));

  function summary(found) {
    const mean = found.event < 0;
    const other = about.attention === "model" && found.model !== model.get("checkpoint") ? ` (the model given, not ${model.get("checkpoint")})` : "";
    const where_ = found.needle.join() === found.source.join() ? `${percent(found.source_mass)} of its attention lies on the needle` : `${percent(found.source_mass)} of its attention lies on the source, ${percent(found.needle_mass)} on the whole needle`;
    const copies = mean
      ? `; in ${found.n_hits} of ${found.events.length} copy events it attends most to the token to be copied`
      : `; the token attended most ${found.hits[found.event] ? "is" : "is not"} the one to be copied`;
    const looking = mean ? `predicting ${quoted(found.predicts.trim())}` : `at position ${found.query}, predicting ${quoted(found.predicts)}`;
    return make("p", {}, "In ", make("strong", {}, found.model), `${other}, ${looking}: ${where_}${copies}.`);
  }

  // The darkest shade is what a head would reach that looks at nothing but the token to copy: heads stay comparable.
  function fullShade(found) {
    const most = found.segments.reduce((high, segment) => Math.max(high, ...segment.weights), 0);
    return Math.max(most, found.event < 0 ? 1 / found.events.length : 1);
  }

  function tokens(found) {
    const most = fullShade(found);
    const text = make("p", { class: "lccp-text", tabindex: 0, role: "group", "aria-label": "prompt and answer, tokens shaded by attention", ...OWN_KEYS });
    const inside = (place, [start, end]) => place >= start && place < end;
    found.segments.forEach((segment, s) => {
      const [left, mass] = found.gaps[s];
      if (left) text.append(make("span", { class: "lccp-gap" }, ` … ${left.toLocaleString("en")} tokens, ${percent(mass)} of attention … `));
      let needle = null;
      let source = null;
      segment.texts.forEach((content, i) => {
        const place = segment.start + i;
        const weight = segment.weights[i];
        // The root spreads small weights; a linear scale would show the largest alone.
        const share = Math.sqrt(weight / most);
        const token = make("span", { class: "lccp-token", title: `position ${place}: ${digits(weight)}` }, visible(content));
        if (share > 0.04) {
          const rgb = mixed(scale, share);
          token.style.backgroundColor = css(rgb);
          token.classList.add(isLight(rgb) ? "lccp-on-light" : "lccp-on-dark");
        }
        if (place === found.query) token.classList.add("lccp-query");
        if (place === found.n_prompt) text.append(make("span", { class: "lccp-answer-mark", title: "the answer begins here" }, "▸"));
        let parent = text;
        if (inside(place, found.needle)) {
          if (!needle) text.append((needle = make("span", { class: "lccp-needle" })));
          parent = needle;
          if (inside(place, found.source)) {
            if (!source) needle.append((source = make("span", { class: "lccp-source" })));
            parent = source;
          }
        }
        parent.append(token);
        if (content.includes("\n")) parent.append(make("br"));
      });
    });
    return text;
  }

  function topList(found) {
    const list = make("p", { class: "lccp-note" }, "Attended most: ");
    found.top.forEach(([place, content, weight], i) => {
      const kind = place >= found.source[0] && place < found.source[1] ? " in the source" : place >= found.needle[0] && place < found.needle[1] ? " in the needle" : "";
      list.append(`${i ? "; " : ""}${quoted(content)} at ${place}${kind} ${percent(weight)}`);
    });
    list.append(".");
    return list;
  }

  function textLegend(found) {
    const keys = make("div", { class: "lccp-keys" });
    const strip = make("i", { class: "lccp-swatch lccp-swatch-strip" });
    strip.style.background = `linear-gradient(to right, ${Array.from({ length: 9 }, (_, i) => css(mixed(scale, i / 8))).join(", ")})`;
    keys.append(make("span", { class: "lccp-key" }, strip, `attention 0 to ${digits(fullShade(found))} (square root)`));
    keys.append(make("span", { class: "lccp-key" }, make("i", { class: "lccp-swatch lccp-needle" }), "needle"));
    keys.append(make("span", { class: "lccp-key" }, make("i", { class: "lccp-swatch lccp-source" }), "source, what the answer copies"));
    if (found.query !== null) keys.append(make("span", { class: "lccp-key" }, make("i", { class: "lccp-swatch lccp-query" }), "position that looks"));
    keys.append(make("span", { class: "lccp-key" }, "▸ answer"));
    return keys;
  }

  // ---------------------------------------------------------------- together
  function paint() {
    if (!model.get("checkpoint") || metricAt() < 0) return;
    paintMap();
    paintPlot();
    paintText();
  }
  function followTheme() {
    const dark = isDarkPage(el);
    const changed = dark !== root.classList.contains("lccp-dark");
    root.classList.toggle("lccp-dark", dark);
    scale = dark ? about.colours.dark : about.colours.light;
    return changed;
  }

  buildGrid();
  buildCases();
  el.append(root);
  followTheme();
  focusOn(...selected(), false);
  paint();
  on("change:metric change:checkpoint change:layer change:head", paint);
  on("change:layer change:head", () => {
    if (!grid.contains(document.activeElement)) focusOn(...selected(), false);
  });
  on("change:case_id change:event change:_attention", paintText);

  let width = 0;
  const resized = new ResizeObserver(() => {
    if (plotPlace.clientWidth !== width) {
      width = plotPlace.clientWidth;
      // Only now is the widget on its page: before, no background was to be seen.
      if (followTheme()) paint();
      else paintPlot();
    }
  });
  resized.observe(plotPlace);
  const themed = new MutationObserver(() => {
    if (followTheme()) paint();
  });
  for (const element of [document.documentElement, document.body]) {
    themed.observe(element, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind"] });
  }
  return () => {
    clearTimeout(pending);
    resized.disconnect();
    themed.disconnect();
    unlisten.forEach((stop) => stop());
  };
}

export default { render };
