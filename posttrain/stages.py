"""The one table of stage kinds. A module is imported only when its stage runs, a config class when a recipe is read."""

from importlib import import_module
from typing import NamedTuple


class Stage(NamedTuple):
    config: str  # "module:Class", light: imports no torch
    module: str  # has run(section) and says what the stage is in its docstring
    makes: str  # "model", "data" (demonstrations), "pairs", "prompts", "tasks" or "report": what an @reference to it yields
    processes: bool = False  # may run in several at once (posttrain/distributed.py)
    sharded: bool = False  # may cut its models over them (posttrain/sharding.py)


STAGES: dict[str, Stage] = {
    "sft": Stage("sft.config:SFTStage", "sft.train", "model", processes=True, sharded=True),
    "gatt": Stage("sft.config:GattStage", "sft.gatt", "data"),
    "gatt_eval": Stage("sft.config:GattEvalStage", "sft.gatt_eval", "report"),
    "reward": Stage("reward.config:RewardStage", "reward.train", "model", processes=True, sharded=True),
    "rejection": Stage("rlhf.config:RejectionStage", "rlhf.rejection", "data", processes=True),
    "collect": Stage("rlhf.config:CollectStage", "rlhf.collect", "tasks", processes=True),
    "annotations": Stage("rlhf.config:AnnotationsStage", "rlhf.annotations", "pairs"),
    "ppo": Stage("rlhf.config:PPOStage", "rlhf.ppo", "model", processes=True),
    "evaluate": Stage("safety.config:EvaluateStage", "safety.evaluate", "report"),
    "distill": Stage("safety.config:DistillStage", "safety.distill", "data"),
    "redteam": Stage("safety.config:RedteamStage", "safety.redteam", "prompts"),
    "bold": Stage("safety.benchmark_config:BoldStage", "safety.bold", "report"),
    "diversity": Stage("safety.benchmark_config:DiversityStage", "safety.diversity", "report"),
    "lm_eval": Stage("safety.benchmark_config:LmEvalStage", "safety.lm_eval", "report"),
    "directions": Stage("safety.directions_config:DirectionsStage", "safety.directions", "report"),
    "export": Stage("posttrain.export_config:ExportStage", "posttrain.export", "model"),
}


def load_config_class(kind: str):
    module, _, name = STAGES[kind].config.partition(":")
    return getattr(import_module(module), name)


def load_module(kind: str):
    return import_module(STAGES[kind].module)
