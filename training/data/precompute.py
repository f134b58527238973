"""Write a folder of cut pictures with ready control maps.

    python -m training.data.precompute SOURCE OUTPUT --cond hed

Worth it for extractors that cost more than reading a picture. Train on OUTPUT with ``control_column`` set to the
condition's name. A stopped run goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from PIL import Image

from icexport import conditions
from icexport.conditions import Condition
from icexport.errors import IcexportError, UsageError
from training.data.config import DataConfig
from training.data.records import Records, records

logger = logging.getLogger(__name__)


def precompute(data: Records, output: Path, condition: Condition, size: tuple[int, int]) -> int:
    """Add what is missing in ``output``: pictures, control maps and ``metadata.jsonl``.

    Args:
        data: what to read.
        output: the folder, which is made.
        condition: extracts the control maps.
        size: (height, width) that ``data`` cuts its pictures to.

    Returns:
        The number of pictures in ``output``.

    Raises:
        UsageError: ``output`` holds another condition or size.
    """
    (output / condition.name).mkdir(parents=True, exist_ok=True)
    metadata, column = output / "metadata.jsonl", f"{condition.name}_file_name"
    lines = metadata.read_text("utf-8").splitlines(keepends=True) if metadata.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # an interruption may leave half a line
    done = [json.loads(line) for line in lines]
    if done and (column not in done[0] or Image.open(output / done[0]["file_name"]).size != size[::-1]):
        raise UsageError(f"{output} holds control maps of another kind or size; name another folder, or empty it.")
    metadata.write_text("".join(lines), "utf-8")
    names = {row["file_name"] for row in done}
    with metadata.open("a", encoding="utf-8") as file:
        for number, sample in enumerate(data.samples()):
            name = f"{number:08d}.png"
            if name in names or (record := data.read(sample)) is None:
                continue
            control_name = f"{condition.name}/{name}"
            record.image.save(output / name)
            condition.extract(record.image).save(output / control_name)
            row = {"file_name": name, "text": record.caption, column: control_name}
            file.write(json.dumps(row) + "\n")
            file.flush()
            names.add(name)
    return len(names)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="picture folder, data set or shards")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--cond", required=True, choices=conditions.names(), help="what the control maps show")
    parser.add_argument("--split", default="train", help="split of the data set")
    parser.add_argument("--image-column", default="image", help="column of the pictures")
    parser.add_argument("--caption-column", default="text", help="column of the captions")
    parser.add_argument(
        "--resolution", type=int, nargs="+", default=[512], help="side, or height and width, in pixels"
    )
    parser.add_argument("--fit", default="crop", choices=("crop", "stretch"), help="how pictures are made to fit")
    options = vars(parser.parse_args())
    output, condition, resolution = options.pop("output"), options.pop("cond"), options.pop("resolution")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = DataConfig(**options, resolution=resolution[0] if len(resolution) == 1 else tuple(resolution))
        data = records(config)
        count = precompute(data, output, conditions.get(condition), config.size)
    except IcexportError as error:
        parser.exit(2, f"Error: {error}\n")
    logger.info("%s: %d pictures with control maps; %s", output, count, data.counts.summary())


if __name__ == "__main__":
    main()
