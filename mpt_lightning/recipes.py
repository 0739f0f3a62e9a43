"""A recipe becomes a model, its data and a Trainer: the LightningCLI behind `mpt` and `mpt compare`."""

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import mpt_lightning.data  # (so that classes are known by their short names)
import mpt_lightning.modules
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.errors import MPTError, find_error
from mpt_lightning.io import one_line, read_yaml
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.evaluation import NO_PROMPT
from mpt_lightning.resources import Kind, packaged, packaged_names

TASK_MODULES = (mpt_lightning.data.TaskDataModule, mpt_lightning.data.MultitaskDataModule)


class Parser(LightningArgumentParser):
    """A parser whose errors are one message, without two pages of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message; the package's own if it is the cause."""
        cause = find_error(ex) if ex is not None else None
        raise cause or MPTError(" ".join(message.split()))


class MPTCLI(LightningCLI):
    """LightningCLI that takes any module and any data, and does not let a checkpoint replace what was asked for.

    Args:
        args: the arguments, in which shipped recipes and cards may stand by name; those of the process by default.
        **kwargs: see `LightningCLI`.
    """

    def __init__(self, args: Sequence[str] | None = None, **kwargs: Any) -> None:
        words = sys.argv[1:] if args is None else args
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=shield_texts(resolve_names(words)),
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"prog": "mpt", "allow_abbrev": False},
            **kwargs,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then check `--ckpt_path` against the model, since Lightning lets the checkpoint win."""
        # LightningCLI warns of arguments that are not the process's own.
        own, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = own
        command = self.config.get("subcommand")
        options = self.config.get(command) if command else None
        if options is None or options.get("model") is None:
            return
        name = options.model.class_path.rsplit(".", 1)[-1]
        ours = {cls.__name__: cls for cls in _subclasses(PromptModule)}.get(name)  # type: ignore[type-abstract]
        path = options.get("ckpt_path")
        if ours is not None and command != "fit" and not path and ours.needs_checkpoint(options.model.init_args):
            raise MPTError(NO_PROMPT)
        if ours is None or not path or path in ("best", "last", "hpc"):
            return
        checkpoint = read_checkpoint(path)
        ours.check_stage(checkpoint)
        if command == "fit":
            return
        given = options.model.get("init_args")
        self._tell_what_the_checkpoint_overrides(checkpoint, ours.plain_arguments(given.as_dict() if given else {}))

    def _parse_ckpt_path(self) -> None:
        """Keep the arguments of a run that resumes: the module reports where the checkpoint's count instead."""
        if self.config.get("subcommand") != "fit":
            super()._parse_ckpt_path()

    def _instantiate_trainer(self, config: Any, callbacks: list[L.Callback]) -> L.Trainer:
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
            environment = getattr(trainer.strategy, "cluster_environment", None)
            if environment is not None:
                environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
            return trainer
        except (ValueError, RuntimeError) as error:
            if find_error(error) is not None:
                raise
            raise MPTError(
                f"The Trainer cannot be built: {one_line(error)} The launcher's numbers and --trainer.num_nodes and "
                "--trainer.devices must be the same."
            ) from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            # Lightning takes what it reads as given, and fails anywhere.
            if find_error(error) is not None or not getattr(self.model, "restores", False):
                raise
            raise MPTError(
                f"--ckpt_path: the run's state in the checkpoint cannot be restored here ({type(error).__name__}: "
                f"{one_line(error)}). It is damaged, or was saved by another version or with other arguments. Use "
                "another checkpoint of the run, or start a new run without --ckpt_path."
            ) from error

    @rank_zero_only
    def _tell_what_the_checkpoint_overrides(self, checkpoint: PromptCheckpoint, given: dict[str, Any]) -> None:
        differ = [
            f"{key}={value!r} instead of {given[key]!r}"
            for key, value in checkpoint.hyper_parameters.items()
            if key in given and given[key] != value
        ]
        if differ:
            print(f"mpt: the checkpoint's arguments are used: {', '.join(differ)}", file=sys.stderr)


def _subclasses(cls: type[PromptModule]) -> set[type[PromptModule]]:
    return {cls}.union(*(_subclasses(child) for child in cls.__subclasses__()))


TEXT_OPTIONS = {
    "--data.answer_prefix", "--data.separator", "--data.card.input", "--model.init_text", "--model.instruction_text"
}  # fmt: skip


def shield_texts(argv: Sequence[str]) -> list[str]:
    """Hand texts with a colon over as a small config, since as an argument `label:` is read as a YAML mapping."""
    shielded: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in TEXT_OPTIONS:
            shielded.append(word)
            continue
        text = value if equals else next(words, "")
        if ":" not in text:
            shielded += [option, text]
            continue
        part, *path = option.removeprefix("--").split(".")
        nested: object = text
        for name in reversed([part, "init_args", *path]):
            nested = {name: nested}
        shielded.append(f"--config={json.dumps(nested)}")
    return shielded


def resolve_names(argv: Sequence[str]) -> list[str]:
    """Put paths where `--config` and `--data` have names of shipped files; a file of that name goes first."""
    kinds: dict[str, Kind] = {"--config": "configs", "-c": "configs", "--data": "tasks"}
    resolved: list[str] = []
    previous = ""
    for word in argv:
        option, equals, value = word.partition("=")
        kind, name = (kinds.get(option), value) if equals else (kinds.get(previous), word)
        file = packaged(kind, name) if kind and name and not Path(name).is_file() else None
        if kind == "configs" and file is not None and name.startswith("compare/"):
            raise MPTError(f"{name} is a comparison and no recipe. Run it with: mpt compare {name}")
        if kind and file is None and _looks_like_a_name(name):
            check_name(kind, name)
        if kind and name and file is None and Path(name).is_file():
            _check_yaml(Path(name))
        resolved.append(word if file is None else f"{option}={file}" if equals else str(file))
        previous = word
    return resolved


def _check_yaml(file: Path) -> None:
    """Refuse a file that is no YAML mapping, which the parser would take for other things first, for minutes."""
    content = read_yaml(file)
    if not isinstance(content, dict) or isinstance(content.get("trainer"), list):
        raise MPTError(
            f"{file} holds a {type(content).__name__}, expected a YAML mapping of arguments, as `trainer` is one."
        )


def _looks_like_a_name(word: str) -> bool:
    """Whether a word can only be meant as the name of a shipped file: no class path, no file, no option."""
    return bool(word) and not Path(word).exists() and not word.startswith("-") and "." not in Path(word).name


def check_name(kind: Kind, name: str) -> None:
    """Raise if a name is not one of a shipped file, with the names that are near."""
    known = packaged_names(kind)
    if kind == "tasks" and "/" not in name and name[:1].isupper():
        return  # a DataModule by its class's name
    near = difflib.get_close_matches(name, known, n=3) or known
    what = "recipe" if kind == "configs" else "task"
    raise MPTError(f"unknown {what} {name!r}. Expected a file or one of: {', '.join(near)}. `mpt {kind}` lists all.")
