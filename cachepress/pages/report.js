"use strict";

const PANELS = JSON.parse(document.getElementById("data").textContent);
const DARK = matchMedia("(prefers-color-scheme: dark)");
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87a00", "#2f93c9"],
  dark: ["#56b4e9", "#ff8a3d", "#2fd0a0", "#e39cc6", "#f0b429", "#9fd6f7"],
};
const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "x", "cross"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const SHAPES = {
  circle: "M8 2a6 6 0 1 0 .01 0z",
  square: "M3 3h10v10H3z",
  diamond: "M8 1l7 7-7 7-7-7z",
  "triangle-up": "M8 2l7 12H1z",
  "triangle-down": "M8 14L1 2h14z",
  x: "M4 1l4 4 4-4 3 3-4 4 4 4-3 3-4-4-4 4-3-3 4-4-4-4z",
  cross: "M5.5 1h5v4.5H15v5h-4.5V15h-5v-4.5H1v-5h4.5z",
  star: "M8 1l2 5h5l-4 3.5 1.5 5.5L8 11.5 3.5 15 5 9.5 1 6h5z",
};
const COSTS = {
  kept: { title: "kept bytes, of those without a press", form: ".0%", range: "tozero" },
  speed: { title: "decoded tokens per second", form: "", range: "normal" },
};
const NAMES = { score: "score", kl: "KL divergence", perplexity: "perplexity" };
const SHOWN = { all: "all presses", front: "presses that none beats by its means", none: "no_press alone" };
const AT_ONCE = 50;
/* More presses than this are a tangle: only those on a front are shown at first. */
const MOST_PRESSES = 12;

/* What Plotly shows is a small markup language; texts of results are not. */
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function number(value, digits) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

function estimate(e, digits = 3) {
  if (!e) return "–";
  const ends = e.low === null || e.high === null
    ? "±?" : `(${number(e.low, digits)} to ${number(e.high, digits)})`;
  return `${number(e.mean, digits)} ${ends}`;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fill(select, labels, chosen) {
  labels.forEach(([value, label]) => select.add(new Option(label, value)));
  select.value = String(chosen);
}

function lookOf(panel, press) {
  const palette = PALETTES[DARK.matches ? "dark" : "light"];
  if (press === "no_press") {
    return { color: DARK.matches ? "#e6e8ec" : "#1b1e24", symbol: "star", dash: "solid" };
  }
  const i = panel.presses.filter((name) => name !== "no_press").indexOf(press);
  return {
    color: palette[i % palette.length],
    symbol: MARKERS[i % MARKERS.length],
    dash: DASHES[Math.floor(i / palette.length) % DASHES.length],
  };
}

function hoverOf(cell) {
  const mib = (bytes) => `${number(bytes / 1048576, 1)} MiB`;
  const lines = [
    `<b>${plain(cell.label)}</b>`,
    `ratio ${number(cell.achieved, 3)} (asked for ${number(cell.ratio, 2)})`,
    ...Object.keys(NAMES).filter((q) => cell.qualities[q])
      .map((q) => `${NAMES[q]} ${estimate(cell.qualities[q])}`),
    ...(cell.difference ? [`vs no_press ${estimate(cell.difference)}`] : []),
    `cache ${mib(cell.before)} → ${mib(cell.after)}, ${number(cell.kept * 100, 1)} % kept`,
    `prefill ${number(cell.prefill, 2)} s, press ${number(cell.added, 3)} s`,
    cell.speed_low === null || cell.speed_high === null ? `${number(cell.speed, 1)} tokens/s`
      : `${number(cell.speed, 1)} tokens/s (quartiles ${number(cell.speed_low, 1)} to `
        + `${number(cell.speed_high, 1)})`,
  ];
  return lines.join("<br>");
}

/* Error bars of cells by their distance upwards and downwards. */
function errorBars(cells, color, above, below) {
  return {
    type: "data",
    symmetric: false,
    color,
    thickness: 1,
    width: 3,
    array: cells.map(above),
    arrayminus: cells.map(below),
  };
}

/* The distance from the mean to each end; 0 where it is not known. */
function bars(cells, quality, color) {
  const of = (cell) => cell.qualities[quality];
  const known = (e) => e.low !== null && e.high !== null;
  return errorBars(
    cells,
    color,
    (c) => (known(of(c)) ? of(c).high - of(c).mean : 0),
    (c) => (known(of(c)) ? of(c).mean - of(c).low : 0),
  );
}

/* The quartiles of a speed; bytes are exact. */
function quartiles(cells, cost, color) {
  if (cost !== "speed") return { visible: false };
  const known = (c) => c.speed_low !== null && c.speed_high !== null;
  return errorBars(
    cells,
    color,
    (c) => (known(c) ? Math.max(0, c.speed_high - c.speed) : 0),
    (c) => (known(c) ? Math.max(0, c.speed - c.speed_low) : 0),
  );
}

function pressTrace(panel, press, cells, cost, quality) {
  const look = lookOf(panel, press);
  const unknown = (c) => (c.qualities[quality].low === null ? "±?" : "");
  return {
    type: "scatter",
    mode: "lines+markers+text",
    name: plain(press),
    x: cells.map((c) => c[cost]),
    y: cells.map((c) => c.qualities[quality].mean),
    text: cells.map(unknown),
    textposition: "middle right",
    hovertext: cells.map(hoverOf),
    hoverinfo: "text",
    error_y: bars(cells, quality, look.color),
    error_x: quartiles(cells, cost, look.color),
    line: { color: look.color, dash: look.dash, width: 1.5 },
    marker: { color: look.color, symbol: look.symbol, size: press === "no_press" ? 13 : 9 },
  };
}

function frontTrace(cells, cost, quality) {
  const on = cells.filter((c) => c.fronts[cost].includes(quality))
    .sort((a, b) => a[cost] - b[cost]);
  const color = DARK.matches ? "#a0a7b4" : "#5b6270";
  return {
    type: "scatter",
    mode: "lines+markers",
    x: on.map((c) => c[cost]),
    y: on.map((c) => c.qualities[quality].mean),
    hoverinfo: "skip",
    line: { color, dash: "dot", width: 2 },
    marker: { color, symbol: "circle-open", size: 18, line: { width: 1.5 } },
  };
}

/* With a distance, Plotly puts a title beside the labels and not across them. */
function titled(text) {
  return { title: { text, standoff: 8 } };
}

function layoutOf(extra) {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: of("--line"),
    zerolinecolor: of("--line"),
    automargin: true,
    ticklabelstandoff: 4,
  };
  return {
    paper_bgcolor: of("--page"),
    plot_bgcolor: of("--page"),
    font: { color: of("--text"), size: 12 },
    margin: { l: 50, r: 14, t: 10, b: 46 },
    showlegend: false,
    hoverlabel: { align: "left", bgcolor: of("--raised"), font: { color: of("--text") } },
    ...extra,
    xaxis: { ...axis, ...extra.xaxis },
    yaxis: { ...axis, ...extra.yaxis },
  };
}

