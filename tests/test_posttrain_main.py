"""The command line: what check-data refuses, and what no library may do before we are asked."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.__main__ import app
from posttrain.errors import PosttrainError

ROOT = Path(__file__).parent.parent


def command(*words):
    """What a command prints; our errors are raised, as `guarded` sees them."""
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"q": f"q{i}", "chosen": "Good.", "rejected": "Poor."}) + "\n" for i in range(4)), encoding="utf-8")
    return path


@pytest.mark.parametrize("columns", ["prompt", "=q", "prompt=", ""])
def test_a_column_without_both_names_is_refused(pairs, columns):
    with pytest.raises(PosttrainError, match=rf"--columns '{columns}': .*Expected OURS=THEIRS"):
        command("check-data", pairs, "--columns", columns)
    assert not list(pairs.parent.glob("*.check.*"))


def test_columns_are_mapped(pairs):
    result = command("check-data", pairs, "--columns", "prompt=q")
    assert result.exit_code == 0 and "0 bad of 4 rows" in result.output


def test_overrides_of_a_data_file_are_refused_by_name(pairs):
    with pytest.raises(PosttrainError, match=r"check-data p\.jsonl: .*'run\.seed=1'.*--format and --columns") as e:
        command("check-data", pairs, "run.seed=1", "--columns", "prompt=q")
    assert "recipe" in str(e.value)


def test_options_of_a_data_file_are_refused_for_a_recipe():
    for option, value in (("--format", "preference"), ("--columns", "prompt=q")):
        with pytest.raises(PosttrainError, match=rf"check-data tiny\.yaml: {option} "):
            command("check-data", ROOT / "recipes" / "tiny.yaml", option, value)


def test_bitsandbytes_fetches_no_kernel_from_the_hub(tmp_path):
    """With the package `kernels` installed, it asks the hub at its import, which trl's import brings about."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install -e .[quantization]")
    (tmp_path / "kernels.py").write_text("from pathlib import Path\nPath(__file__).with_name('asked').touch()\n", encoding="utf-8")
    code = ("import sys; sys.path.append(sys.argv[1]); from posttrain.__main__ import quiet_libraries; quiet_libraries();"
            "import bitsandbytes, bitsandbytes.functional as f; f.has_avx512bf16()")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "asked").exists()
