"""Trackers by name (`run: {report_to: tensorboard | trackio | wandb}`), each fed by a process of its own that follows the run's folder.

The run writes metrics.jsonl and knows nothing of its trackers: whatever fails, waits or draws random numbers there cannot reach it. A section is a
run of the tracker, its numbers are `<section>/<metric>` at their own step; its configuration and, once it is done, its results go along. Nothing else
is sent. What a tracker has is kept in RUN/.trackers/NAME, so that after a kill, or with a tracker named later, the same command sends what is missing
and nothing twice: a row that a resumed section makes again is one that the tracker has. (TensorBoard's event files are written anew instead, from the
first row, whenever an unfinished section goes on; nothing has to be remembered where everything can be written again.)

Run as a module it is that process: NAME RUN_FOLDER SECTION...; a line on standard input, its end, or the end of the parent is the run's end.
"""

import fcntl
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from posttrain import distributed
from posttrain.config import Recipe, read_yaml
from posttrain.errors import PosttrainError
from posttrain.log import read_lines, read_whole, say
from posttrain.runs import Run, flatten, write_json

FOLDER = ".trackers"  # in the run's folder
POLL = 2.0  # seconds between two looks at the run's folder
AGAIN = 60.0  # seconds before a tracker that failed is tried again
LAST = 60.0  # seconds for what is left when the run has ended
SOON = 5.0  # seconds without a word about that
PROJECT = "posttrain"


@dataclass
class Told:
    """A section as a tracker gets to know it."""

    run: str
    name: str
    kind: str
    config: dict
    folder: Path  # for files of the tracker
    ident: str  # the tracker's run; the same when the section goes on

    def names(self, numbers: dict, below: str = "") -> dict[str, float]:
        """{'sft/loss': 1.0} -> {'<section>/loss': 1.0}; what is no finite number is left out."""
        return {f"{self.name}/{below}{k.removeprefix(f'{self.kind}/')}": v for k, v in numbers.items() if finite(v)}


