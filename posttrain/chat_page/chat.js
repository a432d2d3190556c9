// The conversation, kept in this tab: it outlives a reload. All text is set as text, never as HTML.
"use strict";

const names = JSON.parse(document.body.dataset.names), byId = id => document.getElementById(id);
const log = byId("log"), box = byId("text"), form = document.querySelector(".settings");
let turns = [];  // {user, answers: [{text, why}]}
let running = null;  // the AbortController of the answer that is coming

// -- settings and memory -----------------------------------------------------------------------------------------------------------------

const KEY = `chat|${names.join("|")}`;

function remember() {
  sessionStorage.setItem(KEY, JSON.stringify({ turns, settings: Object.fromEntries(new FormData(form)) }));
}

function recall() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
    turns = kept.turns ?? [];
    for (const [name, value] of Object.entries(kept.settings ?? {})) if (form.elements[name]) form.elements[name].value = value;
  } catch { turns = []; }
}

function summarize() {
  const e = form.elements;
  byId("summary").textContent = `temperature ${e.temperature.value}, top p ${e.top_p.value}, ${e.max_new_tokens.value} tokens` + (e.system.value ? ", system prompt" : "");
}

form.addEventListener("input", () => { summarize(); remember(); });
form.addEventListener("submit", e => e.preventDefault());

// -- showing -----------------------------------------------------------------------------------------------------------------------------

function make(tag, kind, text = "") {
  const e = document.createElement(tag);
  e.className = kind;
  e.textContent = text;
  return e;
}

const WHY = { length: "Cut off at the longest answer.", stopped: "Stopped." };

function replyOf(i, answer) {
  const e = make("article", `reply n${i + 1}`);
  e.append(make("span", "role", names[i]), Object.assign(make("div", "text", answer.text), { dir: "auto" }));
  conclude(e, answer);
  return e;
}

function conclude(e, answer) {
  e.classList.remove("busy");
  e.querySelector(".note")?.remove();
  const words = answer.error ?? WHY[answer.why];
  if (words) e.append(make("p", answer.error ? "note error" : "note", words));
}

function turnOf(turn) {
  const e = make("section", "turn"), said = make("div", "said user");
  said.append(make("span", "role", "You"), Object.assign(make("div", "text", turn.user), { dir: "auto" }));
  e.append(said, ...turn.answers.map((a, i) => replyOf(i, a)));
  return e;
}

function show() {
  log.replaceChildren(...turns.map(turnOf));
  settle();
}

function settle() {
  const busy = running !== null, any = turns.length > 0;
  byId("empty").hidden = any || busy;
  byId("after").hidden = !any || busy;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("save").disabled = byId("reset").disabled = !any || busy;
  log.setAttribute("aria-busy", busy);
}

const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

// -- asking ------------------------------------------------------------------------------------------------------------------------------

function messages(i, user) {
  const out = form.elements.system.value.trim() ? [{ role: "system", content: form.elements.system.value.trim() }] : [];
  for (const t of turns) if (t.answers[i].text) out.push({ role: "user", content: t.user }, { role: "assistant", content: t.answers[i].text });
  return [...out, { role: "user", content: user }];
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function answer(i, user, e) {
  const place = e.querySelector(".text"), out = { text: "", why: "stopped" }, set = form.elements;
  const order = { version: i, messages: messages(i, user), temperature: +set.temperature.value, top_p: +set.top_p.value, max_new_tokens: +set.max_new_tokens.value };
  e.classList.add("busy");
  try {
    const response = await fetch("/answer", { method: "POST", body: new URLSearchParams({ order: JSON.stringify(order) }), signal: running.signal });
    if (!response.ok) throw new Error(await response.json().then(j => j.error, () => `The server answers ${response.status}.`));
    for await (const line of lines(response)) {
      const follow = atEnd();
      if ("error" in line) throw new Error(line.error);
      if ("text" in line) { out.text += line.text; place.append(line.text); }
      else { out.text = place.textContent = line.whole; out.why = line.why; }
      if (follow) toEnd();
    }
  } catch (fault) {
    if (fault.name !== "AbortError") out.error = fault instanceof TypeError ? "The server does not answer." : fault.message;
  }
  conclude(e, out);
  return out;
}

async function ask(user, before = null) {
  running = new AbortController();
  const turn = turnOf({ user, answers: names.map(() => ({ text: "" })) });
  log.append(turn);
  settle();
  toEnd();
  const answers = [];
  for (const [i, e] of [...turn.querySelectorAll(".reply")].entries()) answers.push(await answer(i, user, e));
  running = null;
  if (answers.some(a => a.text)) {
    turns.push({ user, answers: answers.map(({ text, why }) => ({ text, why })) });
  } else if (before) {  // stopped before a word: the earlier answers stay
    turns.push(before);
    turn.replaceWith(turnOf(before));
  } else {
    if (!answers.some(a => a.error)) turn.remove();
    if (!box.value) box.value = user;
  }
  remember();
  settle();
  grow();
  box.focus();
}

byId("composer").addEventListener("submit", e => {
  e.preventDefault();
  const user = box.value.trim();
  if (running || !user) return;
  if (!form.reportValidity()) { byId("settings").open = true; form.reportValidity(); return; }
  for (const left of [...log.children].slice(turns.length)) left.remove();  // a turn that failed
  box.value = "";
  grow();
  ask(user);
});

byId("again").addEventListener("click", () => {
  if (running || !turns.length) return;
  const before = turns.pop();
  show();
  ask(before.user, before);
});

byId("undo").addEventListener("click", () => {
  if (running || !turns.length) return;
  box.value = turns.pop().user;
  remember();
  show();
  grow();
  box.focus();
});

byId("reset").addEventListener("click", () => { turns = []; remember(); show(); box.focus(); });
byId("stop").addEventListener("click", () => running?.abort());

byId("save").addEventListener("click", () => {
  const set = form.elements;
  const rows = names.map((model, i) => ({ messages: messages(i, "").slice(0, -1), model, temperature: +set.temperature.value, top_p: +set.top_p.value }));
  const text = rows.filter(r => r.messages.some(m => m.role === "assistant")).map(r => JSON.stringify(r) + "\n").join("");
  const link = make("a", "");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
  link.download = "chat.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

document.addEventListener("keydown", e => {
  if (e.key === "Escape" && running) { e.preventDefault(); running.abort(); }
  if (e.key === "Enter" && e.target === box && !e.shiftKey && !e.isComposing) { e.preventDefault(); byId("composer").requestSubmit(); }
});

function grow() {
  box.style.height = "auto";  // set by script, which the policy allows; style attributes in the page it does not
  box.style.height = `${box.scrollHeight + 2}px`;
}

box.addEventListener("input", grow);
recall();
summarize();
show();
if (turns.length) toEnd();
