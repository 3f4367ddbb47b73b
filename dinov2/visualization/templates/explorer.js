"use strict";

// Patches are numbered through all images, row by row. `levels` has a plane of all patches for each dimension.
const data = JSON.parse(document.getElementById("data").textContent);
const grids = [];  // of each image: number of its first patch, rows, columns
let count = 0;
for (const [rows, columns] of data.grids) {
  grids.push({ start: count, rows, columns });
  count += rows * columns;
}
const figures = [...document.querySelectorAll("figure")].map((figure) => ({
  box: figure.querySelector(".patches"),
  name: figure.querySelector(".name").textContent,
  canvas: figure.querySelector("canvas"),
  mark: figure.querySelector(".mark"),
  best: figure.querySelector(".best"),
}));
const status = document.getElementById("status");
const opacity = document.getElementById("opacity");
const radios = [...document.querySelectorAll("input[name=layer]")];
const hint = "Click or tap a patch of any image.";

let levels, lengths;  // Int8Array of dimensions * count; length of each patch in steps
let colors;  // {layer: bytes}
let chosen = null;  // {image, row, column}
let similarity = null;  // Float32Array of cosines to the chosen patch

// --- Data ---

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

async function unpacked(packed) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser is too old (it has no DecompressionStream, as all have since 2023)");
  }
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Int8Array(await new Response(stream).arrayBuffer());
}

async function read() {
  colors = { palette: bytes(data.palette), pca: bytes(data.pca), attention: bytes(data.attention) };
  levels = await unpacked(bytes(data.features));
  lengths = new Float64Array(count);
  for (let at = 0; at < levels.length; at++) lengths[at % count] += levels[at] * levels[at];
  for (let patch = 0; patch < count; patch++) lengths[patch] = Math.sqrt(lengths[patch]) || 1;
}

function cosines(patch) {
  const sums = new Int32Array(count);
  for (let start = 0; start < levels.length; start += count) {
    const own = levels[start + patch];
    if (own === 0) continue;
    for (let other = 0; other < count; other++) sums[other] += own * levels[start + other];
  }
  return Float32Array.from(sums, (sum, other) => sum / (lengths[patch] * lengths[other]));
}

// --- Drawing ---

function layer() {
  return radios.find((radio) => radio.checked).value;
}

function smallest(values) {
  return values.reduce((low, value) => Math.min(low, value), 1);
}

function colorOf(patch, low) {
  if (layer() === "pca") return colors.pca.subarray(3 * patch, 3 * patch + 3);
  const share = (similarity?.[patch] - low) / Math.max(1 - low, 1e-6);
  const level = layer() === "attention" ? colors.attention[patch] : Math.round(255 * Math.min(Math.max(share, 0), 1));
  return colors.palette.subarray(3 * level, 3 * level + 3);
}

function draw() {
  const colored = layer() !== "similarity" || similarity !== null;
  document.body.classList.toggle("colored", colored);
  const low = similarity && smallest(similarity);
  if (colored) {
    grids.forEach(({ start, rows, columns }, index) => {
      const context = figures[index].canvas.getContext("2d", { willReadFrequently: true });
      const pixels = context.createImageData(columns, rows);
      for (let patch = 0; patch < rows * columns; patch++) {
        pixels.data.set(colorOf(start + patch, low), 4 * patch);
        pixels.data[4 * patch + 3] = 255;
      }
      context.putImageData(pixels, 0, 0);
    });
  }
  const ends = { similarity: similarity ? [low.toFixed(2), "1.00"] : null, pca: null, attention: ["0", "high"] }[layer()];
  document.getElementById("scale").hidden = ends === null;
  [document.getElementById("low").textContent, document.getElementById("high").textContent] = ends ?? ["", ""];
}

function bestMatch({ start, rows, columns }) {
  let best = start;
  for (let patch = start; patch < start + rows * columns; patch++) if (similarity[patch] > similarity[best]) best = patch;
  return { row: Math.floor((best - start) / columns), column: (best - start) % columns, cosine: similarity[best] };
}

