"use strict";
// Charts of layers or tokens in plain SVG. They are drawn again when the width changes.

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 34; // pixels for the labels of the axis

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const html = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

const percent = (x) => `${Math.round(100 * x)}%`;
const bytes = (n) => n.toLocaleString("en");
const kind = (layer) => (layer.layer_class || "none").replace("vision-", "");

// A chart with one column per layer or token. x gives the left edge of a column, w is its width.
function columns(box, count, height, title, widest = 64) {
  const width = box.clientWidth || 640;
  const w = Math.min((width - LEFT - 8) / count, widest);
  const chart = svg("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  chart.append(svg("title", {}, title));
  const right = LEFT + count * w;
  return { chart, width, w, right, count, height, x: (i) => LEFT + i * w };
}

function label(x, y, text, attributes) {
  return svg("text", { x, y, ...attributes }, text);
}

// Numbers below the columns. Where there is no room for all, only some are drawn.
function numbers(f, y, chosen) {
  const step = Math.ceil((String(f.count).length * 8 + 6) / f.w);
  for (let i = 0; i < f.count; i += 1) {
    const apart = chosen === undefined || i === chosen || Math.abs(i - chosen) >= step;
    if (i !== chosen && (i % step || !apart)) continue;
    const attributes = { "text-anchor": "middle", class: i === chosen ? "ink" : null };
    f.chart.append(label(f.x(i) + f.w / 2, y, String(i), attributes));
  }
}

function band(f, i) {
  f.chart.append(svg("rect", { class: "band", x: f.x(i), y: 0, width: f.w, height: f.height }));
}

// Invisible columns that take clicks, above everything else.
function hits(f, from, to, choose, titles) {
  for (let i = 0; i < f.count; i += 1) {
    const area = { class: "hit", x: f.x(i), y: from, width: f.w, height: to - from };
    const hit = svg("rect", area, svg("title", {}, titles(i)));
    hit.addEventListener("click", () => choose(i));
    f.chart.append(hit);
  }
}

function scale(f, top, bottom, most, form) {
  for (const share of [0, 0.5, 1]) {
    const y = bottom - share * (bottom - top);
    f.chart.append(svg("line", { class: "axis", x1: LEFT, x2: f.right, y1: y, y2: y }));
    f.chart.append(label(LEFT - 6, y + 4, form(share * most), { "text-anchor": "end" }));
  }
}

function legend(entries) {
  const swatch = ([color, text, hollow]) =>
    html("span", {}, html("i", {
      style: hollow ? `border:1px solid var(--${color})` : `background:var(--${color})`,
    }), text);
  return html("p", { class: "legend" }, ...entries.map(swatch));
}

function drawGamma(box, run, chosen, choose) {
  const layers = run.layers;
  const f = columns(box, layers.length, 170, "Vision attention (gamma) of every layer");
  const [top, bottom] = [10, 148];
  const y = (value) => bottom - value * (bottom - top);
  band(f, chosen);
  scale(f, top, bottom, 1, (v) => v.toFixed(1));
  layers.forEach((layer, i) => {
    if (layer.gamma === null) return;
    const height = Math.max(y(0) - y(layer.gamma), 1);
    const bar = { class: kind(layer), x: f.x(i) + f.w * 0.14, y: y(layer.gamma) };
    f.chart.append(svg("rect", { ...bar, width: f.w * 0.72, height }));
  });
  for (const name of ["alpha", "beta"]) {
    const value = run.settings[name];
    if (typeof value !== "number" || run.recall) continue;
    f.chart.append(svg("line", {
      class: "limit", x1: LEFT, x2: f.right, y1: y(value), y2: y(value), "data-limit": name,
    }));
    const inside = f.right + 62 > f.width;
    const at = inside ? { "text-anchor": "end" } : {};
    f.chart.append(label(inside ? f.right : f.right + 5, y(value) + (inside ? -4 : 4),
      `${name} ${value}`, { ...at, class: "ink" }));
  }
  numbers(f, 164, chosen);
  const told = (i) => `layer ${i}: gamma ${layers[i].gamma ?? "–"}, ${kind(layers[i])}`;
  hits(f, 0, bottom, choose, told);
  const named = ["attentive", "balanced", "indifferent"];
  const used = named.filter((name) => layers.some((layer) => kind(layer) === name));
  const entries = used.map((name) => [name, `vision-${name}`]);
  box.replaceChildren(html("h3", {}, "Vision attention (gamma) of each layer"));
  box.append(legend(entries), f.chart);
}

function drawGrid(box, run, what, layer, head, choose) {
  const heads = Math.max(...run.layers.map((each) => each.share.length));
  const size = Math.max(11, Math.min(24, 200 / heads));
  const height = heads * size + 20;
  const f = columns(box, run.layers.length, height, `${what} of every layer and KV head`);
  f.height = heads * size;
  run.layers.forEach((each, i) => each[what].forEach((value, h) => {
    const cell = svg("rect", {
      class: "attentive", "fill-opacity": 0.06 + 0.94 * value, x: f.x(i) + 0.5, y: h * size + 0.5,
      width: f.w - 1, height: size - 1, "data-layer": i, "data-head": h, "data-value": value,
      style: "cursor:pointer",
    }, svg("title", {}, `layer ${i}, head ${h}: ${percent(value)}`));
    cell.addEventListener("click", () => choose(i, h));
    f.chart.append(cell);
  }));
  const ring = { class: "ring", x: f.x(layer), y: head * size, width: f.w, height: size };
  f.chart.append(svg("rect", ring));
  for (let h = 0; h < heads; h += Math.ceil(12 / size)) {
    f.chart.append(label(LEFT - 6, h * size + size / 2 + 4, String(h), { "text-anchor": "end" }));
  }
  numbers(f, height - 4, layer);
  box.replaceChildren(f.chart);
}

function drawBytes(box, run, chosen, choose) {
  const f = columns(box, run.layers.length, 96, "Bytes of every layer: allocated, and of the full cache");
  const most = Math.max(1, ...run.layers.map((l) => Math.max(l.kv_bytes_full, l.kv_bytes)));
  const [top, bottom] = [6, 76];
  band(f, chosen);
  scale(f, top, bottom, most, (v) => short(v));
  run.layers.forEach((layer, i) => {
    const bar = (value) => ({
      x: f.x(i) + f.w * 0.14, width: f.w * 0.72, y: bottom - (value / most) * (bottom - top),
      height: (value / most) * (bottom - top),
    });
    f.chart.append(svg("rect", { class: "attentive", ...bar(layer.kv_bytes) }));
    f.chart.append(svg("rect", { class: "outline", ...bar(layer.kv_bytes_full) }));
  });
  numbers(f, 92, chosen);
  hits(f, 0, bottom, choose, (i) =>
    `layer ${i}: ${bytes(run.layers[i].kv_bytes)} of ${bytes(run.layers[i].kv_bytes_full)} bytes`);
  const entries = [["attentive", "allocated"], ["soft", "full cache", true]];
  box.replaceChildren(legend(entries), f.chart);
}

function short(value) {
  const units = [" ", " k", " M", " G"];
  let unit = 0;
  for (; value >= 1000 && unit < 3; unit += 1) value /= 1000;
  return `${value >= 100 || !unit ? Math.round(value) : value.toFixed(1)}${units[unit]}`;
}

const mean = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : 0;
};

