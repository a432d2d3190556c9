"""Configuration of the export stage."""

from typing import Literal

from pydantic import Field

from posttrain.config import ModelRef, SectionRef, StageConfig


class ExportStage(StageConfig):
    """Merge the adapter into its base and write a model folder any tool loads."""

    model: ModelRef = Field(json_schema_extra={"refers_to": "model", "reads": ["sft", "ppo", "export"]})
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    folder: str | None = Field(None, description="where to put it; default runs/<run>/<section>/model")
    temperature: float = Field(0.6, ge=0, description="of the generation config (the paper's chat defaults)")
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(512, ge=1)
    evaluation: SectionRef | None = Field(None, description="an evaluate section whose figures go into the model card",
                                          json_schema_extra={"reads": "evaluate"})
    gguf: list[Literal["f16", "q8_0"]] = Field([], description="files for llama.cpp beside the safetensors, of the Llama layout")
