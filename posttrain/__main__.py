"""The command line. Nothing here imports torch: help, recipe errors and check-data answer at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from posttrain import chat_command, distributed, listen, runs, stopping, trackers
from posttrain import serve as serve_command
from posttrain.annotate import command as annotate
from posttrain.config import dump_yaml, load_recipe
from posttrain.errors import PosttrainError
from posttrain.log import say

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="The Llama 2-Chat recipe: supervised fine-tuning, two reward models, rejection sampling, PPO, evaluation, export.")
app.add_typer(annotate.app, name="annotate")
app.command("chat")(chat_command.chat)
app.command("serve")(serve_command.serve)

RecipeArg = Annotated[Path, typer.Argument(help="a recipe file, such as recipes/tiny.yaml", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as stages.sft.learning_rate=1e-4", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, write nothing but the resolved configuration")]


def _dry_run(recipe, sections: list[str] | None = None) -> None:
    """Validate recipe and data, build the model on the meta device, print the arithmetic, write the resolved recipe."""
    from posttrain import plan, shape

    folder = runs.Run(recipe).folder
    say(plan.render(plan.plan(recipe, sections=sections)))
    say(shape.check_on_meta(recipe))
    folder.mkdir(parents=True, exist_ok=True)
    resolved = {"run": recipe.run.model_dump(), "model": recipe.model.model_dump(),
                "data": {k: [e.model_dump() for e in v] for k, v in recipe.data_sets.items()} | {"held_out": recipe.held_out.model_dump()},
                "stages": {k: v.model_dump() for k, v in recipe.stages.items()}}
    runs.write_atomic(folder / "resolved.yaml", dump_yaml(resolved))
    say(f"Nothing was run. The resolved recipe is in {folder / 'resolved.yaml'}.")


@app.command()
def run(recipe: RecipeArg, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Walk a recipe's whole road: skip what is done, continue what was cut off."""
    with stopping.heeded():
        loaded = load_recipe(recipe, overrides or [])
        trackers.check(loaded)
        if dry_run:
            _dry_run(loaded)
            return
        this = runs.Run(loaded)
        runs.preflight(this)
        with trackers.follow(this):
            runs.run_sections(this)
        if distributed.is_main():
            _report(this)


def _report(this: runs.Run) -> None:
    from posttrain import report

    try:
        path = report.write(this)
    except OSError as e:
        raise PosttrainError(str(this.folder), f"the report cannot be written ({e.strerror})", "room on a writable disk",
                             f"All sections are done. Free some space, then: `python -m posttrain report {this.recipe.path}`.") from None
    say(f"\nReport: {path}")
    chat = [n for n, c in loaded_exports(this) if this.section(n).state() == "done"]
    if chat:
        say("Next:")
        say(f"  open {path} in a browser")
        say(f"  python -m posttrain show {this.recipe.path}")
        say(f"  python -m posttrain chat {this.recipe.path}")
        say(f"  python -m posttrain serve {this.recipe.path}    # an OpenAI-compatible endpoint; docs/deploy.md: other tools")


def loaded_exports(this: runs.Run):
    return [(n, c) for n, c in this.recipe.stages.items() if c.stage == "export"]


@app.command()
def plan(recipe: RecipeArg, overrides: Overrides = None,
         gpu: Annotated[str | None, typer.Option(help="memory to plan for, such as 24GB")] = None) -> None:
    """Rows, tokens, steps and memory of every section, before anything runs."""
    from posttrain import plan as planner

    say(planner.render(planner.plan(load_recipe(recipe, overrides or []), gpu=gpu)))


@app.command()
def show(recipe: RecipeArg, overrides: Overrides = None) -> None:
    """Where a run stands: each section's state, time and key figures."""
    from posttrain import report

    say(report.show(runs.Run(load_recipe(recipe, overrides or []))))


