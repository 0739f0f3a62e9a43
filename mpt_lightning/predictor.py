"""Inference in one object: texts of any of a checkpoint's tasks in, answers out."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mpt_lightning import modules
from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.collate import pad
from mpt_lightning.data.encode import Encoder
from mpt_lightning.data.examples import Example
from mpt_lightning.files import one_line, read_text
from mpt_lightning.modules import evaluation
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.objectives import IGNORE
from mpt_lightning.prompts import Prompt

Text = str | Mapping[str, str]


@dataclass
class Prediction:
    """An answer.

    Attributes:
        task: the task's name.
        text: the input as the model read it.
        prediction: the likeliest choice, or the generated text.
        probabilities: of each choice, given that one of them is right; None for tasks without choices.
    """

    task: str
    text: str
    prediction: str
    probabilities: dict[str, float] | None = None


class Predictor:
    """Answers with one frozen model and the prompts of many tasks; a batch may mix them.

    What depends on a prompt alone (on decoder-only models its keys and values) is computed once, here.

    Args:
        backbone: the frozen model.
        prompt: the prompts.
        cards: the tasks' cards by name.
        encoder: how texts become tokens; by default that of the backbone's tokenizer, inputs of up to 256 tokens.
        batch_size: rows per batch.

    Example:
        >>> predictor = Predictor.from_checkpoint("runs/mpt/target/best.ckpt")  # doctest: +SKIP
        >>> predictor.predict(["a fine film"], "rotten_tomatoes")[0].prediction  # doctest: +SKIP
        'positive'
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        cards: Mapping[str, TaskCard] | None = None,
        encoder: Encoder | None = None,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
        self.backbone, self.prompt = backbone.eval(), prompt.eval()
        self.cards, self.batch_size = dict(cards or {}), batch_size
        kind = bool(backbone.model.config.is_encoder_decoder)
        self.encoder = encoder or Encoder(backbone.tokenizer, kind, max_input_length=256)
        prompt.attach(backbone.embeddings)
        with torch.no_grad():
            self._encoded = backbone.encode_prompts(prompt(torch.arange(prompt.num_tasks, device=self.device)))
        self._choices = {
            task: self.encoder.targets(card.choices) for task, card in self.cards.items() if card.choices is not None
        }

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        backbone: str | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 64,
    ) -> "Predictor":
        """Load a checkpoint of any of this package's modules, or a PEFT folder.

        Args:
            path: the .ckpt file, or the folder.
            backbone: where the backbone is, if not where it was in training; it must be the same model.
            device: where to run, such as "cuda".
            dtype: precision of the frozen weights.
            batch_size: rows per batch.

        Raises:
            ValueError: there is no such file, it is damaged, or the backbone is another one.
        """
        found = read_checkpoint(path, "the checkpoint", folder=True)
        name = backbone or found.backbone
        model, prompt = _build(cls, found, path, name, dtype)
        options = found.data
        encoder = Encoder(
            model.tokenizer,
            bool(model.model.config.is_encoder_decoder),
            options.get("max_input_length", 256),  # the DataModules' default
            options.get("answer_prefix", ""),
            options.get("context_shots") is None,
        )
        cards = evaluation.read_cards(found.cards)
        return cls(model.to(device), prompt.to(device), cards, encoder, batch_size)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.embeddings.device

    @property
    def tasks(self) -> list[str]:
        """The tasks that can be asked for."""
        return list(self.prompt.tasks)

    def predict(
        self, texts: Sequence[Text], tasks: str | Sequence[str] | None = None, max_new_tokens: int = 64
    ) -> list[Prediction]:
        """Answer.

        Args:
            texts: [B] inputs: whole texts, worded as in training, or mappings of the card's columns.
            tasks: [B] names, or one for all; needed where there are several.
            max_new_tokens: longest generated answer.

        Returns:
            [B], in the order of `texts`.

        Raises:
            ValueError: an unknown task, a missing column, or an empty text; says which row.
        """
        names = self._names(tasks, len(texts))
        rows = [self._read(row, text, name) for row, (text, name) in enumerate(zip(texts, names, strict=True))]
        answers: list[Prediction | None] = [None] * len(rows)
        # Ranking and generation are different passes; rows of like length waste little on padding.
        for ranked in (True, False):
            chosen = [row for row, name in enumerate(names) if (name in self._choices) == ranked]
            chosen.sort(key=lambda row: len(rows[row][1]))
            for start in range(0, len(chosen), self.batch_size):
                batch = chosen[start : start + self.batch_size]
                made = self._answer([names[r] for r in batch], [rows[r] for r in batch], ranked, max_new_tokens)
                for row, prediction in zip(batch, made, strict=True):
                    answers[row] = prediction
        return [answer for answer in answers if answer is not None]

    def _names(self, tasks: str | Sequence[str] | None, size: int) -> list[str]:
        if tasks is None and len(self.tasks) > 1:
            raise ValueError(f"There are several tasks ({', '.join(self.tasks)}): say which one each text is of.")
        names = [tasks or self.tasks[0]] * size if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != size:
            raise ValueError(f"Got {size} texts and {len(names)} tasks; give one task per text, or one for all.")
        if unknown := sorted(set(names) - set(self.tasks)):
            raise ValueError(f"Unknown task {', '.join(unknown)}; the checkpoint has {', '.join(self.tasks)}.")
        return [str(name) for name in names]

    def _read(self, row: int, given: Text, task: str) -> tuple[str, list[int]]:
        """Make the text and its tokens."""
        where = f"Text {row} (task {task})"
        card = self.cards.get(task)
        if isinstance(given, str):
            if not given.strip():
                raise ValueError(f"{where} is empty; give some text.")
            ids = self.encoder.inputs([_text(given, "text", where)])[0]
            if len(ids) > self.encoder.max_input_length:
                raise ValueError(
                    f"{where} has {len(ids)} tokens, more than {self.encoder.max_input_length}; shorten it, or give "
                    "its columns, of which the card says which one may be cut."
                )
            return given, ids
        if card is None:
            raise ValueError(f"{where} is given as columns, and the checkpoint has no card of the task; give a text.")
        if missing := [column for column in card.columns if column not in given]:
            raise ValueError(f"{where} has no {', '.join(missing)}; the card reads {', '.join(card.columns)}.")
        values = {column: _text(given[column], column, where) for column in card.columns}
        if card.empty_text != "keep" and (empty := [column for column, text in values.items() if not text.strip()]):
            raise ValueError(f"{where} has nothing in {', '.join(empty)}; give some text.")
        example = Example(row, values, "", [], "")
        fitted, ids = self.encoder.fit(card, example)
        return self.encoder.text(card, fitted.values), ids

    @torch.no_grad()
    def _answer(
        self, names: list[str], rows: list[tuple[str, list[int]]], ranked: bool, max_new_tokens: int
    ) -> list[Prediction]:
        ids = pad([tokens for _, tokens in rows], self.encoder.pad_id)
        mask = pad([[1] * len(tokens) for _, tokens in rows], 0)
        of_row = torch.tensor([self.prompt.index(name) for name in names])
        inputs = (self._encoded, of_row.to(self.device), ids.to(self.device), mask.to(self.device))
        if not ranked:
            options = {"max_new_tokens": max_new_tokens, "num_beams": 1}
            texts = evaluation.generated_texts(self.backbone, inputs, options)
            return [Prediction(name, row[0], text) for name, row, text in zip(names, rows, texts, strict=True)]
        most = max(len(self._choices[name]) for name in names)
        longest = max(len(choice) for name in set(names) for choice in self._choices[name])
        choices = torch.full((len(names), most, longest), IGNORE)
        for row, name in enumerate(names):
            for place, choice in enumerate(self._choices[name]):
                choices[row, place, : len(choice)] = torch.tensor(choice)
        shares = self.backbone.score(*inputs, choices.to(self.device)).softmax(dim=1).tolist()
        made = []
        for name, (text, _), row in zip(names, rows, shares, strict=True):
            words = self.cards[name].choices or []
            probabilities = dict(zip(words, row, strict=False))
            made.append(Prediction(name, text, max(probabilities, key=probabilities.__getitem__), probabilities))
        return made