// Stacked bars: the attention to kept tokens, and above it the full model's to dropped tokens. The
// upper part of the latter is to tokens that a sequence method had dropped before the layer.
function stack(f, kept, lost, gone, top, bottom) {
  kept.forEach((value, i) => {
    if (value === null) return;
    const height = (share) => Math.max(share, 0) * (bottom - top);
    const bar = { x: f.x(i) + f.w * 0.14, width: f.w * 0.72 };
    const low = bottom - height(value);
    f.chart.append(svg("rect", { class: "attentive", ...bar, y: low, height: height(value) }));
    const more = lost.length ? lost[i] : 0;
    f.chart.append(svg("rect", {
      class: "lost", ...bar, y: low - height(more), height: height(more), "data-lost": more,
    }));
    const before = gone.length ? gone[i] : 0;
    if (before) f.chart.append(svg("rect", {
      class: "gone", ...bar, y: low - height(more), height: height(before), "data-gone": before,
    }));
  });
}

function drawTokens(box, steps, words, [did, not], chosen, choose) {
  const oracle = steps.lost.length > 0;
  const below = [];
  if (oracle) below.push(["KL(full ‖ pruned), nats", steps.kl, (v) => v.toFixed(1)]);
  if (steps.fetched.length) below.push(["tokens that all layers and heads fetched", steps.fetched, short]);
  const f = columns(box, steps.kept.length, 186 + 90 * below.length,
    "Attention to vision tokens at every token of the answer");
  const [top, bottom] = [8, 118];
  band(f, chosen);
  scale(f, top, bottom, 1, percent);
  const kept = (oracle ? steps.full_kept : steps.kept).map(mean);
  stack(f, kept, steps.lost.map(mean), steps.gone.map(mean), top, bottom);
  words.forEach((word, i) => {
    const [x, y] = [f.x(i) + f.w / 2 - 3, bottom + 12];
    const shown = word.trim() || "end";
    const text = shown.length > 8 ? `${shown.slice(0, 7)}…` : shown;
    const attributes = { class: i === chosen ? "ink" : null };
    if (f.w > 44) f.chart.append(label(x + 3, y + 4, text, { ...attributes, "text-anchor": "middle" }));
    else if (f.w > 11) f.chart.append(label(x, y, text, { ...attributes, transform: `rotate(55 ${x} ${y})` }));
  });
  below.forEach((one, i) => drawBelow(f, ...one, bottom + 74 + 90 * i));
  hits(f, 0, f.height, choose, (i) => `token ${i + 1}: ${words[i]}`);
  const entries = oracle
    ? [["attentive", `full model, to tokens that were ${did}`],
      ["lost", `full model, to tokens that were ${not}`],
      ...(steps.gone.length ? [["gone", "of these, to tokens that never entered the layer"]] : [])]
    : [["attentive", `pruned model, to tokens that were ${did}`]];
  box.replaceChildren(html("h3", {}, "Attention to vision tokens, averaged over layers"));
  box.append(legend(entries), f.chart);
}

