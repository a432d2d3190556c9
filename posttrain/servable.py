"""A version as a folder that any engine serves as it is: adapters merged, the template of training in it, decoding that samples and stops where a
turn ends. Such a folder is used where it lies; of any other one a fitting one is made in the cache, once, and used again while nothing changed."""

import fcntl
import json
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from posttrain import builtin
from posttrain.export_config import ExportStage
from posttrain.runs import digest, folder_digest, write_json
from posttrain.versions import Version

FORMAT = 1  # of what is written; raised when earlier folders must not be used any more


def folder_of(version: Version) -> tuple[Path, str, str]:
    """(the folder, the dtype to serve it in, what was done in words). In a process of its own, whose memory is free again afterwards."""
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        return alone.submit(_folder_of, version).result()


def _folder_of(version: Version) -> tuple[Path, str, str]:
    from posttrain import models
    from posttrain.__main__ import quiet_libraries

    quiet_libraries()
    models.set_threads(None)
    config = version.config
    dtype = models.choose_dtype(config)
    base = Path(models.resolve(config.name_or_path, version.name))
    if version.folder is None and base.is_dir() and _fits(base, config):
        return base.resolve(), dtype, ""
    sources = {"base": folder_digest(base) if base.is_dir() else None, "adapter": folder_digest(version.folder) if version.folder else None}
    told = {"format": FORMAT, "config": config.model_dump(), "dtype": dtype, **sources}
    name = f"{re.sub('[^A-Za-z0-9._-]+', '-', version.name).strip('-.')}-{digest(told)[:16]}"
    target = builtin.cache_root() / "served" / name
    with _lock(target):
        if (target / "config.json").exists():
            return target, dtype, f"used again: {target}"
        work = target.with_name(f".{name}.tmp")
        shutil.rmtree(work, ignore_errors=True)  # of a start that was killed
        work.mkdir()
        linked = version.folder is None and base.is_dir()
        (_dress if linked else _write)(version, base, dtype, work)
        os.sync()  # the folder's name stands for whole files
        work.rename(target)
    size = sum(p.stat().st_size for p in target.iterdir() if not p.is_symlink()) / 1e9
    how = "linked" if linked else "merged" if version.folder else "written"
    return target, dtype, f"{how} into {target} ({size:,.2f} GB; delete it when it is no longer needed)"


@contextmanager
def _lock(target: Path):
    """One process at a time makes a folder; the lock dies with it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fits(folder: Path, config) -> bool:
    """Whether a whole model has its template, samples by default, and stops where its template ends a turn."""
    from posttrain import chat, models
    from posttrain.runs import read_json

    told = read_json(folder / "generation_config.json")
    stops = told.get("eos_token_id")
    has_template = (folder / "chat_template.jinja").exists() or "chat_template" in read_json(folder / "tokenizer_config.json")
    if config.chat_template or not has_template or not told.get("do_sample"):
        return False
    tokenizer = models.load_tokenizer(config, str(folder))
    return chat.end_of_turn(tokenizer) in (stops if isinstance(stops, list) else [stops])


def _write(version: Version, base: Path, dtype: str, work: Path) -> None:
    import torch

    from posttrain import export, merge
    from posttrain.speaker import tokenizer_of

    tokenizer, dtype = tokenizer_of(version), getattr(torch, dtype)
    if version.folder:
        net = merge.merged(version.config, version.folder, dtype, version.name)
    else:
        net = merge.whole(version.config, None, dtype, version.name)
    export.write_model(net, tokenizer, work, decoding())


def _dress(version: Version, base: Path, dtype: str, work: Path) -> None:
    """Links to the weights, beside them the tokenizer with its template and decoding that fits."""
    from transformers import GenerationConfig

    from posttrain import export
    from posttrain.runs import read_json
    from posttrain.speaker import tokenizer_of

    tokenizer = tokenizer_of(version)
    for path in [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]:
        (work / path.name).symlink_to(path.resolve())
    mine = export.generation_config(tokenizer, decoding())
    before = GenerationConfig.from_dict(read_json(base / "generation_config.json"))
    if before.do_sample:
        mine.temperature, mine.top_p = before.temperature, before.top_p
    mine.save_pretrained(work)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(work)
    told = json.loads((base / "config.json").read_text(encoding="utf-8"))
    stops = {"eos_token_id": mine.eos_token_id, "pad_token_id": mine.pad_token_id}
    write_json(work / "config.json", told | stops)  # last: its presence means that the folder is whole


def decoding() -> ExportStage:
    """As `export` writes it by default, which is what `chat` uses."""
    return ExportStage(stage="export", model="base")
