"""``python -m icexport``."""

from __future__ import annotations

from icexport.cli.main import main

main()
