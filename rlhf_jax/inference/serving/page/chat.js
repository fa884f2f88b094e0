// A conversation with a policy, or with two side by side. Nothing of a text is read as HTML.
"use strict";

const at = (id) => document.getElementById(id);
const NO_TOKEN = "The address of this page must end with #token=... and the server's token.";
const selects = [...document.querySelectorAll("select")];
let served = { data: [], judgements: null };
let before = []; // the messages of the turns before the last one
let turn = null; // the last: its text, the messages that were sent, the answers, the chosen one
let coming = null; // while answers come: what stops them

const modelsOf = (kind) => served.data.filter((model) => model.kind === kind);

// Control characters, and those that turn the direction of text, become their numbers.
function visible(text) {
  const unseen = /[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;
  const number = (one) => one.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
  return text.replaceAll("\r\n", "\n").replace(unseen, (one) => `⟨U+${number(one)}⟩`);
}

function warn(text) {
  if (!at("alert").textContent.includes(text)) at("alert").append(visible(text), "\n");
}

// Changes the page. Its end stays in view unless the reader has scrolled up.
function grow(change) {
  const page = document.documentElement;
  const isAtEnd = scrollY + innerHeight > page.scrollHeight - 40;
  change();
  if (isAtEnd) scrollTo(0, page.scrollHeight);
}

async function request(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const [, given] = location.hash.split("#token=");
  if (given) history.replaceState(given, "", location.pathname); // browsers keep addresses
  if (history.state) headers.Authorization = `Bearer ${history.state}`;
  const how = body && { method: "POST", body: JSON.stringify(body) };
  const response = await fetch(path, { ...how, headers, signal }).catch(() => null);
  if (!response) throw new Error("The server does not reply.");
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const fault = response.status === 401 ? NO_TOKEN : said?.error?.message;
  throw new Error(fault ?? `The server refuses this (${response.status}).`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    const filled = lines.filter((line) => line.startsWith("data: {")); // the last is data: [DONE]
    yield* filled.map((line) => JSON.parse(line.slice(6)));
  }
}

async function load() {
  at("alert").textContent = "";
  try {
    served = await (await request("v1/models")).json();
    if (!modelsOf("policy").length) warn("No policy is served here that could answer.");
  } catch (error) {
    warn(error.message);
  }
  const policies = modelsOf("policy");
  document.body.classList.toggle("two", policies.length > 1);
  selects.forEach((select, number) => {
    const name = ({ id, temperature }) => `${visible(id)}, temperature ${temperature}`;
    select.replaceChildren(...policies.map((model) => new Option(name(model), model.id)));
    select.selectedIndex = Math.min(number, policies.length - 1);
  });
  mark();
}

function note(side, text) {
  grow(() => side.column.querySelector("p").append(visible(text), "\n"));
}

// Streams an answer into its column, and adds its scores.
async function answer(side, body) {
  const { signal } = coming;
  const [text, prompt] = side.column.querySelectorAll(".text");
  try {
    const asked = { ...body, model: side.model, stream: true, return_token_ids: true };
    for await (const event of events(await request("v1/chat/completions", asked, signal))) {
      if (event.error) throw new Error(event.error.message);
      if (event.prompt_text) prompt.textContent = visible(event.prompt_text);
      const choice = event.choices[0];
      side.text += choice?.delta.content ?? "";
      side.finish = choice?.finish_reason ?? side.finish;
      grow(() => (text.textContent = visible(side.text)));
    }
    if (!side.finish) throw new Error("The answer broke off.");
    if (side.finish === "length") note(side, "cut at its longest");
  } catch (error) {
    note(side, signal.aborted ? "stopped" : "failed");
    if (!signal.aborted) warn(error.message);
  }
  side.column.ariaBusy = "false";
  if (side.finish) score(side, [...body.messages, { role: "assistant", content: side.text }]);
}

async function score(side, messages) {
  for (const { id } of modelsOf("reward")) {
    try {
      const reply = await (await request("score", { model: id, messages })).json();
      note(side, `${id} ${reply.score.toFixed(3)}`);
    } catch (error) {
      warn(error.message);
    }
  }
}

// Asks for answers to the last turn, in place of those that it has.
async function ask() {
  const system = at("system").value.trim() ? [{ role: "system", content: at("system").value }] : [];
  const messages = [...system, ...before, { role: "user", content: turn.text }];
  const body = { messages, seed: at("seed").valueAsNumber };
  if (at("temperature").value) body.temperature = at("temperature").valueAsNumber;
  const isPair = modelsOf("policy").length > 1;
  const sides = selects.slice(0, isPair ? 2 : 1).map((select, number) => {
    const column = at("answer").content.cloneNode(true).firstElementChild;
    const letter = isPair ? `${"AB"[number]}: ` : "";
    column.querySelector("h3").textContent = letter + visible(select.value);
    return { model: select.value, column, text: "", finish: null };
  });
  turn = { text: turn.text, article: turn.article, messages, sides };
  turn.article.querySelector(".answers").replaceChildren(...sides.map((side) => side.column));
  scrollTo(0, document.documentElement.scrollHeight);
  at("alert").textContent = "";
  coming = new AbortController();
  mark();
  await Promise.all(sides.map((side) => answer(side, body)));
  coming = null;
  turn.since = performance.now();
  turn.chosen = sides.indexOf(sides.find((side) => side.finish) ?? sides.find((side) => side.text));
  if (turn.chosen < 0) { // nothing was answered: it can be changed and sent again
    at("line").value = [turn.text, at("line").value].filter(Boolean).join("\n");
    turn.article.remove();
    turn = null;
  }
  grow(mark);
}

// Shows what can be done now.
function mark() {
  const isBusy = coming !== null;
  const can = { send: !isBusy, stop: isBusy, again: !isBusy && turn, new: !isBusy };
  for (const [id, may] of Object.entries(can)) at(id).ariaDisabled = String(!may);
  at("turns").ariaBusy = String(isBusy);
  const isPair = !isBusy && turn?.sides.length === 2;
  const isWhole = isPair && turn.sides.every((side) => side.finish);
  const isOpen = isWhole && served.judgements && !turn.isJudged;
  at("judgement").hidden = !isOpen;
  const other = isOpen ? ", or with B if you choose it" : "";
  const goesOn = `The conversation goes on with ${"AB"[turn?.chosen]}${other}.`;
  const kept = turn?.isJudged ? `Kept in ${served.judgements}. ` : "";
  at("status").textContent = isPair ? kept + goesOn : "";
}

function send(event) {
  event.preventDefault();
  const text = at("line").value;
  if (coming || !text.trim()) return;
  if (!selects[0].value) return load();
  if (turn) {
    const chosen = turn.sides[turn.chosen];
    before.push({ role: "user", content: turn.text }, { role: "assistant", content: chosen.text });
    turn.article.querySelector(".answers").replaceChildren(chosen.column);
  }
  turn = { text, article: at("turn").content.cloneNode(true).firstElementChild };
  turn.article.querySelector(".text").textContent = visible(text);
  at("turns").append(turn.article);
  at("line").value = "";
  ask();
}

async function judge(choice) {
  const judged = turn;
  const answers = judged.sides.map((side) => side.text);
  const seconds = Math.round((performance.now() - judged.since) / 100) / 10;
  judged.chosen = choice === "b" ? 1 : 0;
  at("alert").textContent = "";
  at("judgement").hidden = true; // a second click is none
  at("line").focus();
  try {
    await request("judgement", { messages: judged.messages, answers, choice, seconds });
    judged.isJudged = true;
  } catch (error) {
    warn(`Not kept: ${error.message}`);
  }
  mark();
}

at("ask").addEventListener("submit", send);
at("line").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && coming?.abort());
at("stop").addEventListener("click", () => coming?.abort());
at("again").addEventListener("click", () => {
  if (coming || !turn || !at("ask").reportValidity()) return;
  at("seed").value = at("seed").valueAsNumber + 1;
  ask();
});
at("new").addEventListener("click", () => {
  if (coming) return;
  before = [];
  turn = null;
  for (const id of ["turns", "alert"]) at(id).replaceChildren();
  at("line").focus();
  mark();
});
at("judgement").addEventListener("click", ({ target }) => target.value && judge(target.value));
addEventListener("hashchange", load);
load();