@app.command()
def report(of: Annotated[list[str], typer.Argument(help="a recipe or the folder of a run; several of them: one page that compares them; key=value "
                                                        "overrides the recipes", show_default=False)],
           beside: Annotated[list[Path] | None, typer.Option(help="a recipe whose reward models stand beside this run's, such as those of "
                                                             "another model size; may be given several times")] = None,
           live: Annotated[bool, typer.Option("--live", help="a page that follows a run while it goes on, also one that has not begun")] = False,
           host: Annotated[str | None, typer.Option(help="of --live: the address to answer on; beyond this machine it takes a password",
                                                    show_default="127.0.0.1")] = None,
           port: Annotated[int | None, typer.Option(min=0, max=65535, help="of --live; 0: any free one", show_default="8600")] = None,
           password_file: Annotated[Path | None, typer.Option(help="of --live: a file with the password; or the variable POSTTRAIN_PASSWORD",
                                                              show_default=False)] = None,
           tls_certificate: listen.Certificate = None, tls_key: listen.Key = None) -> None:
    """Write runs/<run>/report.html from what is on disk, of several runs comparison.html in the first one's folder, or with --live show it on a
    page that follows the run."""
    from posttrain import report_compare

    if live:
        listen.need_ui("report --live", "starlette", "uvicorn")
        from posttrain import live as page

        others = [report_compare.run_at(str(path), []) for path in beside or []]
        page.serve(lambda: report_compare.one_of(of), others, "127.0.0.1" if host is None else host,
                   8600 if port is None else port, password_file, tls_certificate, tls_key)
        return
    for_page = {"--host": host, "--port": port, "--password-file": password_file, "--tls-certificate": tls_certificate, "--tls-key": tls_key}
    if stray := next((f"{option} {value}" for option, value in for_page.items() if value is not None), None):
        raise PosttrainError(stray, "an option of the live page", "--live beside it", "Add --live, or leave the option out.")
    say(f"Report: {report_compare.of_words(of, beside or [])}")


@app.command("check-data")
def check_data(path: Annotated[Path, typer.Argument(help="a recipe (.yaml), or a data file", show_default=False)],
               overrides: Overrides = None,
               format: Annotated[str | None, typer.Option(help="of a data file; guessed from its columns when absent")] = None,
               columns: Annotated[list[str] | None, typer.Option(help="ours=theirs, may be given several times")] = None,
               output: Annotated[Path | None, typer.Option(help="where to save the findings as JSON (and text beside it)")] = None,
               strict: Annotated[bool, typer.Option("--strict", help="warnings too end with exit code 1")] = False) -> None:
    """What is wrong with a recipe's data, or with a file, row by row, before any model is loaded."""
    from posttrain import lint

    of_recipe = path.suffix in (".yaml", ".yml")
    _refuse_misplaced(path, of_recipe, overrides or [], format, columns or [])
    if of_recipe:
        recipe = load_recipe(path, overrides or [])
        found = lint.check_recipe(recipe)
        output = output or Path(recipe.run.dir) / recipe.run.name / "check-data.json"
    else:
        found = lint.check_file(path, format, dict(c.split("=", 1) for c in columns or []))
        output = output or (path.with_name(path.name + ".check.json") if path.is_file() else Path(path.name + ".check.json"))
    text = lint.render(found)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(output, lint.to_json(found))
        runs.write_atomic(output.with_suffix(".txt"), text + "\n")
    except OSError as e:
        say(f"note: the findings could not be saved to {output} ({e.strerror})")
    say(text)
    raise typer.Exit(lint.exit_code(found, strict))


@app.command()
def score(model: Annotated[Path, typer.Option(help="a reward section (runs/NAME/SECTION) or a model folder", show_default=False)],
          data: Annotated[str, typer.Option(help="pairs, demonstrations, or rows with prompt and answer such as a stage's samples.jsonl", show_default=False)],
          format: Annotated[str | None, typer.Option(help="of the data; guessed from its columns when absent")] = None,
          columns: Annotated[list[str] | None, typer.Option(help="ours=theirs, may be given several times")] = None,
          output: Annotated[Path | None, typer.Option(help="where the scores go; default DATA.MODEL.scores.jsonl, here")] = None,
          max_length: Annotated[int | None, typer.Option(min=1, help="tokens; default the section's, else 2048")] = None) -> None:
    """A reward model's scores of a file's answers, row by row; of pairs also how often the chosen one is ahead."""
    from importlib import import_module

    _refuse_misplaced(Path(data), False, [], format, columns or [])
    import_module("reward.score_command").run(model, data, format, dict(c.split("=", 1) for c in columns or []), output, max_length)