const CONFIG = { displaylogo: false, displayModeBar: false };

function drawScatter(view, cost) {
  const { panel, hidden, find } = view;
  const quality = find("quality").value;
  const cells = panel.cells.filter(
    (c) => c.qualities[quality] && c.qualities[quality].mean !== null && c[cost] !== null,
  );
  const place = find(cost);
  place.parentElement.hidden = !cells.length;
  if (!cells.length) return;
  const traces = panel.presses.filter((press) => !hidden.has(press)).map((press) =>
    pressTrace(panel, press, cells.filter((c) => c.press === press), cost, quality));
  const { title, form, range } = COSTS[cost];
  const layout = layoutOf({
    xaxis: { ...titled(title), tickformat: form, rangemode: range },
    yaxis: { ...titled(panel.qualities[quality]), rangemode: "tozero" },
  });
  Plotly.react(place, [frontTrace(cells, cost, quality), ...traces], layout, CONFIG);
}

function drawMap(view) {
  const { panel, find } = view;
  const cell = panel.cells[Number(find("needle-cell").value)];
  const grid = cell.needle;
  const width = find("map").clientWidth;
  const trace = {
    type: "heatmap",
    x: grid.lengths.map(plain),
    y: grid.depths.map(plain),
    z: grid.scores,
    text: grid.scores.map((row) => row.map((x) => (x === null ? "" : x.toFixed(2)))),
    customdata: grid.counts,
    texttemplate: "%{text}",
    hovertemplate: "length %{x}<br>depth %{y}<br>score %{z:.3f}, %{customdata} samples"
      + "<extra></extra>",
    zmin: 0,
    zmax: 1,
    colorscale: "Cividis",
    showscale: width >= 500,
    xgap: 1,
    ygap: 1,
  };
  const layout = layoutOf({
    width,
    height: 110 + 34 * Math.max(grid.depths.length, 3),
    xaxis: { ...titled("length"), type: "category", showgrid: false },
    yaxis: { ...titled("depth"), type: "category", autorange: "reversed", showgrid: false },
  });
  Plotly.react(find("map"), [trace], layout, CONFIG);
}

