"""vLLM behind the interface of `generate.sample`: `engine: vllm` of a section that samples, where it is installed (extra [vllm]).

vLLM runs in a process of its own (watch.py sees to its end), on the same GPU, with one copy of the base that never changes. What changes is the
adapter: a role's is written as a peft folder whenever its weights are no longer those vLLM has, and asked for under a new name and number; vLLM
keeps one adapter in memory and drops the one before. What it keeps of a prompt belongs to an adapter's name and folder, so a new adapter reads
none of it.

Every sample is a request of its own with a seed from a table made beforehand, as in our loop. Its log-probabilities still depend in their
last bits on which requests share a step, so a section sampled by vLLM is not exact. PPO's update does not see them: it recomputes
log-probabilities in the trainer's mode.

Written against vLLM 0.33.0 (extra [vllm]: from 0.33). Its tests use a stand-in; with the real 0.32.0 on a CPU, a tiny float32 model gave our
loop's greedy answers and the trainer's log-probabilities to 1e-5. Not run on a GPU yet, nor with nf4. What it relies on:
- offline inference, one LoRARequest for all prompts of a call, outputs in the prompts' order:
  https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/entrypoints/llm.py
- SamplingParams: seed of a request, logprobs=0 gives the sampled token's alone, ignore_eos leaves stop_token_ids as the only end, and the
  stop token stays among the ids: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/sampling_params.py
- logprobs_mode processed_logprobs: after temperature and top-p (the default, raw, is before both; greedy: at temperature 1):
  https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/sample/sampler.py
- ranks it has room for, one adapter in memory by default: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/config/lora.py
- its cache of prompts by adapter: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/core/kv_cache_utils.py
- adapters on a GPU in 16 bits alone: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/lora/ops/triton_ops/lora_shrink_op.py
- nf4 from an unquantized checkpoint, with doubly quantized scales as ours, in a package of its own:
  https://github.com/vllm-project/vllm-bnb-plugin/blob/85de847cd6e78e749fb2f93cee7de5174c71e95e/vllm_bnb_plugin/bitsandbytes_loader.py
"""

import os
import shutil
import subprocess
import weakref
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from posttrain import distributed, watch
from posttrain.config import ModelConfig
from posttrain.errors import PosttrainError
from posttrain.generate import Completion, Sampling, free_memory, row_bytes
from posttrain.models import Roles, resolve

SHARE = 0.4  # of free memory for vLLM: its copy of the base, then keys and values; a micro-batch may take half (training.choose_budget)
SPARE = 256  # tokens a row may take beyond its own: its last block, and a block vLLM keeps empty
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has kernels for
INSTALL = "Install the extra (pip install posttrain[vllm], here: pip install -e '.[vllm]'), or set engine: ours."


def check(model: ModelConfig, place: str) -> None:
    """Whether vLLM can sample here under a recipe's model section, before anything is loaded. place: of the key `engine`."""
    if find_spec("vllm") is None:
        raise PosttrainError(place, "vllm is not installed", "the extra [vllm]", INSTALL)
    if distributed.world() > 1:
        raise PosttrainError(place, f"vllm in {distributed.world()} processes", "one process", "Start it without the launcher, or set engine: ours.")
    if model.lora is None:
        raise PosttrainError(place, "vllm without model.lora", "adapters: vLLM's copy of the base never changes",
                             "Add model.lora, or set engine: ours.")
    if model.add_tokens:
        raise PosttrainError(place, "vllm with model.add_tokens", "a vocabulary that is not extended: vLLM reads the base's own rows", "Set engine: ours.")
    if model.quantization == "int8":
        raise PosttrainError(place, "vllm with model.quantization int8", "none or nf4", "Set quantization: nf4, or engine: ours.")
    if model.quantization == "nf4" and find_spec("vllm_bnb_plugin") is None:
        raise PosttrainError(place, "vllm with model.quantization nf4, and vllm-bnb-plugin is not installed", "the extra [vllm]", INSTALL)


