"""The teachers of a source run: where they come from, and the terms of the loss that follow them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpt_lightning import objectives
from mpt_lightning.backbones import Backbone, BackboneOutput
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.batch import Batch
from mpt_lightning.modules.initialization import check_length
from mpt_lightning.modules.teacher_cache import Row, TeacherCache, row_key
from mpt_lightning.objectives import Segment

# Per "<stack>/<part>" the layers that are compared.
States = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Distillation:
    """What is distilled; see `MPTSource`'s arguments of the same names."""

    logits_weight: float
    hidden_weight: float
    temperature: float = 1.0
    layers: objectives.Layers = "last"
    positions: objectives.Positions = "text"
    stacks: objectives.Stacks = "both"
    top_k: int = 64

    @property
    def hidden(self) -> dict[str, Any]:
        """The hidden states that are compared, as arguments of `objectives.hidden_distillation`."""
        return {"layers": self.layers, "positions": self.positions, "stacks": self.stacks}

    def chosen(self, states: Mapping[str, Segment]) -> States:
        """Return the hidden states that are compared."""
        return objectives.chosen_states(states, **self.hidden)


@dataclass
class Targets:
    """The teachers' output for a batch, which the student is compared with.

    Attributes:
        options: What is distilled.
        states: Hidden states in the student's layout: all those of a fresh pass, or with a cache the prompts' alone.
        logits: Of a fresh pass, [B, M, V].
        packed: A cache's rows, one after the other without padding, by the names of a `Row`: "ids" and "log_probs" of
            `objectives.top_buckets`, and per "<stack>/<part>" states [tokens, layers, H].
    """

    options: Distillation
    states: States
    logits: Tensor | None = None
    packed: Row = field(default_factory=dict)

    def terms(self, student: BackboneOutput, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the distillation terms that have a weight, "logits_loss" and "hidden_loss".

        Both are means over rows, weighted by the rows' label tokens, of the average over a row's label tokens or
        compared positions. `rows` `[B]` in 0..U-1 are the rows' tasks among the batch's, `labels` are `[B, M]`.
        """
        options, terms = self.options, {}
        if options.logits_weight > 0 and self.logits is not None:
            terms["logits_loss"] = objectives.logit_distillation(
                student.logits, self.logits, labels, options.temperature
            )
        elif options.logits_weight > 0:
            ids, log_probs = self.packed["ids"].long(), self.packed["log_probs"]
            terms["logits_loss"] = objectives.bucketed_distillation(
                student.logits, ids, log_probs, labels, options.temperature
            )
        if options.hidden_weight > 0:
            weights = objectives.label_weights(student.hidden, rows, labels, options.positions)
            ours = {key: Segment(student.hidden[key].layers, weight) for key, weight in weights.items()}
            theirs = {key: Segment(self._layers(key, found), found.weight) for key, found in student.hidden.items()}
            terms["hidden_loss"] = objectives.hidden_distillation(ours, theirs, **options.hidden)
        return terms

    def _layers(self, key: str, student: Segment) -> tuple[Tensor, ...]:
        """Return the teachers' states `[N, S, H]` per layer; a cache's are put where the student has tokens."""
        if key not in self.packed:
            return self.states.get(key, ())
        counted, packed = student.weight > 0, self.packed[key]
        spread = packed.new_zeros(*counted.shape, *packed.shape[1:])
        spread[counted] = packed
        return spread.unbind(dim=2)


class Teachers:
    """One frozen prompt `[P, H]` per task, on the student's backbone; runs without gradients.

    `cache` is the folder of a `TeacherCache`; None is no cache. Cached rows depend on the backbone's `quantization`.
    """

    def __init__(
        self, prompts: Tensor, options: Distillation, cache: Path | None = None, quantization: str | None = None
    ) -> None:
        self.prompts = prompts.detach().cpu()
        self.options, self.folder, self._quantization = options, cache, quantization
        self._digests = [hashlib.blake2b(prompt.float().cpu().numpy().tobytes()).digest() for prompt in self.prompts]
        self._encoded: Any = None
        self._cache: TeacherCache | None = None

    def forget(self) -> None:
        """Free what belongs to one run: prompts encoded on its device, and the open cache."""
        if self._cache is not None:
            self._cache.close()
        self._encoded = self._cache = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return self.__dict__ | {"_encoded": None, "_cache": None}

    @torch.no_grad()
    def targets(
        self, backbone: Backbone, distinct: Tensor, rows: Tensor, batch: Batch, any_rank: Callable[[bool], bool] = bool
    ) -> Targets:
        """Return the teachers' output for a batch with the tasks `distinct` `[U]`, each row's in `rows` `[B]`.

        With a cache the teachers run for the rows that it lacks. `any_rank` returns whether something is true on any
        rank: a sharded backbone runs on all ranks or none.
        """
        if self.folder is None:
            output = self._run(backbone, distinct, rows, batch)
            return Targets(self.options, self.options.chosen(output.hidden), output.logits)
        # Opened here, in the process that uses it, and under the precision of the pass.
        cache = self._cache = self._cache or TeacherCache(self.folder, self._about(backbone, rows.device))
        keys = self._keys(distinct[rows].tolist(), batch)
        found = cache.get(keys)
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        if any_rank(bool(missing)):
            some = torch.tensor(list(missing.values()) or [0], device=rows.device)
            part = {name: batch[name][some] for name in ("input_ids", "attention_mask", "labels")}
            computed = self._split(self._run(backbone, distinct, rows[some], part), part["labels"])
            new = dict(zip(missing, computed, strict=False))
            cache.put(new)
            found |= new
        pieces = [found[key] for key in keys]
        packed = {name: torch.cat([piece[name] for piece in pieces]).to(rows.device) for name in pieces[0]}
        return Targets(self.options, self._of_prompts(backbone, distinct), packed=packed)

    def _run(self, backbone: Backbone, distinct: Tensor, rows: Tensor, batch: Batch) -> BackboneOutput:
        inputs = (rows, batch["input_ids"], batch["attention_mask"], batch["labels"])
        prompts = self._encode(backbone, rows.device)[distinct]
        return backbone(prompts, *inputs, hidden_states=self.options.hidden_weight > 0)

    def _encode(self, backbone: Backbone, device: torch.device) -> Any:
        """Compute once what depends on the prompts alone; with dropout each pass computes it again."""
        if self._encoded is None:
            prompts = self.prompts.to(device)
            self._encoded = prompts if backbone.dropout else backbone.encode_prompts(prompts)
        return self._encoded

    def _about(self, backbone: Backbone, device: torch.device) -> dict[str, Any]:
        """Return what all rows of a cache depend on; their teachers' prompts are in the rows' keys."""
        options, table = self.options, backbone.model.get_input_embeddings().weight
        top_k = min(options.top_k, len(table))
        autocast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None
        return {
            "backbone": backbone.fingerprint,
            "dtype": str(table.dtype),
            "autocast": autocast,
            "quantization": self._quantization,
            "logits": {"top_k": top_k, "temperature": options.temperature} if options.logits_weight > 0 else None,
            "hidden": options.hidden if options.hidden_weight > 0 else None,
        }

    def _keys(self, tasks: Sequence[int], batch: Batch) -> list[bytes]:
        """Hash each row's teacher, input and answer, without its padding."""
        ids, mask, labels = (batch[name].long().cpu().numpy() for name in ("input_ids", "attention_mask", "labels"))
        return [
            row_key(
                self._digests[task],
                ids[row][mask[row] == 1].tobytes(),
                labels[row][labels[row] != objectives.IGNORE].tobytes(),
            )
            for row, task in enumerate(tasks)
        ]

    def _split(self, output: BackboneOutput, labels: Tensor) -> list[Row]:
        """Cut a pass's output into rows as they are stored."""
        options, parts = self.options, {}

        def per_row(packed: Tensor, counted: Tensor) -> Sequence[Tensor]:
            return packed.cpu().split(counted.sum(dim=1).tolist())

        if options.logits_weight > 0:
            counted = labels != objectives.IGNORE
            ids, log_probs = objectives.top_buckets(output.logits[counted], options.top_k, options.temperature)
            parts = {"ids": per_row(ids.int(), counted), "log_probs": per_row(log_probs, counted)}
        for key, layers in options.chosen(output.hidden).items():
            if key != objectives.OF_PROMPTS:
                counted = output.hidden[key].weight > 0
                parts[key] = per_row(torch.stack(layers, dim=2)[counted].bfloat16(), counted)
        return [{name: pieces[row] for name, pieces in parts.items()} for row in range(len(labels))]

    def _of_prompts(self, backbone: Backbone, distinct: Tensor) -> States:
        """Return the states that belong to no row: computed once per run, they stay in memory."""
        if self.options.positions == "text":
            return {}
        layers = getattr(self._encode(backbone, distinct.device), "hidden", ())
        states = {objectives.OF_PROMPTS: Segment(tuple(states[distinct] for states in layers), distinct)}
        return self.options.chosen(states)


def read_teachers(
    given: str | Mapping[str, str], tasks: Sequence[str], length: int, backbone: Backbone | None
) -> dict[str, PromptCheckpoint]:
    """Read each task's teacher, from a checkpoint of all tasks or one per task by name.

    A task without one is an MPTError, and so is a prompt of another length or not of embeddings alone.
    """
    paths = {task: given for task in tasks} if isinstance(given, str) else given
    read: dict[str, PromptCheckpoint] = {}
    teachers = {}
    for task in tasks:
        if task not in paths:
            raise MPTError(f"The task {task!r} has no teacher: --model.teachers names {', '.join(paths)}. Add it.")
        path = paths[task]
        if path not in read:
            read[path] = read_checkpoint(path, "--model.teachers", folder=True, backbone=backbone)
        teacher = read[path]
        if (teacher.stage, teacher.tasks) == ("PEFT", ["0"]) and not isinstance(given, str):
            # PEFT does not name its tasks; the argument does.
            teacher = replace(teacher, prompt_config=teacher.prompt_config | {"tasks": [task]})
        if task not in teacher.tasks:
            raise MPTError(
                f"The task {task!r} has no teacher: --model.teachers {path} has {', '.join(teacher.tasks)}. "
                "Train PromptTuning on it too, or leave the task out."
            )
        teacher.check_embeddings("--model.teachers")
        check_length(path, teacher.empty_prompt().length, length, "--model.teachers")
        teachers[task] = teacher
    return teachers
