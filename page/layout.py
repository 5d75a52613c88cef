"""The layout of the page, and the server that shows it."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from minigpt3d.cleaning_minigpt3d import CLEANINGS
from minigpt3d.point_cloud_minigpt3d import NAMED_COLORS, UP_AXES

from .actions import ATTENTION, CLOUD, Actions, Session
from .content import LABELS, facts_about, file_url, scale_bar
from .shown import Objects, example_files


STATIC = Path(__file__).resolve().parent / "static"
QUESTIONS = ("What is this?", "What color is it?", "What is it used for?", "Caption this 3D model in detail.")
# What was dropped is deleted after an hour: seconds between looks, and age. A visitor's own copy lives longer, see `Actions.leave`.
UPLOADS_DELETED = (60, 3600)
# The browser loads from, and sends to, nothing but the server of this page.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; form-action 'self'; base-uri 'self'"
)
CSS = """
#viewer { height: clamp(260px, 50vh, 620px); background: var(--background-fill-secondary); border-radius: var(--radius-lg);
  border: 1px solid var(--border-color-primary); overflow: hidden; padding: 0 }
#viewer .cloud-viewer { position: absolute; inset: 0 }
#viewer canvas { display: block; touch-action: none; cursor: grab }
#viewer canvas:active { cursor: grabbing }
#viewer canvas:focus-visible { outline: 3px solid var(--color-accent); outline-offset: -3px }
#viewer [data-state="loading"] canvas { opacity: 0.4 }
#viewer .problem { position: absolute; inset: 0 0 auto 0; margin: 0; padding: 0.5em 1em; background: var(--background-fill-primary) }
#viewer .problem:empty { display: none }
#examples { gap: 0.4em }
#facts ul { margin: 0.25em 0 0 1.2em; list-style: disc }
#facts .error { color: var(--error-text-color, #b91c1c); font-weight: 600 }
#scale { display: flex; gap: 0.6em; align-items: center; font-size: var(--text-sm) }
#scale i { flex: 1; height: 0.7em; border-radius: 0.35em }
footer { display: none !important }
@media (prefers-reduced-motion: reduce) { *, *::before, *::after { animation: none !important; transition: none !important } }
"""


def launch(pipeline, objects: Objects, lock: threading.Lock, settings: "Settings", **server):
    """Start the server; returns what `gr.Blocks.launch` returns.

    Args:
        server: of `gr.Blocks.launch`: `server_name`, `server_port`, `prevent_thread_lock`.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(objects.folder / "uploads")  # removed with the folder
    return build(pipeline, objects, lock, settings).launch(
        quiet=True,
        share=False,
        ssr_mode=False,
        _frontend=False,  # Gradio would ask its own address once, which fails on a busy machine or behind a proxy
        footer_links=[],
        allowed_paths=[str(STATIC), str(objects.folder)],
        max_file_size="1gb",
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
        css=CSS,
        app_kwargs={"middleware": [*_host_check(server.get("server_name")), Middleware(_ContentPolicy)]},
        **server,
    )


def _host_check(address: str | None) -> list[Middleware]:
    """If only this machine is served, requests must be for this machine: other names are those of pages that reach it through
    the visitor's browser (DNS rebinding)."""
    names = ["127.0.0.1", "localhost"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names)] if address in (None, *names) else []


