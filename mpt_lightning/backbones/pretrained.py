"""Loading a model's configuration and tokenizer by Hub id or folder; code that comes with a model is never run."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line
from mpt_lightning.resources import backbone_path


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Load a model's configuration; raise if it cannot be found, reached or read, or needs the model's own code."""
    if not isinstance(name_or_path, str) or not name_or_path:
        raise MPTError(f"The backbone must be a Hub id or a folder, got {name_or_path!r}.")
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().is_dir():
        raise MPTError(f"The backbone {name_or_path!r} looks like a folder, which does not exist.")
    expected = "a folder with a config.json, or the id of a Hub model that can be reached from here, of a type that "
    expected += "transformers has; code that comes with a model is never run"
    return _load(AutoConfig, name_or_path, f"the backbone {name_or_path!r}", expected)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; raise if it cannot be found, reached or read, or needs the model's own code."""
    expected = "tokenizer files beside the model's, which need no code of their own"
    return _load(AutoTokenizer, name_or_path, f"the tokenizer of {name_or_path!r}", expected)


def _load(kind: Any, name_or_path: str, content: str, expected: str) -> Any:
    try:
        # By default transformers asks on the terminal whether to run a model's code.
        return kind.from_pretrained(backbone_path(name_or_path), trust_remote_code=False)
    except Exception as error:  # damaged files fail anywhere in transformers and tokenizers
        raise MPTError(f"Cannot load {content}. Expected {expected}. The cause: {one_line(error)}") from error
