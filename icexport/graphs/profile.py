"""Which sizes a bundle is made for: pictures per call, height and width, each a fixed number or a range."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from icexport.errors import UsageError

_RANGE = re.compile(r"(\d+)(?::(\d+):(\d+))?")
_SHAPE = re.compile(r"(\d+)x(\d+)")


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
    """Sizes of a bundle.

    Attributes:
        batch: number of pictures in one call; guidance doubles it inside.
        height: height in pixels.
        width: width in pixels.
        shapes: (height, width) of every allowed picture, inside the two ranges; empty: all of the ranges is allowed.
        text: number of tokens of ``prompt_embeds``; None: what the model's text encoder makes.
    """

    batch: SizeRange
    height: SizeRange
    width: SizeRange
    shapes: tuple[tuple[int, int], ...] = ()
    text: SizeRange | None = None

    @classmethod
    def of_shapes(cls, batch: SizeRange, texts: Sequence[str]) -> Profile:
        """Read several sizes such as ``512x512`` and ``768x512`` (height x width); the first is the usual one.

        Raises:
            UsageError: a text has another form.
        """
        matches = [_SHAPE.fullmatch(text) for text in texts]
        wrong = [text for text, match in zip(texts, matches, strict=True) if not match]
        if wrong:
            raise UsageError(f"--shape {', '.join(wrong)}: give HEIGHTxWIDTH in pixels, for instance 512x768.")
        shapes = tuple(dict.fromkeys((int(m[1]), int(m[2])) for m in matches if m))
        height, width = (SizeRange(min(side), side[0], max(side)) for side in zip(*shapes, strict=True))
        return cls(batch, height, width, shapes if len(shapes) > 1 else ())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """Return the inverse of ``to_json``."""
        ranges = {axis: SizeRange(**data[axis]) for axis in ("batch", "height", "width")}
        text = SizeRange(**data["text"]) if data.get("text") else None
        return cls(**ranges, shapes=tuple((height, width) for height, width in data.get("shapes", ())), text=text)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary for the manifest."""
        found = {**asdict(self), "shapes": [list(shape) for shape in self.shapes]}
        if self.text is None:
            del found["text"]  # as in the manifests of bundles that know nothing of it
        return found

    def check_shape(self, height: int, width: int) -> None:
        """Refuse a size that is in the ranges, but not in the list of sizes.

        Raises:
            UsageError: the size is not in the list; the sizes that are allowed are named.
        """
        if self.shapes and (height, width) not in self.shapes:
            known = ", ".join(f"{h}x{w}" for h, w in self.shapes)
            raise UsageError(
                f"height {height}, width {width}: this bundle takes {known} (height x width). Choose one of them, or "
                f"build with --shape {height}x{width}, too."
            )

    def check_multiple(self, multiple: int) -> None:
        """Refuse sizes that the UNet cannot halve evenly at every level.

        Raises:
            UsageError: a height or width is not a multiple of ``multiple`` pixels; the nearest ones are named.
        """
        for index, axis in enumerate(("height", "width")):
            listed = {shape[index] for shape in self.shapes}
            for value in sorted({*asdict(getattr(self, axis)).values(), *listed}):
                if value % multiple:
                    near = sorted({max(multiple, value // multiple * multiple), -(-value // multiple) * multiple})
                    raise UsageError(
                        f"--{axis} {value}: this model needs multiples of {multiple} pixels. Nearest: "
                        f"{' or '.join(map(str, near))}."
                    )

    def symbols(self, multiple: int) -> dict[str, SizeRange]:
        """Return the range of each symbol in the graphs' shapes.

        ``samples`` are what UNet and ControlNet run on: guidance makes two of each picture. ``pictures`` are what the
        decoder and the probe run on, ``prompts`` what the text encoder does. ``rows`` and ``columns`` are height and
        width in steps of ``multiple`` pixels. ``tokens`` are there where prompts have no fixed length.
        """
        return {
            **({"tokens": self.text} if self.text else {}),
            "samples": SizeRange(self.batch.min, 2 * self.batch.opt, 2 * self.batch.max),
            "pictures": self.batch,
            "prompts": SizeRange(1, self.batch.opt, self.batch.max),
            "rows": SizeRange(*(v // multiple for v in asdict(self.height).values())),
            "columns": SizeRange(*(v // multiple for v in asdict(self.width).values())),
        }

    def corners(self) -> Iterator[tuple[int, int, int]]:
        """Yield (pictures, height, width) of each listed size, or of the smallest, usual, largest and a flat one."""
        batch, height, width = self.batch, self.height, self.width
        if self.shapes:
            yield from dict.fromkeys((n, *shape) for shape in self.shapes for n in (batch.min, batch.max))
            return
        points = [(getattr(batch, p), getattr(height, p), getattr(width, p)) for p in ("min", "opt", "max")]
        yield from dict.fromkeys([*points, (batch.opt, height.min, width.max)])