function setUpMap(view) {
  const cells = view.panel.cells.map((c, i) => [i, c]).filter(([, c]) => c.needle);
  if (!cells.length) return;
  view.find("needle").hidden = false;
  const shown = cells.find(([, c]) => !c.base) || cells[0];
  fill(view.find("needle-cell"), cells.map(([i, c]) => [i, c.label]), shown[0]);
  view.find("needle-cell").addEventListener("change", () => drawMap(view));
}

function symbolOf(look) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[look.symbol]);
  path.setAttribute("fill", look.color);
  svg.append(path);
  return svg;
}

function drawLegend(view) {
  const { panel, hidden, find } = view;
  find("legend").replaceChildren(...panel.presses.map((press) => {
    const button = element("button");
    button.type = "button";
    button.title = press;
    button.append(symbolOf(lookOf(panel, press)), element("bdi", press));
    button.setAttribute("aria-pressed", String(!hidden.has(press)));
    button.addEventListener("click", () => {
      if (!hidden.delete(press)) hidden.add(press);
      button.setAttribute("aria-pressed", String(!hidden.has(press)));
      drawScatters(view);
    });
    return button;
  }));
}

function drawScatters(view) {
  Object.keys(COSTS).forEach((cost) => drawScatter(view, cost));
}

function leads(panel, press, quality) {
  return panel.cells.some(
    (c) => c.press === press && c.leads.includes(quality),
  );
}

function choosePresses(view) {
  const { panel, hidden, find } = view;
  const [which, quality] = [find("shown").value, find("quality").value];
  hidden.clear();
  if (which === "all") return;
  panel.presses
    .filter((press) => press !== "no_press")
    .filter((press) => which === "none" || !leads(panel, press, quality))
    .forEach((press) => hidden.add(press));
}

function drawPanel(view) {
  drawLegend(view);
  if (Object.keys(view.panel.qualities).length) drawScatters(view);
  if (!view.find("needle").hidden) drawMap(view);
}

/* Charts are drawn anew when their place gets another width, by the window or by what is beside. */
function fitCharts(view) {
  const widths = new Map();
  const watch = new ResizeObserver((entries) => {
    const others = entries.map((entry) => entry.target)
      .filter((place) => place.clientWidth && place.clientWidth !== widths.get(place));
    others.forEach((place) => {
      widths.set(place, place.clientWidth);
      if (place === view.find("map")) drawMap(view);
      else if (place.data) Plotly.Plots.resize(place);
    });
  });
  ["kept", "speed", "map"].forEach((role) => watch.observe(view.find(role)));
}

function setUpCharts(view) {
  const { panel, root, find } = view;
  const qualities = Object.entries(panel.qualities);
  fill(find("quality"), qualities, qualities.length ? qualities[0][0] : "");
  fill(find("shown"), Object.entries(SHOWN), panel.presses.length > MOST_PRESSES ? "front" : "all");
  find("quality-choice").hidden = qualities.length < 2;
  find("charts").hidden = !qualities.length;
  choosePresses(view);
  ["quality", "shown"].forEach((role) => find(role).addEventListener("change", () => {
    /* Another quality has another front; what was hidden by hand stays hidden otherwise. */
    if (role === "shown" || find("shown").value === "front") choosePresses(view);
    drawLegend(view);
    drawScatters(view);
  }));
  setUpMap(view);
  /* A report can have many panels; one is drawn when it comes near. */
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    drawPanel(view);
    DARK.addEventListener("change", () => drawPanel(view));
    fitCharts(view);
  }, { rootMargin: "400px" });
  watch.observe(root);
}

function compareCells(a, b, column, way) {
  const [x, y] = [a, b].map((row) => row.cells[column].dataset.sort);
  if (x === "" || y === "") return (x === "") - (y === "");
  const [m, n] = [Number(x), Number(y)];
  const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
  return way === "ascending" ? order : -order;
}

function setUpTable(view) {
  const table = view.find("table");
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.firstElementChild.addEventListener("click", () => {
      const way = header.ariaSort === "ascending" ? "descending" : "ascending";
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", way);
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compareCells(a, b, column, way));
      table.tBodies[0].append(...rows);
    });
  });
  view.find("filter").addEventListener("input", () => filterTable(view));
}

