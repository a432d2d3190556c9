"""Configuration of rejection sampling and PPO. Defaults are the paper's (section 3.2.3) or method.md section 10's resolutions."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from posttrain.config import AnsweringConfig, DataNames, ModelRef, StageConfig, both_models
from posttrain.data import only, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt


def few_prompts(place: str, prompts: list[Prompt]) -> PosttrainError:
    return PosttrainError(f"{place}.prompts", f"{len(prompts)} prompts, {len({*map(prompt_key, prompts)})} of them different",
                          "at least 4, better several hundred", "Add prompts: half of them or eval_prompts are kept aside for early stopping.")


class SamplingConfig(AnsweringConfig):
    prompts: DataNames
    policy: ModelRef
    helpfulness: ModelRef
    safety: ModelRef
    safety_threshold: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.15, description="on sigma(R_s); auto: where the safety model's precision is 0.9")
    standardize_rewards: bool = Field(False, description="put each reward model's scores on its own held-out mean and deviation before the "
                                              "merge; the gate still reads the raw R_s (method.md 10.3)")
    max_prompt_tokens: int = Field(1024, ge=1)
    micro_batch_tokens: int | None = Field(None, ge=16)

    def check(self, section, ready: bool) -> None:
        section.check_deviations(self.helpfulness, self.safety, ready)


class RejectionStage(SamplingConfig):
    """K samples a prompt, the best kept (paper 3.2.3; K = 16 is method.md 10.15). The keys of the paper's rounds: a list of temperatures,
    `pool` from V4 on, `fresh` prompts."""

    samples_per_prompt: int = Field(16, ge=1)
    temperature: float | list[float] = Field(1.0, description="a list: each is tried on sweep_prompts prompts first, the best is used (Fig. 8)")
    sweep_prompts: int = Field(32, ge=1, description="prompts of the round on which a list of temperatures is tried")
    pool: DataNames = Field([], description="earlier rejection sections (all they sampled) or demonstrations, scored anew: they compete too")
    fresh: bool = Field(False, description="leave out prompts that the rejection sections this one descends from have sampled")
    chunk: int = Field(16, ge=1, description="prompts per chunk: the unit of resume")
    rows: int | None = Field(None, ge=1, description="prompts used, of those given")

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, value):
        values = value if isinstance(value, list) else [value]
        if not values or not all(0 < v < float("inf") for v in values) or len({*values}) < len(values):
            raise PydanticCustomError("temperature", "a number above 0, or a list of different ones")
        return value

    def idle(self) -> dict:
        swept = isinstance(self.temperature, list)
        return super().idle() | {"fresh": False, "pool": []} | ({} if swept else {"sweep_prompts": self.sweep_prompts})


class PPOStage(SamplingConfig):
    """Paper 3.2.3 and method.md 4.3. learning_rate None: 1e-6 full (the paper's), 1e-5 adapters."""

    algorithm: Literal["ppo", "grpo", "rloo", "dpo"] = Field("ppo", description="the others are TRL's, on the same roles; grpo and rloo with the same "
        "reward; dpo learns from `pairs`, with kl_coef (if set; else 0.1) as its beta; critic, whitening and GAE keys are PPO's alone")
    pairs: DataNames = Field([], description="what dpo learns from")
    iterations: int = Field(200, ge=1)
    batch_size: int = Field(512, ge=2, description="samples per iteration")
    mini_batch_size: int = Field(64, ge=1, description="samples per gradient step")
    samples_per_prompt: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    critic_learning_rate: float | None = Field(None, gt=0)
    kl_coef: float = Field(0.01, ge=0)
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = Field("k1", description="of a token's KL in the reward; the KL that is told stays k1 (method.md 10.4)")
    clip_range: float = Field(0.2, gt=0)
    value_clip_range: float | None = Field(0.2, gt=0, description="null: values are not clipped")
    passes: int = Field(1, ge=1, description="over an iteration's answers; the paper's is one")
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    whiten: Literal["auto", "batch", "running", "none"] = Field("auto", description="merged scores by the iteration's own mean and deviation, "
        "by running ones (auto: below 128 answers) or not; none with standardize_rewards: by the reward models' held-out ones (method.md 10.1)")
    score_clip: float | None = Field(None, gt=0, description="bound of a whitened score, both ways")
    unfinished_score: float | None = Field(-1.0, description="ceiling of the whitened score of an answer that was cut off; null: no ceiling, its "
                                           "score as an answer that ends there stands")
    critic_warmup: int = Field(10, ge=0, description="most critic-only iterations before PPO begins")
    critic_warmup_target: float = Field(0.2, le=1, description="explained variance of rewards-to-go (lambda 1) that ends the critic's warm-up")
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    max_grad_norm: float = Field(1.0, gt=0)
    eval_every: int = Field(10, ge=1)
    eval_prompts: int = Field(64, ge=2, description="held-out prompts for early stopping")
    eval_samples: int = Field(1, ge=1)
    patience: int = Field(5, ge=1, description="evaluations without a better held-out reward before PPO stops")
    max_kl: float | None = Field(None, gt=0, description="nats per answer on the prompts kept aside, over the whole vocabulary at `temperature`; a "
                                 "checkpoint beyond it is never the best")
    save_steps: int = Field(5, ge=1, description="iterations between checkpoints")
    sample_every: int = Field(5, ge=1)
    entropy: bool = Field(False, description="tell the mean entropy of the policy's distribution over response tokens; one more pass of the vocabulary")

    @field_validator("algorithm")
    @classmethod
    def _sampled_by_us(cls, algorithm: str, info: ValidationInfo) -> str:
        if algorithm != "ppo" and info.data.get("engine") != "ours":
            raise PydanticCustomError("engine", "Ppo with engine: {engine} (TRL samples for the others)", {"engine": info.data.get("engine")})
        if getattr(info.data.get("servers"), "model", None):
            raise PydanticCustomError("servers", "No servers.model: the policy changes, so servers take its adapters (vLLM)")
        return algorithm

    @field_validator("samples_per_prompt")
    @classmethod
    def _groups_fit(cls, samples: int, info: ValidationInfo) -> int:
        batch, mini = (info.data.get(key, samples) for key in ("batch_size", "mini_batch_size"))
        if batch % samples or mini % samples:
            raise PydanticCustomError("samples_per_prompt", "A divisor of batch_size {batch} and mini_batch_size {mini}", {"batch": batch, "mini": mini})
        return samples

    def check(self, section, ready: bool) -> None:
        super().check(section, ready)
        if ready or not any(name.startswith("@") for name in self.prompts):
            found = only([p for name in self.prompts for p in section.run.data_of(name).train], Prompt, f"{section.place}.prompts")
            if len(found) < 4 or len({*map(prompt_key, found)}) < 2:
                raise few_prompts(section.place, found)

    def idle(self) -> dict:
        return super().idle() | {"algorithm": "ppo", "pairs": [], "kl_estimator": "k1", "passes": 1, "score_clip": None, "entropy": False}


class CollectStage(AnsweringConfig):
    """Two answers a prompt for annotators to compare (paper 3.2.1), of two variants: a variant is a policy at a temperature. One policy or
    one temperature stands for both variants."""

    standardize_rewards: ClassVar[bool] = False  # the stored scores are raw

    prompts: DataNames
    policies: Annotated[list[str], Field(min_length=1, max_length=2, json_schema_extra={"refers_to": "model"})]
    temperatures: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=2)]
    helpfulness: ModelRef | None = Field(None, description="with `safety`: scores kept in the key, for nobody who annotates")
    safety: ModelRef | None = None
    rows: int | None = Field(None, ge=1, description="prompts used, of those given")
    max_prompt_tokens: int = Field(1024, ge=1)
    chunk: int = Field(64, ge=1, description="prompts per chunk: the unit of resume")

    @field_validator("temperatures")
    @classmethod
    def _two_variants(cls, temperatures: list[float], info: ValidationInfo) -> list[float]:
        policies = info.data.get("policies", [])
        if len(set(policies)) == 1 == len(set(temperatures)):
            raise PydanticCustomError("variants", "Two different variants: two policies, or one at two temperatures")
        return temperatures

    _both_models = field_validator("safety")(both_models)


class AnnotationsStage(StageConfig):
    """Annotators' choices joined with their tasks: preference pairs that reward models train on."""

    tasks: str = Field(pattern="^@", description="a collect section", json_schema_extra={"refers_to": "tasks"})
    annotations: Annotated[list[str], Field(min_length=1, json_schema_extra={"refers_to": "file"})]
    safety: bool | None = Field(None, description="true: pairs of safety tasks alone, false: of the others alone")
    held_out: int = Field(0, ge=0, description="pairs kept from training, by prompt (paper: 1,000 of every batch)")
