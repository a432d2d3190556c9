"""Configuration of rejection sampling and PPO. Defaults are the paper's (section 3.2.3) or method.md section 10's resolutions."""

from typing import Annotated, Literal

from pydantic import Field

from posttrain.config import DataNames, ModelRef, StageConfig


class SamplingConfig(StageConfig):
    prompts: DataNames
    policy: ModelRef
    helpfulness: ModelRef
    safety: ModelRef
    safety_threshold: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.15, description="on sigma(R_s); auto: where the safety model's precision is 0.9")
    standardize_rewards: bool = Field(False, description="put each reward model's scores on its own held-out mean and deviation before the "
                                              "merge; the gate still reads the raw R_s (method.md 10.3)")
    max_new_tokens: int = Field(512, ge=1)
    max_prompt_tokens: int = Field(1024, ge=1)
    batch: int = Field(64, ge=1, description="samples decoded side by side")
    micro_batch_tokens: int | None = Field(None, ge=16)


class RejectionStage(SamplingConfig):
    """K samples a prompt, the best kept (paper 3.2.3; K = 16 is method.md 10.15)."""

    samples_per_prompt: int = Field(16, ge=1)
    temperature: float = Field(1.0, gt=0)
    chunk: int = Field(16, ge=1, description="prompts per chunk: the unit of resume")
    rows: int | None = Field(None, ge=1, description="prompts used, of those given")


class PPOStage(SamplingConfig):
    """Paper 3.2.3 and method.md 4.3. learning_rate None: 1e-6 full (the paper's), 1e-5 adapters."""

    iterations: int = Field(200, ge=1)
    batch_size: int = Field(512, ge=2, description="samples per iteration")
    mini_batch_size: int = Field(64, ge=1, description="samples per gradient step")
    samples_per_prompt: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    critic_learning_rate: float | None = Field(None, gt=0)
    kl_coef: float = Field(0.01, ge=0)
    clip_range: float = Field(0.2, gt=0)
    value_clip_range: float = Field(0.2, gt=0)
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    whiten: Literal["auto", "batch", "running", "none"] = "auto"
    unfinished_score: float | None = Field(-1.0, description="ceiling of the whitened score of an answer that was cut off; null: no ceiling, its "
                                           "score as an answer that ends there stands")
    critic_warmup: int = Field(10, ge=0, description="most critic-only iterations before PPO begins")
    critic_warmup_target: float = Field(0.2, le=1, description="explained variance that ends the critic's warm-up")
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    max_grad_norm: float = Field(1.0, gt=0)
    eval_every: int = Field(10, ge=1)
    eval_prompts: int = Field(64, ge=2, description="held-out prompts for early stopping")
    eval_samples: int = Field(1, ge=1)
    patience: int = Field(5, ge=1, description="evaluations without a better held-out reward before PPO stops")
    max_kl: float | None = Field(None, gt=0, description="nats per sequence on held-out prompts; a checkpoint beyond it is never the best")
    save_steps: int = Field(5, ge=1, description="iterations between checkpoints")
    sample_every: int = Field(5, ge=1)
