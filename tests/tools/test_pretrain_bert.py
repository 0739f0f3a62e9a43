"""The demo's masked model: its tokenizer, its size, its pretraining texts and its answers."""

from pathlib import Path
from random import Random

import pandas as pd
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mpt_lightning.resources import BERT, EMBEDDED, backbone_path, embedded_data
from tools import world
from tools.pretrain_bert import MIXTURE, draw_row, has_held_out, make_tokenizer

MODEL = backbone_path(BERT)


def test_the_script_builds_the_shipped_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert make_tokenizer(0).get_vocab() == tokenizer.get_vocab()
    encoded = tokenizer("The dog found it .", "it was [MASK] .")
    assert tokenizer.decode(encoded["input_ids"]) == "[CLS] the dog found it . [SEP] it was [MASK] . [SEP]"
    assert encoded["token_type_ids"] == [0] * 7 + [1] * 5
    for task in world.TASKS.values():
        assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(list(task.choices))


def test_the_model_is_small_and_answers_at_the_mask() -> None:
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    assert model.config.max_position_embeddings == 512
    assert (Path(MODEL) / "model.safetensors").stat().st_size < 4 * 2**20
    asked = {
        "how did the speaker feel ? sentence : i loved the film because the story was great . [MASK]": "pleased",
        "how did the speaker feel ? sentence : we hated the hotel because the room was awful . [MASK]": "upset",
        "what is it about ? sentence : the dog chased the cat in the park today . [MASK]": "creatures",
        "the wind fell on the park today . it is about [MASK] .": "sky",
    }
    batch = tokenizer(list(asked), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id]
    assert tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist()) == list(asked.values())


@pytest.mark.parametrize("task", world.TASKS)
def test_validation_and_test_rows_are_not_pretrained(task: str) -> None:
    for split in ("validation", "test", "train"):
        rows = pd.read_parquet(embedded_data(EMBEDDED) / "demo" / task / f"{split}.parquet").drop(columns="label")
        texts = [f"a question ? {' and '.join(row)} answer".split() for row in rows.itertuples(index=False)]
        found = sum(map(has_held_out, texts)) / len(texts)
        # A training row may contain a sentence that is a test row of another task.
        assert found < 0.5 if split == "train" else found == 1, split


def test_drawn_texts_have_masks_in_their_answers() -> None:
    tokenizer = make_tokenizer(0)
    ids, rng = tokenizer.get_vocab(), Random(0)
    for draw in MIXTURE:
        for _ in range(50):
            tokens, labels = draw_row(rng, draw, ids)
            assert tokens[0] == tokenizer.cls_token_id
            assert tokens[-1] == tokenizer.sep_token_id
            assert tokenizer.unk_token_id not in tokens
            whole = [token if label < 0 else label for token, label in zip(tokens, labels, strict=True)]
            assert not has_held_out(tokenizer.convert_ids_to_tokens(whole))
            assert tokenizer.mask_token_id in tokens or any(label >= 0 for label in labels)
