// The page: asks the base and the adapted model the same question and shows both answers as they come.

const LIVE_DELAY = 250; // milliseconds after the last movement of a slider
const $ = (id) => document.getElementById(id);
const running = { base: null, adapted: null }; // an AbortController for each column that is answering
let adapters = [];
let asked = false;
let liveTimer;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- talking to the server

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) $("key-form").hidden = false;
  throw new Error(`${response.status}: ${body.error?.message ?? response.statusText}`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function showError(error) {
  $("error").textContent = error?.message ?? "";
  $("error").hidden = !error;
}

// ---- asking

function scales() {
  return adapters.map(({ id, slider }) => ({ id, scale: Number(slider.value) })).filter(({ scale }) => scale !== 0);
}

function question(lora) {
  const text = $("prompt").value;
  const chat = $("chat").checked;
  return {
    path: chat ? "v1/chat/completions" : "v1/completions",
    body: {
      ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
      lora,
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: Number($("max-tokens").value) || 128,
      temperature: Number($("temperature").value) || 0,
      seed: Number($("seed").value) || 0,
    },
  };
}

function numbers({ tokens, first, seconds, final }) {
  const rate = final?.predicted_per_second ?? (seconds > 0 ? (tokens - 1) / seconds : 0);
  const parts = [`${final?.predicted_n ?? tokens} tokens`];
  if (rate > 0) parts.unshift(`${rate.toFixed(1)} tokens/s`);
  if (first !== undefined) parts.push(`first after ${first.toFixed(0)} ms`);
  return parts.join(" · ");
}

async function answer(column, lora) {
  running[column]?.abort();
  const controller = (running[column] = new AbortController());
  const text = document.querySelector(`#${column} .text`);
  const line = document.querySelector(`#${column} .numbers`);
  const node = text.firstChild ?? text.appendChild(document.createTextNode(""));
  const started = performance.now();
  const state = { tokens: 0, seconds: 0 };
  let buffer = "";
  let frame = 0;
  const draw = () => {
    frame = 0;
    if (running[column] !== controller) return;
    const follow = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
    node.data = buffer.trimStart();
    line.textContent = numbers(state);
    if (follow) text.scrollTop = text.scrollHeight;
  };
  node.data = line.textContent = "";
  text.classList.remove("failed");
  text.setAttribute("aria-busy", "true");
  updateButtons();
  try {
    const { path, body } = question(lora);
    const response = await call(path, { method: "POST", body: JSON.stringify(body), signal: controller.signal });
    for await (const event of events(response)) {
      const choice = event.choices[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) {
        state.first ??= performance.now() - started;
        state.tokens += 1;
        state.seconds = (performance.now() - started - state.first) / 1000;
        buffer += piece;
      }
      state.final = event.timings ?? state.final;
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      text.classList.add("failed");
      buffer ||= error.message;
      showError(error);
    }
  }
  if (running[column] !== controller) return; // another question has taken the column
  draw();
  running[column] = null;
  text.setAttribute("aria-busy", "false");
  updateButtons();
}

function updateButtons() {
  $("stop").disabled = !running.base && !running.adapted;
}

function ask() {
  asked = true;
  showError(null);
  answer("base", []);
  answer("adapted", scales());
}

function stop() {
  clearTimeout(liveTimer);
  running.base?.abort();
  running.adapted?.abort();
}

// ---- adapters

function describeSet() {
  const on = adapters.filter(({ slider }) => Number(slider.value) !== 0);
  const names = on.map(({ name, slider }) => `${name} at ${Number(slider.value)}`);
  document.querySelector("#adapted .set").textContent = names.join(" + ") || "no adapter";
}

function moved(adapter) {
  const scale = Number(adapter.slider.value);
  adapter.output.value = scale.toFixed(2);
  adapter.map?.style.setProperty("--scale", scale);
  describeSet();
  clearTimeout(liveTimer);
  if (asked) {
    liveTimer = setTimeout(() => {
      showError(null);
      answer("adapted", scales());
    }, LIVE_DELAY);
  }
}

function addSlider(adapter) {
  const id = `scale-${adapter.id}`;
  const slider = make("input", { id, type: "range", min: "0", max: "2", step: "0.05" });
  slider.value = String(adapter.start);
  slider.addEventListener("input", () => moved(adapter));
  const size = `${adapter.method}, ${(adapter.size / 1e6).toFixed(1)} MB`;
  const label = make("label", { htmlFor: id }, adapter.name, make("small", {}, size));
  adapter.slider = slider;
  adapter.output = make("output", { htmlFor: id, value: "" });
  $("sliders").append(make("div", { className: "slider" }, label, slider, adapter.output));
}

async function loadAdapters() {
  const list = await (await call("lora-adapters")).json();
  const any = list.some(({ scale }) => scale !== 0);
  adapters = list.map((adapter, index) => ({ ...adapter, start: any ? adapter.scale : Number(index === 0) }));
  if (adapters.length) $("sliders").replaceChildren();
  adapters.forEach(addSlider);
  adapters.forEach(moved);
}

// ---- heat maps

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

async function loadMaps() {
  const changes = (adapter) => call(`lora-adapters/${adapter.id}/changes`).then((response) => response.json());
  if (!adapters.length) return;
  $("maps").replaceChildren(make("p", { className: "quiet" }, "measuring …"));
  for (const adapter of adapters) adapter.changes = (await changes(adapter)).changes;
  const largest = Math.max(...adapters.flatMap((adapter) => adapter.changes.map(({ relative }) => relative ?? 0))) || 1;
  const legend = make("p", { className: "quiet" }, "0 ", make("span", { className: "legend" }), ` ${percent(largest)} or more`);
  $("maps").replaceChildren(legend, ...adapters.map((adapter) => drawMap(adapter, largest)));
}

// ---- start

async function start() {
  try {
    const models = (await (await call("v1/models")).json()).data;
    $("model").textContent = models[0].root;
    await loadAdapters();
    $("key-form").hidden = true;
    showError(null);
    await loadMaps();
  } catch (error) {
    showError(error);
    $("model").textContent = "";
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("stop").addEventListener("click", stop);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  start();
});
start();
