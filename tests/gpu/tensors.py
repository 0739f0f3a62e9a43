"""Tensors that report the device cuda:0 and compute on the CPU; `PretendedGPU` runs their operations."""

import functools
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")
# The device that torch itself gets: autograd accepts "cuda" only in a build with CUDA, and no backend uses this one.
INSIDE = torch.device("lazy:0")

# The devices with an open `with` block, innermost last.
ACTIVE: list = []


def active():
    """Return the innermost open `PretendedGPU`."""
    if not ACTIVE:
        raise RuntimeError("A pretended tensor was used outside of PretendedGPU(): move it to the CPU before.")
    return ACTIVE[-1]


def is_pretended(device) -> bool:
    """Return whether a device (a torch.device, a string, a number or None) is the pretended one."""
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type in ("cuda", "lazy")


class PretendedTensor(torch.Tensor):
    """A tensor that reports the device cuda:0; its values are in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=INSIDE,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return active().run(operation, args, kwargs or {})

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, PretendedTensor):
            raise RuntimeError("The pretended GPU cannot move a tensor by assigning to `data`.")
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner.detach()

    def get_device(self):
        return 0

    def to(self, *args, **kwargs):
        return move(self, *args, **kwargs)

    def cpu(self, *_, **__):
        return move(self, CPU)

    def cuda(self, *_, **__):
        return self

    def tolist(self):
        return self.cpu().detach().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def data_ptr(self):
        return self.inner.data_ptr()

    def is_pinned(self, *_):
        return False

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **_):
        return f"pretended({self.inner!r}, device='cuda:0')"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = PretendedTensor(self.inner.clone()).requires_grad_(self.requires_grad)
            made.__dict__.update({name: value for name, value in self.__dict__.items() if name != "inner"})
            if self.grad is not None:
                made.grad = self.grad.__deepcopy__(memo)
            memo[id(self)] = made
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        """Pickle the values as a CPU tensor."""
        active().note("download", "save")
        plain = self.inner.detach()
        saved = torch.nn.Parameter(plain, self.requires_grad) if hasattr(self, "_is_param") else plain
        return saved.__reduce_ex__(protocol)


def tensors_in(tree) -> list[Tensor]:
    """Return the tensors of an operation's arguments."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]


def unwrapped(tree):
    """Replace the pretended tensors of an operation's arguments by their values."""
    if isinstance(tree, PretendedTensor):
        return tree.inner
    if isinstance(tree, dict):
        return {name: unwrapped(part) for name, part in tree.items()}
    return type(tree)(map(unwrapped, tree)) if type(tree) in (list, tuple) else tree


def wrapped(tree):
    """Put the tensors of an operation's result on the device."""
    if isinstance(tree, Tensor):
        return PretendedTensor(tree)
    return type(tree)(map(wrapped, tree)) if type(tree) in (list, tuple) else tree


def move(tensor: Tensor, *args, **kwargs) -> Tensor:
    """Do what `Tensor.to` does, between both devices."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], str | int) and not isinstance(args[0], bool):
        args = (torch.device(args[0]), *args[1:])
    if len(args) > 3 or (len(args) == 3 and isinstance(args[0], torch.dtype | Tensor)):
        args, copy = args[:-1], args[-1]
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    here = isinstance(tensor, PretendedTensor)
    there = here if device is None else is_pretended(device)
    dtype = tensor.dtype if dtype is None else dtype
    target = INSIDE if there else tensor.device if device is None else device
    stays = here == there and (there or target == tensor.device)
    if stays and dtype == tensor.dtype and not copy and memory_format in (None, torch.preserve_format):
        return tensor
    return torch.ops.aten._to_copy.default(
        tensor, dtype=dtype, device=target, non_blocking=non_blocking, memory_format=memory_format
    )


def loading_to_device(load):
    """Wrap `torch.load`: storages cannot be on the pretended device, so tensors are moved there after loading."""

    def moved(tree):
        if isinstance(tree, Tensor):
            return move(tree, DEVICE)
        if isinstance(tree, dict):
            tree.update({name: moved(part) for name, part in tree.items()})
            return tree
        return type(tree)(map(moved, tree)) if type(tree) in (list, tuple) else tree

    @functools.wraps(load)
    def wrapper(file, map_location=None, **options):
        there = isinstance(map_location, str | torch.device) and is_pretended(map_location)
        found = load(file, "cpu" if there else map_location, **options)
        return moved(found) if there else found

    return wrapper


@contextmanager
def _swapping(swaps: bool):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def keeping_parameters(apply):
    """Wrap `Module._apply` to keep a moved parameter the same object, as optimizers and tied weights need."""

    @functools.wraps(apply)
    def wrapped(module, fn, recurse=True):
        try:
            with _swapping(True):
                return apply(module, fn, recurse)
        except RuntimeError as error:
            # After an error within a step the graph still refers to the parameter, so it becomes a new object.
            if "Couldn't swap" not in str(error):
                raise
            with _swapping(False):
                return apply(module, fn, False)

    return wrapped
