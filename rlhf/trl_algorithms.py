"""TRL's GRPO, RLOO and DPO in the place of PPO: `algorithm: grpo | rloo | dpo` of a ppo section. Policy and reference are roles on one
base as in PPO; GRPO and RLOO maximise the gated reward of the same Scorer; DPO learns from a data set of pairs. The steps, the sampling of
training answers and the losses are TRL's. Before and after, the policy answers the watched prompts under our sampler and is judged by
the same reward models, so that results.json and model/ are PPO's in form. Runs in one process; resumes from TRL's checkpoints.
"""

import math

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from posttrain import chat, distributed, stopping
from posttrain.data import naming, only
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.log import read_lines
from posttrain.models import Roles, roles_for
from posttrain.runs import Section
from posttrain.training import RoleTrainer, budget_of, complete, drop_old, newest_checkpoint, restore
from reward.score import Scorer
from rlhf import checkpoint, ppo
from rlhf.checkpoint import State
from rlhf.rollout import Encoded, merge_scores

DPO_BETA = 0.1  # Rafailov et al. 2023, section 6
NAMES = {"reward": "merged_reward", "reward_std": "merged_reward_std", "completions/mean_length": "answer_tokens"}  # ours for TRL's


def run(section: Section) -> None:
    check(section)
    config = section.config
    # 1. the roles, without a critic; prompts to train on and prompts to watch
    roles = roles_for(section)
    if roles.added:
        raise PosttrainError(f"{section.place}.algorithm", f"{config.algorithm} with model.add_tokens", "a vocabulary that is not extended",
                             "TRL reads the base's own vocabulary rows; use algorithm: ppo.")
    prompts, watched = ppo.split_prompts(section, roles)
    roles, scorer = ppo.load_roles(section, roles)
    done = newest_checkpoint(section.folder, section.log.say)
    per = per_iteration(config)
    iteration = int(done.name.split("-")[1]) // per if done else 0
    section.log.rewind(iteration if done else -1)

    # 2. how the starting policy does on prompts it never trains on
    state = State(start_rows=ppo.evaluate(section, roles, scorer, watched))
    if not done:
        section.log.metrics(0, ppo.watched_metrics(state.start_rows))

    # 3. TRL trains
    trainer = make_trainer(section, roles, scorer, prompts)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    with section.log.progress(config.iterations, config.algorithm.upper(), "iteration", iteration) as ticker:
        trainer.add_callback(_Watch(section, per, ticker))
        if iteration == config.iterations:  # cut off between the last step and the end
            restore(roles, roles["policy"], done)
        else:
            with stopping.deferred():
                trainer.train(resume_from_checkpoint=str(done) if done else None)

    # 4. how the last policy does; it is the output
    roles["policy"].net.eval()
    state.best_rows = ppo.evaluate(section, roles, scorer, watched)
    state.iteration = state.best_iteration = config.iterations
    if not any(r["step"] == config.iterations and "ppo/watched_kl" in r for r in read_lines(section.folder / "metrics.jsonl")):
        section.log.metrics(config.iterations, ppo.watched_metrics(state.best_rows))
    checkpoint.keep(section, roles, state.iteration)
    ppo.finish(section, roles, scorer, state)


def per_iteration(c) -> int:
    """Gradient steps of an iteration."""
    return c.batch_size // c.mini_batch_size * c.passes


def check(section: Section) -> None:
    c, place = section.config, section.place
    if distributed.world() > 1:
        raise PosttrainError(f"{place}.algorithm", f"{c.algorithm} in {distributed.world()} processes", "one process, or algorithm: ppo",
                             "Start it without the launcher.")
    if c.batch_size % c.mini_batch_size:
        raise PosttrainError(f"{place}.mini_batch_size", f"{c.mini_batch_size} does not divide batch_size {c.batch_size}", "a divisor",
                             "Change one of the two.")
    if c.algorithm != "dpo" and c.samples_per_prompt < 2:
        raise PosttrainError(f"{place}.samples_per_prompt", f"1 with {c.algorithm}", "at least 2: an answer is measured against the others of its prompt",
                             "Set samples_per_prompt, such as 8.")
    if (c.algorithm == "dpo") != bool(c.pairs):
        raise PosttrainError(f"{place}.pairs", f"{'nothing' if not c.pairs else ', '.join(c.pairs)} with {c.algorithm}",
                             "a data set of pairs for dpo, none for the others", "Name the pairs that dpo learns from, or leave them out.")


