"""A pretended GPU, which finds tensors on the wrong device and host waits on a machine without a GPU.

Within `PretendedGPU()` the device "cuda" exists: its tensors report cuda:0 and compute on the CPU.
What raises on a real GPU raises:

- operations on tensors of both devices, unless CUDA allows them (CPU numbers without dimensions, CPU indices, copies);
- `numpy()` of a tensor on the GPU;
- random numbers on the GPU from a CPU generator.

Operations for which the host would wait for a real GPU are recorded as a `Wait`:

- "item": a value is read (`item()`, `bool(tensor)`, `torch.equal`);
- "shape": the size of a result depends on values (`nonzero`, `unique`, `tensor[mask]`);
- "download": `cpu()`, `tolist()`, `to("cpu")`;
- "upload": a copy to the GPU that is not `non_blocking`.

The device has a separate random state, so that initial values drawn on it differ from those drawn on the CPU.

Example:
    with PretendedGPU() as gpu:
        trainer(gpu, max_steps=3).fit(module, datamodule=data)
    for number, kind, operation, line, library in gpu.table("train 2"):  # the step with this global_step
        print(number, kind, operation, line, library)

Limits: one device; no streams, no torch.compile, no CUDA kernels, so that memory, speed and numerics are the CPU's.
Only `module.to()` moves a module; assigning to `parameter.data` does not. Saved tensors report the CPU.
Every tensor must be moved to the CPU before the `with` block ends. `torch.cuda.is_available()` stays False.
"""

import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # lists torch's functions on import, so it must be imported before some are replaced
from torch.overrides import TorchFunctionMode
from torch.utils import _device as default_device
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.gpu.rules import Wait, WrongDevice, facts, refusal, waits
from tests.gpu.tensors import (
    ACTIVE,
    CPU,
    DEVICE,
    PretendedTensor,
    is_pretended,
    keeping_parameters,
    loading_to_device,
    move,
    tensors_in,
    unwrapped,
    wrapped,
)


