"""How far apart the colours of two palettes are: CIEDE2000 (Sharma, Wu and Dalal, 2005), by scikit-image."""

from __future__ import annotations

import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab


def colour_difference(made: np.ndarray, wanted: np.ndarray) -> float:
    """Mean over the cells of two grids (rows, columns, 3) of sRGB bytes; about 1 is just seen, black to white is 100.

    Palettes drawn as pictures are grids too: their pixels weigh each cell by its area.
    """
    return float(deltaE_ciede2000(rgb2lab(wanted), rgb2lab(made)).mean())
