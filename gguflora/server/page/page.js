// The page: asks the base and the adapted model, or each adapter, the same question and shows the answers as they come.

import { bytes, events, make, post, read } from "./client.js";
import { drawMaps } from "./maps.js";

const LIVE_DELAY = 250; // milliseconds after the last movement of a slider
const FIELDS = { prompt: "prompt", tokens: "max-tokens", temperature: "temperature", seed: "seed" };
const $ = (id) => document.getElementById(id);
const running = new Map(); // an AbortController for each column that is answering
const rates = new Map(); // tokens per second of the last answer of each column
let adapters = [];
let memory = {};
let asked = false;
let timer;

function showError(error) {
  if (error?.status === 401) $("key-form").hidden = false;
  $("error").textContent = error?.message ?? "";
  $("error").hidden = !error;
}

// ---- what is asked

const scaleOf = ({ slider }) => Number(slider.value);
const active = () => adapters.filter((adapter) => scaleOf(adapter) !== 0);
const nameOf = (list) => list.map((adapter) => `${adapter.name}@${scaleOf(adapter)}`).join("+") || "base";
const describe = (list) => list.map((adapter) => `${adapter.name} at ${scaleOf(adapter)}`).join(" + ") || "no adapter";

function wanted() {
  const both = [
    { id: "base", title: "Base", list: [] },
    { id: "adapted", title: "Adapted", list: active() },
  ];
  if (!$("apart").checked) return both;
  const alone = active().map((adapter) => ({ id: `only-${adapter.name}`, title: adapter.name, list: [adapter] }));
  return [both[0], ...alone];
}

function question(list) {
  const text = $("prompt").value;
  const chat = $("chat").checked;
  return {
    path: chat ? "v1/chat/completions" : "v1/completions",
    body: {
      ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
      model: nameOf(list),
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: Number($("max-tokens").value) || 128,
      temperature: Number($("temperature").value) || 0,
      seed: Number($("seed").value) || 0,
    },
  };
}

// ---- columns

function drawColumns() {
  const columns = wanted();
  for (const id of running.keys()) if (!columns.some((column) => column.id === id)) running.get(id).abort();
  const shown = columns.map((column) => document.getElementById(column.id) ?? makeColumn(column));
  $("answers").replaceChildren(...shown);
  for (const { id, list } of columns) document.getElementById(id).querySelector(".set").textContent = describe(list);
  $("go").textContent = $("apart").checked ? "Ask all" : "Ask both";
  return columns;
}

function makeColumn({ id, title }) {
  const text = make("pre", { className: "text", tabIndex: 0 });
  text.setAttribute("aria-live", "polite");
  text.setAttribute("aria-busy", "false");
  text.setAttribute("aria-label", id === "base" ? "Answer of the base" : id === "adapted" ? "Answer with adapters" : `Answer of ${title}`);
  const line = (className) => make("p", { className: `${className} quiet` });
  return make("article", { id }, make("h2", {}, title), line("set"), text, line("numbers"), line("cost"));
}

function numbers({ tokens, first, seconds, final }) {
  const rate = final?.predicted_per_second ?? (seconds > 0 ? (tokens - 1) / seconds : 0);
  const parts = [`${final?.predicted_n ?? tokens} tokens`];
  if (rate > 0) parts.unshift(`${rate.toFixed(1)} tokens/s`);
  if (first !== undefined) parts.push(`first after ${first.toFixed(0)} ms`);
  return parts.join(" · ");
}

function showCosts() {
  for (const { id, list } of wanted()) {
    const line = document.getElementById(id)?.querySelector(".cost");
    if (!line) continue;
    const size = list.reduce((sum, adapter) => sum + (adapter.size ?? 0), 0);
    const parts = [list.length ? `adapters ${bytes(size)}` : memory.model ? `model ${bytes(memory.model)}` : ""];
    const share = rates.get(id) / rates.get("base");
    if (list.length && Number.isFinite(share)) parts.push(`${Math.round(share * 100)} % of the base's speed`);
    line.textContent = parts.filter(Boolean).join(" · ");
  }
}

