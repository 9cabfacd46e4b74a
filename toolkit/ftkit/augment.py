"""Canvases to training pixels, batched on the training device, random per sample.

pixels = augmented(canvases, preprocess, augment, generator)   # (N, R, R, 3) uint8 -> (N, 3, S, S) float32
pixels, partner, share = mixed(pixels, augment, generator)     # mixup and cutmix, where the recipe has them
pixels = evaluation(canvases, preprocess)                      # the very pixels the bundle's Pillow path gives
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from ftkit.recipe import Augment
from ftkit_export.preprocess import Preprocess


def _planes(pixels: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, new. Bytes are moved, not floats: a quarter of the traffic."""
    return pixels.permute(0, 3, 1, 2).contiguous().float()


def _normalise(levels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """In place."""
    mean = torch.tensor(preprocess.mean, device=levels.device)[:, None, None]
    std = torch.tensor(preprocess.std, device=levels.device)[:, None, None]
    return levels.sub_(mean).div_(std)


def evaluation(canvases: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """(N, R, R, 3) uint8 -> (N, 3, S, S) float32: centre crop and normalise, equal to Preprocess.pixels."""
    start = (preprocess.resize - preprocess.size) // 2
    crop = canvases[:, start : start + preprocess.size, start : start + preprocess.size]
    return _normalise(_planes(crop), preprocess)


def augmented(
    canvases: torch.Tensor,
    preprocess: Preprocess,
    augment: Augment,
    generator: torch.Generator,
    view: int | None = None,
) -> torch.Tensor:
    """(N, R, R, 3) uint8 -> (N, 3, S, S) float32: per-sample crop, flips, rotation, colour, erasing.

    Where the crop neither scales nor turns, pixels are sliced, not resampled. Flips are drawn per sample, or, for a
    cached view, follow its number, so that few views show every orientation. `generator` lives on the CPU, so that
    every device draws the same numbers.
    """
    count, device = len(canvases), canvases.device
    draw = torch.rand(14, count, generator=generator).to(device)
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
    pixels = _normalise(_coloured(levels, augment, draw).contiguous(), preprocess)
    if augment.erase:
        # Zero is the mean colour: what a backbone is least surprised by.
        pixels = pixels * ~_rectangles(preprocess.size, draw[9:13], draw[13] < augment.erase)
    return pixels


def _coloured(levels: torch.Tensor, augment: Augment, draw: torch.Tensor) -> torch.Tensor:
    """Grey levels with other contrast, saturation and brightness, kept in 0..255."""

    def factor(strength: float, row: int) -> torch.Tensor:
        return 1 + strength * (2 * draw[row] - 1)[:, None, None, None]

    if augment.contrast:
        centre = levels.mean((1, 2, 3), keepdim=True)
        levels = (levels - centre) * factor(augment.contrast, 2) + centre
    if augment.saturation:
        grey = levels.mean(1, keepdim=True)
        levels = (levels - grey) * factor(augment.saturation, 8) + grey
    if augment.brightness:
        levels = levels * factor(augment.brightness, 3)
    return levels.clamp(0, 255) if augment.contrast or augment.saturation or augment.brightness else levels


def _rectangles(size: int, draw: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A random rectangle a sample -> (N, 1, S, S) bool: 2 to 33 % of the area, sides 0.3 to 3.3 (Zhong et al. 2020)."""
    area, ratio = 0.02 + 0.31 * draw[0], torch.exp(math.log(0.3) + draw[1] * (math.log(3.3) - math.log(0.3)))
    height, width = (area * ratio).sqrt().clamp(max=1) * size, (area / ratio).sqrt().clamp(max=1) * size
    top, left = draw[2] * (size - height), draw[3] * (size - width)
    place = torch.arange(size, device=draw.device) + 0.5
    down = (place >= top[:, None]) & (place < (top + height)[:, None])
    across = (place >= left[:, None]) & (place < (left + width)[:, None])
    return (down[:, None, :, None] & across[:, None, None, :]) & wanted[:, None, None, None]


def mixed(
    pixels: torch.Tensor, augment: Augment, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(N, 3, S, S) -> the same mixed per sample with a partner, its position (N,), and the share (N,) of the own label.

    mixup blends (Zhang et al. 2018), cutmix pastes a rectangle (Yun et al. 2019); with both, each sample draws one.
    Where the recipe has neither: pixels, None, None.
    """
    if not augment.mixes:
        return pixels, None, None
    count, size, device = len(pixels), pixels.shape[-1], pixels.device
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    blends = torch.from_numpy(rng.random(count) < (0.5 if augment.cutmix else 1.0) * bool(augment.mixup)).to(device)
    alphas = [augment.mixup if blend else augment.cutmix for blend in blends.tolist()]
    share = torch.from_numpy(rng.beta(alphas, alphas).astype(np.float32)).to(device)
    partner = torch.from_numpy(rng.permutation(count)).to(device)
    place = torch.from_numpy(rng.random((2, count)).astype(np.float32)).to(device)
    side = ((1 - share).sqrt() * size).round()
    top, left = ((row * (size - side + 1)).floor() for row in place)
    at = torch.arange(size, device=device)
    down = (at >= top[:, None]) & (at < (top + side)[:, None])
    across = (at >= left[:, None]) & (at < (left + side)[:, None])
    pasted = down[:, None, :, None] & across[:, None, None, :]
    share = torch.where(blends, share, 1 - side.square() / size**2)
    own = torch.where(blends[:, None, None, None], share[:, None, None, None], (~pasted).to(pixels.dtype))
    return own * pixels + (1 - own) * pixels[partner], partner, share


def _shifted(canvases: torch.Tensor, preprocess: Preprocess, draw: torch.Tensor) -> torch.Tensor:
    """A crop of S x S at a random place of the canvas, per sample -> (N, 3, S, S) float32 grey levels."""
    size, room = preprocess.size, preprocess.resize - preprocess.size
    if room == 0:
        return _planes(canvases)
    top, left = ((draw[row] * (room + 1)).long().clamp(max=room) for row in (4, 5))
    span = torch.arange(size, device=canvases.device)
    sample = torch.arange(len(canvases), device=canvases.device)[:, None, None]
    crop = canvases[sample, (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]
    return _planes(crop)


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
    levels = _planes(canvases)
    return F.grid_sample(levels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
