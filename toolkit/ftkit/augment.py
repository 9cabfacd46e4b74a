"""Canvases to training pixels, batched on the training device, random per sample.

pixels = augmented(canvases, preprocess, augment, generator)   # (N, R, R, 3) uint8 -> (N, 3, S, S) float32
pixels = evaluation(canvases, preprocess)                      # the very pixels the bundle's Pillow path gives
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ftkit.recipe import Augment
from ftkit_export.preprocess import Preprocess


def _normalise(levels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    mean = torch.tensor(preprocess.mean, device=levels.device)[:, None, None]
    std = torch.tensor(preprocess.std, device=levels.device)[:, None, None]
    return (levels - mean) / std


def evaluation(canvases: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """(N, R, R, 3) uint8 -> (N, 3, S, S) float32: centre crop and normalise, equal to Preprocess.pixels."""
    start = (preprocess.resize - preprocess.size) // 2
    crop = canvases[:, start : start + preprocess.size, start : start + preprocess.size]
    return _normalise(crop.permute(0, 3, 1, 2).float(), preprocess).contiguous()


def augmented(
    canvases: torch.Tensor,
    preprocess: Preprocess,
    augment: Augment,
    generator: torch.Generator,
    view: int | None = None,
) -> torch.Tensor:
    """(N, R, R, 3) uint8 -> (N, 3, S, S) float32: per-sample crop, flips, rotation, brightness, contrast.

    Where the crop neither scales nor turns, pixels are sliced, not resampled. Flips are drawn per sample, or, for a
    cached view, follow its number, so that few views show every orientation. `generator` lives on the CPU, so that
    every device draws the same numbers.
    """
    count, device = len(canvases), canvases.device
    draw = torch.rand(8, count, generator=generator).to(device)
    if augment.scale < 1 or augment.rotate:
        levels = _resample(canvases, preprocess, augment, draw)
    else:
        levels = _shifted(canvases, preprocess, draw)
    turn = view
    for allowed, axis, chance in ((augment.hflip, 3, draw[0]), (augment.vflip, 2, draw[1])):
        if allowed and turn is None:
            levels = torch.where((chance < 0.5)[:, None, None, None], levels.flip(axis), levels)
        elif allowed and turn is not None:
            levels = levels.flip(axis) if turn % 2 else levels
            turn //= 2
    if augment.contrast:
        factor = 1 + augment.contrast * (2 * draw[2] - 1)[:, None, None, None]
        centre = levels.mean((1, 2, 3), keepdim=True)
        levels = (levels - centre) * factor + centre
    if augment.brightness:
        levels = levels * (1 + augment.brightness * (2 * draw[3] - 1)[:, None, None, None])
    if augment.contrast or augment.brightness:
        levels = levels.clamp(0, 255)
    return _normalise(levels, preprocess).contiguous()


def _shifted(canvases: torch.Tensor, preprocess: Preprocess, draw: torch.Tensor) -> torch.Tensor:
    """A crop of S x S at a random place of the canvas, per sample -> (N, 3, S, S) float32 grey levels."""
    size, room = preprocess.size, preprocess.resize - preprocess.size
    if room == 0:
        return canvases.permute(0, 3, 1, 2).float()
    top, left = ((draw[row] * (room + 1)).long().clamp(max=room) for row in (4, 5))
    span = torch.arange(size, device=canvases.device)
    sample = torch.arange(len(canvases), device=canvases.device)[:, None, None]
    crop = canvases[sample, (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]
    return crop.permute(0, 3, 1, 2).float()


def _resample(canvases: torch.Tensor, preprocess: Preprocess, augment: Augment, draw: torch.Tensor) -> torch.Tensor:
    """Random area, place and angle by one affine grid, bilinear -> (N, 3, S, S) float32 grey levels."""
    full = preprocess.size / preprocess.resize  # share of the canvas's side that the evaluation crop takes
    area = augment.scale + (1 - augment.scale) * draw[6]
    side = full * area.sqrt()
    angle = math.radians(augment.rotate) * (2 * draw[7] - 1)
    cos, sin = side * angle.cos(), side * angle.sin()
    shift_x, shift_y = ((1 - side) * (2 * draw[row] - 1) for row in (4, 5))
    theta = torch.stack([torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)], 1)
    grid = F.affine_grid(theta, [len(canvases), 3, preprocess.size, preprocess.size], align_corners=False)
    levels = canvases.permute(0, 3, 1, 2).float()
    return F.grid_sample(levels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
