// Live routing load: which experts get how many tokens.

import { $, fetchJson, chooseBackend, failed, make, markNav, noNotice, notice, number, percent, times } from "./common.js";

const EVERY_MS = 2000;
const MINUTE_MS = 60_000;
const GAP = 1;
const HOW = "Start the server with: vllm-moe-prune serve CHECKPOINT --watch";

const state = {
  data: null,      // address of the data
  snapshots: [],   // {at, load}, oldest first, one minute of them
  before: new Map(), // source layer → experts it had before pruning
  paused: false,
  cursor: null,    // {row, column} in the map
  view: null,      // what is drawn: see viewOf
};

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

// --- numbers ---------------------------------------------------------------------------

// Counts of the chosen period, per layer.
function counted() {
  const { load } = state.snapshots.at(-1);
  if (chosen("period") === "all") return load.layers.map((layer) => layer.experts);
  const first = state.snapshots[0].load;
  return load.layers.map((layer, at) =>
    layer.experts.map((count, expert) => count - (first.layers[at]?.experts[expert] ?? 0)));
}

// Rows of cells. A cell is null (removed) or {served, source, tokens, share, ratio},
// ratio being its tokens over those of an even spread.
function viewOf() {
  const { load } = state.snapshots.at(-1);
  const bySource = chosen("order") === "source";
  const counts = counted();
  const rows = load.layers.map((layer, at) => {
    const tokens = counts[at].reduce((sum, count) => sum + count, 0);
    const even = tokens / counts[at].length;
    const cells = counts[at].map((count, served) => ({
      served,
      source: layer.source_experts[served] ?? served,
      tokens: count,
      share: tokens ? count / tokens : 0,
      ratio: tokens ? count / even : 0,
    }));
    const known = state.before.get(layer.source_layer) ?? 0;
    const width = Math.max(known, ...cells.map((cell) => cell.source + 1));
    let drawn = cells;
    if (bySource) {
      drawn = Array(width).fill(null);
      for (const cell of cells) drawn[cell.source] = cell;
    }
    return { layer, tokens, cells, drawn, before: width };
  });
  return { rows, most: Math.max(2, ...rows.flatMap((row) => row.cells.map((cell) => cell.ratio))) };
}

// How many experts in equal use would spread the tokens as widely, over all of them.
function evenness(cells) {
  const entropy = cells.reduce((sum, { share }) => sum - (share ? share * Math.log(share) : 0), 0);
  return Math.exp(entropy) / cells.length;
}

const busiest = (cells) => cells.reduce((best, cell) => (cell.tokens > best.tokens ? cell : best));
const nameOf = (cell) => (cell.source === cell.served
  ? `expert ${cell.served}` : `expert ${cell.source} (served as ${cell.served})`);

// --- drawing ---------------------------------------------------------------------------

function color(name) {
  const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
}

function ramp() {
  const stops = ["--heat-0", "--heat-1", "--heat-2"].map(color);
  return (part) => {
    const at = Math.min(part, 0.9999) * 2;
    const [from, to] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]];
    return `rgb(${from.map((low, i) => Math.round(low + (to[i] - low) * (at % 1))).join(" ")})`;
  };
}

// Cells as large as there is room for, but never too small to be seen.
function layout(view) {
  const columns = Math.max(...view.rows.map((row) => row.drawn.length));
  const room = $("map").clientWidth;
  const width = Math.max(6, Math.min(72, Math.floor(room / columns)));
  const height = view.rows.length > 40 ? 12 : view.rows.length > 16 ? 16 : 24;
  return { columns, width, height };
}

