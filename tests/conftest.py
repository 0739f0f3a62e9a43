"""Small models built from a config: no download, built in seconds, loaded by the real code."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Libraries are imported where they are used: the process that only controls the others needs none.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Lightning 2.6 calls what jsonargparse 4.49 deprecated; this is jsonargparse's own switch.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
# On small tensors a second thread costs more than it does. torch reads the variable when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCABULARY = 120
WORDS = """the a good bad film plot was is not very great awful yes no positive negative sentence question answer
what where when who red blue green 0 1 2 3 4 5 . , ? : true false first second same other park house dog cat ran sat
on in near happy sad story people like hate love boring fun slow long short old new with and or but""".split()

KINDS = ["t5", "gpt2", "llama"]


def build_model(kind: str, scale: float = 1.0, layers: int = 2) -> PreTrainedModel:
    """Build a tiny random model with weights large enough that every part of it shows in the logits."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, dropout_rate=0.1,
            initializer_factor=2.0 * scale, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval()
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=96, initializer_range=0.2 * scale,
            bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.2 * scale, bos_token_id=1,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def build_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer; T5's appends </s>, as the real one does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def pytest_collection_finish() -> None:
    """Exclude what was imported from later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def shallow_stacks() -> Iterator[None]:
    """Keep `inspect.stack` from reading source: Lightning's `load_from_checkpoint` needs only the files' names."""
    stack = inspect.stack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", lambda context=0: stack(context))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that returns the folder of a tiny model with its tokenizer."""
    folders: dict[tuple[str, int], str] = {}

    def folder(kind: str, layers: int = 2) -> str:
        import torch

        if (kind, layers) not in folders:
            path = tmp_path_factory.mktemp("models") / kind
            with torch.random.fork_rng():  # the test that needs the model first may have set a seed
                build_model(kind, layers=layers).save_pretrained(path)
            build_tokenizer(kind).save_pretrained(path)
            folders[kind, layers] = str(path)
        return folders[kind, layers]

    return folder


@pytest.fixture
def data_root() -> Path:
    """Return the folder of real data in the Hub's layout; skip the test if MPT_DATA_ROOT names none."""
    root = os.environ.get("MPT_DATA_ROOT", "")
    if not root or not Path(root).is_dir():
        pytest.skip("MPT_DATA_ROOT names no folder with real data")
    return Path(root)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Return the folder of a pretrained BERT, in MPT_MODEL_ROOT or beside the real data; skip the test without it."""
    root = os.environ.get("MPT_MODEL_ROOT") or Path(os.environ.get("MPT_DATA_ROOT", "no data")).parent / "models"
    path = Path(root) / "minilm-l6-mlm"
    if not path.is_dir():
        pytest.skip("neither MPT_MODEL_ROOT nor the folder beside MPT_DATA_ROOT has minilm-l6-mlm")
    return str(path)


def make_batch(rows: int = 5, length: int = 7, labels: int = 3, tasks: int = 3) -> dict[str, torch.Tensor]:
    """Build a right-padded batch of mixed tasks with rows and labels of different lengths."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    targets = torch.randint(3, VOCABULARY, (rows, labels), generator=generator)
    for row in range(rows):
        mask[row, length - row % 4 :] = 0
        targets[row, labels - row % labels :] = -100
    ids[mask == 0] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": targets,
        "task_ids": torch.arange(rows) * 2 % tasks,
    }


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """See `make_batch`."""
    return make_batch()
