"""Configuration of the evaluate stage."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from posttrain.config import DataNames, ModelRef, StageConfig

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")]  # names a file of answers


class EvaluateStage(StageConfig):
    """Several models side by side on held-out prompts (paper 3.4, 4.4; decoding as 4.1: temperature 0.1, top-p 0.9)."""

    models: Annotated[dict[Label, str], Field(min_length=1, json_schema_extra={"refers_to": "model"})]
    prompts: DataNames
    helpfulness: ModelRef
    safety: ModelRef
    held_out: bool = Field(True, description="only rows kept from training; false: all rows (a set made for evaluation alone)")
    rows: int | None = Field(None, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    temperature: float = Field(0.1, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(512, ge=1)
    max_prompt_tokens: int = Field(1024, ge=1)
    batch: int = Field(64, ge=1)
    safety_threshold: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.15
    standardize_rewards: bool = Field(False, description="merge the scores as PPO with this setting does; both models' own scores stay raw")
    unsafe_threshold: float = Field(0.5, gt=0, lt=1)
    micro_batch_tokens: int | None = Field(None, ge=16)
    compare: list[list[str]] = Field([], description="pairs [after, before] whose paired differences are reported")
    max_sequence_kl: float | None = Field(None, gt=0, description="a check: mean sequence KL of a compared pair, in nats")

    @field_validator("compare")
    @classmethod
    def _of_these_models(cls, pairs: list[list[str]], info: ValidationInfo) -> list[list[str]]:
        known = info.data.get("models", {})
        if any(len(pair) != 2 or not set(pair) <= set(known) for pair in pairs):
            raise PydanticCustomError("compare", "Pairs [after, before] of the section's models: {known}", {"known": ", ".join(known)})
        return pairs
