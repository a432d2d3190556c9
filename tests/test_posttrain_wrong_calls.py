"""Wrong calls of chat, serve, convert, init, doctor, push and of an export section: each is told with its place, what was found, what was expected
and what to do, without a traceback, and before a model is loaded."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain import chat_command, init_recipe, models, servable
from posttrain.__main__ import app
from posttrain.errors import PosttrainError

ROOT = Path(__file__).parent.parent
TINY = "builtin:tiny-llama"
INIT = f"init {{tmp}}/x.yaml --yes --model {TINY} --gpu cpu"


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.delenv("POSTTRAIN_PASSWORD", raising=False)
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.delenv("ABSENT", raising=False)
    monkeypatch.setattr(chat_command, "_loaded", lambda found: pytest.fail("a model would be loaded"))
    monkeypatch.setattr(servable, "folder_of", lambda version: pytest.fail("a model would be loaded"))
    monkeypatch.setattr(models.Roles, "__init__", lambda *_, **__: pytest.fail("a model would be loaded"))
    monkeypatch.setattr(init_recipe, "measured_speed", lambda: 5e10)


@pytest.fixture
def files(tmp_path):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}, a number.", "rejected": "No idea at all."} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant",
                                                  "content": r["chosen"]}]}) + "\n" for r in rows))
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "password").write_text("short")
    (tmp_path / "folder").mkdir()
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "params.json").write_text("[]")
    return tmp_path


def call(words: str, folder: Path):
    return CliRunner().invoke(app, [w.replace("{tmp}", str(folder)).replace("''", "") for w in words.split(" ")])


@pytest.mark.parametrize(("words", "told"), [
    # chat
    ("chat ''", "^RUN: is empty"), ("chat nope.yaml", r"^nope\.yaml: no such file"), ("chat /no/where", "^/no/where: no such folder"),
    ("chat builtin:nope", "^builtin:nope: no built-in model"), ("chat {tmp}/folder", "folder: no model"),
    ("chat {tmp}/text.txt", r"text\.txt: a file"),
    (f"chat {TINY} --section sft", "^--section sft: builtin:tiny-llama is no run"), (f"chat {TINY} --beside {{tmp}}/nope", "nope: no such folder"),
    (f"chat {TINY} --port 8501", "^--port 8501: an option of the page.*Add --web"),
    (f"chat {TINY} --host 0.0.0.0", "^--host 0.0.0.0: an option of the page"),
    (f"chat {TINY} --tls-key {{tmp}}/k", "^--tls-key .*an option of the page"),
    (f"chat {TINY} --web --host 0.0.0.0", "^--host 0.0.0.0: others can reach this address, and there is no password"),
    (f"chat {TINY} --web --host ä..b --password-file {{tmp}}/pairs.jsonl", r"^--host ä\.\.b: no host's name"),
    (f"chat {TINY} --web --password-file {{tmp}}/nope", "^--password-file .*cannot be read"),
    (f"chat {TINY} --web --password-file {{tmp}}/password", "^--password-file .*a password of 5 characters"),
    (f"chat {TINY} --web --tls-certificate {{tmp}}/c", "^--tls-certificate, --tls-key: one without the other"),
    (f"chat {TINY} --web --tls-certificate {{tmp}}/c --tls-key {{tmp}}/k", "^--tls-certificate .*cannot be read"),
    (f"chat {TINY} --web --tls-certificate {{tmp}}/text.txt --tls-key {{tmp}}/text.txt", "no certificate in it"),
    # serve
    (f"serve {TINY} sft", "^serve sft: a word beside RUN"), (f"serve {TINY} -- --port 3", "^serve -- --port: an option that serve sets itself"),
    (f"serve {TINY} --host 0.0.0.0", "^--host 0.0.0.0: .*no API key"), (f"serve {TINY} --api-key short", "^--api-key: a key of 5 characters"),
    (f"serve {TINY} --api-key-env SHORT", "^--api-key-env SHORT: a key of 3"),
    (f"serve {TINY} --api-key-env ABSENT", "^--api-key-env ABSENT: no key"),
    (f"serve {TINY} --api-key a-long-enough-key --api-key-env SHORT", "both given"), ("serve {tmp}/nope", "nope: no such folder"),
    (f"serve {TINY} --tls-key {{tmp}}/k", "one without the other"),
    ("serve recipes/tiny.yaml --section nope", "^--section nope: recipes/tiny.yaml has no such"),
    # convert
    ("convert {tmp}/nope {tmp}/out", "nope: no such folder"), ("convert {tmp}/text.txt {tmp}/out", r"text\.txt: a file"),
    ("convert {tmp}/folder {tmp}/out", r"params\.json: no such file"), ("convert {tmp}/download {tmp}/out", "'dim' is missing"),
    ("convert {tmp}/download {tmp}/folder/..", "holds something"), ("convert {tmp}/download {tmp}/text.txt", "holds something"),
    # init
    ("init {tmp}/x.txt", r"x\.txt: not the name of a recipe"), ("init {tmp}/text.txt/x.yaml --yes", r"text\.txt is a file"),
    ("init {tmp}/x.yaml --yes --model {tmp}/nope", "^--model .*no such folder"),
    ("init {tmp}/x.yaml --yes --model {tmp}/folder", "no config.json in it"),
    ("init {tmp}/x.yaml --yes --model {tmp}/text.txt", "not a folder"), ("init {tmp}/x.yaml --yes --model builtin:nope", "no built-in model"),
    (INIT, "^init: no answer to: Preference pairs"),
    (f"{INIT} --pairs {{tmp}}/folder", "folder: not a file that we read"),
    (f"{INIT} --pairs {{tmp}}/text.txt", r"text\.txt: not a file that we read"), (f"{INIT} --pairs {{tmp}}/nope.jsonl", r"nope\.jsonl: no such file"),
    (f"{INIT} --pairs {{tmp}}/talks.jsonl", "reads as demonstrations"),
    (f"{INIT} --pairs {{tmp}}/pairs.jsonl --demonstrations {{tmp}}/pairs.jsonl", "reads as pairs"),
    (f"{INIT} --pairs {{tmp}}/pairs.jsonl --format prefrence", "^init: --format: unknown format 'prefrence'.*Did you mean 'preference'"),
    (f"{INIT} --pairs {{tmp}}/pairs.jsonl --format zzz", "^init: --format: unknown format 'zzz'"),
    (f"{INIT} --pairs {{tmp}}/pairs.jsonl --columns prompt=question", "^--columns prompt=question: no preference file has a column 'question'"),
    (f"{INIT} --pairs {{tmp}}/pairs.jsonl --columns prompt", "^--columns 'prompt': not two names"),
    (f"{INIT} --pairs {{tmp}}/pairs.jsonl --tuning half", "^init: --tuning: got 'half'"),
    (f"{INIT.replace('cpu', '0GB')} --pairs {{tmp}}/pairs.jsonl", "^--gpu 0GB: not an amount of memory"),
    (f"{INIT} --pairs {{tmp}}/broken.jsonl", r"broken\.jsonl"), (f"{INIT} --pairs {{tmp}}/empty.jsonl", r"empty\.jsonl"),
    (f"{INIT.replace('{tmp}', '/proc/nope')} --pairs {{tmp}}/pairs.jsonl", "^/proc/nope.*cannot be written"),
    # push, and the keys of an export section
    ("push {tmp}/folder me/x", r"folder: no posttrain\.json"), ("push {tmp}/nope me/x", r"nope: no posttrain\.json"),
    ("run recipes/tiny.yaml chat.gguf=[q4] --dry-run", r"stages\.chat\.gguf\[0\]: got 'q4'"),
    ("run recipes/tiny.yaml chat.fodler=x --dry-run", r"stages\.chat\.fodler: unknown key.*Did you mean 'folder'"),
    ("run recipes/tiny.yaml chat.model=@nope --dry-run", "'@nope' names no section")])
def test_a_wrong_call_says_where_what_and_what_to_do(files, monkeypatch, words, told):
    monkeypatch.chdir(ROOT)
    result = call(words, files)
    error = result.exception
    assert isinstance(error, PosttrainError), (error, result.output)
    with pytest.raises(PosttrainError, match=told):
        raise error
    assert error.place and error.found and error.expected and error.do
    assert not (files / "x.yaml").exists() and not (files / "out").exists()


@pytest.mark.parametrize(("words", "told"), [
    ("chat", "Missing argument 'RUN'"), (f"chat {TINY} --temperature hot", "--temperature"), (f"chat {TINY} --top-p 0", "--top-p"),
    (f"chat {TINY} --max-new-tokens 0", "--max-new-tokens"), (f"chat {TINY} --web --port 99999", "--port"), (f"chat {TINY} --wbe", "--web"),
    ("serve", "Missing argument 'RUN'"), (f"serve {TINY} --engine llama.cpp", "'auto', 'transformers', 'vllm'"), (f"serve {TINY} --port -1", "--port"),
    ("convert", "Missing argument"), ("convert {tmp}/download", "Missing argument"), ("convert a b c", "(c)"), ("init {tmp}/x.yaml --modle x", "--model"),
    ("init a.yaml b.yaml", "(b.yaml)"), ("doctor now", "(now)"), ("doctor --jsn", "--json"), ("push {tmp}/folder", "Missing argument"),
    ("export", "No such command 'export'"), ("chatt x", "Did you mean 'chat'?")])
def test_a_word_that_no_command_has_is_told_by_its_name(files, words, told):
    result = call(words, files)
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and told in said and "Traceback" not in said, said
