from __future__ import annotations

from pathlib import Path

import torch

from training.data.drawn import DrawnBatches
from training.tasks.judge import Judge, ReadingTask, draw_pictures


def test_a_judge_learns_to_read_a_picture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pictures = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    pictures[..., :8] //= 4
    maps = torch.zeros(16, 16, 16, dtype=torch.uint8)
    maps[..., 8:] = 255
    task = ReadingTask(Judge())
    batches = iter(DrawnBatches(draw_pictures(pictures, maps, 8), seed=0))
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        # Mirrored batches make the task harder, not impossible: the bright side is the near one.
        loss = task(next(batches), generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])

    task.save(tmp_path)
    judge = Judge.load(tmp_path / "model.safetensors")
    pixels = pictures[:2].float() / 255
    with torch.no_grad():
        assert torch.equal(judge(pixels), task.network(pixels))
        assert judge.features(pixels).shape == (2, Judge.WIDTHS[-1])
    assert not any(p.requires_grad for p in judge.parameters())


def test_pictures_and_maps_are_mirrored_together() -> None:
    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.weight * pixels.mean(1, keepdim=True)

    ramp = torch.linspace(0.2, 0.8, 8).expand(4, 3, 8, 8)
    batch = {"pixels": ramp, "control": ramp, "ids": list("abcd")}
    task = ReadingTask(Recorder())
    losses = [float(task(batch, torch.Generator().manual_seed(seed))["loss"].detach()) for seed in range(8)]
    assert max(losses) < 0.05, "a mirrored ramp against an unmirrored one would differ by 0.3"
