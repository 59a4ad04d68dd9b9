"""Weights of some parts of a model that are not in memory: read from the artefact each time their part runs.

A part is a child of a decoder layer: its attention, its feed-forward network. On a CPU the parts' tensors are read from
the artefact's file into one of two places, by a thread that reads the next part while this one computes, in the order in
which they followed each other last time. The process holds those two places and what is resident, whatever the model's
size. Beside an accelerator the parts wait in the host's memory, or on its disk where that is too small, and accelerate
brings them in.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from knowledge_base.engines._disk_reading import read_into, settled
from knowledge_base.errors import CandidateFailed

PLACES = 2  # one part computes while the next is read
ALIGNED_BYTES = 64  # where a tensor may begin in a place
HOST_SHARE = 0.8  # of the memory that is free on the host, that weights of an accelerator may fill
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def parts_of(model: Any) -> dict[str, int]:
    """Return the parts of a model's layers that can be read when they run, and their bytes, in the order they run.

    Raises:
        CandidateFailed: "unsupported", the layers are not found, share weights, or hold modules that keep another form of
            their weights once they have run.
    """
    from knowledge_base.techniques._blocks import decoder_layers

    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found: dict[str, int] = {}
    places: set[int] = set()
    for number, layer in enumerate(layers):
        for name, part in layer.named_children():
            tensors = part.state_dict().values()
            if not any(tensor.dim() > 1 for tensor in tensors):
                continue  # a norm
            keeps = next((m for m in part.modules() if hasattr(m, "unpacked") or hasattr(m, "prepare")), None)
            if keeps is not None:
                raise CandidateFailed(
                    "unsupported", f"{type(keeps).__name__} keeps its weights in another form than they are stored in",
                    hint="leave such a layer in memory: plan offload with weights in 8 bits or unquantised",
                )  # fmt: skip
            # Not its address, which a tensor has only once it was loaded.
            own = {tensor.untyped_storage()._cdata for tensor in tensors if tensor.numel()}
            if own & places:
                raise CandidateFailed("unsupported", f"layers of {type(model).__name__} share their weights")
            places |= own
            found[f"{prefix}.{number}.{name}"] = sum(tensor.nbytes for tensor in tensors)
    return found


class Offloaded(Protocol):
    """The parts of an opened model that are not in memory."""

    def tensors(self) -> list[torch.Tensor]:
        """Return what it holds memory with, for weights that are being brought in."""
        ...

    def close(self) -> None:
        """Let go of it; the model cannot run any more."""
        ...


def offloaded(model: Any, parts: Sequence[str], weights: Path, device: torch.device) -> Offloaded:
    """Have a model's parts brought in as they run; while it was loaded they were left where they wait.

    Raises:
        CandidateFailed: "load_error", the file lacks them; "engine_missing", an accelerator without accelerate.
    """
    return FromDisk(model, parts, weights) if device.type == "cpu" else _dispatched(model, parts, weights, device)


def waiting(parts: Sequence[str], weights: Path, device: torch.device) -> dict[str, str]:
    """Return where each part waits, "disk" or "cpu": on the host as long as there is room, beside a CPU always on disk.

    Raises:
        CandidateFailed: "load_error", the file has no tensors of a part.
    """
    sizes = dict.fromkeys(parts, 0)
    for name, stored in stored_in(weights).items() if parts else ():
        if (part := _part_of(name, sizes)) is not None:
            sizes[part] += stored.bytes
    if missing := [part for part, size in sizes.items() if not size]:
        raise CandidateFailed("load_error", f"the artefact has no weights of `{missing[0]}`", hint="build it again")
    if device.type == "cpu":
        return dict.fromkeys(parts, "disk")
    import psutil

    room = HOST_SHARE * psutil.virtual_memory().available
    found = {}
    for part in parts:
        found[part] = "cpu" if sizes[part] <= room else "disk"
        room -= sizes[part] if found[part] == "cpu" else 0
    return found


def _part_of(tensor: str, parts: Container[str]) -> str | None:
    """Return the part that a tensor is of, by their names: "layers.0.mlp" of "layers.0.mlp.up_proj.weight"."""
    owner = tensor
    while owner:
        owner = owner.rpartition(".")[0]
        if owner in parts:
            return owner
    return None


# ---------------------------------------------------------------- from disk


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file
    bytes: int


def stored_in(weights: Path) -> dict[str, Stored]:
    """Return where each tensor of a safetensors file lies.

    Raises:
        CandidateFailed: "load_error", it is no such file.
    """
    try:
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if stop - start != dtype.itemsize * math.prod(shape) or not 0 <= start <= stop <= size - 8 - length:
                raise ValueError(f"`{name}` does not lie in the file")
            found[name] = Stored(dtype, shape, 8 + length + start, stop - start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CandidateFailed(
            "load_error", f"{weights.name}: cannot be read: {error}", hint="build it again"
        ) from error
    return found


@dataclass(frozen=True, slots=True)
class _Tensor:
    held: torch.Tensor  # the module's own; empty while its part does not run
    stored: Stored
    offset: int  # in a place


@dataclass(frozen=True, slots=True)
class _Reading:
    number: int  # of the part
    place: int
    done: Future[None]


class FromDisk:
    """Parts whose tensors are read from a file: hooks on the parts take them from two places that a thread fills."""

    def __init__(self, model: Any, parts: Sequence[str], weights: Path) -> None:
        stored = stored_in(weights)
        self._name = weights.name
        self._parts = [_tensors(model, part, stored) for part in parts]
        self._size = max(_end(tensors) for tensors in self._parts)
        self._file = os.open(weights, os.O_RDONLY | os.O_CLOEXEC)
        settled(self._file)
        self._memory = [mmap.mmap(-1, self._size) for _ in range(min(PLACES, len(parts)))]
        self._free = list(range(len(self._memory)))
        self._places = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._memory]
        self._views = [[[_view(place, t) for t in tensors] for place in self._places] for tensors in self._parts]
        self._follows = {i: (i + 1) % len(parts) for i in range(len(parts))}  # what ran after each part last time
        self._last: int | None = None
        self._running: dict[int, int] = {}  # part -> its place
        self._coming: deque[_Reading] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._hooks = [
            hook
            for number, part in enumerate(parts)
            for hook in self._hooked(model.get_submodule(part), number)
        ]  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        """Return the places."""
        return self._places

    def close(self) -> None:
        """Stop reading and let go of the file and the places."""
        if self._hooks:
            self._thread.shutdown(cancel_futures=True)
            for hook in self._hooks:
                hook.remove()
            os.close(self._file)
            self._hooks, self._views, self._places, self._memory = [], [], [], []

    def _hooked(self, module: nn.Module, number: int) -> Iterator[Any]:
        yield module.register_forward_pre_hook(lambda *_: self._before(number))
        yield module.register_forward_hook(lambda *_: self._after(number), always_call=True)

    def _before(self, number: int) -> None:
        """Have a part's tensors in place, and the next part's on their way."""
        if self._last is not None:
            self._follows[self._last] = number
        self._last = number
        if self._coming and self._coming[0].number == number:
            reading = self._coming.popleft()
        else:  # another order than last time
            for other in self._coming:
                other.done.exception()  # the place is free once the thread is done with it
                self._free.append(other.place)
            self._coming.clear()
            reading = self._read(number)
        try:
            reading.done.result()
        except OSError as error:
            self._free.append(reading.place)
            raise CandidateFailed("load_error", f"{self._name}: weights cannot be read: {error}") from error
        self._running[number] = reading.place
        for tensor, view in zip(self._parts[number], self._views[number][reading.place], strict=True):
            tensor.held.data = view
        self._read_ahead()

    def _after(self, number: int) -> None:
        """Take a part's tensors away, and fill their place with what comes after the next."""
        if (place := self._running.pop(number, None)) is None:
            return  # it could not be read
        for tensor in self._parts[number]:
            tensor.held.data = torch.empty(0, dtype=tensor.stored.dtype)
        self._free.append(place)
        self._read_ahead()

    def _read_ahead(self) -> None:
        last = self._coming[-1].number if self._coming else self._last
        while self._free and last is not None:
            last = self._follows[last]
            self._coming.append(self._read(last))

    def _read(self, number: int) -> _Reading:
        place = self._free.pop()
        return _Reading(number, place, self._thread.submit(self._fill, number, place))

    def _fill(self, number: int, place: int) -> None:
        whole = memoryview(self._memory[place])
        for tensor in self._parts[number]:
            end = tensor.offset + tensor.stored.bytes
            read_into(self._file, whole[tensor.offset : end], tensor.stored.start)


