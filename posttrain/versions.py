"""Which model a word on the command line means: a recipe, a run's or a section's folder, a model folder, a built-in or hub name. Without torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from posttrain import builtin, runs
from posttrain.config import ModelConfig, load_recipe, read_yaml
from posttrain.errors import PosttrainError

KINDS = ("sft", "ppo", "export")  # sections whose model answers
NAMED = "a section's folder, a model folder, a built-in or hub name"


@dataclass(frozen=True)
class Version:
    """name: for people; folder: of an adapter, None for a whole model; config: the adapter's base, or the whole model itself."""

    name: str
    folder: Path | None
    config: ModelConfig


def find(spec: str, section: str | None = None, template: str | None = None) -> Version:
    """section: of a recipe or run, 'base' for what it starts from; None: its export, else the section that finished last. template: the chat
    template of a model that has none, or in the place of its own. Raises PosttrainError for what cannot answer, before anything is loaded."""
    if not spec.strip():
        raise PosttrainError("RUN", "is empty", f"a recipe, a run's folder, {NAMED}", "Name one.")
    path = Path(spec).expanduser()
    of_recipe = path.suffix in (".yaml", ".yml")
    recipe = load_recipe(path) if of_recipe else None
    folder = runs.Run(recipe).folder if of_recipe else path
    sections = _sections(folder)
    if of_recipe or sections:
        found = _of_run(spec, folder, sections, section, recipe)
    elif section:
        raise PosttrainError(f"--section {section}", f"{spec} is no run", "a recipe, or the folder of a run", "Leave --section out.")
    else:
        found = _at(spec)
    if template and found.folder is not None and (found.folder / "chat_template.jinja").exists():
        raise PosttrainError(f"--chat-template {template}", f"{found.name} has the template of its training", "a model without one",
                             "Leave --chat-template out.")
    return replace(found, config=found.config.model_copy(update={"chat_template": template})) if template else found


def beside(spec: str, other: str, template: str | None = None) -> Version:
    """What stands beside `spec`: 'base' or another section where that is a run, else whatever `other` names by itself."""
    path = Path(spec).expanduser()
    folder = runs.Run(load_recipe(path)).folder if path.suffix in (".yaml", ".yml") else path
    sections = _sections(folder)
    return find(spec, other, template) if sections and other in ("base", *sections) else find(other, None, template)


def _of_run(spec: str, folder: Path, sections: dict[str, dict], wanted: str | None, recipe) -> Version:
    if wanted == "base":
        any_of = next(iter(sections), None)
        if recipe is None and any_of is None:
            raise PosttrainError(spec, "nothing has run yet", "a run", f"`python -m posttrain run {spec}` first.")
        config = recipe.model if recipe else ModelConfig(**read_yaml(folder / any_of / "config.yaml")["model"])
        return Version(f"{folder.resolve().name}/base", None, config)
    if wanted is None:
        done = [name for name, told in sections.items() if told.get("finished")]
        exports = [name for name in done if sections[name]["kind"] == "export"]
        if not done:
            raise PosttrainError(spec, "no section whose model could answer is finished", f"a finished section of the kind {', '.join(KINDS)}",
                                 f"Run the recipe first: `python -m posttrain run {spec}`." if recipe else "Run its recipe first.")
        wanted = max(exports or done, key=lambda name: sections[name]["finished"])
    elif wanted not in sections:
        raise PosttrainError(f"--section {wanted}", f"{spec} has no such model", f"one of {', '.join(['base', *sections])}", "Name one of these.")
    return _at(str(folder / wanted))


def _sections(folder: Path) -> dict[str, dict]:
    """The manifests of a run's sections whose models answer, by name; empty where the folder is no run's."""
    told = {p.parent.name: runs.read_json(p) for p in sorted(folder.glob("*/manifest.json"))} if folder.is_dir() else {}
    return {name: manifest for name, manifest in told.items() if manifest.get("kind") in KINDS}


def _at(spec: str) -> Version:
    folder, config, name = locate(spec, spec, NAMED)
    if folder is not None and not (folder / "adapter_config.json").exists():  # a whole model: its own base
        folder, config = None, ModelConfig(name_or_path=str(folder), dtype=config.dtype)
    return Version(name, folder, config)


def locate(spec: str, place: str, expected: str) -> tuple[Path | None, ModelConfig, str]:
    """(folder with weights or None for the base, the base's configuration, its name for the record). expected: what may be named here.

    Raises PosttrainError(place, ...) for what cannot answer."""
    path = Path(spec).expanduser()
    section = next((p for p in (path, path.resolve().parent) if (p / "manifest.json").is_file() and (p / "config.yaml").is_file()), None)
    if section:
        kind = runs.read_json(section / "manifest.json").get("kind")
        if kind not in KINDS:
            raise PosttrainError(place, f"a section of the kind '{kind}'", "one whose model answers: sft, ppo or export", "Name such a section.")
        folder = section / "model"
        if not (section / "DONE").exists() or not folder.is_dir():
            raise PosttrainError(place, "is not finished (no DONE, or no model)", "a finished section", "Run its recipe: it goes on from there.")
        config = ModelConfig(**read_yaml(section / "config.yaml")["model"])
        return folder, config, f"{section.resolve().parent.name}/{section.resolve().name}"
    if path.is_dir():
        adapter = runs.read_json(path / "adapter_config.json")
        if adapter:
            return path, ModelConfig(name_or_path=adapter["base_model_name_or_path"], revision=adapter.get("revision")), path.resolve().name
        if (path / "config.json").exists():
            return None, ModelConfig(name_or_path=str(path)), path.resolve().name
        raise PosttrainError(place, "no model (neither adapter_config.json nor config.json)", "a section's folder or a model folder",
                             "Check the path.")
    if path.is_file():
        raise PosttrainError(place, "a file", expected, "Name the folder that it lies in.")
    if builtin.is_builtin(spec):
        builtin.check(spec, place)
    elif spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise PosttrainError(place, "no such folder", expected, "Check the path.")
    return None, ModelConfig(name_or_path=spec), spec