function draw() {
  const view = state.view;
  const { columns, width, height } = view.layout = layout(view);
  const canvas = $("canvas");
  const scale = devicePixelRatio || 1;
  const [w, h] = [columns * width, view.rows.length * height];
  canvas.width = w * scale;
  canvas.height = h * scale;
  canvas.style.width = `${w}px`;
  canvas.style.height = `${h}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const heat = ramp();
  const edge = `rgb(${color("--edge").join(" ")})`;
  view.rows.forEach((row, y) => row.drawn.forEach((cell, x) => {
    const [left, top] = [x * width, y * height];
    const box = [left, top, width - GAP, height - GAP];
    if (!cell) {
      pen.fillStyle = edge;
      pen.fillRect(left + width / 2 - 1, top + height / 2 - 1, 1.5, 1.5);
    } else if (cell.tokens === 0) {
      pen.strokeStyle = edge;
      pen.strokeRect(left + 0.5, top + 0.5, width - GAP - 1, height - GAP - 1);
    } else {
      pen.fillStyle = heat(Math.sqrt(cell.ratio / view.most));
      pen.fillRect(...box);
    }
  }));
  if (state.cursor) {
    const { row, column } = state.cursor;
    pen.strokeStyle = `rgb(${color("--text").join(" ")})`;
    pen.lineWidth = 2;
    pen.strokeRect(column * width - 0.5, row * height - 0.5, width, height);
  }
  const every = height < 14 ? 5 : 1;
  $("labels").replaceChildren(...view.rows.map(({ layer }, at) => {
    const item = make("li", { textContent: at % every ? "" : layer.layer });
    item.style.height = item.style.lineHeight = `${height}px`;
    return item;
  }));
}

function announceCell() {
  if (!state.cursor) {
    $("readout").textContent = "";
    return;
  }
  const row = state.view.rows[state.cursor.row];
  const cell = row.drawn[state.cursor.column];
  let text = `Layer ${row.layer.layer}, expert ${state.cursor.column}: removed`;
  if (state.cursor.column >= row.drawn.length) text = `Layer ${row.layer.layer} has no such expert`;
  else if (cell) {
    text = `Layer ${row.layer.layer}, ${nameOf(cell)}: ${number(cell.tokens)} tokens, `
      + `${percent(cell.share)} of its layer, ${times(cell.ratio)} an even share`;
  }
  if ($("readout").textContent !== text) $("readout").textContent = text;
  [...$("rows").children].forEach((line, at) => line.classList.toggle("chosen", at === state.cursor.row));
}

// Lines stay where they are, so that a reader keeps the place.
function table() {
  const lines = state.view.rows.map((row) => {
    const top = busiest(row.cells);
    const idle = row.cells.filter((cell) => cell.tokens === 0).length;
    const source = row.layer.source_layer === row.layer.layer ? "" : ` (was ${row.layer.source_layer})`;
    const texts = [
      row.before > row.cells.length ? `${row.cells.length} of ${row.before}` : row.cells.length,
      number(row.tokens),
      row.tokens ? nameOf(top) : "–",
      row.tokens ? percent(top.share) : "–",
      idle,
      row.tokens ? percent(evenness(row.cells), 0) : "–",
    ];
    const classes = ["n", "n", "", "n", "n", "n"];
    return make("tr", {}, make("th", { scope: "row", textContent: `${row.layer.layer}${source}` }),
      ...texts.map((textContent, at) => make("td", { textContent, className: classes[at] })));
  });
  const old = [...$("rows").children];
  if (old.length !== lines.length) {
    $("rows").replaceChildren(...lines);
    return;
  }
  lines.forEach((line, row) => [...line.children].forEach((cell, at) => {
    const shown = old[row].children[at];
    if (shown.textContent !== cell.textContent) shown.textContent = cell.textContent;
  }));
}

function tiles() {
  const { load } = state.snapshots.at(-1);
  const { rows } = state.view;
  const cells = rows.flatMap((row) => row.cells.map((cell) => ({ ...cell, layer: row.layer.layer })));
  const before = rows.reduce((sum, row) => sum + row.before, 0);
  const top = cells.reduce((best, cell) => (cell.ratio > best.ratio ? cell : best));
  const idle = cells.filter((cell) => cell.tokens === 0).length;
  const perLayer = rows.map((row) => row.tokens / Math.min(load.top_k, row.cells.length));
  const tokens = Math.max(...perLayer);
  const even = rows.filter((row) => row.tokens).map((row) => evenness(row.cells));
  const mean = even.reduce((sum, value) => sum + value, 0) / even.length;
  const facts = [
    ["Tokens routed", number(tokens), `top ${load.top_k} of each layer`],
    ["Experts served", before > cells.length ? `${number(cells.length)} of ${number(before)}` : number(cells.length), `in ${rows.length} layers`],
    ["Busiest", tokens ? `${times(top.ratio)} even` : "–", tokens ? `layer ${top.layer}, expert ${top.source}` : "no tokens yet"],
    ["Idle", number(idle), idle === 1 ? "expert without a token" : "experts without a token"],
    ["Evenness", tokens ? percent(mean, 0) : "–", "mean over layers"],
  ];
  $("tiles").replaceChildren(...facts.map(([name, big, sub]) => make("div", {},
    make("dt", { textContent: name }),
    make("dd", { className: "big", textContent: big }),
    make("dd", { className: "sub", textContent: sub }))));
}

function show() {
  if (!state.snapshots.length) return;
  state.view = viewOf();
  $("most").textContent = `${times(state.view.most)} an even share`;
  tiles();
  table();
  draw();
  announceCell();
}

// --- asking ----------------------------------------------------------------------------

async function refresh() {
  const load = await fetchJson(new URL("load", state.data));
  load.layers = load.layers.filter((layer) => layer.experts.length);
  if (!load.enabled || !load.layers.length) {
    $("content").hidden = true;
    notice(load.enabled ? "This model has no experts" : "The load is not being counted",
      load.enabled ? "Nothing is routed, so there is nothing to show."
        : HOW);
    return;
  }
  const at = performance.now();
  const last = state.snapshots.at(-1)?.load;
  if (last && (last.since !== load.since || last.layers.length !== load.layers.length)) {
    state.snapshots = []; // the server was started anew
  }
  state.snapshots.push({ at, load });
  while (state.snapshots.length > 2 && at - state.snapshots[1].at >= MINUTE_MS) state.snapshots.shift();
  const since = new Date(load.since * 1000);
  $("lead").replaceChildren("How the router spreads tokens over the experts, since ",
    make("time", { dateTime: since.toISOString(), textContent: since.toLocaleString() }), ".");
  noNotice();
  $("content").hidden = false;
  show();
}

async function keepRefreshing() {
  for (;;) {
    if (!state.paused && !document.hidden) {
      try {
        await refresh();
      } catch (error) {
        // What was drawn stays, under a word about its age.
        const slim = state.snapshots.length > 0;
        if (error.status !== 404) failed("No new numbers", error, slim);
        else notice("No routing load", `This server does not report it. ${HOW}`, slim);
      }
    }
    await new Promise((resolve) => { setTimeout(resolve, EVERY_MS); });
  }
}

// What was there before pruning; a model that never was pruned has no such table.
async function readRemap() {
  try {
    const remap = await fetchJson(new URL("remap", state.data));
    for (const layer of remap.layers) state.before.set(layer.original_layer, layer.experts_before);
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}

function point(row, column) {
  const last = state.view.rows.length - 1;
  const inside = (value, most) => Math.max(0, Math.min(most, value));
  state.cursor = { row: inside(row, last), column: inside(column, state.view.layout.columns - 1) };
  draw();
  announceCell();
  $("announcement").textContent = $("readout").textContent; // spoken on a key press, not at every refresh
}

function listen() {
  for (const input of document.querySelectorAll(".controls input")) {
    input.addEventListener("change", () => { state.cursor = null; show(); });
  }
  $("pause").addEventListener("click", () => {
    state.paused = !state.paused;
    $("pause").setAttribute("aria-pressed", String(state.paused));
  });
  $("canvas").addEventListener("pointermove", (event) => {
    const { width, height } = state.view.layout;
    point(Math.floor(event.offsetY / height), Math.floor(event.offsetX / width));
  });
  $("map").addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move || !state.view) return;
    event.preventDefault();
    const { row, column } = state.cursor ?? { row: -move[0], column: -move[1] };
    point(row + move[0], column + move[1]);
    const { width } = state.view.layout;
    $("map").scrollLeft = Math.min(Math.max($("map").scrollLeft,
      (state.cursor.column + 1) * width - $("map").clientWidth), state.cursor.column * width);
  });
  new ResizeObserver(() => { if (state.view) draw(); }).observe($("map"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (state.view) draw(); });
}

async function start() {
  markNav();
  listen();
  notice("Loading");
  try {
    const { data } = await chooseBackend();
    state.data = data;
    await readRemap();
  } catch (error) {
    failed("The load cannot be shown", error);
    return;
  }
  await keepRefreshing();
}

await start();
