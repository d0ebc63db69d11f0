"""Runs that end in the middle."""

from vllm_moe_prune.progress import Progress, Report


class Killed(BaseException):
    """Nothing catches it, so that what is left is what a kill leaves."""


def at_layer(
    layer: int,
    then: BaseException | type[BaseException] = Killed,
    stage: str | None = None,
) -> Report:
    """Ends a run when it tells of a layer; of any stage, or of the one named."""

    def report(progress: Progress) -> None:
        if progress.layer == layer and stage in (None, progress.stage):
            raise then

    return report
