"""Tasks of lm-evaluation-harness on several models (paper A.4.7: TruthfulQA and ToxiGen; any other task by its name).

Each model is merged into a plain folder that the harness loads by itself, one model at a time; the folder goes away after its last task. The
harness and its tasks are looked for before any model is read. Results are the harness's own, with its standard errors; its samples are kept
in samples.jsonl. The unit of resume is one task on one model.

Its TruthfulQA (mc1, mc2) scores given answers and its ToxiGen asks whether a statement is hateful: neither is the paper's measure, which judges
answers that a model writes. That one is the stage bold with a classifier.

Written against lm-eval 0.4.13: https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/python-api.md
"""

import gc
import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from posttrain.chunks import through_chunks
from posttrain.errors import PosttrainError
from posttrain.export import write_model
from posttrain.export_config import ExportStage
from posttrain.merge import merged, whole
from posttrain.models import Roles, device, roles_for, source_of
from posttrain.runs import Section, write_lines

INSTALL = "Install the extra (pip install posttrain[eval], here: pip install -e '.[eval]'), or leave the section out."


def run(section: Section) -> None:
    config = section.config
    tasks, manager = find_tasks(section)
    roles = roles_for(section)  # its tokenizer, dtype and threads; no model yet
    section.log.say(f"{len(config.models)} models x {', '.join(tasks)}" + f", {config.limit} rows of each: a trial" * bool(config.limit))
    rows = [row for name in config.models for row in measure(section, roles, name, tasks, manager)]
    write_lines(section.folder / "samples.jsonl", [{"model": row["model"], "task": row["task"], **s} for row in rows for s in row.pop("samples")])
    told = {"harness": rows[0]["harness"], "chat": config.chat, "limit": config.limit, "models": {name: {} for name in config.models}}
    for row in rows:
        told["models"][row["model"]] |= row["measures"]
    section.finish(told)
    tell(section, told)


def find_tasks(section: Section) -> tuple[dict[str, str], object]:
    """Task -> what the harness is asked for (its name, or the path of its file), and the harness's index of tasks. Raises PosttrainError where the
    harness or a task is missing, or a task's data can't be read."""
    config, place = section.config, section.place
    if find_spec("lm_eval") is None:
        raise PosttrainError(place, "lm_eval (lm-evaluation-harness) is not installed", "the extra [eval]", INSTALL)
    from lm_eval.tasks import TaskManager

    wanted = {name: name for name in config.tasks} | {Path(name).stem: str(section.file(name)) for name in config.task_files}
    if not wanted:
        raise PosttrainError(f"{place}.tasks", "no task", "one or more", "Name a task, or a file in task_files.")
    manager = TaskManager()
    for name, spec in wanted.items():
        try:
            manager.load([spec])
        except Exception as e:  # an unknown name, a file that is none, a data set that is gated or out of reach: each has errors of its own
            words = str(e).strip().splitlines() or [type(e).__name__]
            raise PosttrainError(f"{place}.tasks", f"'{name}' cannot be loaded ({words[0][:200]})", "a task whose data can be read",
                                 "See `lm_eval ls tasks`; check the network, and the licence of a gated data set (`hf auth login`).") from None
    return wanted, manager


def measure(section: Section, roles: Roles, name: str, tasks: dict[str, str], manager) -> list[dict]:
    """One model's rows, one a task, by way of chunks/NAME-TASK.json."""
    config, folder, names = section.config, section.folder / "merged.tmp", list(tasks)

    def make(i: int, tick) -> list[dict]:
        if not folder.exists():
            write_merged(section, roles, config.models[name], folder)
        return [{"model": name, "task": names[i], **evaluated(section, folder, tasks[names[i]], manager)}]

    shutil.rmtree(folder, ignore_errors=True)  # another model's, or half of one, after a kill
    try:
        return through_chunks(section, [section.folder / "chunks" / f"{name}-{task}.json" for task in names], make, f"tasks of {name}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_merged(section: Section, roles: Roles, ref: str, folder: Path) -> None:
    """The model as a plain folder, in the section's dtype and unquantized, with the tokenizer and its template."""
    source, recipe = source_of(section, ref), section.recipe
    make = merged if source is not None and (source / "adapter_config.json").exists() else whole
    net = make(recipe.model, source, roles.dtype, recipe.path)
    folder.mkdir()
    write_model(net, roles.tokenizer, folder, ExportStage(stage="export", model=ref, temperature=0.0))
    del net
    free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluated(section: Section, folder: Path, spec: str, manager) -> dict:
    """What the harness finds for one task: {"harness", "measures", "samples"}."""
    import lm_eval

    config, seed = section.config, section.seed
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": section.manifest["decisions"]["dtype"], "trust_remote_code": False}, tasks=[spec],
        task_manager=manager, batch_size=config.batch, device=str(device()), limit=config.limit, apply_chat_template=config.chat,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
    free()
    samples = [{"of": task, **row} for task, rows in found.get("samples", {}).items() for row in rows]
    return {"harness": lm_eval.__version__, "measures": measures(found), "samples": json.loads(json.dumps(samples, default=str))}


def measures(found: dict) -> dict:
    """'TASK: METRIC' -> {"mean", "stderr", "low", "high", "n", "higher_is_better"}: the harness's value, its standard error and the normal 95 %
    interval that this gives. A filter other than 'none' stands in brackets. Groups come beside their tasks; what is no finite number is left out."""
    out = {}
    for task, told in found["results"].items():
        for key, value in told.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            error = told.get(f"{metric}_stderr,{kind}")
            error = float(error) if isinstance(error, (int, float)) else None
            out[f"{task}: {metric}" + f" ({kind})" * (kind != "none")] = {
                "mean": float(value), "stderr": error, "low": None if error is None else value - 1.96 * error,
                "high": None if error is None else value + 1.96 * error, "n": found.get("n-samples", {}).get(task, {}).get("effective"),
                "higher_is_better": found.get("higher_is_better", {}).get(task, {}).get(metric)}
    return out


def tell(section: Section, told: dict) -> None:
    for name, found in told["models"].items():
        words = [f"{what} {m['mean']:.3f}" + (f" ± {m['stderr']:.3f}" if m["stderr"] is not None else "") for what, m in found.items()]
        section.log.say(f"{name:>12}: {'; '.join(words)}")
