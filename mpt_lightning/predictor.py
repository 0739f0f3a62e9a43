"""Inference in one object: texts of any of a checkpoint's tasks in, answers out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.loader import pad, pad_choices
from mpt_lightning.data.prediction import Row, Text, encode_rows, plain_text
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.data.vocabulary import check_choices
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line, read_text, write_json_lines
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.checkpointing import read_cards
from mpt_lightning.modules.evaluation import generated_texts
from mpt_lightning.prompts import ClassifierPrompt, Prompt


@dataclass
class Prediction:
    """An answer.

    Attributes:
        task: The task's name.
        text: The input as the model read it.
        prediction: The likeliest choice, or the generated text.
        probabilities: Of each choice, given that one of them is right; None for tasks without choices.
    """

    task: str
    text: str
    prediction: str
    probabilities: dict[str, float] | None = None


class Predictor:
    """Answers with one frozen model and the prompts of many tasks; a batch may mix them.

    What depends on a prompt alone (on decoder-only models its keys and values) is computed once, at construction.

    Args:
        backbone: The frozen model.
        prompt: The prompts.
        cards: The tasks' cards by name.
        encoder: How texts become tokens; by default with the backbone's tokenizer, and inputs of up to 256 tokens.
        batch_size: Rows per batch.

    Raises:
        MPTError: If the tokenizer cannot encode a task's choices.

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
        self.cards = {name: card.for_family(backbone.family) for name, card in (cards or {}).items()}
        self.batch_size = batch_size
        self.encoder = encoder or Encoder(backbone.tokenizer, backbone.family, max_input_length=256)
        for name, card in self.cards.items():
            check_choices(card, self.encoder.tokenizer, backbone.family, self.encoder.classifies)
            if isinstance(prompt, ClassifierPrompt):
                prompt.check_classes(name, len(card.words(backbone.family) or []))
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
            path: The .ckpt file, or the folder.
            backbone: Where the backbone is, if not where it was in training; it must be the same model.
            device: Where to run, such as "cuda".
            dtype: Precision of the frozen weights.
            batch_size: Rows per batch.

        Raises:
            MPTError: If the file cannot be read, or the backbone is another one.
        """
        found = read_checkpoint(path, "the checkpoint", folder=True)
        model, prompt = _build(found, backbone or found.backbone, dtype)
        encoder = Encoder(
            model.tokenizer,
            model.family,
            found.data.get("max_input_length", 256),  # the DataModules' default
            found.data.get("answer_prefix", ""),
            found.data.get("context_shots") is None,
            found.hyper_parameters.get("head") == "classification",
        )
        return cls(model.to(device), prompt.to(device), read_cards(found.cards), encoder, batch_size)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.backbone.embeddings.device

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
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
            texts: B rows: mappings of the card's columns, or strings if the card has one column. A single string or
                mapping is one row. A task without a card has no template: its strings are read as they are.
            tasks: B names, or one for all; required if the checkpoint has several.
            max_new_tokens: Longest generated answer, in tokens.
            raw: Read strings as they are, without the card's template and the answer prefix, like `Prediction.text`.

        Returns:
            B predictions, in the order of `texts`.

        Raises:
            MPTError: If a task is unknown, a column is missing, a task of several columns has a string, or a text is
                empty; the message names the row.
        """
        given = [texts] if isinstance(texts, str | Mapping) else list(texts)
        names = self._names(tasks, len(given))
        rows = encode_rows(self.encoder, self.cards, given, names, raw)
        answers: dict[int, Prediction] = {}
        # Ranking and generation are different passes; rows of similar length need little padding.
        for ranked in (True, False):
            chosen = [number for number, row in enumerate(rows) if bool(row.choices) == ranked]
            chosen.sort(key=lambda number: len(rows[number].ids))
            for start in range(0, len(chosen), self.batch_size):
                batch = chosen[start : start + self.batch_size]
                made = self._answer([rows[number] for number in batch], ranked, max_new_tokens)
                answers.update(zip(batch, made, strict=True))
        return [answers[number] for number in range(len(rows))]

    def _names(self, tasks: str | Sequence[str] | None, size: int) -> list[str]:
        if tasks is None and len(self.tasks) > 1:
            raise MPTError(f"There are several tasks ({', '.join(self.tasks)}). Set `tasks` to one for each text.")
        names = [tasks or self.tasks[0]] * size if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != size:
            raise MPTError(f"Got {size} texts and {len(names)} tasks. Expected one task per text, or one for all.")
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
            texts = generated_texts(self.backbone, inputs, max_new_tokens=max_new_tokens, num_beams=1)
            return [Prediction(row.task, row.text, text) for row, text in zip(rows, texts, strict=True)]
        choices = pad_choices([row.choices for row in rows])
        shares = self.backbone.score(*inputs, choices.to(self.device)).softmax(dim=1).tolist()
        made = []
        for row, of_choices in zip(rows, shares, strict=True):
            card = self.cards[row.task]
            probabilities = dict(zip(card.words(self.backbone.family) or [], of_choices, strict=False))
            best = max(probabilities, key=probabilities.__getitem__) if card.choices else card.value(of_choices[1])
            made.append(Prediction(row.task, row.text, best, probabilities))
        return made


