from __future__ import annotations

import json

import pytest

from icexport.errors import UsageError
from icexport.graphs.profile import Profile, SizeRange


def profile(batch: str = "1:1:4", height: str = "512", width: str = "512") -> Profile:
    return Profile(SizeRange.parse(batch), SizeRange.parse(height), SizeRange.parse(width))


@pytest.mark.parametrize(
    ("text", "expected"), [("512", (512, 512, 512)), (64, (64, 64, 64)), ("512:640:768", (512, 640, 768))]
)
def test_sizes_are_read(text: str | int, expected: tuple[int, int, int]) -> None:
    assert SizeRange.parse(text) == SizeRange(*expected)
    assert SizeRange.parse(str(SizeRange.parse(text))) == SizeRange(*expected)


@pytest.mark.parametrize("text", ["", "512:768", "a", "1:2:3:4", "-1", "1.5", "512 : 512 : 512", -4])
def test_other_forms_are_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match=r"give one number \(512\) or min:opt:max"):
        SizeRange.parse(text)


@pytest.mark.parametrize("text", ["0", "768:512:640", "512:768:640", "0:1:2"])
def test_orders_are_checked(text: str) -> None:
    with pytest.raises(UsageError, match="1 <= min <= opt <= max"):
        SizeRange.parse(text)


def test_membership() -> None:
    sizes = SizeRange(2, 3, 4)

    assert [value for value in range(6) if value in sizes] == [2, 3, 4]
    assert "3" not in sizes
    assert not sizes.fixed
    assert SizeRange(3, 3, 3).fixed


def test_json_round_trip() -> None:
    found = profile("1:2:4", "512:640:768", "512")

    assert Profile.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_sizes_that_do_not_halve_are_refused_with_the_nearest() -> None:
    profile(height="512:640:768").check_multiple(64)
    with pytest.raises(UsageError, match=r"--height 520: .*multiples of 64 .*512 or 576"):
        profile(height="520").check_multiple(64)
    with pytest.raises(UsageError, match=r"--width 700: .*640 or 704"):
        profile(width="512:700:768").check_multiple(64)
    with pytest.raises(UsageError, match=r"--width 30: .*Nearest: 64\."):
        profile(width="30").check_multiple(64)


def test_guidance_doubles_the_batch() -> None:
    symbols = profile("2:3:4", "512:640:768", "512").symbols(64)

    assert symbols == {
        "samples": SizeRange(2, 6, 8),
        "pictures": SizeRange(2, 3, 4),
        "prompts": SizeRange(1, 3, 4),
        "rows": SizeRange(8, 10, 12),
        "columns": SizeRange(8, 8, 8),
    }


def test_corners_of_fixed_sizes() -> None:
    assert list(profile("1").corners()) == [(1, 512, 512)]
    assert list(profile("1:1:4").corners()) == [(1, 512, 512), (4, 512, 512)]


def test_corners_of_ranges_are_not_all_square() -> None:
    found = list(profile("1:2:4", "512:512:768", "512:512:768").corners())

    assert found == [(1, 512, 512), (2, 512, 512), (4, 768, 768), (2, 512, 768)]
