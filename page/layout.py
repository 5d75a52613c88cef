"""The layout of the page, and what happens when something is clicked."""

import base64
import json
import os
import re
import threading
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
from starlette.middleware import Middleware

from minigpt3d.cleaning_minigpt3d import CLEANINGS
from minigpt3d.evaluation.attention import Attention, measure_attention, spread
from minigpt3d.messages import one_line
from minigpt3d.point_cloud_minigpt3d import NAMED_COLORS, READABLE_SUFFIXES, UP_AXES

from .shown import Objects, ShownObject, example_files
from .streaming import Answerer, Stop


STATIC = Path(__file__).resolve().parent / "static"
QUESTIONS = ("What is this?", "What color is it?", "What is it used for?", "Caption this 3D model in detail.")
# Of the controls, by the argument of `load_point_cloud`.
LABELS = {"up_axis": "Up axis of the file", "clean": "Remove", "missing_color": "Missing color"}
CLOUD, SURFACE, ATTENTION = "Cloud", "Surface", "Attention"
NO_OBJECT = "Choose an object first: drop a file, or click an example."
# The browser connects to nothing but the server of this page.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:"
)
CSS = """
#viewer { height: clamp(260px, 50vh, 620px); background: var(--background-fill-secondary); border-radius: var(--radius-lg);
  border: 1px solid var(--border-color-primary); overflow: hidden; padding: 0 }
#viewer .cloud-viewer { position: absolute; inset: 0 }
#viewer canvas { display: block; touch-action: none; cursor: grab }
#viewer canvas:active { cursor: grabbing }
#viewer canvas:focus-visible { outline: 3px solid var(--color-accent); outline-offset: -3px }
#viewer [data-state="loading"] { opacity: 0.4 }
#examples { gap: 0.4em }
#facts ul { margin: 0.25em 0 0 1.2em; list-style: disc }
#facts .error { color: var(--error-text-color, #b91c1c); font-weight: 600 }
#scale { display: flex; gap: 0.6em; align-items: center; font-size: var(--text-sm) }
#scale i { flex: 1; height: 0.7em; border-radius: 0.35em }
footer { display: none !important }
@media (prefers-reduced-motion: reduce) { *, *::before, *::after { animation: none !important; transition: none !important } }
"""


