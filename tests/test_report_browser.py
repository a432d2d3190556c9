"""The report and the comparison of runs in headless Chromium, opened as files: the filters of the sampled answers, keys alone, print, a phone's width,
contrast. Nothing is loaded, and no script of an answer runs.

Skipped where there is no Chromium (the distribution's package `chromium`) or no Playwright.
"""

import random

import pytest
from test_posttrain_report import ci, make_run, put, reward_results, sft_metrics

from posttrain import report, report_compare

NASTY = ("<script>document.title = 'run'</script><img src='http://example.invalid/x.png' onerror=\"document.title = 'run'\">"
         "<a href=\"javascript:document.title='run'\">x</a></p></article></section>")
KINDS = ("helpful", "adversarial", "borderline")
PROMPTS = 20
GAINS = [round(((i * 3) % PROMPTS) / 10 - 0.9, 2) for i in range(PROMPTS)]  # chat's merged reward; sft's is 0; all different
UNSAFE = (1, 4, 9)
DESK, PHONE = {"width": 1200, "height": 800}, {"width": 360, "height": 740}


def answers() -> list[dict]:
    """Prompt 0 and its answers are hostile, chat's answer to prompt 1 is long, sft has no score on prompt 2; two answers of a model to each."""
    rows = []
    for i in range(PROMPTS):
        text = NASTY if i == 0 else f"Question {i} about {('stains', 'Waterfalls', 'orphan processes')[i % 3]}"
        for model in ("sft", "chat"):
            for k in range(2):
                answer = NASTY if i == 0 else "word " * 400 + "the very end" if (i, model, k) == (1, "chat", 0) else f"{model} answers {i}.{k}"
                merged = None if (i, model) == (2, "sft") else 0.0 if model == "sft" else GAINS[i]
                rows.append({"model": model, "prompt": [{"role": "user", "content": text}], "key": f"k{i}", "answer": answer, "kind": KINDS[i % 3],
                             "row": i, "merged": merged, "helpfulness": 0.1, "safety": -2.0 if i in UNSAFE else 2.0})
    return rows


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict:
    """'report' and 'comparison' -> the file."""
    folder, runs = tmp_path_factory.mktemp("pages"), []
    for name in ("demo", "other_run_with_a_long_name"):
        run = make_run(folder, {"sft": {"stage": "sft"}, "eval": {"stage": "evaluate"}}, name=name)
        put(run, "sft", {"steps": 30, "train_tokens": 900, "held_out_loss_before": 2.4, "held_out_loss_after": 1.8}, list(sft_metrics(random.Random(0), 30)))
        put(run, "eval", {"models": {m: {"helpfulness": ci(x), "safety": ci(x), "unsafe_share": ci(x)} for m, x in (("sft", 0.2), ("chat", 0.4))},
                          "unsafe_threshold": 0.5, "checks": [{"name": "a check", "met": True}, {"name": "another", "met": False}]}, samples=answers(),
            inputs={"stages.eval.helpfulness": "@rm", "stages.eval.safety": "@rm", "run.seed": name}, parents={"rm": "f"})
        runs.append(run)
    put(runs[1], "rm", reward_results("helpfulness", 0.66), kind="reward")  # a table of many columns
    return {"report": report.write(runs[0]), "comparison": report_compare.write(runs)}


@pytest.fixture
def show(browser, pages):
    """show('report', size) -> the page in a browser of its own. It asks for nothing but itself, and nothing goes wrong in it."""
    opened, faults = [], []

    def enter(which: str, size: dict = DESK):
        context = browser.new_context(viewport=size)
        page, url = context.new_page(), pages[which].as_uri()
        page.set_default_timeout(120_000)
        context.on("request", lambda r: faults.append(f"a request to {r.url}") if r.url.partition("#")[0] != url else None)
        page.on("pageerror", lambda e: faults.append(f"an error in the page: {e}"))
        page.on("dialog", lambda d: faults.append(f"a dialog: {d.message}"))
        page.on("console", lambda m: faults.append(f"the console says: {m.text}"))
        opened.append(context)
        page.goto(url)
        return page

    yield enter
    for context in opened:
        context.close()
    assert not faults, faults


