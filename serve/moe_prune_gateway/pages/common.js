// Shared by the three pages: addresses, requests, the header.
//
// They are served from two places. In vLLM's own server they lie beside their data, in
// /plugins/moe-prune/. In the gateway they lie at the top, and data is requested under
// the name of a backend, which the address of the page has as ?backend=NAME.

const PLUGIN = "plugins/moe-prune/";
const KEY = "moe-prune-key";

const here = new URL("./", location.href);
export const inVllm = here.pathname.endsWith(`/${PLUGIN}`);
// Where /v1/ is.
export const root = inVllm ? new URL("../../", here) : here;

export const $ = (id) => document.getElementById(id);

// An error that a server reports, or that it does not answer.
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export async function fetchOk(url, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key && new URL(url).origin === location.origin) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(url, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const { host, origin } = new URL(url);
    throw new Failure(0, origin === location.origin
      ? `No answer from ${host}. Is the server running?`
      : `No answer from ${host} that this page may read. Is the server running, and does it allow this page? `
        + `vLLM: --allowed-origins '["${location.origin}"]'; gateway: MOE_PRUNE_ALLOWED_ORIGINS=${location.origin}`);
  }
  if (answer.ok) return answer;
  if (answer.status === 401) wantKey();
  throw new Failure(answer.status, await messageOf(answer));
}

export const fetchJson = async (url) => (await fetchOk(url)).json();

async function messageOf(answer) {
  const text = await answer.text();
  try {
    const { error, message, detail } = JSON.parse(text);
    const said = error?.message ?? error ?? message ?? detail;
    if (typeof said === "string") return said;
  } catch {
    // No JSON: the status has to do.
  }
  return `The server answered ${answer.status} ${answer.statusText}.`.replace(" .", ".");
}

function wantKey() {
  const form = $("key-form");
  if (!form.hidden) return;
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, $("key").value.trim());
    location.reload();
  });
  $("key").focus();
}

// A large one in place of what is missing, or a slim one above what is there.
export function notice(title, message = "", slim = false) {
  const box = $("notice");
  box.replaceChildren(make("strong", { textContent: title }), make("p", { textContent: message }));
  box.classList.toggle("slim", slim);
  box.hidden = false;
}

export const noNotice = () => { $("notice").hidden = true; };

export function failed(title, error, slim = false) {
  notice(title, error instanceof Failure ? error.message : `This page has a fault: ${error}`, slim);
  if (!(error instanceof Failure)) console.error(error);
}

// The backends of the gateway; null in vLLM's own server.
export async function listBackends() {
  if (inVllm) return null;
  return (await fetchJson(new URL("backends", root))).backends;
}

export function markNav() {
  for (const link of document.querySelectorAll("nav a")) {
    const page = (url) => new URL(url, here).pathname.replace(/index\.html$/, "");
    if (page(link.href) === page(location.href)) link.setAttribute("aria-current", "page");
    link.search = location.search;
  }
}

// Where the data of the chosen backend is. The first one that is up if none is chosen.
export async function chooseBackend() {
  const backends = await listBackends();
  if (!backends) return { data: here, name: null };
  const wanted = new URLSearchParams(location.search).get("backend");
  const chosen = backends.find((one) => one.name === wanted)
    ?? backends.find((one) => one.up) ?? backends[0];
  const select = $("backend");
  select.replaceChildren(...backends.map((one) => make("option", {
    value: one.name,
    textContent: one.up ? one.name : `${one.name} (down)`,
    selected: one === chosen,
  })));
  select.onchange = () => { location.search = new URLSearchParams({ backend: select.value }); };
  $("backend-field").hidden = false;
  return { data: new URL(`backends/${chosen.name}/${PLUGIN}`, root), name: chosen.name };
}

export const number = (value) => Math.round(value).toLocaleString("en");
export const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
export const times = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)}×`;
