"""What to build: options checked, defaults filled in, and the key that makes two builds equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engines.errors import BackendUnavailableError
from icexport.backends import table
from icexport.backends.base import Backend, PlanOptions
from icexport.errors import UsageError
from icexport.export import DEFAULT_OPSET, OPSETS
from icexport.graphs.profile import Profile, SizeRange
from icexport.host.files import digest
from icexport.host.versions import versions
from icexport.models.base_model import REFERENCE
from icexport.models.precision import precision
from icexport.models.sizes import size_multiple, vae_factor
from icexport.models.source import ModelSource

DEFAULT_BATCH = "1:1:4"
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class BuildOptions:
    """What a user may ask for, as ``icexport.build`` describes it; None: the default, which may depend on the rest."""

    model: str = REFERENCE
    controlnet: str | None = None
    probe: str | None = None
    vae: str | None = None
    variant: str | None = None
    model_config: str | None = None
    backends: Sequence[str] = ("auto",)
    dtype: str = "fp32"
    height: int | str | None = None
    width: int | str | None = None
    batch_size: int | str | None = None
    shapes: Sequence[str] = ()
    text_length: int | str | None = None
    opset: int | None = None
    verify: bool = True
    plans: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True)
class BuildSpec:
    """What to build, all defaults filled in. Two equal specs of equal sources give equal bundles."""

    source: ModelSource
    backends: tuple[str, ...]
    dtype: str
    opset: int
    profile: Profile
    verify: bool
    plans: PlanOptions = field(default_factory=PlanOptions)

    @classmethod
    def of(cls, cond: str, options: BuildOptions) -> BuildSpec:
        """Check the options and fill in the defaults.

        This much must be quick, since it comes before the look at the cache: no torch, and no weights.

        Raises:
            UsageError: an option cannot be used.
            BackendUnavailableError: a named backend cannot build here.
            CheckpointError: a model is not there.
        """
        dtype = precision(options.dtype)
        opset = dtype.opset if options.opset is None else options.opset
        if opset not in OPSETS:
            raise UsageError(f"--opset {opset}: choose one of {', '.join(map(str, OPSETS))}.")
        if opset < dtype.oldest_opset:
            raise UsageError(f"--opset {opset}: {dtype.torch_name} convolutions need {dtype.oldest_opset} or later.")
        backends = _backends(options.backends)
        if options.plans.targets and not any(backend.takes_targets for backend in backends):
            able = ", ".join(name for name, backend in table.BACKENDS.items() if backend.takes_targets)
            raise UsageError(f"--target-sm is for --backend {able}; others build for this machine's device only.")
        try:
            source = ModelSource.find(
                cond,
                options.model,
                options.controlnet,
                options.probe,
                vae=options.vae,
                variant=options.variant,
                model_config=options.model_config,
            )
        except UsageError:
            _check_condition(cond)  # if it is the name that is wrong, say so
            raise
        # Without a probe there is nothing to have plugins for.
        plans = options.plans if source.probe is not None else replace(options.plans, plugins=False)
        for backend in backends:
            backend.check_options(plans, options.dtype)
        profile = _profile(source, options, fixed_batch=any(backend.prefers_fixed_batch for backend in backends))
        profile.check_multiple(size_multiple(source.config("unet"), source.config("vae")))
        if plans.plugins and any(backend.takes_plugins for backend in backends):
            _check_plugins(profile, opset)
        names = tuple(backend.name for backend in backends)
        return cls(source, names, options.dtype, opset, profile, options.verify, options.plans)

    @property
    def plugins(self) -> bool:
        """Whether an engine is to hold the probe's kernels."""
        takes = any(table.get(name).takes_plugins for name in self.backends)
        return takes and self.plans.plugins and self.source.probe is not None

    def key(self) -> str:
        """Return the hash of the sources' contents, the options and the tools' versions."""
        source = {"family": self.source.family.name, "condition": self.source.condition, "files": self.source.files}
        options = {"dtype": self.dtype, "opset": self.opset, "profile": self.profile.to_json(), "verify": self.verify}
        backends = {name: table.get(name).identity(self.plans) for name in sorted(self.backends)}
        return digest({**source, **options, "backends": backends, "versions": versions()})


def _backends(names: Sequence[str]) -> list[Backend]:
    """Return the backends to build for; each of them can build here, be it for another machine's device."""
    found: dict[str, Backend] = {}
    for name in names:
        if name != "auto" and name not in table.BACKENDS:
            raise UsageError(f"--backend {name}: choose auto or {', '.join(table.BACKENDS)}.")
        backend = table.get(table.resolve("auto") if name == "auto" else name)
        if not (availability := backend.check()).builds:
            raise BackendUnavailableError(
                f"backend {name!r} cannot build here: {availability.reason}. {availability.fix}."
            )
        found[backend.name] = backend
    return list(found.values())


def _check_plugins(profile: Profile, opset: int) -> None:
    """Refuse at once what would only fail after the export of all graphs."""
    if opset < DEFAULT_OPSET:
        raise UsageError(f"--opset {opset}: plugins need {DEFAULT_OPSET} or later. Choose that, or --no-plugins.")
    if not (profile.height.fixed and profile.width.fixed):
        raise UsageError(
            "The probe's plugins need one height and one width. Build one bundle a size, or choose --no-plugins."
        )


def _profile(source: ModelSource, options: BuildOptions, *, fixed_batch: bool) -> Profile:
    """Return the sizes to build for; plans are fastest with fixed ones, for the others a free batch costs nothing."""
    profile = _sizes(source, options, fixed_batch=fixed_batch)
    if options.text_length is None:
        return profile
    text = SizeRange.parse(options.text_length)
    own = source.config("text_encoder").get("max_position_embeddings", _CLIP_TOKENS)
    if own not in text:
        raise UsageError(
            f"--text-length {text}: the model's own text encoder makes {own} tokens, which have to be in the range."
        )
    return profile if text.fixed else replace(profile, text=text)


def _sizes(source: ModelSource, options: BuildOptions, *, fixed_batch: bool) -> Profile:
    size = options.batch_size
    batch = SizeRange.parse((1 if fixed_batch else DEFAULT_BATCH) if size is None else size)
    height, width = options.height, options.width
    if options.shapes:
        if height is not None or width is not None:
            raise UsageError("--shape lists the sizes one by one: leave --height and --width out.")
        return Profile.of_shapes(batch, options.shapes)
    native = source.config("unet").get("sample_size")
    own = str(native * vae_factor(source.config("vae"))) if isinstance(native, int) else None
    height, width = (own if side is None else side for side in (height, width))
    if height is None or width is None:
        raise UsageError(
            f"{source.names.model} does not say its size (unet sample_size is {native}): give --height and --width."
        )
    return Profile(batch, SizeRange.parse(height), SizeRange.parse(width))


def _check_condition(name: str) -> None:
    from icexport import conditions  # with torch, which everything else here does without

    conditions.get(name)
