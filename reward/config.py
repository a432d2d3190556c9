"""Configuration of a reward model. Defaults are the paper's (section 3.2.2, appendix A.3.3-A.3.4)."""

from typing import Literal

from pydantic import Field

from posttrain.config import DataNames, ModelRef, TrainingConfig


class RewardStage(TrainingConfig):
    """`own` is the model's domain, `other` the rest; own_share is own : all by rows (0.5 helpfulness, 0.9 safety)."""

    model: ModelRef
    own: DataNames
    other: DataNames | None = None
    own_share: float = Field(0.5, gt=0, le=1)
    fraction: float = Field(1.0, gt=0, le=1, description="share of the mixed pairs to train on; a smaller one's pairs are among a larger one's")
    seed: int | None = Field(None, description="of the mix, the fraction, the new head and the order; None: the run's. Held-out rows are the run's")
    margin: Literal["small", "large", "none"] = "small"
    safety_loss_weight: float = Field(0.0, ge=0, description="weight of the safety loss (lambda of method.md 3.2); 0 switches it off")
    epochs: float = Field(1, gt=0)
    on_too_long: Literal["error", "drop"] = "error"
    drift: DataNames | None = Field(None, description="pairs of the newest policy's answers: measured after training (held_out.drift), never trained on")
