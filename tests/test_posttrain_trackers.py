"""Trackers: every number once, through kills, changes and faults; and a run that never notices them. trackio and wandb are stand-ins."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain import __main__ as commands
from posttrain import config as cfg
from posttrain import runs, trackers
from posttrain.errors import PosttrainError
from posttrain.log import Log
from posttrain.trackers import Follower, numbered, summary_of

WANDB = '''
import json, os, sys
class Summary(dict):
    def update(self, values): told("summary", values)
class Run:
    summary = Summary()
    def log(self, values, step): told("row", values, step)
    def finish(self): told("finish")
def told(*what):
    with open(os.environ["HEARD"], "a") as f: f.write(json.dumps([os.getpid(), *what]) + "\\n")
def init(**given):
    print("wandb: noise"); print("wandb: noise", file=sys.stderr)
    told("init", {k: v for k, v in given.items() if k != "dir"}, {k: v for k, v in os.environ.items() if k.startswith("WANDB_")})
    return Run()
'''
TRACKIO = '''
import json, os, warnings
class Run:
    def log(self, values, step):
        with open(os.environ["HEARD"], "a") as f: f.write(json.dumps([os.getpid(), "row", values, step]) + "\\n")
        if "LOSES" in os.environ: warnings.warn("trackio failed to flush: database is locked")
    def finish(self): pass
def init(**given):
    with open(os.environ["HEARD"], "a") as f: f.write(json.dumps([os.getpid(), "init", given, {}]) + "\\n")
    return Run()
'''


class Heard(list):
    """A tracker that keeps what it is given, by section; `fails`: what it raises at a row, while that is set."""

    anew, where, fails = False, "", None

    def __call__(self, told):
        self.append(("open", told.name, told.ident, told.config))
        self.told = told
        return self

    def row(self, step, when, numbers):
        if self.fails:
            raise self.fails
        self.append(("row", step, numbers))

    def results(self, step, numbers):
        self.append(("results", step, numbers))

    def flush(self):
        pass

    def close(self):
        self.append(("close", self.told.name))

    def steps(self) -> list[int]:
        return [what[1] for what in self if what[0] == "row"]


class Folder:
    """A run's folder, written as a run would."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, name: str = "sft", fingerprint: str = "f" * 64, started: str = "2026-01-01T00:00:00") -> Path:
        section = self.folder / name
        section.mkdir(parents=True, exist_ok=True)
        runs.write_json(section / "manifest.json", {"kind": "sft", "fingerprint": fingerprint, "started": started, "seed": 3,
                                                    "versions": {"torch": "2"}})
        (section / "config.yaml").write_text("section: sft\nstage: {learning_rate: 0.1}\n")
        return section

    def steps(self, first: int, last: int, name: str = "sft") -> None:
        for step in range(first, last + 1):
            Log(self.folder / name, name).metrics(step, {"sft/loss": 1 / (step + 1), "sft/broken": float("nan"), "judge/agreement": 1})

    def finish(self, name: str = "sft", results: dict | None = None) -> None:
        runs.write_json(self.folder / name / "results.json", results or {})
        runs.write_atomic(self.folder / name / "DONE", runs.read_json(self.folder / name / "manifest.json")["fingerprint"] + "\n")


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "runs" / "demo")


@pytest.fixture
def heard(monkeypatch) -> Heard:
    made = Heard()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", made)
    return made