async function answer({ id, list }) {
  running.get(id)?.abort();
  const controller = new AbortController();
  running.set(id, controller);
  const column = document.getElementById(id);
  const text = column.querySelector(".text");
  const line = column.querySelector(".numbers");
  const node = text.firstChild ?? text.appendChild(document.createTextNode(""));
  const started = performance.now();
  const state = { tokens: 0, seconds: 0 };
  let buffer = "";
  let frame = 0;
  const draw = () => {
    frame = 0;
    if (running.get(id) !== controller) return;
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
    const { path, body } = question(list);
    for await (const event of events(await post(path, body, controller.signal))) {
      const choice = event.choices[0];
      const piece = choice?.delta?.content ?? choice?.delta?.reasoning_content ?? choice?.text ?? "";
      if (piece) {
        state.first ??= performance.now() - started;
        state.tokens += 1;
        state.seconds = (performance.now() - started - state.first) / 1000;
        buffer += piece;
      }
      state.final = event.timings ?? state.final;
      frame ||= requestAnimationFrame(draw);
    }
    rates.set(id, state.final?.predicted_per_second);
  } catch (error) {
    if (error.name !== "AbortError") {
      text.classList.add("failed");
      buffer ||= error.message;
      showError(error);
    }
  }
  if (running.get(id) !== controller) return; // another question has taken the column
  draw();
  running.delete(id);
  text.setAttribute("aria-busy", "false");
  updateButtons();
  showCosts();
}

function updateButtons() {
  $("stop").disabled = running.size === 0;
}

async function ask(columns = drawColumns()) {
  asked = true;
  showError(null);
  await Promise.all(columns.map(answer)); // all are asked at once, so that the server decodes them in one batch
  if (adapters.some(({ id }) => id === undefined)) await refresh(); // those of the folder are loaded now
}

function stop() {
  clearTimeout(timer);
  for (const controller of running.values()) controller.abort();
}

// ---- the prompt as the model reads it, and the address that holds what is set

async function showRendered() {
  if (!$("rendered").open) return;
  const text = $("prompt").value;
  if (!$("chat").checked) {
    $("rendered-text").textContent = text;
    return;
  }
  try {
    const messages = [{ role: "user", content: text }];
    const prompts = await Promise.all(wanted().map(async ({ title, list }) => {
      const response = await post("apply-template", { model: nameOf(list), messages });
      return { title, prompt: (await response.json()).prompt };
    }));
    const differ = prompts.some(({ prompt }) => prompt !== prompts[0].prompt); // an adapter may bring its own template
    const lines = differ ? prompts.map(({ title, prompt }) => `${title}\n${prompt}`) : [prompts[0].prompt];
    $("rendered-text").textContent = lines.join("\n\n");
  } catch (error) {
    $("rendered-text").textContent = error.message;
  }
}

function state() {
  const values = Object.entries(FIELDS).map(([name, id]) => [name, $(id).value]);
  const on = active();
  return new URLSearchParams([
    ...values,
    ["chat", Number($("chat").checked)],
    ["apart", Number($("apart").checked)],
    ["set", nameOf(on)],
  ]);
}

function keepState() {
  history.replaceState(null, "", `#${state()}`);
}

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, id] of Object.entries(FIELDS)) if (given.has(name)) $(id).value = given.get(name);
  for (const id of ["chat", "apart"]) if (given.has(id)) $(id).checked = given.get(id) === "1";
  return given.get("set");
}

function scalesIn(set) {
  const parts = set && set !== "base" ? set.split("+") : [];
  return new Map(parts.map((part) => part.split("@")).map(([name, scale]) => [name, Number(scale ?? 1) || 0]));
}

async function copyLink() {
  keepState();
  try {
    await navigator.clipboard.writeText(location.href);
    $("copy").textContent = "Copied";
  } catch {
    $("copy").textContent = "Copy the address above";
  }
  setTimeout(() => ($("copy").textContent = "Copy link"), 2000);
}

// ---- adapters

function moved(adapter) {
  const scale = scaleOf(adapter);
  adapter.output.value = scale.toFixed(2);
  adapter.map?.style.setProperty("--scale", scale);
  const columns = drawColumns();
  changed();
  clearTimeout(timer);
  if (!asked) return;
  timer = setTimeout(() => ask(columns.filter(({ id }) => id !== "base")), LIVE_DELAY);
}

function addRow(adapter, scale) {
  const id = `scale-${adapter.name}`;
  const slider = make("input", { id, type: "range", min: "0", max: "2", step: "0.05" });
  slider.value = String(scale);
  adapter.slider = slider;
  adapter.output = make("output", { value: "" });
  adapter.output.setAttribute("for", id);
  adapter.output.value = scaleOf(adapter).toFixed(2);
  slider.addEventListener("input", () => moved(adapter));
  const size = adapter.size ? `${adapter.method}, ${bytes(adapter.size)}` : "loads when it is asked";
  const label = make("label", { htmlFor: id }, adapter.name);
  const about = make("small", {}, size);
  const row = make("div", { className: "slider" }, make("div", { className: "who" }, label, about), slider, adapter.output);
  if ($("load-form").dataset.allowed && adapter.id !== undefined) {
    const button = make("button", { type: "button", className: "unload", title: `Unload ${adapter.name}` }, "Unload");
    button.setAttribute("aria-label", `Unload ${adapter.name}`);
    button.addEventListener("click", () => unload(adapter.name));
    row.append(button);
  }
  $("sliders").append(row);
}

