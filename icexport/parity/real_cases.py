"""Real activations: what every graph is given when the model draws a picture, as cases for range and parity.

Seeded noise is not what a model sees: real latents become smooth, real taps and residuals fit together. Of a picture's
steps the first and the last are kept, the noisiest and the clearest: on the reference model, values of other prompts
and steps are up to 2.6 times as large as theirs and those of one seeded case together, and 2.5 times as large as with
all steps and three seeded cases (``python -m benchmarks.activation_range``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw
from torch import Tensor

from icexport import conditions
from icexport.conditions.base import Condition
from icexport.errors import ConditionError
from icexport.graphs.graph import Graph
from icexport.graphs.profile import Profile
from icexport.host.pixels import to_pixels
from icexport.models.sizes import residual_channels, vae_factor
from icexport.models.source import ModelSource
from icexport.parity.cases import Case, counted
from icexport.parity.compare import COSINE_ERROR, Expected
from icexport.progress import Progress, silent

logger = logging.getLogger(__name__)

DRAWING = "draw a picture for its activations"
"""Name of the step, as progress is told it."""
PROMPT = "a red house under a blue sky"
STEPS = 4
GUIDANCE = 5.0


def real_cases(
    graphs: Sequence[Graph],
    source: ModelSource,
    profile: Profile,
    progress: Progress = silent,
    *,
    steps: int = STEPS,
    prompt: str = PROMPT,
    every_step: bool = False,
) -> dict[str, list[Expected]]:
    """Draw one picture with PyTorch in float32, with guidance, and keep what every graph is given and computes.

    Args:
        graphs: all graphs of the model, in float32.
        source: the model.
        profile: sizes of a bundle; pictures have its usual size, and there are as few as it allows.
        progress: told after every step.
        steps: number of denoising steps.
        prompt: what to draw.
        every_step: whether to keep all steps, and not the first and the last one only.

    Returns:
        For every graph the cases ``real step 1`` and that of the last step; for the text encoder ``real empty prompt``
        and ``real prompt``, for the decoder ``real picture``. Their errors are allowed to reach ``COSINE_ERROR``.
        Equal models and profiles give equal cases.
    """
    progress(DRAWING)
    engines = {graph.name: graph.engine() for graph in graphs}
    found: dict[str, list[Expected]] = {name: [] for name in engines}

    def run(graph: str, name: str, inputs: dict[str, Tensor], *, kept: bool = True) -> dict[str, Tensor]:
        engine = engines[graph]
        outputs = engine(inputs)
        if kept:
            names = counted((*engine.inputs, *engine.outputs))
            found[graph].append(Expected(Case(name, inputs), outputs, dict.fromkeys(outputs, COSINE_ERROR), names))
        return outputs

    pictures = profile.batch.min
    height, width = profile.height.opt, profile.width.opt
    embeds = [
        run("text_encoder", name, {"input_ids": ids, "clip_skip": torch.tensor(0)})["prompt_embeds"]
        for name, ids in _tokens(source, prompt).items()
    ]
    guided = 2 * pictures
    prompt_embeds = torch.cat([one.expand(pictures, -1, -1) for one in embeds])
    condition = conditions.of_model(source.condition, source.names.model)
    control_map = control_picture(condition, height, width).expand(guided, -1, -1, -1)
    scale = torch.ones(guided, len(residual_channels(source.full_config("controlnet"))))
    scheduler = _scheduler(source, steps)
    vae = source.full_config("vae")
    cells = (vae["latent_channels"], height // vae_factor(vae), width // vae_factor(vae))
    latents = torch.randn((pictures, *cells), generator=torch.Generator().manual_seed(0))
    for number, time in enumerate(scheduler.timesteps, start=1):
        step, kept = f"real step {number}", every_step or number in (1, steps)
        times = time.float().expand(guided)
        inputs = {"sample": torch.cat([latents] * 2), "timestep": times, "prompt_embeds": prompt_embeds}
        control = {"control_map": control_map, "residual_scale": scale}
        residuals = run("controlnet", step, inputs | control, kept=kept)
        output = run("unet", step, inputs | residuals, kept=kept)
        if kept and "probe" in engines:
            wanted = [input_.name for input_ in engines["probe"].inputs]
            run("probe", step, {name: output[name][-pictures:] for name in wanted})
        free, prompted = output["noise_pred"].chunk(2)
        latents = scheduler.step(free + GUIDANCE * (prompted - free), time, latents).prev_sample
        progress(DRAWING, number, steps)
    run("vae_decoder", "real picture", {"latents": latents / vae["scaling_factor"]})
    return found


def control_picture(condition: Condition, height: int, width: int) -> Tensor:
    """Return a control map ``[1,3,height,width]`` in [0,1]: what the condition sees in a drawn house.

    Where the condition's extractor lacks its weights, the drawing itself is the map, and the log says so.
    """
    drawing = Image.new("RGB", (width, height), (150, 190, 240))
    draw = ImageDraw.Draw(drawing)
    draw.rectangle((0, 0.75 * height, width, height), fill=(70, 130, 60))
    draw.rectangle((0.25 * width, 0.45 * height, 0.75 * width, 0.85 * height), fill=(180, 50, 40))
    draw.polygon(
        [(0.2 * width, 0.45 * height), (0.5 * width, 0.15 * height), (0.8 * width, 0.45 * height)], fill=(60, 40, 40)
    )
    draw.ellipse((0.42 * width, 0.55 * height, 0.58 * width, 0.7 * height), fill=(250, 230, 140))
    try:
        return to_pixels(condition.extract(drawing))
    except ConditionError as error:
        logger.warning("Real activations are taken with a plain drawing as the control map: %s", error)
        return to_pixels(drawing)


def _tokens(source: ModelSource, prompt: str) -> dict[str, Tensor]:
    """Return ``input_ids [1,S]`` of no prompt and of ``prompt``, by the names of their cases."""
    tokenizer = source.tokenizer()
    length = source.full_config("text_encoder")["max_position_embeddings"]
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    texts = {"real empty prompt": "", "real prompt": prompt}
    return {name: tokenizer(text, **options).input_ids for name, text in texts.items()}


def _scheduler(source: ModelSource, steps: int) -> DDIMScheduler:
    """Make DDIM on the model's own noise schedule: no random numbers, and a good guess in few steps."""
    config = source.config("scheduler")
    known = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "prediction_type")
    noise = {name: config[name] for name in known if name in config}
    scheduler = DDIMScheduler(**noise, clip_sample=False, timestep_spacing="trailing")  # the first step is pure noise
    scheduler.set_timesteps(steps)
    return scheduler
