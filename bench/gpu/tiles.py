"""Which tiles are fastest for the fused kernel on this GPU?

python -m bench.gpu.tiles [--json FILE] [--small] [--seconds S]
"""

import itertools
import time
from functools import partial

import torch

from bench.gpu.common import (
    DEVICE,
    SHAPES,
    SMALL,
    arguments,
    layer,
    random_ids,
    save,
    seconds,
)
from vllm_moe_prune.kernels.triton import fused

BLOCKS, STEPS, WARPS = (1, 2, 4), (16, 32, 64), (2, 4, 8)
ROUTINGS = 4


def main() -> None:
    """Milliseconds of each, for few tokens and more."""
    options = arguments(__doc__).parse_args()
    began = time.monotonic()
    tiles = list(itertools.product(BLOCKS, STEPS, WARPS))
    # What is in use now comes first.
    tiles.sort(key=lambda tile: tile != (fused.BLOCKS, fused.STEPS, fused.WARPS))
    if options.small:
        tiles = tiles[:1]
    rounds, counts = (0, (1,)) if options.small else (7, (1, 8))
    found: list[dict[str, object]] = []
    for name, shape in (SMALL if options.small else SHAPES).items():
        weights = layer(shape, "0.5")
        for tokens in counts:
            x_TD = torch.randn(tokens, shape.hidden, device=DEVICE).bfloat16()
            weights_TK = torch.rand(tokens, shape.top_k, device=DEVICE)
            calls = [
                partial(
                    fused.fused_moe,
                    *(x_TD, weights_TK, random_ids(shape, tokens), None),
                    *(weights.w13, weights.w2, shape.width),
                )
                for _ in range(ROUTINGS if rounds else 1)
            ]
            for tile in tiles:
                about = {"shape": name, "tokens": tokens, "tile": tile}
                if time.monotonic() - began > options.seconds:
                    found.append({**about, "left_out": "no time left"})
                    continue
                fused.BLOCKS, fused.STEPS, fused.WARPS = tile
                try:
                    found.append(
                        {**about, "ms": round(1e3 * seconds(calls, rounds), 4)}
                    )
                except Exception as error:  # more than this GPU has of something
                    found.append({**about, "left_out": f"{error}"[:200]})
                print(found[-1], flush=True)
                save(options.json, found)
        del weights
    save(options.json, found)


if __name__ == "__main__":
    main()
