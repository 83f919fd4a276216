// What is chosen, and everything on the page that follows from it.

const page = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const state = { run: 0, layer: 0, head: 0, mode: "head", view: 1, grid: "share", token: 0 };
const run = () => page.runs[state.run];
const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

// Bit masks over the prompt's vision tokens, read once.
const masks = new Map();
function mask(layer, head) {
  const text = run().layers[layer].kept[head];
  if (!masks.has(text)) masks.set(text, Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  return masks.get(text);
}
const has = (bits, token) => (bits[token >> 3] >> (token & 7)) & 1;

// How much of a token is kept as chosen: 0 or 1, or the share of heads that keep it.
function kept(token) {
  const heads = run().layers[state.layer].kept.length;
  if (!heads) return 0;
  if (state.mode === "head") return has(mask(state.layer, state.head), token);
  let count = 0;
  for (let h = 0; h < heads; h += 1) count += has(mask(state.layer, h), token);
  return state.mode === "union" ? Number(count > 0) : count / heads;
}

// Tokens that share a rectangle, such as latents of one tile, are drawn as one.
function rectangles(picture) {
  const found = new Map();
  placed(picture).forEach((box, i) => {
    if (box === null) return;
    const [view, frame] = [picture.views[i] || 0, picture.frame[i] || 0];
    const key = [view, frame, ...box].join();
    if (!found.has(key)) found.set(key, { box, view, frame, tokens: [] });
    found.get(key).tokens.push(picture.first + i);
  });
  return [...found.values()];
}

// Without a known place tokens stand in prompt order, in lines.
function placed(picture) {
  if (picture.boxes.length) return picture.boxes;
  const wide = Math.ceil(Math.sqrt(picture.tokens * 2));
  return Array.from({ length: picture.tokens }, (_, i) => {
    const [x, y] = [i % wide, Math.floor(i / wide)];
    return [x * 10, y * 10, x * 10 + 9, y * 10 + 9];
  });
}

function sizeOf(picture) {
  if (picture.boxes.length) return [picture.width, picture.height];
  const wide = Math.ceil(Math.sqrt(picture.tokens * 2));
  return [wide * 10, Math.ceil(picture.tokens / wide) * 10];
}

function buildPicture(picture, number) {
  const bare = !picture.boxes.length;
  const [width, height] = sizeOf(picture);
  const all = rectangles(picture);
  const frames = bare ? 1 : Math.max(1, picture.frames.length);
  const shown = Array.from({ length: frames }, (_, frame) => {
    const overlay = svg("svg", {
      viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true",
    });
    for (const one of all.filter((each) => each.frame === frame)) {
      const [left, top, right, bottom] = one.box;
      overlay.append(svg("rect", {
        x: left, y: top, width: right - left, height: bottom - top,
        "data-tokens": one.tokens.join(" "), "data-view": one.view,
      }));
    }
    const source = picture.frames[frame];
    const alt = `${picture.name}${frames > 1 ? `, frame ${frame + 1}` : ""}`;
    const image = source && !bare ? [html("img", { src: source, alt })] : [];
    return html("div", { class: image.length ? "frame" : "frame bare" }, ...image, overlay);
  });
  const box = html("div", { class: frames > 1 ? "strip" : "" }, ...shown);
  const classes = ["picture", frames > 1 ? "video" : "", all.length > 500 ? "dense" : ""];
  return html("figure", { class: classes.join(" ").trim(), "data-picture": number }, box,
    html("figcaption", {}));
}

function paintPictures() {
  page.pictures.forEach((picture, number) => {
    const figure = find("pictures").children[number];
    const bare = !picture.boxes.length;
    const tiled = new Set(picture.views).size > 1;
    for (const rect of figure.querySelectorAll("rect")) {
      const tokens = rect.dataset.tokens.split(" ").map(Number);
      const value = mean(tokens.map(kept));
      const hidden = tiled && Number(rect.dataset.view) !== state.view;
      rect.style.display = hidden ? "none" : "";
      rect.dataset.kept = value;
      rect.style.fillOpacity = bare ? 0.08 + 0.92 * value : 0.86 * (1 - value);
    }
    const every = Array.from({ length: picture.tokens }, (_, i) => kept(picture.first + i));
    const count = every.filter((value) => value > 0).length;
    const placeless = picture.boxes.filter((box) => box === null).length;
    const notes = [
      `${picture.name}: ${count} of ${picture.tokens} tokens`,
      placeless ? `${placeless} of them line ends or class tokens, without a place` : "",
      picture.shared ? "tokens that look at the same area are drawn as one" : "",
      bare ? "in prompt order: their places are not known" : "",
    ];
    figure.querySelector("figcaption").textContent = notes.filter(Boolean).join("; ");
  });
}

function paintChoice() {
  const layer = run().layers[state.layer];
  const heads = layer.kept.length;
  find("layer").max = run().layers.length - 1;
  find("head").max = Math.max(heads - 1, 0);
  for (const name of ["layer", "head"]) {
    find(name).value = state[name];
    find(`${name}-out`).textContent = state[name];
  }
  find("head").disabled = state.mode !== "head";
  const tokens = Array.from({ length: page.vision }, (_, i) => kept(i));
  const count = tokens.filter((value) => value > 0).length;
  const which = {
    head: `layer ${state.layer}, KV head ${state.head}`,
    union: `layer ${state.layer}, any of ${heads} heads`,
    count: `layer ${state.layer}, shaded by how many of ${heads} heads keep a token`,
  }[state.mode];
  const rate = layer.rate === null ? "" : `, asked for ${percent(layer.rate)}`;
  find("chosen").textContent = layer.pruned
    ? `${which}: ${count} of ${page.vision} vision tokens kept${rate}`
    : `${which}: left alone, all ${page.vision} vision tokens kept`;
  for (const name of ["mode", "view", "grid"]) {
    const input = document.querySelector(`input[name="${name}"][value="${state[name]}"]`);
    if (input) input.checked = true;
  }
}

function paintSummary() {
  const now = run();
  const saved = 1 - now.kv_bytes / now.kv_bytes_full;
  const entries = [
    [percent(now.retention), "of the vision K/V kept"],
    [`${short(now.kv_bytes)}B`, `in the cache, ${short(now.kv_bytes_full)}B full: ` +
      `${percent(Math.abs(saved))} ${saved < 0 ? "more" : "saved"}`],
  ];
  if (now.answer && now.answer.ms_per_token !== null && now.full && now.full.ms_per_token !== null) {
    entries.push([`${now.answer.ms_per_token.toFixed(2)} ms`,
      `a token, ${now.full.ms_per_token.toFixed(2)} ms with the full cache`]);
    entries.push([`${Math.round(now.answer.first_ms)} ms`,
      `to the first token, ${Math.round(now.full.first_ms)} ms full`]);
  }
  find("summary").replaceChildren(...entries.map(([big, small]) =>
    html("div", { class: "figure" }, html("b", {}, big), html("span", {}, small))));
}

function words(box, answer, differs, pick) {
  box.replaceChildren(...answer.tokens.map((text, i) => {
    const place = differs === null || i < differs ? "" : i === differs ? "first" : "after";
    const end = i === answer.tokens.length - 1 && !text;
    const [space, word] = end ? [" ", "end"] : [text.match(/^\s*/)[0], text.trimStart()];
    const shown = html(pick && word ? "button" : "span",
      { class: `${place} ${end ? "end" : ""}`, "data-token": i }, word);
    if (pick && word) {
      shown.type = "button";
      shown.addEventListener("click", () => set({ token: i }));
    }
    return html("span", {}, space, shown);
  }));
}

function paintAnswers() {
  const now = run();
  find("answers").hidden = !now.answer;
  if (!now.answer) return;
  find("full-side").hidden = !now.full;
  find("pruned-title").textContent = now.policy;
  if (now.full) words(find("full"), now.full, now.differs, false);
  words(find("pruned"), now.answer, now.differs, Boolean(now.steps));
  find("differs").textContent = !now.full ? "" : now.differs === null
    ? "Both answers are the same, token by token." : `They part at token ${now.differs + 1}.`;
}

function paintSteps() {
  const { steps, answer, policy } = run();
  find("steps").hidden = !steps;
  if (!steps) return;
  find("token").max = steps.kept.length - 1;
  find("token").value = state.token;
  find("token-out").textContent = state.token + 1;
  find("steps-hint").textContent = `The answer of ${policy}, token by token. The first one still ` +
    "saw every vision token." + (steps.lost.length
    ? " The full model reads the same answer and says what it would have looked at." : "");
  for (const node of find("pruned").querySelectorAll("[data-token]")) {
    node.setAttribute("aria-current", String(Number(node.dataset.token) === state.token));
  }
  const at = state.token;
  const quoted = (text) => (text ? `“${text.trim() || text}”` : "the end");
  const also = steps.said.length
    ? `; the full model would say ${quoted(steps.said[at])} here (KL ${steps.kl[at].toFixed(2)})` : "";
  find("said").textContent = `Token ${at + 1}: ${policy} says ${quoted(answer.tokens[at])}${also}.`;
  drawTokens(find("tokens"), steps, answer.tokens, run().differs, at, (token) => set({ token }));
  drawAtLayers(find("at-layers"), steps, at, state.layer, (layer) => set({ layer }));
}

function paintSettings() {
  const pairs = [["method", run().policy], ...Object.entries(run().settings)];
  find("settings").replaceChildren(...pairs.flatMap(([name, value]) =>
    [html("dt", {}, name), html("dd", {}, String(value))]));
  find("notes").replaceChildren(...run().notes.map((note) => html("li", {}, note)));
  const names = ["layer", "gamma", "class", "kept", "agreement", "bytes", "full bytes"];
  const rows = run().layers.map((l, i) => [i, l.gamma ?? "–", kind(l), percent(mean(l.share)),
    percent(mean(l.agreement)), bytes(l.kv_bytes), bytes(l.kv_bytes_full)]);
  const cells = (row) => row.map((value) => html("td", {}, String(value)));
  find("layers").replaceChildren(html("table", {},
    html("thead", {}, html("tr", {}, ...names.map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...cells(row))))));
  for (const button of document.querySelectorAll(".run")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.run) === state.run));
  }
}

