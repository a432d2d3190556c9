"""What supervised fine-tuning and reward training share: a mixin that turns one step of a transformers Trainer into one global
batch, split into token-budget micro-batches and normalised over the whole step; checkpoints with checksums; exact resume.
"""

import math
import random
import resource
import shutil
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from posttrain import adapted, distributed, memory, sharding, stopping
from posttrain.errors import PosttrainError
from posttrain.models import Role, Roles
from posttrain.packing import MicroBatch, Tree, collate, token_budget
from posttrain.plan import warmup_steps
from posttrain.runs import Section, file_digest, read_json, write_json
from posttrain.shape import shape_of
from posttrain.zero import Zero

CHECKSUMS = "checksums.json"
LOGS = ("metrics.jsonl", "samples.jsonl")


# -- batches ------------------------------------------------------------------------------------------------------------------


def plan_batches(rows: int, batch: int, steps: int, seed: int, bins: list[list[int]] | None = None) -> list[list[int]]:
    """Item indices of every optimizer step: each epoch shuffled anew, cut into `batch` units of one item (or one bin of items)."""
    bins = bins or [[i] for i in range(rows)]
    rng, stream = random.Random(seed), []
    while len(stream) < steps * batch:
        order = list(range(len(bins)))
        rng.shuffle(order)
        stream += order
    out = []
    for s in range(steps):
        units = stream[s * batch:(s + 1) * batch]
        out.append([i for u in units for i in bins[u]])
    return out