def predict_file(predictor: Predictor, source: str, dest: str) -> int:
    """Answer a JSONL file: one object per line, with `task` (where there are several) and `text` or the columns.

    Args:
        predictor: what answers.
        source: the file to read.
        dest: the file to write, one object per line in the same order; it appears whole or not at all.

    Returns:
        The number of lines written.

    Raises:
        ValueError: `dest` exists, there is no `source`, or a line is not as described; says which.
    """
    target, tasks = Path(dest), []
    texts: list[Text] = []
    if target.exists():
        raise ValueError(f"{dest} exists; remove it, or give --output another path.")
    for number, row in _lines(source):
        task = row.get("task", predictor.tasks[0] if len(predictor.tasks) == 1 else None)
        where = f"{source}, line {number}"
        if task not in predictor.tasks:
            raise ValueError(f"{where}: got task={task!r}, expected one of {', '.join(predictor.tasks)}.")
        card = predictor.cards.get(task)
        columns = card.columns if card is not None else []
        if not isinstance(row.get("text"), str) or (columns and set(columns) <= set(row)):
            if missing := [column for column in columns or ["text"] if column not in row]:
                raise ValueError(f"{where}: there is no field {', '.join(missing)}; give these, or `text`.")
            texts.append({column: _text(row[column], column, where) for column in columns})
        else:
            texts.append(_text(row["text"], "text", where))
        tasks.append(task)
    answers = predictor.predict(texts, tasks) if texts else []
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(
        "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8"
    )
    os.replace(part, target)
    return len(answers)


def _lines(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    file = Path(source)
    if not file.is_file():
        raise ValueError(f"--input {source}: there is no such file. Give a file of JSON lines.")
    # Not splitlines(), which also splits at line separators within a text.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}, line {number}: this is no JSON ({one_line(error)}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{source}, line {number}: expected an object like {{'text': ...}}, got {line[:40]!r}.")
        yield number, row


def _text(value: Any, field: str, where: str) -> str:
    """Give a field's text; numbers are written out."""
    plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    # Halves of surrogate pairs, which JSON can write, are no characters.
    if not plain or re.search("[\0\ud800-\udfff]", str(value)):
        raise ValueError(f"{where}: got {field}={str(value)[:40]!r} ({type(value).__name__}), expected text.")
    return str(value)


def _build(cls: type, found: PromptCheckpoint, path: str, name: str, dtype: Any) -> tuple[Backbone, Prompt]:
    """Make the backbone and the prompt; for methods that train weights the module itself puts them in."""
    if found.prompt_class == "EmptyPrompt":
        stage: Any = getattr(modules, found.stage, None)
        if not (isinstance(stage, type) and issubclass(stage, PromptModule)):
            raise ValueError(
                f"{path} was saved by {found.stage}, which is no class of this package. Use that class's "
                "load_from_checkpoint(...), or give another checkpoint."
            )
        module = stage.load_from_checkpoint(path, map_location="cpu", backbone=name, backbone_dtype=dtype)
        backbone, prompt = module.parts()
        return backbone, prompt
    model = load_backbone(name, dtype)
    if found.fingerprint:
        found.check_backbone(name, model.fingerprint, "the checkpoint")
    return model, found.prompt(model.embeddings)
