"""`minigpt3d demo`: a page on this machine where people see an object, turn it and talk about it."""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

from minigpt3d.arguments import flag, natural_int, option

from .inference import InferenceOptions, load_pipeline


HELP = "open a page to see objects in 3D and talk about them"
DESCRIPTION = "Serve a page: drop a file, see and turn the object, ask about it. It is served to this machine only, and files stay on it."
EPILOG = (
    "Example: minigpt3d demo --model OWNER/NAME --space my-space --push OWNER/SPACE publishes the page as a Space."
)


@dataclass(kw_only=True)
class Options(InferenceOptions):
    host: str = option("address to serve on; 0.0.0.0 serves everybody who reaches this machine", default="127.0.0.1")
    port: int | None = option(
        "port to serve on (default: the first free one from 7860)", default=None, type=natural_int
    )
    space: Path | None = option(
        "write a folder that is a Space of the Hub with this page, instead of serving it", default=None, metavar="DIR"
    )
    push: str | None = option("publish the folder of `space` as this Space", default=None, metavar="OWNER/NAME")


def run(options: Options, argv: list[str]) -> int:
    """Serve the page until it is interrupted, or write the Space; returns the exit code."""
    if options.push is not None and options.space is None:
        raise ValueError("`push` publishes the folder that `space` writes: give both")
    if find_spec("gradio") is None:
        raise ImportError("The page is made with gradio: pip install 'minigpt3d[demo]'")
    if options.space is None:
        serve(options)
    else:
        write(options)
    return 0


def write(options: Options):
    """Write the Space, and publish it if that is wanted.

    Raises:
        ValueError: an option that has no effect in a Space, a name that is none, or see `write_space` and `push_space`.
    """
    from minigpt3d.hub import is_hub_id
    from minigpt3d.page.space import push_space, write_space

    if options.host != Options.host or options.port is not None:
        raise ValueError("`host` and `port`: the Hub decides where a Space is served; leave them out")
    if options.push is not None and not is_hub_id(options.push):
        raise ValueError(f"`push` {options.push}: not the name of a Space; pass OWNER/NAME")
    write_space(options.space, options.model, _given(options))
    print(f"{options.space} is a Space; try it: python {options.space / 'app.py'}")
    if options.push is not None:
        print(push_space(options.space, options.push))


def _given(options: Options) -> list[str]:
    """The options of a model and its answers that differ from their defaults, but the model itself."""
    values = {field.name: (getattr(options, field.name), field.default) for field in fields(InferenceOptions)}
    return [
        word
        for name, (value, default) in values.items()
        if name != "model" and value != default
        for word in (flag(name, "-"), str(value))
    ]


def serve(options: Options):
    """Serve the page until it is interrupted.

    Raises:
        ValueError: there is no such model, or it cannot be read.
        OSError: the port is taken.
    """
    import signal
    import threading

    from minigpt3d.hub import BUNDLED_MODEL, public_name
    from minigpt3d.page.layout import Settings, launch
    from minigpt3d.page.shown import Objects

    pipeline, lock = load_pipeline(options), threading.Lock()
    settings = Settings(public_name(options.model or BUNDLED_MODEL), options.reading, options.max_new_tokens)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was dropped is removed
    with Objects(pipeline, lock, options.limits) as objects:
        _, url, _ = launch(
            pipeline,
            objects,
            lock,
            settings,
            server_name=options.host,
            server_port=options.port,
            prevent_thread_lock=True,
        )
        print(f"The page is at {url}  (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