function drawMarks() {
  let closest = null;
  grids.forEach((grid, index) => {
    const { mark, best, name } = figures[index];
    mark.hidden = chosen === null;
    best.textContent = "";
    if (chosen === null) return;
    const own = index === chosen.image;
    const at = own ? chosen : bestMatch(grid);
    mark.classList.toggle("match", !own);
    mark.style.left = `${(100 * (at.column + (own ? 0 : 0.5))) / grid.columns}%`;
    mark.style.top = `${(100 * (at.row + (own ? 0 : 0.5))) / grid.rows}%`;
    mark.style.width = own ? `${100 / grid.columns}%` : "";
    mark.style.height = own ? `${100 / grid.rows}%` : "";
    if (own) return;
    best.textContent = at.cosine.toFixed(2);
    if (closest === null || at.cosine > closest.cosine) closest = { name, ...at };
  });
  if (chosen === null) {
    status.textContent = hint;
    return;
  }
  const own = `${figures[chosen.image].name}, row ${chosen.row + 1}, column ${chosen.column + 1}.`;
  const other = closest && ` Most similar elsewhere: ${closest.name}, cosine ${closest.cosine.toFixed(2)}.`;
  status.textContent = own + (other ?? "");
}

// --- Choosing ---

function choose(place) {
  chosen = place;
  similarity = place && cosines(grids[place.image].start + place.row * grids[place.image].columns + place.column);
  if (place) radios[0].checked = true;
  for (const button of document.querySelectorAll(".moves button")) button.disabled = place === null;
  draw();
  drawMarks();
}

function placeOf(image, event) {
  const box = figures[image].box.getBoundingClientRect();
  const { rows, columns } = grids[image];
  const within = (share, size) => Math.min(Math.max(Math.floor(share * size), 0), size - 1);
  const row = within((event.clientY - box.top) / box.height, rows);
  return { image, row, column: within((event.clientX - box.left) / box.width, columns) };
}

const MOVES = { ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowRight: [0, 1] };

function move(key, image) {
  const { rows, columns } = grids[image];
  if (chosen === null || chosen.image !== image) {
    choose({ image, row: Math.floor(rows / 2), column: Math.floor(columns / 2) });
    return;
  }
  const [down, right] = MOVES[key] ?? [0, 0];
  const row = Math.min(Math.max(chosen.row + down, 0), rows - 1);
  choose({ image, row, column: Math.min(Math.max(chosen.column + right, 0), columns - 1) });
}

function press(key) {
  const focused = figures.findIndex(({ box }) => box === document.activeElement);
  const image = focused >= 0 ? focused : chosen?.image;
  if (key === "Escape") {
    choose(null);
  } else if (radios["123".indexOf(key)]) {
    radios["123".indexOf(key)].checked = true;
    draw();
  } else if (image !== undefined && (key in MOVES || (focused >= 0 && (key === "Enter" || key === " ")))) {
    move(key, image);
  } else {
    return false;
  }
  return true;
}

function listen() {
  figures.forEach(({ box }, image) => {
    box.addEventListener("click", (event) => choose(placeOf(image, event)));
    box.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && event.buttons === 1) choose(placeOf(image, event));
    });
  });
  document.addEventListener("keydown", (event) => {
    const inControl = event.target.closest("input, button") && event.key !== "Escape" && !"123".includes(event.key);
    if (event.ctrlKey || event.altKey || event.metaKey || inControl) return;
    if (press(event.key)) event.preventDefault();
  });
  for (const button of document.querySelectorAll(".moves button")) {
    button.addEventListener("click", () => (button.dataset.key === "Escape" ? choose(null) : move(button.dataset.key, chosen.image)));
  }
  for (const radio of radios) radio.addEventListener("change", draw);
  const fade = () => document.body.style.setProperty("--opacity", opacity.value / 100);
  opacity.addEventListener("input", fade);
  fade();
  const scale = document.querySelector("#scale canvas").getContext("2d");
  const ramp = scale.createImageData(256, 1);
  for (let level = 0; level < 256; level++) ramp.data.set([...colors.palette.subarray(3 * level, 3 * level + 3), 255], 4 * level);
  scale.putImageData(ramp, 0, 0);
}

read().then(
  () => {
    listen();
    choose(null);
    document.body.dataset.ready = "true";
  },
  (error) => { status.textContent = `The features cannot be read: ${error.message}.`; },
);
