"""Configuration of the automatic benchmarks: BOLD and classifiers, diversity, lm-evaluation-harness."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from posttrain.config import ComparisonConfig, DataNames, Label, ModelRef, StageConfig, both_models


class BoldStage(ComparisonConfig):
    """Models go on with BOLD's prompts; VADER tells the sentiment by group (paper A.4.7, Tables 46-50; decoding as 4.1), and a classifier of the
    recipe's choice the share of answers that have a label (ToxiGen, TruthfulQA: Tables 11, 14)."""

    prompts: DataNames
    held_out: bool = Field(False, description="only rows kept from training; false: all rows (a set made for evaluation alone)")
    rows: int | None = Field(None, ge=1, description="prompts used, of those given, by lot")
    leave_out: list[str] = Field(["hinduism", "atheism"], description="groups; the paper leaves out these two, of few prompts")
    form: Literal["text", "chat"] = Field("text", description="the prompt as the beginning of a text, or as a user's turn that is answered")
    samples_per_prompt: int = Field(1, ge=1)
    max_new_tokens: int = Field(64, ge=1, description="the paper does not say; compare figures of one length only")
    max_prompt_tokens: int = Field(1024, ge=1)
    chunk: int = Field(64, ge=1, description="prompts per chunk: the unit of resume")
    classifier: str | None = Field(None, pattern="^[^@]", json_schema_extra={"refers_to": "model"},
                                   description="a local folder or hub name of a sequence classifier, or of a causal judge with judge_prompt")
    classifier_revision: str | None = None
    reads: Literal["answer", "text"] = Field("answer", description="what the classifier reads: the answer alone, or the prompt and the answer")
    judge_prompt: str | None = Field(None, description="with {prompt} and {answer}: what a causal judge reads, and goes on with the label or not")
    label: str | None = Field(None, min_length=1, description="the label whose share is told, as the classifier's config.json spells it")

    @field_validator("judge_prompt")
    @classmethod
    def _both_places(cls, text: str | None) -> str | None:
        if text is not None and (text.count("{prompt}"), text.count("{answer}")) != (1, 1):
            raise PydanticCustomError("judge_prompt", "A text with one {place}", {"place": "{prompt} and one {answer}"})
        return text

    @field_validator("label")
    @classmethod
    def _with_a_classifier(cls, label: str | None, info: ValidationInfo) -> str | None:
        if (label is None) != (info.data.get("classifier") is None):
            raise PydanticCustomError("label", "Both classifier and label, or none")
        return label


class DiversityStage(ComparisonConfig):
    """Self-BLEU against the temperature, for several models and kinds of prompts (paper 5.1, Fig. 21)."""

    standardize_rewards: ClassVar[bool] = False  # the raw scores are told

    prompts: DataNames
    held_out: bool = Field(False, description="only rows kept from training; false: all rows (a set made for evaluation alone)")
    column: str = Field("kind", min_length=1, description="the column that says a prompt's kind, such as factual or creative")
    temperature: list[Annotated[float, Field(gt=0)]] = Field([0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5], min_length=1,
                                                             description="the paper's go up by 0.1")
    top_p: float = Field(1.0, gt=0, le=1)
    samples_per_prompt: int = Field(25, ge=2)
    helpfulness: ModelRef | None = Field(None, description="with `safety`: both mean scores beside Self-BLEU")
    safety: ModelRef | None = None
    max_new_tokens: int = Field(256, ge=1)
    max_prompt_tokens: int = Field(1024, ge=1)
    chunk: int = Field(4, ge=1, description="prompts per chunk: the unit of resume")
    micro_batch_tokens: int | None = Field(None, ge=16)

    _both_models = field_validator("safety")(both_models)


class LmEvalStage(StageConfig):
    """Tasks of lm-evaluation-harness (extra [eval]) on several models, each merged into a folder that the harness loads."""

    models: Annotated[dict[Label, str], Field(min_length=1, json_schema_extra={"refers_to": "model"})]
    tasks: list[Annotated[str, Field(min_length=1, pattern=r"^[^/\\\x00]+$")]] = Field(
        ["truthfulqa_mc2", "toxigen"], description="names that `lm_eval ls tasks` shows")
    task_files: list[str] = Field([], json_schema_extra={"refers_to": "file"}, description="tasks of one's own, as YAML files of the harness")
    chat: bool = Field(False, description="put every request through the model's chat template; false: as the task writes it")
    limit: int | None = Field(None, ge=1, description="rows of a task, for a trial")
    batch: int = Field(8, ge=1, description="requests side by side")
