"""``icexport build`` and ``icexport export``: from a checkpoint to a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from icexport.backends import table
from icexport.cli.console import Steps, emit, show
from icexport.cli.options import CONDITIONS, Backends, Dtype, EngineStore, Json, Preflight
from icexport.cli.summary import engine_rows, graph_rows, parity_rows
from icexport.errors import UsageError

_Cond = Annotated[
    list[str],
    typer.Option("--cond", metavar="NAME", help=f"{CONDITIONS}. Repeatable: a bundle for each."),
]
_Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="reference|DIR|FILE|HUB_ID",
        help="Base model: a diffusers folder, a single file, or the embedded one.",
    ),
]
_ControlNet = Annotated[
    str | None,
    typer.Option(
        "--controlnet",
        metavar="DIR|FILE|HUB_ID",
        help="ControlNet.  [default: controlnet-<cond> in the model's folder]",
    ),
]
_Probe = Annotated[
    str | None,
    typer.Option(
        "--probe", metavar="DIR|HUB_ID|none", help="Probe, or none.  [default: probe-<cond> in the model's folder]"
    ),
]
_Vae = Annotated[
    str | None,
    typer.Option("--vae", metavar="DIR|FILE|HUB_ID", help="Autoencoder in place of the model's own."),
]
_Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Variant of the weights, as fp16, for the parts that have it.  [default: none]",
    ),
]
_ModelConfig = Annotated[
    str | None,
    typer.Option(
        "--model-config",
        metavar="DIR|HUB_ID",
        help="Configs and tokenizer of a single-file model.  [default: Stable Diffusion 1's]",
    ),
]
_Height = Annotated[
    str | None,
    typer.Option("--height", metavar="PX", help="Pixels, or min:opt:max.  [default: the model's own size]"),
]
_Width = Annotated[str | None, typer.Option("--width", metavar="PX", help="As --height.")]
_BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size", metavar="N", help="Pictures in one call, or min:opt:max.  [default: 1:1:4; 1 with TensorRT]"
    ),
]
_Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="HxW", help="A size, instead of --height and --width. Repeatable: all of them."),
]
_TextLength = Annotated[
    str | None,
    typer.Option(
        "--text-length",
        metavar="MIN:OPT:MAX",
        help="Tokens of prompt_embeds that a pipeline may be given.  [default: what the model's text encoder makes]",
    ),
]
_Targets = Annotated[
    list[int] | None,
    typer.Option(
        "--target-sm",
        metavar="SM...",
        help="Compute capabilities that TensorRT-RTX builds for: 86 89 120.  [default: a portable plan]",
    ),
]
_Level = Annotated[
    int, typer.Option("--optimization-level", min=0, max=5, help="Of TensorRT: higher builds longer, may run faster.")
]
_Workspace = Annotated[
    int | None,
    typer.Option("--workspace", min=1, metavar="MIB", help="Most scratch memory of a TensorRT layer, in MiB."),
]
_Opset = Annotated[
    int | None, typer.Option("--opset", help="ONNX opset, 18 to 23.  [default: 21; 22 for bf16]", show_default=False)
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="DIR",
        file_okay=False,
        help="The bundle's folder; for several conditions, the folder of their bundles.  [default: builds/<cond>]",
    ),
]
_ExportOutput = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", file_okay=False, help="As build's.  [default: exports/<cond>]"),
]
_Force = Annotated[bool, typer.Option("--force", help="Build even if an identical bundle is there.")]


def build(
    cond: _Cond,
    model: _Model = "reference",
    controlnet: _ControlNet = None,
    probe: _Probe = None,
    vae: _Vae = None,
    variant: _Variant = None,
    model_config: _ModelConfig = None,
    backend: Backends = None,
    dtype: Dtype = "fp32",
    height: _Height = None,
    width: _Width = None,
    batch_size: _BatchSize = None,
    shape: _Shapes = None,
    text_length: _TextLength = None,
    opset: _Opset = None,
    target_sm: _Targets = None,
    optimization_level: _Level = 3,
    workspace: _Workspace = None,
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Leave the probe's Triton kernels out of TensorRT's plans.")
    ] = False,
    engine_store: EngineStore = None,
    output: _Output = None,
    force: _Force = False,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Read every file before an identical bundle is kept.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the parity gate.")] = False,
    preflight: Preflight = True,
    as_json: Json = False,
) -> None:
    """Turn a model into a checked bundle.

    Exports every part to ONNX, compares every engine with PyTorch, and stores all of it. An identical bundle is kept.
    """
    parts = {"model": model, "controlnet": controlnet, "probe": probe, "vae": vae}
    parts |= {"variant": variant, "model_config": model_config, "text_length": text_length}
    options = {**parts, "backend": backend or "auto", "dtype": dtype}
    sizes = {"height": height, "width": width, "batch_size": batch_size, "shapes": shape or (), "opset": opset}
    plans = {
        "target_sm": target_sm or (),
        "optimization_level": optimization_level,
        "workspace_mb": workspace,
        "plugins": not no_plugins,
        "engine_store": engine_store,
    }
    _build(
        cond,
        output,
        Path("builds"),
        as_json,
        **options,
        **sizes,
        **plans,
        force=force,
        check_hashes=check_hashes,
        verify=not no_verify,
        preflight=preflight,
    )


def export(
    cond: _Cond,
    model: _Model = "reference",
    controlnet: _ControlNet = None,
    probe: _Probe = None,
    vae: _Vae = None,
    variant: _Variant = None,
    model_config: _ModelConfig = None,
    dtype: Dtype = "fp32",
    height: _Height = None,
    width: _Width = None,
    batch_size: _BatchSize = None,
    shape: _Shapes = None,
    text_length: _TextLength = None,
    opset: _Opset = None,
    output: _ExportOutput = None,
    force: _Force = False,
    preflight: Preflight = True,
    as_json: Json = False,
) -> None:
    """Only write the ONNX graphs.

    The first half of build, without its parity gate.
    """
    runs = table.get("onnxruntime").dtypes or ()  # it runs the graphs as they are, but not in every precision
    backend = "onnxruntime" if dtype in runs else ()
    parts = {"model": model, "controlnet": controlnet, "probe": probe, "vae": vae}
    parts |= {"variant": variant, "model_config": model_config, "text_length": text_length}
    options = {**parts, "backend": backend, "dtype": dtype}
    sizes = {"height": height, "width": width, "batch_size": batch_size, "shapes": shape or (), "opset": opset}
    _build(cond, output, Path("exports"), as_json, **options, **sizes, force=force, verify=False, preflight=preflight)


def _build(conds: list[str], output: Path | None, root: Path, as_json: bool, **options: Any) -> None:
    from icexport.builder import build as builder

    conds = list(dict.fromkeys(conds))
    if len(conds) > 1:
        _check_several(conds, options)
    documents = []
    for cond in conds:
        folder = (output or root) / cond if len(conds) > 1 or output is None else output
        started = time.perf_counter()
        with Steps() as steps:
            bundle = builder.build(cond, output=folder, progress=steps, **options)
        document = {
            "bundle": str(bundle.path),
            "condition": cond,
            "key": bundle.manifest.key,
            "cached": steps.begun == 0,
            "seconds": round(time.perf_counter() - started, 2),
            "graphs": graph_rows(bundle),
            "engines": engine_rows(bundle),
            "parity": parity_rows(bundle.manifest.parity),
        }
        documents.append(document)
        if not as_json:
            _print(document)
    if as_json:
        emit({"bundles": documents})


def _check_several(conds: list[str], options: dict[str, Any]) -> None:
    """Refuse what would fail after the first of several bundles, or make all of them from one condition's weights."""
    from icexport import conditions

    for cond in conds:
        conditions.get(cond)
    own = [f"--{part}" for part in ("controlnet", "probe") if options[part] not in (None, "none")]
    if own:
        raise UsageError(f"{' and '.join(own)} belongs to one condition, got {len(conds)}: build them one by one.")


def _print(document: dict[str, Any]) -> None:
    cached = document["cached"]
    state = "up to date, nothing was built" if cached else f"built in {document['seconds']:.1f} s"
    lines = {"bundle": document["bundle"], "state": state, "key": document["key"]}
    graphs = [{"graph": row["graph"], "MB": row["MB"]} for row in document["graphs"]]
    shown = ("backend", "graph", "device", "precision", "MB", "seconds")
    plans = [
        {**{name: row[name] for name in shown}, "key": row["key"][:12]}
        for row in document["engines"]
        if row["seconds"] is not None
    ]
    engines = {"plans": plans} if plans else {}
    show({**lines, "graphs": graphs, **engines, "parity": document["parity"] or "not checked"})
