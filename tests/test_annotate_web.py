"""The page over HTTP, without a browser: signing in, a whole task, what is never shown, what is refused."""

import asyncio
import base64
import re
import time

import pytest

pytest.importorskip("starlette", reason="the extra [ui] is not installed: run `make install`")

from annotate_support import Person, buttons, filled, hidden, notice, quick_folder, reply, rows, slots_of, stored
from starlette.testclient import TestClient

from posttrain.annotate import site, tasks
from posttrain.annotate.command import label
from posttrain.annotate.kinds import KINDS
from posttrain.annotate.store import Store
from posttrain.annotate.web import build
from posttrain.errors import PosttrainError

HERE = "http://127.0.0.1"
NASTY = '</div><script>alert(1)</script><img src=x onerror="alert(2)">&amp; {{ 7 * 7 }} [a](javascript:alert(3))'
folder = pytest.fixture(quick_folder)


def client(store: Store, name: str | None = "Ann", password: str | None = None, base: str = HERE, **more) -> TestClient:
    c = TestClient(build(store, password, **more), base_url=base)
    if name:
        assert c.post("/sign-in", data={"name": name, "password": password or ""}).status_code == 200
    return c


def click(c: TestClient, do: str, page: str | None = None, queue: int = 1, swap: bool = True, **fields):
    page = page if page is not None else c.get(f"/q/{queue}").text
    return c.post(f"/q/{queue}", data=hidden(page) | {"do": do} | fields, headers={"X-Swap": "1"} if swap else {})


def test_a_whole_safety_task(folder):
    c = client(filled(folder, rows(2, safety=True)))
    page = c.get("/").text
    assert "Guidelines: safety" in page and 'data-stage="ask"' in page and "0 of 2 done" in page
    assert [b for b in buttons(page) if b.startswith("answer")] == [f"answer choice {n}" for n in range(1, 9)]
    page = click(c, "answer choice 7", page).text
    assert re.search(r"\d\d:\d\d:\d\d: saved, B is better\.", page) and "Only B is safe" in page and "Answer B, your choice, is safe" in page
    page = click(c, "answer bin 1", page).text
    assert 'data-stage="review"' in page and "finish" in buttons(page) and "message" not in buttons(page)
    page = click(c, "ideal", page, text="Call a locksmith.").text
    assert "Call a locksmith.</textarea>" in page
    page = click(c, "finish", page).text
    assert "saved, the task is finished." in page and "1 of 2 done, 1 by you" in page and "Question 1?" in page


def test_without_a_script_a_click_leads_back_to_the_page(folder):
    c = client(filled(folder, rows(1)))
    done = click(c, "answer choice 2", swap=False)
    assert [r.status_code for r in done.history] == [303] and 'aria-pressed="true"' in done.text