function filterTable(view) {
  const words = view.find("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...view.find("table").tBodies[0].rows];
  rows.forEach((row) => {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  });
  const left = rows.filter((row) => !row.hidden).length;
  view.find("filtered").textContent = words.length ? `${left} of ${rows.length}` : "";
}

function setUpSamples(view) {
  const { panel, find } = view;
  const labels = panel.cells.map((cell, i) => [i, cell.label]);
  const first = panel.cells.findIndex((cell) => !cell.base);
  fill(find("left"), labels, 0);
  fill(find("right"), labels, first >= 0 ? first : labels.length - 1);
  const change = () => listSamples(view);
  ["left", "right", "order", "differ"].forEach((role) =>
    find(role).addEventListener("change", change));
  find("find").addEventListener("input", change);
  find("more").addEventListener("click", () => showMore(view));
  find("drill").addEventListener("toggle", () => {
    if (view.samples || !find("drill").open) return;
    view.samples = JSON.parse(find("samples-data").textContent);
    change();
  });
}

/* The numbers of the samples that the controls ask for, in their order. */
function chosenSamples(view) {
  const { samples, find } = view;
  const [a, b] = ["left", "right"].map((role) => samples.cells[Number(find(role).value)]);
  const words = find("find").value.toLowerCase();
  const has = (i) => [samples.ids[i], samples.question[i], a.predicted_answer[i],
    b.predicted_answer[i], ...(samples.answer[i] || [])]
    .some((text) => text !== null && text.toLowerCase().includes(words));
  const both = (i) => a.predicted_answer[i] !== null && b.predicted_answer[i] !== null;
  let chosen = [...samples.ids.keys()].filter(both);
  if (find("differ").checked) {
    chosen = chosen.filter((i) => a.predicted_answer[i] !== b.predicted_answer[i]);
  }
  if (words) chosen = chosen.filter(has);
  const orders = {
    score: (i) => Math.abs((b.score[i] ?? 0) - (a.score[i] ?? 0)),
    kl: (i) => Math.max(b.kl[i] ?? -1, a.kl[i] ?? -1),
  };
  const worth = orders[find("order").value];
  return worth ? chosen.sort((i, j) => worth(j) - worth(i)) : chosen;
}

function listSamples(view) {
  view.chosen = chosenSamples(view);
  view.shown = 0;
  view.find("samples").replaceChildren();
  view.find("count").textContent = `${view.chosen.length} of ${view.samples.ids.length} samples`;
  showMore(view);
}

function showMore(view) {
  const next = view.chosen.slice(view.shown, view.shown + AT_ONCE);
  view.find("samples").append(...next.map((i) => sampleElement(view, i)));
  view.shown += next.length;
  view.find("more").hidden = view.shown >= view.chosen.length;
}

function textBlock(title, text) {
  const block = element("div");
  const empty = text === "";
  const long = element("div", empty ? "(nothing)" : text, empty ? "long faint" : "long");
  long.dir = "auto";
  block.append(element("div", title, "small faint"), long);
  return block;
}

function answerBlock(view, role, i) {
  const cell = Number(view.find(role).value);
  const { predicted_answer: answers, score, kl } = view.samples.cells[cell];
  const block = textBlock(view.panel.cells[cell].label, answers[i]);
  const line = element("div", undefined, "small");
  if (score[i] !== null) {
    line.append(element("span", `score ${number(score[i], 3)}`, score[i] >= 0.5 ? "good" : "bad"));
  }
  if (kl[i] !== null) line.append(` KL ${number(kl[i], 4)}`);
  block.append(line);
  return block;
}

function sampleElement(view, i) {
  const { samples, find } = view;
  const [a, b] = ["left", "right"].map((role) =>
    samples.cells[Number(find(role).value)].predicted_answer[i]);
  const made = element("article", undefined, a === b ? "sample" : "sample differs");
  const about = [`sample ${samples.ids[i]}`, samples.task[i], samples.metric[i]];
  if (samples.length[i] !== null) about.push(`length ${samples.length[i]}`);
  if (samples.depth[i] !== null) about.push(`depth ${number(samples.depth[i], 2)}`);
  about.push(a === b ? "same answer" : "answers differ");
  const header = element("header");
  header.append(...about.filter(Boolean).map((text) => element("bdi", text)));
  const asked = samples.question[i] || "(the question is in the context)";
  const pair = element("div", undefined, "pair");
  pair.append(answerBlock(view, "left", i), answerBlock(view, "right", i));
  made.append(header, textBlock("question", asked));
  if (samples.choices[i]?.length) made.append(textBlock("choices", samples.choices[i].join(" | ")));
  made.append(textBlock("wanted", (samples.answer[i] || []).join(" | ")), pair);
  return made;
}

document.querySelectorAll("section.panel").forEach((root) => {
  const view = {
    root,
    panel: PANELS[Number(root.dataset.panel)],
    hidden: new Set(),
    samples: null,
    chosen: [],
    shown: 0,
    find: (role) => root.querySelector(`[data-role="${role}"]`),
  };
  setUpCharts(view);
  setUpTable(view);
  setUpSamples(view);
});
