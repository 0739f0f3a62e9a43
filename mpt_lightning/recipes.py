"""A recipe becomes a model, its data and a Trainer: the LightningCLI behind `mpt` and `mpt compare`."""

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.data import MultitaskDataModule, TaskDataModule
from mpt_lightning.errors import MPTError, find_error
from mpt_lightning.io import one_line, read_yaml
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.evaluation import NO_PROMPT
from mpt_lightning.resources import Kind, find_file, packaged

# Imported, so that these and all modules are known by their short names.
DATA_MODULES = (TaskDataModule, MultitaskDataModule)
_load_yaml = get_loader("yaml")


def load_argument(text: str, path: Any = "") -> Any:
    """Parse YAML; one line like `label :` is a string unless it is the content of a recipe, whose path is given.

    jsonargparse reads such a line as a mapping, which no argument for a text accepts: on the command line, mappings
    are in braces.
    """
    value = _load_yaml(text)
    is_text = isinstance(value, dict) and "\n" not in text and not text.lstrip().startswith("{") and not path
    return text if is_text else value


set_loader("yaml", load_argument, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """A parser whose errors are one message, without two pages of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message, or the package's own error that caused it."""
        cause = find_error(ex) if ex is not None else None
        raise cause or MPTError(" ".join(message.split()))


class MPTCLI(LightningCLI):
    """LightningCLI for any module and any data, in which a checkpoint does not replace the arguments of a run.

    The arguments, by default the process's, may name shipped recipes and cards; see `LightningCLI` for the others.
    """

    def __init__(self, args: Sequence[str] | None = None, **kwargs: Any) -> None:
        words = resolve_names(sys.argv[1:] if args is None else args)
        self._command = next(iter(words), "")
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=words,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"prog": "mpt", "allow_abbrev": False},
            **kwargs,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the requested command alone, since building the parsers of the others takes most of the time."""
        known = LightningCLI.subcommands()
        return {self._command: known[self._command]} if self._command in known else known

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then check `--ckpt_path` against the model, since Lightning lets the checkpoint win."""
        # LightningCLI's own method warns if these are not the process's arguments.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        command = self.config.subcommand
        options = self.config[command]
        name, path = options.model.class_path.rpartition(".")[2], options.get("ckpt_path")
        ours = PromptModule.classes.get(name)
        if ours is None or path in ("best", "last", "hpc"):
            return
        arguments = options.model.get("init_args")
        if path:
            checkpoint = read_checkpoint(path)
            ours.check_stage(checkpoint)
            if command != "fit":
                _report_overrides(checkpoint, ours.plain_arguments(arguments.as_dict() if arguments else {}))
        elif command != "fit" and ours.needs_checkpoint(arguments):
            raise MPTError(NO_PROMPT)

    def _parse_ckpt_path(self) -> None:
        """Keep the arguments of a run that resumes: the module reports where the checkpoint's count instead."""
        if self.config.subcommand != "fit":
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
        except Exception as error:  # Lightning does not check what it restores, so any exception is possible
            if find_error(error) is not None or not getattr(self.model, "restores", False):
                raise
            raise MPTError(
                f"--ckpt_path: the run's state in the checkpoint cannot be restored here ({type(error).__name__}: "
                f"{one_line(error)}). It is damaged, or was saved by another version or with other arguments. Use "
                "another checkpoint of the run, or start a new run without --ckpt_path."
            ) from error


@rank_zero_only
def _report_overrides(checkpoint: PromptCheckpoint, given: dict[str, Any]) -> None:
    differ = [
        f"{key}={value!r} instead of {given[key]!r}"
        for key, value in checkpoint.hyper_parameters.items()
        if key in given and given[key] != value
    ]
    if differ:
        print(f"mpt: the checkpoint's arguments are used: {', '.join(differ)}", file=sys.stderr)


KINDS: dict[str, Kind] = {"--config": "configs", "-c": "configs", "--data": "tasks"}


def resolve_names(words: Sequence[str]) -> list[str]:
    """Replace the names of shipped files that follow `--config` and `--data` by their paths."""
    resolved: list[str] = []
    for option, word in pairwise(["", *words]):
        name, equals, value = word.partition("=")
        if equals and name in KINDS:
            word = f"{name}={_find(KINDS[name], value)}"
        elif option in KINDS:
            word = _find(KINDS[option], word)
        resolved.append(word)
    return resolved


def _find(kind: Kind, name: str) -> str:
    """Return the path of a shipped file; a file of that name, a class or a mapping is returned as it is."""
    if Path(name).is_file():
        # The parser would try other meanings of a file that is not a mapping first, for minutes.
        content = read_yaml(Path(name))
        if not isinstance(content, dict) or isinstance(content.get("trainer"), list):
            raise MPTError(
                f"{name} contains a {type(content).__name__}. Expected mappings of arguments, as `trainer` is."
            )
        return name
    if kind == "configs" and name.startswith("compare/") and packaged(kind, name):
        raise MPTError(f"{name} is a comparison and not a recipe. Run it with: mpt compare {name}")
    return str(find_file(kind, name)) if re.fullmatch(r"[a-z][\w/-]*(\.yaml)?", name) else name