// A second chart below, with one number per token and its own scale.
function drawBelow(f, title, values, form, top) {
  const [most, bottom] = [Math.max(1, ...values), top + 56];
  f.chart.append(label(0, top - 10, title));
  scale(f, top, bottom, most, form);
  values.forEach((value, i) => {
    const height = (value / most) * (bottom - top);
    const bar = { x: f.x(i) + f.w * 0.3, width: f.w * 0.4, y: bottom - height, height };
    f.chart.append(svg("rect", { class: "indifferent", ...bar }));
  });
}

function drawAtLayers(box, steps, token, layer, [did, not], choose) {
  const oracle = steps.lost.length > 0;
  const kept = (oracle ? steps.full_kept : steps.kept)[token];
  const f = columns(box, kept.length, 142, `Attention of token ${token + 1} by layer`);
  const [top, bottom] = [8, 120];
  band(f, layer);
  scale(f, top, bottom, 1, percent);
  stack(f, kept, oracle ? steps.lost[token] : [], steps.gone[token] || [], top, bottom);
  steps.kept[token].forEach((value, i) => {
    if (value === null || !oracle) return;
    const y = bottom - value * (bottom - top);
    const x1 = f.x(i) + f.w * 0.04;
    f.chart.append(svg("line", {
      x1, x2: x1 + f.w * 0.92, y1: y, y2: y, stroke: "var(--ink)", "stroke-width": 2,
    }));
  });
  numbers(f, 137, layer);
  const told = (i) => {
    const dropped = oracle && steps.lost[token][i] !== null
      ? `; attention of the full model to tokens that were ${not}: ${percent(steps.lost[token][i])}` : "";
    const own = percent(steps.kept[token][i] ?? 0);
    return `layer ${i}: attention of the pruned model to tokens that were ${did}: ${own}${dropped}`;
  };
  hits(f, 0, bottom, choose, told);
  const entries = [[oracle ? "ink" : "attentive", `pruned model, to tokens that were ${did}`]];
  const title = `Attention of token ${token + 1} in each layer`;
  box.replaceChildren(html("h3", {}, title), legend(entries), f.chart);
}