def _tensors(model: Any, part: str, stored: Mapping[str, Stored]) -> list[_Tensor]:
    """Return a part's tensors, each emptied and with its offset in a place."""
    found: list[_Tensor] = []
    offset = 0
    for name, what in stored.items():
        if not name.startswith(f"{part}."):
            continue
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        held = _emptied(module, attribute, what)
        if held is None:
            raise CandidateFailed("load_error", f"`{name}` is not the tensor the model needs", hint="build it again")
        found.append(_Tensor(held, what, offset))
        offset += -(-what.bytes // ALIGNED_BYTES) * ALIGNED_BYTES
    return found


def _emptied(module: nn.Module, name: str, stored: Stored) -> torch.Tensor | None:
    """Put an empty tensor in a module's tensor's place and return it; None where the file's does not fit it."""
    old = getattr(module, name, None)
    if not isinstance(old, torch.Tensor) or (tuple(old.shape), old.dtype) != (stored.shape, stored.dtype):
        return None
    empty = torch.empty(0, dtype=stored.dtype)
    if isinstance(old, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=False)
    setattr(module, name, empty)
    return empty


def _end(tensors: Sequence[_Tensor]) -> int:
    last = tensors[-1]
    return -(-(last.offset + last.stored.bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def _view(place: torch.Tensor, tensor: _Tensor) -> torch.Tensor:
    part = place[tensor.offset : tensor.offset + tensor.stored.bytes]
    return part.view(tensor.stored.dtype).view(tensor.stored.shape)


# ---------------------------------------------------------------- beside an accelerator


class _Dispatched:
    """Parts that accelerate's hooks bring to the accelerator, and take away, one module at a time."""

    def tensors(self) -> list[torch.Tensor]:
        """Return nothing: a module's weights are there only while it runs."""
        return []

    def close(self) -> None:
        """Nothing is kept beside the model."""


def _dispatched(model: Any, parts: Sequence[str], weights: Path, device: torch.device) -> Offloaded:
    try:
        from accelerate import dispatch_model
    except ImportError as error:
        raise CandidateFailed(
            "engine_missing", "offloading beside an accelerator needs accelerate", hint="pip install accelerate"
        ) from error
    waits = {
        part: "disk" if any(t.is_meta for t in model.get_submodule(part).parameters()) else "cpu" for part in parts
    }
    index = {
        name: {"safetensors_file": str(weights), "weight_name": name, "dtype": str(stored.dtype).removeprefix("torch.")}
        for name, stored in stored_in(weights).items()
        if waits.get(_part_of(name, waits) or "") == "disk"
    }
    dispatch_model(
        model, dict(_device_map(model, "", waits, device)), main_device=device, offload_index=index or None,
        offload_buffers=True,  # packed weights are buffers
    )  # fmt: skip
    return _Dispatched()


def _device_map(
    module: nn.Module, name: str, waits: Mapping[str, str], device: torch.device
) -> Iterator[tuple[str, Any]]:
    """Yield (module or tensor, where it is) so that every tensor is covered once: a part where it waits, the rest on `device`."""
    if name in waits:
        yield name, waits[name]
    elif name and not any(part.startswith(f"{name}.") for part in waits):
        yield name, device
    else:
        dot = f"{name}." if name else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield from ((f"{dot}{tensor}", device) for tensor, _ in own)
        for child, inner in module.named_children():
            yield from _device_map(inner, f"{dot}{child}", waits, device)
