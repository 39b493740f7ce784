// The page "Try it": a search and a picture to click on, each loaded when its button is pressed.

import { facts } from "./loading.js";
import { loadMaps } from "./maps.js";
import { loadSearch } from "./search.js";

const COUNT = 8; // pictures found
const about = await facts().catch(() => null);
const megabytes = (group) => Object.values(about.sizes[group]).reduce((sum, size) => sum + size, 0) / 1e6;

/** Let a section's button load what it needs, show how far that is, then show the section's controls. */
function start(section, group, what, begin) {
  const [button, progress, status] = ["button", "progress", "[role=status]"].map((name) => section.querySelector(name));
  const say = (text) => (status.textContent = text);
  if (!about) return say("The page's own files did not arrive. Load the page again.");
  section.querySelector(".try-needs").remove();
  button.textContent = `${what} (${megabytes(group).toFixed(1)} MB)`;
  button.hidden = false;
  button.onclick = async () => {
    button.disabled = true;
    progress.hidden = false;
    say("Loading …");
    try {
      const controls = section.querySelector(".try-controls");
      await begin(controls, (share) => (progress.value = share));
      say("");
      button.hidden = progress.hidden = true;
      controls.hidden = false;
      controls.querySelector("input, select").focus();
    } catch (error) {
      progress.hidden = true;
      button.disabled = false;
      say(`That failed (${error.message}). Check your connection and press the button again. If it fails again, your `
        + "browser may be too old: a Chromium, Firefox or Safari from 2023 or later runs it.");
    }
  };
}

start(document.querySelector("#try-search"), "search", "Load the model", async (controls, tell) => {
  const { find, sheet } = await loadSearch(about, tell);
  const field = controls.querySelector("input"), results = controls.querySelector("ul");
  results.style.setProperty("--sheet", `url(${sheet})`);
  const rows = Math.ceil(about.names.length / about.columns);

  function shown({ place, name, cosine, unseen }) {
    const item = document.createElement("li"), picture = document.createElement("div"), words = document.createElement("p");
    const [row, column] = [Math.floor(place / about.columns), place % about.columns];
    Object.assign(picture, { className: "try-picture", role: "img", ariaLabel: `Drawing: ${name}` });
    picture.style.backgroundSize = `${100 * about.columns}% ${100 * rows}%`;
    picture.style.backgroundPosition = `${(100 * column) / (about.columns - 1)}% ${(100 * row) / (rows - 1)}%`;
    words.textContent = `${name}${unseen ? " *" : ""} ${cosine.toFixed(2)}`;
    item.append(picture, words);
    return item;
  }

  async function search() {
    const text = field.value;
    const found = text.trim() ? await find(text, COUNT) : [];
    if (text === field.value) results.replaceChildren(...found.map(shown)); // else the reader has typed on
  }

  field.oninput = search;
  await search();
});

start(document.querySelector("#try-maps"), "maps", "Load the maps", async (controls, tell) => {
  const { images, weightsOf } = await loadMaps(about, tell);
  const [scene, block, head] = controls.querySelectorAll("select");
  const frame = controls.querySelector(".try-frame"), caption = controls.querySelector("p");
  const canvas = frame.querySelector("canvas"), mark = frame.querySelector("span");
  const [rows, columns] = about.grid;
  let picked = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  const numbered = (name, count) => Array.from({ length: count }, (_, i) => [`${name} ${i}`, i]);
  fill(scene, about.scenes.map((name, i) => [name, i]), 0);
  fill(block, [...numbered("block", about.blocks), ["pooling head", about.blocks]], about.blocks - 1);
  fill(head, [["mean", -1], ...numbered("head", about.heads)], -1);

  function draw() {
    const pooling = +block.value === about.blocks, weights = weightsOf(+scene.value, +block.value, +head.value, picked);
    const [row, column] = [Math.floor(picked / columns), picked % columns];
    const [low, high] = [Math.min(...weights), Math.max(...weights)];
    paint(canvas, images[+scene.value], weights, low, high);
    mark.hidden = pooling;
    mark.style = `left: ${(100 * column) / columns}%; top: ${(100 * row) / rows}%; width: ${100 / columns}%; height: ${100 / rows}%`;
    const who = pooling ? "The pooling head has one query, which no click changes. It" : `The patch in row ${row + 1}, column ${column + 1}`;
    caption.textContent = `${who} attends to patches with weights from ${low.toFixed(3)} (violet) to ${high.toFixed(3)} (yellow).`;
    canvas.ariaLabel = caption.textContent;
  }

  function paint(canvas, image, weights, low, high) {
    const context = canvas.getContext("2d"), [width, height] = [canvas.width / columns, canvas.height / rows];
    context.filter = "grayscale(1)";
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    context.globalAlpha = 0.6;
    weights.forEach((weight, patch) => {
      context.fillStyle = about.colours[Math.round((255 * (weight - low)) / (high - low || 1))];
      context.fillRect((patch % columns) * width, Math.floor(patch / columns) * height, width, height);
    });
    context.globalAlpha = 1;
  }

  function pick(row, column) {
    if (+block.value === about.blocks) return;
    const within = (value, count) => Math.min(Math.max(Math.floor(value), 0), count - 1);
    picked = within(row, rows) * columns + within(column, columns);
    draw();
  }

  for (const menu of [scene, block, head]) menu.onchange = draw;
  frame.onclick = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    pick(((clientY - top) / height) * rows, ((clientX - left) / width) * columns);
  };
  frame.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault(); // else the page scrolls
    pick(Math.floor(picked / columns) + step[0], (picked % columns) + step[1]);
  };
  draw();
});

function fill(menu, options, value) {
  menu.replaceChildren(...options.map(([name, number]) => new Option(name, number, false, number === value)));
}
