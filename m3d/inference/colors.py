"""The colours of structures, the same in pictures and in the tables of label maps."""

import colorsys

__all__ = ["PALETTE", "color_of"]

# Okabe and Ito's colour-blind-safe colours, those that stand out on grey first
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")
GOLDEN = 0.618033988749895  # of the circle of hues: neighbours in order are far apart in colour


def color_of(number: int) -> str:
    """The colour of a structure, counted from 0, as ``#RRGGBB``: the palette, then light ones that dark shows."""
    if number < len(PALETTE):
        return PALETTE[number]
    lightness, saturation = (0.62, 0.78, 0.7)[number // 3 % 3], (0.85, 0.5, 0.7)[number % 3]
    rgb = colorsys.hls_to_rgb(number * GOLDEN % 1, lightness, saturation)
    return "#" + "".join(f"{round(255 * part):02X}" for part in rgb)
