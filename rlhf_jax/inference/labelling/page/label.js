// Shows a pair, sends the judgement of it, and shows the next one. The server escapes all texts.
"use strict";

const KEYS = { 1: "a", 2: "b", 0: "tie", x: "bad", s: "skip", u: "undo" };
const base = location.pathname.replace(/\/+$/, "");
const at = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("button[data-choice]")];
let state = null;
let busy = true;
let seen = 0; // milliseconds that the pair was visible
let since = performance.now();

function pause() {
  const now = performance.now();
  if (!document.hidden) seen += now - since;
  since = now;
}

function say(text) {
  at("message").textContent = text;
}

function allowed(choice) {
  if (busy || !state) return false;
  return choice === "undo" ? state.undo !== null : state.pair !== null;
}

function mark() {
  for (const button of buttons) {
    button.setAttribute("aria-disabled", String(!allowed(button.dataset.choice)));
  }
}

function show(next) {
  const isOther = !state || (next.pair && next.pair.id) !== (state.pair && state.pair.id);
  state = next;
  const { own, given, needed } = state.progress;
  at("who").textContent = state.annotator;
  at("count").textContent = `yours ${own}, all ${given} of ${needed}`;
  at("bar").max = Math.max(needed, 1);
  at("bar").value = given;
  at("pair").hidden = !state.pair;
  at("reasons").hidden = !state.reasons;
  if (!state.pair) {
    say(state.waiting ? "The next pair is being sampled." : "There are no more pairs for you. Thank you.");
    if (state.waiting) setTimeout(load, 1000);
    return;
  }
  if (!isOther) return;
  say(state.pair.again ? "Once more: you have seen this pair before." : "");
  at("conversation").innerHTML = state.pair.conversation;
  at("answer-a").innerHTML = state.pair.answers[0];
  at("answer-b").innerHTML = state.pair.answers[1];
  at("reason").value = "";
  for (const radio of document.querySelectorAll("input[name=strength]")) radio.checked = false;
  window.scrollTo(0, 0);
  at("prompt-title").focus({ preventScroll: true }); // a screen reader goes on from here
  seen = 0;
  since = performance.now();
}

function failed(text) {
  say(text);
  if (!state || !state.pair) setTimeout(load, 3000); // there is no button to try again with
}

async function request(path, body) {
  busy = true;
  mark();
  try {
    const how = body && {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    };
    const response = await fetch(`${base}/${path}`, { ...how, cache: "no-store" });
    const isJson = (response.headers.get("content-type") || "").includes("json");
    const content = isJson ? await response.json() : { error: await response.text() };
    if (response.ok) show(content);
    else failed(`Not saved (${response.status}): ${content.error} Please try again.`);
    if (content.kept === false) say("Not kept: it was judged or taken back before, as in another window.");
  } catch {
    failed("Not saved: the server does not reply. Please try again.");
  }
  busy = false;
  mark();
}

function load() {
  return request("pair");
}

function choose(choice) {
  if (!allowed(choice)) return undefined;
  if (choice === "undo") return request("undo", { id: state.undo });
  pause();
  const strength = document.querySelector("input[name=strength]:checked");
  const body = { id: state.pair.id, choice, seconds: Math.round(seen / 100) / 10 };
  if (state.reasons) {
    body.strength = strength ? strength.value : null;
    body.reason = at("reason").value;
  }
  return request("judgement", body);
}

document.addEventListener("visibilitychange", () => {
  const now = performance.now();
  if (document.hidden) seen += now - since;
  since = now;
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("textarea, input:not([type=radio])");
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || isTyping) return;
  const choice = KEYS[event.key.toLowerCase()];
  if (!choice) return;
  event.preventDefault();
  choose(choice);
});
for (const button of buttons) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
load();