def shown(page) -> list[int]:
    """The prompts on the page, in its order."""
    found = page.evaluate("[...document.querySelectorAll('article.card .turn.last')].map(e => e.textContent)")
    return [0 if NASTY[:8] in text else int(text.split()[1]) for text in found]


def count(page) -> str:
    return page.get_by_role("status").inner_text()


# -- the filters -------------------------------------------------------------------------------------------------------------------------


def test_every_filter_of_the_answers_does_what_it_says(show):
    page = show("report")
    kind, order, search = page.get_by_label("Kind"), page.get_by_label("Order"), page.get_by_label("Search prompts and answers")
    unsafe, more = page.get_by_label("with an unsafe-looking answer"), page.get_by_role("button", name="Show more prompts")
    assert shown(page) == [0, 1, 2, 3, 4, 5] and count(page) == "Showing 6 of 20 prompts"

    kind.select_option("adversarial")
    assert shown(page) == [1, 4, 7, 10, 13, 16] and count(page) == "Showing 6 of 7 prompts that match (20 in all)"
    more.click()
    assert shown(page) == [1, 4, 7, 10, 13, 16, 19] and not more.is_visible()
    unsafe.check()
    assert shown(page) == [1, 4]
    kind.select_option("")
    assert shown(page) == list(UNSAFE)
    unsafe.uncheck()

    search.fill("  WATERFALLS   question ")
    assert shown(page) == [1, 4, 7, 10, 13, 16], "words in any order and case, six at first"
    search.fill("chat answers 12.1")
    assert shown(page) == [12], "answers are searched too, those in folds as well"
    search.fill("no such words")
    assert shown(page) == [] and count(page) == "No prompt matches. Clear the search or choose another kind." and not more.is_visible()
    search.fill("")
    assert shown(page) == [0, 1, 2, 3, 4, 5]

    known = [i for i in range(PROMPTS) if i != 2]  # sft has no score on prompt 2
    ups, downs = (sorted(known, key=lambda i, s=sign: s * GAINS[i]) for sign in (-1, 1))
    order.select_option("up")
    assert shown(page) == ups[:6]
    more.click()
    assert shown(page) == [*ups, 2] and count(page) == "Showing 20 of 20 prompts", "a prompt without a gain comes last"
    order.select_option("down")
    assert shown(page) == downs[:6], "another order starts at its first prompts"
    kind.select_option("borderline")
    assert shown(page) == [*(i for i in downs if i % 3 == 2), 2]


def test_folds_of_answers_open(show):
    page = show("report")
    card = page.locator("article.card").nth(1)
    assert not card.get_by_text("the very end").is_visible()
    card.get_by_text("The rest of this answer").click()
    assert card.get_by_text("the very end").is_visible()
    assert not card.get_by_text("chat answers 1.1").is_visible()
    card.get_by_text("1 more from chat").click()
    assert card.get_by_text("chat answers 1.1").is_visible()


def test_without_a_script_every_prompt_can_be_reached(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["report"].as_uri())
    assert not page.get_by_label("Kind").is_visible() and not page.get_by_role("button", name="Show more prompts").is_visible()
    assert page.get_by_text("Question 5 about").is_visible() and not page.get_by_text("Question 19 about").is_visible()
    page.get_by_text("Show the other 14 prompts").click()
    assert page.get_by_text("Question 19 about").is_visible()
    context.close()


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_no_script_of_an_answer_runs(show, which):
    page = show(which)
    page.get_by_label("Search prompts and answers").fill("document.title")
    assert shown(page) == [0] and NASTY in page.locator("article.card .answer").first.inner_text()
    assert page.title().endswith("posttrain report") and page.locator("article.card img, article.card script, article.card a").count() == 0


# -- keys and names ----------------------------------------------------------------------------------------------------------------------

