"""What judging needs beyond the package's own dependencies."""

import importlib.util

from ..errors import EvaluationError


def check_lm_eval() -> None:
    """Refuse tasks where lm-eval is missing.

    Raises:
        EvaluationError: It says how to get it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "tasks need lm-eval, which is not installed. Install it with "
            "`pip install 'vllm-moe-prune[eval]'`."
        )
