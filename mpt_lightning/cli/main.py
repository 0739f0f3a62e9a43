"""`mpt`: the command line. Light commands answer without importing torch; training is a LightningCLI."""

import argparse
import difflib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mpt_lightning import __version__
from mpt_lightning.cli.exit import fail
from mpt_lightning.errors import MPTError
from mpt_lightning.resources import packaged, packaged_names

TRAINER_COMMANDS = {
    "fit": "train: mpt fit --config mpt/source --data.data_root DATA",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write a checkpoint's answers as JSONL (--output FILE); --input FILE.jsonl answers texts of your own",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: the arguments; those of the process by default.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if argv and argv[0] in TRAINER_COMMANDS:
        from mpt_lightning.cli.trainer import run

        output = None
        if argv[0] == "predict" and "--help" not in argv:
            own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            own.add_argument("--output", default="predictions.jsonl")
            own.add_argument("--input")
            known, argv = own.parse_known_args(argv)
            output = known.output
            if known.input is not None:
                _predict(known.input, output, argv[1:])
                return
        run(argv, output)
        return
    options = _parser().parse_args(argv)
    if options.command == "tasks":
        _tasks(options.name)
    elif options.command == "configs":
        _configs(options.name, options.dest)
    elif options.command == "export":
        _export(options)
    elif options.command == "compare":
        _compare(options)
    else:
        from mpt_lightning.demo.run import run_demo

        try:
            run_demo(Path(options.output), seeds=options.seeds)
        except MPTError as error:
            fail(str(error))


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
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    tasks = commands.add_parser("tasks", help="list the tasks, or show one's card")
    tasks.add_argument("name", nargs="?", help="a task, such as glue/sst2")
    configs = commands.add_parser("configs", help="list the recipes, show one, or copy one")
    configs.add_argument("name", nargs="?", help="a recipe, such as mpt/source")
    configs.add_argument("dest", nargs="?", help="file or folder to copy it to")
    export = commands.add_parser(
        "export", help="write a checkpoint for PEFT, or as embeddings for vLLM and transformers"
    )
    export.add_argument("checkpoint", metavar="CKPT", help="a .ckpt file, or a folder that was exported for PEFT")
    export.add_argument("dest", metavar="DEST", help="folder to write; it must not exist")
    export.add_argument("--to", required=True, choices=["peft", "prompt-embeds"], help="what to write")
    export.add_argument("--task", metavar="NAME", help="this task alone (default: all)")
    export.add_argument("--push", metavar="REPO", help="then upload it to this Hub repository, such as user/name")
    compare = commands.add_parser(
        "compare", help="compare methods: runs each recipe by task, k and seed, and tables them"
    )
    compare.add_argument("file", metavar="FILE", help="a comparison's YAML file, or a shipped one such as compare/demo")
    compare.add_argument("--output", metavar="DIR", help="folder of the results (default: runs/compare/NAME)")
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per core, one with a GPU)")
    compare.add_argument("--report", action="store_true", help="only report what is there")
    demo = commands.add_parser("demo", help="the whole method, offline, on two CPU cores, in three minutes")
    demo.add_argument("--output", default="outputs/demo", help="folder of the results (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=3, help="runs per method, task and k (default: %(default)s)")
    return parser


def _tasks(name: str | None) -> None:
    from mpt_lightning.data.card import list_cards, load_card

    if name is not None:
        try:
            load_card(name)
        except MPTError as error:
            fail(str(error))
        print((packaged("tasks", name) or Path(name)).read_text(encoding="utf-8"), end="")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "data", "answers", "metrics", box=None)
    for card in list_cards().values():
        answers = ", ".join(card.choices) if card.choices else "a number" if card.value_range else "text"
        table.add_row(card.name, " ".join(filter(None, [card.path, card.subset])), answers, ", ".join(card.metrics))
    Console().print(table)


def _predict(source: str, output: str, rest: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mpt predict", description="Answer a file of JSON lines with a checkpoint.", allow_abbrev=False
    )
    parser.add_argument("--ckpt_path", required=True, help="a .ckpt file of any of the methods, or a PEFT folder")
    parser.add_argument("--backbone", help="where the backbone is, if not where it was in training")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="rows per batch (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="read `text` as it is, without the card's template")
    options = parser.parse_args(rest)
    from mpt_lightning.predictor import Predictor, predict_file

    try:
        predictor = Predictor.from_checkpoint(
            options.ckpt_path, options.backbone, options.device, batch_size=options.batch_size
        )
        print(f"wrote {predict_file(predictor, source, output, options.raw)} answers to {output}")
    except (MPTError, OSError) as error:
        fail(str(error))


def _export(options: argparse.Namespace) -> None:
    from mpt_lightning.interop import export_peft, export_prompt_embeds, push

    write = export_peft if options.to == "peft" else export_prompt_embeds
    try:
        print(f"wrote {write(options.checkpoint, options.dest, options.task)}")
        if options.push:
            print(f"pushed to {push(options.dest, options.push)}")
    except (MPTError, OSError) as error:
        fail(str(error))


def _compare(options: argparse.Namespace) -> None:
    from mpt_lightning.compare.command import compare

    try:
        done = compare(options)
    except (MPTError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("mpt: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    if not done:
        raise SystemExit(1)


def _configs(name: str | None, dest: str | None) -> None:
    if name is None:
        for known in packaged_names("configs"):
            file = packaged("configs", known)
            headline = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if file else ""
            print(f"{known:28} {headline}")
        return
    file = packaged("configs", name)
    if file is None:
        shipped = packaged_names("configs")
        near = difflib.get_close_matches(name, shipped, n=3) or shipped
        fail(f"unknown recipe {name!r}. Expected one of: {', '.join(near)}. `mpt configs` lists all.")
    if dest is None:
        print(file.read_text(encoding="utf-8"), end="")
    else:
        target = Path(dest) / file.name if Path(dest).is_dir() else Path(dest)
        if target.exists():
            fail(f"{target} exists; give another place.")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        print(f"wrote {target}")
