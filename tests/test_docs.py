"""The code of the guides, run as written: a new method trains and predicts, a masked model answers as printed."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from processes import finish, start

from mpt_lightning import Predictor, modules, prompts
from mpt_lightning.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "new_method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"## \d\. [^`]*`(\S+)`.*?```\w+\n(.*?)```", PAGE, flags=re.DOTALL)


def test_a_new_method_is_three_files(tmp_path: Path) -> None:
    # In another process, because jsonargparse keeps every class that it has parsed.
    finish(start(follow_the_page, tmp_path), seconds=200)


def follow_the_page(root: Path) -> None:
    os.chdir(root)
    sys.argv = ["mpt"]
    recipe = add_method()
    settings = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    settings += ["--data.max_eval_rows", "40", "--data.cache_dir", "cache"]
    main(["fit", "--config", str(recipe), *settings, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"])
    folder = Path(yaml.safe_load(recipe.read_text())["trainer"]["callbacks"][0]["init_args"]["dirpath"])
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert {name: list(value.shape) for name, value in saved["state_dict"].items()} == {
        "prompt.codes": [1, 16, 8], "prompt.scale": [1, 1, 128], "prompt.shift": [1, 1, 128],
    }  # fmt: skip
    resumed = [*settings, "--trainer.max_steps", "6", "--trainer.val_check_interval", "2", "--ckpt_path", "last"]
    main(["fit", "--config", str(recipe), *resumed])
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    main(["export", str(folder / "last.ckpt"), "peft", "--to", "peft"])
    assert "Ultra-low-dimensional prompt tuning" in Path("peft/README.md").read_text()
    (answer,) = Predictor.from_checkpoint(str(folder / "last.ckpt")).predict("the dog chased the fox in the park .")
    assert answer.prediction in answer.probabilities


def add_method() -> Path:
    """Import the page's prompt and module, write its recipe, and return the recipe's path."""
    (prompt_file, prompt), (module_file, module), (recipe_file, recipe) = BLOCKS
    assert (prompt_file, module_file) == ("mpt_lightning/prompts/ulpt.py", "mpt_lightning/modules/ulpt.py")
    assert recipe_file == "configs/baselines/ulpt.yaml"
    for package, text in ((prompts, prompt), (modules, module)):
        made = ModuleType(f"{package.__name__}.ulpt")
        sys.modules[made.__name__] = package.ulpt = made
        exec(compile(text, made.__name__, "exec"), vars(made))
    modules.ULPT = modules.ulpt.ULPT
    file = Path("ulpt.yaml")
    file.write_text(recipe, encoding="utf-8")
    return file


def test_masked_example_gives_the_printed_answers(minilm: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "masked.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```\s+```\n(.*?)```", page, flags=re.DOTALL).groups()
    exec(code.replace('"path/to/minilm-l6-mlm"', repr(minilm)), {})
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_a_search_of_one_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The three trials of the page are run, each selects on its dev rows, and the best values are printed."""
    pytest.importorskip("optuna", reason="needs optuna: pip install mpt_lightning[sweep]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "optuna" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    trials = names["study"].trials
    assert len({trial.params["lr"] for trial in trials}) == len(trials) == 3
    best = max(trials, key=lambda trial: trial.value)
    assert capsys.readouterr().out.endswith(f"\n{best.params}\n")
    assert 0.4 < best.value <= 1
