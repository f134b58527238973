"""``icexport convert``: official and foreign checkpoints into safetensors folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from icexport.cli.console import Steps, emit, show
from icexport.cli.options import Json


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            exists=True,
            help="An align model (.pt); a base model, ControlNet or autoencoder: a folder or a single file.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write.", show_default=False)],
    cond: Annotated[
        str | None, typer.Option("--cond", metavar="NAME", help="Condition; an align model does not record its own.")
    ] = None,
    taps: Annotated[
        Literal["attn", "conv"] | None,
        typer.Option("--taps", help="Taps of an align model.  [default: as its layers tell]"),
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", metavar="NAME", help="Variant of a folder's weights, as fp16.")
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(
            "--model-config",
            metavar="DIR|HUB_ID",
            help="Configs that a single file lacks.  [default: Stable Diffusion 1's]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into safetensors.

    An align model becomes a probe, anything else a folder of diffusers. No code inside of a file is run.
    """
    with Steps() as steps:
        steps.expect(1)
        steps(f"convert {source.name}")
        from icexport import conditions
        from icexport.models.convert import convert as run

        if cond is not None:
            conditions.get(cond)
        report = run(source, output, cond=cond, taps=taps, variant=variant, model_config=model_config, force=force)
    document = {
        "kind": report.kind,
        "output": str(report.output),
        "source_sha256": report.source_sha256,
        "tensors": report.tensors,
        "parameters": report.values,
        "warnings": list(report.warnings),
        "config": dict(report.config),
    }
    (emit if as_json else show)(document)
