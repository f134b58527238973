"""Published recipes of ControlNet training, by method and condition.

The numbers are those of the released scripts of InnerControl (arXiv 2507.02321) and ControlNet++ (arXiv 2404.07987).
Where the sources say nothing or contradict each other, `Preset.reconstructed` names the value and `Preset.notes` the
reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from icexport.errors import UsageError
from training.tasks.losses import LossConfig


@dataclass(frozen=True)
class Preset:
    """One recipe.

    Attributes:
        loss: losses of the recipe.
        training: settings of `training.loop.config.TrainerConfig`. Batch size and accumulation are for each of eight
            GPUs.
        start: Hub id of the ControlNet that it starts from.
        reward_model: what the publication rewards with: a Hub id (depth) or the file's name (hed, lineart); None: no
            network, or no reward.
        reconstructed: names of those of ``loss``'s fields and ``start`` that are reconstructed.
        notes: where the values come from, and why some are reconstructed.
    """

    loss: LossConfig
    training: dict[str, Any]
    start: str | None
    reward_model: str | None
    reconstructed: tuple[str, ...]
    notes: str


_STARTS = {
    "canny": "lllyasviel/control_v11p_sd15_canny",
    "hed": "lllyasviel/control_v11p_sd15_softedge",
    "lineart": "lllyasviel/control_v11p_sd15_lineart",
    "depth": "lllyasviel/control_v11f1p_sd15_depth",
}

_REWARD_MODELS = {
    "canny": None,
    "hed": "ControlNetHED.pth",
    "lineart": "model.pth of informative-drawings",
    "depth": "Intel/dpt-hybrid-midas",
}

_TRAINING: dict[str, Any] = {
    "steps": 10_000,
    "batch_size": 8,
    "accumulation": 4,
    "learning_rate": 1e-5,
    "warmup": 5,
    "schedule": "constant",
    "weight_decay": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "max_grad_norm": 1.0,
    "optimizer": "adamw",
    "ema_decay": 0.9999,
}

_TRAINING_NOTE = (
    "Trained on eight GPUs, 8 pictures x 4 micro steps on each: 256 an update; raise the accumulation on fewer. The "
    "scripts' warm-up of 10 is counted by Accelerate's scheduler and comes to about 5 updates. Their precision: fp16."
)
_ALPHA_NOTE = "The script's alpha of 1.0 is refused by the released code, which demands 0.5."
_MEAN_NOTE = "The alignment joins the last commit's normaliser with an earlier commit's mean."
_START_NOTE = "The released model may come from another starting ControlNet than the script's."
_HED_NOTE = "The published reward has no gradient (legacy_hed reproduces that)."

_SCRIPT_NOTES = {
    "canny": (
        "InnerControl was not released for canny: the reward is ControlNet++'s, the alignment that of the other "
        "conditions."
    ),
    "hed": (
        f"{_ALPHA_NOTE} The reward range is the script's; the released model's name says 400. {_HED_NOTE} {_MEAN_NOTE}"
    ),
    "lineart": f"{_ALPHA_NOTE} {_START_NOTE} {_MEAN_NOTE}",
    "depth": _START_NOTE,
}

_INNERCONTROL = {
    "canny": (LossConfig(1.0, (0, 200), 1.0), ("alpha", "reward_range", "beta", "alignment_range", "start")),
    "hed": (LossConfig(1.0, (0, 200), 1.0), ("alpha", "reward_range")),
    "lineart": (LossConfig(1.0, (0, 200), 1.0), ("alpha", "start")),
    "depth": (LossConfig(0.5, (0, 400), 1.0), ("start",)),
}

_CONTROLNET_PP_ALPHA = {"canny": 1.0, "hed": 1.0, "lineart": 0.5, "depth": 1.0}


def _innercontrol(condition: str) -> Preset:
    loss, reconstructed = _INNERCONTROL[condition]
    notes = f"InnerControl, train/aligned_*.sh. {_SCRIPT_NOTES[condition]} {_TRAINING_NOTE}"
    return Preset(loss, dict(_TRAINING), _STARTS[condition], _REWARD_MODELS[condition], reconstructed, notes)


def _controlnet_pp(condition: str) -> Preset:
    loss = LossConfig(alpha=_CONTROLNET_PP_ALPHA[condition], reward_range=(0, 200))
    notes = f"ControlNet++, train/reward_*.sh. {_TRAINING_NOTE}"
    training = dict(_TRAINING)
    if condition == "canny":
        training["warmup"] = 0
    reconstructed: tuple[str, ...] = ()
    if condition == "hed":
        notes += f" {_HED_NOTE}"
    if condition == "depth":
        reconstructed = ("start",)
        notes += " A copy of the released model names a start after 5,000 more steps of plain training."
    return Preset(loss, training, _STARTS[condition], _REWARD_MODELS[condition], reconstructed, notes)


def _finetune(condition: str) -> Preset:
    notes = (
        f"The diffusion loss alone, with InnerControl's budget: what the other recipes have to beat. {_TRAINING_NOTE}"
    )
    return replace(_innercontrol(condition), loss=LossConfig(), reward_model=None, reconstructed=(), notes=notes)


FINETUNE = "finetune"
"""The preset that is there for every condition."""

_PRESETS = {"innercontrol": _innercontrol, "controlnet++": _controlnet_pp, FINETUNE: _finetune}


def names() -> tuple[str, ...]:
    """Return the names that `preset` takes."""
    return tuple(_PRESETS)


def preset(name: str, cond: str) -> Preset:
    """Return the recipe of a method for a condition.

    Args:
        name: one of `names`.
        cond: name of the condition.

    Raises:
        UsageError: the name is unknown, or nothing is published of it for this condition.
    """
    if name not in _PRESETS:
        raise UsageError(f"There is no preset {name!r}. Known presets: {', '.join(_PRESETS)}.")
    if cond in _STARTS:
        return _PRESETS[name](cond)
    if name != FINETUNE:
        raise UsageError(
            f"Nothing is published of {name} for condition {cond!r}; there is for {', '.join(_STARTS)}. Choose "
            f"--preset {FINETUNE}, and set loss.alpha and loss.beta."
        )
    return Preset(LossConfig(), dict(_TRAINING), None, None, (), f"The diffusion loss alone. {_TRAINING_NOTE}")
