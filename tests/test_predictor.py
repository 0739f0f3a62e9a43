"""Predictions equal those of the module in a Trainer, for any composition of the batch."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from tokenizers import processors

from mpt_lightning import CPT, MultitaskDataModule, Predictor, PromptTuning, load_task
from mpt_lightning.cli.main import main
from mpt_lightning.data import TaskCard
from mpt_lightning.predictor import predict_file
from tests.conftest import build_model, build_tokenizer

T5, LLAMA, BERT = "mpt_lightning/demo/t5", "mpt_lightning/demo/llama", "mpt_lightning/demo/bert"
TASKS = ["demo/voice", "demo/topic", "demo/similarity"]


def quiet(**options: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Train and return the paths of checkpoints of three tasks (a number, two and four choices), and of a context."""
    folder = tmp_path_factory.mktemp("predictor")
    L.seed_everything(0)
    options = {"cache_dir": str(folder / "cache"), "max_eval_rows": 12, "predict_split": "validation"}
    for name, backbone in (("t5", T5), ("llama", LLAMA), ("bert", BERT)):
        data = MultitaskDataModule(TASKS, sampling="all", batch_size=12, max_train_rows=48, **options)
        trainer = quiet(max_steps=6, max_epochs=-1, limit_val_batches=0)
        trainer.fit(PromptTuning(backbone, prompt_length=5, max_new_tokens=4), datamodule=data)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    options |= {"max_input_length": 20}
    data = load_task("demo/advice", context_shots=2, answer_prefix="label :", separator="", **options)
    trainer = quiet(max_steps=3, max_epochs=-1, limit_val_batches=0)
    trainer.fit(CPT(LLAMA, lr=0.01), datamodule=data)
    trainer.save_checkpoint(folder / "cpt.ckpt")
    return {name: str(folder / f"{name}.ckpt") for name in ("t5", "llama", "bert", "cpt")}


def expected(path: str, folder: Path) -> list[dict]:
    """Return the module's predictions in a Trainer."""
    found = torch.load(path, weights_only=True)
    stage = CPT if found["mpt_lightning"]["stage"] == "CPT" else PromptTuning
    options = found["datamodule_hyper_parameters"] | {"cache_dir": str(folder / "cache")}
    if stage is CPT:
        data = load_task("demo/advice", **{key: value for key, value in options.items() if key != "card"})
    else:
        data = MultitaskDataModule(**options)
    batches = quiet().predict(stage.load_from_checkpoint(path), datamodule=data)
    nested = batches if isinstance(batches[0][0], list) else [batches]
    return [record for task in nested for batch in task for record in batch]


@pytest.mark.parametrize("name", ["t5", "llama", "bert", "cpt"])
def test_mixed_batches_equal_the_modules_predictions(name: str, trained: dict[str, str], tmp_path: Path) -> None:
    records = expected(trained[name], tmp_path)
    shuffled = [records[n] for n in torch.randperm(len(records), generator=torch.Generator().manual_seed(1)).tolist()]
    predictor = Predictor.from_checkpoint(trained[name], batch_size=7)
    answers = predictor.predict([r["text"] for r in shuffled], [r["task"] for r in shuffled], 4, raw=True)
    for answer, record in zip(answers, shuffled, strict=True):
        if name == "bert" and answer.task == "demo/similarity":  # a value between the ends of the scale, not a word
            assert float(answer.prediction) == pytest.approx(float(record["prediction"]), abs=1e-4)
        else:
            assert answer.prediction == record["prediction"]
    assert [(answer.task, answer.text) for answer in answers] == [(r["task"], r["text"]) for r in shuffled]
    for answer in answers:
        if answer.task == "demo/similarity" and name == "bert":  # the part of the highest value's word
            assert float(answer.prediction) == pytest.approx(5 * answer.probabilities["five"], abs=1e-4)
        elif answer.task == "demo/similarity":
            assert answer.probabilities is None
        else:
            assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert max(answer.probabilities, key=answer.probabilities.get) == answer.prediction


def test_other_rows_in_a_batch_do_not_change_an_answer(trained: dict[str, str]) -> None:
    predictor = Predictor.from_checkpoint(trained["llama"])
    texts = ["the dog found the cup .", "in the park the red cup was moved by the girl ."]
    together = predictor.predict(texts, ["demo/voice", "demo/topic"])
    for text, task, answer in zip(texts, ["demo/voice", "demo/topic"], together, strict=True):
        (alone,) = predictor.predict([text], task)
        assert alone.probabilities == pytest.approx(answer.probabilities, rel=1e-4)