@dataclass
class Session:
    """What one visitor has open."""

    files: list[Path] = field(default_factory=list)
    path: Path | None = None
    shown: ShownObject | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    attention: Attention | None = None
    stop: Stop | None = None


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
        footer_links=[],
        allowed_paths=[str(STATIC), str(objects.folder)],
        max_file_size="1gb",
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),
        css=CSS,
        app_kwargs={"middleware": [Middleware(_ContentPolicy)]},
        **server,
    )


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
    actions = _Actions(pipeline, objects, lock, settings.max_new_tokens)
    with gr.Blocks(title="MiniGPT-3D", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# MiniGPT-3D\nAsk a small language model about a 3D object. Model: `{settings.model}`")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                seen = _lay_out_object(pipeline, settings)
            with gr.Column(scale=4, min_width=320):
                asked = _lay_out_conversation()
        _connect(actions, gr.State(Session()), seen, asked)
    return page.queue(default_concurrency_limit=4)


@dataclass(frozen=True)
class _ObjectParts:
    """What shows an object. `controls` are the choices of `LABELS`, in its order; `examples` are buttons with their files."""

    upload: gr.File
    examples: list[tuple[gr.Button, Path]]
    choice: gr.Dropdown
    viewer: gr.HTML
    facts: gr.HTML
    view: gr.Radio
    query: gr.Slider
    scale: gr.HTML
    controls: list[gr.Dropdown]


@dataclass(frozen=True)
class _ConversationParts:
    chat: gr.Chatbot
    question: gr.Textbox
    suggestions: list[gr.Button]
    stop: gr.Button
    new: gr.Button


def _lay_out_object(pipeline, settings: Settings) -> _ObjectParts:
    reading = pipeline.reading_arguments(**settings.reading)
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
    facts = gr.HTML(_facts(None), elem_id="facts")
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
    scale = gr.HTML(_scale_bar(), visible=False)
    with gr.Row():
        choices = {
            "up_axis": ([*UP_AXES, "auto"], reading["up_axis"] or "y"),
            "clean": (list(CLEANINGS), reading["clean"]),
            "missing_color": (list(NAMED_COLORS), _color_name(reading["missing_color"])),
        }
        controls = [
            gr.Dropdown(values, value=value, label=LABELS[name], min_width=90)
            for name, (values, value) in choices.items()
        ]
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


def _connect(actions: "_Actions", session: gr.State, seen: _ObjectParts, asked: _ConversationParts):
    """Say what happens when something is clicked, dropped or chosen."""
    looks = [seen.view, seen.query]
    answer = [session, asked.chat, asked.question]
    shows = [session, seen.viewer, seen.view, seen.facts, asked.chat, seen.choice, seen.upload]
    # Reading waits for reading, and the model answers one question at a time; others wait in the queue.
    reads = {"concurrency_limit": 2, "concurrency_id": "reading", "show_progress": "minimal"}
    answers = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
    draw = {
        "fn": actions.draw,
        "inputs": [session, *looks, seen.controls[2]],
        "outputs": [seen.viewer, seen.facts],
        "show_progress": "hidden",
    }

    def show_surface(event):
        """A mesh is shown as a surface as soon as that is written."""
        event.success(actions.prefer_surface, session, seen.view, api_visibility="private").then(
            **draw, api_visibility="private"
        )

    show_surface(
        seen.upload.upload(actions.open, [session, seen.upload, *seen.controls], shows, api_name="open", **reads)
    )
    for button, path in seen.examples:
        example = gr.State(str(path))
        event = button.click(
            actions.open_example,
            [session, example, *seen.controls],
            shows,
            api_visibility="private",
            **reads,
        )
        show_surface(event)
    show_surface(
        seen.choice.input(
            actions.choose, [session, seen.choice, *seen.controls], shows, api_visibility="private", **reads
        )
    )
    for control in seen.controls:
        event = control.input(actions.reread, [session, *seen.controls], shows, api_visibility="private", **reads)
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


def _color_name(color) -> str:
    return color if isinstance(color, str) else "black"


def _viewer() -> gr.HTML:
    script = f"gradio_api/file={(STATIC / 'viewer.js').as_posix()}"
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


class _Actions:
    """What the page calls; each takes and returns the values of components."""

    def __init__(self, pipeline, objects: Objects, lock: threading.Lock, max_new_tokens: int):
        self._pipeline, self._objects, self._lock = pipeline, objects, lock
        self._answerer = Answerer(pipeline, lock, max_new_tokens)

    # ---- Objects ----

    def open(self, session: Session, uploads: list[str], up_axis: str, clean: str, missing: str):
        """Read the files that were dropped together; the first object is shown."""
        session.files = self._objects.gather(uploads)
        return self.choose(session, session.files[0].name, up_axis, clean, missing)

    def open_example(self, session: Session, path: str, *controls: str):
        session.files = [Path(path)]
        return self.choose(session, session.files[0].name, *controls)

    def choose(self, session: Session, name: str, *controls: str):
        """Read one of the files."""
        session.path = next(path for path in session.files if path.name == name)
        return self._read(session, *controls, view=CLOUD)

    def reread(self, session: Session, up_axis: str, clean: str, missing: str):
        """Read the file again; the conversation begins anew, since the model sees another cloud."""
        return self._read(session, up_axis, clean, missing)

    def _read(self, session: Session, up_axis: str, clean: str, missing: str, **view: str):
        self.stop(session)
        session.turns, session.shown, session.attention, error = [], None, None, None
        if session.path is not None:
            try:
                session.shown = self._objects.read(session.path, up_axis=up_axis, clean=clean, missing_color=missing)
            except ValueError as failure:
                error = str(failure)
        return self._state(session, _facts(session.shown, error), **view)

    def close(self, session: Session):
        """Forget the object and the conversation about it."""
        self.stop(session)
        session.files, session.path, session.shown, session.turns, session.attention = [], None, None, [], None
        return self._state(session, _facts(None), view=CLOUD)

    def _state(self, session: Session, facts: str, view: str | None = None) -> tuple:
        """Values of session, viewer, view (None: it stays), facts, chat, choice and upload, which takes the next files."""
        shown, names = session.shown, [path.name for path in session.files]
        has_faces = shown is not None and shown.facts.num_faces is not None
        value = {} if view is None else {"value": view}
        views = gr.Radio([CLOUD, SURFACE, ATTENTION] if has_faces else [CLOUD, ATTENTION], **value)
        choice = gr.Dropdown(names, value=session.path and session.path.name, visible=len(names) > 1)
        return session, _payload(shown, "cloud"), views, facts, [], choice, None

    # ---- View ----

    def prefer_surface(self, session: Session):
        """The value of the view: a mesh is shown as a surface, when the cloud is there already."""
        return SURFACE if session.shown is not None and session.shown.facts.num_faces is not None else CLOUD

    def draw(self, session: Session, view: str, query: int, missing: str) -> tuple:
        """Values of viewer and facts."""
        shown = session.shown
        if shown is None:
            return gr.skip(), gr.skip()
        try:
            if view == SURFACE:
                surface = self._objects.surface(shown, missing)
                return _payload(shown, "surface", surface=f"gradio_api/file={surface.as_posix()}"), _facts(shown)
            if view == ATTENTION:
                return _payload(shown, "heat", heat=self._heat(session, int(query))), _facts(shown)
        except ValueError as error:
            return _payload(shown, "cloud"), _facts(shown, str(error))
        return _payload(shown, "cloud"), _facts(shown)

    def _heat(self, session: Session, query: int) -> np.ndarray:
        """Colors (P, 3) uint8 of the attention of a query, counted from 1, or of all (0)."""
        shown = session.shown
        if session.attention is None:
            with self._lock:
                session.attention = measure_attention(self._pipeline.model, shown.cloud)
        at_points = spread(session.attention, shown.cloud[:, :3])  # (Q, P)
        values = at_points.mean(0) if query == 0 else at_points[query - 1]
        return _heat_colors(values / values.max())

    # ---- Conversation ----

    def ask(self, session: Session, question: str, sample: bool = False):
        """Stream session, chat and the content of the question's box."""
        question = question.strip()
        chat = _chat(session.turns)
        if session.shown is None or not question:
            note = [{"role": "assistant", "content": NO_OBJECT}] if question else []
            yield session, chat + note, gr.skip()
            return
        session.stop = stop = Stop()
        before, text = list(session.turns), ""
        yield session, _chat([*before, (question, "…")]), ""
        try:
            for text in self._answerer.stream(session.shown.cloud, before, question, stop, sample):
                yield session, _chat([*before, (question, text)]), gr.skip()
        except Exception as error:  # out of memory, for example
            yield session, _chat([*before, (question, f"No answer: {one_line(error)}")]), gr.skip()
            return
        session.turns = [*before, (question, text)]
        yield session, _chat(session.turns), gr.skip()

    def retry(self, session: Session):
        """Ask the last question again; the answer is drawn at random, since the likeliest one would be the same."""
        if not session.turns:
            yield session, gr.skip(), gr.skip()
            return
        question, _ = session.turns.pop()
        yield from self.ask(session, question, sample=True)

    def stop(self, session: Session):
        """End the answer that is being written; what there is of it stays."""
        if session.stop is not None:
            session.stop.asked = True

    def forget(self, session: Session):
        session.turns = []
        return session, []


def _chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    pairs = (zip(("user", "assistant"), turn, strict=True) for turn in turns)
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


# ---- What the browser gets ------------------------------------------------------------------------------------------


def _payload(shown: ShownObject | None, view: str, surface: str | None = None, heat: np.ndarray | None = None) -> str:
    """What static/viewer.js shows, as JSON."""
    if shown is None:
        return ""
    rgb = np.rint(255 * shown.cloud[:, 3:]).astype(np.uint8)
    return json.dumps(
        {
            "name": shown.name,
            "view": view,
            "up": shown.up_axis,
            "coord": _base64(shown.cloud[:, :3].astype("<f4")),
            "color": _base64(rgb),
            "heat": None if heat is None else _base64(heat),
            "surface": surface,
        }
    )


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _heat_colors(values: np.ndarray) -> np.ndarray:
    """Values (P,) in [0, 1] → (P, 3) uint8 in the colors of `minigpt3d look`."""
    from matplotlib import colormaps

    return colormaps["viridis"](values, bytes=True)[:, :3]


def _scale_bar() -> str:
    colors = ", ".join("rgb({}, {}, {})".format(*color) for color in _heat_colors(np.linspace(0, 1, 9)))
    return f'<div id="scale">no attention <i style="background: linear-gradient(to right, {colors})"></i> most</div>'


def _facts(shown: ShownObject | None, error: str | None = None) -> str:
    """What is known about an object, and every warning, as HTML."""
    parts = []
    if error is not None:
        parts.append(f'<p class="error" role="alert">{escape(error)}</p>')
    if shown is None:
        if error is None:
            parts.append(f"<p>No object yet. Files of these types are read: {escape(' '.join(READABLE_SUFFIXES))}</p>")
        return "".join(parts)
    facts = shown.facts
    count = f"{facts.num_points:,} points" if facts.num_faces is None else f"{facts.num_faces:,} faces"
    color = "with color" if facts.has_color else "without color"
    parts.append(
        f"<p><b>{escape(shown.name)}</b>: {count}, {color}; the model sees {len(shown.cloud):,} points"
        f"{f', {shown.up_axis} up' if shown.up_axis else ''}.</p>"
    )
    if shown.warnings:
        lines = "".join(f"<li>{escape(_with_labels(text))}</li>" for text in shown.warnings)
        parts.append(f'<ul role="status">{lines}</ul>')
    return "".join(parts)


def _with_labels(text: str) -> str:
    """A library's message with every argument in backticks replaced by the label of its control."""
    return re.sub(r"`(\w+)`", lambda match: f"“{LABELS[match[1]]}”" if match[1] in LABELS else match[0], text)