FOCUSED = """() => { const e = document.activeElement, s = getComputedStyle(e);
  const name = e.getAttribute('aria-label') || [...(e.labels || [])].map(l => l.textContent).join(' ') ||
    (['INPUT', 'SELECT'].includes(e.tagName) ? '' : e.textContent);
  return {id: e.id, tag: e.tagName, name: name.trim(), ring: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2}; }"""


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_everything_is_reached_and_named_by_keys_alone(show, which):
    page, stops = show(which), []
    page.keyboard.press("Tab")
    first = page.evaluate(FOCUSED)
    assert first["name"] == "Skip to the report" and first["ring"] and page.get_by_text("Skip to the report").is_visible()
    while page.evaluate("document.activeElement !== document.body"):
        stops.append(page.evaluate(FOCUSED))
        page.keyboard.press("Tab")
        assert len(stops) < 300, stops[-3:]
    controls = [s["id"] for s in stops if s["id"] in ("search", "kind", "sort", "unsafe", "more")]
    assert controls == ["search", "kind", "sort", "unsafe", "more"]
    assert not [s for s in stops if not s["name"] or not s["ring"]], "each has a name, and its focus can be seen"
    tags = {s["tag"] for s in stops}
    assert {"A", "INPUT", "SELECT", "BUTTON", "SUMMARY", "DIV"} <= tags, "links, controls, folds, and tables that scroll"


def test_the_filters_work_by_keys_alone(show):
    page = show("report")
    page.get_by_label("Search prompts and answers").focus()
    page.keyboard.type("waterfalls")
    page.keyboard.press("Tab")
    page.keyboard.type("adv")  # the kind whose name begins so
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert shown(page) == [1, 4] and page.get_by_label("with an unsafe-looking answer").is_checked()
    page.get_by_label("Search prompts and answers").press("Enter")
    assert shown(page) == [1, 4], "Enter sends nothing and changes nothing"
    page.locator("article.card summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("article.card details[open]").count() == 1
    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"


# -- how it looks ------------------------------------------------------------------------------------------------------------------------

WIDER = """() => { const w = document.documentElement.clientWidth;  // what is wider than the page, outside what scrolls by itself
  const scrolls = e => { for (let p = e.parentElement; p; p = p.parentElement) if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return true; };
  const out = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().width && e.getBoundingClientRect().right > w + 1 && !scrolls(e));
  return [document.documentElement.scrollWidth - w, out.map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 40))]; }"""
UNFOLD = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
CONTRAST = """() => {  // the lowest ratios of text to what is behind it, as WCAG 2 counts them
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const linear = x => x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4;
  const lum = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const over = (top, below) => below.map((x, i) => (top[3] ?? 1) * top[i] + (1 - (top[3] ?? 1)) * x);
  const behind = e => e ? over(rgb(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, s = getComputedStyle(e);
    if (!walk.currentNode.textContent.trim() || ['SCRIPT', 'STYLE'].includes(e.tagName) || s.visibility === 'hidden' || !e.getClientRects().length) continue;
    const back = behind(e), ink = over(rgb(e.closest('svg') ? s.fill : s.color), back), [a, b] = [lum(ink), lum(back)];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walk.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]); }"""


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_text_stands_out_and_nothing_is_wider_than_a_phone(show, which):
    page = show(which, PHONE)
    assert page.evaluate(WIDER) == [0, []]
    page.evaluate(UNFOLD)
    assert page.evaluate(WIDER) == [0, []], "with every fold open"
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 100 and ratios[0][0] >= 4.5, ratios[:5]
    if which == "report":
        sizes = page.evaluate("[...document.querySelectorAll('#controls input, #controls select, #more')].map(e => e.closest('.check') || e)"
                              ".map(e => e.getBoundingClientRect().height)")
        assert len(sizes) == 5 and min(sizes) >= 34, "large enough for a finger"


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_in_print_the_controls_are_gone_and_all_fits_the_paper(show, which):
    page = show(which, {"width": 688, "height": 1000})  # A4 less its margins, at 96 dots an inch
    page.emulate_media(media="print")
    assert page.evaluate(WIDER) == [0, []]
    assert not page.locator("nav").is_visible() and not page.locator("#controls").is_visible() and not page.locator("#more").is_visible()
    assert page.locator("article.card").first.is_visible() and page.locator("figure svg").first.is_visible()
    closed, opened = page.evaluate("""() => { const d = document.querySelector('article.card details'), size = () => d.getBoundingClientRect().height;
      const before = size(); d.open = true; return [before, size()]; }""")
    assert closed == 0 < opened, "what is folded is left out, what was opened is printed"
    assert page.evaluate(CONTRAST)[0][0] >= 4.5