@pytest.fixture
def follower(folder, heard):
    """follower() -> a new process's; its warnings in follower.said."""
    said = []

    def make() -> Follower:
        return Follower("wandb", folder.folder, ["sft", "eval"], said.append)

    make.said = said
    return make


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    """Modules called wandb and trackio, also for other processes. Returns the file that says what they heard."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "wandb.py").write_text(WANDB)
    (site / "trackio.py").write_text(TRACKIO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("HEARD", str(tmp_path / "heard.jsonl"))
    monkeypatch.syspath_prepend(str(site))
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(trackers, "POLL", 0.1)
    return tmp_path / "heard.jsonl"


def rows(path: Path, what: str = "row") -> list:
    return [line[2:] for line in map(json.loads, path.read_text().splitlines()) if line[1] == what] if path.exists() else []


# -- the recipe ------------------------------------------------------------------------------------------------------------------------


def test_the_recipe_takes_one_name_or_several_and_no_result_depends_on_them(make_run):
    run = make_run({"sft": {"data": "demonstrations"}})
    path, before = run.recipe.path, run.section("sft").fingerprint
    assert run.recipe.run.report_to == []
    for given, found in (("wandb", ["wandb"]), ("[tensorboard, trackio]", ["tensorboard", "trackio"])):
        recipe = cfg.load_recipe(path, [f"run.report_to={given}"])
        assert recipe.run.report_to == found and runs.Run(recipe).section("sft").fingerprint == before
    with pytest.raises(PosttrainError, match="'tensorboard', 'trackio' or 'wandb'"):
        cfg.load_recipe(path, ["run.report_to=mlflow"])


@pytest.mark.parametrize("package", [None, "a folder"])
def test_a_missing_package_is_told_before_anything_is_read(make_run, monkeypatch, tmp_path, package):
    run = make_run({"sft": {"data": "demonstrations"}})
    monkeypatch.setattr(runs, "preflight", lambda *_: pytest.fail("the run began"))
    if package:  # as wandb's own folder in the working directory
        (tmp_path / "here" / "wandb").mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / "here"))
    monkeypatch.setattr(trackers, "find_spec", lambda name, find=trackers.find_spec: find(name) if package else None)
    if package and trackers.find_spec("wandb").origin:
        pytest.skip("wandb is installed")
    with pytest.raises(PosttrainError, match=r"(?s)run.report_to.*wandb is not installed.*pip install.* wandb"):
        commands.run(Path(run.recipe.path), ["run.report_to=wandb"])


# -- every number once -----------------------------------------------------------------------------------------------------------------


def test_every_number_goes_with_its_step_its_configuration_and_its_results(folder, heard, follower):
    folder.begin()
    folder.steps(0, 1)
    one = follower()
    assert one.look() and one.look()
    folder.steps(2, 2)
    folder.finish(results={"loss": {"mean": 1.5, "low": 1}, "curve": [1, 2], "name": "x", "bad": float("nan")})
    assert one.look()
    (_, name, _, config), *rest = heard
    assert name == "sft" and config["stage"] == {"learning_rate": 0.1} and config["seed"] == 3
    assert rest == [*(("row", i, {"sft/loss": 1 / (i + 1), "sft/judge/agreement": 1}) for i in range(3)),
                    ("results", 2, {"loss/mean": 1.5, "loss/low": 1}), ("close", "sft")]
    heard.clear()
    assert follower().look(at_the_end=True) and heard == []  # nothing a second time


def test_a_kill_and_a_resume_double_nothing_and_lose_nothing(folder, heard, follower):
    section = folder.begin()
    folder.steps(0, 7)
    one = follower()
    one.look()
    folder.steps(8, 9)  # written, and killed before it was sent
    ident = heard[0][2]
    two = follower()
    two.look()  # the model is loading: what is newer than the checkpoint is still there
    Log(section, "sft").rewind(5)
    two.look()
    folder.steps(6, 12)
    two.look()
    Log(section, "sft").metrics(12, {"sft/watched": 1.0})  # a second row of the same step
    two.look()
    assert heard.steps() == [*range(13), 12] and {what[2] for what in heard if what[0] == "open"} == {ident}


def test_a_tracker_named_later_gets_what_was_before(folder, heard, follower):
    folder.begin()
    folder.steps(0, 9)
    folder.finish()
    folder.begin("eval")
    folder.finish("eval", {"share": 0.5})
    assert follower().look(at_the_end=True)
    assert heard.steps() == list(range(10)) and ("results", 0, {"share": 0.5}) in heard


def test_a_changed_section_is_another_run_and_one_that_comes_back_is_not_sent_again(folder, heard, follower):
    section = folder.begin()
    folder.steps(0, 2)
    folder.finish()
    follower().look(at_the_end=True)
    section.rename(folder.folder / "aside")
    section = folder.begin(fingerprint="e" * 64)
    folder.steps(0, 1)
    follower().look(at_the_end=True)
    assert heard.steps() == [0, 1, 2, 0, 1] and len({what[2] for what in heard if what[0] == "open"}) == 2
    section.rename(folder.folder / "aside too")
    (folder.folder / "aside").rename(section)
    heard.clear()
    follower().look(at_the_end=True)
    assert heard == []
    (section / "manifest.json").unlink()  # made again from nothing, with the same recipe
    (section / "metrics.jsonl").unlink()
    (section / "DONE").unlink()
    folder.begin(started="2026-01-02T00:00:00")
    folder.steps(0, 0)
    follower().look(at_the_end=True)
    assert heard.steps() == [0]


def test_a_tracker_that_fails_is_told_once_and_gets_everything_later(folder, heard, follower, monkeypatch):
    folder.begin()
    folder.steps(0, 3)
    one = follower()
    heard.fails = ConnectionError("no route to host\nmore")
    assert not one.look() and not one.look()  # not tried again at once
    monkeypatch.setattr(trackers, "AGAIN", 0.0)
    one.wait_until = 0.0
    assert not one.look()
    assert len(follower.said) == 1 and "no route to host)" in follower.said[0] and "metrics.jsonl has them" in follower.said[0]
    heard.fails = None
    folder.steps(4, 5)
    assert one.look() and heard.steps() == list(range(6))


def test_a_disk_that_is_full_doubles_nothing(folder, heard, follower, monkeypatch):
    folder.begin()
    folder.steps(0, 3)
    one = follower()
    one.look()
    write, full = trackers.write_json, OSError(28, "No space left on device")

    def broken(*_):
        raise full

    monkeypatch.setattr(trackers, "AGAIN", 0.0)
    monkeypatch.setattr(trackers, "write_json", broken)
    folder.steps(4, 5)
    one.look()
    one.look()
    monkeypatch.setattr(trackers, "write_json", write)
    folder.steps(6, 6)
    assert one.look() and heard.steps() == list(range(7)) and len(follower.said) == 1


def test_half_a_line_and_rows_of_no_step():
    found = numbered([{"step": 1, "a": 1}, {"a": 2}, {"step": 1, "b": 1}, {"step": "x"}])
    assert found == [((1, 1), {"step": 1, "a": 1}), ((1, 2), {"step": 1, "b": 1})]
    assert summary_of({"a": {"b": 1, "c": [1], "d": None, "e": True}}) == {"a/b": 1}


# -- the real classes ------------------------------------------------------------------------------------------------------------------


def test_wandb_gets_a_run_with_an_id_of_its_own_and_nothing_of_the_machine(folder, stand_ins, monkeypatch):
    for key in [k for k in os.environ if k.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    folder.begin()
    folder.steps(0, 3)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    one = Follower("wandb", folder.folder, ["sft"], pytest.fail)
    one.look()
    folder.finish(results={"loss": 1.0})
    two = Follower("wandb", folder.folder, ["sft"], pytest.fail)
    two.look()
    (given, settings), (again, _) = rows(stand_ins, "init")
    assert (given["project"], given["group"], given["name"], given["job_type"], given["resume"]) == ("posttrain", "demo", "demo/sft", "sft", "allow")
    assert given["id"] == again["id"] and given["config"]["stage"] == {"learning_rate": 0.1}
    assert settings == {"WANDB_CONSOLE": "off", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true", "WANDB__DISABLE_META": "true",
                        "WANDB__DISABLE_STATS": "true", "WANDB__SAVE_REQUIREMENTS": "false"}
    assert rows(stand_ins) == [[{"sft/loss": 1 / (i + 1), "sft/judge/agreement": 1}, i] for i in range(4)]
    assert rows(stand_ins, "summary") == [[{"sft/results/loss": 1.0}]]


def test_trackio_has_results_at_the_last_step_and_what_it_loses_is_sent_again(folder, stand_ins, monkeypatch):
    import warnings

    monkeypatch.setattr(trackers.Trackio, "settled", 0.0)
    monkeypatch.setattr(trackers, "AGAIN", 0.0)
    folder.begin()
    folder.steps(0, 1)
    said = []
    with warnings.catch_warnings():
        monkeypatch.setenv("LOSES", "1")
        one = Follower("trackio", folder.folder, ["sft"], said.append)
        assert not one.look() and "database is locked" in said[0]
        monkeypatch.delenv("LOSES")
        stand_ins.unlink()
        folder.finish(results={"loss": 1.0})
        assert one.look()
    (given, _), = rows(stand_ins, "init")
    assert (given["project"], given["group"], given["resume"]) == ("posttrain", "demo", "allow") and given["name"].startswith("demo-sft-")
    assert [step for _, step in rows(stand_ins)] == [0, 1, 1] and rows(stand_ins)[-1] == [{"sft/results/loss": 1.0}, 1]


def test_tensorboard_shows_what_metrics_jsonl_has_after_a_rewind(folder, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = folder.folder / ".trackers" / "tensorboard" / "sft"

    def shown() -> EventAccumulator:
        found = EventAccumulator(str(events))
        found.Reload()
        return found

    section = folder.begin()
    folder.steps(0, 7)
    one = Follower("tensorboard", folder.folder, ["sft"], pytest.fail)
    assert one.look()
    running = shown()
    assert [s.step for s in running.Scalars("sft/loss")] == list(range(8)) and running.Scalars("sft/loss")[3].value == 0.25
    two = Follower("tensorboard", folder.folder, ["sft"], pytest.fail)  # after a kill
    assert two.look()
    Log(section, "sft").rewind(5)
    Log(section, "sft").metrics(6, {"sft/loss": 9.0})  # not bit-exact
    assert two.look()
    folder.finish(results={"loss": 1.5})
    assert two.look()
    assert [(s.step, s.value) for s in shown().Scalars("sft/loss")][5:] == [(5, pytest.approx(1 / 6)), (6, 9.0)]
    assert shown().Scalars("sft/loss")[0].wall_time == json.loads((section / "metrics.jsonl").read_text().split("\n")[0])["time"]
    assert "learning_rate" in str(shown().Tensors("sft/configuration")) and "1.5" in str(shown().Tensors("sft/results"))
    before = {p.name: p.stat().st_mtime_ns for p in events.iterdir()}
    assert Follower("tensorboard", folder.folder, ["sft"], pytest.fail).look() and before == {p.name: p.stat().st_mtime_ns for p in events.iterdir()}


# -- the process beside the run ----------------------------------------------------------------------------------------------------------


def recipe(folder: Folder, to: list[str] = ("wandb",)) -> runs.Run:
    return runs.Run(cfg.Recipe(run={"name": "demo", "dir": str(folder.folder.parent), "report_to": list(to)}, model={"name_or_path": "x"},
                               stages={"sft": cfg.StageConfig(stage="sft")}, path="demo.yaml"))


def test_a_run_is_followed_and_its_end_waits_for_the_last_numbers(folder, stand_ins, capfd, monkeypatch):
    with trackers.follow(recipe(folder)):
        folder.begin()
        folder.steps(0, 30)
    assert [step for _, step in rows(stand_ins)] == list(range(31)) and rows(stand_ins, "finish") == [[]]
    out = capfd.readouterr()
    assert "noise" not in out.out + out.err and "Numbers go to wandb" in out.out
    assert {line[0] for line in map(json.loads, stand_ins.read_text().splitlines())} - {os.getpid()}  # not in the run's process


def test_a_tracker_that_hangs_or_fails_leaves_the_run_alone(folder, stand_ins, capfd, monkeypatch, tmp_path):
    (tmp_path / "site" / "wandb.py").write_text("import time\ntime.sleep(600)\n")
    (tmp_path / "site" / "trackio.py").write_text("raise OSError(28, 'No space left on device')\n")
    monkeypatch.setattr(trackers, "LAST", 1.0)
    monkeypatch.setattr(trackers, "SOON", 3.0)
    began = time.monotonic()
    with trackers.follow(recipe(folder, ["wandb", "trackio"])):
        folder.begin()
        folder.steps(0, 3)
    assert time.monotonic() - began < 40  # not the ten minutes of a tracker that hangs, nor its own process's one
    out = capfd.readouterr().out
    assert out.count("trackio takes no numbers now") == 1 and "No space left on device" in out and "The last numbers go to wandb" in out
    with pytest.raises(ValueError, match="of the run"), trackers.follow(recipe(folder, ["trackio"])):
        raise ValueError("of the run")


def test_the_run_is_killed_and_its_numbers_still_arrive(folder, stand_ins, tmp_path):
    """kill -9 of the run's process: the one beside it sends what is on disk, and ends."""
    folder.begin()
    script = ("import os, signal, sys\nsys.path.insert(0, 'tests')\nfrom pathlib import Path\n"
              "from test_posttrain_trackers import Folder, recipe, trackers\nfolder = Folder(Path(sys.argv[1]))\n"
              "with trackers.follow(recipe(folder)):\n    folder.steps(0, 40)\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", script, str(folder.folder)], cwd=Path(__file__).parent.parent, timeout=120,
                          stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 60
    while not rows(stand_ins, "finish"):
        assert time.monotonic() < end, "it never ended"
        time.sleep(0.1)
    assert [step for _, step in rows(stand_ins)] == list(range(41))
    pid = json.loads(stand_ins.read_text().splitlines()[0])[0]
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.1)


def test_of_several_processes_one_tells(folder, monkeypatch):
    for key, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(trackers, "_begin", lambda *_: pytest.fail("a second process told its numbers"))
    with trackers.follow(recipe(folder)):
        pass


def test_run_and_the_stages_own_commands_tell_trackers(make_run, monkeypatch):
    run = make_run({"sft": {"data": "demonstrations"}})
    monkeypatch.setattr(trackers, "check", lambda recipe: None)
    began = []
    monkeypatch.setattr(trackers, "_begin", lambda name, run: began.append(name))
    monkeypatch.setattr(runs, "run_sections", lambda *_: began.append("run"))
    commands.run(Path(run.recipe.path), ["run.report_to=wandb"])
    monkeypatch.setattr(sys, "argv", ["sft", run.recipe.path, "run.report_to=wandb"])
    with pytest.raises(SystemExit):
        commands.stage_main("sft")
    assert began == ["wandb", "run"] * 2