@app.command()
def annotations(tasks: Annotated[Path, typer.Argument(help="tasks.jsonl in the folder of a collect section", show_default=False)],
                files: Annotated[list[Path], typer.Argument(help="the annotators' files: .jsonl or .csv", show_default=False)],
                out: Annotated[Path, typer.Option(help="where the pairs go, in the format `preference`", show_default=False)]) -> None:
    """Annotators' choices joined with their tasks: what is wrong row by row, and the preference pairs."""
    from importlib import import_module

    raise typer.Exit(import_module("rlhf.annotations").command(tasks, files, out))


@app.command()
def convert(folder: Annotated[Path, typer.Argument(help="Meta's download: consolidated.NN.pth, params.json, tokenizer.model", show_default=False)],
            out: Annotated[Path, typer.Argument(help="the folder to make", show_default=False)]) -> None:
    """Meta's original Llama 2 download -> a model folder in transformers' layout."""
    from posttrain import convert as converter

    converter.run(folder, out)


@app.command()
def push(folder: Annotated[Path, typer.Argument(help="an export section (runs/NAME/chat) or its model folder", show_default=False)],
         name: Annotated[str, typer.Argument(help="OWNER/NAME on the hub", show_default=False)],
         public: Annotated[bool, typer.Option("--public", help="for everyone to see; default private")] = False) -> None:
    """An exported model with its card to the Hugging Face hub."""
    from posttrain import hub

    hub.push(folder, name, public)


@app.command()
def init(recipe: Annotated[Path, typer.Argument(help="the recipe to write; an existing file is never overwritten")] = Path("recipes/mine.yaml"),
         model: Annotated[str | None, typer.Option(help="a folder, a hub name or a built-in name")] = None,
         pairs: Annotated[list[Path] | None, typer.Option(help="preference pairs that stand for both, helpfulness and safety")] = None,
         helpful: Annotated[list[Path] | None, typer.Option(help="preference pairs that compare helpfulness")] = None,
         safety: Annotated[list[Path] | None, typer.Option(help="preference pairs that compare safety")] = None,
         demonstrations: Annotated[list[Path] | None, typer.Option(help="conversations to imitate")] = None,
         prompts: Annotated[list[Path] | None, typer.Option(help="questions without answers")] = None,
         format: Annotated[str | None, typer.Option(help="of the preference files; guessed from their columns when absent")] = None,
         columns: Annotated[list[str] | None, typer.Option(help="ours=theirs, of the preference files; may be given several times")] = None,
         gpu: Annotated[str | None, typer.Option(help="memory to plan for, such as 24GB, or cpu; default: what torch sees")] = None,
         tuning: Annotated[str, typer.Option(help="full, lora or qlora; auto: the first of them that fits (on a CPU: lora)")] = "auto",
         drop_bad_rows: Annotated[bool, typer.Option("--drop-bad-rows", help="leave out rows that cannot be used; else they stop this")] = False,
         yes: Annotated[bool, typer.Option("--yes", help="ask nothing: defaults for what is not given")] = False) -> None:
    """A recipe for your own model, data and GPU: asks for what is not given, checks the data, and plans until it fits."""
    from posttrain import init as first

    for text in columns or []:
        _two_names(text)
    given = first.Given(model=model, pairs=pairs or [], helpful=helpful or [], safety=safety or [], demonstrations=demonstrations, prompts=prompts,
                        format=format, columns=dict(c.split("=", 1) for c in columns or []), gpu=gpu, tuning=tuning, drop_bad_rows=drop_bad_rows)
    first.run(recipe, given, first.Asker(yes))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="as JSON, for programs")] = False) -> None:
    """What is installed, which GPU, what is missing, and the command that adds it. Exit code 0 where the core is usable."""
    import json

    from posttrain import doctor as physician

    lines = physician.look()
    say(json.dumps(physician.to_json(lines), indent=1) if as_json else physician.render(lines))
    raise typer.Exit(not physician.usable(lines))


