"""The flags that say what to do: a recipe or a wish, and every key of a recipe.

``takes_recipe`` adds them to a command, which gets them as one argument, ``asked``.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .flags import CALIBRATION

if TYPE_CHECKING:
    from ..checkpoint.open import Checkpoint
    from ..recipes.schema import Recipe

RECIPE = "Shipped recipe, or path of a YAML file; default: what --for chooses."
WISH = (
    "What the output is for: any (every server, the default), cpu (zeros that are not "
    "stored), gpu (FP8 or 4 bits if --bytes asks for it) or stock-vllm (uneven layers "
    "for vLLM from 0.33 on without the plugin)."
)
# What the schema says of these is not how the command line reads them.
HELP = {
    "calibration": CALIBRATION,
    "blend": "Weights of the named calibration sources, e.g. code=0.5,chat=0.5; or "
    "maxmin, for the least well served.",
    "judge_on": "Text to take the held-out windows from, e.g. of the served domain; "
    "several as for --calibration.",
    "total": "Share of the expert parameters that leave: as whole experts, or zeros "
    "too where the recipe writes any.",
    "experts": "How experts are removed: stun (one of each cluster stays), score or "
    "none.",
    "slim": "Zeros in kept experts by: wanda, wanda-variant, magnitude, sparsegpt or "
    "none.",
    "quantize": "Fewer bits by: rtn, gptq, awq or none.",
}
MORE_NAMES = {"storage": ("--storage", "--layout")}


@dataclass(frozen=True)
class Asked:
    """What the flags say, before the checkpoint is known."""

    recipes: "Sequence[Recipe]"
    """The first that fits is meant; see ``wished``."""

    @property
    def recipe(self) -> "Recipe":
        """The recipe, whatever the checkpoint."""
        return self.recipes[0]

    def recipe_for(self, checkpoint: "Checkpoint") -> "Recipe":
        """The recipe for a checkpoint: which one may depend on its size."""
        from .. import pipeline

        return pipeline.first_that_fits(checkpoint, self.recipes)


def takes_recipe(
    *,
    search: bool = False,
    without: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of a recipe in place of its parameter ``asked``.

    Args:
        search: Whether the command searches for its plan.
        without: Flags that it reads itself.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = list(signature.parameters.values())
        made = _parameters({*without, *(one.name for one in own)})

        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            from ..recipes.flags import with_overrides
            from ..recipes.loading import wished

            found = {one.name: values.pop(one.name) for one in made}
            recipe, wish = found.pop("recipe"), found.pop("wish")
            recipes = wished(recipe, wish, search=search)
            asked = Asked([with_overrides(one, found) for one in recipes])
            command(**values, asked=asked)

        # Behind the arguments and switches of the command's own, by panel.
        rest = [one for one in own if one.name != "asked"]
        shown = [*rest, *made]
        # What inspect, and so Typer, reads; typeshed knows no such attribute.
        wrapped.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {one.name: one.annotation for one in shown}
        return wrapped

    return decorate


def _parameters(taken: set[str]) -> list[inspect.Parameter]:
    """The flags as parameters of a function; names that it has are left out."""
    from ..recipes.flags import recipe_flags

    made = [
        _parameter("recipe", str, RECIPE, ("--recipe",), None),
        _parameter("wish", str, WISH, ("--for",), None),
    ]
    for name, flag in recipe_flags().items():
        if name in taken:
            continue
        about = HELP.get(name, flag.help)
        words = MORE_NAMES.get(name, (f"--{name.replace('_', '-')}",))
        if flag.type is bool:
            words = (f"{words[0]}/--no-{words[0][2:]}",)
        # typer reads sizes as text; the schema makes them bytes.
        kind = str if name == "bytes" else flag.type
        made.append(_parameter(name, kind, about, words, flag.panel))
    return made


def _parameter(
    name: str, kind: Any, about: str, words: Sequence[str], panel: str | None
) -> inspect.Parameter:
    option = typer.Option(*words, help=about, rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
