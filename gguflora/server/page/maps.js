// Heat maps: how much each adapter changes each tensor, at the scale of its slider.

import { make, read } from "./client.js";

const percent = (value) => `${(value * 100).toPrecision(2)} %`;

function describe(adapter, change) {
  const scale = Number(adapter.slider.value);
  const amount = change.relative === null ? "changed" : `${percent(change.relative * scale)} at scale ${scale}`;
  return `${change.name}: ${amount}${change.problem ? ` (${change.problem})` : ""}`;
}

function cell(adapter, change, largest, readout) {
  if (!change) return make("td");
  const td = make("td", { className: change.problem ? "cell problem" : "cell", tabIndex: -1 });
  td.style.setProperty("--change", (change.relative ?? 0) / largest);
  const tell = () => {
    readout.textContent = describe(adapter, change);
    td.setAttribute("aria-label", readout.textContent);
  };
  td.addEventListener("pointerenter", tell);
  td.addEventListener("focus", tell);
  return td;
}

function walk(event, table) {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  if (!dx && !dy) return;
  event.preventDefault();
  const here = document.activeElement.closest("td");
  if (!here) return table.querySelector("td.cell")?.focus();
  let [x, y] = [here.cellIndex + dx, here.parentElement.rowIndex + dy];
  for (let next; (next = table.rows[y]?.cells[x]); x += dx, y += dy) {
    if (next.matches("td.cell")) return next.focus();
  }
}

function drawMap(adapter, largest) {
  const layerOf = ({ layer }) => layer ?? "–";
  const layers = [...new Set(adapter.changes.map(layerOf))].sort((a, b) => (a === "–") - (b === "–") || a - b);
  const modules = [...new Set(adapter.changes.map(({ module }) => module))];
  const readout = make("span", {}, "point at a cell, or use the arrow keys");
  const table = make("table", { tabIndex: 0 });
  table.setAttribute("aria-label", `Changes of ${adapter.name}: layers from left to right`);
  const head = layers.map((layer) => make("th", { scope: "col" }, String(layer)));
  table.append(make("thead", {}, make("tr", {}, make("th", {}, "layer"), ...head)));
  const rows = modules.map((module) => {
    const inRow = new Map(adapter.changes.filter((change) => change.module === module).map((c) => [layerOf(c), c]));
    const cells = layers.map((layer) => cell(adapter, inRow.get(layer), largest, readout));
    return make("tr", {}, make("th", { scope: "row" }, module), ...cells);
  });
  table.append(make("tbody", {}, ...rows));
  table.addEventListener("keydown", (event) => walk(event, table));
  adapter.map = table;
  table.style.setProperty("--scale", adapter.slider.value);
  return make("figure", {}, make("figcaption", {}, adapter.name, readout), make("div", { className: "scroll" }, table));
}

let drawing = 0;

export async function drawMaps(place, adapters) {
  const mine = ++drawing;
  const known = adapters.filter(({ id }) => id !== undefined);
  if (!known.length) return place.replaceChildren(make("p", { className: "quiet" }, "No adapter is loaded."));
  if (known.some(({ changes }) => !changes)) place.replaceChildren(make("p", { className: "quiet" }, "measuring …"));
  for (const adapter of known) adapter.changes ??= (await read(`lora-adapters/${adapter.id}/changes`)).changes;
  if (mine !== drawing) return; // others are drawn by now
  const largest = Math.max(...known.flatMap((adapter) => adapter.changes.map(({ relative }) => relative ?? 0))) || 1;
  const legend = make("p", { className: "quiet" }, "0 ", make("span", { className: "legend" }), ` ${percent(largest)} or more`);
  place.replaceChildren(legend, ...known.map((adapter) => drawMap(adapter, largest)));
}