def bin_by_length(lengths: list[int], width: int, seed: int) -> list[list[int]]:
    """Documents -> bins of at most `width` tokens (next-fit over a shuffled order; a longer document goes alone)."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    bins, used = [], width + 1
    for i in order:
        if used + lengths[i] > width:
            bins.append([])
            used = 0
        bins[-1].append(i)
        used += lengths[i]
    return bins


def budget_of(section: Section, roles: Roles, role: Role) -> int:
    """Tokens per micro-batch: the recipe's, or what memory allowed at the section's first start; fewer where that was too many (`smaller_budget`)."""
    if wanted := getattr(section.config, "micro_batch_tokens", None):
        return min(wanted, section.manifest.get("decisions", {}).get("micro_batch_tokens", wanted))
    return section.decide("micro_batch_tokens", lambda: choose_budget(roles, role))


def choose_budget(roles: Roles, role: Role) -> int:
    """Tokens per micro-batch from the memory that is free for this process (posttrain.memory): half of a GPU's, a third of a CPU's, less what
    the gradients and the optimizer of trained roles will take."""
    shape = shape_of(role.net.config.to_dict())
    full, trained = role.adapter is None, [p for r in roles.roles.values() for p in r.parameters()]
    width = 4 if roles.dtype == torch.float32 else 2
    way = memory.Way(width, full=full, rank=0 if role.lora is None else role.lora.r, quantized=roles.config.quantization != "none", rows=bool(roles.added))
    coming = 3 * sum(sharding.here(p).numel() * p.element_size() for p in trained)
    if roles.zero:  # the network is still whole in main memory
        stays = sum(p.numel() * p.element_size() for p in role.net.parameters())
        coming = coming // distributed.world() + stays // (distributed.world() if roles.zero == 3 else 1)
    if roles.device.type == "cuda":
        sharing = -(-distributed.on_this_machine() // torch.cuda.device_count())
        return memory.micro_batch(shape, way, (torch.cuda.mem_get_info()[0] / sharing - coming) * 0.5)
    import psutil

    per_token = shape.layers * memory.layer(shape, way)
    free = psutil.virtual_memory().available / distributed.on_this_machine() - coming
    return max(256, min(2048, int(free * 0.3 / per_token)))


def memory_taken() -> float:
    """GB that this process held at most so far: of its GPU's memory where it has one, else of main memory."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def smaller_budget(section: Section, budget: int, batches: list[MicroBatch]) -> int:
    """Tokens per micro-batch after the GPU's memory ran out in one of these: half of what the largest took, from now on.

    The manifest says so. Raises PosttrainError where each of them holds a single row already."""
    largest = max(b.input_ids.numel() for b in batches)
    if all(len(set(b.items)) == 1 for b in batches):
        keys = [k for k in ("max_length", "max_prompt_tokens", "max_new_tokens") if hasattr(section.config, k)]
        more = "set activation_checkpointing: true, " if getattr(section.config, "activation_checkpointing", True) is False else ""
        raise PosttrainError(section.place, f"the GPU's memory ran out in a micro-batch of one row of {largest} tokens", "room for one row",
                             f"Lower {' or '.join(keys)}, {more}or quantize the base (model.quantization: nf4); the last checkpoint is kept.")
    smaller = max(1, min(budget, largest) // 2)
    section.manifest.setdefault("decisions", {})["micro_batch_tokens"] = smaller
    section.inexact(f"the GPU's memory ran out in a micro-batch of {largest} tokens: {smaller} from now on")
    adapted.forget()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return smaller


# -- checkpoints --------------------------------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Write the checksums of a checkpoint's files, last: a checkpoint without them does not count."""
    files = {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != CHECKSUMS}
    write_json(folder / CHECKSUMS, files)


def sealed(folder: Path) -> bool:
    try:
        sums = read_json(folder / CHECKSUMS)
        return bool(sums) and all((folder / n).is_file() and file_digest(folder / n) == d for n, d in sums.items())
    except PosttrainError:
        return False


def checkpoints(folder: Path) -> list[Path]:
    """A section's checkpoint-N, oldest first, whether complete or not."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()), key=lambda p: int(p.name.split("-")[1]))


def newest_checkpoint(folder: Path, say) -> Path | None:
    """The newest complete checkpoint-N; damaged or half-written newer ones are named and removed. The logs become what they were then."""
    for path in reversed(checkpoints(folder)):
        if sealed(path):
            _put_back_logs(path, say)
            return path
        say(f"{path.name} is incomplete or damaged; using the one before")
        shutil.rmtree(path)
    return None


def complete(folder: Path) -> None:
    """Make a written checkpoint count: a copy of the section's logs, and the seal."""
    for name in LOGS:
        if (folder.parent / name).exists():
            shutil.copyfile(folder.parent / name, folder / name)
    seal(folder)


def drop_old(folder: Path, keep: int) -> None:
    """All checkpoints but the newest `keep` go. After the newest is complete: a kill in between leaves one more, never one less."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def _put_back_logs(checkpoint: Path, say) -> None:
    """A log that no longer begins as the checkpoint has it was damaged since."""
    for name in LOGS:
        path, kept = checkpoint.parent / name, checkpoint / name
        if kept.exists() and not (path.exists() and path.read_bytes().startswith(kept.read_bytes())):
            say(f"{name} is missing or damaged; it is put back as {checkpoint.name} has it")
            shutil.copyfile(kept, path)


# -- the trainer --------------------------------------------------------------------------------------------------------------


def micro_batches(trees: list[Tree], items: list[int], budget: int, layout: str, pad: int) -> list[MicroBatch]:
    """The items of a step, numbers of trees, in micro-batches of at most `budget` tokens. `items` of a micro-batch: those numbers."""
    chosen = [trees[i] for i in items]
    out = []
    for group in token_budget(chosen, budget, layout) if chosen else []:
        batch = collate(chosen, group, layout, pad)
        batch.items = [items[i] for i in batch.items]
        out.append(batch)
    return out


def _only(items: list):
    return items[0]


class RoleTrainer:
    """Mixin before a transformers Trainer class: what it trains, saves and loads is one role (`self.roles`, `self.role`)."""

    zero: Zero | None = None  # what owns gradients and steps under DeepSpeed

    def __init__(self, model, *args, **kwargs):
        """trl's trainers round what is trained over a quantized base to bfloat16, where updates of 1e-5 vanish: keep it as it was."""
        kept = [(p, p.data) for p in model.parameters() if p.requires_grad and not sharding.is_cut(p)]
        super().__init__(model, *args, **kwargs)
        for p, data in kept:
            p.data = data

    def create_accelerator_and_postprocess(self):
        """Nothing is wrapped in DistributedDataParallel: the roles' bodies are called, and gradients are added by hand (posttrain/distributed.py)."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **kwargs: model

    def create_optimizer(self, *args, **kwargs):
        sharding.rest(self.role.net)  # of the slices, not of what an evaluation has gathered
        return super().create_optimizer(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        self.roles.save(self.role.name, Path(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.roles.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        whole = self.zero.optimizer_state() if self.zero else sharding.whole_optimizer(self.optimizer)
        if distributed.is_main():
            torch.save(whole, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.roles.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint)
        told = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        if self.zero:
            self.zero.load_optimizer_state(told)
        else:
            sharding.fill_optimizer(self.optimizer, told)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self.zero:  # what `start_zero` put in before
            restore(self.roles, self.role, Path(resume_from_checkpoint))

    def start_zero(self, checkpoint: Path | None) -> None:
        """Hand the network to DeepSpeed (posttrain/zero.py), with the checkpoint's weights, of which it makes its own copies."""
        if checkpoint:
            restore(self.roles, self.role, checkpoint)
        self.create_optimizer()
        self.accelerator.prepare_optimizer = lambda optimizer, **kwargs: optimizer
        self.zero = Zero(self.role.net, self.optimizer, self.roles.zero, self.args.max_grad_norm, self.roles.device, self.section.place)
        self.optimizer = self.zero.groups

    def _clip_grad_norm(self, model):
        return None if self.zero else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """Before the norm is told ZeRO clips and steps."""
        return self.zero.step() if self.zero else super()._get_grad_norm(model, grad_norm)

    def create_model_card(self, *args, **kwargs):
        return


class StepTrainer(RoleTrainer):
    """One global batch a step, shared by all processes. The subclass gives `micro_loss` and `totals`; `bind` must be called once."""

    def bind(self, section: Section, roles: Roles, role: Role, trees: list[Tree], batches: list[list[int]], budget: int) -> None:
        self.section, self.roles, self.role = section, roles, role
        self.trees, self.batches, self.budget = trees, batches, budget
        self.step_stats: dict[str, float] = {}

    def totals(self, batch: list) -> dict[str, float]:
        """What the step's losses are divided by, counted over these micro-batches."""
        raise NotImplementedError

    def micro_loss(self, batch, totals: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss of one micro-batch, already divided by the step's totals over all processes; numbers to add up for the log)."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        """Of the steps' numbers: a step's micro-batches are made when it is trained on, with the budget that holds then."""
        numbers = range(len(self.batches))
        return DataLoader(numbers, batch_size=1, shuffle=False, collate_fn=_only)  # accelerate skips done steps through a batch sampler

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        totals, smaller = None, 0
        while True:
            batches = self._micro_batches(distributed.share_by_length(self.batches[inputs], self.trees))
            totals = totals or distributed.add_numbers(self.totals(batches))
            try:
                stats = self._gradients(batches, totals, self._padding(inputs, len(batches)))
                break
            except torch.OutOfMemoryError:
                if self.roles.sharded:  # the others wait for this one's part of a layer: none can begin again without them
                    raise
                model.zero_grad(set_to_none=True)
            smaller = 1
            self.budget = smaller_budget(self.section, self.budget, batches)  # here, where the exception and what it held are gone
        if not self.zero:
            distributed.add_gradients(self.role.parameters())
        self.step_stats = distributed.add_numbers(stats)
        told = distributed.add_numbers({"tokens": sum(b.tokens for b in batches), "smaller": smaller})
        self.step_tokens = told["tokens"]
        if told["smaller"] and distributed.world() > 1:
            self.budget = self.section.settle("micro_batch_tokens")
        loss = self.step_stats["loss"]
        if not math.isfinite(loss):
            raise PosttrainError(self.section.place, f"the loss became {loss} at step {self.state.global_step + 1}", "a finite loss",
                                 "Lower learning_rate, or set model.dtype: float32; the last checkpoint is kept.")
        return torch.tensor(loss, device=self.roles.device)

    def _micro_batches(self, items: list[int]) -> list[MicroBatch]:
        return micro_batches(self.trees, items, self.budget, self.roles.layout, self.roles.tokenizer.pad_token_id)

    def _padding(self, step: int, own: int) -> list[MicroBatch]:
        """Micro-batches that count for nothing, as many as this process has fewer than the one with the most: where models are cut, all gather each
        layer equally often. They hold the step's shortest item."""
        if not self.roles.sharded:
            return []
        return self._micro_batches([min(self.batches[step], key=lambda i: len(self.trees[i]))]) * (max(distributed.gather(own)) - own)

    def _gradients(self, batches: list[MicroBatch], totals: dict, padding: list[MicroBatch]) -> dict[str, float]:
        """Of this process's share of a step, and its numbers for the log."""
        stats: dict[str, float] = {}
        whole = [*batches, *padding]
        for n, batch in enumerate(whole):
            compute = partial(self._loss, batch, totals, stats if n < len(batches) else None)
            if self.zero:
                self.zero.gradients(compute, last=n == len(whole) - 1)
            else:
                self.accelerator.backward(compute())
        return stats

    def _loss(self, batch: MicroBatch, totals: dict, stats: dict[str, float] | None) -> torch.Tensor:
        """Of a micro-batch, whose numbers are added to stats. None: it counts for nothing."""
        with self.accelerator.autocast():  # accelerate wraps the model's forward alone; the roles call its body
            loss, numbers = self.micro_loss(batch.to(self.roles.device), totals)
        if stats is None:
            return loss * 0
        for key, value in numbers.items():
            stats[key] = stats.get(key, 0.0) + value
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def floating_point_ops(self, inputs):
        return 0

    def _track_num_input_tokens(self, inputs):
        return


def restore(roles: Roles, role: Role, folder: Path) -> None:
    """Put a checkpoint's tensors back into a loaded role, in place."""
    from safetensors.torch import load_file

    if role.adapter:
        tensors = load_file(folder / "adapter_model.safetensors")
        roles._fill(role.name, tensors, folder)
        if role.head is not None:
            sharding.fill(role.head.weight, tensors["base_model.model.score.weight"])
        return
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    sharding.rest(role.net)
    if role.head is not None:
        sharding.fill(role.head.weight, tensors.pop("score.weight"))
    own = dict(role.net.named_parameters())
    for key, value in tensors.items():
        sharding.fill(own[key], value)


class _Watch(TrainerCallback):
    """Metrics, progress, held-out evaluation and checksums."""

    def __init__(self, trainer, total: int, stage: str, evaluate, eval_steps: set[int], ticker):
        self.trainer, self.stage, self.evaluate, self.eval_steps, self.ticker = trainer, stage, evaluate, eval_steps, ticker
        self.clock = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        t = self.trainer
        if state.global_step in self.eval_steps or state.global_step == state.max_steps:
            t.pending_eval = self.evaluate()
        else:
            t.pending_eval = {}
        told = distributed.gather((stopping.asked(), memory_taken()))
        t.peak_memory = max(taken for _, taken in told)
        if any(asked for asked, _ in told):
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        t = self.trainer
        if "grad_norm" not in (logs or {}):
            return
        if not math.isfinite(float(logs["grad_norm"])):  # before the step's weights can reach a checkpoint
            raise PosttrainError(t.section.place, f"the gradient's norm became {float(logs['grad_norm'])} at step {state.global_step}",
                                 "a finite norm", "Lower learning_rate, or set model.dtype: float32; the last checkpoint is kept.")
        now = time.time()
        row = {f"{self.stage}/{k}": v for k, v in {**t.log_row(t.step_stats), "learning_rate": logs["learning_rate"],
                                                   "grad_norm": float(logs["grad_norm"]),
                                                   "tokens_per_second": round(t.step_tokens / max(now - self.clock, 1e-9), 1),
                                                   "peak_memory_gb": t.peak_memory, **t.pending_eval}.items()}
        self.clock = now
        t.section.log.metrics(state.global_step, row)
        self.ticker.advance(1, note=f"loss {row[f'{self.stage}/loss']:.3f}")

    def on_save(self, args, state, control, **kwargs):
        section = self.trainer.section
        distributed.agree(self.trainer.role.parameters(), section.place)  # all have written theirs when this returns
        if distributed.is_main():
            complete(section.folder / f"checkpoint-{state.global_step}")
            drop_old(section.folder, section.config.save_total_limit)
        distributed.wait()


def training_arguments(config, section: Section, roles: Roles, role: Role, steps: int, default_lr: float) -> dict:
    """TrainingArguments' values for one of our stages; the same for SFTConfig and RewardConfig."""
    autocast = role.adapter is None and roles.dtype == torch.float32 and section.recipe.model.dtype == "auto" and _bf16_autocast(roles)
    return {
        "output_dir": str(section.folder), "max_steps": steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "learning_rate": config.learning_rate or default_lr, "weight_decay": config.weight_decay, "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2, "adam_epsilon": config.adam_epsilon, "max_grad_norm": config.max_grad_norm, "optim": "adamw_torch",
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": config.min_lr_ratio},
        "warmup_steps": warmup_steps(steps, config.warmup_ratio),
        "logging_strategy": "steps", "logging_steps": 1, "logging_nan_inf_filter": False, "save_strategy": "steps", "save_steps": config.save_steps,
        "report_to": "none", "disable_tqdm": True, "bf16": autocast, "fp16": False, "tf32": None,
        "use_cpu": roles.device.type == "cpu", "gradient_checkpointing": config.activation_checkpointing, "seed": section.seed, "data_seed": section.seed,
        "remove_unused_columns": False, "dataloader_num_workers": 0, "dataloader_pin_memory": False, "max_length": None,
    }


def _bf16_autocast(roles: Roles) -> bool:
    """Full fine-tuning keeps float32 weights; on hardware with bf16 its matrix products run in bf16."""
    from posttrain.config import ModelConfig
    from posttrain.models import choose_dtype

    return choose_dtype(ModelConfig(name_or_path="x", lora={})) == "bfloat16" and roles.device.type == "cuda"


def fit(trainer, section: Section, stage: str, evaluate, eval_every: int) -> None:
    """Train to the end from wherever the section stands. evaluate() -> {'held_out_...': number}."""
    steps = len(trainer.batches)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    section.same_processes()
    checkpoint = distributed.from_main(lambda: newest_checkpoint(section.folder, section.log.say))
    if trainer.roles.zero:
        trainer.start_zero(checkpoint)
    done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    section.log.rewind(done if checkpoint else -1)
    if not checkpoint:
        section.log.metrics(0, {f"{stage}/{k}": v for k, v in evaluate().items()})
    else:
        section.log.say(f"going on after step {done} of {steps}")
    eval_steps = set(range(eval_every, steps, eval_every))
    with section.log.progress(steps, "training", "step", done) as ticker:
        trainer.add_callback(_Watch(trainer, steps, stage, evaluate, eval_steps, ticker))
        if done < steps:
            with stopping.deferred():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if distributed.world() > 1:
                stopping.check_together()
        else:  # cut off between the last step and the end of the section
            restore(trainer.roles, trainer.role, checkpoint)
    if distributed.is_main() or trainer.roles.sharded:  # of a model that is cut all give their part
        trainer.roles.save(trainer.role.name, section.folder / "model")
    distributed.wait()