class PretendedGPU:
    """The device, for the duration of a `with` block.

    Args:
        package: The folder of the package whose lines are reported.
    """

    name = "pretended"

    def __init__(self, package: str = "mpt_lightning") -> None:
        self.package = f"/{package}/"
        self.waits: list[Wait] = []
        self.refused: list[str] = []  # messages of all WrongDevice errors, including those that a library caught
        self.phase = ""
        self._quiet = 0
        self._stack = ExitStack()
        self._seed(torch.initial_seed())
        self._lock = threading.RLock()
        self._operations = _Operations(self)

    def __enter__(self) -> "PretendedGPU":
        enter = self._stack.enter_context
        enter(mock.patch.object(torch.nn.Module, "_apply", keeping_parameters(torch.nn.Module._apply)))
        enter(mock.patch.object(torch, "load", loading_to_device(torch.load)))
        stand_ins = {
            "_lazy_init": lambda: None,
            "get_rng_state": lambda *_: self._random.clone(),
            "set_rng_state": lambda state, *_: setattr(self, "_random", state.clone()),
            "manual_seed": self._seed,
            "manual_seed_all": self._seed,
            "current_device": lambda: 0,
            "empty_cache": lambda: None,
            "set_device": lambda *_: None,
            "synchronize": lambda *_: self.note("item", "synchronize"),
            "mem_get_info": lambda *_: (1 << 33, 1 << 33),
            "memory_reserved": lambda *_: 0,
            "memory_allocated": lambda *_: 0,
        }
        for name, function in stand_ins.items():
            enter(mock.patch.object(torch.cuda, name, function))
        enter(mock.patch.object(torch.backends.cudnn, "is_acceptable", return_value=False))
        # The threads in which transformers loads weights do not inherit the modes.
        enter(mock.patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1"))
        ACTIVE.append(self)
        self._stack.callback(ACTIVE.remove, self)
        enter(self._operations)
        enter(_Functions(self))
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    # Waits.

    def note(self, kind: str, operation: str) -> None:
        """Record that the host waits."""
        if not self._quiet:
            self.waits.append(Wait(kind, operation, *self._lines(), self.phase))

    @contextmanager
    def quiet(self):
        """Record no waits within a `with` block, such as those of a test that reads values."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def table(self, phase: str = "") -> list[tuple[int, str, str, str, str]]:
        """Return the waits of the phases that start with `phase` as (number, kind, operation, line, library)."""
        chosen = [wait for wait in self.waits if wait.phase.startswith(phase)]
        counted = Counter((wait.kind, wait.operation, wait.line, wait.library) for wait in chosen)
        return [(number, *key) for key, number in counted.most_common()]

    def _lines(self) -> tuple[str, str]:
        line = library = ""
        frame = sys._getframe(1)
        while frame is not None and not line:
            path = frame.f_code.co_filename
            if self.package in path:
                line = f"{path[path.rindex(self.package) + 1 :]}:{frame.f_lineno}"
            elif not library and path[0] == "/" and "/torch/" not in path and "/tests/gpu/" not in path:
                library = f"{'/'.join(Path(path).parts[-3:])}:{frame.f_lineno}"
            frame = frame.f_back
        return line, library

    # Random numbers.

    def _seed(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(int(seed) + 1).get_state()

    def _draw(self, operation, args, kwargs):
        with self._lock:
            if isinstance(kwargs.get("generator"), torch.Generator):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            before = torch.default_generator.get_state()
            torch.default_generator.set_state(self._random)
            try:
                return operation(*args, **kwargs)
            finally:
                self._random = torch.default_generator.get_state()
                torch.default_generator.set_state(before)

    # Operations.

    def run(self, operation, args, kwargs):
        """Run an operation on tensors of either device."""
        known = facts(operation)
        if known.composite:  # in inference mode it is not decomposed yet
            with self._operations:
                made = operation.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        found = tensors_in((args, kwargs))
        pretended = [tensor for tensor in found if isinstance(tensor, PretendedTensor)]
        asked = kwargs.get("device")
        on_gpu = bool(pretended) if asked is None else is_pretended(asked)
        if not pretended and not on_gpu:
            return operation(*args, **kwargs)
        if 0 < len(pretended) < len(found) and (message := refusal(known, args, kwargs)):
            self.refused.append(f"{message} {self._lines()}")
            raise WrongDevice(message)
        for kind, what in waits(known, args, kwargs):
            self.note(kind, what)
        plain_args, plain_kwargs = unwrapped(args), unwrapped(kwargs)
        if asked is not None and on_gpu:
            plain_kwargs["device"] = CPU
        if on_gpu and known.draws:
            made = self._draw(operation, plain_args, plain_kwargs)
        else:
            made = operation(*plain_args, **plain_kwargs)
        if known.returns_argument:
            if known.reshapes:
                inner = args[0].inner  # has the new shape
                torch.Tensor.data.__set__(args[0], PretendedTensor(inner))
                args[0].inner = inner
            return args[known.written[0]]
        if on_gpu:
            # In inference mode, a view of a tensor created outside of it is not an inference tensor either.
            outside = known.views and torch.is_inference_mode_enabled() and not pretended[0].is_inference()
            with torch.inference_mode(False) if outside else nullcontext():
                made = wrapped(made)
        if pretended and known.written:
            return return_and_correct_aliasing(operation, args, kwargs, made)
        return made


class _Operations(TorchDispatchMode):
    """Intercepts the operations that create tensors, which reach no tensor's `__torch_dispatch__`."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self.gpu.run(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Intercepts the functions that create or move a tensor before the dispatcher is called."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("data")
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            asked = kwargs.get("device")
            if isinstance(first, PretendedTensor) and func is not torch.tensor:
                return move(first, device=asked, dtype=kwargs.get("dtype"))
            if is_pretended(default_device.CURRENT_DEVICE if asked is None else asked):
                made = func(*args, **kwargs | {"device": "cpu"})
                return move(made.detach(), DEVICE).requires_grad_(made.requires_grad)
        elif func is torch.Tensor.to:
            return move(*args, **kwargs)
        elif func is torch.Tensor.cuda:
            return move(first, DEVICE, non_blocking=kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        elif func is torch.Tensor.new_tensor and isinstance(first, PretendedTensor):
            return torch.tensor(*args[1:], **{"device": DEVICE, "dtype": first.dtype} | kwargs)
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(first, PretendedTensor):
            args = (first, index_tensors(args[1]), *args[2:])
        elif func is torch.nn.functional.one_hot and kwargs.get("num_classes", args[1] if len(args) > 1 else -1) >= 0:
            with self.gpu.quiet():  # only the CPU's version reads the values
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def index_tensors(index):
    """Turn lists in an index into tensors, which torch would create on the device without the dispatcher."""
    if isinstance(index, list) and all(type(entry) in (int, bool) for entry in index):
        kind = torch.bool if index and type(index[0]) is bool else torch.long
        return move(torch.tensor(index, dtype=kind, device="cpu"), DEVICE)
    return tuple(map(index_tensors, index)) if isinstance(index, tuple) else index
