// One prompt to two models at once, with the speed of each as this browser sees it.

import { $, Failure, fetchOk, fetchJson, failed, inVllm, listBackends, make, markNav, notice, number, root, times } from "./common.js";

const SHORTEST_MS = 100;
const OTHER = "other";
const sides = [...document.querySelectorAll(".side")].map((box, at) => ({
  at,
  select: box.querySelector("select"),
  address: box.querySelector(".address"),
  answer: box.querySelector(".answer"),
  facts: [...box.querySelectorAll(".speed div")],
}));
let stopping = null;

// --- endpoints: {base, model} ------------------------------------------------------------

async function endpoints() {
  const backends = await listBackends();
  if (backends) {
    return backends.flatMap((one) => one.models.map((model) => ({
      base: new URL(`backends/${one.name}/v1/`, root).href,
      model,
      label: one.name === model ? model : `${one.name}: ${model}`,
      down: !one.up,
    })));
  }
  const listed = await fetchJson(new URL("v1/models", root));
  return listed.data.map(({ id }) => ({ base: new URL("v1/", root).href, model: id, label: id }));
}

function fill(found) {
  // The second is on another server where there is one, even if the first has two names.
  const other = found.findIndex((one) => one.base !== found[0].base);
  const second = other < 0 ? Math.min(1, found.length) : other;
  for (const { at, select, address } of sides) {
    select.replaceChildren(...found.map((one) => make("option", {
      value: JSON.stringify([one.base, one.model]),
      textContent: one.down ? `${one.label} (down)` : one.label,
    })), make("option", { value: OTHER, textContent: "Another server …" }));
    select.selectedIndex = at ? second : 0;
    select.onchange = () => { address.hidden = select.value !== OTHER; };
    select.onchange();
  }
}

// The first model of a server that was typed in.
async function endpointOf({ select, address }) {
  if (select.value !== OTHER) {
    const [base, model] = JSON.parse(select.value);
    return { base, model };
  }
  const typed = address.querySelector("input").value.trim();
  let base;
  try {
    base = new URL(`${typed.replace(/\/+$/, "").replace(/\/v1$/, "")}/v1/`).href;
  } catch {
    throw new Failure(0, "Type the address of a server, such as http://host:8000.");
  }
  const { data } = await fetchJson(new URL("models", base));
  return { base, model: data[0].id };
}

// --- one answer --------------------------------------------------------------------------

function requestFor(model) {
  const chat = document.querySelector("input[name=kind]:checked").value === "chat";
  const prompt = $("prompt").value;
  return {
    path: chat ? "chat/completions" : "completions",
    body: {
      model,
      ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: Number($("tokens").value),
      temperature: Number($("temperature").value),
      stream: true,
      stream_options: { include_usage: true },
    },
  };
}

// Every JSON object of a stream of server-sent events.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5)).join("\n").trim();
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// Streams one answer onto its side. Returns what was measured.
async function answerOn(side, signal) {
  const { base, model } = await endpointOf(side);
  const { path, body } = requestFor(model);
  const start = performance.now();
  const answer = await fetchOk(new URL(path, base), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const result = { model, text: "", first: null, last: null, tokens: null };
  for await (const piece of events(answer)) {
    if (piece.error) throw new Failure(0, piece.error.message ?? "The stream ended with an error.");
    const choice = piece.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (text) {
      result.last = performance.now() - start;
      result.first ??= result.last;
      result.text += text;
      side.answer.textContent = result.text;
      side.answer.scrollTop = side.answer.scrollHeight;
    }
    if (piece.usage) result.tokens = piece.usage.completion_tokens;
    showSpeed(side, result);
  }
  if (!result.text) side.answer.textContent = "(an empty answer)";
  return result;
}

// Text that arrived all at once gives no rate.
const rateOf = ({ tokens, first, last }) => (tokens > 1 && last - first >= SHORTEST_MS
  ? (1000 * (tokens - 1)) / (last - first) : null);

function showSpeed({ facts }, result) {
  const rate = rateOf(result);
  const texts = [
    result.first === null ? "–" : result.first < 1000 ? `${Math.round(result.first)} ms` : `${(result.first / 1000).toFixed(1)} s`,
    rate === null ? "–" : rate.toFixed(1),
    result.tokens === null ? "–" : number(result.tokens),
  ];
  facts.forEach((fact, at) => { fact.querySelector("dd").textContent = texts[at]; });
}

function clear({ answer, facts }) {
  answer.textContent = "";
  answer.classList.remove("empty");
  answer.classList.add("waiting");
  for (const fact of facts) {
    fact.querySelector("dd").textContent = "–";
    fact.classList.remove("better");
  }
}

async function run(side, signal) {
  try {
    return await answerOn(side, signal);
  } catch (error) {
    if (!(error instanceof Failure) && error.name !== "AbortError") console.error(error);
    const message = error.name === "AbortError" ? "Stopped."
      : error instanceof Failure ? error.message : `The connection was lost: ${error.message}`;
    const before = side.answer.textContent ? "\n\n" : "";
    side.answer.append(make("span", { className: "failure", textContent: before + message }));
    return null;
  } finally {
    side.answer.classList.remove("waiting");
  }
}

// --- both --------------------------------------------------------------------------------

function verdict(results) {
  if (results.some((one) => one === null)) return "Nothing to compare: an answer is incomplete.";
  const [a, b] = results;
  let same = 0;
  while (same < a.text.length && a.text[same] === b.text[same]) same += 1;
  const texts = a.text === b.text ? "Both answers are the same."
    : same ? `The answers are the same for their first ${number(same)} characters.` : "The answers differ from the start.";
  const [one, two] = results.map(rateOf);
  if (!one || !two) return `Too short to compare their speeds. ${texts}`;
  const [better, ratio] = two > one ? [1, two / one] : [0, one / two];
  if (ratio < 1.05) return `Both are about equally fast. ${texts}`;
  sides[better].facts[1].classList.add("better");
  return `The ${["first", "second"][better]} writes ${times(ratio)} as many tokens per second. ${texts}`;
}

async function send() {
  if ($("send").disabled) return; // the keyboard submits all the same
  stopping = new AbortController();
  const { signal } = stopping;
  $("send").disabled = true;
  $("stop").disabled = false;
  $("verdict").textContent = "Waiting for both answers.";
  for (const side of sides) clear(side);
  let results;
  if ($("turns").checked) results = [await run(sides[0], signal), await run(sides[1], signal)];
  else results = await Promise.all(sides.map((side) => run(side, signal)));
  $("verdict").textContent = verdict(results);
  $("send").disabled = false;
  $("stop").disabled = true;
}

async function start() {
  markNav();
  for (const { answer } of sides) answer.textContent = "The answer will be here.";
  $("request").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("stop").addEventListener("click", () => stopping.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("request").requestSubmit();
  });
  try {
    const found = await endpoints();
    fill(found);
    if (!found.length) notice("No models yet", "No backend has been up since the gateway was started.", true);
    else if (inVllm && found.length === 1) notice("", "This server has one model. Choose another server for the second, or run vllm-moe-prune gateway before both.", true);
    $("notice").classList.toggle("quiet", found.length > 0);
  } catch (error) {
    failed("The models cannot be listed.", error, true);
  }
}

await start();