def make_trainer(section: Section, roles: Roles, scorer: Scorer, prompts: list[Encoded]):
    c = section.config
    net, per = roles["policy"].net, per_iteration(c)
    budget = budget_of(section, roles, roles["policy"])
    pairs = encode_pairs(section, roles) if c.algorithm == "dpo" else []
    longest = max(len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs) if pairs else \
        max(len(p.ids) for p in prompts) + c.max_new_tokens
    rows = max(n for n in range(1, c.mini_batch_size + 1) if c.mini_batch_size % n == 0 and (n == 1 or n * longest <= budget))
    rate = c.learning_rate or (ppo.ADAPTER_RATE if roles["policy"].adapter else ppo.PAPER_RATE)
    common = {
        "output_dir": str(section.folder), "max_steps": c.iterations * per, "per_device_train_batch_size": rows, "learning_rate": rate,
        "gradient_accumulation_steps": c.mini_batch_size // rows, "optim": "adamw_torch",
        "lr_scheduler_type": "constant", "weight_decay": c.weight_decay, "adam_beta1": c.adam_beta1, "adam_beta2": c.adam_beta2,
        "adam_epsilon": c.adam_epsilon, "max_grad_norm": c.max_grad_norm, "logging_steps": per, "logging_nan_inf_filter": False,
        "save_steps": c.save_steps * per, "report_to": "none", "disable_tqdm": True, "bf16": False,
        "use_cpu": roles.device.type == "cpu", "gradient_checkpointing": False, "seed": section.seed, "data_seed": section.seed,
        "remove_unused_columns": False, "dataloader_pin_memory": False, "disable_dropout": False,
    }
    reference = Reference(roles)
    if c.algorithm == "dpo":
        beta = c.kl_coef if "kl_coef" in c.model_fields_set else DPO_BETA
        trainer = _Pairs(model=net, ref_model=reference, args=DPOConfig(**common, beta=beta, max_length=None), train_dataset=Dataset.from_list(pairs),
                         processing_class=roles.tokenizer)
    else:
        config_class, cls = (GRPOConfig, _GRPO) if c.algorithm == "grpo" else (RLOOConfig, _RLOO)
        net.generation_config.eos_token_id = chat.end_of_turn(roles.tokenizer)
        args = config_class(**common, beta=0.0, epsilon=c.clip_range, num_iterations=c.passes, num_generations=c.samples_per_prompt, temperature=c.temperature,
                            generation_batch_size=c.batch_size, max_completion_length=c.max_new_tokens, generation_kwargs={"use_cache": True})
        trainer = cls(model=net, reward_funcs=reward_function(section, roles, scorer, prompts), args=args, processing_class=roles.tokenizer,
                      train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(prompts))]}))
        if c.kl_coef:  # with beta TRL would have loaded a second base
            add_fused_lm_head(reference, temperature=c.temperature)
            trainer.beta, trainer.ref_model = c.kl_coef, reference
        trainer.encoded = prompts
    trainer.roles, trainer.role = roles, roles["policy"]
    roles.use("policy")
    return trainer


def encode_pairs(section: Section, roles: Roles) -> list[dict]:
    """Rows of prompt_ids, chosen_ids, rejected_ids: the ids that the reward models are trained on. Too long ones are left out."""
    c, out, found = section.config, [], [p for name in section.config.pairs for p in section.run.data_of(name).train]
    for i, pair in enumerate(only(found, Pair, f"{section.place}.pairs")):
        with naming(found, i):
            row = {"prompt_ids": chat.encode_prompt(roles.tokenizer, pair.prompt),
                   **{f"{k}_ids": chat.encode_answer(roles.tokenizer, pair.prompt, getattr(pair, k)) for k in ("chosen", "rejected")}}
        if len(row["prompt_ids"]) <= c.max_prompt_tokens and max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= c.max_new_tokens:
            out.append(row)
    section.log.say(f"{len(out)} pairs; {len(found) - len(out)} longer than max_prompt_tokens or max_new_tokens left out")
    if not out:
        raise PosttrainError(f"{section.place}.pairs", "no pair is left", "at least one", "Raise max_prompt_tokens and max_new_tokens.")
    return out


