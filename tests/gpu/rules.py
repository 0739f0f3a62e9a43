"""Rules over torch's operations: which ones raise on a real GPU, and for which ones the host waits."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.gpu.tensors import PretendedTensor, is_pretended, tensors_in

aten = torch.ops.aten
COPIES = {
    aten.copy_, aten._to_copy, aten.copy, aten.set_, aten.is_same_size, aten._has_compatible_shallow_copy_type,
}  # fmt: skip
INDEXED = {
    aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten._unsafe_index_put,
}  # fmt: skip
# Operations that take a CPU tensor without dimensions as a number, in addition to those that torch tags as pointwise.
TAKES_NUMBERS = {
    aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_, aten.where, aten.index_fill, aten.index_fill_,
}  # fmt: skip
READS_VALUE = {aten._local_scalar_dense, aten.equal, aten._linalg_check_errors}
SHAPED_BY_VALUES = {
    aten.nonzero, aten.nonzero_numpy, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.unique_dim_consecutive, aten.masked_select, aten.bincount,
}  # fmt: skip


class WrongDevice(RuntimeError):
    """Tensors of one operation are on different devices."""


@dataclass(frozen=True)
class Wait:
    """The host waits for the GPU.

    Attributes:
        kind: "item", "shape", "download" or "upload".
        operation: Torch's name of the operation.
        line: The innermost line of the package, "file:number", or "".
        library: The innermost line outside of torch and the package, or "".
        phase: The part of the run, see `tests.gpu.trainer`.
    """

    kind: str
    operation: str
    line: str
    library: str
    phase: str


@dataclass(frozen=True)
class Facts:
    """An operation's properties in torch's schema.

    Attributes:
        packet: The operation without its overload.
        name: Torch's name of the operation.
        composite: Whether it consists of other operations.
        draws: Whether it draws random numbers.
        views: Whether it returns a view of an argument.
        pointwise: Whether it is elementwise.
        written: The positions of the arguments that it writes to.
        returns_argument: Whether it returns the argument that it writes to.
        reshapes: Whether it changes the shape of its argument in place.
    """

    packet: Any
    name: str
    composite: bool
    draws: bool
    views: bool
    pointwise: bool
    written: tuple[int, ...]
    returns_argument: bool
    reshapes: bool


@functools.cache
def facts(operation) -> Facts:
    """Return an operation's properties in torch's schema."""
    tags, schema, name = operation.tags, operation._schema, operation.name()
    aliases = [argument.alias_info for argument in schema.arguments]
    written = tuple(place for place, alias in enumerate(aliases) if alias is not None and alias.is_write)
    returned = [result.alias_info for result in schema.returns]
    same = len(returned) == len(written) == 1 and returned[0] is not None and returned[0].is_write
    return Facts(
        packet=operation._overloadpacket,
        name=name.removeprefix("aten::"),
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"),
        draws=torch.Tag.nondeterministic_seeded in tags,
        views=any(alias is not None for alias in returned),
        pointwise=torch.Tag.pointwise in tags or "_foreach_" in name,
        written=written,
        returns_argument=same and not schema.arguments[written[0]].kwarg_only,
        reshapes=torch.Tag.inplace_view in tags,
    )


def values_of(args, kwargs):
    """Return the values that an indexed assignment writes, or None for a read."""
    return args[2] if len(args) > 2 else kwargs.get("values")


def waits(known: Facts, args, kwargs) -> Iterator[tuple[str, str]]:
    """Yield the kind and the name of each wait of the host in an operation."""
    packet, name = known.packet, known.name
    here = bool(args) and isinstance(args[0], PretendedTensor)
    if packet in READS_VALUE:
        yield "item", name
    elif packet in SHAPED_BY_VALUES or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
        yield "shape", name
    elif packet is aten._to_copy and kwargs.get("device") is not None and not kwargs.get("non_blocking"):
        if here != is_pretended(kwargs["device"]) and args[0].numel() and args[0].device.type != "meta":
            yield "download" if here else "upload", name
    elif packet is aten.copy_ and here != isinstance(args[1], PretendedTensor):
        if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            yield "upload" if here else "download", name
    elif packet in INDEXED and here:
        indices, values = [index for index in args[1] if index is not None], values_of(args, kwargs)
        for index in indices:
            if not isinstance(index, PretendedTensor):
                yield "upload", f"{name} with an index on the CPU"
            # One number written through one mask becomes masked_fill, whose shape is known.
            elif index.dtype == torch.bool and (values is None or values.numel() > 1 or len(indices) > 1):
                yield "shape", f"{name} with a mask"


def refusal(known: Facts, args, kwargs) -> str:
    """Return a real GPU's error message for an operation on tensors of both devices, or "" if it accepts them."""
    packet = known.packet
    message = f"Expected all tensors to be on the same device, but found cuda:0 and cpu! (in {known.name})"
    if packet in COPIES:
        return ""
    if packet in INDEXED:
        values, here = values_of(args, kwargs), isinstance(args[0], PretendedTensor)
        if not here and any(isinstance(index, PretendedTensor) for index in args[1]):
            return "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        return "" if values is None or isinstance(values, PretendedTensor) == here or values.dim() == 0 else message
    if known.pointwise or packet in TAKES_NUMBERS:
        others = [tensor for tensor in tensors_in((args, kwargs)) if not isinstance(tensor, PretendedTensor)]
        targets = tensors_in([args[place] for place in known.written if place < len(args)])
        if all(t.dim() == 0 for t in others) and all(isinstance(t, PretendedTensor) for t in targets):
            return ""
    return message
