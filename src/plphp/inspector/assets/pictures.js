// The tokens that were kept or read, drawn over their pictures.

// The masks of the tokens that a layer's heads read at the selected token of the answer, or null.
// Only the home "host" has such masks, and not for the first token, which follows from the prompt.
function readAt(layer) {
  const read = run().steps && run().steps.read[state.token - 1];
  return read && read[layer].length ? read[layer] : null;
}

// What happened to the tokens shown, for recall: "are ..." stands before it.
function doneWith(layer) {
  const { recall, steps } = run();
  if (!recall) return "";
  if (recall.home !== "host") return `resident, and all others are read in ${recall.home}`;
  if (readAt(layer)) return `read at token ${state.token + 1}`;
  const late = steps && state.token > steps.read.length;
  return `resident after the prompt${late ? "; the page does not have what this token read" : ""}`;
}

// Bit masks over the prompt's vision tokens. Each is decoded once.
const masks = new Map();
function mask(layer, head) {
  return decoded((readAt(layer) || run().layers[layer].kept)[head]);
}
const has = (bits, token) => (bits[token >> 3] >> (token & 7)) & 1;
function decoded(text) {
  if (!masks.has(text)) masks.set(text, Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  return masks.get(text);
}

// Whether a sequence method had dropped a token before the selected layer.
function gone(token) {
  const { entered } = run().layers[state.layer];
  return entered !== "" && !has(decoded(entered), token);
}

// The sequence method that dropped tokens before a layer, or null.
const dropper = (layer) =>
  run().stages.find((stage) => stage.layer !== null && stage.layer <= layer) || null;

// Whether the selected head or heads keep a token: 0 or 1, or the share of heads that keep it.
function kept(token) {
  const heads = run().layers[state.layer].kept.length;
  if (!heads) return 0;
  if (state.mode === "head") return has(mask(state.layer, state.head), token);
  let count = 0;
  for (let h = 0; h < heads; h += 1) count += has(mask(state.layer, h), token);
  return state.mode === "union" ? Number(count > 0) : count / heads;
}

// The rectangles to draw. Tokens with the same box, such as the latents of a tile, have only one.
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

// The boxes of a picture's tokens. If their places are not known, they stand in lines.
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
      rect.classList.toggle("gone", tokens.every(gone));
      const faint = rect.classList.contains("gone") && bare ? 0.4 : 0.08;
      rect.style.fillOpacity = bare ? faint + (1 - faint) * value : 0.86 * (1 - value);
    }
    const every = Array.from({ length: picture.tokens }, (_, i) => kept(picture.first + i));
    const count = every.filter((value) => value > 0).length;
    const left = every.filter((_, i) => gone(picture.first + i)).length;
    const placeless = picture.boxes.filter((box) => box === null).length;
    const notes = [
      `${picture.name}: ${count} of ${picture.tokens} tokens`,
      left ? `${left} had been dropped before this layer` : "",
      placeless ? `${placeless} of them are line ends or class tokens and have no place` : "",
      picture.shared ? "tokens that show the same area are drawn as one" : "",
      bare ? "they stand in the order of the prompt, because their places are not known" : "",
    ];
    figure.querySelector("figcaption").textContent = notes.filter(Boolean).join("; ");
  });
}
