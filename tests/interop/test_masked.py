"""Exported prompts of masked models: the code of their README gives our answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt_lightning import Predictor, export_peft
from mpt_lightning.backbones import Backbone
from mpt_lightning.data import TaskCard
from mpt_lightning.errors import MPTError
from mpt_lightning.interop import export_prompt_embeds
from tests.interop.conftest import CARD, make_prompt, run_code

Load = Callable[[str], Backbone]
Make = Callable[..., Path]
MASKED = {
    "choices": ("bert", {"input": "sentence : {sentence} [MASK]", "choices": ["active", "passive"]}),
    "segments": ("bert", {"input": "the {a} ? [MASK] [SEP] the {b} [SEP]", "choices": ["true", "unknown", "false"]}),
    "no mask": ("bert", {"input": "the {a} ?", "choices": ["true", "false"]}),
    "value": ("bert", {
        "input": "{a} [MASK]", "metrics": ["pearson"], "value_range": [1.0, 5.0],
        "masked": {"input": "{a} [MASK]", "choices": ["none", "five"]},
    }),
    "before the mask": ("modernbert", {"input": "12 {a} [SEP] 14 [MASK] 15", "choices": ["80", "81"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKED)
def test_a_masked_models_readme_gives_our_answers(
    case: str, checkpoint: Make, backbones: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kind, fields = MASKED[case]
    card, backbone = {"name": "glue/one", "path": "nyu-mll/glue", "metrics": ["accuracy"]} | fields, backbones(kind)
    # A prefix after the last [SEP] would be one more segment.
    data = {"datamodule_hyper_parameters": {}} if case == "segments" else {}
    source = checkpoint(kind, "PromptTuning", card, **data)
    folder = export_prompt_embeds(source, tmp_path / "embeds")
    capsys.readouterr()
    (example,) = run_code(folder, monkeypatch)
    printed = capsys.readouterr().out.strip()
    row = {column: f"{{{column}}}" for column in TaskCard(**card).columns}
    (answer,) = Predictor.from_checkpoint(str(source)).predict([row], "glue/one")
    if case == "value":
        assert float(printed) == pytest.approx(float(answer.prediction), abs=1e-4)
    else:
        probabilities = dict(zip(card["choices"], example["scores"].softmax(dim=0).tolist(), strict=True))
        assert answer.probabilities == pytest.approx(probabilities, abs=1e-5)
        assert printed == answer.prediction
    ids, labels = example["ids"][None], torch.tensor([[7]])
    with torch.no_grad():
        prompt = make_prompt("PromptTuning", backbone.dim).fold("glue/one")[None]
        ours = backbone(prompt, torch.tensor([0]), ids, torch.ones_like(ids), labels).logits[0, 0]
    torch.testing.assert_close(example["logits"], ours, rtol=1e-4, atol=1e-4)
    place = "before the mask" if kind == "modernbert" else "after the first token"
    assert json.loads((folder / "prompt_embeds.json").read_text())["place"] == place


@pytest.mark.parametrize(
    ("kind", "fields", "place"),
    [
        ("llama", {"input": "[prompt*2] film: {sentence} [prompt*3]"}, "at `[prompt*N]` in the template"),
        ("bert", {"input": "[prompt*2] {sentence} [MASK] [prompt*3]"}, "at `[prompt*N]` in the template"),
        ("bert", {"choices": ["very good", "bad"], "multi_mask": True}, "after the first token"),
        ("bert", {"input": "{sentence} [SEP] is it [MASK] ? [SEP] yes"}, "after the first token"),
    ],
)
def test_inputs_that_need_more_code_get_none(
    kind: str, fields: dict[str, Any], place: str, checkpoint: Make, tmp_path: Path
) -> None:
    folder = export_prompt_embeds(checkpoint(kind, "PromptTuning", CARD | fields), tmp_path / "embeds")
    text = (folder / "README.md").read_text()
    assert f"The prompt stands {place}. The inputs of `glue/one`" in text
    assert "```python" not in text
    assert json.loads((folder / "prompt_embeds.json").read_text())["place"] == place


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bert", {}, "PEFT has no task type for masked"),
        ("t5", {"input": "[prompt*2] film: {sentence} [prompt*3]"}, "The template has places for the prompt"),
        ("llama", {"input": "film: {sentence} [prompt*5]"}, "The template has places for the prompt"),
    ],
)
def test_prompts_that_peft_would_put_elsewhere_raise(
    kind: str, fields: dict[str, Any], message: str, checkpoint: Make, tmp_path: Path
) -> None:
    with pytest.raises(MPTError, match=rf"{message}.*: mpt export --to prompt-embeds"):
        export_peft(checkpoint(kind, "PromptTuning", CARD | fields), tmp_path / "export")
    assert not (tmp_path / "export").exists()
