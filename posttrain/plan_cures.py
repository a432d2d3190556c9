"""What to change where a section does not fit: keys and values, tried with the plan's own count. They come mildest first: what costs time
alone, then what changes lengths, then what changes how the model is trained."""

import math
from collections.abc import Iterator

from posttrain import cards, plan
from posttrain.stages import STAGES

LORA = {"r": 16, "alpha": 32}


def too_big(planner, row: dict, card: cards.Card) -> str:
    """The warning: by how much a section is too big, and the overrides with which it fits."""
    memory, lacks = row["memory"], -row["headroom"]
    largest = max((u for u in memory if u not in ("decoder", "total")), key=memory.get)
    said = (f"about {memory['total'] / 1e9:.1f} GB and {plan.RESERVE / 1e9:.0f} GB for the driver do not fit {card.gigabytes:.4g} GB "
            f"({lacks / 1e9:.1f} GB too much; most is {largest.replace('_', ' ')}): ")
    found = cure(planner, row["section"])
    return said + (f"it fits with {' '.join(f'{k}={_text(v)}' for k, v in found.items())}" if found else
                   "no key of this section makes it fit: take a smaller model or a larger card" + _several(planner, row["kind"]))


def _several(planner, kind: str) -> str:
    """Several cards help where the models can be cut over them."""
    model = planner.model
    if planner.card.count > 1 or not STAGES[kind].sharded or model.quantization != "none":
        return ""
    return ", or several" + (" with model.sharding=full" if model.sharding == "none" else "") + ", such as --gpu 8x80GB"


def _text(value) -> str:
    return f"'{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}'" if isinstance(value, dict) else str(value).lower() if value is True else str(value)


def cure(planner, section: str) -> dict | None:
    """Overrides (key -> value) with which a section fits, as few as may be; None: there are none."""
    kind, model = planner.recipe.stages[section].stage, planner.model
    whole = planner.card.count > 1 and STAGES[kind].sharded and model.quantization == model.sharding == "none"
    if whole and fits(planner, section, {"model.sharding": "full"}):
        return {"model.sharding": "full"}
    changes: dict = {}
    for key, value in candidates(planner.recipe, section):
        changes[key] = value
        if fits(planner, section, changes):
            for extra in list(changes):
                fewer = {k: v for k, v in changes.items() if k != extra}
                if fits(planner, section, fewer):
                    changes = fewer
            return changes
    return None


def candidates(recipe, section: str) -> Iterator[tuple[str, object]]:
    config, place = recipe.stages[section], f"stages.{section}"

    def has(key: str) -> bool:
        return key in type(config).model_fields

    longest = getattr(config, "max_prompt_tokens", 0) + config.max_new_tokens if has("max_new_tokens") else getattr(config, "max_length", 0)
    if has("micro_batch_tokens") and (config.micro_batch_tokens or math.inf) > longest:
        yield f"{place}.micro_batch_tokens", longest
    if has("activation_checkpointing") and not config.activation_checkpointing:
        yield f"{place}.activation_checkpointing", True
    size = config.batch if has("batch") else 1
    while size > 1:
        size //= 2
        yield f"{place}.batch", size
    if recipe.model.lora is None:
        yield "model.lora", LORA
    if recipe.model.quantization == "none":
        yield "model.quantization", "nf4"
    if has("max_length"):
        for length in (2048, 1024, 512):
            if length < config.max_length:
                yield f"{place}.max_length", length
                yield f"{place}.micro_batch_tokens", length
    for share in (2, 4, 8) if has("max_new_tokens") and has("max_prompt_tokens") else ():
        prompt, answer = config.max_prompt_tokens // share, config.max_new_tokens // share
        if min(prompt, answer) < 16:
            return
        yield f"{place}.max_prompt_tokens", prompt
        yield f"{place}.max_new_tokens", answer
        if has("micro_batch_tokens"):
            yield f"{place}.micro_batch_tokens", prompt + answer


def fits(planner, section: str, changes: dict) -> bool:
    recipe, mine = planner.recipe, f"stages.{section}."
    stage = recipe.stages[section].model_copy(update={k.removeprefix(mine): v for k, v in changes.items() if k.startswith(mine)})
    model = type(recipe.model)(**recipe.model.model_dump() | {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")})
    if model.quantization != "none" and (model.lora is None or planner.cut(stage.stage) > 1):
        return False  # a quantized base can neither be trained without adapters nor be cut over cards
    changed = recipe.model_copy(update={"model": model, "stages": recipe.stages | {section: stage}})
    other = plan.Planner(changed, planner.card)
    other.data = planner.data
    return plan.headroom(other.row(section)["memory"], planner.card) >= 0
