// Keys, drafts that outlive a reload, and clicks that are sent again until the server has stored them. The page works without this file.
"use strict";

const pause = ms => new Promise(done => setTimeout(done, ms));
const all = () => document.getElementById("all");
const trouble = document.getElementById("trouble");
let busy = false;

// -- drafts: what is being written is kept in this browser until the server has it ---------------------------------------------------

const slot = area => ["draft", all().dataset.me, all().dataset.task, area.form.elements.turn.value, area.dataset.draft].join("|");

function settle() {
  for (const area of document.querySelectorAll("textarea[data-draft]")) {
    const draft = localStorage.getItem(slot(area));
    if (draft !== null && draft !== area.value) {
      area.value = draft;
      area.closest("details")?.setAttribute("open", "");
    }
  }
  const guidelines = document.getElementById("guidelines"), wanted = sessionStorage.getItem("guidelines");
  if (guidelines && wanted) guidelines.open = wanted === "open";
}

document.addEventListener("input", e => {
  if (e.target.matches("textarea[data-draft]")) localStorage.setItem(slot(e.target), e.target.value);
});

document.addEventListener("click", e => {
  if (e.target.closest("#guidelines > summary")) {
    sessionStorage.setItem("guidelines", document.getElementById("guidelines").open ? "closed" : "open");
  }
});

// -- sending ---------------------------------------------------------------------------------------------------------------------------

function swap(html) {
  const next = new DOMParser().parseFromString(html, "text/html"), before = all().dataset.task;
  const came = next.getElementById("all");
  if (!came) return false;
  all().replaceWith(document.adoptNode(came));
  document.title = next.title;
  settle();
  if (all().dataset.task !== before) {
    scrollTo(0, 0);
    document.querySelector("textarea[autofocus]")?.focus();
  } else {
    document.querySelector(".question.current, .after, .waiting, .write")?.scrollIntoView({ block: "nearest" });
  }
  return true;
}

function tell(words) {
  trouble.textContent = words;
  trouble.hidden = !words;
}

async function send(form, button) {
  if (busy) return;
  busy = true;
  const body = new URLSearchParams(new FormData(form));
  if (button?.name) body.set(button.name, button.value);
  const sent = [...form.querySelectorAll("textarea[data-draft]")].map(slot);
  const note = document.querySelector(".saved");
  if (note) { note.textContent = "Saving…"; note.classList.add("pending"); }
  for (const b of document.querySelectorAll("main button")) b.disabled = true;
  for (let wait = 500; ; wait = Math.min(wait * 2, 5000)) {
    try {
      const got = await fetch(location.href, { method: "POST", body, headers: { "X-Swap": "1" }, redirect: "follow" });
      if (got.status >= 500) throw new Error(got.status);
      if (new URL(got.url).pathname !== location.pathname) { location.href = got.url; return; }
      const html = await got.text();
      if (got.ok) for (const key of sent) localStorage.removeItem(key);
      tell("");
      busy = false;
      if (!swap(html)) { tell(html.slice(0, 200)); for (const b of document.querySelectorAll("main button")) b.disabled = false; }
      watch();
      return;
    } catch {
      tell("Not saved yet: the server does not answer. Trying again; leave this page open.");
      await pause(wait);
    }
  }
}

document.addEventListener("submit", e => {
  if (!all().dataset.stage || e.target.getAttribute("action")) return;
  e.preventDefault();
  send(e.target, e.submitter);
});

// -- waiting for a model's answers -----------------------------------------------------------------------------------------------------

let watching = false;
async function watch() {
  if (watching) return;
  watching = true;
  while (all().dataset.stage === "wait") {
    await pause(1000);
    if (busy || all().dataset.stage !== "wait") continue;
    try {
      const got = await fetch(location.href);
      if (new URL(got.url).pathname !== location.pathname) { location.href = got.url; break; }
      const html = await got.text(), version = new DOMParser().parseFromString(html, "text/html").getElementById("all")?.dataset.version;
      tell("");
      if (!busy && version !== all().dataset.version) swap(html);
    } catch {
      tell("The server does not answer. Trying again.");
    }
  }
  watching = false;
}

// -- keys ------------------------------------------------------------------------------------------------------------------------------

const press = button => button && !button.disabled && button.click();

function toggle(details) {
  details.open = !details.open;
  if (!details.open) return;
  const area = details.querySelector("textarea");
  if (area) { area.focus(); area.setSelectionRange(area.value.length, area.value.length); }
  details.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", e => {
  if (!all().dataset.stage || e.altKey || e.metaKey) return;
  const at = document.activeElement, writing = at.matches("textarea, input");
  if (e.key === "Escape") {
    if (writing) at.blur();
    document.getElementById("skip")?.removeAttribute("open");
    return;
  }
  if (writing) {
    if (e.key === "Enter" && e.ctrlKey) { e.preventDefault(); at.form.requestSubmit(at.form.querySelector("button[name=do]")); }
    return;
  }
  if (e.ctrlKey || e.repeat) return;
  const key = e.key.toLowerCase();
  if (/^[1-9]$/.test(key)) {
    const scope = document.querySelector("#skip[open]") ?? document.querySelector(".question.current");
    press(scope?.querySelector(`[data-key="${key}"]`));
  } else if (key === "enter" && !at.matches("button, a, summary")) {
    e.preventDefault();
    press(document.querySelector("[data-enter]"));
  } else if (key === "g") {
    document.querySelector("#guidelines > summary")?.click();
  } else {
    const target = document.querySelector(`[data-press="${key}"]`);
    if (!target) return;
    e.preventDefault();
    target.matches("details") ? toggle(target) : press(target);
  }
});

settle();
watch();