class _ContentPolicy:
    """Adds `CONTENT_POLICY` to every answer of an ASGI application."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CONTENT_POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class Settings:
    """What the page begins with.

    Args:
        model: name of the model.
        reading: `up_axis`, `missing_color` and `clean` that were given on the command line.
        max_new_tokens: of an answer.
    """

    model: str
    reading: dict[str, str]
    max_new_tokens: int


def build(pipeline, objects: Objects, lock: threading.Lock, settings: Settings) -> gr.Blocks:
    """The page, not yet served."""
    actions = Actions(pipeline, objects, lock, settings.max_new_tokens)
    with gr.Blocks(title="MiniGPT-3D", analytics_enabled=False, fill_width=True, delete_cache=UPLOADS_DELETED) as page:
        gr.Markdown(f"# MiniGPT-3D\nAsk a small language model about a 3D object. Model: `{settings.model}`")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                seen = _lay_out_object(pipeline, settings)
            with gr.Column(scale=4, min_width=320):
                asked = _lay_out_conversation()
        _connect(actions, gr.State(Session(), delete_callback=actions.leave), seen, asked)
    return page.queue(default_concurrency_limit=4)


@dataclass(frozen=True)
class _ObjectParts:
    """What shows an object. `controls` are those of `LABELS`, by its names and in its order; `examples` are buttons with their
    files."""

    upload: gr.File
    examples: list[tuple[gr.Button, Path]]
    choice: gr.Dropdown
    viewer: gr.HTML
    facts: gr.HTML
    view: gr.Radio
    query: gr.Slider
    scale: gr.HTML
    controls: dict[str, gr.Dropdown]


@dataclass(frozen=True)
class _ConversationParts:
    chat: gr.Chatbot
    question: gr.Textbox
    suggestions: list[gr.Button]
    stop: gr.Button
    new: gr.Button


def _lay_out_object(pipeline, settings: Settings) -> _ObjectParts:
    reading = pipeline.reading_arguments(**settings.reading)
    missing = reading["missing_color"]  # of a model it may be (r, g, b), which is no choice here
    with gr.Row():
        upload = gr.File(
            file_count="multiple",
            label="Files of an object",
            height=132,
            scale=3,
            elem_id="upload",
        )
        with gr.Column(scale=1, min_width=150, elem_id="examples"):
            examples = [(gr.Button(path.name, size="sm"), path) for path in example_files()]
    choice = gr.Dropdown([], label="Object", visible=False)
    viewer = _viewer()
    facts = gr.HTML(facts_about(None), elem_id="facts")
    with gr.Row():
        view = gr.Radio([CLOUD, ATTENTION], value=CLOUD, label="View", scale=3)
        query = gr.Slider(
            0,
            pipeline.model.config.num_query_tokens,
            0,
            step=1,
            label="Query (0: all)",
            visible=False,
            scale=2,
        )
    scale = gr.HTML(scale_bar(), visible=False)
    with gr.Row():
        choices = {
            "up_axis": ([*UP_AXES, "auto"], reading["up_axis"] or "y"),
            "clean": (list(CLEANINGS), reading["clean"]),
            "missing_color": (list(NAMED_COLORS), missing if isinstance(missing, str) else "black"),
        }
        controls = {
            name: gr.Dropdown(choices[name][0], value=choices[name][1], label=label, min_width=90)
            for name, label in LABELS.items()
        }
    return _ObjectParts(upload, examples, choice, viewer, facts, view, query, scale, controls)


def _lay_out_conversation() -> _ConversationParts:
    chat = gr.Chatbot(
        label="Conversation",
        height="54vh",
        render_markdown=False,
        buttons=["copy"],
        placeholder="Ask anything about the object, or click a question below.",
        feedback_options=None,
    )
    question = gr.Textbox(
        label="Question",
        placeholder="Ask about the object",
        submit_btn=True,
        max_lines=4,
        elem_id="question",
    )
    with gr.Row():
        suggestions = [gr.Button(text, size="sm", min_width=140) for text in QUESTIONS]
    with gr.Row():
        stop, new = (gr.Button(text, size="sm", min_width=90) for text in ("Stop", "New object"))
    return _ConversationParts(chat, question, suggestions, stop, new)


def _connect(actions: Actions, session: gr.State, seen: _ObjectParts, asked: _ConversationParts):
    """Say what happens when something is clicked, dropped or chosen."""
    looks, controls = [seen.view, seen.query], [*seen.controls.values()]
    answer = [session, asked.chat, asked.question]
    shows = [session, seen.viewer, seen.view, seen.facts, asked.chat, seen.choice, seen.upload]
    # Reading waits for reading, and the model answers one question at a time; others wait in the queue.
    reads = {"concurrency_limit": 2, "concurrency_id": "reading", "show_progress": "minimal"}
    answers = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
    draw = {
        "fn": actions.draw,
        "inputs": [session, *looks, seen.controls["missing_color"]],
        "outputs": [seen.viewer, seen.facts],
        "show_progress": "hidden",
    }

    def show_surface(event):
        """A mesh is shown as a surface as soon as that is written."""
        event.success(actions.prefer_surface, session, seen.view, api_visibility="private").then(
            **draw, api_visibility="private"
        )

    show_surface(seen.upload.upload(actions.open, [session, seen.upload, *controls], shows, api_name="open", **reads))
    for button, path in seen.examples:
        example = gr.State(str(path))
        event = button.click(
            actions.open_example,
            [session, example, *controls],
            shows,
            api_visibility="private",
            **reads,
        )
        show_surface(event)
    show_surface(
        seen.choice.input(actions.choose, [session, seen.choice, *controls], shows, api_visibility="private", **reads)
    )
    for control in controls:
        event = control.input(actions.reread, [session, *controls], shows, api_visibility="private", **reads)
        event.then(**draw, api_visibility="private")
    seen.view.change(
        lambda view: (gr.update(visible=view == ATTENTION),) * 2,
        seen.view,
        [seen.query, seen.scale],
        api_visibility="private",
    )
    for look in looks:
        look.input(**draw, api_visibility="private")

    asked.question.submit(actions.ask, [session, asked.question], answer, api_name="ask", **answers)
    for button in asked.suggestions:
        button.click(actions.ask, [session, button], answer, api_visibility="private", **answers)
    asked.chat.retry(actions.retry, session, answer, api_visibility="private", **answers)
    asked.stop.click(actions.stop, session, None, queue=False, api_visibility="private")
    asked.new.click(actions.close, session, shows, api_name="close")
    asked.chat.clear(actions.forget, session, [session, asked.chat], api_visibility="private")


def _viewer() -> gr.HTML:
    script = file_url(STATIC / "viewer.js")
    return gr.HTML(
        None,
        elem_id="viewer",
        html_template='<div class="cloud-viewer"></div>',
        js_on_load=f"""
            const show = import(new URL({script!r}, document.baseURI))
              .then(({{ mount }}) => mount(element.querySelector(".cloud-viewer")));
            const draw = () => show.then((show) => show(props.value ? JSON.parse(props.value) : null));
            watch("value", draw);
            draw();
        """,
        apply_default_css=False,
    )
