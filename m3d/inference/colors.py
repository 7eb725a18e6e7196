"""The colours of structures, the same in pictures and in the tables of label maps."""

import colorsys

__all__ = ["PALETTE", "color_of"]

# Okabe and Ito's colour-blind-safe colours, those that stand out on grey first
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")
GOLDEN = 0.618033988749895  # of the circle of hues: neighbours in order are far apart in colour


def color_of(number: int) -> str:
    """The colour of a structure, counted from 0, as ``#RRGGBB``: those of the palette, then ones of their own."""
    if number < len(PALETTE):
        return PALETTE[number]
    saturation, value = (0.85, 0.55, 0.7)[number % 3], (0.95, 0.75, 0.6)[number // 3 % 3]
    rgb = colorsys.hsv_to_rgb(number * GOLDEN % 1, saturation, value)
    return "#" + "".join(f"{round(255 * part):02X}" for part in rgb)