def reward_function(section: Section, roles: Roles, scorer: Scorer, encoded: list[Encoded]):
    """The merged reward R_c (rlhf/gate.py) of TRL's answers, as raw scores: GRPO and RLOO measure an answer against its prompt's others."""
    c, told = section.config, set()
    end = chat.end_of_turn(roles.tokenizer)

    def merged_reward(prompts, completion_ids, trainer_state, log_metric, **_) -> list[float]:  # the names that TRL passes
        chosen = [encoded[int(p)] for p in prompts]
        raw = scorer([p.ids for p in chosen], [[ids] for ids in completion_ids])
        roles.use("policy")
        h, s = (torch.tensor(raw[name]).flatten() for name in ("helpfulness", "safety"))
        tagged = torch.tensor([p.prompt.safety for p in chosen])
        merged, by_threshold = merge_scores(scorer, "policy", h, s, tagged)
        finished = torch.tensor([ids[-1] == end for ids in completion_ids])
        for name, x in {"helpfulness": h, "safety": s, "routed_by_tag": tagged, "routed_by_threshold": by_threshold, "finished": finished}.items():
            log_metric(name, x.float().mean().item())
        iteration = trainer_state.global_step // per_iteration(c) + 1
        if iteration not in told and (iteration % c.sample_every == 0 or iteration == 1):
            section.log.samples([{"step": iteration, "prompt": chosen[i].prompt.messages, "answer": chat.decode(roles.tokenizer, completion_ids[i]),
                                  "helpfulness": h[i].item(), "safety": s[i].item(), "merged": merged[i].item()}
                                 for i in range(0, len(chosen), c.samples_per_prompt)[:4]])
        told.add(iteration)
        return merged.tolist()

    return merged_reward


class Reference(torch.nn.Module):
    """The frozen reference role as TRL wants it: a model of its own. It has no weights here; they lie on the policy's base."""

    def __init__(self, roles: Roles):
        super().__init__()
        self.roles, self.config = roles, roles["reference"].net.config

    def base_model(self, *args, **kwargs):
        out = self.roles.use("reference").body(*args, **kwargs)
        self.roles.use("policy")
        return out

    def get_output_embeddings(self):
        return self.roles["reference"].net.get_output_embeddings()


class _Prompts(RoleTrainer):
    """A prompt is the number of an encoded one, so that TRL's ids are those of every other stage."""

    def _tokenize_prompts(self, prompts):
        return [list(self.encoded[int(p)].ids) for p in prompts], None, {}


class _GRPO(_Prompts, GRPOTrainer):
    pass


class _RLOO(_Prompts, RLOOTrainer):
    pass


class _Pairs(RoleTrainer, DPOTrainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # token ids already


class _Watch(TrainerCallback):
    """Metrics once an iteration, progress, checksums."""

    def __init__(self, section: Section, per: int, ticker):
        self.section, self.per, self.ticker = section, per, ticker
        self.names = NAMES | ({"kl": "kl_per_token"} if section.config.algorithm == "grpo" else {})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" not in (logs or {}):
            return
        if not (math.isfinite(float(logs["grad_norm"])) and math.isfinite(float(logs["loss"]))):
            raise PosttrainError(self.section.place, f"loss {logs['loss']} and gradient norm {logs['grad_norm']} at step {state.global_step}", "finite numbers",
                                 "Lower learning_rate, or set model.dtype: float32; the last checkpoint is kept.")
        self.section.log.metrics(state.global_step // self.per, {f"ppo/{self.names.get(k, k)}": float(v) for k, v in logs.items()
                                                                       if k != "epoch" and not k.startswith("rewards/merged_reward/")})
        self.ticker.advance(1, note=f"loss {float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs):
        if stopping.asked() and state.global_step % self.per == 0:  # within an iteration TRL would forget the answers it is at
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **kwargs):
        complete(self.section.folder / f"checkpoint-{state.global_step}")
        drop_old(self.section.folder, checkpoint.KEPT)
