"""Kills at random moments of every section, each followed by the same command: the run must end in the bytes of a run that nobody killed.

python -m bench.soak                                          100 kills of recipes/tiny.yaml; about half an hour on two free cores
python -m bench.soak --kills 20 --sections v1_samples ppo     fewer, of sampling and PPO
python -m bench.soak --minutes 20                             as many as fit

The seed draws which section is hit and after what share of its time; the machine, and what else runs on it, decide which instruction that is.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.harness import ROOT, markdown, processor, start
from posttrain.errors import PosttrainError
from posttrain.log import read_lines, say
from posttrain.runs import digest, file_digest, provenance, read_json, write_json

TINY = ROOT / "recipes" / "tiny.yaml"
SECTIONS = ("sft", "reward_helpfulness", "reward_safety", "v1_samples", "v1", "ppo", "eval", "chat")
SAMPLING_AND_PPO = ("v1_samples", "ppo")
TOLD = ("samples.jsonl", "data.jsonl", "results.json")


def command(home: Path) -> list[str]:
    return [sys.executable, "-m", "posttrain", "run", str(TINY), f"run.dir={home}"]


def to_the_end(home: Path) -> Path:
    """The run's folder, finished."""
    done = subprocess.run(command(home), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise PosttrainError("bench: soak", f"the run in {home} fails: {(done.stdout + done.stderr)[-1500:]}", "a run that ends", "See the lines above.")
    return home / "tiny"


def digests(folder: Path, sections: tuple[str, ...]) -> dict[str, str]:
    """Of what a run leaves that must not depend on kills: all weights; of these sections also samples and what was measured, less where an export lies."""
    files = [p for p in [*sorted(folder.glob("*/model/*.safetensors")), *(folder / name / told for name in sections for told in TOLD)] if p.exists()]
    return {str(p.relative_to(folder)): digest({k: v for k, v in read_json(p).items() if k != "folder"}) if p.name == "results.json" else file_digest(p)
            for p in files}


def at_work(folder: Path) -> str | None:
    """The section that is begun and not done."""
    return next((p.parent.name for p in folder.glob("*/manifest.json") if not (p.parent / "DONE").exists()), None)


def reached(folder: Path, section: str) -> str:
    """How far a section has come by its files."""
    if section == "v1_samples":
        return f"{len(list((folder / section / 'chunks').glob('*.json')))} chunks on disk"
    if section == "eval":
        return f"the answers of {len(list((folder / section).glob('answers-*.json')))} models on disk"
    steps = [r["step"] for r in read_lines(folder / section / "metrics.jsonl")]
    return f"{max(steps)} {'iterations' if section == 'ppo' else 'steps'} told" if steps else "nothing told yet"


def kill(home: Path, target: str, seconds: float) -> dict | None:
    """Give the command and kill it that long after `target` begins. What was hit, or None where the run had ended before."""
    folder, log = home / "tiny", home / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command(home), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and not any(f"] {target} (" in line and "skipped" not in line for line in log.read_text().splitlines()):
            time.sleep(0.01)
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise PosttrainError("bench: soak", f"the run stopped by itself: {log.read_text()[-1500:]}", "a run that ends or is killed", "See the lines above.")
    section = at_work(folder)
    return {"section": section or "between sections", "reached": reached(folder, section) if section else "", "seconds": round(seconds, 2)}


def soak(straight: Path, work: Path, kills: int, seed: int, sections: tuple[str, ...] = SAMPLING_AND_PPO, minutes: float = float("inf")) -> dict:
    """Kill runs in `work` until `sections` were hit `kills` times in all, at least once each, a new run when one has ended; compare each
    with the finished run `straight`. Kills that miss, in the sections between, are told and not counted. After so many minutes no kill is begun."""
    rng, expected, told, ends = random.Random(seed), digests(straight, sections), [], []
    spans = {name: read_json(straight / name / "manifest.json")["seconds"] for name in sections}
    before, until = SECTIONS[:min(map(SECTIONS.index, sections))], time.time() + 60 * minutes

    def wanting() -> bool:
        hits = [k["section"] for k in told if k["section"] in sections]
        return (len(hits) < kills or set(hits) != {*sections}) and time.time() < until

    while wanting():
        home = work / f"run-{len(ends) + 1}"
        home.mkdir(parents=True)
        for name in before:  # not what is killed here: taken from the straight run
            shutil.copytree(straight / name, home / "tiny" / name)
        while wanting() and (left := [name for name in sections if not (home / "tiny" / name / "DONE").exists()]):
            target = rng.choice(left[:2])
            hit = kill(home, target, rng.uniform(0, spans[target]))
            if not hit or hit["section"] != target:  # too late: the machine is quicker now, or less was left
                spans[target] /= 2
            elif told and told[-1].items() >= {"run": len(ends) + 1, "section": target, "reached": hit["reached"]}.items():  # no way forward: slower
                spans[target] *= 2
            if hit:
                told.append({"run": len(ends) + 1, **hit})
                say(f"  run {len(ends) + 1}: killed in {hit['section']}, {hit['reached'] or 'not counted'}")
        got = digests(to_the_end(home), sections)
        ends.append({"run": len(ends) + 1, "kills": sum(k["run"] == len(ends) + 1 for k in told),
                     "different": sorted(f for f in {*got, *expected} if got.get(f) != expected.get(f))})
    return {"seed": seed, "sections": list(sections), "hits": sum(k["section"] in sections for k in told), "kills": told, "runs": ends, "sha256": expected,
            "identical": not any(e["different"] for e in ends)}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="that hit one of the sections")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="that are killed; default all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no kill is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        say("a run without kills ...")
        told = soak(to_the_end(work / "straight"), work, args.kills, args.seed, tuple(args.sections), args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "soak.json", {"benchmark": "soak", **provenance(), "processor": processor(), "recipe": TINY.name, **told})
    rows = [[str(k["run"]), k["section"], k["reached"], f"{k['seconds']:.2f}"] for k in told["kills"]]
    print(markdown(["run", "killed in", "which had reached", "seconds into the target"], rows))
    different = [f"run {e['run']}: {', '.join(e['different'])}" for e in told["runs"] if e["different"]]
    print(f"\n{told['hits']} kills of {', '.join(args.sections)} in {len(told['runs'])} runs; " + ("every run ended in the same "
          f"{len(told['sha256'])} files as the run without kills" if told["identical"] else f"DIFFERENT: {'; '.join(different)}"))
    return 0 if told["identical"] else 1


if __name__ == "__main__":
    start(main)
