// The page: a conversation over /v1/chat/completions, and the server's live figures. Plain modules of the browser, no library.

const $ = (id) => document.getElementById(id);
const messages = []; // what is sent: the messages of the chat API, reasoning included
let running = null; // the AbortController of the answer that is being written
let waitingCalls = null; // calls of the last answer whose results are still to come

// ---- Small helpers

/** An element with attributes and children. Text is only ever set as text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Bytes with three digits at most and their unit. */
function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function say(text, fault = false) {
  $("status").textContent = text;
  $("status").classList.toggle("fault", fault);
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** The sentence of an error answer; a missing key opens the field for it. */
async function faultOf(response) {
  const fallback = `The server answered ${response.status}.`;
  const text = await response.text();
  if (response.status === 401) $("settings").open = true;
  try {
    const message = JSON.parse(text).error.message;
    return response.status === 401 ? `${message} (see "Instructions, tools and key")` : message;
  } catch {
    return fallback;
  }
}

// ---- What is shown

function addArticle(kind, title) {
  $("empty")?.remove();
  const article = make("article", { class: kind, "aria-label": title }, make("h3", { text: title }));
  following(() => $("log").append(article));
  return article;
}

/** Change the conversation; a reader who was at its end stays there. */
function following(change) {
  const atEnd = $("composer").getBoundingClientRect().top < innerHeight;
  change();
  if (atEnd) $("composer").scrollIntoView({ block: "end" });
}

function addUser(text) {
  addArticle("user", "You").append(make("p", { class: "text", text }));
}

/** The parts of an answer, made when the first text for them comes. */
class AnswerView {
  constructor() {
    this.article = addArticle("model", "Model");
    this.article.setAttribute("aria-busy", "true");
  }

  reasoning(text) {
    if (!this.thoughts) {
      this.thoughts = make("div", { class: "reasoning" });
      const details = make("details", { class: "thoughts", open: "" }, make("summary", { text: "Reasoning" }), this.thoughts);
      this.article.append(details);
    }
    following(() => this.thoughts.append(text));
  }

  content(text) {
    if (!this.text) {
      this.text = make("p", { class: "text" });
      this.article.append(this.text);
    }
    following(() => this.text.append(text));
  }

  call(call) {
    const name = make("strong", { text: call.function.name });
    const line = make("p", {}, "Call of ", name);
    this.article.append(make("div", { class: "call", role: "group", "aria-label": `Call of ${call.function.name}` }, line, make("pre", { text: pretty(call.function.arguments) })));
  }

  figures(text) {
    this.article.append(make("p", { class: "figures", text }));
  }

  fault(text) {
    this.article.append(make("p", { class: "fault", text }));
  }

  done() {
    this.article.setAttribute("aria-busy", "false");
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 1);
  } catch {
    return json;
  }
}

// ---- One answer

/** The JSON objects of a stream of server-sent events; comments are skipped. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function requestBody() {
  const system = $("system").value.trim();
  const tools = $("tools").value.trim();
  const thinking = $("thinking").checked;
  const effort = thinking ? $("effort").value : "";
  return {
    model: "page",
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    thinking: { type: thinking ? "enabled" : "disabled" },
    ...(effort ? { reasoning_effort: effort } : {}),
    ...(tools ? { tools: JSON.parse(tools) } : {}),
  };
}

/** Add a piece of an answer to the message and to the view. */
function take(delta, message, view) {
  if (delta.reasoning_content) {
    message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
    view.reasoning(delta.reasoning_content);
  }
  if (delta.content) {
    message.content += delta.content;
    view.content(delta.content);
  }
  for (const piece of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[piece.index] ??= { id: piece.id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }
}

function usageText(usage, begun, first) {
  const seconds = (performance.now() - first) / 1000;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const reasoned = usage.completion_tokens_details?.reasoning_tokens ?? 0;
  const rate = usage.completion_tokens > 1 && seconds > 0 ? `, ${Math.round((usage.completion_tokens - 1) / seconds)} tokens/s` : "";
  const prompt = `Prompt ${plural(usage.prompt_tokens, "token")}, ${cached} from the cache (${percent(cached, usage.prompt_tokens)})`;
  const answer = `answer ${plural(usage.completion_tokens, "token")}, ${reasoned} of reasoning`;
  return `${prompt}; ${answer}; first after ${((first - begun) / 1000).toFixed(2)} s${rate}.`;
}

/** Read the stream into the message; gives its usage and the time of the first piece. */
async function readAnswer(response, message, view) {
  let usage = null;
  let first = 0;
  for await (const chunk of eventsOf(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices?.[0];
    if (choice && (choice.delta.content || choice.delta.reasoning_content || choice.delta.tool_calls)) first ||= performance.now();
    if (choice) take(choice.delta, message, view);
    if (choice?.finish_reason === "length") view.fault("The answer was cut off: it reached the limit of tokens.");
    usage = chunk.usage ?? usage;
  }
  return { usage, first: first || performance.now() };
}

async function answer() {
  let body;
  try {
    body = JSON.stringify(requestBody());
  } catch (error) {
    say(`The tools are not JSON: ${error.message}`, true);
    return;
  }
  const view = new AnswerView();
  const message = { role: "assistant", content: "" };
  const begun = performance.now();
  const mine = new AbortController();
  setRunning(mine);
  say("The model is answering.");
  try {
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal: mine.signal });
    if (!response.ok) throw new Error(await faultOf(response));
    const { usage, first } = await readAnswer(response, message, view);
    for (const call of message.tool_calls ?? []) view.call(call);
    messages.push(message);
    if (usage) view.figures(usageText(usage, begun, first));
    say(usage ? `Answered with ${plural(usage.completion_tokens, "token")}.` : "Answered.");
    if (message.tool_calls) askForResults(view, message.tool_calls);
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (!view.article.isConnected) return; // another conversation has begun
    if (message.content) messages.push({ role: "assistant", content: message.content, reasoning_content: message.reasoning_content });
    else if (messages.at(-1)?.role === "user") $("message").value ||= messages.pop().content; // to be sent again
    view.fault(stopped ? "Stopped." : error.message);
    say(stopped ? "Stopped." : error.message, !stopped);
  } finally {
    view.done();
    if (mine === running) setRunning(null);
  }
}

