"""Inference in one object: texts of any of a checkpoint's tasks in, answers out."""

import json
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
from mpt_lightning.data.prediction import Row, Text, encode_rows, plain_text
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.data.vocabulary import check_choices
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line, read_text, write_file
from mpt_lightning.modules import evaluation
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.checkpointing import read_cards
from mpt_lightning.objectives import IGNORE
from mpt_lightning.prompts import Prompt


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

    Raises:
        MPTError: the tokenizer cannot write a task's choices.

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
            raise MPTError(f"batch_size must be 1 or more, got {batch_size}.")
        self.backbone, self.prompt = backbone.eval(), prompt.eval()
        self.cards, self.batch_size = dict(cards or {}), batch_size
        self.encoder = encoder or Encoder(backbone.tokenizer, backbone.family, max_input_length=256)
        for card in self.cards.values():
            check_choices(card, self.encoder.tokenizer, backbone.family)
        prompt.attach(backbone.embeddings)
        with torch.no_grad():
            self._encoded = backbone.encode_prompts(prompt(torch.arange(prompt.num_tasks, device=self.device)))

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
            MPTError: there is no such file, it is damaged, or the backbone is another one.
        """
        found = read_checkpoint(path, "the checkpoint", folder=True)
        name = backbone or found.backbone
        model, prompt = _build(cls, found, path, name, dtype)
        options = found.data
        encoder = Encoder(
            model.tokenizer,
            model.family,
            options.get("max_input_length", 256),  # the DataModules' default
            options.get("answer_prefix", ""),
            options.get("context_shots") is None,
        )
        cards = read_cards(found.cards)
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
        self,
        texts: Text | Sequence[Text],
        tasks: str | Sequence[str] | None = None,
        max_new_tokens: int = 64,
        raw: bool = False,
    ) -> list[Prediction]:
        """Predict the answer of each row.

        Args:
            texts: [B] rows, as `mpt predict` reads them: mappings of the card's columns, or strings where the card has
                one column. A single string or mapping is one row. A task without a card has no template: its strings
                are read as they are.
            tasks: [B] names, or one for all; required if the checkpoint has several.
            max_new_tokens: longest generated answer.
            raw: read strings as they are, without the card's template and the answer prefix; `Prediction.text` is such
                a string.

        Returns:
            [B], in the order of `texts`; a list of one for a single row.

        Raises:
            MPTError: an unknown task, a missing column, a string for a task of several columns, or an empty text;
                the message names the row.
        """
        given = [texts] if isinstance(texts, str | Mapping) else list(texts)
        names = self._names(tasks, len(given))
        rows = encode_rows(self.encoder, self.cards, given, names, raw)
        answers: list[Prediction | None] = [None] * len(rows)
        # Ranking and generation are different passes; rows of like length waste little on padding.
        for ranked in (True, False):
            chosen = [number for number, row in enumerate(rows) if bool(row.choices) == ranked]
            chosen.sort(key=lambda number: len(rows[number].ids))
            for start in range(0, len(chosen), self.batch_size):
                batch = chosen[start : start + self.batch_size]
                made = self._answer([rows[number] for number in batch], ranked, max_new_tokens)
                for number, prediction in zip(batch, made, strict=True):
                    answers[number] = prediction
        return [answer for answer in answers if answer is not None]

    def _names(self, tasks: str | Sequence[str] | None, size: int) -> list[str]:
        if tasks is None and len(self.tasks) > 1:
            raise MPTError(f"There are several tasks ({', '.join(self.tasks)}): say which one each text is of.")
        names = [tasks or self.tasks[0]] * size if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != size:
            raise MPTError(f"Got {size} texts and {len(names)} tasks; give one task per text, or one for all.")
        if unknown := sorted(set(names) - set(self.tasks)):
            raise MPTError(f"Unknown task {', '.join(unknown)}; the checkpoint has {', '.join(self.tasks)}.")
        return [str(name) for name in names]

    @torch.no_grad()
    def _answer(self, rows: list[Row], ranked: bool, max_new_tokens: int) -> list[Prediction]:
        ids = pad([row.ids for row in rows], self.encoder.pad_id)
        mask = pad([[1] * len(row.ids) for row in rows], 0)
        of_row = torch.tensor([self.prompt.index(row.task) for row in rows])
        inputs = (self._encoded, of_row.to(self.device), ids.to(self.device), mask.to(self.device))
        if not ranked:
            options = {"max_new_tokens": max_new_tokens, "num_beams": 1}
            texts = evaluation.generated_texts(self.backbone, inputs, **options)
            return [Prediction(row.task, row.text, text) for row, text in zip(rows, texts, strict=True)]
        most = max(len(row.choices) for row in rows)
        # A row of fewer choices is filled up with choices of nothing but padding, which do not exist.
        filled = [choice for row in rows for choice in [*row.choices, *([[IGNORE]] * (most - len(row.choices)))]]
        choices = pad(filled, IGNORE).unflatten(0, (len(rows), most))
        shares = self.backbone.score(*inputs, choices.to(self.device)).softmax(dim=1).tolist()
        made = []
        for row, of_choices in zip(rows, shares, strict=True):
            probabilities = dict(zip(self.cards[row.task].choices or [], of_choices, strict=False))
            best = max(probabilities, key=probabilities.__getitem__)
            made.append(Prediction(row.task, row.text, best, probabilities))
        return made


def predict_file(predictor: Predictor, source: str, dest: str, raw: bool = False) -> int:
    """Answer a JSONL file: one object per line, with `task` (where there are several) and `text` or the columns.

    Args:
        predictor: what answers.
        source: the file to read.
        dest: the file to write, one object per line in the same order; it appears whole or not at all.
        raw: read each line's `text` as it is, see `Predictor.predict`; else it is the card's one column.

    Returns:
        The number of lines written.

    Raises:
        MPTError: `dest` exists, there is no `source`, or a line is not as described; says which.
    """
    target, tasks = Path(dest), []
    texts: list[Text] = []
    if target.exists():
        raise MPTError(f"{dest} exists; remove it, or give --output another path.")
    for number, row in _lines(source):
        task = row.get("task", predictor.tasks[0] if len(predictor.tasks) == 1 else None)
        where = f"{source}, line {number}"
        if task not in predictor.tasks:
            raise MPTError(f"{where}: got task={task!r}, expected one of {', '.join(predictor.tasks)}.")
        card = predictor.cards.get(task)
        columns = card.columns if card is not None and not raw else ["text"]
        if len(columns) == 1 and columns[0] not in row and "text" in row:
            texts.append(plain_text(row["text"], "text", where))
        else:
            if missing := [column for column in columns if column not in row]:
                either = f"; the task has the columns {', '.join(columns)}" if "text" in row else ""
                raise MPTError(f"{where}: there is no field {', '.join(missing)}; give it{either}.")
            values = {column: plain_text(row[column], column, where) for column in columns}
            texts.append(values["text"] if raw or card is None else values)
        tasks.append(task)
    answers = predictor.predict(texts, tasks, raw=raw) if texts else []
    write_file(target, "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
    return len(answers)


def _lines(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    file = Path(source)
    if not file.is_file():
        raise MPTError(f"--input {source}: there is no such file. Give a file of JSON lines.")
    # Not splitlines(), which also splits at line separators within a text.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MPTError(f"{source}, line {number}: this is no JSON ({one_line(error)}).") from None
        if not isinstance(row, dict):
            raise MPTError(f"{source}, line {number}: expected an object like {{'text': ...}}, got {line[:40]!r}.")
        yield number, row


def _build(cls: type, found: PromptCheckpoint, path: str, name: str, dtype: Any) -> tuple[Backbone, Prompt]:
    """Make the backbone and the prompt; for methods that train weights the module itself puts them in."""
    if found.prompt_class == "EmptyPrompt":
        stage: Any = getattr(modules, found.stage, None)
        if not (isinstance(stage, type) and issubclass(stage, PromptModule)):
            raise MPTError(
                f"{path} was saved by {found.stage}, which is no class of this package. Use that class's "
                "load_from_checkpoint(...), or give another checkpoint."
            )
        module = stage.load_from_checkpoint(path, map_location="cpu", backbone=name, backbone_dtype=dtype)
        backbone, prompt = module.parts()
        return backbone, prompt
    model = load_backbone(name, dtype, check=found.hyper_parameters.get("backbone_check", True))
    if found.fingerprint:
        found.check_backbone(name, model.fingerprint, "the checkpoint")
    return model, found.prompt(model.embeddings)
