"""Configuration of supervised fine-tuning and Ghost Attention. Defaults are the paper's (sections 3.1, 3.3); see posttrain.config.TrainingConfig."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from posttrain.config import AnsweringConfig, ComparisonConfig, DataNames, ModelRef, TrainingConfig

Instructions = Annotated[list[str], Field(min_length=1, json_schema_extra={"refers_to": "file"})]
SHIPPED = ["sft/data/gatt_instructions.jsonl"]


class SFTStage(TrainingConfig):
    """Every version starts from `model: base` unless it says otherwise; `data` mixes demonstrations and '@section' outputs."""

    data: DataNames
    model: ModelRef = "base"
    packing: bool = True
    safety_fraction: float = Field(1.0, ge=0, le=1, description="share of the safety demonstrations (rows tagged as safety) to train on, beside all "
                                                                "others (paper 4.2.3); a smaller one's rows are among a larger one's")

    def idle(self) -> dict:
        return super().idle() | {"safety_fraction": 1.0}


class GattStage(AnsweringConfig):
    """Ghost Attention (paper 3.3, A.3.5): answers under an instruction become demonstrations that have it in the first turn alone."""

    data: DataNames
    policy: ModelRef
    instructions: Instructions = SHIPPED
    generate: bool = Field(False, description="the policy itself proposes the hobbies and public figures (A.3.5); those of the file stand in where it "
                                              "finds too few")
    kinds: Annotated[list[Literal["hobby", "language", "figure"]], Field(min_length=1)] = Field(
        ["hobby", "language", "figure"], description="of what a row's instruction speaks: one of them up to all, by lot. A small model of one language keeps "
                                                     "none in another")
    context: Literal["original", "resampled"] = Field("original", description="the earlier answers of a row: the data's, or sampled under the "
                                                      "instruction too (method.md 10.14)")
    rows: int | None = Field(None, ge=1, description="dialogues used, of those given")
    instructions_per_dialogue: int = Field(1, ge=1, description="rows made of a dialogue, each with an instruction of its own")
    turns: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[fewest, most] user turns of a row, by lot: a shorter dialogue goes on with others of the data, a longer one is cut; null: "
                          "dialogues as they are, those of one turn left out")
    asked_share: float = Field(0.0, ge=0, le=1, description="rows with a hobby or figure whose last turn asks about it, in the place of the dialogue's own")
    samples_per_prompt: int = Field(1, ge=1, description="answers to a row's last turn; the one that keeps most of its instruction competes (method.md 10.14)")
    only_complying: bool = Field(False, description="keep a row only where its answer is in the language asked for, and names what its last turn asks about")
    temperature: float = Field(1.0, gt=0)
    max_prompt_tokens: int = Field(4096, ge=1, description="of a prompt with the instruction on every turn")
    chunk: int = Field(32, ge=1, description="rows per chunk: the unit of resume")

    def idle(self) -> dict:
        return super().idle() | {"kinds": ["hobby", "language", "figure"]}

    @field_validator("kinds")
    @classmethod
    def _once_each(cls, kinds: list[str]) -> list[str]:
        if len(set(kinds)) < len(kinds):
            raise PydanticCustomError("kinds", "Each kind once")
        return kinds

    @field_validator("asked_share")
    @classmethod
    def _can_ask(cls, share: float, info: ValidationInfo) -> float:
        if share and info.data.get("kinds") == ["language"]:
            raise PydanticCustomError("asked_share", "0, since nobody asks about a language; or hobby or figure among kinds")
        return share

    @field_validator("turns")
    @classmethod
    def _in_order(cls, turns: list[int] | None) -> list[int] | None:
        if turns and turns[0] > turns[1]:
            raise PydanticCustomError("turns", "[fewest, most]")
        return turns


class GattEvalStage(ComparisonConfig):
    """Attributes remembered and forms kept over a dialogue's turns (paper Table 30, Figs. 10 and 28; decoding as 4.1)."""

    data: DataNames = Field(description="demonstrations whose turns stand between the instruction and the question")
    held_out: bool = Field(True, description="only rows kept from training; false: all rows (a set made for evaluation alone)")
    instructions: Instructions = SHIPPED
    dialogues: int = Field(100, ge=2, description="dialogues whose first turn sets a public figure and a hobby; a later one asks for one of them")
    constraint_dialogues: int = Field(10, ge=0, description="dialogues for each form of the instructions file (haiku, lower case, ...); 0: none")
    turns: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = Field([2, 4, 6, 20], description="the user turns that are answered")
    max_filler_tokens: int = Field(150, ge=1, description="of an exchange that stands between")
    max_new_tokens: int = Field(128, ge=1)
    max_prompt_tokens: int = Field(4048, ge=1, description="the paper's dialogues are shorter than this")
    chunk: int = Field(50, ge=1, description="answers per chunk: the unit of resume")
    attention: bool = Field(True, description="draw where the last answer's tokens look (Fig. 10)")
