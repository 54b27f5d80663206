"""Which tilings of a convolution are worth trying on a device."""

from __future__ import annotations

from dataclasses import replace

from ptq3d.engines.triton.products import Product, Tile, columns_of, fits, simple_tile
from ptq3d.engines.triton.rows import power_of_two
from ptq3d.engines.triton.views import LANES

SHARED_BYTES = 225_000  # of shared memory that a program of Hopper or Ampere data-centre GPUs may take


def shared_bytes(product: Product, tile: Tile) -> int:
    """What the pipeline of a tiling holds."""
    kernel = product.kernel[1]
    lines, taps = (tile.lines + kernel - 1, kernel) if tile.lines > 1 else (1, 1)
    return (lines * tile.rows + taps * tile.columns) * tile.run * tile.stages * product.width


def _wastes_little(product: Product, tile: Tile) -> bool:
    useful = product.channels[1] * product.copies * tile.group
    return columns_of(product, tile)[1] <= 1.6 * useful or columns_of(product, tile)[1] <= 32


# what was the fastest, or within a few per cent of it, for some layer on an H100; benchmarks/gpu-notes.md has the measurements
SHORTLIST = tuple(
    Tile(*values)
    for values in (
        ("all", 1, 1, 128, 128, 128, 3, 4),
        ("all", 1, 1, 256, 64, 64, 3, 8),
        ("all", 1, 1, 128, 64, 128, 4, 4),
        ("all", 1, 1, 128, 64, 32, 2, 4),
        ("all", 1, 1, 128, 32, 32, 2, 4),
        ("all", 4, 1, 128, 64, 64, 2, 4),
        ("tap", 1, 1, 128, 128, 128, 3, 4),
        ("tap", 1, 1, 128, 64, 128, 3, 4),
        ("tap", 1, 1, 128, 64, 64, 4, 4),
        ("tap", 1, 1, 128, 64, 32, 4, 4),
        ("line", 1, 1, 128, 128, 64, 4, 4),
        ("tap", 1, 2, 64, 128, 32, 4, 4),
        ("line", 1, 2, 128, 64, 64, 2, 4),
        ("line", 1, 2, 128, 64, 32, 4, 4),
        ("line", 1, 4, 64, 64, 64, 3, 4),
        ("line", 1, 4, 64, 64, 32, 4, 4),
        ("line", 1, 4, 128, 64, 64, 3, 8),
        ("tap", 1, 4, 64, 32, 32, 3, 4),
        ("line", 2, 2, 128, 64, 64, 2, 4),
        ("line", 2, 2, 64, 128, 64, 2, 4),
        ("line", 2, 4, 64, 64, 64, 2, 4),
        ("line", 2, 4, 64, 64, 32, 2, 4),
        ("line", 2, 2, 128, 64, 32, 2, 8),
        ("line", 2, 4, 256, 32, 32, 3, 8),
        ("line", 2, 4, 128, 32, 64, 2, 4),
    )
)


def worth_trying(product: Product) -> list[Tile]:
    """The tilings that are measured for a product: those of the shortlist that suit it, or the one that always works."""
    found: dict[Tile, None] = {}
    for tile in SHORTLIST:
        widest = max(power_of_two(product.channels[1] * product.copies * tile.group), 16)
        narrow = replace(tile, columns=min(tile.columns, widest))
        suits = narrow.columns >= min(widest, 64) and (tile.group == 1 or product.channels[1] <= 64)
        suits = suits and (tile.group == 1 or tile.mode == "line" or product.channels[0] < LANES)
        suits = suits and fits(product, narrow) and _wastes_little(product, narrow)
        if suits and shared_bytes(product, narrow) <= SHARED_BYTES:
            found[narrow] = None
    return list(found) or [simple_tile(product)]
