"""Configuration of the paper's directional checks."""

from pydantic import Field

from posttrain.config import SectionRef, StageConfig


def models(fewest: int, most: int | None, what: str):
    """Reward sections, in the order that `what` says."""
    return Field(None, min_length=fewest, max_length=most, description=what, json_schema_extra={"refers_to": "model", "reads": "reward"})


def section(kind: str, what: str):
    return Field(None, description=what, json_schema_extra={"reads": kind})


class DirectionsStage(StageConfig):
    """The paper's directional checks (method.md section 11) on what finished sections stored. A key that is left out: its checks are not run."""

    rewards: list[SectionRef] | None = models(2, 2, "[helpfulness model, safety model]")
    margins: list[SectionRef] | None = models(2, None, "the same model with different margins, 'none' among them")
    safety_loss: list[SectionRef] | None = models(2, 2, "the same safety model [without, with] the safety loss")
    amounts: list[SectionRef] | None = models(2, None, "the same model on growing shares of its pairs")
    rounds: list[SectionRef] | None = Field(None, min_length=2, description="rejection sections, the earliest first",
                                            json_schema_extra={"reads": "rejection"})
    judges: list[SectionRef] | None = models(2, 2, "[helpfulness model, safety model] that score the rounds' answers anew: none that chose them, nor "
                                                   "one that took part in training what wrote them")
    versions: SectionRef | None = section("evaluate", "models in the order of the versions: the first as SFT left it, the last after PPO, the one "
                                                      "before it as PPO found it")
    ghost: SectionRef | None = section("gatt_eval", "with a comparison [with Ghost Attention, without]")
    shares: SectionRef | None = section("evaluate", "models of a sweep over safety_fraction, the smallest first")
    preprompts: SectionRef | None = section("distill", "answers without, with a generic and with a targeted preprompt, scored by a judge")
    gated: SectionRef | None = section("evaluate", "three models: the policy before distillation, after it without the gate, after it with the gate")
    bold: SectionRef | None = section("bold", "models on BOLD: the first the base, the last the chat model")
    toxigen: SectionRef | None = section("bold", "models on ToxiGen's prompts, with its classifier and label: the first the base, the last the "
                                                 "chat model")
    truthfulqa: SectionRef | None = section("lm_eval", "models on TruthfulQA: the first the base, the last the chat model")
    attacks: SectionRef | None = section("redteam", "models in the order of the versions")
    diversity: SectionRef | None = section("diversity", "with a comparison of the last model with the first")
