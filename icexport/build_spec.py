"""What to build: options checked, defaults filled in, and the key that makes two builds equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from engines import registry
from icexport.bundle.manifest import digest
from icexport.errors import CheckpointError, UsageError
from icexport.export import DTYPE_NAMES, OPSETS
from icexport.export.profile import Profile, SizeRange
from icexport.models.loading import ModelSource
from icexport.models.sizes import latent_multiple, residual_channels, size_multiple, vae_factor

if TYPE_CHECKING:
    from icexport.models.graphs import Graph

_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class BuildSpec:
    """What to build, all defaults filled in. Two equal specs of equal sources give equal bundles."""

    source: ModelSource
    backends: tuple[str, ...]
    dtype: str
    opset: int
    profile: Profile
    verify: bool

    def key(self) -> str:
        """Hash of the sources' contents, the options and the tools' versions."""
        files = self.source.files
        parts = {"files": files, "condition": self.source.condition, "backends": sorted(self.backends)}
        options = {"dtype": self.dtype, "opset": self.opset, "profile": self.profile.to_json(), "verify": self.verify}
        return digest({**parts, **options, "versions": versions()})


def plan(
    cond: str,
    model: str,
    controlnet: str | None,
    probe: str | None,
    backend: str | Sequence[str],
    dtype: str,
    height: int | str | None,
    width: int | str | None,
    batch_size: int | str,
    opset: int,
    verify: bool,
) -> BuildSpec:
    """Check the options and fill in the defaults; the arguments are ``build``'s.

    This much must be quick, since it comes before the look at the cache; ``check_fit`` does the rest.
    """
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype {dtype}: choose {' or '.join(DTYPE_NAMES)}.")
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset}: choose one of {', '.join(map(str, OPSETS))}.")
    names = [backend] if isinstance(backend, str) else list(backend)
    for name in names:
        if name != "auto" and name not in registry.BACKENDS:
            raise UsageError(f"--backend {name}: choose auto or {', '.join(registry.BACKENDS)}.")
    backends = tuple(dict.fromkeys(registry.resolve(name) for name in names))
    try:
        source = ModelSource.find(cond, model, controlnet, probe)
    except UsageError:
        _check_condition(cond)  # if it is the name that is wrong, say so
        raise
    unet, vae = source.config("unet"), source.config("vae")
    native = unet.get("sample_size")
    own = str(native * vae_factor(vae)) if isinstance(native, int) else None
    height, width = (own if size is None else size for size in (height, width))
    if height is None or width is None:
        raise UsageError(
            f"{source.base} does not say its size (unet sample_size is {native}): give --height and --width."
        )
    profile = Profile(SizeRange.parse(batch_size), SizeRange.parse(height), SizeRange.parse(width))
    profile.check_multiple(size_multiple(unet, vae))
    return BuildSpec(source, backends, dtype, opset, profile, verify)


def versions() -> dict[str, str]:
    """Versions of icexport and of the libraries that shape a bundle."""
    from icexport import __version__

    return {"icexport": __version__, **{name: metadata.version(name) for name in _TOOLS}}


def _check_condition(name: str) -> None:
    from icexport import conditions

    conditions.get(name)


_UNSUPPORTED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def check_fit(source: ModelSource) -> None:
    """Refuse an unknown condition and parts that do not belong together, before the long work.

    Raises:
        ConditionError: there is no such condition.
        CheckpointError: listing everything that does not fit.
    """
    _check_condition(source.condition)
    configs = {part: source.full_config(part) for part in ("unet", "controlnet", "vae", "text_encoder")}
    unet, controlnet, vae, text = configs.values()
    problems = [
        f"{part} has {name} = {configs[part][name]!r}, which Stable Diffusion 1 and 2 do not"
        for part in ("unet", "controlnet")
        for name in (*_UNSUPPORTED, "global_pool_conditions")
        if configs[part].get(name)
    ]
    if text.get("use_attention_mask"):
        problems.append("text_encoder has use_attention_mask = true, which the exported graph cannot take")
    for what, one, other in (
        ("latent channels of unet and vae", unet["in_channels"], vae["latent_channels"]),
        ("latent channels of controlnet and vae", controlnet["in_channels"], vae["latent_channels"]),
        ("text width of unet and text_encoder", unet["cross_attention_dim"], text["hidden_size"]),
        ("text width of controlnet and text_encoder", controlnet["cross_attention_dim"], text["hidden_size"]),
        ("residuals that unet takes and controlnet gives", residual_channels(unet), residual_channels(controlnet)),
    ):
        if one != other:
            problems.append(f"{what} differ: {one} and {other}")
    if source.probe_folder is not None:
        problems += _probe_problems(source, unet)
    if problems:
        raise CheckpointError(f"These models do not work together: {'; '.join(problems)}.")


def _probe_problems(source: ModelSource, unet_config: dict[str, Any]) -> list[str]:
    import torch
    from diffusers import UNet2DConditionModel

    from icexport.models.probe import ProbeConfig
    from icexport.models.taps import Taps

    config = ProbeConfig.from_dict(source.config("probe"))
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config)
    except (TypeError, ValueError, KeyError) as error:
        return [f"unet/config.json describes no UNet ({error})"]
    pairs: list[tuple[str, object, object]] = [
        ("condition of probe and build", config.condition or source.condition, source.condition),
        ("taps of probe and unet", config.dims, Taps(unet, config.tap_kind).dims),
    ]
    if config.time_embed_dim is not None:
        width = unet.time_embedding.linear_2.out_features
        pairs.append(("time embedding of probe and unet", config.time_embed_dim, width))
    return [f"{what} differ: {one} and {other}" for what, one, other in pairs if one != other]


def graphs(spec: BuildSpec, dtype: str) -> Iterator[Graph]:
    """The graphs of a model in ``dtype``, one component in memory at a time: a caller keeps none of them."""
    from icexport.export.precision import torch_dtype
    from icexport.models import graphs as g

    source, precision = spec.source, torch_dtype(dtype)
    unet_config, vae_config = source.config("unet"), source.config("vae")
    length = source.full_config("text_encoder")["max_position_embeddings"]
    yield g.text_encoder_graph(source.text_encoder(precision), precision)
    yield g.controlnet_graph(source.controlnet_model(precision), length, vae_factor(vae_config), precision)
    probe = source.probe_model(precision)
    unet = source.unet(precision)
    yield g.unet_graph(unet, length, probe.config if probe else None, precision)
    if probe:
        yield g.probe_graph(probe, unet, precision)
    del unet, probe
    yield g.vae_decoder_graph(source.vae(precision), latent_multiple(unet_config), precision)
