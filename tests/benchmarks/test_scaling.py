"""The benchmarks of scale run with tiny shapes, and compute the right numbers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import launch

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:`torch.jit.script_method` is deprecated"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a script; restore the number of threads afterwards."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_gpu_runs_on_a_cpu(script, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    script("gpu").main(["--device", "cpu", "--tiny", "--repeats", "2", "--warm-up", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert [row["name"].split(",")[0] for row in result["rows"]] == ["MPTSource", "CPT", "prompt tuning"]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2
        assert 0 < row["of_ceiling"] < 1
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds_per_step"])
        assert row["peak_mib"] > 0


def test_the_gpu_script_has_the_documented_shapes(script) -> None:
    gpu = script("gpu")
    with torch.device("meta"):
        llama = gpu.AutoModelForCausalLM.from_config(gpu.LLAMA_1B)
        t5 = gpu.AutoModelForSeq2SeqLM.from_config(gpu.T5_BASE)
    assert llama.num_parameters() == 1_235_814_400  # Llama 3.2 1B's
    assert t5.num_parameters() == 222_903_552


def test_each_multiplication_counts_two_operations(script) -> None:
    left, right = torch.rand(3, 5), torch.rand(5, 7, requires_grad=True)
    assert script("gpu").operations(lambda: (left @ right).sum().backward()) == 2 * (2 * 3 * 5 * 7)


def test_a_missing_gpu_gets_one_message(script, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        script("gpu").main([])
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_backbones_runs_and_reports_missing_libraries(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbones, output = script("backbones"), tmp_path / "backbones.json"
    # New processes take seconds to start.
    monkeypatch.setattr(backbones, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr("mpt_lightning.backbones.quantization.find_spec", lambda name: None)
    ways = ["bf16", "gradient checkpointing", "4-bit"]
    backbones.main(["--tiny", "--repeats", "2", "--threads", "1", "--only", *ways, "--output", str(output)])
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ways
    assert 0 < rows["bf16"]["mean"] < rows["bf16"]["largest"] < rows["bf16"]["deviation"]
    assert rows["gradient checkpointing"]["largest"] < 1e-5
    assert "pip install mpt_lightning[quantization]" in rows["4-bit"]["missing"]
    printed = capsys.readouterr().out
    assert "not run" in printed
    assert "needs bitsandbytes" in printed


def test_the_step_model_equals_its_formula(script) -> None:
    model = script("scaling_model")
    network = model.Network(8, nvlink_latency=3e-6, nvlink_bandwidth=4e11, network_latency=1e-5, network_bandwidth=1e11)
    assert network.ring(8e8, 8) == pytest.approx(14 * 3e-6 + 2 * 7 / 8 * 8e8 / 4e11)
    # 126 hops, 2 · 7 of them between eight machines
    assert network.ring(8e8, 64) == pytest.approx(112 * 3e-6 + 14 * 1e-5 + 2 * 63 / 64 * 8e8 / 1e11)
    assert network.tree(8e8, 64) == pytest.approx(2 * (7 * 3e-6 + 3 * 1e-5) + 2 * 8e8 / 1e11)
    assert model.efficiency(0.1, 0.1, 0.0) == pytest.approx(0.5)
    assert model.efficiency(0.1, 0.1, 0.2) == 1.0  # loading the data takes longest


def test_parameters_and_operations_of_the_methods(script) -> None:
    methods, model = script("scaling_methods"), script("scaling_model")
    assert methods.trained_parameters(model.T5_BASE) == {
        "prompt tuning": 6 * 76_800, "MPTSource": 82_008, "LoRA": 884_736, "fine-tuning": 222_903_552,
    }  # fmt: skip
    flops = {name: model.flops_per_row(name, methods.TINY, 8) for name in methods.METHODS}
    forward, whole = flops["fine-tuning"]
    assert whole == pytest.approx(3 * forward, rel=0.05)
    forward, whole = flops["prompt tuning"]  # frozen weights have no gradient
    assert whole == pytest.approx(2 * forward, rel=0.2)
    assert flops["MPTSource"][1] - whole == pytest.approx(forward, rel=0.05)  # the teachers' pass


def work(words: list[str]) -> None:
    """Run the script on one rank."""
    sys.path.insert(0, str(SCRIPTS))
    importlib.import_module("scaling").main(words)


@pytest.mark.slow
def test_scaling_runs(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        words = command[2:]
        launch(work, words, ranks=int(words[words.index("--processes") + 1]))
        return subprocess.CompletedProcess(command, 0)

    scaling, output = script("scaling"), tmp_path / "scaling.json"
    monkeypatch.setattr(scaling.subprocess, "run", run)  # new processes take seconds to start
    scaling.main([
        "--tiny", "--methods", "MPTSource", "--steps", "1", "--rounds", "1", "--rows", "2", "--length", "8",
        "--model-rows", "2", "--model-length", "8", "--timeout", "200", "--output", str(output),
    ])  # fmt: skip
    result: dict = json.loads(output.read_text())
    (line,) = result["speed"]
    assert line["one"][0] > 0
    assert line["two"][0] > 0
    (line,) = result["traffic"]
    gradients = 4 * line["trained"]
    assert line["trained"] == 100 * 32 + 6 * 132
    assert all(gradients <= sum(step.values()) <= gradients + 100 for step in line["steps"])
    assert {row["gpus"] for row in result["model"]} == {8, 64, 512}
    assert all(0 < row["lowest"] <= row["highest"] <= 1 for row in result["model"])


def test_scaling_needs_one_time_per_method(script, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("scaling").main(["--step-seconds", "0.1"])
    assert "one number for each of prompt tuning, MPTSource, LoRA, fine-tuning" in capsys.readouterr().err
