from __future__ import annotations

import json
import math

from icexport.bundle.records import parity_from_json, parity_json
from icexport.gates.parity_gate import _result
from icexport.parity.compare import OutputParity


def test_results_are_json_without_infinity() -> None:
    good = _result(OutputParity(0.9999999999, 1.23456e-7, 1e-4, "1x64x64 t=1", True))
    bad = _result(OutputParity(-1.0, math.inf, 1e-4, "2x64x64", False))

    assert (good.passed, good.cosine, good.relative_error, good.worst_case) == (True, 1.0, 1.235e-07, "1x64x64 t=1")
    assert (bad.passed, bad.relative_error, bad.finite) == (False, None, False)
    results = {"torch": {"unet": {"y": good, "z": bad}}}
    assert parity_from_json(json.loads(json.dumps(parity_json(results), allow_nan=False))) == results
