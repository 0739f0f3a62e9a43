"""`mpt compare` from the command line."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from processes import PROCESSES

from mpt_lightning.cli.main import main
from mpt_lightning.resources import packaged


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mpt"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("multiprocessing.get_context", lambda method: PROCESSES)  # new processes take seconds to start
    return tmp_path


def run_and_exit(code: int, *words: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["compare", *words])
    assert leaving.value.code == code


@pytest.mark.slow
def test_from_the_file_to_the_report(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A comparison with a failing method is reported; a second call repeats a deleted result only."""
    text = packaged("configs", "compare/few").read_text()
    (own_folder / "few.yaml").write_text(
        text + "  wrong: {recipe: baselines/ia3, arguments: {model.lr: -1}, seeds: [0]}\n"
    )
    run_and_exit(1, "few.yaml", "--jobs", "1", "--output", "out")
    printed = " ".join(capsys.readouterr().out.split())
    assert "wrong/demo/topic/8/0 failed: lr: got -1.0, expected a number at least 0" in printed
    assert "4 of 5 runs done; 1 failed." in printed
    results = {path: json.loads(path.read_text()) for path in sorted(Path("out/results").rglob("*.json"))}
    assert len(results) == 5
    one = results[Path("out/results/lora/demo/topic/8/0.json")]
    assert one["value"] == one["metrics"]["demo/topic/accuracy"]
    assert (one["steps"], one["status"], one["error"]) == (2, "done", None)
    assert one["trained_parameters"] > results[Path("out/results/ia3/demo/topic/8/0.json")]["trained_parameters"] > 0
    assert one["checkpoint_bytes"] > 4 * one["trained_parameters"]
    assert 0 < one["seconds_per_step"] < one["seconds"]
    assert one["peak_memory_bytes"] is None or one["peak_memory_bytes"] > 1_000_000
    assert one["commands"][0].startswith("mpt fit --config baselines/lora --data demo/topic --seed_everything 0 ")
    assert one["commands"][1].endswith("--ckpt_path runs/baselines/lora/best.ckpt")  # which the first command writes
    logs = [Path("out/runs/lora/demo/topic/8/0", name).read_text() for name in ("metrics.csv", "test/metrics.csv")]
    assert ["val/average" in text for text in logs] == [True, False]
    assert ["test/average" in text for text in logs] == [False, True]
    assert not list(Path("out").rglob("*.ckpt"))
    assert not Path("runs").exists()
    with Path("out/report.csv").open(newline="") as file:
        assert {(row["method"], row["runs_done"]) for row in csv.DictReader(file)} == {
            ("lora", "2"), ("ia3", "2"), ("wrong", "0"),
        }  # fmt: skip

    lost = Path("out/results/lora/demo/topic/8/1.json")
    before = {path: path.stat().st_mtime_ns for path in results}
    lost.unlink()
    run_and_exit(1, "few.yaml", "--jobs", "1", "--output", "out")
    again = {path for path in results if path.stat().st_mtime_ns != before[path]}
    assert again == {lost, Path("out/results/wrong/demo/topic/8/0.json")}
    # The result does not depend on an earlier run in the same process.
    same = ("value", "metrics", "trained_parameters", "checkpoint_bytes", "commands")
    assert all(json.loads(lost.read_text())[key] == results[lost][key] for key in same)
    run_and_exit(1, "few.yaml", "--report", "--format", "peft", "--output", "out")
    assert "wrote 4 files in out/peft" in capsys.readouterr().out
    peft = json.loads(Path("out/peft/lora--demo-topic-k8-seed0.json").read_text())
    assert (peft["run_info"]["train_config"]["model_id"], peft["run_info"]["peft_config"]["peft_type"]) == (
        "mpt_lightning/demo/t5", "LORA",
    )  # fmt: skip
    assert peft["train_info"]["num_total_params"] > peft["train_info"]["num_trainable_params"]
    (last,) = peft["train_info"]["metrics"]
    assert (last["test accuracy"], last["train samples"]) == (one["value"], one["train_rows"])
    assert last["train loss"] > 0
    assert last["train total tokens"] > 3 * last["train samples"]
    assert {path for path in results if path.stat().st_mtime_ns != before[path]} == again
    capsys.readouterr()
    for command in one["commands"]:
        main(shlex.split(command)[1:])
    (value,) = re.findall(r"test/average\W+([\d.]+)", capsys.readouterr().out)
    assert float(value) == pytest.approx(one["value"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare/fe"], "unknown comparison 'compare/fe'. Expected a file or one of: compare/few, compare/demo."),
        (["compare/few", "--jobs", "0"], "--jobs must be at least 1, got 0."),
        (["compare/few", "--report"], "There are no results in runs/compare/few"),
        (["compare/few", "--output", "mine"], "mine is not empty and contains no comparison"),
    ],
)
def test_mistakes_get_one_message(
    words: list[str], message: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "mine").mkdir()
    (own_folder / "mine" / "thesis.txt").write_text("")
    run_and_exit(2, *words)
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("mpt: error:") == 1


def test_a_comparison_is_not_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "compare/few"])
    assert "not a recipe. Run it with: mpt compare compare/few" in capsys.readouterr().err
    main(["configs"])
    assert "A minimal comparison that takes seconds" in capsys.readouterr().out


def test_an_argument_for_all_runs_stands_in_the_reports_command(own_folder: Path) -> None:
    Path("out").mkdir()
    main(["compare", "compare/few", "--report", "--set", "model.lr=a b=c", "--output", "out"])
    assert "mpt compare compare/few --set 'model.lr=a b=c' --output out" in Path("out/report.md").read_text()


@pytest.mark.parametrize("text", ["model.lr", "=3", "--model.lr=3"])
def test_an_argument_without_name_or_value(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_and_exit(2, "compare/few", f"--set={text}")
    assert f"--set: got {text!r}, expected an argument and its value" in capsys.readouterr().err