def _refuse_misplaced(path: Path, of_recipe: bool, overrides: list[str], format: str | None, columns: list[str]) -> None:
    """Words of check-data that would be passed over: a recipe's with a file, a file's with a recipe, a column without its name."""
    place = f"check-data {path.name}"
    if overrides and not of_recipe:
        raise PosttrainError(place, f"'{overrides[0]}' overrides a recipe's key, and this is a data file", "a recipe with overrides, or a file alone",
                             "A file's options are --format and --columns.")
    given = [f"--{name} {value}" for name, values in (("format", [format] if format else []), ("columns", columns)) for value in values]
    if given and of_recipe:
        raise PosttrainError(place, f"{given[0]} belongs to a data file, and this is a recipe", "format and columns in the recipe's data section",
                             "Write them there, or override them, such as data.NAME.0.format=FORMAT.")
    for text in columns:
        _two_names(text)


def _two_names(text: str) -> None:
    if not all(text.partition("=")):
        raise PosttrainError(f"--columns '{text}'", "not two names joined by '='", "OURS=THEIRS, such as prompt=question",
                             "Give --columns once for every column to map.")


def quiet_libraries() -> None:
    """Progress bars and notices of the libraries would drown ours; no telemetry, no tokenizer threads beside the model's.

    GOMP_SPINCOUNT: worker threads that spin between operations starve each other as soon as anything else runs on the machine
    (measured: sampling over ten times slower beside one busy process), and those that sleep at once are slow to wake (measured:
    training takes 1.4 times as long); a short spin, then sleep, has neither fault.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for key, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                       "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}.items():
        os.environ.setdefault(key, value)
    # bitsandbytes, which trl imports through peft, fetches and runs a kernel from the hub as it is imported where this package is there
    sys.modules.setdefault("kernels", None)
    import logging
    import warnings

    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(peft|transformers|trl|torch|bitsandbytes)\b")
    for name in ("transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def guarded(command) -> None:
    """Run a command; our errors become one message and exit code 1, a stop on a signal says how to go on (75 after SIGTERM, 130 after Ctrl-C)."""
    quiet_libraries()
    try:
        command()
    except PosttrainError as e:
        say(f"error: {e}", style="bold red")
        if not distributed.is_main():  # it may be this process's alone
            print(f"error (process {distributed.rank()}): {e}", file=sys.stderr)
        sys.exit(1)
    except stopping.Stopped as e:
        say(f"\nStopped ({e}). The same command goes on from here; nothing finished is lost.")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        say("\nStopped. The same command goes on from here; nothing finished is lost.")
        sys.exit(130)


def stage_main(package: str) -> None:
    """`python -m sft RECIPE [SECTION] [key=value ...] [--dry-run]`: the sections of one package alone."""
    from posttrain.stages import STAGES

    kinds = {k for k in STAGES if runs.stage_home(k) == package}
    stage_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @stage_app.command(help=f"Run the {', '.join(sorted(kinds))} sections of a recipe, or one of them.")
    def stage(recipe: RecipeArg,
              section: Annotated[list[str] | None, typer.Argument(help="a section's name and key=value overrides", show_default=False)] = None,
              dry_run: DryRun = False) -> None:
        words = section or []
        loaded = load_recipe(recipe, [w for w in words if "=" in w])
        trackers.check(loaded)
        names = [w for w in words if "=" not in w] or runs.sections_of(loaded, kinds)
        for name in names:
            if name not in loaded.stages or loaded.stages[name].stage not in kinds:
                raise PosttrainError(str(recipe), f"no {package} section '{name}'", f"one of {', '.join(runs.sections_of(loaded, kinds)) or 'none here'}",
                                     "Check the section's name and kind.")
        if dry_run:
            _dry_run(loaded, names)
            return
        with stopping.heeded():
            this = runs.Run(loaded)
            runs.preflight(this, names)
            with trackers.follow(this):
                runs.run_sections(this, names)

    guarded(lambda: stage_app(prog_name=f"python -m {package}"))


if __name__ == "__main__":
    guarded(lambda: app(prog_name="python -m posttrain"))
