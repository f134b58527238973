"""InnerControl's losses written a second time, plainly: one sample after the other, every tap at full size.

Written from a description of the method and not from the sources under test, of which it imports nothing: official
tensor names and order of operations, masked means as sums over a loop, extractors as their definitions. Slow, square
pictures only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
State = dict[str, Tensor]


def tapped_modules(unet: nn.Module, kind: str) -> list[nn.Module]:
    modules = []
    for block in unet.up_blocks:
        if kind == "conv":
            modules += [resnet.conv2 for resnet in block.resnets]
        elif hasattr(block, "attentions"):
            modules += [attention.transformer_blocks[0].attn1 for attention in block.attentions]
    return modules


def unet_with_taps(unet: nn.Module, kind: str, *args: Any, **residuals: Any) -> tuple[Tensor, list[Tensor]]:
    """The UNet's output, and its taps as [B,C,h,w]."""
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        for module in tapped_modules(unet, kind)
    ]
    predicted = unet(*args, **residuals).sample
    for hook in hooks:
        hook.remove()
    taps = []
    for output in outputs:
        if kind == "attn":
            side = math.isqrt(output.shape[1])
            output = output.permute(0, 2, 1).reshape(output.shape[0], -1, side, side)
        taps.append(output)
    return predicted, taps


