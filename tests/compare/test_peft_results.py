"""The dashboard of PEFT's method comparison finds every value that it reads in our files."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mpt_lightning.compare.environment import describe, peft_type
from mpt_lightning.compare.peft_results import write_peft_results
from mpt_lightning.compare.results import Result
from mpt_lightning.modules import DePT, FineTuning, MPTSource, PEFTModule, PromptTuning
from mpt_lightning.resources import T5

# What the dashboard reads, by its place in a file, and the type of its column; a list stands for its last element.
RUN, TRAIN, META, LAST = "run_info", "train_info", "meta_info", "train_info metrics -1"
COLUMNS: dict[str, type] = {
    f"{RUN} experiment_name": str, f"{RUN} created_at": str, f"{RUN} peft_branch": str, f"{RUN} total_time": float,
    f"{RUN} train_config model_id": str, f"{TRAIN} status": str, f"{TRAIN} train_time": float,
    f"{TRAIN} file_size": int, f"{TRAIN} num_trainable_params": int, f"{TRAIN} accelerator_memory_reserved_avg": int,
    f"{TRAIN} accelerator_memory_max": int, f"{TRAIN} accelerator_memory_reserved_99th": int,
    f"{LAST} test accuracy": float, f"{LAST} train loss": float, f"{LAST} train samples": int,
    f"{LAST} train total tokens": int, f"{META} package_info peft-version": str,
    f"{META} package_info transformers-version": str, f"{META} package_info datasets-version": str,
    f"{META} package_info torch-version": str, f"{META} package_info bitsandbytes-version": str,
    f"{META} system_info": dict,
}  # fmt: skip
RESULT = Result(
    method="lora", task="demo/topic", k=16, seed=3, metric="average", metrics={"average": 0.75}, value=0.75,
    trained_parameters=2048, checkpoint_bytes=9000, steps=60, train_rows=960, train_tokens=12_345, train_loss=0.25,
    train_seconds=4.5, seconds=7.25, peak_memory_bytes=1_000_000, commands=["mpt fit"], chosen={"model.lr": 0.1},
)  # fmt: skip


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return describe(PEFTModule(T5, {"peft_type": "LORA", "r": 4}))


def load(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each file, as the dashboard's table has them."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        row = {place: lookup(content, place) for place in COLUMNS}
        row["peft_type"] = (content[RUN]["peft_config"] or {"peft_type": "full-finetuning"})["peft_type"]
        rows.append(row)
    return rows


def lookup(content: Any, place: str) -> Any:
    """Return a value by its place; the names of the last key have spaces."""
    if place.startswith(LAST):
        return content[TRAIN]["metrics"][-1][place.removeprefix(f"{LAST} ")]
    for key in place.split(" "):
        content = content[key]
    return content


def test_the_table_is_complete(environment: dict[str, Any], tmp_path: Path) -> None:
    fine_tuned = {**environment, "peft_type": None}
    results = [
        replace(RESULT, environment=environment),
        replace(RESULT, environment=environment, seed=4),
        replace(RESULT, environment=environment, task="demo/voice", k=None),
        replace(RESULT, environment=fine_tuned, method="fine_tuning"),
        replace(RESULT, metrics={}, value=None, seed=5),  # missing
        replace(RESULT, error="out of luck", seed=6),
    ]
    files = write_peft_results(results, tmp_path)
    assert [file.name for file in files] == [
        "lora--demo-topic-k16-seed3.json", "lora--demo-topic-k16-seed4.json", "lora--demo-voice-kfull-seed3.json",
        "fine_tuning--demo-topic-k16-seed3.json",
    ]  # fmt: skip
    table = load(tmp_path)
    for row in table:
        assert {place: type(row[place]) for place in COLUMNS} == COLUMNS
        assert row[f"{TRAIN} status"] == "success"
        assert datetime.fromisoformat(row[f"{RUN} created_at"]).tzinfo is not None
    # The dashboard keeps one row of those that agree in these.
    distinct = (f"{RUN} experiment_name", f"{RUN} train_config model_id", "peft_type", f"{RUN} created_at")
    assert len({tuple(row[place] for place in distinct) for row in table}) == 4
    assert {row["peft_type"] for row in table} == {"LORA", "full-finetuning"}
    row = table[1]
    assert row[f"{RUN} experiment_name"] == "lora/demo-topic-k16-seed3"
    assert (row[f"{LAST} test accuracy"], row[f"{LAST} train loss"]) == (0.75, 0.25)
    assert (row[f"{LAST} train samples"], row[f"{LAST} train total tokens"]) == (960, 12_345)
    assert (row[f"{TRAIN} train_time"], row[f"{RUN} total_time"]) == (4.5, 7.25)
    assert row[f"{TRAIN} accelerator_memory_max"] == 1_000_000


def test_untrained_methods_are_complete(environment: dict[str, Any], tmp_path: Path) -> None:
    result = Result(method="hard", task="a", k=0, seed=0, metrics={"average": 0.5}, value=0.5, environment=environment)
    write_peft_results([result], tmp_path)
    (row,) = load(tmp_path)
    assert row[f"{LAST} train loss"] is None
    assert {type(row[place]) for place, kind in COLUMNS.items() if kind is int} == {int}


def test_a_result_without_a_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora/demo-topic-k16-seed3 has no record of its model"):
        write_peft_results([RESULT], tmp_path)


def test_types_have_peft_names() -> None:
    config = {"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": []}
    modules = [PromptTuning(T5), MPTSource(T5), DePT(T5), PEFTModule(T5, config), FineTuning(T5)]
    assert [peft_type(module) for module in modules] == ["PROMPT_TUNING", "MPT_SOURCE", "DEPT", "IA3", None]
