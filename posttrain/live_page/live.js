(function () {
  "use strict";
  var PIECES = ["header.top", "body > nav", "footer"];
  var LANDMARKS = "h2, h3, figure, .table, summary, article.card, .checks li, .flow li", STATES = { running: "Running", done: "All done", stopped: "Stopped", waiting: "Not begun" };
  var bar = document.getElementById("live"), title = document.title, mine = bar.dataset.page, busy = false;
  var sources = {}, script = document.querySelector("body > script:not([src])").textContent, known = false;
  var all = function (root, what) { return Array.prototype.slice.call(root.querySelectorAll(what)); };
  var label = function (el) { return (el.querySelector("caption, .kicker, .turn.last, .name") || el).textContent.replace(/\d+/g, "").trim().slice(0, 80); };

  function say(now) {
    bar.dataset.state = now.state;
    text("live-state", STATES[now.state] || now.words.shift());
    text("live-section", now.section || "");
    var share = document.getElementById("live-share"), words = document.getElementById("live-words");
    share.hidden = now.share === null || now.share === undefined;
    if (!share.hidden) share.value = now.share;
    if (words.textContent !== now.words.join("")) words.replaceChildren.apply(words, now.words.map(function (w) {
      var item = document.createElement("li");
      item.textContent = w;
      return item;
    }));
    document.title = (now.state === "running" && !share.hidden ? Math.floor(100 * now.share) + " % " + now.section + " · " : "") + title;
    document.documentElement.style.setProperty("--live", bar.offsetHeight + "px");
  }
  function text(id, value) {  // only where it changed: a screen reader says it again
    var el = document.getElementById(id);
    if (el.textContent !== value) el.textContent = value;
  }

  // what the reader looks at: the first landmark below the bars, and how far below the window's top
  function place() {
    var top = document.querySelector("body > nav").getBoundingClientRect().bottom;
    if (window.scrollY < 5) return null;
    var seen = all(document, LANDMARKS).filter(function (el) { return el.getClientRects().length && el.getBoundingClientRect().bottom > top; })[0];
    if (!seen) return null;
    var home = seen.closest("main > section"), name = label(seen);
    var same = home ? all(home, LANDMARKS).filter(function (el) { return label(el) === name; }) : [];
    return { home: home && home.id, name: name, nth: same.indexOf(seen), at: seen.getBoundingClientRect().top, el: seen };
  }
  function back(was) {
    if (!was) return;
    var el = was.el.isConnected ? was.el : null, home = was.home && document.getElementById(was.home);
    if (!el && home) el = all(home, LANDMARKS).filter(function (x) { return label(x) === was.name; })[was.nth] || home;
    if (el) window.scrollBy({ top: el.getBoundingClientRect().top - was.at, behavior: "instant" });
  }

  // what the reader did in a part: opened, scrolled, typed, focused
  function keys(root) {
    var count = {};
    return all(root, "details > summary").map(function (s) {
      var name = s.textContent.replace(/\d+/g, "").trim();
      count[name] = (count[name] || 0) + 1;
      return [name + "#" + count[name], s.parentNode];
    });
  }
  var SCROLLED = ".table, pre, .plot, ul", FOCUSED = "a, button, input, select, summary, [tabindex]", FIELDS = "input[id], select[id]";
  function keep(root) {
    var active = root.contains(document.activeElement) ? document.activeElement : null;
    return {
      open: keys(root).filter(function (k) { return k[1].open; }).map(function (k) { return k[0]; }),
      scrolled: all(root, SCROLLED).map(function (el) { return [el.scrollLeft, el.scrollTop]; }),
      fields: all(root, FIELDS).map(function (el) { return [el.id, el.type === "checkbox" ? el.checked : el.value]; }),
      cards: all(root, "#cards > article").length,
      focus: active && { id: active.id, nth: all(root, FOCUSED).indexOf(active), from: active.selectionStart, to: active.selectionEnd }
    };
  }
  function restore(root, was) {
    was.fields.forEach(function (f) {
      var el = root.querySelector("#" + f[0]);
      if (!el) return;
      if (el.type === "checkbox") el.checked = f[1]; else el.value = f[1];
      if (el.tagName === "SELECT" && el.selectedIndex < 0) el.selectedIndex = 0;
      el.dispatchEvent(new Event("input", { bubbles: true }));
    });
    var more = root.querySelector("#more");
    while (more && !more.hidden && all(root, "#cards > article").length < was.cards) more.click();
    keys(root).forEach(function (k) { if (was.open.indexOf(k[0]) >= 0) k[1].open = true; });
    all(root, SCROLLED).forEach(function (el, i) { if (was.scrolled[i]) { el.scrollLeft = was.scrolled[i][0]; el.scrollTop = was.scrolled[i][1]; } });
    if (was.focus) {
      var el = was.focus.id ? root.querySelector("#" + was.focus.id) : all(root, FOCUSED)[was.focus.nth];
      if (el) el.focus({ preventScroll: true });
      if (el && typeof was.focus.from === "number") el.setSelectionRange(was.focus.from, was.focus.to);
    }
  }
  function chosen(el) {  // the reader marks text in it, to copy it
    var s = window.getSelection();
    return !s.isCollapsed && (el.contains(s.anchorNode) || el.contains(s.focusNode));
  }

  // puts el in the place of old where its source changed. Returns whether old has to stay for now
  function swap(key, old, el) {
    var source = el.outerHTML;
    if (sources[key] === source) return false;
    if (old && chosen(old)) return true;
    sources[key] = source;
    if (!old) return false;
    var was = keep(old);
    old.replaceWith(el);
    if (el.querySelector("#cards")) again();
    restore(el, was);
    return false;
  }
  function again() {  // the report's own script, for the answers that are new; the policy knows it by its hash
    var run = document.createElement("script");
    run.textContent = script;
    document.body.append(run);
    run.remove();
  }
  function bring(page) {
    if (page.querySelector("body > script:not([src])").textContent !== script) return location.reload();  // of another version of the program
    var number = page.getElementById("live").dataset.page;
    if (!known && number === mine) {  // what is shown, before the report's script moved things
      PIECES.forEach(function (p) { sources[p] = page.querySelector(p).outerHTML; });
      all(page, "main > section").forEach(function (part) { sources[part.id] = part.outerHTML; });
      known = true;
      return;
    }
    known = true;
    var was = place(), stays = false, main = document.querySelector("main"), at = null;
    PIECES.forEach(function (p) { stays = swap(p, document.querySelector(p), page.querySelector(p)) || stays; });
    var parts = all(page, "main > section"), ids = parts.map(function (p) { return p.id; });
    all(main, ":scope > section").forEach(function (old) { if (ids.indexOf(old.id) < 0) { old.remove(); delete sources[old.id]; } });
    parts.forEach(function (part) {
      var old = document.getElementById(part.id);
      stays = swap(part.id, old, part) || stays;
      if (!old) {
        if (at) at.after(part); else main.prepend(part);
        if (part.querySelector("#cards")) again();
      }
      at = document.getElementById(part.id);
    });
    back(was);
    mine = stays ? "" : number;  // else the next look brings the rest
  }

  function look() {
    if (busy || document.hidden) return;
    busy = true;
    fetch("/now").then(function (r) {
      if (r.status === 403) return location.reload();
      return r.json().then(function (now) {
        say(now);
        if (known && now.page === mine && !now.due) return;
        return fetch("/").then(function (r) { if (!r.ok) throw r; return r.text(); }).then(function (html) { bring(new DOMParser().parseFromString(html, "text/html")); });
      });
    }).catch(function () {
      say({ state: "lost", section: "", share: null, words: ["No answer", "the program that serves this page has ended or can't be reached; this is what it last showed"] });
    }).then(function () { busy = false; });
  }
  document.addEventListener("visibilitychange", look);
  window.addEventListener("resize", function () { document.documentElement.style.setProperty("--live", bar.offsetHeight + "px"); });
  setInterval(look, 1000 * bar.dataset.every);
  look();
})();
