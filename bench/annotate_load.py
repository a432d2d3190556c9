"""The annotation page under load: several clients click through its HTTP interface while the server is killed; nothing may be lost or doubled.

python -m bench.annotate_load                        10,000 tasks, 8 clients, 2 kills
python -m bench.annotate_load --tasks 400 --output x.json     a small one

A client does what annotate.js does: it sends a click until the server has answered, with the same token, and notes what was answered. In the
end the database must hold every click that was answered, each task once, and no click twice. Time goes mostly to the disk: every click waits
for it, and its own speed is told beside the results.
"""

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

from bench.harness import ROOT, markdown, processor, start
from posttrain.log import say
from posttrain.runs import provenance, write_json, write_lines

HIDDEN = re.compile(r'<input type="hidden" name="(token|task|turn)" value="([^"]*)"')
PATIENCE = 120.0  # seconds that a client waits for a server to come back
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Server:
    """`python -m posttrain annotate` on one database and one port, begun again after every kill."""

    def __init__(self, db: Path, tasks: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.command = [sys.executable, "-m", "posttrain", "annotate", "serve", "--db", str(db), "--port", str(self.port)]
        self.begin(str(tasks), "--batch", "load")

    def begin(self, *more: str) -> None:
        self.process = subprocess.Popen([*self.command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if "Ctrl-C" in line:
                return
        raise SystemExit("bench: annotate_load: the server did not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Client(threading.Thread):
    """One annotator. clicks: (task, do) of every click that was answered, in order; seconds: how long each took; again: sent more than once."""

    def __init__(self, name: str, port: int):
        super().__init__(daemon=True)
        self.name, self.port, self.clicks, self.seconds, self.again = name, port, [], [], 0
        self.cookie, self.connection, self.fault = "", None, None

    def ask(self, method: str, path: str, fields: dict | None = None) -> tuple[int, str]:
        """One request, sent until it is answered."""
        end, body = time.monotonic() + PATIENCE, urlencode(fields) if fields else None
        for attempt in range(10**6):
            try:
                self.connection = self.connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                self.connection.request(method, path, body, {"Cookie": self.cookie, "X-Swap": "1", **(FORM if fields else {})})
                got = self.connection.getresponse()
                text = got.read().decode()
                if cookie := got.getheader("Set-Cookie"):
                    self.cookie = cookie.partition(";")[0]
                if got.status < 500:
                    self.again += attempt > 0
                    return got.status, text
            except (OSError, http.client.HTTPException):
                self.connection.close()
                self.connection = None
            if time.monotonic() > end:
                raise TimeoutError(f"{method} {path}: no answer in {PATIENCE:g} s")
            time.sleep(0.05)
        raise AssertionError

    def run(self) -> None:
        try:
            self.work()
        except Exception as e:
            self.fault = e

    def work(self) -> None:
        self.ask("POST", "/sign-in", {"name": self.name})
        _, page = self.ask("GET", "/q/1")
        number = 0
        while 'data-stage="ask"' in page:
            number += 1
            for do in (f"answer choice {1 + number % 8}", "finish"):
                shown = {k: unescape(v) for k, v in HIDDEN.findall(page)}
                began = time.perf_counter()
                status, page = self.ask("POST", "/q/1", shown | {"do": do})
                if status != 200:
                    raise AssertionError(f"{do}: HTTP {status}: {page[:300]}")
                self.seconds.append(time.perf_counter() - began)
                self.clicks.append((shown["task"], do))


def checks(db: Path, clients: list[Client], wanted: int) -> dict[str, bool]:
    """Against the database, by plain SQL."""
    import sqlite3

    with sqlite3.connect(f"file:{db}?mode=ro", uri=True) as c:
        rows = c.execute("SELECT task, annotator, action, value, token FROM events WHERE undone_by IS NULL ORDER BY id").fetchall()
        states = Counter(s for (s,) in c.execute("SELECT state FROM slots"))
        sound = c.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    stored = Counter((task, who, json.loads(value)["do"]) for task, who, _, value, _ in rows)
    answered = Counter((task, client.name, do) for client in clients for task, do in client.clicks)
    finished = Counter(task for task, _, action, _, _ in rows if action == "finish")
    return {"no answered click is lost": not answered - stored, "nothing is stored that nobody clicked": not stored - answered,
            "no click is stored twice": max(stored.values()) == 1 and len({r[4] for r in rows}) == len(rows),
            "every task is done once": len(finished) == wanted and set(finished.values()) == {1} and states == {"done": wanted},
            "the database is sound": sound}


def disk(folder: Path, n: int = 50) -> float:
    """Milliseconds of one small write that waits for the disk, median."""
    path, took = folder / "disk.test", []
    with path.open("wb") as f:
        for _ in range(n):
            began = time.perf_counter()
            f.write(b"x" * 4096)
            f.flush()
            os.fsync(f.fileno())
            took.append(time.perf_counter() - began)
    path.unlink()
    return 1000 * sorted(took)[n // 2]


def quantiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    values = sorted(values)
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}
    return {name: round(1000 * values[min(int(q * len(values)), len(values) - 1)], 1) for name, q in at.items()}


def measure(args, folder: Path) -> dict:
    tasks = folder / "tasks.jsonl"
    write_lines(tasks, ({"prompt": f"Question {i}: {'why ' * 20}?", "answer_a": f"First {i}. " + "word " * 100,
                         "answer_b": f"Second {i}. " + "word " * 100}
                        for i in range(args.tasks)))
    server, db = Server(folder / "load.db", tasks), folder / "load.db"
    clients = [Client(f"annotator {i + 1}", server.port) for i in range(args.clients)]
    out = {"disk_ms": round(disk(folder), 2), "kills": []}
    began = time.perf_counter()
    for client in clients:
        client.start()
    at = [args.tasks * (k + 1) // (args.kills + 1) for k in range(args.kills)]
    while any(c.is_alive() for c in clients):
        time.sleep(0.02)
        done = sum(len(c.clicks) for c in clients) // 2
        if at and done >= at[0]:
            server.kill()
            down = time.perf_counter()
            server.begin()
            out["kills"].append({"after": at.pop(0), "down_seconds": round(time.perf_counter() - down, 1)})
    seconds = time.perf_counter() - began
    if faults := [f"{c.name}: {c.fault}" for c in clients if c.fault]:
        raise SystemExit(f"bench: annotate_load: {faults[0]}")
    took = [s for c in clients for s in c.seconds]
    visitor = Client("visitor", server.port)
    visitor.ask("POST", "/sign-in", {"name": "visitor"})

    def timed(path: str) -> float:
        before = time.perf_counter()
        assert visitor.ask("GET", path)[0] == 200
        return round(time.perf_counter() - before, 3)

    out |= {"seconds": round(seconds, 1), "annotations": args.tasks, "clicks": len(took), "clicks_per_second": round(len(took) / seconds, 1),
            "click_ms": quantiles(took), "sent_again": sum(c.again for c in clients), "page_seconds": timed("/q/1"),
            "progress_seconds": timed("/progress")}
    before = time.perf_counter()
    subprocess.run([sys.executable, "-m", "posttrain", "annotate", "export", "--db", str(db), "--out", str(folder / "out"), "--held-out",
                    str(args.tasks // 10)], cwd=ROOT, check=True, capture_output=True)
    out["export_seconds"] = round(time.perf_counter() - before, 1)
    server.kill()
    met = checks(db, clients, args.tasks)
    pairs = sum(sum(1 for _ in p.open(encoding="utf-8")) for p in (folder / "out").glob("*.pairs*.jsonl"))
    return out | {"checks": met | {"every annotation is an exported pair": pairs == args.tasks}}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.annotate_load", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "annotate_load.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        out = measure(args, Path(folder))
    about = {k: v for k, v in provenance().items() if k != "versions"}
    write_json(args.output, {"benchmark": "annotate_load", **about, "processor": processor(), "clients": args.clients, **out})
    say(markdown(["annotations", "clients", "kills", "seconds", "clicks/s", "click ms (median, p95, p99)", "page s", "progress s", "export s",
                  "disk ms"],
                 [[f"{out['annotations']:,}", str(args.clients), str(len(out["kills"])), f"{out['seconds']:.0f}", f"{out['clicks_per_second']:.0f}",
                   ", ".join(f"{out['click_ms'][k]:.0f}" for k in ("median", "p95", "p99")), f"{out['page_seconds']:.2f}",
                   f"{out['progress_seconds']:.2f}", f"{out['export_seconds']:.1f}", f"{out['disk_ms']:.1f}"]]))
    for name, met in out["checks"].items():
        say(f"{'met' if met else 'NOT MET'}: {name}")
    say(f"Results: {args.output}")
    return 0 if all(out["checks"].values()) else 1


if __name__ == "__main__":
    start(main)
