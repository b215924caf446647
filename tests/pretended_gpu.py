"""Tensors that pretend to be on a GPU, for tests of what runs only there.

They compute on the CPU, but operators refuse mixed devices as on a GPU. Beyond ``FakeTensorMode``, they have values, so
that code which reads some on the host runs, too. No backward passes: autograd's engine asks for the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class OnGPU(Tensor):
    """Says that it is on a GPU, and has its values in ``host``."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGPU:
        layout: dict[str, Any] = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, host.shape, dtype=host.dtype, device=GPU, **layout)
        made.host = host
        return made

    def tolist(self) -> Any:
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Operators on "cuda" compute on the CPU, and refuse mixed devices as a GPU does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = func._schema.name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    checked = [] if name in COPIES else [tensor for tensor in tensors if tensor.dim() > 0]
    if name in INDEXING and tensors[0].is_cuda:  # indices may be on the CPU
        checked = [tensors[0]]
    assert len({tensor.device for tensor in checked}) < 2, (name, [(t.shape, t.device) for t in checked])
    on_gpu = any(tensor.is_cuda for tensor in tensors)
    if device is not None:
        on_gpu = torch.device(device).type != "cpu"  # "cuda" without a number becomes "meta", as below
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif name == "aten::copy_" or name in INDEXING:
        on_gpu = tensors[0].is_cuda
    assert not (on_gpu and kwargs.get("pin_memory")), (name, "pins memory of the GPU")
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    host_args, host_kwargs = tree_map_only(OnGPU, lambda tensor: tensor.host, (args, kwargs))
    found = func(*host_args, **host_kwargs)
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGPU, found)) if on_gpu else found


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let "cuda" be a device for operators of torch; streams and events do nothing."""
    guards = (ctypes.c_void_p * 22).in_dll(
        ctypes.CDLL(torch.__path__[0] + "/lib/libc10.so"), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before, lifts = guards[1], torch._C._only_lift_cpu_tensors()
    guards[1] = guards[14]  # of "meta", which does nothing: FakeTensorMode needs a build for CUDA to do the same
    torch._C._set_only_lift_cpu_tensors(True)
    names = "Event", "Stream", "current_stream", "device_of", "_lazy_init"
    try:
        replaced = {name: mock.MagicMock() for name in names} | {"is_current_stream_capturing": lambda: False}
        with mock.patch.multiple(torch.cuda, **replaced), PretendedGPU():
            yield
    finally:
        guards[1] = before
        torch._C._set_only_lift_cpu_tensors(lifts)


def move(model: torch.nn.Module) -> None:
    """Move a module to the GPU, which its own method cannot do."""
    moved: dict[Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in moved:
                moved[parameter] = torch.nn.Parameter(OnGPU(parameter.data))
            module._parameters[name] = moved[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = OnGPU(buffer)