def test_columns_are_rendered_with_the_cards_template(trained: dict[str, str]) -> None:
    predictor = Predictor.from_checkpoint(trained["cpt"])
    (row,) = predictor.predict([{"sentence": "you should see it ."}])
    assert row.text == "sentence : you should see it . label :"
    assert predictor.predict(["sentence : you should see it . label :"], raw=True)[0] == row
    assert predictor.predict(["you should see it ."])[0] == row


def test_a_single_string_or_mapping_is_one_row(trained: dict[str, str]) -> None:
    predictor = Predictor.from_checkpoint(trained["cpt"])
    (row,) = predictor.predict("you should see it .")
    assert row.text == "sentence : you should see it . label :"
    assert predictor.predict({"sentence": "you should see it ."}) == [row]
    assert predictor.predict(row.text, "demo/advice", raw=True) == [row]
    assert predictor.predict([]) == []


def test_rows_are_cut_as_in_training(trained: dict[str, str]) -> None:
    predictor = Predictor.from_checkpoint(trained["cpt"])
    (row,) = predictor.predict("you should see it . " * 10)
    assert len(row.text.split()) == 20
    assert row.text.endswith("it . you label :")
    with pytest.raises(ValueError, match=r"has 44 tokens, expected 1 to 20; change the text"):
        predictor.predict(f"sentence : {'you should see it . ' * 8}label :", raw=True)


