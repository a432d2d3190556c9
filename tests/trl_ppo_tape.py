"""TRL 1.12's PPO, unpatched, in a process of its own: what it samples and computes in one iteration, and the weights it ends with.

python tests/trl_ppo_tape.py FOLDER, with TRL 1.12 first on PYTHONPATH (the installed TRL has no PPO any more). FOLDER holds task.json
(base, prompts as ids, stop token, settings) and the adapters policy/, critic/ and reward/ in peft's layout; tape.safetensors,
tape.json, policy-after/ and critic-after/ are written into it.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

WHOLE = ("query_responses", "logprobs", "ref_logprobs", "values", "scores", "sequence_lengths", "returns", "padding_mask")


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    torch.manual_seed(task["seed"])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")

    def adapted(cls, name: str, trainable: bool, **extra) -> PeftModel:
        base = cls.from_pretrained(task["base"], dtype=torch.float32, **extra)
        return PeftModel.from_pretrained(base, folder / name, is_trainable=trainable)

    policy = adapted(AutoModelForCausalLM, "policy", True)
    critic = adapted(AutoModelForSequenceClassification, "critic", True, num_labels=1)
    reward = adapted(AutoModelForSequenceClassification, "reward", False, num_labels=1).merge_and_unload()
    n = len(task["prompts"])
    arguments = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=n, gradient_accumulation_steps=1, total_episodes=n, num_mini_batches=1,
        local_rollout_forward_batch_size=n, num_sample_generations=0, stop_token_id=task["stop"], missing_eos_penalty=None,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", seed=task["seed"], **task["settings"])
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": task["rates"][name]}
              for name, model in (("policy", policy), ("critic", critic))]
    optimizer = torch.optim.AdamW(groups, **task["adamw"])
    trainer = PPOTrainer(
        arguments, tokenizer, model=policy, ref_model=None, reward_model=reward, train_dataset=Dataset.from_dict({"input_ids": task["prompts"]}),
        value_model=critic.base_model.model, optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)))

    tape, real = {}, ppo_trainer.masked_whiten

    def whiten(values, mask, shift_mean=True):
        """The advantages' whitening is called from `train`, whose variables are the tape."""
        result, train = real(values, mask, shift_mean), sys._getframe(1).f_locals
        tape.update({name: train[name].clone() for name in WHOLE}, raw_advantages=values.clone(), advantages=result * mask)
        tape["context_length"] = torch.tensor(train["context_length"])
        return result

    ppo_trainer.masked_whiten = whiten
    trainer.train()
    save_file({k: v.contiguous() for k, v in tape.items()}, folder / "tape.safetensors")
    (folder / "tape.json").write_text(json.dumps(next(r for r in trainer.state.log_history if "loss/policy_avg" in r)), encoding="utf-8")
    policy.save_pretrained(folder / "policy-after")
    critic.save_pretrained(folder / "critic-after")


main(Path(sys.argv[1]))
