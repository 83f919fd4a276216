// The selection, and all parts of the page that depend on it.

const page = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const state = { run: 0, layer: 0, head: 0, mode: "head", view: 1, grid: "share", token: 0 };
const run = () => page.runs[state.run];
const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

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
    union: `layer ${state.layer}, any of its ${heads} heads`,
    count: `layer ${state.layer}, shaded by the number of its ${heads} heads that keep a token`,
  }[state.mode];
  const rate = layer.rate === null ? "" : `; the layer's rate is ${percent(layer.rate)}`;
  find("chosen").textContent = `${which}: ` + (layer.pruned
    ? `${count} of ${page.vision} vision tokens are ${doneWith(state.layer) || `kept${rate}`}`
    : `the layer is not pruned and keeps all ${page.vision} vision tokens`);
  const first = dropper(state.layer);
  find("stages").hidden = !first;
  if (first) {
    const left = tokens.filter((_, i) => gone(i)).length;
    const [by, other] = [html("i", { class: "gone" }), html("i", { class: "veil" })];
    find("stages").replaceChildren(by, `dropped by ${first.method} before layer ${first.layer}: ` +
      `${left} tokens, for all heads`, other, run().recall ? "not read" : "dropped by this layer's heads");
  }
  for (const name of ["mode", "view", "grid"]) {
    const input = document.querySelector(`input[name="${name}"][value="${state[name]}"]`);
    if (input) input.checked = true;
  }
}

function paintSummary() {
  const now = run();
  const saved = 1 - now.kv_bytes / now.kv_bytes_full;
  const entries = [
    [percent(now.retention),
      `of the vision K/V is ${now.recall ? "resident" : "kept"}`],
    [`${short(now.kv_bytes)}B`, `in the cache, ${percent(Math.abs(saved))} ` +
      `${saved < 0 ? "more" : "less"} than the full ${short(now.kv_bytes_full)}B`],
  ];
  if (now.stages.length) entries.push(...now.stages.map(staged));
  if (now.answer && now.answer.ms_per_token !== null && now.full && now.full.ms_per_token !== null) {
    entries.push([`${now.answer.ms_per_token.toFixed(2)} ms`,
      `per token; full cache: ${now.full.ms_per_token.toFixed(2)} ms`]);
    entries.push([`${Math.round(now.answer.first_ms)} ms`,
      `to the first token; full cache: ${Math.round(now.full.first_ms)} ms`]);
  }
  if (now.recall) entries.push(...recalled(now.recall));
  if (now.codes) entries.push([percent(now.codes.share),
    `of the bytes of the full vision K/V: kept tokens are in ${now.codes.bits}-bit codes`]);
  find("summary").replaceChildren(...entries.map(([big, small]) =>
    html("div", { class: "figure" }, html("b", {}, big), html("span", {}, small))));
}

// What one stage left, as in `plphp.report.StageReport`.
function staged({ method, layer, kept }) {
  return [percent(kept), layer === null ? `of the K/V that was computed is kept by ${method}`
    : `of the vision tokens are left by ${method} from layer ${layer} on`];
}

// The bytes of recall, as in `plphp.report.RecallReport`.
function recalled(told) {
  const coded = told.home !== "host";
  const entries = [
    [`${short(told.resident)}B`, `of ${short(told.full)}B vision K/V are resident on the device`],
    [`${short(told.parked)}B`, coded ? `are parked in ${told.home} and read at every token`
      : "are parked in main memory"],
  ];
  if (coded) return entries;
  return [...entries, [`${short(told.index)}B`, "are the index on the device"],
    [`${short(told.transferred_per_token)}B`, "are fetched per token"]];
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
    ? "Both answers are equal." : `The first difference is at token ${now.differs + 1}.`;
}

function paintSteps() {
  const { steps, answer, policy, stages } = run();
  find("steps").hidden = !steps;
  if (!steps) return;
  find("token").max = steps.kept.length - 1;
  find("token").value = state.token;
  find("token-out").textContent = state.token + 1;
  find("steps-hint").textContent = `This is the answer of ${policy}. Its first token was computed ` +
    `from ${stages.length ? `the vision tokens that ${stages[0].method} had left` : "all vision tokens"}.` +
    (steps.lost.length
    ? " The attention of the full model is that of the same answer, read with the full cache." : "");
  for (const node of find("pruned").querySelectorAll("[data-token]")) {
    node.setAttribute("aria-current", String(Number(node.dataset.token) === state.token));
  }
  const at = state.token;
  const quoted = (text) => (text ? `“${text.trim() || text}”` : "the end");
  const also = steps.said.length
    ? `; the full model would generate ${quoted(steps.said[at])} (KL ${steps.kl[at].toFixed(2)})` : "";
  const fetched = steps.fetched.length
    ? `; all layers and heads together fetched ${bytes(steps.fetched[at])} tokens` : "";
  find("said").textContent =
    `Token ${at + 1}: ${policy} generates ${quoted(answer.tokens[at])}${also}${fetched}.`;
  const named = run().recall ? ["read", "not read"] : ["kept", "dropped"];
  drawTokens(find("tokens"), steps, answer.tokens, named, at, (token) => set({ token }));
  drawAtLayers(find("at-layers"), steps, at, state.layer, named, (layer) => set({ layer }));
}

function paintSettings() {
  const { policy, settings, recall } = run();
  const pairs = [["method", policy], ...Object.entries(settings)];
  if (recall) pairs.push(["recall", recall.home], ["recall budget", recall.budget]);
  find("settings").replaceChildren(...pairs.flatMap(([name, value]) =>
    [html("dt", {}, name), html("dd", {}, String(value))]));
  find("notes").replaceChildren(...run().notes.map((note) => html("li", {}, note)));
  const names = ["layer", "gamma", "class", "entered", "kept", "agreement", "bytes", "full bytes"];
  const rows = run().layers.map((l, i) => [i, l.gamma ?? "–", kind(l), percent(entered(l)),
    percent(mean(l.share)), percent(mean(l.agreement)), bytes(l.kv_bytes), bytes(l.kv_bytes_full)]);
  const cells = (row) => row.map((value) => html("td", {}, String(value)));
  find("layers").replaceChildren(html("table", {},
    html("thead", {}, html("tr", {}, ...names.map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...cells(row))))));
  for (const button of document.querySelectorAll(".run")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.run) === state.run));
  }
}

// The share of the vision tokens that entered a layer.
function entered(layer) {
  if (!layer.entered) return 1;
  const bits = decoded(layer.entered);
  return mean(Array.from({ length: page.vision }, (_, token) => has(bits, token)));
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

// Build the page. The layer that keeps the fewest tokens is selected first.
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
