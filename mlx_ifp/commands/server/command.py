"""``mlx_ifp.server``: an HTTP server whose models are the tasks of one checkpoint."""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...checkpoint.directory import Checkpoint
from ...cli.arguments import load_model
from ...generation.batch import Scheduler
from ...llm.kv_cache import Generation
from ...memory.budget import Use
from ...selectors.selector import resolved_keep
from .access import Access
from .listening import Server
from .service import Service
from .tasks_as_models import Models

# Requests that are being answered get so long once the server is told to end.
GRACE_SECONDS = 5.0


def _plan(args: argparse.Namespace, checkpoint: Checkpoint, _: TokenizerWrapper) -> Use:
    """The least that a request needs: what does not fit then is refused before it is read."""
    selector = checkpoint.checked_selector(args.selector or checkpoint.ifp.selector)
    return Use(resolved_keep(checkpoint, args.keep), Generation(1), selector)


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.server``."""
    logging.basicConfig(
        level=args.log_level, format="%(asctime)s - %(levelname)s - %(message)s", force=True
    )
    # Who may come in is settled before seconds are spent on loading.
    access = Access(args.host, args.api_key, open_to_all=args.no_auth, origins=args.allowed_origins)
    args.estimate_only = False
    model, tokenizer = load_model(args, lambda *given: _plan(args, *given))
    path = Path(args.model) if args.model else model.checkpoint.path
    models = Models(model, args.model_name or path.name or path.resolve().name)
    scheduler = Scheduler(
        model,
        tokenizer,
        decode_concurrency=args.decode_concurrency,
        prompt_concurrency=args.prompt_concurrency,
        prefill_step_size=args.prefill_step_size,
        max_queue=args.max_queue,
        kept_prompts=args.prompt_cache_size,
        kv_bytes=args.prompt_cache_bytes,
        idle_timeout=args.idle_timeout,
    )
    try:
        service = Service(tokenizer, models, access, args, scheduler)
        _serve(Server(args.host, args.port, service), service)
    finally:
        scheduler.close(0)
    # Threads of clients that are still connected may write to the log. If they do so while the
    # interpreter is taken down, Python ends with an error, so it is not taken down.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _serve(server: Server, service: Service) -> None:
    """Serve until a signal says to end."""
    told = threading.Event()

    def end(number: int, _: Any) -> None:
        if told.is_set():
            # Whoever says it twice does not want to wait.
            os._exit(128 + number)
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    print(f"{server.url} serves {', '.join(service.models.ids)}", flush=True)
    # The system may hand the signal to another thread. Python's handler only runs once this one
    # wakes up, and a wait without an end would not.
    while not told.wait(0.5):
        pass
    logging.info("Ending: running requests have %g seconds", GRACE_SECONDS)
    server.shutdown()
    server.server_close()
    service.scheduler.close(GRACE_SECONDS)
    # Those that were ended still tell their clients so.
    server.wait_idle(2)
