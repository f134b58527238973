"""Which sizes a bundle is made for: pictures per call, height and width, each a fixed number or a range."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from icexport.errors import UsageError

_RANGE = re.compile(r"(\d+)(?::(\d+):(\d+))?")


@dataclass(frozen=True)
class SizeRange:
    """``min <= opt <= max``; a fixed size has all three equal. ``opt`` is what engines are tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(f"A size range needs 1 <= min <= opt <= max, got {self}.")

    @classmethod
    def parse(cls, text: str | int | SizeRange) -> SizeRange:
        """Read ``512`` or ``512:512:768``.

        Raises:
            UsageError: the text has neither form.
        """
        if isinstance(text, SizeRange):
            return text
        match = _RANGE.fullmatch(str(text))
        if not match:
            raise UsageError(f"Cannot read the size {text!r}: give one number (512) or min:opt:max (512:512:768).")
        low, opt, high = (int(g) if g else int(match[1]) for g in match.groups())
        return cls(low, opt, high)

    @property
    def fixed(self) -> bool:
        """Whether only one size is allowed."""
        return self.min == self.max

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.min <= value <= self.max

    def __str__(self) -> str:
        return str(self.opt) if self.fixed else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class Profile:
    """Sizes of a bundle: ``batch`` in pictures (guidance doubles it inside), ``height`` and ``width`` in pixels."""

    batch: SizeRange
    height: SizeRange
    width: SizeRange

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, int]]) -> Profile:
        """The inverse of ``to_json``."""
        return cls(**{axis: SizeRange(**data[axis]) for axis in ("batch", "height", "width")})

    def to_json(self) -> dict[str, dict[str, int]]:
        """A plain dictionary for the manifest."""
        return asdict(self)

    def check_multiple(self, multiple: int) -> None:
        """Refuse sizes that the UNet cannot halve evenly at every level.

        Raises:
            UsageError: a height or width is not a multiple of ``multiple`` pixels; the nearest ones are named.
        """
        for axis in ("height", "width"):
            for value in sorted({*asdict(getattr(self, axis)).values()}):
                if value % multiple:
                    near = sorted({max(multiple, value // multiple * multiple), -(-value // multiple) * multiple})
                    raise UsageError(
                        f"--{axis} {value}: this model needs multiples of {multiple} pixels. Nearest: "
                        f"{' or '.join(map(str, near))}."
                    )

    def symbols(self, multiple: int) -> dict[str, SizeRange]:
        """Range of each symbol that the graphs' shapes use: ``batch``, ``prompts``, ``h`` and ``w``."""
        return {
            "batch": SizeRange(self.batch.min, 2 * self.batch.opt, 2 * self.batch.max),
            "prompts": SizeRange(1, max(self.batch.opt, 1), self.batch.max),
            "h": SizeRange(*(v // multiple for v in asdict(self.height).values())),
            "w": SizeRange(*(v // multiple for v in asdict(self.width).values())),
        }

    def corners(self) -> Iterator[tuple[int, int, int]]:
        """(pictures, height, width) at the smallest, usual and largest size, and a flat one if sizes may vary."""
        batch, height, width = self.batch, self.height, self.width
        points = [(getattr(batch, p), getattr(height, p), getattr(width, p)) for p in ("min", "opt", "max")]
        yield from dict.fromkeys([*points, (batch.opt, height.min, width.max)])
