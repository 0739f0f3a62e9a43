"""`mpt`: the command line. Light commands do not import torch; training is a LightningCLI."""

import argparse
import os
import re
import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpt_lightning import __version__
from mpt_lightning.errors import MPTError
from mpt_lightning.resources import find_file, packaged_names

# Seconds after which a process that fails alone prints its message.
PATIENCE = 10.0
TRAINER_COMMANDS = {
    "fit": "train: mpt fit --config mpt/source --data.data_root DATA",
    "validate": "evaluate a checkpoint on the validation rows",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write a checkpoint's answers as JSONL (--output FILE); --input FILE.jsonl answers texts of your own",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, with the process's arguments by default; a user's mistake ends in one message."""
    argv = list(sys.argv[1:] if args is None else args)
    # With --input, `mpt predict` needs neither a DataModule nor a Trainer.
    own_texts = argv[:1] == ["predict"] and any(word.partition("=")[0] == "--input" for word in argv)
    trains = bool(argv) and argv[0] in TRAINER_COMMANDS and not own_texts
    try:
        if trains:
            from mpt_lightning.cli.trainer import run

            run(argv)
        else:
            options = _parser().parse_args(argv)
            options.run(options)
    except MPTError as error:
        _fail(str(error))
    except OSError as error:
        if trains:  # `run` has turned those that a user can mend into MPTErrors
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    """Print one message and exit; of several processes that fail for the same reason, only the first one prints."""
    if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0) > 0:
        parent = os.getppid()
        time.sleep(PATIENCE)  # when the first process fails, torchrun and srun end this one
        if os.getppid() != parent:  # with Lightning's own launcher the parent is the first process
            raise SystemExit(2)
    print(f"mpt: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt",
        description="One frozen language model, many tasks: multitask and context-aware prompt tuning.",
        epilog="`mpt fit --help` lists the trainer's arguments, `mpt fit --model.help MPTSource` a method's, "
        "`mpt fit --data.help TaskDataModule` the data's.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpt_lightning {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {name: commands.add_parser(name, help=text) for name, text in TRAINER_COMMANDS.items()}
    predict = made["predict"]
    predict.description = "Answer a file of JSON lines with a checkpoint."
    predict.add_argument("--input", required=True, help="a file of JSON lines with `text`, or the card's columns")
    predict.add_argument("--output", default="predictions.jsonl", help="the file to write (default: %(default)s)")
    predict.add_argument("--ckpt_path", required=True, help="a .ckpt file of any of the methods, or a PEFT folder")
    predict.add_argument("--backbone", help="where the backbone is, if not where it was in training")
    predict.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    predict.add_argument("--batch_size", type=int, default=64, help="rows per batch (default: %(default)s)")
    predict.add_argument("--raw", action="store_true", help="read `text` as it is, without the card's template")
    predict.set_defaults(run=_predict)
    tasks = commands.add_parser("tasks", help="list the tasks, or show one's card")
    tasks.add_argument("name", nargs="?", help="a task, such as glue/sst2")
    tasks.set_defaults(run=_tasks)
    configs = commands.add_parser("configs", help="list the recipes, show one, or copy one")
    configs.add_argument("name", nargs="?", help="a recipe, such as mpt/source")
    configs.add_argument("dest", nargs="?", help="file or folder to copy it to")
    configs.set_defaults(run=_configs)
    export = commands.add_parser(
        "export", help="write a checkpoint for PEFT, or as embeddings for vLLM and transformers"
    )
    export.add_argument("checkpoint", metavar="CKPT", help="a .ckpt file, or a folder that was exported for PEFT")
    export.add_argument("dest", metavar="DEST", help="folder to write; it must not exist")
    export.add_argument("--to", required=True, choices=["peft", "prompt-embeds"], help="what to write")
    export.add_argument("--task", metavar="NAME", help="this task alone (default: all)")
    export.add_argument("--push", metavar="REPO", help="then upload it to this Hub repository, such as user/name")
    export.set_defaults(run=_export)
    compare = commands.add_parser(
        "compare", help="compare methods: runs each recipe by task, k and seed, and tables them"
    )
    compare.add_argument("file", metavar="FILE", help="a comparison's YAML file, or a shipped one such as compare/demo")
    compare.add_argument("--output", metavar="DIR", help="folder of the results (default: runs/compare/NAME)")
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per core, one with a GPU)")
    compare.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of every run, such as model.backbone=FOLDER; a method's own have precedence (repeatable)",
    )  # fmt: skip
    compare.add_argument("--report", action="store_true", help="only report the results so far")
    compare.add_argument(
        "--format", choices=["report", "peft"], default="report",
        help="tables and pictures (default), or files for the dashboard of PEFT's method comparison",
    )  # fmt: skip
    compare.set_defaults(run=_compare)
    demo = commands.add_parser("demo", help="the whole method, offline, on two CPU cores, in three minutes")
    demo.add_argument("--output", default="outputs/demo", help="folder of the results (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=3, help="runs per method, task and k (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _predict(options: Namespace) -> None:
    from mpt_lightning.predictor import Predictor, predict_file

    predictor = Predictor.from_checkpoint(
        options.ckpt_path, options.backbone, options.device, batch_size=options.batch_size
    )
    count = predict_file(predictor, options.input, options.output, options.raw)
    print(f"wrote {count} answers to {options.output}")


def _tasks(options: Namespace) -> None:
    from mpt_lightning.data.card import list_cards, load_card

    if options.name is not None:
        load_card(options.name)
        print(find_file("tasks", options.name).read_text(encoding="utf-8"), end="")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "data", "answers", "metrics", box=None)
    for card in list_cards().values():
        answers = ", ".join(card.choices) if card.choices else "a number" if card.value_range else "text"
        table.add_row(card.name, " ".join(filter(None, [card.path, card.subset])), answers, ", ".join(card.metrics))
    Console().print(table)


def _configs(options: Namespace) -> None:
    if options.name is None:
        for name in packaged_names("configs"):
            headline = find_file("configs", name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{name:28} {headline}")
        return
    file = find_file("configs", options.name)
    if options.dest is None:
        print(file.read_text(encoding="utf-8"), end="")
        return
    target = Path(options.dest)
    target = target / file.name if target.is_dir() else target
    if target.exists():
        raise MPTError(f"{target} exists; choose another destination.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
    print(f"wrote {target}")


def _export(options: Namespace) -> None:
    from mpt_lightning.interop import export_peft, export_prompt_embeds, push

    write = export_peft if options.to == "peft" else export_prompt_embeds
    print(f"wrote {write(options.checkpoint, options.dest, options.task)}")
    if options.push:
        print(f"pushed to {push(options.dest, options.push)}")


def _compare(options: Namespace) -> None:
    from rich.console import Console

    from mpt_lightning.compare.peft_results import write_peft_results
    from mpt_lightning.compare.plan import read_comparison
    from mpt_lightning.compare.report import Report
    from mpt_lightning.compare.results import Store

    if options.jobs is not None and options.jobs < 1:
        raise MPTError(f"--jobs must be at least 1, got {options.jobs}.")
    if wrong := [text for text in options.set if not re.fullmatch(r"[a-z_][\w.]*=.*", text, re.DOTALL)]:
        raise MPTError(f"--set: got {wrong[0]!r}, expected an argument and its value, such as model.lr=0.1.")
    arguments = dict(text.split("=", 1) for text in options.set)
    comparison, console = read_comparison(options.file, arguments), Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file has no window that the lines must fit
    output = Path(options.output or f"runs/compare/{comparison.name}")
    if options.report and not output.is_dir():
        raise MPTError(f"There are no results in {output}; run the comparison without --report, or set --output.")
    store = Store(output, comparison.name)
    if not options.report:
        from mpt_lightning.compare.run import run_all  # torch takes seconds, and a report does not need it

        try:
            run_all(comparison, store, console, options.jobs)
        except KeyboardInterrupt:
            print("mpt: interrupted; the same command resumes", file=sys.stderr)
            raise SystemExit(130) from None
    command = ["mpt", "compare", options.file, *(word for text in options.set for word in ("--set", text))]
    command += ["--output", options.output] if options.output else []
    report = Report(comparison, store, shlex.join(command))
    if options.format == "peft":
        files = write_peft_results((result for _, result in report.results), output / "peft")
        console.print(f"wrote {len(files)} files in {output / 'peft'}", highlight=False)
    else:
        report.print(console)
        console.print(f"wrote {', '.join(map(str, report.write(output)))}", highlight=False)
    if report.failures:
        raise SystemExit(1)


def _demo(options: Namespace) -> None:
    from mpt_lightning.demo.run import run_demo

    run_demo(Path(options.output), seeds=options.seeds)
