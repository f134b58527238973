"""``python -m training`` is ``icexport train``, under a name that launchers of many processes can start.

For example ``accelerate launch -m training controlnet --cond canny --data DIR``, or ``torchrun --nproc-per-node 2 -m
training probe --cond canny --data DIR``; several nodes with what these take for that.
"""

from __future__ import annotations

import sys

from icexport.cli.main import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]], prog_name="icexport")