def normed_conv(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    weight = state[f"{name}.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return F.group_norm(x, groups, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])


def aggregation_network(state: State, groups: int, taps: list[Tensor], embedding: Tensor, side: int) -> Tensor:
    """The official network: resize, concatenate, split again, bottlenecks, weighted sum, head with Tanh."""
    dims = [tap.shape[1] for tap in taps]
    resized = [F.interpolate(tap, (side, side), mode="bilinear", align_corners=False) for tap in taps]
    weights = torch.softmax(state["mixing_weights"], 0)
    total: Tensor | float = 0.0
    for index, x in enumerate(torch.cat(resized, 1).split(dims, 1)):
        prefix = f"bottleneck_layers.{index}"
        y = F.relu(normed_conv(state, f"{prefix}.conv1", x, groups))
        time = F.linear(embedding, state[f"{prefix}.emb_layers.weight"], state[f"{prefix}.emb_layers.bias"])
        y = y + F.relu(time)[:, :, None, None]
        y = F.relu(normed_conv(state, f"{prefix}.conv2", y, groups))
        y = normed_conv(state, f"{prefix}.conv3", y, groups)
        shortcut = x
        if f"{prefix}.shortcut.weight" in state:
            shortcut = normed_conv(state, f"{prefix}.shortcut", x, groups)
        total = total + weights[index] * F.relu(y + shortcut)
    for layer in (0, 2, 4):
        weight, bias = state[f"output_head.{layer}.weight"], state[f"output_head.{layer}.bias"]
        total = F.conv2d(total, weight, bias, padding=weight.shape[-1] // 2)
        total = F.silu(total) if layer < 4 else torch.tanh(total)
    return total


def normalised_reading(condition: str, reading: Tensor) -> Tensor:
    """N(H) of one sample [C,h,w]."""
    o = (reading + 1) / 2
    if condition == "depth":
        o = o.mean(0, keepdim=True)
        return o / max(o.max(), torch.tensor(EPS))
    if condition == "lineart":
        o = (o.mean(0, keepdim=True) + 1) / 2
        return 1 - (o - o.min()) / (o.max() - o.min() + 1e-8)
    return o


def alignment_target(condition: str, control: Tensor) -> Tensor | None:
    """c of one sample [3,H,W]; None where a blank map has none. For lineart, the control shows 1 - Line(image)."""
    mean = control.mean(0, keepdim=True)
    if condition == "depth":
        return None if mean.max() < EPS else mean / mean.max()
    if condition == "lineart":
        return None if mean.max() - mean.min() < EPS else 1 - mean
    return control


def masked_mean(values: list[Tensor], mask: list[bool]) -> Tensor:
    total, count = torch.zeros(()), 0
    for value, counts in zip(values, mask, strict=True):
        if counts:
            total, count = total + value, count + 1
    return total / (count + 1e-10)


def one_step_estimate(noisy: Tensor, output: Tensor, alpha_bar: float, prediction_type: str) -> Tensor:
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if prediction_type == "epsilon":
        return (noisy - noise * output) / signal
    return signal * noisy - noise * output


def canny(pixels: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient after a 5 x 5 blur of sigma 1, kept where it is a maximum across the edge."""
    window = torch.tensor([math.exp(-(i * i) / 2) for i in range(-2, 3)])
    blur = torch.outer(window, window) / window.sum() ** 2
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    channels = []
    for channel in pixels:
        smooth = F.conv2d(F.pad(channel[None, None], (2,) * 4, mode="replicate"), blur[None, None])
        padded = F.pad(smooth, (1,) * 4, mode="replicate")
        channels.append([F.conv2d(padded, kernel[None, None])[0, 0] for kernel in (sobel, sobel.T)])
    strongest = torch.stack([dx.abs() + dy.abs() for dx, dy in channels]).argmax(0)
    dx, dy = (torch.stack([pair[i] for pair in channels]).gather(0, strongest[None])[0] for i in (0, 1))
    magnitude = dx.abs() + dy.abs()
    values, xs, ys = (tensor.detach().tolist() for tensor in (magnitude, dx, dy))
    height, width = len(values), len(values[0])

    def at(row: int, column: int) -> float:
        return values[row][column] if 0 <= row < height and 0 <= column < width else 0.0

    kept = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            angle = math.degrees(math.atan2(ys[row][column], xs[row][column])) % 180
            down, right = [(0, 1), (1, 1), (1, 0), (1, -1)][round(angle / 45) % 4]
            before, after = at(row - down, column - right), at(row + down, column + right)
            value, diagonal = values[row][column], down * right != 0
            kept[row, column] = value > before and (value > after if diagonal else value >= after)
    return (magnitude * kept)[None]


def hed(state: State, pixels: Tensor) -> Tensor:
    """Sigmoid of the mean of one map per VGG block, in float."""
    x = 255 * pixels[[2, 1, 0]][None] - torch.tensor([104.00699, 116.66877, 122.67892])[None, :, None, None]
    side_maps = []
    for block in range(5):
        if block:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        layer = 0
        while f"blocks.{block}.{layer}.weight" in state:
            name = f"blocks.{block}.{layer}"
            x = F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
            layer += 2
        side = F.conv2d(x, state[f"sides.{block}.weight"], state[f"sides.{block}.bias"])
        side_maps.append(F.interpolate(side, pixels.shape[-2:], mode="bilinear", align_corners=False))
    return torch.sigmoid(torch.stack(side_maps).mean(0))[0]


def lineart(pixels: Tensor, sigma: float) -> Tensor:
    """Dark lines on white: how much darker than its surroundings a pixel is, with the median line at mid grey."""
    radius = min(round(4 * sigma), min(pixels.shape[-2:]) - 1)
    window = torch.tensor([math.exp(-(i * i) / (2 * sigma**2)) for i in range(-radius, radius + 1)])
    kernel = (torch.outer(window, window) / window.sum() ** 2)[None, None]
    padded = F.pad(pixels[:, None], (radius,) * 4, mode="reflect")
    darker = F.relu((F.conv2d(padded, kernel)[:, 0] - pixels).min(0).values)
    lines = darker.detach().numpy()
    lines = lines[lines > 8 / 255]
    scale = max(float(np.median(lines)) if lines.size else 0.0, 16 / 255)
    return 1 - (127 / 255 * darker / scale).clamp(0, 1)[None]


def depth(network: nn.Module, pixels: Tensor) -> Tensor:
    """The network's inverse depth at the picture's size over its maximum; the network takes pictures of this size."""
    found = network((pixels[None] - 0.5) / 0.5).predicted_depth
    found = F.interpolate(found[None], pixels.shape[-2:], mode="bicubic", align_corners=False)[0]
    return found / found.max()


def reward_target(condition: str, control: Tensor, pixels: Tensor) -> Tensor | None:
    """c of the reward [1,H,W]: the control map, but for canny the edge strength of the real picture."""
    if condition == "canny":
        return canny(pixels)
    mean = control.mean(0, keepdim=True)
    if condition == "depth":
        return alignment_target(condition, control)
    return 1 - mean if condition == "lineart" else mean


@dataclass
class Case:
    """One batch, and everything that its loss depends on."""

    condition: str
    unet: nn.Module
    controlnet: nn.Module
    vae: nn.Module
    probe_state: State
    probe_groups: int
    tap_kind: str
    extractor: Callable[[Tensor], Tensor]  # one picture [3,H,W] -> [1,H,W]
    prediction_type: str
    alphas_cumprod: list[float]
    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: list[int]
    text: Tensor
    control: Tensor
    pixels: Tensor
    alpha: float
    reward_range: tuple[int, int]
    beta: float
    alignment_range: tuple[int, int]


def losses(case: Case) -> dict[str, Tensor]:
    """L_diff, L_reward, L_align and L = L_diff + alpha L_reward + beta L_align."""
    differences, rewards, alignments = [], [], []
    rewarded, aligned = [], []
    for i, t in enumerate(case.timesteps):
        one, step = slice(i, i + 1), torch.tensor([t])
        noisy, text = case.noisy[one], case.text[one]
        down, mid = case.controlnet(noisy, step, text, case.control[one], return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        output, taps = unet_with_taps(case.unet, case.tap_kind, noisy, step, text, **residuals)

        alpha_bar = case.alphas_cumprod[t]
        if case.prediction_type == "epsilon":
            wanted = case.noise[one]
        else:
            wanted = math.sqrt(alpha_bar) * case.noise[one] - math.sqrt(1 - alpha_bar) * case.latents[one]
        differences.append((output - wanted).square().mean())

        original = one_step_estimate(noisy, output, alpha_bar, case.prediction_type)
        picture = case.vae.decode(original / case.vae.config.scaling_factor).sample[0] / 2 + 0.5
        target = reward_target(case.condition, case.control[i], case.pixels[i])
        first, last = case.reward_range
        rewarded.append(first <= t <= last and target is not None)
        found = case.extractor(picture.clamp(0, 1))
        rewards.append((found - (found if target is None else target)).square().mean())

        embedding = case.unet.time_embedding(case.unet.time_proj(step))
        reading = aggregation_network(case.probe_state, case.probe_groups, taps, embedding, noisy.shape[-1])[0]
        target = alignment_target(case.condition, case.control[i])
        first, last = case.alignment_range
        aligned.append(first <= t <= last and target is not None)
        found = normalised_reading(case.condition, reading)
        found = F.interpolate(found[None], case.control.shape[-2:], mode="bilinear", align_corners=False)[0]
        alignments.append((found - (found if target is None else target)).square().mean())

    diffusion = sum(differences, torch.zeros(())) / len(differences)
    reward, alignment = masked_mean(rewards, rewarded), masked_mean(alignments, aligned)
    total = diffusion + case.alpha * reward + case.beta * alignment
    return {"loss": total, "diffusion": diffusion, "reward": reward, "alignment": alignment}
