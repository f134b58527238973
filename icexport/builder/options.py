"""What to build: options checked, defaults filled in, and the key that makes two builds equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from engines import registry
from engines.errors import BackendUnavailableError
from icexport.backends.plans import PLAN_BACKENDS, PlanOptions
from icexport.errors import UsageError
from icexport.export import BF16_OPSET, DEFAULT_OPSET, DTYPE_NAMES, OPSETS
from icexport.graphs.profile import Profile, SizeRange
from icexport.host.files import digest
from icexport.host.versions import versions
from icexport.models.loading import ModelSource
from icexport.models.sizes import size_multiple, vae_factor

DEFAULT_BATCH = "1:1:4"
_BF16_CAPABILITY = 80
DEFAULT_PLANS = PlanOptions()


@dataclass(frozen=True)
class BuildSpec:
    """What to build, all defaults filled in. Two equal specs of equal sources give equal bundles."""

    source: ModelSource
    backends: tuple[str, ...]
    dtype: str
    opset: int
    profile: Profile
    verify: bool
    plans: PlanOptions = DEFAULT_PLANS

    def key(self) -> str:
        """Hash of the sources' contents, the options and the tools' versions."""
        files = self.source.files
        parts = {"files": files, "condition": self.source.condition, "backends": sorted(self.backends)}
        options = {"dtype": self.dtype, "opset": self.opset, "profile": self.profile.to_json(), "verify": self.verify}
        plans = (
            {"plans": asdict(self.plans), "backend_versions": backend_versions(self.backends)}
            if self.plan_backends
            else {}
        )
        return digest({**parts, **options, **plans, "versions": versions()})

    @property
    def plan_backends(self) -> tuple[str, ...]:
        """Those of the backends that run plans, and not the ONNX file or the weights themselves."""
        return tuple(name for name in self.backends if name in PLAN_BACKENDS)


def plan(
    cond: str,
    model: str,
    controlnet: str | None,
    probe: str | None,
    backend: str | Sequence[str],
    dtype: str,
    height: int | str | None,
    width: int | str | None,
    batch_size: int | str | None,
    opset: int | None,
    verify: bool,
    shapes: Sequence[str] = (),
    plans: PlanOptions = DEFAULT_PLANS,
) -> BuildSpec:
    """Check the options and fill in the defaults; the arguments are ``build``'s.

    This much must be quick, since it comes before the look at the cache; ``check_fit`` does the rest.
    """
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype {dtype}: choose {' or '.join(DTYPE_NAMES)}.")
    if opset is None:
        opset = BF16_OPSET if dtype == "bf16" else DEFAULT_OPSET
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset}: choose one of {', '.join(map(str, OPSETS))}.")
    if dtype == "bf16" and opset < BF16_OPSET:
        raise UsageError(f"--opset {opset}: bfloat16 convolutions need {BF16_OPSET} or later.")
    backends = _backends([backend] if isinstance(backend, str) else backend, dtype)
    _check_plans(plans, backends, dtype)
    try:
        source = ModelSource.find(cond, model, controlnet, probe)
    except UsageError:
        _check_condition(cond)  # if it is the name that is wrong, say so
        raise
    unet, vae = source.config("unet"), source.config("vae")
    if batch_size is None:  # plans are fastest with fixed sizes; for the others a free batch costs nothing
        batch_size = 1 if set(backends) & set(PLAN_BACKENDS) else DEFAULT_BATCH
    profile = _profile(source, SizeRange.parse(batch_size), height, width, shapes)
    profile.check_multiple(size_multiple(unet, vae))
    if "tensorrt" in backends and plans.plugins and source.probe_folder is not None:
        _check_plugins(profile, opset)
    return BuildSpec(source, backends, dtype, opset, profile, verify, plans)


def _backends(names: Sequence[str], dtype: str) -> tuple[str, ...]:
    """The backends to build for; each of them can build here, be it for another machine's device."""
    found: list[str] = []
    for name in names:
        if name != "auto" and name not in registry.BACKENDS:
            raise UsageError(f"--backend {name}: choose auto or {', '.join(registry.BACKENDS)}.")
        if name == "auto":
            name = registry.resolve("auto")
        elif not (availability := registry.check(name)).builds:
            raise BackendUnavailableError(
                f"backend {name!r} cannot build here: {availability.reason}. {availability.fix}."
            )
        found.append(name)
    if dtype == "bf16" and "onnxruntime" in found:
        raise UsageError(
            "--dtype bf16: ONNX Runtime has no bfloat16 kernels for most operators. Choose --backend torch, tensorrt "
            "or tensorrt-rtx, or --dtype fp16."
        )
    return tuple(dict.fromkeys(found))


def _check_plans(plans: PlanOptions, backends: Sequence[str], dtype: str) -> None:
    """Refuse before the long work what no builder of plans could do."""
    from engines.tensorrt.api import RTX_TARGETS

    if plans.targets and "tensorrt-rtx" not in backends:
        raise UsageError("--target-sm is for --backend tensorrt-rtx; others build for this machine's device only.")
    if unknown := sorted(set(plans.targets) - set(RTX_TARGETS)):
        raise UsageError(
            f"--target-sm {' '.join(map(str, unknown))}: TensorRT-RTX builds for {', '.join(map(str, RTX_TARGETS))}. "
            "For other GPUs, such as Hopper (90), use --backend tensorrt on such a GPU."
        )
    if dtype == "bf16" and (old := [target for target in plans.targets if target < _BF16_CAPABILITY]):
        raise UsageError(f"--target-sm {' '.join(map(str, old))}: has no bfloat16. Leave it out, or choose fp16.")
    if plans.optimization_level not in range(6):
        raise UsageError(f"--optimization-level {plans.optimization_level}: choose 0 to 5.")
    if plans.workspace_bytes is not None and plans.workspace_bytes < 1:
        raise UsageError("--workspace must be at least 1 MiB.")


def _check_plugins(profile: Profile, opset: int) -> None:
    """Refuse at once what would only fail after the export of all graphs."""
    if find_spec("triton") is None:
        raise BackendUnavailableError(
            "The probe's plugins are compiled by Triton, which is not installed. Run: pip install triton, or choose "
            "--no-plugins."
        )
    if opset < DEFAULT_OPSET:
        raise UsageError(f"--opset {opset}: plugins need {DEFAULT_OPSET} or later. Choose that, or --no-plugins.")
    if not (profile.height.fixed and profile.width.fixed):
        raise UsageError(
            "The probe's plugins need one height and one width. Build one bundle a size, or choose --no-plugins."
        )


def _profile(
    source: ModelSource, batch: SizeRange, height: int | str | None, width: int | str | None, shapes: Sequence[str]
) -> Profile:
    if shapes:
        if height is not None or width is not None:
            raise UsageError("--shape lists the sizes one by one: leave --height and --width out.")
        return Profile.of_shapes(batch, shapes)
    native = source.config("unet").get("sample_size")
    own = str(native * vae_factor(source.config("vae"))) if isinstance(native, int) else None
    height, width = (own if size is None else size for size in (height, width))
    if height is None or width is None:
        raise UsageError(
            f"{source.base} does not say its size (unet sample_size is {native}): give --height and --width."
        )
    return Profile(batch, SizeRange.parse(height), SizeRange.parse(width))


def backend_versions(backends: Sequence[str]) -> dict[str, str]:
    """Versions of the libraries behind those backends that are not in ``versions``."""
    return {name: registry.check(name).version or "" for name in backends if name in PLAN_BACKENDS}


def _check_condition(name: str) -> None:
    from icexport import conditions

    conditions.get(name)
