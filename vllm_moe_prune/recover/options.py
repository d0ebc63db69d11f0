"""What a recovery is asked to do, and which weights that concerns."""

import re
from dataclasses import dataclass
from typing import Literal

from ..archs.spec import ATTENTION, MoeArch
from ..errors import RecipeError

Method = Literal["router", "lora", "full"]
METHODS: tuple[Method, ...] = ("router", "lora", "full")
Objective = Literal["layers", "text", "teacher"]
# Whose weights are vectors or tables; an adapter is for matrices.
NOT_FOR_LORA = ("norms", "embeddings")
RATES: dict[Method, float] = {"router": 3e-3, "lora": 5e-4, "full": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train."""

    method: Method
    objective: Objective
    """What is approached: the original's MoE outputs, layer by layer; the text's next
    token; or the original's distribution of it (KL)."""
    targets: tuple[str, ...]
    steps: int
    """Optimizer steps; per layer where layers are the objective."""
    batch_size: int
    """Windows of text per step."""
    learning_rate: float
    """At its highest: it rises linearly, then falls along a cosine to zero."""
    warmup: float
    """Share of the steps in which it rises."""
    rank: int
    """Of the adapters; what they add is scaled by 2."""
    seed: int


def patterns(arch: MoeArch) -> dict[str, str]:
    """What can be trained: regular expressions over modules of ``TrainableModel``."""
    matrices = "|".join(arch.attention)
    mlp = "(gate|up|down)"
    return {
        "attention": rf"blocks\.\d+\.attention\.{re.escape(ATTENTION)}({matrices})",
        "experts": rf"blocks\.\d+\.moe\.experts\.\d+\.{mlp}",
        "dense": rf"blocks\.\d+\.(dense|moe\.shared)\.\d+\.{mlp}",
        "router": r"blocks\.\d+\.moe\.router",
        # input_layernorm, q_norm, dense_norms.0, and the final norm alone.
        "norms": r"(.*\.)?\w*norm(s\.\d+)?",
        "embeddings": r"embedding|head",
    }


def training(
    arch: MoeArch,
    method: str,
    *,
    taught: bool = False,
    targets: str | None = None,
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float | None = None,
    warmup: float = 0.03,
    rank: int = 16,
    seed: int = 0,
) -> Training:
    """The checked wish; what is None gets the method's default.

    Args:
        arch: The family, which knows what can be trained.
        method: One of ``METHODS``.
        taught: Whether the original's distribution of the next token is the objective.
        targets: Names of ``patterns``, with commas between.
        steps: See ``Training``, as the others.
        batch_size: At least 1.
        learning_rate: Above 0.
        warmup: 0 to 1.
        rank: At least 1.
        seed: Of the order of the windows, and of adapters.

    Raises:
        RecipeError: A value that cannot be meant.
    """
    known = next((one for one in METHODS if one == method), None)
    if known is None:
        raise RecipeError(f"method {method!r} is not one of: {', '.join(METHODS)}.")
    rate = RATES[known] if learning_rate is None else learning_rate
    for name, value, low, high in (
        ("--steps", steps, 1, None),
        ("--batch-size", batch_size, 1, None),
        ("--rank", rank, 1, None),
        ("--warmup", warmup, 0, 1),
    ):
        # Not value < low, which NaN would pass.
        if not value >= low or (high is not None and value > high):
            most = "more" if high is None else str(high)
            raise RecipeError(f"{name} is {value}, but must be {low} to {most}.")
    if not 0 < rate < 1:
        raise RecipeError(f"--learning-rate is {rate}, but must be between 0 and 1.")
    chosen = _targets(arch, known, targets)
    plain: Objective = "layers" if known == "router" else "text"
    return Training(
        method=known,
        objective="teacher" if taught else plain,
        targets=chosen,
        steps=steps,
        batch_size=batch_size,
        learning_rate=rate,
        warmup=warmup,
        rank=rank,
        seed=seed,
    )


def _targets(arch: MoeArch, method: Method, asked: str | None) -> tuple[str, ...]:
    there = tuple(patterns(arch))
    if method == "router":
        if asked not in (None, "router"):
            raise RecipeError(
                "--method router trains routers only; leave out --targets."
            )
        return ("router",)
    if method == "lora":
        there = tuple(name for name in there if name not in NOT_FOR_LORA)
    if asked is None:
        return ("attention",) if method == "lora" else there
    names = tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
    if unknown := [name for name in names if name not in there]:
        raise RecipeError(
            f"--targets: {unknown[0]!r} is not one of what --method {method} can "
            f"train: {', '.join(there)}."
        )
    return names
