"""Context-aware prompt tuning (Blau et al., 2024), and the methods it stands between, as arguments."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from mpt_lightning import objectives
from mpt_lightning.arguments import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from mpt_lightning.backbones import Backbone, CausalBackbone
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.batch import Batch
from mpt_lightning.objectives import Normalize
from mpt_lightning.prompts import ContextPrompt
from mpt_lightning.prompts.context import INSTRUCTION, EpsilonScale, Trained
from mpt_lightning.prompts.init import vocabulary_ids

TRAINED: dict[str, Trained] = {
    "cpt": "inputs", "prompt_tuning": "all", "instruction": "instruction", "icl": "nothing",
}  # fmt: skip


class CPT(PromptModule):
    """CPT: a few training examples stand before every row, and their embeddings are trained within small balls.

    The examples come from the DataModule's `context`, which has `token_ids` and `token_types` (see `ContextPrompt`);
    `TaskDataModule(card, context_shots=4)` builds one. Decoder-only backbones only: the method trains
    on the context's own labels, which an encoder does not predict. The context is run once per step, not once per row.

    Args:
        backbone: Hub id ("gpt2") or folder of the frozen model.
        method: "cpt"; or what it is compared with: "icl", in-context learning, which trains nothing (`validate`, `test`
            and `predict` need no checkpoint); "prompt_tuning", which trains every token of the context, labels too;
            "instruction", instruction prompt tuning: free tokens before a frozen context.
        epsilon: Radius of the ball of an input token's perturbation, times sqrt(H / 2048); null: no bound. 0.2 is the
            authors' value.
        template_epsilon: The same for templates, separators and instructions. 0.1 is the authors' value.
        epsilon_scale: "width" as above, "embedding" for shares of each token's embedding's norm.
        context_loss: Train on the context's labels too; by default with "cpt" alone.
        decay: Weight of a context label: decay^(examples from it to the row). 0.95 is the authors' value, 1 weighs all
            examples equally.
        normalize: "paper" takes the mean over label tokens, whatever their weights; "weights" the weighted mean.
        leave_one_out: A training row does not attend to its own copy in the context (Lu et al., 2025).
        instruction_length: Tokens of method="instruction", drawn from the most frequent ones.
        instruction_text: A text to start them from instead.
        lr: Learning rate. 1e-4 is the authors' value.
        **kwargs: See `BackboneModule`.
    """

    title, paper = "Context-aware prompt tuning", "2410.17222"
    summary = "a context of training examples whose embeddings were trained within small balls"
    families, family_reason = ("causal",), "an encoder does not predict the answers in the context"
    group_name = "context"
    fixed_arguments = (*PromptModule.fixed_arguments, "method")
    initial_arguments = (*PromptModule.initial_arguments, "instruction_length", "instruction_text")

    def __init__(
        self,
        backbone: str,
        method: Literal["cpt", "prompt_tuning", "instruction", "icl"] = "cpt",
        epsilon: PositiveFloat | None = 0.2,
        template_epsilon: PositiveFloat | None = 0.1,
        epsilon_scale: EpsilonScale = "width",
        context_loss: bool | None = None,
        decay: Annotated[float, Range(0, 1, above=True)] = 0.95,
        normalize: Normalize = "paper",
        leave_one_out: bool = False,
        instruction_length: PositiveInt = 16,
        instruction_text: str | None = None,
        lr: NonNegativeFloat = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        self.method = method
        self.epsilon, self.template_epsilon = epsilon, template_epsilon
        self.epsilon_scale: EpsilonScale = epsilon_scale
        self.trains_on_context = method == "cpt" if context_loss is None else context_loss
        self.decay = decay
        self.normalize: Normalize = normalize
        self.leave_one_out = leave_one_out
        self.instruction_length, self.instruction_text = instruction_length, instruction_text
        self.lr = lr

    @classmethod
    def needs_checkpoint(cls, arguments: Mapping[str, Any]) -> bool:
        """Return whether evaluating takes a checkpoint: for all methods except in-context learning."""
        return bool(arguments.get("method") != "icl")

    def setup(self, stage: str) -> None:
        """Check that the data has one task and a context, before the backbone is loaded."""
        super().setup(stage)
        names = self._data_tasks()
        if len(names) > 1:
            raise MPTError(
                f"CPT has the context of one task, and the data has {len(names)} ({', '.join(names)}). "
                "Run it once per task, with --data.class_path TaskDataModule."
            )
        if self._builds_prompt() and getattr(self._datamodule(), "context", None) is None:
            raise MPTError(
                "CPT needs examples to put before every row, and the data has no `context`. Set --data.context_shots, "
                "or give a DataModule with an attribute `context` that has `token_ids` and `token_types`."
            )

    def build_prompt(self, backbone: Backbone) -> ContextPrompt:
        """Build the prompt from the data's context; with method="instruction" an instruction comes before it."""
        context = self._datamodule().context
        ids, types = list(context.token_ids), list(context.token_types)
        if self.method == "instruction":
            instruction = self._instruction(backbone)
            ids, types = [*instruction, *ids], [INSTRUCTION] * len(instruction) + types
        prompt = ContextPrompt(
            ids,
            types,
            backbone.dim,
            self.tasks,
            trained=TRAINED[self.method],
            epsilon=self.epsilon,
            template_epsilon=self.template_epsilon,
            epsilon_scale=self.epsilon_scale,
        )
        if self.trains_on_context and not len(prompt.label_ids):
            raise MPTError("The context has no label tokens to train on (types 4, 8, ...); set --model.context_loss.")
        prompt.attach(backbone.embeddings)
        bounded = prompt.radius.isfinite() & (prompt.moves > 0 if self.method == "cpt" else prompt.radius > 0)
        if bounded.any():
            share = (prompt.radius / prompt.embeddings.norm(dim=1, keepdim=True))[bounded]
            rank_zero_info(
                f"A context of {prompt.num_examples} examples, {prompt.length} tokens. The balls' radii are "
                f"{share.min():.1%} to {share.max():.1%} of the tokens' embeddings."
            )
        return prompt

    def _instruction(self, backbone: Backbone) -> list[int]:
        tokenizer, text = backbone.tokenizer, self.instruction_text
        if text is None:
            size = len(backbone.embeddings)
            return vocabulary_ids(size, self.instruction_length, exclude=tokenizer.all_special_ids)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise MPTError(f"instruction_text={text!r} has no tokens; give at least one word.")
        return ids

    def _check_positions(self, backbone: Backbone, prompt: Any) -> None:
        """Raise if the context leaves too little room for rows."""
        longest, limit = getattr(self._datamodule(), "max_input_length", None), backbone.max_positions
        if limit is None or prompt.length + (longest or 1) <= limit:
            return
        each = prompt.length / max(1, prompt.num_examples)
        fits = max(0, int((limit - (longest or 1)) / each))
        raise MPTError(
            f"The context has {prompt.length} tokens ({prompt.num_examples} examples); with inputs of up to "
            f"{longest or 1} that is more than the {limit} positions of {backbone.name}. About {fits} such examples "
            "fit: lower --data.context_shots or --data.max_input_length."
        )

    def _match_tasks(self) -> None:
        super()._match_tasks()
        (_, prompt), data = self.parts(), self._datamodule()
        if not hasattr(data, "context") or not isinstance(prompt, ContextPrompt):
            return  # other DataModules: the batches are laid out as their authors chose
        context: Any = data.context
        start = sum(kind == INSTRUCTION for kind in prompt.token_types)
        if context is None or list(context.token_ids) != prompt.token_ids[start:]:
            raise MPTError(
                "The data's context is not the one that the prompt was trained with, so that rows would be laid out "
                "differently. Use the training run's data: the same card, seed, context_shots, context_per, "
                "separator, answer_prefix and max_input_length."
            )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", and its parts unweighted: "row" and, if the context is trained on, "context"."""
        backbone, prompt = self.parts()
        if not isinstance(backbone, CausalBackbone) or not isinstance(prompt, ContextPrompt):
            raise RuntimeError("build_prompt has not run")
        rows, labels = self.task_rows(batch), batch["labels"]
        if self.leave_one_out and "context_examples" not in batch:
            raise MPTError(
                "leave_one_out needs the context example that each row is: the batch has no `context_examples` [B] "
                "(-1 for none). Use TaskDataModule(context_shots=...), or set leave_one_out=False."
            )
        output = backbone(
            prompt(rows[:1]),
            torch.zeros_like(rows),
            batch["input_ids"],
            batch["attention_mask"],
            labels,
            prompt_mask=prompt.visible(batch["context_examples"]) if self.leave_one_out else None,
            predict_at=prompt.label_positions - 1 if self.trains_on_context else None,
        )
        row = objectives.token_cross_entropy(output.logits, labels)
        if output.prompt_logits is None:
            return {"loss": row, "row": row.detach()}
        predicted = output.prompt_logits[0]
        loss = objectives.context_cross_entropy(
            predicted,
            prompt.label_ids,
            prompt.label_distances,
            output.logits,
            labels,
            decay=self.decay,
            normalize=self.normalize,
        )
        of_context = objectives.token_cross_entropy(predicted.detach()[None], prompt.label_ids[None])
        return {"loss": loss, "row": row.detach(), "context": of_context}

    def label_tokens(self, batch: Batch) -> Tensor:
        """Return the number of label tokens of the loss: the rows' own, and per row those of the context."""
        _, prompt = self.parts()
        if not self.trains_on_context or not isinstance(prompt, ContextPrompt):
            return super().label_tokens(batch)
        weights = self.decay ** prompt.label_distances.to(prompt.delta_embedding.dtype)
        return objectives.context_tokens(weights, batch["labels"], self.normalize)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer; each of its steps ends with the projection onto the balls."""
        built = super().configure_optimizers()
        _, prompt = self.parts()
        if isinstance(prompt, ContextPrompt):
            built["optimizer"].register_step_post_hook(lambda *_: prompt.project())
        return built
