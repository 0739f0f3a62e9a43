"""The pretended GPU raises where a real one raises, and records the waits of the host."""

import pytest
import torch

from tests.gpu.pretended import PretendedGPU
from tests.gpu.rules import WrongDevice


def test_tensors_of_both_devices_are_refused() -> None:
    with PretendedGPU() as gpu:
        there, here = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
        with pytest.raises(WrongDevice, match="cuda:0 and cpu"):
            there + here
        with pytest.raises(WrongDevice, match="indices should be"):
            here[torch.tensor([0], device="cuda")]
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        assert (there[torch.tensor([0])] * torch.tensor(2.0)).is_cuda
    assert len(gpu.refused) == 2


def test_waits_are_recorded_by_kind() -> None:
    with PretendedGPU() as gpu:
        there = torch.ones(3, device="cuda")
        for wait in (
            lambda: bool(there.sum() > 1), lambda: there.nonzero(), lambda: there.cpu(), lambda: torch.ones(2).cuda(),
        ):  # fmt: skip
            wait()
        torch.ones(2).to("cuda", non_blocking=True)
        with gpu.quiet():
            there.tolist()
    assert [wait.kind for wait in gpu.waits] == ["item", "shape", "download", "upload"]
    assert sum(number for number, *_ in gpu.table()) == 4


def test_the_device_has_a_separate_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.randn(4)
    with PretendedGPU():
        torch.manual_seed(0)
        there = torch.randn(4, device="cuda").cpu()
        here = torch.randn(4)
    assert torch.equal(here, expected)
    assert not torch.equal(there, expected)


def test_moving_a_module_keeps_its_parameters() -> None:
    layer = torch.nn.Linear(2, 3)
    weight = layer.weight
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = weight.detach().clone()
    with PretendedGPU():
        layer.to("cuda")
        assert layer.weight is weight
        assert weight.is_cuda
        layer(torch.ones(1, 2, device="cuda")).sum().backward()
        optimizer.step()
        layer.cpu()
    assert not weight.is_cuda
    assert not torch.equal(weight, before)
