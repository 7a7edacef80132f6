// Talking to the server: requests, streamed events, and errors in words.

const WORDS = {
  401: "The server asks for an API key.",
  413: "The question is too long for the server.",
  429: "The server is busy; try again in a moment.",
  503: "The server is shutting down.",
  504: "The answer took longer than the server allows.",
};

export async function call(path, options = {}) {
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
  const reason = `${response.status}: ${body.error?.message ?? response.statusText}`;
  const error = new Error(WORDS[response.status] ? `${WORDS[response.status]} (${reason})` : reason);
  error.status = response.status;
  throw error;
}

export const read = async (path) => (await call(path)).json();
export const post = (path, body, signal) => call(path, { method: "POST", body: JSON.stringify(body), signal });

export async function* events(response) {
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

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function bytes(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(1)} GB`;
  return count >= 1e6 ? `${(count / 1e6).toFixed(1)} MB` : `${Math.max(1, Math.round(count / 1e3))} kB`;
}