/** Read which adapters there are; scales that are set stay, and `scales` sets others. */
async function refresh(scales = new Map()) {
  const [loaded, models, props] = await Promise.all([read("lora-adapters"), read("v1/models"), read("props")]);
  memory = props.memory;
  $("model").textContent = models.data[0].root;
  $("about").textContent = `${bytes(memory.model)} · cache ${bytes(memory.kv)} · ${props.default_generation_settings.n_ctx} tokens of context`;
  if (props.can_load_adapters) $("load-form").dataset.allowed = "yes";
  $("load-form").hidden = !props.can_load_adapters;
  const before = new Map(adapters.map((adapter) => [adapter.name, adapter]));
  const names = new Set(loaded.map(({ name }) => name));
  const dormant = props.adapters_on_disk.filter((name) => !names.has(name));
  const rows = dormant.filter((name) => before.has(name) || scales.has(name)).map((name) => ({ name }));
  const any = loaded.some(({ scale }) => scale !== 0);
  const start = ({ name, scale }, index) => {
    if (scales.has(name)) return scales.get(name);
    if (before.has(name)) return scaleOf(before.get(name));
    if (before.size || scales.size) return 0;
    return any ? scale : Number(index === 0);
  };
  adapters = [...loaded, ...rows].map((adapter) => ({ ...adapter, changes: sameChanges(before.get(adapter.name), adapter) }));
  const starts = adapters.map(start);
  $("sliders").replaceChildren(...(adapters.length ? [] : [make("p", { className: "quiet" }, "No adapter is loaded.")]));
  adapters.forEach((adapter, index) => addRow(adapter, starts[index]));
  $("add-form").hidden = dormant.length === 0;
  $("dormant").replaceChildren(...dormant.map((name) => make("option", { value: name })));
  drawColumns();
  showCosts();
  drawMaps($("maps"), adapters).catch(showError);
}

const sameChanges = (former, adapter) => (former?.sha256 === adapter.sha256 ? former?.changes : undefined);

async function load(event) {
  event.preventDefault();
  const path = $("load-path").value.trim();
  const name = $("load-name").value.trim() || path.split("/").filter(Boolean).pop()?.replace(/\.gguf$/, "");
  await attempt($("load-button"), "Loading …", async () => {
    await post("v1/load_lora_adapter", { lora_name: name, lora_path: path });
    await refresh(new Map([[name, 1]]));
    $("load-form").reset();
  });
}

const unload = (name) =>
  attempt(null, "", async () => {
    await post("v1/unload_lora_adapter", { lora_name: name });
    await refresh();
    keepState();
  });

async function attempt(button, label, work) {
  const text = button?.textContent;
  if (button) Object.assign(button, { disabled: true, textContent: label });
  try {
    showError(null);
    await work();
  } catch (error) {
    showError(error);
  }
  if (button) Object.assign(button, { disabled: false, textContent: text });
}

function add(event) {
  event.preventDefault();
  const name = $("add-name").value.trim();
  if (![...$("dormant").children].some(({ value }) => value === name)) {
    return showError(new Error(`The directory of adapters has no ${name} that is not shown yet.`));
  }
  $("add-form").reset();
  attempt(null, "", () => refresh(new Map([[name, 1]])));
}

// ---- start

async function start() {
  try {
    await refresh(scalesIn(readState()));
    $("key-form").hidden = true;
    showError(null);
    showRendered();
  } catch (error) {
    showError(error);
    $("model").textContent = "";
  }
}

function changed() {
  keepState();
  clearTimeout(changed.timer);
  changed.timer = setTimeout(showRendered, LIVE_DELAY);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  keepState();
  ask();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("ask").addEventListener("input", changed);
$("apart").addEventListener("change", () => {
  drawColumns();
  showCosts();
});
$("rendered").addEventListener("toggle", showRendered);
$("stop").addEventListener("click", stop);
$("copy").addEventListener("click", copyLink);
$("load-form").addEventListener("submit", load);
$("add-form").addEventListener("submit", add);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  start();
});
window.addEventListener("hashchange", start);
start();
