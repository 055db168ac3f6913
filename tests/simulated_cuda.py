"""A simulated CUDA device: its tensors report the device cuda:0, and the CPU computes their values.

It refuses what a GPU refuses: operations on tensors of two devices, NumPy access, use in a forked process. It records
in `synchronisations` where the CPU would wait for the GPU, and in `kernels` what the GPU would be asked to compute. It
cannot show kernels' rounding, streams and their races, memory or speed: those need a real GPU.

Two parts work together. `OnCuda` is a tensor whose Python attribute `device` is cuda:0. For torch's C++ code it is a
CPU tensor, so autograd works. `SimulatedCuda` is a dispatch mode that returns such tensors from functions that get
`device="cuda"`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU, aten = torch.device("cuda", 0), torch.device("cpu"), torch.ops.aten
COPIES = {aten.copy_.default, aten._foreach_copy_.default}  # these accept tensors of two devices
# The result of these depends on values on the GPU, which the CPU has to wait for.
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
ALLOCATIONS = ("empty", "new_empty", "detach", "alias", "lift", "_local_scalar_dense")
MEMORY = 2**34  # bytes

synchronisations: list[str] = []
kernels: list[str] = []
_process = os.getpid()


class OnCuda(Tensor):
    """A tensor that reports the device cuda:0; `value` is the tensor on the CPU that holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "OnCuda":
        tensor = torch.Tensor._make_subclass(cls, value, value.requires_grad)
        tensor.value = value
        return tensor

    def __init__(self, value: Tensor) -> None: ...

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        memory_format = {"memory_format": layout} if layout is not None else {}
        if device is not None and device.type == "cpu":
            if not non_blocking:
                synchronisations.append("to cpu")
            return self.value.detach().to(dtype or self.dtype, copy=True, **memory_format)
        return super().to(dtype or self.dtype, copy=copy, **memory_format)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None: ...

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnCuda":
        copy = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class SimulatedCuda(TorchDispatchMode):
    """Returns `OnCuda` tensors from functions that create tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # in which composite functions arrive undivided
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation, computed by the CPU, after the checks of a GPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_cuda, on_cpu = ([t for t in tensors if isinstance(t, OnCuda) == is_on_cuda] for is_on_cuda in (True, False))
    target = torch.device(kwargs.get("device") or CPU)
    is_on_cuda = bool(on_cuda) or target.type == "cuda"
    if is_on_cuda and os.getpid() != _process:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    _check_devices(func, args, on_cuda, on_cpu)
    _record(func, args, kwargs, on_cuda, on_cpu, target)
    known = {id(t.value if isinstance(t, OnCuda) else t): t for t in tensors}  # an in-place result is its own input
    convert = {torch.device: lambda leaf: CPU, OnCuda: lambda leaf: leaf.value}
    args, kwargs = tree_map(lambda leaf: convert.get(type(leaf), lambda leaf: leaf)(leaf), (args, kwargs))
    result = func(*args, **{**kwargs, **({"pin_memory": False} if "pin_memory" in kwargs else {})})

    def as_on_cuda(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) in known or not is_on_cuda:
            return known.get(id(leaf), leaf)
        return OnCuda(leaf)

    return tree_map(as_on_cuda, result)


def _check_devices(func: Any, args: Any, on_cuda: list[Tensor], on_cpu: list[Tensor]) -> None:
    """Raise RuntimeError for tensors of two devices, unless a GPU accepts them: a scalar of the CPU, or CPU indices."""
    written = [
        leaf
        for argument, declared in zip(args, func._schema.arguments)
        if declared.alias_info and declared.alias_info.is_write
        for leaf in tree_leaves(argument)
    ]
    are_scalars = all(t.ndim == 0 and not any(t is each for each in written) for t in on_cpu)
    is_accepted = torch.Tag.pointwise in func.tags and are_scalars
    is_accepted |= func in COPIES or (func is aten.index.Tensor and isinstance(args[0], OnCuda))
    if on_cuda and on_cpu and not is_accepted:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")


def _record(
    func: Any, args: Any, kwargs: Any, on_cuda: list[Tensor], on_cpu: list[Tensor], target: torch.device
) -> None:
    """Record a synchronisation or a kernel."""
    is_mask = func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])
    is_blocking_copy = func is aten.copy_.default and bool(on_cpu) and not args[2:]
    is_upload = func is aten._to_copy.default and target.type == "cuda" and on_cpu and not kwargs.get("non_blocking")
    if (on_cuda and (func in READS or is_mask or is_blocking_copy)) or is_upload:
        synchronisations.append(str(func))
    returns_views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    name = func.__name__.partition(".")[0]
    if (on_cuda or target.type == "cuda") and not returns_views and not name.startswith(ALLOCATIONS):
        kernels.append(name)


class Stream:
    """A stream without pending work."""

    def wait_stream(self, other: "Stream") -> None: ...


@contextlib.contextmanager
def simulated_cuda() -> Iterator[None]:
    """Within it, torch reports one CUDA device. It replaces private functions of torch: see tests/test_internals.py."""
    global _process
    _process = os.getpid()
    real_to, real_autocast, real_group = Tensor.to, torch.autocast, torch._C._group_tensors_by_device_and_dtype

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # With an index: without one, torch would ask CUDA for the current device.
        args = tuple(CUDA if isinstance(a, str | torch.device) and str(a).startswith("cuda") else a for a in args)
        return real_to(self, *args, **kwargs)

    def group(lists: Any, with_indices: bool = False) -> Any:
        groups = real_group(lists, with_indices).items()
        return {(next(t for t in parts[0]).device, dtype): (parts, rows) for (_, dtype), (parts, rows) in groups}

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    properties = SimpleNamespace(name="simulated", major=9, minor=0, total_memory=MEMORY)
    cuda: dict[str, Any] = dict.fromkeys(("_lazy_init", "synchronize", "_sleep", "set_sync_debug_mode"), nothing)
    cuda |= {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: "simulated",
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "default_generators": (torch.Generator(),),
        "stream": lambda stream: contextlib.nullcontext(),
        **dict.fromkeys(("Stream", "current_stream"), lambda device=None: Stream()),
    }
    others: dict[str, Callable[..., Any]] = {
        "torch.accelerator.synchronize": nothing,
        "torch.accelerator.set_device_index": nothing,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.optim.Optimizer._accelerator_graph_capture_health_check": nothing,
        "torch._C._group_tensors_by_device_and_dtype": group,
        "torch.autocast": lambda device_type, **kwargs: real_autocast("cpu", **kwargs),
        "torch.Tensor.to": to,
        "torch.Tensor.cuda": lambda self: to(self, CUDA),
        "torch.Tensor.pin_memory": lambda self: self.clone(),
    }
    with contextlib.ExitStack() as stack:
        for name, value in {**{f"torch.cuda.{name}": value for name, value in cuda.items()}, **others}.items():
            stack.enter_context(mock.patch(name, value))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        synchronisations.clear()
        kernels.clear()
        stack.enter_context(SimulatedCuda())
        yield
