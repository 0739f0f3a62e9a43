import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast, T5Config

from mpt_lightning.data.card import TaskCard

WORDS = """good bad film a the one two three four five six seven eight nine ten task text question context 0 1 2 3 . :
yes no 4 5 6 7 8 9 not entailment neutral contradiction positive negative True False""".split()


def save_backbone(folder: Path, kind: str) -> str:
    """Save a word-level tokenizer and a config; data is prepared without weights."""
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A </s>" if kind == "seq2seq" else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<s>", 3)])
    pad = {"pad_token": "<pad>"} if kind == "seq2seq" else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", bos_token="<s>", **pad
    ).save_pretrained(folder)
    (T5Config() if kind == "seq2seq" else LlamaConfig()).save_pretrained(folder)
    return str(folder)


def save_byte_backbone(folder: Path) -> str:
    """Save a byte-level BPE tokenizer ("Ġgood", "Ġfilm", single bytes) that prepends BOS, with a Llama config."""
    merges = ["Ġ g", "Ġg o", "Ġgo o", "Ġgoo d", "Ġ f", "Ġf i", "Ġfi l", "Ġfil m"]
    tokens = [
        "<pad>",
        "</s>",
        "<s>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(m.replace(" ", "") for m in merges),
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in map(str.split, merges)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    ).save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    words = {kind: save_backbone(tmp_path_factory.mktemp(kind), kind) for kind in ("seq2seq", "causal")}
    return {**words, "bytes": save_byte_backbone(tmp_path_factory.mktemp("bytes"))}


@pytest.fixture
def make_card():
    def make(**fields) -> TaskCard:
        return TaskCard(
            **{
                "name": "film",
                "path": "someone/film",
                "input": "task text: {text}",
                "metrics": ["accuracy"],
                "choices": ["bad", "good"],
                **fields,
            }
        )

    return make


@pytest.fixture
def write_split(tmp_path: Path):
    """Return a function that writes rows to `<tmp_path>/data/<task>/<split>.jsonl` and returns the data root."""

    def write(rows: list[dict], task: str = "film", split: str = "train") -> str:
        file = tmp_path / "data" / task / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / "data")

    return write


@pytest.fixture
def film_rows():
    def rows(count: int, words: int = 3) -> list[dict]:
        """Return rows with alternating labels, whose text contains the row's number in digits."""
        texts = [" ".join([*str(n), *["film"] * (words - 1)]) for n in range(count)]
        return [{"text": text, "label": n % 2} for n, text in enumerate(texts)]

    return rows


@pytest.fixture
def film(make_card, write_split, film_rows, tmp_path, backbones):
    """Return arguments of a DataModule with 40 training rows, and 7 rows each for validation and test."""
    for split, count in (("train", 40), ("validation", 7), ("test", 7)):
        root = write_split(film_rows(count), split=split)
    return {
        "card": make_card(),
        "data_root": root,
        "backbone": backbones["seq2seq"],
        "cache_dir": str(tmp_path / "cache"),
        "batch_size": 8,
    }