function paintDepth() {
  drawGamma(find("gamma"), run(), state.layer, (layer) => set({ layer }));
  drawGrid(find("grid"), run(), state.grid, state.layer, state.head,
    (layer, head) => set({ layer, head, mode: "head" }));
  drawBytes(find("bytes"), run(), state.layer, (layer) => set({ layer }));
}

function paint() {
  paintChoice();
  paintPictures();
  paintDepth();
  paintSteps();
}

function set(change) {
  Object.assign(state, change);
  state.layer = clamp(state.layer, run().layers.length);
  state.head = Math.max(clamp(state.head, run().layers[state.layer].kept.length), 0);
  state.token = Math.max(clamp(state.token, run().steps ? run().steps.kept.length : 1), 0);
  if ("run" in change) { paintSummary(); paintAnswers(); paintSettings(); }
  paint();
}

const arrows = {
  ArrowLeft: () => ({ layer: state.layer - 1 }), ArrowRight: () => ({ layer: state.layer + 1 }),
  ArrowUp: () => ({ head: state.head - 1 }), ArrowDown: () => ({ head: state.head + 1 }),
};
const letters = {
  j: () => ({ layer: state.layer + 1 }), k: () => ({ layer: state.layer - 1 }),
  l: () => ({ head: state.head + 1 }), h: () => ({ head: state.head - 1 }),
  u: () => ({ mode: "union" }), c: () => ({ mode: "count" }), o: () => ({ mode: "head" }),
  n: () => ({ token: state.token + 1 }), p: () => ({ token: state.token - 1 }),
};

