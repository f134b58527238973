"""What every engine is: named typed tensors in, named typed tensors out, nothing converted on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engines.errors import BackendUnavailableError, EngineError, ShapeError

if TYPE_CHECKING:  # a command line that lists the backends must not pay for torch
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: name in the graph.
        dtype: exact element type.
        shape: one entry an axis: an int is a fixed size, a str the symbol of a free one (``"batch"``, ``"2*height"``).
            Equal symbols are equal sizes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        """Spell the spec as messages show it: ``sample: float32 [batch, 4, height, width]``."""
        return f"{self.name}: {_dtype_name(self.dtype)} {_shape_name(self.shape)}"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here.

    Attributes:
        usable: whether it can run on at least one device.
        version: version of the library behind it; None if that is not installed.
        reason: why it, or one of its devices, is not usable; empty if nothing is missing.
        fix: what to do about ``reason``; empty if nothing is missing.
        devices: usable device types, e.g. ``("cpu", "cuda")``.
        cross_builds: whether it can build engines here for a device that this machine does not have.
    """

    usable: bool
    version: str | None
    reason: str
    fix: str
    devices: tuple[str, ...]
    cross_builds: bool = False

    @property
    def builds(self) -> bool:
        """Whether it can build engines here."""
        return self.usable or self.cross_builds


class Engine(Protocol):
    """Something that runs one graph on one device.

    Attributes:
        name: name of the graph, used in messages.
        backend: name of the backend, as the user writes it.
        device: where inputs must lie and outputs will lie.
        inputs: specs of all inputs; every call needs all of them.
        outputs: specs of all outputs.
    """

    name: str
    backend: str
    device: torch.device
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the graph once.

        Args:
            inputs: one tensor for every input spec, on ``device``, of exactly the spec's dtype. Any strides.
            outputs: names of the outputs wanted; None means all. Backends skip the work that only other outputs need,
                if they can.

        Returns:
            The wanted outputs in the wanted order, on ``device``. The caller owns them: no later call changes them.

        Raises:
            ShapeError: if the inputs do not fit; the message lists every problem.
            EngineError: if an unknown output is wanted, the engine is closed, or the backend fails.
        """
        ...

    def close(self) -> None:
        """Free the graph and its memory; the engine cannot be called afterwards."""
        ...


def as_device(device: str | torch.device) -> torch.device:
    """Make a device comparable with ``tensor.device``: ``"cuda"`` becomes ``cuda:0``."""
    import torch

    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def require_device(backend: str, availability: Availability, device_type: str) -> None:
    """Refuse a device that a backend cannot use.

    Raises:
        BackendUnavailableError: if the backend cannot use the device; with the reason and the fix of ``availability``.
    """
    if device_type in availability.devices:
        return
    usable = ", ".join(availability.devices) or "none"
    detail = ". ".join(part for part in (availability.reason, availability.fix) if part)
    raise BackendUnavailableError(
        f"backend {backend!r} cannot use device {device_type!r} here (usable devices: {usable}). {detail}".strip()
    )


def check_inputs(engine: Engine, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Compare inputs with an engine's specs.

    Returns:
        The tensors themselves, in the order of ``engine.inputs``.

    Raises:
        ShapeError: if the inputs do not fit; lists every missing or unexpected name, wrong dtype, device, rank or
            size, and every symbol that would have two sizes.
    """
    known = {spec.name for spec in engine.inputs}
    problems = [f"missing: {spec}" for spec in engine.inputs if spec.name not in inputs]
    problems += [f"unexpected: {name}" for name in inputs if name not in known]
    sizes: dict[str, tuple[int, str]] = {}
    for spec in engine.inputs:
        if spec.name in inputs:
            problems += _misfits(spec, inputs[spec.name], engine.device, sizes)
    if problems:
        raise ShapeError(
            f"the inputs do not fit graph {engine.name!r} ({engine.backend}): {'; '.join(problems)}. "
            "An engine casts, moves and reshapes nothing: convert the tensors before the call."
        )
    return tuple(inputs[spec.name] for spec in engine.inputs)


def select_outputs(engine: Engine, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the outputs to compute: all for None, else ``names`` without repetitions.

    Raises:
        EngineError: if a name is unknown or the list is empty.
    """
    known = tuple(spec.name for spec in engine.outputs)
    if names is None:
        return known
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise EngineError(
            f"graph {engine.name!r} cannot return {', '.join(unknown) or 'an empty list of outputs'}; "
            f"choose from: {', '.join(known)}."
        )
    return tuple(dict.fromkeys(names))


def _misfits(spec: TensorSpec, tensor: Tensor, device: torch.device, sizes: dict[str, tuple[int, str]]) -> list[str]:
    """Return problems of one input; ``sizes`` (symbol -> size, first input that had it) is filled on the way."""
    problems = []
    if tensor.dtype != spec.dtype:
        problems.append(f"{spec.name}: dtype {_dtype_name(tensor.dtype)}, expected {_dtype_name(spec.dtype)}")
    if tensor.device != device:
        problems.append(f"{spec.name}: on {tensor.device}, expected {device}")
    shape = tuple(tensor.shape)
    if len(shape) != len(spec.shape) or any(
        isinstance(want, int) and want != got for want, got in zip(spec.shape, shape, strict=True)
    ):
        return [*problems, f"{spec.name}: shape {_shape_name(shape)}, expected {_shape_name(spec.shape)}"]
    for symbol, size in zip(spec.shape, shape, strict=True):
        if isinstance(symbol, str):
            first, owner = sizes.setdefault(symbol, (size, spec.name))
            if first != size:
                problems.append(f"{spec.name}: {symbol} is {size}, but {first} in {owner}")
    return problems


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_name(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
