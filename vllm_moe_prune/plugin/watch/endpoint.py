"""Routes within vLLM's own server: what is being served, and where its tokens go.

    VLLM_PLUGINS=moe_prune,moe_prune_api vllm serve OUT

Entry point ``vllm.endpoint_plugins: moe_prune_api``. Everything is below
``/plugins/moe-prune/``; vLLM asks for API keys below ``/v1`` only, so these routes are
as open as its own ``/metrics``.
"""

import asyncio
import importlib.util
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from ...archs import known
from ...checkpoint.open import Checkpoint
from ...checkpoint.remap import FILE_NAME, ExpertRemap, dump_remap
from ...checkpoint.source import open_checkpoint
from ...cut.build_remap import build_remap
from ...cut.finish import PROVENANCE
from ...errors import CheckpointError, MoePruneError, ServeError
from ...files.regular import read_file
from ...report.page import page
from ...report.read import read_numbers
from .. import LOAD_FORMAT
from ..load.verify_remap import local_folder
from .switch import EXTENSION, SWITCH, Load, describe_load, is_on, merge

JSON = "application/json"
PREFIX = "/plugins/moe-prune"
"""The address of the data and the pages in vLLM's server; the gateway knows it too."""

PAGES_PACKAGE = "moe_prune_gateway"


@dataclass(kw_only=True)
class ServedModel:
    """What one server serves."""

    engine: Any
    """vLLM's EngineClient."""
    checkpoint: Checkpoint | None
    """What vLLM was given: a pruned checkpoint or an original. None: an original of a
    family that is not known here."""
    remap: ExpertRemap | None
    """None: nothing was pruned."""
    in_memory: bool
    """Whether it is pruned while it loads, so that no file says what was done."""
    top_k: int
    """Slots of a token, as the model says."""
    since: float | None
    """When counting of routed tokens began; None: it is off."""
    weight_bytes: int
    """Of the model in the memory of all processes; 0 where nothing counts."""
    report: str | None = None
    drawing: asyncio.Lock = field(default_factory=asyncio.Lock)


class MoePruneEndpoints:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "moe_prune_api"
    # Not None: vLLM's render server would call init_state without an engine.
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(make_router())

    async def init_state(
        self, engine_client: Any, state: State, args: Namespace
    ) -> None:
        """Open what is served, and start to count if that is asked for.

        Raises:
            MoePruneError: The checkpoint is damaged, or cannot be watched as asked.
        """
        state.moe_prune = await _open(engine_client)


async def _open(engine: Any) -> ServedModel:
    config = engine.vllm_config
    since, held = None, [0]
    if is_on(config):
        if config.parallel_config.worker_extension_cls != EXTENSION:
            raise ServeError(
                f"--additional-config has {SWITCH}: --worker-extension-cls "
                f"{EXTENSION} is needed too, to read what was counted."
            )
        starts = await engine.collective_rpc("moe_prune_start_load")
        # Workers reset their counters one by one; the first says since when any counts.
        since = min(starts)
        # Once: what is loaded stays as it is, and workers answer between two steps.
        held = await engine.collective_rpc("moe_prune_weight_bytes")
    in_memory = config.load_config.load_format == LOAD_FORMAT
    # Opening reads every header: too long for the event loop.
    checkpoint, remap = await run_in_threadpool(_read, config, in_memory)
    top_k = getattr(config.model_config.hf_text_config, "num_experts_per_tok", 1)
    return ServedModel(
        engine=engine,
        checkpoint=checkpoint,
        remap=remap,
        in_memory=in_memory,
        top_k=top_k,
        since=since,
        weight_bytes=sum(held),
    )


def _read(config: Any, in_memory: bool) -> tuple[Checkpoint | None, ExpertRemap | None]:
    if in_memory:
        from ..load.loader import PruningLoader

        loader = PruningLoader(config.load_config)
        # The original and the plan: the table exists in the workers only.
        checkpoint, plan = loader.open(config.model_config)
        return checkpoint, build_remap(checkpoint, plan)
    model = config.model_config
    folder = local_folder(model.model, model.revision, config.load_config.download_dir)
    of_ours = model.hf_config.model_type in known()
    if not of_ours and not (folder / FILE_NAME).exists():
        return None, None  # nothing of ours: there is only what was counted
    checkpoint = open_checkpoint(folder, allow_links=True)
    return checkpoint, checkpoint.remap


def make_router() -> APIRouter:
    """The routes; they find what is served in the application's state.

    Those of the pages are there where moe-prune-gateway, which has them, is installed.
    """
    router = APIRouter(prefix=PREFIX, tags=["vllm-moe-prune"])

    @router.get("/load")
    async def load(request: Request) -> Load:
        """Tokens per expert and layer since the server was ready."""
        served = _served(request)
        workers = []
        if served.since is not None:
            workers = await served.engine.collective_rpc("moe_prune_read_load")
        return describe_load(
            *(served.checkpoint, served.remap, merge(workers)),
            *(served.since, served.top_k, served.weight_bytes),
        )

    @router.get("/remap")
    async def remap(request: Request) -> Response:
        """The expert remap table, as the checkpoint has it."""
        table = _served(request).remap
        if table is None:
            raise HTTPException(404, f"Nothing was pruned: there is no {FILE_NAME}.")
        return Response(dump_remap(table), media_type=JSON)

    @router.get("/provenance")
    async def provenance(request: Request) -> Response:
        """Where the checkpoint comes from, as ``cut`` wrote it down."""
        path = _pruned_folder(request) / "provenance.json"
        try:
            return Response(read_file(path, PROVENANCE), media_type=JSON)
        except CheckpointError as error:
            raise HTTPException(404, str(error)) from error

    @router.get("/report", response_class=HTMLResponse)
    async def report(request: Request) -> HTMLResponse:
        """The report on this checkpoint, drawn when it is first asked for."""
        served, folder = _served(request), _pruned_folder(request)
        # One draws; whoever asked meanwhile gets what it drew.
        async with served.drawing:
            if served.report is None:
                try:
                    served.report = await run_in_threadpool(_draw, folder)
                except MoePruneError as error:
                    raise HTTPException(404, str(error)) from error
        return HTMLResponse(served.report)

    if importlib.util.find_spec(PAGES_PACKAGE) is not None:
        from moe_prune_gateway.page_routes import add_pages

        add_pages(router)
    else:
        router.add_api_route("/", _no_pages, include_in_schema=False)
    return router


async def _no_pages() -> None:
    raise HTTPException(
        404, "The pages are in moe-prune-gateway: pip install it beside vLLM."
    )


def _draw(folder: Path) -> str:
    return page(read_numbers(folder, allow_links=True))


def _served(request: Request) -> ServedModel:
    served: ServedModel = request.app.state.moe_prune
    return served


def _pruned_folder(request: Request) -> Path:
    """Where a pruned checkpoint's files are.

    Raises:
        HTTPException: 404, there are none.
    """
    served = _served(request)
    if served.remap is None:
        raise HTTPException(404, "Nothing was pruned: this is an original checkpoint.")
    if served.in_memory:
        raise HTTPException(404, "Pruned while it was loaded: nothing was written.")
    assert served.checkpoint is not None  # there is a table of what became of it
    return served.checkpoint.folder
