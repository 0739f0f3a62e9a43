"""Joint tokenisation: the ids of an input and its answer equal those of the joined text."""

from collections import Counter
from itertools import product
from random import Random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mpt_lightning.data import TaskDataModule, build_context
from mpt_lightning.data.examples import Example
from mpt_lightning.data.formats import CausalFormat

WORDS = "it was a good film and the bad film was not very good so I am happy to see the sad end of it , again !".split()
ANSWERS = ["good", "bad", "not good", "the end", "so happy", "xyz", "3.4"]
KINDS = ["bytes", "llama", "across", "words", "unigram"]


def corpus() -> list[str]:
    rng = Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(300)]


def build(kind: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer: byte-level BPE, Llama's, BPE with tokens across words, WordPiece, or Unigram across words."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "words":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True)), trainers.BpeTrainer
        if kind == "bytes":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif kind == "llama":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if kind == "bytes" else {}
    if kind == "unigram":
        options["unk_token"] = "<unk>"
    # Llama's merges were learned within words.
    texts = [word for text in corpus() for word in text.split()] if kind == "llama" else corpus()
    tokenizer.train_from_iterator(
        texts, trainer(vocab_size=330, special_tokens=special, show_progress=False, **options)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@pytest.fixture(scope="module")
def formats() -> dict[str, CausalFormat]:
    return {kind: CausalFormat(build(kind)) for kind in KINDS}


def ids_of(reader: CausalFormat, text: str) -> list[int]:
    return list(reader.tokenizer(text, verbose=False)["input_ids"])


def is_prefix(ids: list[int], of: list[int]) -> bool:
    return of[: len(ids)] == ids


def texts(count: int = 150) -> list[str]:
    rng = Random(1)
    return [" ".join(rng.choices([*WORDS, "xyz", "label:"], k=rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_choice_are_tokenised_as_one(kind: str, formats: dict[str, CausalFormat]) -> None:
    reader, found, eos = formats[kind], Counter(), [formats[kind].tokenizer.eos_token_id]
    choices = ANSWERS[:3]
    placed = reader.encode_inputs(texts(), choices)
    rows = reader.choices(placed, choices)
    for text, place, own in zip(texts(), placed, rows, strict=True):
        alone, spaced = ids_of(reader, text), ids_of(reader, f"{text} ")
        together = [ids_of(reader, f"{text} {choice}") for choice in choices]
        if all(is_prefix(alone, ids) for ids in together):
            border, kind_of_row = alone, "before the space"
        elif all(is_prefix(spaced, ids) for ids in together):
            border, kind_of_row = spaced, "after the space"
        else:
            border, kind_of_row = alone, "neither"
        found[kind_of_row] += 1
        assert place.ids == border
        for choice, ids, labels in zip(choices, together, own, strict=True):
            assert labels == (ids[len(border) :] + eos if is_prefix(border, ids) else reader.targets([choice])[0])
    joined = {place for place in found if place != "neither"}
    expected = {"across": {"before the space", "after the space"}, "unigram": {"before the space"}}
    assert joined == expected.get(kind, {"before the space"})
    assert kind == "unigram" or found["neither"] < len(placed) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_free_answers_are_tokenised_with_the_text(kind: str, formats: dict[str, CausalFormat]) -> None:
    reader, joined = formats[kind], 0
    pairs = list(product(texts(40), ANSWERS))
    placed = reader.encode_inputs([text for text, _ in pairs], None)
    for (text, answer), place, labels in zip(
        pairs, placed, reader.answers(placed, [answer for _, answer in pairs]), strict=True
    ):
        # The tokens before an answer must not depend on it, since a generated answer is not known in advance.
        assert place == reader.encode_inputs([text], None)[0]
        together = ids_of(reader, f"{text} {answer}")
        if is_prefix(place.ids, together):
            joined += 1
            assert [*place.ids, *labels] == [*together, reader.tokenizer.eos_token_id]
        else:
            assert labels == reader.targets([answer])[0]
    assert joined >= 0.6 * len(pairs)


def test_space_is_tokenised_with_the_word_before(formats: dict[str, CausalFormat]) -> None:
    reader = formats["across"]
    (placed,) = reader.encode_inputs(["it was"], ["good", "bad"])
    tokens = [*placed.ids, *reader.choices([placed], ["good"])[0][0]]
    assert reader.tokenizer.convert_ids_to_tokens(tokens)[-3:] == ["was▁", "good", "</s>"]
    assert placed.text == "it was "


@pytest.mark.parametrize("kind", KINDS)
def test_whitespace_at_the_end_of_a_text(kind: str, formats: dict[str, CausalFormat]) -> None:
    reader = formats[kind]
    one, none, line = reader.encode_inputs(["it was ", "it was", "it was\n"], ["good"])
    assert one == none
    (labels,) = reader.answers([line], ["good"])
    together = ids_of(reader, "it was\ngood")
    assert line.ids == ids_of(reader, "it was\n")
    if is_prefix(line.ids, together):
        assert [*line.ids, *labels] == [*together, reader.tokenizer.eos_token_id]
    else:
        assert labels == reader.targets(["good"])[0]


@pytest.mark.parametrize("kind", ["bytes", "llama", "across"])
def test_answer_after_a_prompts_place(kind: str, formats: dict[str, CausalFormat]) -> None:
    reader = formats[kind]
    inside, last = reader.encode_inputs(["a film [prompt*2] it was", "a film [prompt*2]"], ["good"])
    (labels, _) = reader.answers([inside, last], ["good", "good"])
    start = inside.ids.index(-2) + 1
    assert inside.ids[start - 2 : start] == [-1, -2]
    assert [*inside.ids[start:], *labels] == [*ids_of(reader, " it was good")[1:], reader.tokenizer.eos_token_id]
    assert last.ids[-2:] == [-1, -2]


def test_each_row_is_tokenised_once(formats: dict[str, CausalFormat], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, counts = CausalFormat(formats["llama"].tokenizer), Counter()
    original = CausalFormat.inputs

    def counting(self: CausalFormat, texts: list[str]) -> list[list[int]]:
        counts["texts"] += len(texts)
        return original(self, texts)

    monkeypatch.setattr(CausalFormat, "inputs", counting)
    placed = reader.encode_inputs([f"{text} label:" for text in texts(500)], ANSWERS)
    reader.choices(placed, ANSWERS)
    assert 500 <= counts["texts"] <= 500 + len(ANSWERS)


# In batches and contexts


@pytest.fixture(params=["llama", "across"])
def module(request, make_card, write_split, tmp_path, formats) -> TaskDataModule:
    folder = tmp_path / "backbone"
    formats[request.param].tokenizer.save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts(40))]
    root = write_split(rows)
    write_split(rows, split="validation")
    card = make_card(input="so {text} it was", choices=["bad", "good"])
    module = TaskDataModule(
        card, backbone=str(folder), data_root=root, cache_dir=str(tmp_path / "cache"), context_shots=2,
        context_rows="apart", separator=" ! ", batch_size=8,
    )  # fmt: skip
    module.setup("fit")
    return module


def test_batches_and_context_have_joint_tokens(module: TaskDataModule) -> None:
    tokenizer = module.tokenizer

    def joint(text: str, answer: str) -> list[int]:
        return tokenizer(f"{text} {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

    def known(row: list[int]) -> list[int]:
        return [token for token in row if token != -100]

    words = ["bad", "good"]
    for batch in module.val_dataloader()[0]:
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, text in enumerate(batch["texts"]):
            ids = batch["input_ids"][row, : lengths[row]].tolist()
            choices = [known(choice) for choice in batch["choices"][row].tolist()]
            assert [[*ids, *choice] for choice in choices] == [joint(text, word) for word in words]
            assert known(batch["labels"][row].tolist()) == choices[words.index(batch["references"][row][0])]
    decoded = {tuple(joint(f"so {text} it was", words[number % 2])) for number, text in enumerate(texts(40))}
    for batch in module.train_dataloader():
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, length in enumerate(lengths):
            ids = batch["input_ids"][row, :length].tolist() + known(batch["labels"][row].tolist())
            assert tuple(ids) in decoded
    (card,), context = module.cards.values(), module.context
    example = Example(0, {"text": "the film"}, "bad", ["bad"], "")
    alone = build_context(card, [example], module.encoder, "", None)
    assert alone.token_ids == [tokenizer.bos_token_id, *joint("so the film it was", "bad")]
    kinds = Counter(alone.token_types)
    assert kinds[4] == len(alone.token_ids) - 1 - kinds[1] - kinds[2]
    assert kinds[3] == 0
    assert kinds[4] >= 2
    assert len(context.row_ids) == 4
