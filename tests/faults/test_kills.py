"""A run that is killed at any moment goes on from its last checkpoint to where it would have come anyway."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import prepare, train
from processes import finish, start

from mpt_lightning.checkpoint import read_checkpoint

STAGES = ["source", "cpt"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    prepare(folder)
    return folder


@pytest.fixture(scope="module", params=STAGES)
def whole(request: pytest.FixtureRequest, inputs: Path) -> tuple[str, dict[str, Any], float]:
    """A stage, the content of its last checkpoint when nothing interrupts it, and how long that takes in seconds."""
    folder = inputs / request.param
    finish(start(train, request.param, str(folder), str(inputs)))  # fills the data's cache
    again, begin = inputs / f"{request.param}_again", time.monotonic()
    finish(start(train, request.param, str(again), str(inputs)))
    seconds = time.monotonic() - begin
    assert_equal(last(again), last(folder))
    return request.param, last(folder), seconds


def last(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds, without the paths in it, and without what Lightning does not take back."""
    content = torch.load(folder / "last.ckpt", weights_only=True)
    for state in content["callbacks"].values():
        for key in (
            "dirpath",
            "best_model_path",
            "last_model_path",
            "kth_best_model_path",
            "best_k_models",
            "current_score",
        ):
            state.pop(key, None)
    del content["datamodule_hyper_parameters"], content["hyper_parameters"]
    return content


def assert_equal(found: Any, expected: Any, place: str = "") -> None:
    """Compare bit for bit, and name what differs."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_equal(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{place}/{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_ends_as_if_nothing_had_happened(
    seed: int, whole: tuple[str, dict[str, Any], float], inputs: Path, tmp_path: Path
) -> None:
    stage, expected, seconds = whole
    process, _ = start(train, stage, str(tmp_path), str(inputs))
    time.sleep(random.Random(seed).uniform(0.1, 1.0) * seconds)
    process.kill()
    process.join()
    for file in tmp_path.glob("*.ckpt"):
        read_checkpoint(str(file))
    finish(start(train, stage, str(tmp_path), str(inputs)))
    assert_equal(last(tmp_path), expected)
