"""Loading a model's tokenizer by Hub id or folder."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line
from mpt_lightning.resources import backbone_path


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; no code that comes with the model is run.

    Raises:
        MPTError: there is none, or it cannot be read or reached.
    """
    try:
        # Unless it is switched off, transformers asks on the terminal whether to run code that comes with a model.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            backbone_path(name_or_path), trust_remote_code=False
        )
    except Exception as error:  # damaged files fail anywhere in transformers and tokenizers
        raise MPTError(
            f"Cannot load the tokenizer of {name_or_path!r}. Expected tokenizer files beside the model's, which need "
            f"no code of their own. The cause: {one_line(error)}"
        ) from error
    return tokenizer
