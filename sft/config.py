"""Configuration of supervised fine-tuning. Defaults are the paper's (section 3.1); see posttrain.config.TrainingConfig."""

from posttrain.config import DataNames, ModelRef, TrainingConfig


class SFTStage(TrainingConfig):
    """Every version starts from `model: base` unless it says otherwise; `data` mixes demonstrations and '@section' outputs."""

    data: DataNames
    model: ModelRef = "base"
    packing: bool = True