def finite(value) -> bool:
    """Whether a value is a number that a tracker can draw."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -- the trackers -------------------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files (simple values, and texts as the plugin `text` wants them), with tensorboard's own writer: no tensorflow, no torch."""

    anew = True
    where = "tensorboard --logdir {folder}"

    def __init__(self, told: Told):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.told, self.proto = told, event_pb2
        folder = told.folder / told.name
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # a TensorBoard that shows the earlier file drops it from this step on
        self.writer.add_event(event_pb2.Event(wall_time=time.time(), step=0, session_log=start))
        self._text("configuration", 0, told.config)

    def row(self, step: int, when: float, numbers: dict[str, float]) -> None:
        self._event(step, when, [{"tag": k, "simple_value": v} for k, v in numbers.items()])

    def results(self, step: int, numbers: dict) -> None:
        self._text("results", step, numbers)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    def _text(self, name: str, step: int, values: dict) -> None:
        """A Markdown table in the tab Text."""
        lines = ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in flatten("", values).items())]
        tensor = {"dtype": "DT_STRING", "string_val": ["\n".join(lines).encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        self._event(step, time.time(), [{"tag": f"{self.told.name}/{name}", "tensor": tensor, "metadata": {"plugin_data": {"plugin_name": "text"}}}])

    def _event(self, step: int, when: float, values: list[dict]) -> None:
        self.writer.add_event(self.proto.Event(wall_time=when, step=step, summary={"value": values}))


class Wandb:
    """A run of the project `posttrain` (or $WANDB_PROJECT), in the group of our run. Rows of a step that it has are dropped there as well."""

    anew = False
    where = ""
    quiet = {"CONSOLE": "off", "DISABLE_GIT": "true", "DISABLE_CODE": "true", "_DISABLE_META": "true", "_DISABLE_STATS": "true",
             "_SAVE_REQUIREMENTS": "false"}  # no settings by name: an older or newer wandb passes over a variable that it does not know

    def __init__(self, told: Told):
        for key, value in self.quiet.items():
            os.environ.setdefault(f"WANDB_{key}", value)
        import wandb

        self.told = told
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), group=told.run, name=f"{told.run}/{told.name}", job_type=told.kind,
                              id=told.ident, resume="allow", config=told.config, dir=str(told.folder))

    def row(self, step: int, when: float, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def results(self, step: int, numbers: dict) -> None:
        self.run.summary.update(self.told.names(numbers, "results/"))

    def flush(self) -> None:
        """What is logged is in wandb's own process, which outlives this one."""

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of the project `posttrain` (or $TRACKIO_PROJECT), in the group of our run. Results, for which it has no place, are numbers at the
    last step."""

    anew = False
    where = "trackio show --project {project}"
    settled = 1.2  # seconds; its thread writes what is logged every half second

    def __init__(self, told: Told):
        import trackio

        self.told, self.faults = told, []
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, category, *_: self.faults.append(str(message)) if category is UserWarning else None
        self.run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{told.run}-{told.name}-{told.ident}", group=told.run,
                                config=told.config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def row(self, step: int, when: float, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def results(self, step: int, numbers: dict) -> None:
        self.row(step, time.time(), self.told.names(numbers, "results/"))

    def flush(self) -> None:
        """Raises RuntimeError where rows were lost: it warns, and goes on."""
        time.sleep(self.settled)
        if self.faults:
            raise RuntimeError(self.faults.pop())

    def close(self) -> None:
        self.run.finish()
        if self.faults:
            raise RuntimeError(self.faults.pop())


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


# -- the process that follows -------------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """What a tracker has of a section."""

    started: str
    ident: str = field(default_factory=lambda: secrets.token_hex(5))
    position: tuple[int, int] | None = None  # step of the last row, and which row of that step it is
    done: bool = False


def numbered(rows: list[dict]) -> list[tuple[tuple[int, int], dict]]:
    """((step, which row of that step), row) of every row with a step."""
    seen, out = Counter(), []
    for row in rows:
        if isinstance(step := row.get("step"), int):
            seen[step] += 1
            out.append(((step, seen[step]), row))
    return out


def summary_of(results: dict) -> dict[str, float]:
    """The numbers among a section's results, `a.b` -> `a/b`; curves and histograms (lists) are left out."""
    return {k.replace(".", "/"): v for k, v in flatten("", results).items() if "[" not in k and finite(v)}


class Follower:
    """Brings a tracker up to date with the run's folder, one section at a time."""

    def __init__(self, name: str, folder: Path, sections: list[str], tell):
        self.name, self.make, self.folder, self.sections, self.tell = name, TRACKERS[name], folder, sections, tell
        self.own = folder / FOLDER / name
        self.sent: dict[Path, Sent] = {}
        self.seen: dict[str, list] = {}  # section -> dates and sizes of its files when all that they hold was sent
        self.open, self.told, self.tracker = None, None, None  # the ledger of the section at work, the section, its tracker
        self.last = None  # the last row handed over
        self.wait_until, self.warned = 0.0, False

    def look(self, at_the_end: bool = False) -> bool:
        """Send what is new. Returns whether that went well; what fails is told once, and tried again after a while."""
        if time.time() < self.wait_until and not at_the_end:
            return False
        try:
            for name in self.sections:
                self._section(name)
            if at_the_end:
                self._close()
            return True
        except Exception as e:  # a tracker's fault may be of any kind
            if not self.warned:
                self.warned = True
                self.tell(f"note: {self.name} takes no numbers now ({str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__}); "
                          "the run goes on, and metrics.jsonl has them. It is tried again, at the latest by the same command.")
            self.wait_until = time.time() + AGAIN
            with suppress(Exception):
                self._close()
            return False

    def _close(self) -> None:
        tracker, self.tracker, self.open = self.tracker, None, None
        if tracker:
            tracker.close()

    def _section(self, name: str) -> None:
        manifest, metrics, results, done = files = [self.folder / name / n for n in ("manifest.json", "metrics.jsonl", "results.json", "DONE")]
        try:
            state = [(s.st_mtime_ns, s.st_size, s.st_ino) for s in (p.stat() for p in files if p.exists())]
            told = read_whole(manifest)
            if not told or self.seen.get(name) == state:
                return
            mark = str(told.get("fingerprint", ""))
            over = done.exists() and done.read_bytes().strip() == mark.encode()
            rows, found = numbered(read_lines(metrics)), summary_of(read_whole(results)) if over else {}
        except OSError:  # the section is being set aside; the next look sees what is there then
            return
        ledger = self.own / (f"{name}.json" if self.make.anew else f"{name}-{mark[:10]}.json")
        sent = self._sent(ledger, f"{mark[:10]} {told.get('started')}")
        if not sent.done:
            self._send(name, told, ledger, sent, rows, found)
            if over:
                if self.open == ledger:
                    self._close()
                self._keep(ledger, sent, done=True)
        self.seen[name] = state

    def _send(self, name: str, manifest: dict, ledger: Path, sent: Sent, rows: list, results: dict) -> None:
        if self.make.anew and (self.open != ledger or dict(rows).get(sent.position) != self.last):
            self._close()
            sent.position = None
        new = [(position, row) for position, row in rows if sent.position is None or position > sent.position]
        if not new and not results:
            return
        if self.open != ledger:
            self._close()
            self._keep(ledger, sent)  # its name first: the next process goes on with it
            self.told = Told(self.folder.name, name, str(manifest.get("kind")), self._config(name, manifest), self.own, sent.ident)
            self.tracker, self.open = self.make(self.told), ledger
        for (step, _), row in new:
            numbers = self.told.names({k: v for k, v in row.items() if k not in ("step", "time")})
            if numbers:
                self.tracker.row(step, row.get("time", time.time()), numbers)
        if results:
            self.tracker.results(rows[-1][0][0] if rows else 0, results)
        self.tracker.flush()
        if new:
            self.last = new[-1][1]
            self._keep(ledger, sent, position=new[-1][0])

    def _config(self, name: str, manifest: dict) -> dict:
        try:
            config = read_yaml(self.folder / name / "config.yaml")
        except PosttrainError:
            config = {}
        return config | {k: manifest.get(k) for k in ("seed", "commit", "versions", "fingerprint")}

    def _sent(self, ledger: Path, started: str) -> Sent:
        if ledger not in self.sent or self.sent[ledger].started != started:
            told = read_whole(ledger)
            try:
                found = Sent(**told | {"position": tuple(told["position"]) if told["position"] else None})
            except (TypeError, KeyError):
                found = Sent(started)
            self.sent[ledger] = found if found.started == started else Sent(started)
        return self.sent[ledger]

    def _keep(self, ledger: Path, sent: Sent, **changed) -> None:
        for key, value in changed.items():
            setattr(sent, key, value)
        ledger.parent.mkdir(parents=True, exist_ok=True)
        write_json(ledger, asdict(sent))


def main(name: str, folder: Path, sections: list[str]) -> None:
    """Follow until the run has ended, then send what is left. The tracker's own words go nowhere: ours alone reach the run's terminal."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, whose end is ours
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    parent = os.getppid()

    def tell(text: str) -> None:
        with suppress(OSError):
            said.write(text.replace("\n", " ") + "\n")
            said.flush()

    ended = threading.Event()

    def watch() -> None:
        while not select.select([sys.stdin], [], [], 1.0)[0] and os.getppid() == parent:
            pass
        ended.set()
        time.sleep(LAST)
        tell(f"note: {name} did not take all numbers within {LAST:.0f} s after the run's end; the same command sends the rest.")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    follower = Follower(name, folder, sections, tell)
    try:
        follower.own.mkdir(parents=True, exist_ok=True)
        with (follower.own / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # after a kill, the earlier process may still be sending
            while not ended.wait(POLL):
                follower.look()
            follower.look(at_the_end=True)
    except OSError as e:
        tell(f"note: {name} gets no numbers this time ({follower.own}: {e.strerror})")
    os._exit(0)  # no library's own work at the end of a process: what is to be sent is sent


# -- the run's side -----------------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> None:
    """Raises PosttrainError where a tracker's package is missing."""
    from posttrain.doctor import pip

    for name in recipe.run.report_to:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb's own in the working directory, is no package
            raise PosttrainError(f"{recipe.path}: run.report_to", f"{name} is not installed", "the tracker's package",
                                 f"Install it: `{pip()} {name}`. Or do without: run.report_to=[].")


@contextmanager
def follow(run: Run):
    """What happens inside is told to the recipe's trackers. At its end the last numbers are waited for; after an error or a stop they are sent
    without waiting."""
    begun = [p for name in dict.fromkeys(run.recipe.run.report_to) if distributed.is_main() and (p := _begin(name, run))]
    try:
        yield
    except BaseException:
        for process, _ in begun:
            _end(process)
        raise
    for process, _ in begun:
        _end(process)
    for process, speaker in begun:
        try:
            process.wait(SOON)
        except subprocess.TimeoutExpired:
            say(f"The last numbers go to {process.args[3]} (at most {LAST:.0f} s) ...", style="dim")
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST + SOON)
            process.kill()
        speaker.join(1)


def _begin(name: str, run: Run) -> tuple[subprocess.Popen, threading.Thread] | None:
    where = TRACKERS[name].where.format(folder=run.folder / FOLDER / name, project=os.environ.get(f"{name.upper()}_PROJECT", PROJECT))
    try:
        process = subprocess.Popen([sys.executable, "-m", "posttrain.trackers", name, str(run.folder), *run.recipe.stages], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    except OSError as e:
        say(f"note: {name} gets no numbers this time ({e.strerror})")
        return None
    speaker = threading.Thread(target=lambda: [say(line.rstrip()) for line in process.stdout], daemon=True)
    speaker.start()
    say(f"Numbers go to {name}{f': {where}' if where else ''}", style="dim")
    return process, speaker


def _end(process: subprocess.Popen) -> None:
    with suppress(OSError):
        process.stdin.write("end\n")
        process.stdin.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