def test_rows_follow_the_context_without_bos(tmp_path: Path) -> None:
    """The probabilities equal those of one pass of the bare model over context, row and answer."""
    tokenizer, model = build_tokenizer("llama"), build_model("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "reviews").mkdir()
    rows = [{"text": f"the film was {word}", "label": label} for label, word in enumerate(("boring", "fun"))]
    (tmp_path / "reviews/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["not very good", "great"]
    card = {"name": "reviews", "path": "me/reviews", "input": "{text} :", "choices": words, "metrics": ["accuracy"]}
    data = load_task(
        TaskCard(**card),
        context_shots=1,
        separator="",
        max_input_length=20,
        data_root=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
    )
    trainer, module = quiet(max_steps=2, max_epochs=-1, limit_val_batches=0), CPT(str(tmp_path / "model"), lr=0.1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "cpt.ckpt")
    (answer,) = Predictor.from_checkpoint(str(tmp_path / "cpt.ckpt")).predict("a happy story")
    context = module.prompt(torch.tensor([0])).embeddings
    likelihoods = []
    for word in words:
        text, own = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("a happy story :", word))
        ids = torch.tensor([[*text, *own, tokenizer.eos_token_id]])
        embeds = torch.cat([context, model.get_input_embeddings()(ids)], dim=1)
        with torch.no_grad():
            log_probs = model(inputs_embeds=embeds).logits.log_softmax(-1)[0, -len(own) - 2 : -1]
        likelihoods.append(log_probs.gather(1, ids[0, -len(own) - 1 :, None]).sum())
    expected = torch.stack(likelihoods).softmax(0).tolist()
    assert list(answer.probabilities.values()) == pytest.approx(expected, rel=1e-4)


def test_choices_that_cannot_be_tokenised_raise(trained: dict[str, str]) -> None:
    found = Predictor.from_checkpoint(trained["llama"])
    cards = {"demo/voice": replace(found.cards["demo/voice"], choices=["active", "zebra"])}
    with pytest.raises(ValueError, match=r"Task 'demo/voice': got the choices 'zebra', which becomes \['<unk>'\]"):
        Predictor(found.backbone, found.prompt, cards)


def test_a_checkpoint_of_trained_weights_predicts_too(tmp_path: Path) -> None:
    from mpt_lightning import FineTuning

    data = load_task("demo/voice", max_train_rows=32, cache_dir=str(tmp_path), batch_size=8)
    trainer = quiet(max_steps=4, max_epochs=-1, limit_val_batches=0)
    module = FineTuning(T5, train="head", lr=0.01)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    predictor = Predictor.from_checkpoint(str(tmp_path / "head.ckpt"))
    (answer,) = predictor.predict([{"sentence": "the dog found the cup ."}])
    assert set(answer.probabilities) == set(predictor.cards["demo/voice"].choices)
    for name, value in module.state_dict().items():
        assert torch.equal(predictor.backbone.state_dict()[name.removeprefix("backbone.")], value)


@pytest.mark.parametrize(
    ("texts", "tasks", "message"),
    [
        (["a"], None, "There are several tasks"),
        (["a"], "demo/advice", "Unknown task demo/advice; the checkpoint has demo/voice, demo/topic"),
        (["a", "b"], ["demo/voice"], "Got 2 texts and 1 tasks"),
        (["a", " "], "demo/voice", r"Text 1 \(task demo/voice\) has nothing in sentence"),
        ([{"text": "a"}], "demo/voice", "has no sentence; the card reads sentence"),
        ([None], "demo/voice", r"Text 0 \(task demo/voice\): got NoneType, expected a string or a mapping of columns"),
        (["a", 3], "demo/voice", r"Text 1 \(task demo/voice\): got int, expected a string or a mapping"),
        (
            "a",
            "demo/similarity",
            "got a string, expected a mapping of the columns sentence1, sentence2; give these, or",
        ),
        (
            {"sentence": ["a", "b"]},
            "demo/voice",
            r"Text 0 \(task demo/voice\): got sentence=.* \(list\), expected text",
        ),
    ],
)
def test_mistakes_raise(texts: Any, tasks: object, message: str, trained: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor.from_checkpoint(trained["llama"]).predict(texts, tasks)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", " "], r"Text 1 \(task demo/voice\) has nothing in text"),
        (["word " * 300], "has 300 tokens, expected 1 to 256; change the text, or give its columns"),
        ([{"sentence": "a"}], "got dict, expected a string; change `texts`"),
    ],
)
def test_mistakes_in_raw_texts_raise(texts: list, message: str, trained: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor.from_checkpoint(trained["llama"]).predict(texts, "demo/voice", raw=True)


def test_the_command_answers_a_file(
    trained: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"task": "demo/topic", "text": "the dog ran ."},
        {"task": "demo/voice", "sentence": "the cup was found by the girl ."},
        {"task": "demo/similarity", "sentence1": "the dog ran .", "sentence2": "the cat ran ."},
    ]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    command = ["predict", "--ckpt_path", trained["llama"], "--input", "in.jsonl", "--output", "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["mpt"])
    main(command)
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [answer["task"] for answer in answers] == [row["task"] for row in rows]
    assert answers[1]["prediction"] in ("active", "passive")
    assert answers[0]["text"] == "sentence : the dog ran ."
    for line, message in [
        ("{", "in.jsonl, line 2 is not JSON"),
        ("[1]", "in.jsonl, line 2: expected an object"),
        ('{"text": "a"}', "in.jsonl, line 2: got task=None, expected one of demo/voice"),
        ('{"task": "demo/x", "text": "a"}', "in.jsonl, line 2: got task='demo/x'"),
        ('{"task": "demo/similarity", "sentence1": "a"}', "in.jsonl, line 2: the field sentence2 is missing"),
        (
            '{"task": "demo/similarity", "text": "a"}',
            "line 2: the field sentence1, sentence2 is missing. Expected sentence1, sentence2",
        ),
    ]:
        Path("in.jsonl").write_text(json.dumps(rows[0]) + "\n" + line + "\n")
        with pytest.raises(SystemExit):
            main([*command[:-1], "other.jsonl"])
        assert message in capsys.readouterr().err
        assert not list(Path().glob("other.jsonl*"))
    Path("in.jsonl").write_text(json.dumps({"task": "demo/topic", "text": answers[0]["text"]}))
    main([*command[:-1], "raw.jsonl", "--raw"])
    raw = json.loads(Path("raw.jsonl").read_text())
    assert raw["probabilities"] == pytest.approx(answers[0]["probabilities"], rel=1e-4)
    with pytest.raises(SystemExit):
        main(command)
    assert "out.jsonl exists" in capsys.readouterr().err


def test_a_binary_file_raises(trained: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        predict_file(Predictor.from_checkpoint(trained["cpt"]), str(tmp_path / "in.jsonl"), str(tmp_path / "out"))


def test_another_backbone_is_refused(trained: dict[str, str], model_folder: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="was trained on the backbone"):
        Predictor.from_checkpoint(trained["llama"], backbone=model_folder("llama"))
