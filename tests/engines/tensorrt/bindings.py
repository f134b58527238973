"""A double of TensorRT made from its real Python bindings.

The bindings know every class, method, argument, property and enum of their version. The double has exactly these: what
the version does not have is an AttributeError, an argument that it does not take a TypeError, as in the real library.
Answers come from the test, or are plain values of the type that the bindings document.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WHEELS = "ICEXPORT_TENSORRT_WHEELS"
ROOT = Path(__file__).parents[3]
_LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
_OPENING, _CLOSING = "([{<", ")]}>"
_PLAIN: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "bytes": bytes,
    "float": (int, float),
    "list": list,
    "str": str,
    "tuple": tuple,
}
_PLAIN_VALUES = {"None": None, "object": None, "int": 0, "bool": True, "float": 0.0, "str": "", "tuple": ()}
_SPELLINGS = {  # of pybind11, which changed between the versions
    "typing.SupportsInt": "int",
    "typing.SupportsFloat": "float",
    "typing_extensions.Buffer": "buffer",
    "collections.abc.Buffer": "buffer",
    "collections.abc.Sequence": "list",
    "collections.abc.Iterable": "list",
    "Iterable": "list",
    "List": "list",
}


def environment(version: str, folder: Path) -> dict[str, str]:
    """Environment of a process in which ``import tensorrt_bindings`` gets the bindings of ``version``."""
    wheels = Path(os.environ.get(WHEELS) or ROOT / ".cache/tensorrt-bindings")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(wheels.glob(f"tensorrt_cu12_bindings-{version}-{tag}-*.whl"))
    compiler = shutil.which("cc")
    if not found:
        pytest.skip(f"no {tag} wheel of tensorrt-cu12-bindings {version} in {wheels}; run: make bindings")
    if compiler is None:
        pytest.skip("there is no C compiler, cc; install one, then run: make bindings")
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(folder)
    for library in _LIBRARIES:
        name = f"{library}.so.{version.partition('.')[0]}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(Path(__file__).with_name("stub.c"))], check=True)
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": paths}


@dataclass(frozen=True)
class Parameter:
    """``name: kind = default`` of a signature."""

    name: str
    kind: str
    default: str | None


@dataclass(frozen=True)
class Signature:
    """One overload, as pybind11 documents it; without ``self``."""

    parameters: tuple[Parameter, ...]
    returns: str

    def __str__(self) -> str:
        return f"({', '.join(f'{p.name}: {p.kind}' for p in self.parameters)})"

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Parameter, Any]] | None:
        """Which parameter gets which value; None if the call does not fit."""
        named = dict(kwargs)
        bound = list(zip(self.parameters, args))  # noqa: B905  parameters that are left over may be named
        for parameter in self.parameters[len(args) :]:
            if parameter.name in named and not re.fullmatch(r"arg\d+", parameter.name):
                bound.append((parameter, named.pop(parameter.name)))
            elif parameter.default is None:
                return None
        return None if named or len(args) > len(self.parameters) else bound


class Library:
    """The double of one version.

    Args:
        real: The bindings: ``tensorrt_bindings`` or ``tensorrt_rtx``.
        answers: ``"Class.member"`` -> what a method returns or a property holds; or a function that makes this from
            the object and the arguments. A member without an answer gives a plain value of its documented type, and a
            property what was last set.

    Attributes:
        module: To be used in place of the real module.
        calls: ``("Class.member", arguments)`` of every method called and property set, in order.
    """

    def __init__(self, real: types.ModuleType, answers: Mapping[str, Any] | None = None) -> None:
        self.real = real
        self.answers = dict(answers or {})
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.module = types.ModuleType(real.__name__)
        self._doubles: dict[type, type] = {}
        for name, value in vars(real).items():
            setattr(self.module, name, self._stand_in(value))

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of ``"Class.member"``."""
        return [args for called, args in self.calls if called == name]

    def make(self, kind: str, *content: bytes, **properties: Any) -> Any:
        """A new object of a class, as the library would return it; host memory has a content."""
        double = self._doubles[getattr(self.real, kind)]
        made = double.__new__(double, *content)
        for name, value in properties.items():
            if not hasattr(inspect.getattr_static(double.real_class, name, None), "fget"):
                raise AttributeError(f"{kind} has no property {name!r}, but the test gives it one")
            vars(made)[name] = value
        return made

    def call(self, owner: Any, name: str, doc: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Check a call against the documented signatures, and answer it."""
        signatures = list(_signatures(doc, skip=0 if isinstance(owner, types.ModuleType) else 1))
        for signature in signatures:
            bound = signature.bind(args, kwargs)
            if bound is not None and all(self._fits(p.kind, value, p.default) for p, value in bound):
                values = tuple(value for _, value in bound)
                self.calls.append((name, values))
                return self.answer(owner, name, signature.returns, values)
        known = "; ".join(str(signature) for signature in signatures)
        raise TypeError(f"{name}(): incompatible arguments {args} {dict(kwargs)}; {self.real.__name__} has: {known}")

    def answer(self, owner: Any, name: str, kind: str, args: tuple[Any, ...]) -> Any:
        """What the test has prepared, if the real library could return it, else a plain value."""
        keys = [name]
        if isinstance(owner, Double):
            keys = [f"{base.__name__}.{name.partition('.')[2]}" for base in owner.real_class.__mro__]
        for key in keys:
            if key in self.answers:
                prepared = self.answers[key]
                value = prepared(owner, *args) if inspect.isfunction(prepared) else prepared
                if value is not None and not self._fits(kind, value, None):
                    raise AssertionError(f"{name} returns {kind}, the test wants it to return {value!r}")
                return value
        return self._plain(kind)

    def _stand_in(self, value: Any) -> Any:
        if inspect.isclass(value) and type(value).__name__ == "pybind11_type":
            return self._double(value) if self._needs_library(value) else value
        if inspect.isbuiltin(value):
            doc = value.__doc__ or ""
            return lambda *args, **kwargs: self.call(self.module, value.__name__, doc, args, kwargs)
        return value

    @staticmethod
    def _needs_library(kind: type) -> bool:
        """Enums, interfaces that Python implements, and values like Dims work without the library."""
        if hasattr(kind, "__members__"):
            return False
        init = inspect.getattr_static(kind, "__init__")
        return type(init).__name__ == "wrapper_descriptor" or "logger: " in (init.__doc__ or "").splitlines()[0]

    def _double(self, real: type) -> type:
        if real not in self._doubles:
            bases = [self._double(base) for base in real.__bases__ if type(base).__name__ == "pybind11_type"]
            bases = [base for base in bases if issubclass(base, Double)] or [Double]
            if real.__name__ == "IHostMemory":  # the real one has the buffer protocol
                bases.append(bytes)
            members = {"real_class": real, "library": self}
            self._doubles[real] = DoubleType(real.__name__, tuple(bases), members)
        return self._doubles[real]

    def _resolve(self, kind: str) -> Any:
        """The real class that an annotation names: in Python, or in C++ if pybind11 did not know its name yet."""
        if "::" in kind:
            name = kind.rpartition("::")[2]
            found = getattr(self.real, name, None) or getattr(self.real, name.removeprefix("I"), None)
        else:
            found = self.real
            for part in re.sub(r"^(\w+_bindings\.)?tensorrt(_rtx)?\.", "", kind).split("."):
                found = getattr(found, part, None)
        if found is None:
            raise NotImplementedError(f"the double does not know the type {kind!r}: teach it")
        return found

    def _fits(self, kind: str, value: Any, default: str | None) -> bool:
        kind, inner = _spelled(kind)
        if kind == "object" or (value is None and (default == "None" or kind == "None")):
            return True
        if kind == "int":
            return hasattr(value, "__index__")
        if kind == "buffer":
            return isinstance(value, (bytes, bytearray, memoryview)) or hasattr(value, "seek")
        if kind == "list" and inner:
            return isinstance(value, Iterable) and all(self._fits(inner, item, None) for item in value)
        if kind in _PLAIN:
            return isinstance(value, _PLAIN[kind])
        real = self._resolve(kind)
        if real.__name__ == "Dims" and isinstance(value, (tuple, list)):
            return all(isinstance(size, int) for size in value)
        return isinstance(value, (real, self._doubles.get(real, real)))

    def _plain(self, kind: str) -> Any:
        kind, _ = _spelled(kind)
        if kind == "list":
            return []
        if kind in _PLAIN_VALUES:
            return _PLAIN_VALUES[kind]
        real = self._resolve(kind)
        if hasattr(real, "__members__"):
            return next(iter(real.__members__.values()))
        return self.make(real.__name__) if real in self._doubles else real()


class DoubleType(type):
    """Gives a double's class what the real class has: nested enums, constants."""

    def __getattr__(cls, name: str) -> Any:
        if name == "real_class":
            raise AttributeError(name)
        return getattr(cls.real_class, name)


class Double(metaclass=DoubleType):
    """An object of the library; see `Library`."""

    real_class: type
    library: Library

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name, doc = f"{self.real_class.__name__}.__init__", self.real_class.__init__.__doc__ or ""
        self.library.call(self, name, doc, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        member = inspect.getattr_static(self.real_class, name, None)
        path = f"{self.real_class.__name__}.{name}"
        if isinstance(member, property):
            for signature in _signatures(inspect.getdoc(member.fget) or "", skip=1):
                return self.library.answer(self, path, signature.returns, ())
        if member is None or isinstance(member, property):
            raise AttributeError(f"{self.library.real.__name__}.{self.real_class.__name__} has no attribute {name!r}")
        return lambda *args, **kwargs: self.library.call(self, path, member.__doc__ or "", args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        member = inspect.getattr_static(self.real_class, name, None)
        if not isinstance(member, property) or member.fset is None:
            raise AttributeError(f"{self.library.real.__name__}.{self.real_class.__name__}.{name} cannot be set")
        self.library.call(self, f"{self.real_class.__name__}.{name}", member.fset.__doc__ or "", (value,), {})
        vars(self)[name] = value


def install(flavour: str, answers: Mapping[str, Any]) -> Library:
    """Put a new double of the bindings that can be imported in place of the library of a flavour."""
    module = flavour.replace("-", "_")
    library = Library(_real("tensorrt_bindings" if module == "tensorrt" else module), answers)
    sys.modules[module] = library.module
    return library


@functools.cache
def _real(module: str) -> types.ModuleType:
    return importlib.import_module(module)  # once: later the double has this name


def _signatures(doc: str, skip: int) -> Iterator[Signature]:
    """Overloads in a docstring of pybind11; ``skip`` parameters, ``self``, are left out."""
    lines = doc.strip().splitlines()
    overloaded = any(line == "Overloaded function." for line in lines[:2])
    for line in lines if overloaded else lines[:1]:
        match = re.fullmatch(r"\d+\. \w+\((.*)\) -> (.+)" if overloaded else r"\w*\((.*)\) -> (.+)", line)
        if match:
            yield Signature(tuple(map(_parameter, _split(match[1])))[skip:], match[2])


def _parameter(text: str) -> Parameter:
    name, _, rest = text.partition(": ")
    kind, has_default, default = rest.partition(" = ")
    return Parameter(name, kind, default if has_default else None)


def _split(text: str) -> list[str]:
    """Split at the commas that are not within brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _spelled(kind: str) -> tuple[str, str]:
    """Name of a type in one spelling, and what a list of it holds."""
    match = re.fullmatch(r"([\w.]+)\[(.*)\]", kind)
    outer, inner = (match[1], match[2]) if match else (kind, "")
    return _SPELLINGS.get(outer, outer), inner
