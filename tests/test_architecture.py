"""Who may import whom (design.md, section 5), by reading the source; and what is not imported before it is needed."""

import ast
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "rlhf", "safety")
PACKAGES = ("posttrain", *STAGES)
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
PURE = ("posttrain/tensors.py", "reward/losses.py", "rlhf/losses.py", "rlhf/credit.py", "rlhf/gate.py")
LIGHT = ("posttrain.config", "posttrain.runs", "posttrain.data", "posttrain.formats", "posttrain.lint", "posttrain.plan",
         "posttrain.memory", "posttrain.cards", "posttrain.plan_page", "posttrain.plan_cures", "posttrain.confidential",
         "posttrain.report", "posttrain.__main__", "posttrain.errors", "posttrain.stages", "posttrain.log", "posttrain.builtin",
         "sft.config", "reward.config", "rlhf.config", "safety.config", "safety.benchmark_config", "safety.directions_config", "safety.taxonomy")
BEYOND_THE_DESIGN = {  # sampling with scores; design.md section 5 does not allow it (yet)
    "safety/evaluate.py": {"rlhf.rollout"},
    "safety/distill.py": {"rlhf.rollout"},
    "safety/redteam.py": {"rlhf.rollout"},
}
HEAVY = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports(path: Path, top_only: bool = False) -> set[str]:
    """The dotted names a file imports, inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} line {node.lineno}: a relative import; write the whole address"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def roots(path: Path, **more) -> set[str]:
    return {n.split(".")[0] for n in imports(path, **more)}


def holders(module: str) -> set[str]:
    return {name(p) for p in FILES if module in roots(p)}


def test_there_is_something_to_check():
    assert len(FILES) > 30 and set(PURE) <= {name(p) for p in FILES}


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "posttrain")], ids=name)
def test_the_kernel_imports_no_stage(path):
    assert not roots(path) & set(STAGES), f"{name(path)} reaches a stage by import; stages are reached by name through posttrain/stages.py"


@pytest.mark.parametrize("path", [p for p in FILES if not p.is_relative_to(ROOT / "posttrain")], ids=name)
def test_stages_meet_through_run_folders_only(path):
    mine = path.relative_to(ROOT).parts[0]
    others = {".".join(n.split(".")[:2]) for n in imports(path) if n.split(".")[0] in set(STAGES) - {mine}}
    allowed = ({"reward.score"} if mine in ("rlhf", "safety") else set()) | BEYOND_THE_DESIGN.get(name(path), set())
    assert others <= allowed, f"{name(path)} imports {sorted(others - allowed)}; stages share reward.score and run folders, nothing else"
    unused = BEYOND_THE_DESIGN.get(name(path), set()) - others
    assert not unused, f"{name(path)} no longer needs its exception for {sorted(unused)}: take it out of BEYOND_THE_DESIGN"


def test_peft_and_bitsandbytes_live_in_models_alone():
    assert holders("peft") | holders("bitsandbytes") <= {"posttrain/models.py"}


def test_yaml_lives_in_config_alone():
    assert holders("yaml") == {"posttrain/config.py"}


def test_trl_lives_in_stage_files():
    assert holders("trl") <= {name(p) for p in FILES if p.relative_to(ROOT).parts[0] in STAGES}


def test_templates_are_applied_in_chat_alone():
    assert {name(p) for p in FILES if ".apply_chat_template(" in p.read_text(encoding="utf-8")} == {"posttrain/chat.py"}


@pytest.mark.parametrize("file", PURE)
def test_pure_files_import_torch_and_nothing_else(file):
    assert roots(ROOT / file) == {"torch"}


def test_package_files_are_empty():
    assert [name(p) for p in FILES if p.name == "__init__.py" and p.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_this_checkout(package):
    spec = find_spec(package)
    where = Path(spec.origin).parent if spec and spec.origin else None
    assert where == ROOT / package, (
        f"'{package}' is {where}, not {ROOT / package}: another installed package has that name ('safety' on PyPI is a scanner). "
        f"Run from the checkout's root (python -m pytest, python -m posttrain), or `pip uninstall {package}` in this environment.")


def test_nothing_heavy_is_imported_before_a_stage_runs():
    """--help, recipe errors and check-data answer within two seconds: none of their modules imports torch."""
    code = (f"import importlib, sys\nfor m in {LIGHT!r}:\n    importlib.import_module(m)\n"
            f"    print(m, *[h for h in {HEAVY!r} if h in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if " " in line]
    assert not loaded, f"imports at import time: {loaded[0]}"
    assert len(done.stdout.splitlines()) == len(LIGHT)


def test_reading_a_recipe_imports_nothing_heavy():
    code = ("import sys\nfrom posttrain.config import load_recipe\nfrom posttrain.runs import Run\n"
            "run = Run(load_recipe('recipes/tiny.yaml'))\n"
            f"run.data\nprint([h for h in {HEAVY!r} if h in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_stage_names_a_module_and_a_configuration_that_exist():
    from posttrain.config import StageConfig
    from posttrain.stages import STAGES as TABLE
    from posttrain.stages import load_config_class

    for kind, stage in TABLE.items():
        assert issubclass(load_config_class(kind), StageConfig)
        module = ROOT / (stage.module.replace(".", "/") + ".py")
        assert module.exists(), f"stage '{kind}' names {stage.module}"
        tree = ast.parse(module.read_text(encoding="utf-8"))
        assert any(isinstance(n, ast.FunctionDef) and n.name == "run" for n in tree.body), f"{stage.module} has no run(section)"
        assert ast.get_docstring(tree), f"{stage.module} does not say what it is"


def test_the_checks_see_a_breach(tmp_path):
    """Seen to fail once: each kind of import is found wherever it hides."""
    path = tmp_path / "x.py"
    path.write_text("import os\ndef f():\n    from peft import LoraConfig\n    import yaml.nodes\nif 1:\n    from rlhf import ppo\n")
    assert roots(path) == {"os", "peft", "yaml", "rlhf"} and roots(path, top_only=True) == {"os"}
    assert {"rlhf.ppo", "peft.LoraConfig", "yaml.nodes"} <= imports(path)
