"""Classic fine-tuning and prompts with a new classifier on [CLS], compared with a hand-written loop."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mpt_lightning import FineTuning, MultitaskDataModule, Predictor, PromptTuning, TaskDataModule
from mpt_lightning.checkpoint import KEY
from mpt_lightning.data.card import TaskCard
from mpt_lightning.errors import MPTError
from mpt_lightning.modules import PromptModule
from tests.backbones.architectures import build_tiny
from tests.backbones.masked import build_tokenizer
from tests.faults.damage import Change, drop, put

PAIRS = TaskCard(
    name="pairs", path="made/pairs", input="{a} {b} [MASK]", metrics=["accuracy"], choices=["90", "91", "92"],
    masked={"input": "{a} ? [MASK] , {b}", "choices": ["80", "81", "82"]},
)  # fmt: skip
TEXTS = TaskCard(name="texts", path="made/texts", input="{text}", metrics=["accuracy"], choices=["90", "91"])
VALUES = TaskCard(
    name="values", path="made/values", input="{a} {b}", metrics=["pearson"], value_range=(0.0, 5.0),
    masked={"input": "{a} [MASK] , {b}", "choices": ["80", "81"]},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny BERT in `bert/`, and the rows of the three tasks beside it."""
    folder = tmp_path_factory.mktemp("classifier")
    build_tiny("bert", "masked").float().save_pretrained(folder / "bert")
    build_tokenizer().save_pretrained(folder / "bert")
    words = lambda row, count: " ".join(str(10 + (7 * row + 3 * place) % 60) for place in range(count))  # noqa: E731
    rows = {
        "pairs": [{"a": words(n, 2 + n % 4), "b": words(n + 5, 3), "label": n % 3} for n in range(12)],
        "texts": [{"text": words(n, 2 + n % 5), "label": n % 2} for n in range(12)],
        "values": [{"a": words(n, 3), "b": words(n + 3, 2), "label": n % 6} for n in range(12)],
    }
    for name, content in rows.items():
        (folder / "data" / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            text = "\n".join(json.dumps(row) for row in content)
            (folder / "data" / name / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture
def data(folder: Path) -> Callable[..., Any]:
    options = {
        "data_root": str(folder / "data"),
        "cache_dir": str(folder / "cache"),
        "batch_size": 6,
        "max_input_length": 60,
    }

    def build(*cards: TaskCard) -> TaskDataModule | MultitaskDataModule:
        return TaskDataModule(cards[0], **options) if len(cards) == 1 else MultitaskDataModule(list(cards), **options)

    return build


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


def by_hand(model: Any, weight: Tensor, bias: Tensor, prompt: Tensor, texts: list[tuple[str, ...]]) -> Tensor:
    """Return the log-probabilities `[B, C]` of rows, one by one, with the tokenizer's own pairs."""
    tokenizer, found = AutoTokenizer.from_pretrained(model.config._name_or_path), []
    for segments in texts:
        encoded = tokenizer(*segments, return_token_type_ids=True)
        words = model.get_input_embeddings()(torch.tensor(encoded["input_ids"]))
        types = encoded["token_type_ids"]
        states = model.base_model(
            inputs_embeds=torch.cat([words[:1], prompt, words[1:]])[None],
            token_type_ids=torch.tensor([*types[:1], *[0] * len(prompt), *types[1:]])[None],
        ).last_hidden_state
        found.append(functional.log_softmax(weight @ states[0, 0] + bias, dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["fine-tuning", "frozen body", "prompt"])
def test_scores_and_gradients_equal_a_hand_written_loop(kind: str, folder: Path, data: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    name = str(folder / "bert")
    module: PromptModule = {
        "fine-tuning": lambda: FineTuning(name, head="classification"),
        "frozen body": lambda: FineTuning(name, head="classification", train="head"),
        "prompt": lambda: PromptTuning(name, prompt_length=3, head="classification"),
    }[kind]()
    rows = data(PAIRS)
    trainer(fast_dev_run=True, limit_val_batches=0).fit(module, datamodule=rows)  # builds it
    module.zero_grad()
    (backbone, prompt), batch = module.parts(), next(iter(rows.train_dataloader()))
    module.losses(batch)["loss"].backward()
    model = AutoModelForMaskedLM.from_pretrained(name).eval()
    model.load_state_dict(backbone.model.state_dict())
    numbers = [int(row) for row in batch["row_ids"]]
    content = [(folder / "data/pairs/train.jsonl").read_text().splitlines()[row] for row in numbers]
    values = [eval(line) for line in content]
    tensors = [value.detach().clone().requires_grad_() for value in (prompt.weight[0], prompt.bias[0])]
    soft = prompt.prompt_embeddings[0].detach().clone().requires_grad_()
    scores = by_hand(model, *tensors, soft, [(row["a"], row["b"]) for row in values])
    loss = functional.nll_loss(scores, torch.tensor([row["label"] for row in values]))
    loss.backward()
    torch.testing.assert_close(module.losses(batch)["loss"], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prompt.weight.grad[0], tensors[0].grad, rtol=1e-4, atol=1e-6)
    if kind == "prompt":
        torch.testing.assert_close(prompt.prompt_embeddings.grad[0], soft.grad, rtol=1e-4, atol=1e-6)
    trained = {n for n, value in module.named_parameters() if value.requires_grad}
    heads = {"prompt.prompt_embeddings", "prompt.weight", "prompt.bias"}
    if kind == "fine-tuning":
        body = {n.removeprefix("bert.") for n, _ in model.named_parameters() if n.startswith("bert.")}
        assert trained - heads == {f"backbone.model.bert.{n}" for n in body}
        ours = dict(backbone.model.named_parameters())
        for n, value in model.named_parameters():
            if n.startswith("bert.encoder"):
                torch.testing.assert_close(ours[n].grad, value.grad, rtol=1e-3, atol=1e-5)
    else:
        assert trained == heads


def test_tasks_of_different_classes_share_a_batch(folder: Path, data: Callable[..., Any], tmp_path: Path) -> None:
    L.seed_everything(0)
    module = PromptTuning(str(folder / "bert"), prompt_length=2, head="classification", lr=0.05)
    rows, run = data(PAIRS, TEXTS), trainer(max_epochs=8, limit_val_batches=0)
    run.fit(module, datamodule=rows)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == {
        "prompt.prompt_embeddings", "prompt.weight", "prompt.bias",
    }  # fmt: skip
    (tested,) = run.test(module, datamodule=rows, verbose=False)[:1]
    again = PromptTuning.load_from_checkpoint(str(tmp_path / "a.ckpt"))
    (repeated,) = trainer().test(again, datamodule=data(PAIRS, TEXTS), verbose=False)[:1]
    assert repeated == tested
    predictor = Predictor.from_checkpoint(str(tmp_path / "a.ckpt"))
    mixed = predictor.predict([{"a": "12 13", "b": "14"}, "15 16", {"a": "20", "b": "21"}], ["pairs", "texts", "pairs"])
    assert [sorted(found.probabilities or {}) for found in mixed] == [
        ["90", "91", "92"],
        ["90", "91"],
        ["90", "91", "92"],
    ]
    assert all(abs(sum((found.probabilities or {}).values()) - 1) < 1e-6 for found in mixed)
    alone = [predictor.predict([{"a": "12 13", "b": "14"}], "pairs")[0], predictor.predict(["15 16"], "texts")[0]]
    for one, other in zip(alone, mixed, strict=False):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_a_classifier_learns_values(folder: Path, data: Callable[..., Any], tmp_path: Path) -> None:
    L.seed_everything(0)
    module = FineTuning(str(folder / "bert"), head="classification", lr=3e-3)
    rows, run = data(VALUES), trainer(max_epochs=40, limit_val_batches=0)
    run.fit(module, datamodule=rows)
    assert run.test(module, datamodule=rows, verbose=False)[0]["test/values/pearson"] > 0.9
    run.save_checkpoint(tmp_path / "a.ckpt")
    (found,) = Predictor.from_checkpoint(str(tmp_path / "a.ckpt")).predict([{"a": "10 13 16", "b": "31 34"}])
    assert 0 <= float(found.prediction) <= 5


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """Return the content of a classifier's checkpoint."""
    module = FineTuning(str(folder / "bert"), head="classification", train="head")
    options = {"data_root": str(folder / "data"), "cache_dir": str(folder / "cache")}
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=TaskDataModule(TEXTS, max_input_length=60, **options))
    run.save_checkpoint(folder / "trained.ckpt")
    return torch.load(folder / "trained.ckpt", weights_only=True)


CONFIG = (KEY, "prompt_config")
MORE = {"choices": ["90", "91", "92"], "label_names": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(*CONFIG, "class_counts", value=[3]), r"other sizes: prompt\.bias: \[1, 2\] instead of \[1, 3\]"),
        (put(*CONFIG, "class_counts", value=[2, 2]), "Expected 1 counts of at least 2"),
        (put(*CONFIG, "hidden", value=8), r"other sizes: prompt\.weight: \[1, 2, 32\] instead of \[1, 2, 8\]"),
        (drop("state_dict", "prompt.bias"), r"missing: prompt\.bias"),
        (lambda content: content[KEY]["cards"]["texts"].update(MORE), "has 2 classes, and the task's card has 3. Use"),
    ],
)
def test_a_damaged_classifier_raises(change: Change, message: str, trained: dict[str, Any], tmp_path: Path) -> None:
    content = copy.deepcopy(trained)
    change(content)
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(MPTError, match=message):
        Predictor.from_checkpoint(str(tmp_path / "damaged.ckpt"))


@pytest.mark.parametrize("count", [3, 4])
def test_a_task_with_other_classes_raises(
    count: int, trained: dict[str, Any], folder: Path, data: Callable[..., Any]
) -> None:
    module = FineTuning.load_from_checkpoint(str(folder / "trained.ckpt"))
    card = replace(TEXTS, choices=[str(90 + number) for number in range(count)])
    with pytest.raises(MPTError, match=f"classifier of texts has 2 classes, and the task's card has {count}"):
        trainer().test(module, datamodule=data(card), verbose=False)


def test_a_classifiers_loss_that_is_not_finite_names_its_rows(folder: Path, data: Callable[..., Any]) -> None:
    module = FineTuning(str(folder / "bert"), head="classification")
    losses = module.losses
    module.losses = lambda batch: {"loss": losses(batch)["loss"] * torch.nan}
    with pytest.raises(MPTError, match=r"The loss is not finite at step 0, .* Rows: texts \d.*Lower the learning"):
        trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data(TEXTS))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: PromptTuning("mpt_lightning/demo/t5", head="classification"), "is seq2seq"),
        (lambda: FineTuning("mpt_lightning/demo/llama", head="classification"), "is causal"),
    ],
)
def test_other_families_raise(module: Callable[[], PromptModule], message: str, data: Callable[..., Any]) -> None:
    rows = data(TaskCard(**{**vars(TEXTS), "input": "{text}"}))
    with pytest.raises(MPTError, match=message):
        trainer(max_steps=1).fit(module(), datamodule=rows)


def test_a_reparameterized_prompt_with_a_classifier_raises() -> None:
    with pytest.raises(MPTError, match="Leave one of them unset"):
        PromptTuning("any", head="classification", reparameterization="mlp")
