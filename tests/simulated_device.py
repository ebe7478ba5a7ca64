"""Accelerators that are not here: tensors that say they are on one, hold numbers of the CPU, and refuse as it does."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


WIDE = (torch.float64, torch.complex128)
MOVES = ("aten._to_copy.", "aten.copy_.")


class TensorThere(torch.Tensor):
    """
    A tensor whose numbers are `here`, on the CPU, and which says that it is on another device; torch's own code, which
    would look for that device, takes it for one of "meta".
    """

    @staticmethod
    def __new__(cls, here: torch.Tensor, device: torch.device):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        there = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), **layout, device="meta", requires_grad=here.requires_grad
        )
        there.here, there.place = here, device
        return there

    @property
    def device(self) -> torch.device:
        return self.place

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} is called on a simulated device that has been left")

    def as_subclass(self, cls):
        # torch makes no subclass of one that is a subclass already.
        return self.here.as_subclass(cls)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self):
        return f"{self.here!r} there"


class SimulatedDevice(TorchDispatchMode):
    """
    While it is entered, tensors can be moved to a device of this type and made there.

    As on the real one, tensors of the CPU do not go beside them, but 0-dimensional ones; on "mps" there is no float64.

    Args:
        device_type (`str`): "cuda" or "mps".

    Attributes:
        waits (`int`): How often the host has waited for a number or for a copy to the CPU.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device, self.waits = torch.device(device_type, 0), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), str(function)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        there = [each for each in tensors if isinstance(each, TensorThere)]
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        to_there = bool(there) if target is None else torch.device(target).type in (self.device.type, "meta")
        if there and not name.startswith(MOVES):
            beside = [each for each in tensors if not isinstance(each, TensorThere) and each.ndim]
            if beside:
                raise RuntimeError(f"{name}: expected tensors of one device, found {self.device} and cpu")
        if there and (name.startswith(("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal")) or not to_there):
            self.waits += 1
        if name.startswith("aten.copy_.") and there and not isinstance(args[0], TensorThere):
            self.waits += 1
        wrappers = {id(each.here): each for each in there}

        def inside(leaf):
            return leaf.here if isinstance(leaf, TensorThere) else leaf

        def outside(leaf):
            if not torch.is_tensor(leaf):
                return leaf
            if id(leaf) in wrappers:
                return wrappers[id(leaf)]
            if any(leaf is each for each in tensors) or not to_there:
                return leaf
            if leaf.dtype in WIDE and self.device.type == "mps":
                raise TypeError(f"{name}: MPS has no {leaf.dtype}")
            return TensorThere(leaf, self.device)

        return tree_map(outside, function(*tree_map(inside, args), **tree_map(inside, kwargs)))


@contextlib.contextmanager
def simulated(device_type: str) -> Iterator[SimulatedDevice]:
    """A device of this type for as long as the block lasts."""
    # So that `torch.tensor([1.0], device=...)` makes it on the CPU and moves it, as torch's own fake tensors want it.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with mock.patch.object(torch.cuda, "_lazy_init", lambda: None), SimulatedDevice(device_type) as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