function listen() {
  for (const name of ["layer", "head", "token"]) {
    find(name).addEventListener("input", (event) => set({ [name]: Number(event.target.value) }));
  }
  for (const input of document.querySelectorAll("input[type=radio]")) {
    const value = input.name === "view" ? Number(input.value) : input.value;
    input.addEventListener("change", () => set({ [input.name]: value }));
  }
  for (const button of document.querySelectorAll(".run")) {
    button.addEventListener("click", () => set({ run: Number(button.dataset.run) }));
  }
  find("grid").addEventListener("keydown", (event) => {
    if (!arrows[event.key]) return;
    event.preventDefault();
    set({ ...arrows[event.key](), mode: "head" });
  });
  document.addEventListener("keydown", (event) => {
    if (!letters[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    set(letters[event.key]());
  });
  find("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const now = root.dataset.theme
      || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
  new ResizeObserver(() => { paintDepth(); paintSteps(); }).observe(find("gamma"));
}

// The layer that keeps fewest is where there is most to see.
function start() {
  find("pictures").append(...page.pictures.map(buildPicture));
  find("pictures").classList.toggle("one", page.pictures.length === 1);
  find("views").hidden = !page.pictures.some((picture) => new Set(picture.views).size > 1);
  const shares = run().layers.map((layer) => mean(layer.share));
  const differs = run().differs;
  listen();
  set({ run: 0, layer: shares.indexOf(Math.min(...shares)), token: differs ?? 0 });
}
start();
