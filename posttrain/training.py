"""What supervised fine-tuning and reward training share: a mixin that turns one step of a transformers Trainer into one global
batch, split into token-budget micro-batches and normalised over the whole step; checkpoints with checksums; exact resume.
"""

import math
import random
import shutil
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from posttrain.errors import PosttrainError
from posttrain.models import Role, Roles
from posttrain.packing import Tree, collate, token_budget
from posttrain.plan import warmup_steps
from posttrain.runs import Section, file_digest, read_json, write_json

CHECKSUMS = "checksums.json"


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
    """Tokens per micro-batch: the recipe's, or what memory allowed at the section's first start."""
    return getattr(section.config, "micro_batch_tokens", None) or section.decide("micro_batch_tokens", lambda: choose_budget(roles, role))


def choose_budget(roles: Roles, role: Role) -> int:
    """Tokens per micro-batch from free memory: bytes of kept activations per token, by hand count, a third of memory at most."""
    c = role.net.config.get_text_config()
    width = 4 if roles.dtype == torch.float32 else 2
    per_token = c.num_hidden_layers * (18 * c.hidden_size + 6 * getattr(c, "intermediate_size", 4 * c.hidden_size)) * width
    if roles.device.type == "cuda":
        return max(512, min(16384, int(torch.cuda.mem_get_info()[0] * 0.5 / per_token)))
    import psutil

    return max(256, min(2048, int(psutil.virtual_memory().available * 0.3 / per_token)))


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


def newest_checkpoint(folder: Path, say) -> Path | None:
    """The newest complete checkpoint-N; damaged or half-written newer ones are named and removed."""
    found = sorted((p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()), key=lambda p: int(p.name.split("-")[1]))
    for path in reversed(found):
        if sealed(path):
            return path
        say(f"{path.name} is incomplete or damaged; using the one before")
        shutil.rmtree(path)
    return None


# -- the trainer --------------------------------------------------------------------------------------------------------------


class _Steps(Dataset):
    """Item k is everything step k trains on: a list of micro-batches."""

    def __init__(self, trees, batches, budget, layout, pad):
        self.trees, self.batches, self.budget, self.layout, self.pad = trees, batches, budget, layout, pad

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, step):
        chosen = [self.trees[i] for i in self.batches[step]]
        out = []
        for group in token_budget(chosen, self.budget, self.layout):
            batch = collate(chosen, group, self.layout, self.pad)
            batch.items = [self.batches[step][i] for i in batch.items]
            out.append(batch)
        return out


def _only(items: list):
    return items[0]


class RoleTrainer:
    """Mixin before a transformers Trainer class: what it trains, saves and loads is one role (`self.roles`, `self.role`)."""

    def __init__(self, model, *args, **kwargs):
        """trl's trainers round what is trained over a quantized base to bfloat16, where updates of 1e-5 vanish: keep it as it was."""
        kept = [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(model, *args, **kwargs)
        for p, data in kept:
            p.data = data

    def _save(self, output_dir=None, state_dict=None):
        self.roles.save(self.role.name, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        restore(self.roles, self.role, Path(resume_from_checkpoint))

    def create_model_card(self, *args, **kwargs):
        return


class StepTrainer(RoleTrainer):
    """One global batch a step. The subclass gives `micro_loss` and `totals`; `bind` must be called once."""

    def bind(self, section: Section, roles: Roles, role: Role, trees: list[Tree], batches: list[list[int]], budget: int) -> None:
        self.section, self.roles, self.role = section, roles, role
        self.trees, self.batches, self.budget = trees, batches, budget
        self.step_stats: dict[str, float] = {}

    def totals(self, batch: list) -> dict[str, float]:
        """What the step's losses are divided by, counted over all its micro-batches."""
        raise NotImplementedError

    def micro_loss(self, batch, totals: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss of one micro-batch, already divided by the step's totals; numbers to add up for the log)."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        steps = _Steps(self.trees, self.batches, self.budget, self.roles.layout, self.roles.tokenizer.pad_token_id)
        return DataLoader(steps, batch_size=1, shuffle=False, collate_fn=_only)  # accelerate skips done batches through a batch sampler

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        totals, loss_sum, stats = self.totals(inputs), 0.0, {}
        for batch in inputs:
            with self.accelerator.autocast():  # accelerate wraps the model's forward alone; the roles call its body
                loss, numbers = self.micro_loss(batch.to(self.roles.device), totals)
            self.accelerator.backward(loss)
            loss_sum += loss.detach()
            for key, value in numbers.items():
                stats[key] = stats.get(key, 0.0) + value
        if not torch.isfinite(loss_sum):
            raise PosttrainError(self.section.place, f"the loss became {loss_sum.item()} at step {self.state.global_step + 1}", "a finite loss",
                                 "Lower learning_rate, or set model.dtype: float32; the last checkpoint is kept.")
        self.step_stats = stats
        self.step_tokens = sum(b.tokens for b in inputs)
        return loss_sum

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
            role.head.weight.data.copy_(tensors["base_model.model.score.weight"])
        return
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    if role.head is not None:
        role.head.weight.data.copy_(tensors.pop("score.weight"))
    own = dict(role.net.named_parameters())
    for key, value in tensors.items():
        own[key].data.copy_(value)


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
                                                   **t.pending_eval}.items()}
        self.clock = now
        t.section.log.metrics(state.global_step, row)
        self.ticker.advance(1, note=f"loss {row[f'{self.stage}/loss']:.3f}")

    def on_save(self, args, state, control, **kwargs):
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


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
        "save_total_limit": config.save_total_limit, "report_to": "none", "disable_tqdm": True, "bf16": autocast, "fp16": False, "tf32": None,
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
    checkpoint = newest_checkpoint(section.folder, section.log.say)
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
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        else:  # cut off between the last step and the end of the section
            restore(trainer.roles, trainer.role, checkpoint)
    trainer.roles.save(trainer.role.name, section.folder / "model")