/** A form for the results of the calls; sending it lets the model go on. */
function askForResults(view, calls) {
  const form = make("form", { class: "results" });
  const fields = calls.map((call, index) => {
    const id = `result-${messages.length}-${index}`;
    const field = make("textarea", { id, rows: "2" });
    form.append(make("label", { for: id, text: `Result of ${call.function.name}` }), field);
    return field;
  });
  form.append(make("div", { class: "row" }, make("button", { type: "submit", text: "Send results" })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.replaceWith(...fields.map((field, index) => make("pre", { text: `${calls[index].function.name}: ${field.value}` })));
    waitingCalls = null;
    messages.push(...calls.map((call, index) => ({ role: "tool", tool_call_id: call.id, content: fields[index].value })));
    $("message").focus();
    answer();
  });
  waitingCalls = form;
  view.article.append(form);
  fields[0].focus();
  say(`The model called ${plural(calls.length, "tool")} and waits for the results.`);
}

// ---- The composer

function setRunning(controller) {
  running = controller;
  const stopHadFocus = document.activeElement === $("stop");
  $("send").disabled = controller !== null;
  $("stop").disabled = controller === null;
  if (stopHadFocus && controller === null) $("message").focus();
}

function send() {
  const text = $("message").value.trim();
  if (running || !text) return;
  if (waitingCalls) {
    say("The model waits for the results of its calls: send them first.", true);
    waitingCalls.querySelector("textarea").focus();
    return;
  }
  $("message").value = "";
  messages.push({ role: "user", content: text });
  addUser(text);
  answer();
}

function clear() {
  running?.abort();
  setRunning(null);
  messages.length = 0;
  waitingCalls = null;
  $("log").replaceChildren();
  say("A new conversation.");
  $("message").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  $("message").focus();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("thinking").addEventListener("change", () => {
  $("effort").disabled = !$("thinking").checked;
});

// ---- The live figures

let before = null;

function showKinds(byKind, total) {
  const kinds = Object.entries(byKind).filter(([, size]) => size > 0);
  const largest = Math.max(...kinds.map(([, size]) => size), 1);
  const rows = kinds.map(([kind, size]) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${(100 * size) / largest}%`;
    return make("tr", {}, make("td", {}, kind, bar), make("td", { text: bytes(size) }));
  });
  const sum = make("tr", {}, make("td", { text: "all" }), make("td", { text: bytes(total || kinds.reduce((all, [, size]) => all + size, 0)) }));
  $("kinds").replaceChildren(...rows, sum);
}

function showFigures(now) {
  $("model").textContent = `${now.model}, ${now.context.toLocaleString("en")} tokens of context`;
  const passed = before ? now.seconds - before.seconds : 0;
  $("rate").textContent = passed > 0 ? ((now.completion_tokens - before.completion_tokens) / passed).toFixed(1) : "–";
  $("running").textContent = now.running;
  $("waiting").textContent = now.waiting;
  $("hits").textContent = percent(now.cached_tokens, now.prompt_tokens);
  $("drafts").textContent = percent(now.accepted_tokens, now.drafted_tokens);
  showKinds(now.bytes_by_kind, now.bytes_total);
  before = now;
}

async function poll() {
  if (document.visibilityState !== "visible") return;
  try {
    const response = await fetch("/stats", { headers: headers() });
    if (response.ok) showFigures(await response.json());
    else $("model").textContent = response.status === 401 ? "needs a key" : `answers ${response.status}`;
  } catch {
    $("model").textContent = "not reachable";
  }
}

if (matchMedia("(max-width: 48rem)").matches) $("live").open = false;
poll();
setInterval(poll, 1000);
