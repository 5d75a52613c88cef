"""`minigpt3d serve`: answer over HTTP, as OpenAI's chat completions."""

import socket
from dataclasses import dataclass
from importlib.util import find_spec

from minigpt3d.serving.serve_options import KEY_VARIABLE, ServeOptions

from .batches import ACCELERATOR_BATCH, CPU_BATCH
from .console import complain
from .inference import InferenceOptions, load_pipeline


HELP = "serve a model over HTTP, for clients of OpenAI's API"
DESCRIPTION = (
    "Answer questions about 3D models over HTTP: /v1/chat/completions, /v1/models, /health and /metrics. Requests that arrive "
    "together are answered in one batch."
)
PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
# Seconds that requests in progress get when the server is stopped.
GRACE = 10


@dataclass(kw_only=True)
class Options(ServeOptions, InferenceOptions):
    pass


def run(options: Options, argv: list[str]) -> int:
    """Serve until a signal; returns the exit code."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f"The server needs {', '.join(missing)}: pip install 'minigpt3d[serve]'")
    if options.root is not None and not options.root.is_dir():
        raise ValueError(f"`root` {options.root}: there is no such folder")
    with bind(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        if not options.is_local and options.key is None:
            complain(
                f"warning: everybody who reaches {options.host} may use this server; set --api-key or {KEY_VARIABLE}"
            )
        serve(options, listener, f"http://{f'[{host}]' if ':' in host else host}:{port}")
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet, so that clients are refused while the model loads.

    Raises:
        ValueError: the address cannot be used.
    """
    listener = None
    try:
        if port > 65535:
            raise OverflowError("ports end at 65535")
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`host` {host} and `port` {port} cannot be used: {reason}. Choose another") from error


def serve(options: Options, listener: socket.socket, address: str):
    """Load the model, and serve it."""
    pipeline = load_pipeline(options)
    import uvicorn

    from minigpt3d.hub import default_model, public_name
    from minigpt3d.serving.app import make_app
    from minigpt3d.serving.engine import Engine, Settings
    from minigpt3d.serving.metrics import Metrics

    name = public_name(options.model or default_model())
    size = options.batch_size or (CPU_BATCH if pipeline.device.type == "cpu" else ACCELERATOR_BATCH)
    settings = Settings(options.reading, options.limits, options.max_new_tokens, size)
    metrics = Metrics()
    app = make_app(Engine(pipeline, settings, options, metrics), name, options, metrics)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="on", ws="none"
    )
    print(f"{name} answers at {address}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