def predict_file(predictor: Predictor, source: str, dest: str, raw: bool = False) -> int:
    """Answer a JSONL file with another one, in the same order, and return the number of lines.

    Each line is an object with `task` (if there are several), and the card's columns or, for a card of one column,
    `text`. With `raw`, `text` is read as it is; see `Predictor.predict`.

    Raises:
        MPTError: If `dest` exists, `source` does not, or a line is not as described; the message names the line.
    """
    tasks: list[str] = []
    texts: list[Text] = []
    if Path(dest).exists():
        raise MPTError(f"--output {dest} exists; remove it, or choose another file.")
    for number, row in _lines(source):
        task = row.get("task", predictor.tasks[0] if len(predictor.tasks) == 1 else None)
        where = f"{source}, line {number}"
        if task not in predictor.tasks:
            raise MPTError(f"{where}: got task={task!r}, expected one of {', '.join(predictor.tasks)}.")
        card = predictor.cards.get(task)
        columns = card.columns if card is not None and not raw else ["text"]
        if len(columns) == 1 and columns[0] not in row and "text" in row:
            columns = ["text"]
        if missing := [column for column in columns if column not in row]:
            raise MPTError(f"{where}: the field {', '.join(missing)} is missing. Expected {', '.join(columns)}.")
        values = {column: plain_text(row[column], column, where) for column in columns}
        texts.append(values["text"] if columns == ["text"] else values)
        tasks.append(task)
    answers = predictor.predict(texts, tasks, raw=raw) if texts else []
    write_json_lines(Path(dest), map(asdict, answers))
    return len(answers)


def _lines(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    file = Path(source)
    if not file.is_file():
        raise MPTError(f"--input {source}: there is no such file. Expected a file of JSON lines.")
    # Not splitlines(), which also splits at line separators within a text.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MPTError(f"{source}, line {number} is not JSON ({one_line(error)}).") from None
        if not isinstance(row, dict):
            raise MPTError(f"{source}, line {number}: expected an object like {{'text': ...}}, got {line[:40]!r}.")
        yield number, row


def _build(found: PromptCheckpoint, name: str, dtype: Any) -> tuple[Backbone, Prompt]:
    """Build the backbone and the prompt; a method that trains weights of the backbone loads them itself."""
    if found.prompt_class == "EmptyPrompt" or not all(name.startswith("prompt.") for name in found.state_dict):
        method = PromptModule.classes.get(found.stage)
        if method is None:
            raise MPTError(
                f"{found.path} was saved by {found.stage}, which is not a class of this package. Import it first, or "
                "use another checkpoint."
            )
        module = method.load_from_checkpoint(found.path, map_location="cpu", backbone=name, backbone_dtype=dtype)
        parts: tuple[Backbone, Prompt] = module.parts()
        return parts
    model = load_backbone(name, dtype, check=found.hyper_parameters.get("backbone_check", True))
    if found.fingerprint:
        found.check_backbone(name, model.fingerprint, "the checkpoint")
    return model, found.prompt(model.embeddings)