class VLLM:
    """The engine of a section's roles. It starts at the first sample: then all roles are in memory, and what is left is known."""

    def __init__(self, section, dtype: torch.dtype):
        self.place, self.say, self.folder = f"{section.place}.engine", section.log.say, section.folder / "adapters.tmp"  # dropped with the section's leftovers
        self.model, self.dtype, self.width = section.recipe.model, dtype, section.config.max_prompt_tokens + section.config.max_new_tokens
        check(self.model, self.place)
        if dtype == torch.float32 and torch.cuda.is_available():
            raise PosttrainError(self.place, "vllm in float32", "bfloat16: vLLM has no other adapters on a GPU", "Set model.dtype: bfloat16, or engine: ours.")
        if (why := "answers are sampled by vLLM") not in section.manifest.get("inexact_because", []):
            section.inexact(why)
        self.llm, self.watch, self.loaded, self.number = None, None, {}, 0
        section.at_end.append(self.end)

    def sample(self, roles: Roles, role: str, prompts: list[list[int]], samples: int, sampling: Sampling, seed: int, *, stop: int, batch: int, tick,
               only) -> list[list[Completion]]:
        """As generate.sample. Log-probabilities are at the temperature; with top_p < 1 among the tokens that it keeps (vLLM tells no others).
        tick(tokens) is called for every answer, when all are there."""
        adapter = self._adapter(roles, role, batch)
        from vllm import SamplingParams

        seeds = torch.randint(2**62, (len(prompts), samples), generator=torch.Generator().manual_seed(seed)).tolist()
        with self._faults("could not sample"):
            params = [SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens, seed=one, logprobs=0,
                                     stop_token_ids=[stop], ignore_eos=True, detokenize=False) for p in only for one in seeds[p]]
            requests = [{"prompt_token_ids": prompts[p]} for p in only for _ in range(samples)]
            answers = [_completion(out.outputs[0], stop) for out in self.llm.generate(requests, params, lora_request=adapter, use_tqdm=False)]
        if tick:
            for answer in answers:
                tick(len(answer.ids))
        return [answers[i:i + samples] for i in range(0, len(answers), samples)]

    def _adapter(self, roles: Roles, role: str, batch: int):
        """The LoRARequest of a role's present weights; None for the base itself. Starts vLLM where it does not run yet."""
        mine = roles[role]
        if mine.adapter is None and mine.net is not roles.base:
            raise PosttrainError(self.place, f"'{role}' is a whole model", "the recipe's base, or an adapter on it: vLLM's copy of the base never changes",
                                 "Set engine: ours, or name that model as model.name_or_path.")
        if self.llm is None:
            self._start(roles, batch)
        if mine.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        stamp = roles.stamp(role)
        before, request = self.loaded.get(role, (None, None))
        if stamp != before:
            if request:
                shutil.rmtree(request.lora_path)
            self.number += 1
            name = f"{role}-{self.number}"
            roles.save(role, self.folder / name)
            request = LoRARequest(name, self.number, str((self.folder / name).resolve()))
            self.loaded[role] = (stamp, request)
        return request

    def _start(self, roles: Roles, batch: int) -> None:
        """Load vLLM's copy of the base, with keys and values for `batch` rows of full width or what fits in its share of free memory."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if roles.device.type == "cuda":
            torch.cuda.empty_cache()  # another process cannot use our allocator's spare blocks
        free, total = free_memory(roles), torch.cuda.mem_get_info()[1] if roles.device.type == "cuda" else psutil.virtual_memory().total
        base = sum(p.numel() * p.element_size() for n, p in roles.base.named_parameters() if "lora_" not in n and "heads." not in n)
        row = row_bytes(roles, self.width + SPARE)
        memory = min(int(free * SHARE) - base, batch * row)
        if memory < row:
            raise PosttrainError(self.place, f"vLLM's copy of the base takes {base / 1e9:.1f} GB and one sample of {self.width} tokens {row / 1e9:.2f} GB, "
                                 f"and {free / 1e9:.1f} GB are free", f"{SHARE:.0%} of the free memory to hold both", "Set engine: ours.")
        rank = max([r.lora.r for r in roles.roles.values() if r.adapter], default=1)
        path, nf4 = resolve(self.model.name_or_path, self.place), self.model.quantization == "nf4"
        for key, value in {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}.items():
            os.environ.setdefault(key, value)
        self.watch = _watch(self)
        with self._faults("did not start"):
            import vllm

            self.llm = vllm.LLM(
                model=path, revision=None if Path(path).is_dir() else self.model.revision, dtype=str(self.dtype).removeprefix("torch."),
                quantization="bitsandbytes" if nf4 else None, load_format="bitsandbytes" if nf4 else "safetensors", skip_tokenizer_init=True,
                generation_config="vllm", logprobs_mode="processed_logprobs", enable_lora=True, max_loras=1,
                max_lora_rank=min([r for r in RANKS if r >= rank], default=rank), max_num_seqs=batch, max_model_len=-1, kv_cache_memory_bytes=memory,
                gpu_memory_utilization=SHARE * free / total)
        self.say(f"vLLM {vllm.__version__} samples, with {base / 1e9:.2f} GB for its copy of the base and {memory / 1e9:.2f} GB for keys and values")

    def end(self) -> None:
        """Free vLLM's memory for the next section: its process ends with the last reference to `llm`."""
        self.llm, self.loaded = None, {}
        if self.watch:
            self.watch()

    @contextmanager
    def _faults(self, what: str):
        try:
            yield
        except Exception as e:
            raise PosttrainError(self.place, f"vLLM {what}: {type(e).__name__}: {(str(e) or 'no message').splitlines()[0][:300]}",
                                 "vLLM to run", "What it printed stands above; engine: ours needs no vLLM.") from e


def _watch(engine: VLLM) -> weakref.finalize:
    """Should this process be killed, vLLM's end too: watch.py. The watch ends with the engine, or when what this returns is called."""
    def end(watcher: subprocess.Popen) -> None:
        with watcher:
            watcher.kill()

    return weakref.finalize(engine, end, watch.begin())


def _completion(output, stop: int) -> Completion:
    ids = list(output.token_ids)
    return Completion(ids, [told[i].logprob for i, told in zip(ids, output.logprobs, strict=True)], ids[-1] == stop)