def test_the_page_never_says_who_wrote_an_answer(folder):
    store = filled(folder, rows(3, then={"message": "And?", "answer_a": "Later.", "answer_b": "Never.", "model_a": "v4 at 1",
                                         "model_b": "v3 at 0.8"}))
    c = client(store)
    seen = [c.get("/q/1").text, click(c, "answer choice 1").text, click(c, "go on").text, c.get("/progress").text, c.get("/").text]
    assert "And?" in seen[2] and not any("v4" in page or "v3" in page for page in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_text_cannot_become_markup(folder, kind):
    row = {"prompt": [{"role": "system", "content": NASTY}, {"role": "user", "content": NASTY}]}
    row |= {"answer_a": NASTY, "answer_b": "b" + NASTY} if KINDS[kind].answers == 2 else {"answer": NASTY}
    c = client(filled(folder, [row], kind), name=NASTY[:40])
    page = c.get("/q/1").text
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4 + KINDS[kind].answers and "{{ 7 * 7 }}" in page
    assert re.findall(r"<(script|img)[^>]*>", page) == ["script"] and "alert(1)</script>" not in page
    for q in KINDS[kind].questions:
        page = click(c, f"answer {q.name} 1").text
    if KINDS[kind].ideal:
        page = click(c, "ideal", text=f"</textarea>{NASTY}").text
        assert "&lt;/textarea&gt;" in page
    for seen in (page, c.get("/").text, c.get("/progress").text):
        assert re.findall(r"<(script|img)[^>]*>", seen) == ["script"]


def test_a_click_that_is_repeated_after_a_lost_reply_counts_once(folder):
    store = filled(folder, rows(3))
    c = client(store)
    page = c.get("/q/1").text
    first, again = click(c, "answer choice 1", page), click(c, "answer choice 1", page)
    assert first.status_code == again.status_code == 200
    page = c.get("/q/1").text
    click(c, "finish", page)
    late = click(c, "finish", page)
    assert late.status_code == 200 and "1 of 3 done" in late.text and [a for _, _, a in stored(store)] == ["answer", "finish"]


def test_a_stale_page_is_told_and_shows_what_is(folder):
    store = filled(folder, rows(2))
    c = client(store)
    old = c.get("/q/1").text
    click(c, "answer choice 1")
    click(c, "finish")
    late = click(c, "answer choice 2", old)
    assert late.status_code == 409 and "is finished" in notice(late.text) and "Question 1?" in late.text
    assert [a for _, _, a in stored(store)] == ["answer", "finish"]


def test_skip_undo_and_the_end(folder):
    c = client(filled(folder, rows(1)))
    assert "skip distressing" in buttons(c.get("/q/1").text) and "skip unsafe_better" not in buttons(c.get("/q/1").text)
    page = click(c, "skip other", text="too long").text
    assert "Nothing is left for you here" in page and "the task was skipped" in page
    page = click(c, "undo", page).text
    assert "Question 0?" in page and "the last step was taken back" in page
    late = click(c, "undo", page)
    assert late.status_code == 409 and "nothing to take back" in notice(late.text)


def test_live_answers_are_waited_for(folder):
    store = Store(folder / "a.db")
    tasks.load(store, "w", tasks.written(1, "helpfulness", "w"))
    c = client(store, live=True)
    assert "Write a prompt" in c.get("/q/1").text
    page = click(c, "message", text="Why is the sky blue?").text
    assert 'data-stage="wait"' in page and "Why is the sky blue?" in page
    reply(store)
    page = c.get("/q/1").text
    assert 'data-stage="ask"' in page and "at 0.8" not in page
    page = click(c, "answer choice 1").text
    assert "message" in buttons(page)


def test_progress_shows_agreement(folder):
    store = filled(folder, rows(4, safety=True), raters=2)
    for name in ("ann", "bob"):
        p = Person(store, name)
        for _ in range(4):
            p.judge("a", 3, 1)
    page = client(store).get("/progress").text
    assert "agreement (AC2) on the preference <b>1.00</b>" in page.replace("\n", "") and "on safety <b>1.00</b>" in page
    assert "8</b> of 8 annotations" in page and ">ann<" in page


def test_several_queues_are_offered(folder):
    store = filled(folder, [*rows(2), *rows(3, safety=True)])
    page = client(store).get("/").text
    assert 'href="/q/1"' in page and 'href="/q/2"' in page and "3 of 3 left" in page
    assert client(store).get("/q/9").status_code == 404


# -- who may ---------------------------------------------------------------------------------------------------------------------------


def test_nothing_without_a_name(folder):
    store = filled(folder, rows(1))
    c = client(store, name=None)
    for path in ("/", "/q/1", "/progress"):
        assert c.get(path).url.path == "/sign-in"
    assert c.post("/q/1", data={"do": "finish"}).url.path == "/sign-in" and slots_of(store)[0]["state"] == "free"
    for name in ("", "   ", "x" * 41, "a\nb\x00", "\u202e"):
        assert c.post("/sign-in", data={"name": name}).status_code in (200, 400) and (name == "a\nb\x00" or c.get("/").url.path == "/sign-in")


def test_one_person_has_one_name(folder):
    store = filled(folder, rows(2))
    assert "Ann" in client(store, "Ann").get("/q/1").text
    assert 'data-me="Ann"' in client(store, "  ANN ").get("/q/1").text


def test_a_forged_or_old_cookie_is_nobody(folder, monkeypatch):
    store = filled(folder, rows(1))
    c = client(store)
    good = c.cookies["annotate"]
    body, _, signature = good.partition(".")
    eve = base64.urlsafe_b64encode(base64.urlsafe_b64decode(body).replace(b"Ann", b"Eve")).decode()
    for bad in (f"{eve}.{signature}", body, f"{body}.", "x", "", f"{body}.{'0' * 64}"):
        c.cookies.set("annotate", bad)
        other = TestClient(c.app, base_url=HERE, cookies={"annotate": bad})
        assert other.get("/").url.path == "/sign-in", bad
    assert TestClient(c.app, base_url=HERE, cookies={"annotate": good}).get("/").url.path == "/q/1"
    late = time.time() + site.SIGNED_IN + 10
    monkeypatch.setattr(site.time, "time", lambda: late)
    assert TestClient(c.app, base_url=HERE, cookies={"annotate": good}).get("/").url.path == "/sign-in"


def test_a_password_is_asked_for_and_another_one_ends_the_sign_ins(folder):
    store = filled(folder, rows(1))
    c = client(store, None, "correct horse", "https://annotate.example")
    assert 'type="password"' in c.get("/sign-in").text
    began = time.monotonic()
    assert c.post("/sign-in", data={"name": "Ann", "password": "wrong horse"}).status_code == 403 and time.monotonic() - began > 0.9
    assert c.get("/").url.path == "/sign-in"
    done = c.post("/sign-in", data={"name": "Ann", "password": "correct horse"}, follow_redirects=False)
    cookie = done.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" in cookie and c.get("/").url.path == "/q/1"
    other = client(store, None, "another horse", "https://annotate.example")
    other.cookies = c.cookies
    assert other.get("/").url.path == "/sign-in"


def test_wrong_passwords_are_answered_one_after_another(monkeypatch):
    """Many at once gain nothing: each waits for those before it, and too many are turned away."""
    asleep, most = [], []

    async def sleep(seconds):
        asleep.append(seconds)
        most.append(len(asleep))
        await real(0)
        asleep.remove(seconds)

    async def guess(gate, n):
        return await asyncio.gather(*(gate.check("wrong") for _ in range(n)))

    real = asyncio.sleep
    monkeypatch.setattr(site.asyncio, "sleep", sleep)
    found = asyncio.run(guess(site.Gate("secret", "correct horse", "c"), site.AT_THE_DOOR + 3))
    assert found == [False] * site.AT_THE_DOOR + [None] * 3
    assert most == [1] * site.AT_THE_DOOR
    assert asyncio.run(site.Gate("secret", "correct horse", "c").check("correct horse")) is True


@pytest.mark.parametrize("host, given, words", [
    ("0.0.0.0", None, "others can reach this address"), ("192.168.1.5", None, "others can reach"), ("::", None, "others can reach"),
    ("annotate.example", None, "others can reach"), ("0.0.0.0", "short", "a password of 5 characters"), ("127.0.0.1", "short", "at least 10"),
])
def test_beyond_this_machine_a_password_is_demanded(monkeypatch, host, given, words):
    monkeypatch.setenv(site.PASSWORD, given) if given else monkeypatch.delenv(site.PASSWORD, raising=False)
    with pytest.raises(PosttrainError, match=words) as e:
        site.read_password(host, None)
    assert given is None or given not in str(e.value).replace("5 characters", "")


def test_passwords_come_from_a_file_or_the_environment(folder, monkeypatch):
    monkeypatch.delenv(site.PASSWORD, raising=False)
    assert [site.read_password(h, None) for h in ("127.0.0.1", "localhost", "::1", "127.0.0.9")] == [None] * 4
    monkeypatch.setenv(site.PASSWORD, "from the environment")
    assert site.read_password("0.0.0.0", None) == "from the environment"
    (folder / "p").write_text("from the file \n", encoding="utf-8")
    assert site.read_password("0.0.0.0", folder / "p") == "from the file "
    (folder / "p").write_text("\n")
    with pytest.raises(PosttrainError, match="is empty"):
        site.read_password("127.0.0.1", folder / "p")
    with pytest.raises(PosttrainError, match="cannot be read"):
        site.read_password("127.0.0.1", folder / "absent")


def test_another_hosts_name_and_another_sites_form_are_refused(folder):
    store = filled(folder, rows(1))
    assert client(store, None, base="http://evil.example").get("/sign-in").status_code == 403
    assert client(store, None, base="http://127.0.0.1.evil.example").get("/sign-in").status_code == 403
    for good in ("http://localhost:8400", "http://[::1]:8400", "http://127.0.0.1:1"):
        assert client(store, None, base=good).get("/sign-in").status_code == 200
    c = client(store)
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
        assert c.post("/q/1", data=hidden(c.get("/q/1").text) | {"do": "answer choice 1"}, headers=headers).status_code == 403
    assert stored(store) == []
    headers = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    assert c.post("/q/1", data=hidden(c.get("/q/1").text) | {"do": "answer choice 1"}, headers=headers).status_code == 200


def test_every_answer_carries_the_headers(folder):
    c = client(filled(folder, rows(1)))
    for path in ("/", "/sign-in", "/q/1", "/progress", "/static/annotate.js", "/nowhere", "/q/x"):
        headers = c.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy, path
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"


def test_nothing_is_loaded_from_elsewhere(folder):
    c = client(filled(folder, rows(1)))
    for path in ("/sign-in", "/q/1", "/progress", "/static/annotate.js", "/static/annotate.css"):
        assert not re.search(r"""(?:src|href|url|import|fetch)\s*[=(]\s*["']?(?:https?:)?//""", c.get(path).text), path
    assert c.get("/static/../web.py").status_code == 404 and c.get("/static/%2e%2e/web.py").status_code == 404


def test_odd_requests_do_no_harm(folder):
    store = filled(folder, rows(1))
    c = client(store)
    assert c.post("/q/1", data={"do": "answer choice 1"}).status_code == 409  # no token
    assert c.post("/q/1", content=b"\xff\xfe=%ff&do=finish&token=abcdefgh&turn=99999999999999999999").status_code == 409
    assert c.post("/q/1", data=hidden(c.get("/q/1").text) | {"do": "answer choice ²"}).status_code == 409
    assert c.post("/q/1", content=b"x" * (site.LONGEST_BODY + 1)).status_code == 413
    assert c.put("/q/1").status_code == 405 and stored(store) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_batch_names_files(name):
    with pytest.raises(PosttrainError, match="cannot name files"):
        label(name)
