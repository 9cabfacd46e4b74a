"""Turn canvases into training pixels, in batches on the training device, randomised per sample.

draw = drawn(N, generator)                                # on the CPU: the same on every device
pixels = augmented(canvases, preprocess, augment, draw)   # (N, R, R, 3) -> (N, 3, S, S) float32
mixing = mixing_of(N, S, augment, generator)              # mixup and cutmix, if the recipe has them
pixels = mixed(pixels, pixels[mixing.partner], mixing)
pixels = evaluation(canvases, preprocess)                 # same pixels as the bundle's Pillow path
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from ftkit.recipe import Augment
from ftkit_export.runtime.preprocess import Preprocess

DRAWS = 14  # random numbers per image


def _planes(pixels: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, a copy.

    Permutes bytes before converting to float: a quarter of the memory traffic.
    """
    return pixels.permute(0, 3, 1, 2).contiguous().float()


def _normalise(levels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Subtract the mean and divide by the standard deviation, in place."""
    mean, std = _constants(preprocess, levels.device)
    return levels.sub_(mean).div_(std)


@lru_cache
def _constants(preprocess: Preprocess, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, (3, 1, 1) each, copied to the device once.

    Copying them at every step would make the host wait.
    """
    with torch.inference_mode(False):
        mean = torch.tensor(preprocess.mean)
        std = torch.tensor(preprocess.std)
        return mean[:, None, None].to(device), std[:, None, None].to(device)


def evaluation(canvases: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Centre crop and normalise: (N, R, R, 3) uint8 -> (N, 3, S, S) float32.

    Equal to Preprocess.pixels.
    """
    start = (preprocess.resize - preprocess.size) // 2
    crop = canvases[:, start : start + preprocess.size, start : start + preprocess.size]
    return _normalise(_planes(crop), preprocess)


def drawn(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers for `augmented`, (DRAWS, count) on the CPU; one column per image."""
    return torch.rand(DRAWS, count, generator=generator)


def augmented(
    canvases: torch.Tensor,
    preprocess: Preprocess,
    augment: Augment,
    draw: torch.Tensor,
    view: int | None = None,
) -> torch.Tensor:
    """Per-sample crop, flips, rotation, colour and erasing, then normalisation.

    (N, R, R, 3) uint8 -> (N, 3, S, S) float32. If the crop neither scales nor rotates, pixels are
    sliced, not resampled. Flips are drawn per sample or, for a cached view, follow from its number,
    so that a few views show every orientation. draw: (DRAWS, N), from `drawn`.
    """
    draw = draw.to(canvases.device, non_blocking=True)
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
        # Zero, the mean colour, is closest to what the backbone has seen.
        pixels = pixels * ~_rectangles(preprocess.size, draw[9:13], draw[13] < augment.erase)

    return pixels


def _coloured(levels: torch.Tensor, augment: Augment, draw: torch.Tensor) -> torch.Tensor:
    """Change contrast, saturation and brightness, clamped to 0..255."""

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
    return (
        levels.clamp(0, 255)
        if augment.contrast or augment.saturation or augment.brightness
        else levels
    )


def _rectangles(size: int, draw: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """One random rectangle per sample -> (N, 1, S, S) bool.

    2 to 33 % of the area, aspect ratio 0.3 to 3.3 (Zhong et al. 2020).
    """
    area = 0.02 + 0.31 * draw[0]
    ratio = torch.exp(math.log(0.3) + draw[1] * (math.log(3.3) - math.log(0.3)))
    height = (area * ratio).sqrt().clamp(max=1) * size
    width = (area / ratio).sqrt().clamp(max=1) * size
    top = draw[2] * (size - height)
    left = draw[3] * (size - width)
    place = torch.arange(size, device=draw.device) + 0.5
    down = (place >= top[:, None]) & (place < (top + height)[:, None])
    across = (place >= left[:, None]) & (place < (left + width)[:, None])

    return (down[:, None, :, None] & across[:, None, None, :]) & wanted[:, None, None, None]


@dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed.

    partner: (N,) positions. share: (N,) weight of the image's own label. blends: (N,) True for
    mixup, False for cutmix. left, top, side: (N,) the pasted square, in pixels.
    """

    partner: torch.Tensor
    share: torch.Tensor
    blends: torch.Tensor
    left: torch.Tensor
    top: torch.Tensor
    side: torch.Tensor

    def of(self, part: slice) -> Mixing:
        """The mixing of some of the images."""
        return Mixing(*(value[part] for value in vars(self).values()))

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Mixing:
        """A copy with `change` applied to every tensor, such as pinning or moving it."""
        return Mixing(*(change(value) for value in vars(self).values()))


def mixing_of(count: int, size: int, augment: Augment, generator: torch.Generator) -> Mixing | None:
    """Draw, on the CPU, how `count` images of `size` pixels are mixed; None if they are not.

    mixup blends (Zhang et al. 2018), cutmix pastes a square (Yun et al. 2019); with both on, each
    sample draws one of them.
    """
    if not augment.mixes:
        return None

    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    blends = rng.random(count) < (0.5 if augment.cutmix else 1.0) * bool(augment.mixup)
    alphas = np.where(blends, augment.mixup, augment.cutmix)
    share = torch.from_numpy(rng.beta(alphas, alphas).astype(np.float32))
    partner = torch.from_numpy(rng.permutation(count))
    place = torch.from_numpy(rng.random((2, count)).astype(np.float32))
    side = ((1 - share).sqrt() * size).round()
    top, left = ((row * (size - side + 1)).floor() for row in place)
    kinds = torch.from_numpy(blends)

    return Mixing(
        partner, torch.where(kinds, share, 1 - side.square() / size**2), kinds, left, top, side
    )


def mixed(pixels: torch.Tensor, partners: torch.Tensor, mixing: Mixing) -> torch.Tensor:
    """Mix pixels (n, 3, S, S) with their partners' pixels."""
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    left = mixing.left[:, None]
    top = mixing.top[:, None]
    side = mixing.side[:, None]
    down = (at >= top) & (at < top + side)
    across = (at >= left) & (at < left + side)
    pasted = down[:, None, :, None] & across[:, None, None, :]
    share = mixing.share[:, None, None, None]
    own = torch.where(mixing.blends[:, None, None, None], share, (~pasted).to(pixels.dtype))

    return own * pixels + (1 - own) * partners


def _shifted(canvases: torch.Tensor, preprocess: Preprocess, draw: torch.Tensor) -> torch.Tensor:
    """Crop S x S at a random place of each canvas -> (N, 3, S, S) float32 grey levels."""
    size = preprocess.size
    room = preprocess.resize - preprocess.size
    if room == 0:
        return _planes(canvases)

    top, left = ((draw[row] * (room + 1)).long().clamp(max=room) for row in (4, 5))
    span = torch.arange(size, device=canvases.device)
    sample = torch.arange(len(canvases), device=canvases.device)[:, None, None]
    crop = canvases[sample, (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]

    return _planes(crop)


def _resample(
    canvases: torch.Tensor, preprocess: Preprocess, augment: Augment, draw: torch.Tensor
) -> torch.Tensor:
    """Crop with random area, place and angle, by one bilinear affine grid.

    -> (N, 3, S, S) float32 grey levels.
    """
    # Share of the canvas's side that the evaluation crop takes
    full = preprocess.size / preprocess.resize
    area = augment.scale + (1 - augment.scale) * draw[6]
    side = full * area.sqrt()
    angle = math.radians(augment.rotate) * (2 * draw[7] - 1)
    cos = side * angle.cos()
    sin = side * angle.sin()
    shift_x, shift_y = ((1 - side) * (2 * draw[row] - 1) for row in (4, 5))
    theta = torch.stack(
        [torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)], 1
    )
    grid = F.affine_grid(
        theta, [len(canvases), 3, preprocess.size, preprocess.size], align_corners=False
    )
    levels = _planes(canvases)

    return F.grid_sample(
        levels, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
