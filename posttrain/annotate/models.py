"""Who answers: runs of this project or model folders, sampled here, or an OpenAI-compatible endpoint. The specifications, without torch."""

from dataclasses import asdict, dataclass
from importlib import import_module

from pydantic import ValidationError

from posttrain import versions
from posttrain.errors import PosttrainError

HEATS = (0.8, 1.0)  # temperatures of the first and the second variant, unless others are asked for


@dataclass(frozen=True)
class Variant:
    """A model at a temperature. folder: with weights, of a model sampled here (None: the base alone); config: its base; url: an endpoint's."""

    name: str
    temperature: float
    max_new_tokens: int
    folder: str | None = None
    config: dict | None = None
    url: str | None = None
    model: str | None = None
    api_key_env: str | None = None

    def plain(self) -> dict:
        return asdict(self)


def variants(specs: list[str], temperatures: list[float], max_new_tokens: int, api_key_env: str | None) -> list[Variant]:
    """The first of both lists go together, and the last. specs: a section's folder (runs/NAME/SECTION), a model folder, a built-in or hub name, or
    URL#MODEL of an endpoint. Raises PosttrainError for what cannot answer, before anything is loaded."""
    if len(specs) > 2 or len(temperatures) > 2:
        raise PosttrainError("--model" if len(specs) > 2 else "--temperature", "given more than twice", "one or two",
                             "Two variants answer every prompt.")
    heats = temperatures or list(HEATS)
    out = [_variant(spec, heat, max_new_tokens, api_key_env) for spec, heat in ((specs[0], heats[0]), (specs[-1], heats[-1]))]
    if out[0] == out[1]:
        raise PosttrainError("--model", f"both answers would be of {out[0].name}", "two different variants", "Name two models, or two temperatures.")
    return out


def _variant(spec: str, temperature: float, max_new_tokens: int, api_key_env: str | None) -> Variant:
    if spec.startswith(("http://", "https://")):
        url, _, model = spec.partition("#")
        if not model:
            raise PosttrainError(f"--model {spec}", "an address without a model", "URL#MODEL, such as http://localhost:8000/v1#my-model",
                                 "Add the model's name.")
        judge_config(url, model, api_key_env)
        return Variant(f"{model} at {temperature:g}", temperature, max_new_tokens, url=url, model=model, api_key_env=api_key_env)
    folder, config, name = versions.locate(spec, f"--model {spec}", f"{versions.NAMED}, or URL#MODEL")
    return Variant(f"{name} at {temperature:g}", temperature, max_new_tokens, folder and str(folder), config.model_dump())


def judge_config(url: str, model: str, api_key_env: str | None):
    """How an endpoint is reached, checked; safety/endpoint.py speaks with it."""
    cls = import_module("safety.config").JudgeConfig
    try:
        return cls(base_url=url, model=model, api_key_env=api_key_env)
    except ValidationError as e:
        raise PosttrainError(f"--model {url}#{model}", "cannot be used", str(e.errors()[0]["msg"]),
                             "Correct the address, or --api-key-env.") from None
