"""The demo's generated sentences, task cards, tokenizer and T5."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from mpt_lightning.data.card import load_card
from mpt_lightning.resources import EMBEDDED, T5, backbone_path, embedded_data
from tools import pretrain_t5
from tools.world import SHIPPED, SOURCES, TARGETS, TASKS, make_rows, write_world

MODEL = backbone_path(T5)
DATA = embedded_data(EMBEDDED) / "demo"


def read(file: Path) -> list[dict[str, str | int | float]]:
    return pd.read_parquet(file).to_dict("records")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_six_sources_and_four_targets() -> None:
    assert (len(SOURCES), len(TARGETS), len(TASKS)) == (6, 4, 10)


def test_rows_depend_on_the_seed() -> None:
    counts = {"train": 240, "validation": 48, "test": 48}
    assert make_rows("voice", counts, seed=1) == make_rows("voice", counts, seed=1)
    assert make_rows("voice", counts, seed=1) != make_rows("voice", counts, seed=2)


def test_write_world_reproduces_the_shipped_files(tmp_path: Path) -> None:
    write_world(tmp_path)
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.parquet"))
    assert files == sorted(file.relative_to(DATA) for file in DATA.rglob("*.parquet"))
    for file in files:
        assert read(tmp_path / file) == read(DATA / file) == make_rows(file.parts[0], SHIPPED, seed=0)[file.stem]


@pytest.mark.parametrize("task", TASKS)
def test_shipped_rows_are_balanced_and_in_one_split(task: str) -> None:
    splits = {split: read(DATA / task / f"{split}.parquet") for split in SHIPPED}
    assert {split: len(rows) for split, rows in splits.items()} == SHIPPED
    texts = [tuple(v for k, v in row.items() if k != "label") for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)
    for rows in splits.values():
        count = Counter(int(row["label"]) for row in rows)
        assert set(count) == set(range(len(TASKS[task].choices)))
        assert max(count.values()) - min(count.values()) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_card_names_the_labels_and_the_columns(task: str) -> None:
    card = load_card(f"demo/{task}")
    row = read(DATA / task / "test.parquet")[0]
    assert (card.path, card.subset) == ("mpt_lightning/demo", task)
    assert card.input == " ".join(f"{field} : {{{field}}}" for field in row if field != "label")
    if TASKS[task].numeric:
        assert card.value_range == (0.0, 5.0)
        assert card.value_step == 1.0
    else:
        assert card.choices == list(TASKS[task].choices)


@pytest.mark.parametrize("task", TASKS)
def test_every_word_is_in_the_shipped_vocabulary(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    card, unknown = load_card(f"demo/{task}"), tokenizer.unk_token_id
    texts = [card.input.format(**row) for row in read(DATA / task / "train.parquet")]
    assert not [text for text in texts if unknown in tokenizer(text)["input_ids"]]
    for word in TASKS[task].choices:  # each label is one token, so ranking compares sequences of equal length
        assert len(tokenizer(word)["input_ids"]) == 2
        assert unknown not in tokenizer(word)["input_ids"]


@pytest.mark.parametrize("target", TARGETS)
def test_instructions_avoid_the_label_words_of_targets(target: str) -> None:
    answers = {word for skill in pretrain_t5.SKILLS for word in skill.answers}
    answers |= {word for code in pretrain_t5.CODES.values() for word in code} | {"yes", "no"}
    assert not answers & set(TARGETS[target].choices)
    assert set(TARGETS[target].choices) <= set(pretrain_t5.SAYABLE)  # plain text does contain them


def test_the_script_builds_the_shipped_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "the red cup was found by the dog , in the park ."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("The DOG found it.")["input_ids"][-2:] == tokenizer(".")["input_ids"]
    assert pretrain_t5.make_tokenizer(0).get_vocab() == tokenizer.get_vocab()


def test_shipped_model_is_small_and_answers_questions(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(MODEL).eval()
    assert 1e6 < model.num_parameters() < 4e6
    assert (Path(MODEL) / "model.safetensors").stat().st_size < 8 * 2**20
    asked = {
        "how did the speaker feel ? sentence : i loved the film because the story was great .": "pleased",
        "how did the speaker feel ? sentence : we hated the hotel because the room was awful .": "upset",
        "what is it about ? sentence : the dog chased the cat in the park today .": "creatures",
        "which colour ? sentence : the girl found the red cup in the park .": "red",
    }
    batch = tokenizer(list(asked), padding=True, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == list(asked.values())
