"""What happens when something is clicked, dropped or chosen on the page."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
import numpy as np

from minigpt3d.evaluation.attention import Attention, measure_attention, spread
from minigpt3d.messages import one_line

from .content import LABELS, chat_about, facts_about, heat_colors, object_to_show
from .shown import Objects, ShownObject
from .streaming import Answerer, Stop


CLOUD, SURFACE, ATTENTION = "Cloud", "Surface", "Attention"
NO_OBJECT = "Choose an object first: drop a file, or click an example."
NO_ANSWER = "No answer"


@dataclass
class Session:
    """What one visitor has open.

    Args:
        files: that were dropped together.
        path: the one that is shown, or is being read.
        shown: None until it is read.
        attention: to `shown`; None until it is asked for.
        turns: questions and answers about `shown`.
        unanswered: the last question, if it got no answer.
        stop: of the answer that is being written.
        reading: of the object that is being read; another object makes another one.
    """

    files: list[Path] = field(default_factory=list)
    path: Path | None = None
    shown: ShownObject | None = None
    attention: Attention | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    unanswered: str | None = None
    stop: Stop | None = None
    reading: object = None


class Actions:
    """What the page calls; each takes and returns the values of components.

    Reading, drawing and answering take their time, and the visitor may go on meanwhile. What is no longer wanted when it is
    ready is dropped.

    Args:
        pipeline: `PointCloudToTextPipeline`.
        lock: held while the model computes.
        max_new_tokens: of an answer.
    """

    def __init__(self, pipeline, objects: Objects, lock: threading.Lock, max_new_tokens: int):
        self._pipeline, self._objects, self._lock = pipeline, objects, lock
        self._answerer = Answerer(pipeline, lock, max_new_tokens)

    # ---- Objects ----

    def open(self, session: Session, uploads: list[str], up_axis: str, clean: str, missing_color: str):
        """Read the files that were dropped together; the first object is shown."""
        files = self._objects.gather(uploads)
        return self._open(session, files, up_axis, clean, missing_color)

    def open_example(self, session: Session, path: str, *controls: str):
        """Read one of the files that ship."""
        return self._open(session, [Path(path)], *controls)

    def choose(self, session: Session, name: str, *controls: str):
        """Read another one of the files that were dropped together."""
        session.path = next(path for path in session.files if path.name == name)
        return self._read(session, *controls, view=CLOUD)

    def reread(self, session: Session, *controls: str):
        """Read the file again; the conversation begins anew, since the model sees another cloud."""
        return self._read(session, *controls)

    def close(self, session: Session):
        """Forget the object and the conversation about it."""
        self.leave(session)
        return self._state(session, view=CLOUD)

    def leave(self, session: Session):
        """Forget the object, the conversation about it and the files."""
        self._begin_anew(session)
        self._objects.remove(session.files)
        session.files, session.path = [], None

    def _open(self, session: Session, files: list[Path], *controls: str):
        self.leave(session)
        session.files, session.path = files, files[0]
        return self._read(session, *controls, view=CLOUD)

    def _read(self, session: Session, *controls: str, view: str | None = None) -> tuple:
        reading = self._begin_anew(session)
        shown = error = None
        if session.path is not None:
            try:
                shown = self._objects.read(session.path, **dict(zip(LABELS, controls, strict=True)))
            except ValueError as failure:
                error = str(failure)
        if session.reading is not reading:
            return (gr.skip(),) * 7
        session.shown = shown
        return self._state(session, error, view)

    def _begin_anew(self, session: Session) -> object:
        """Forget what is shown and said; returns what `session.reading` is until the next time."""
        self.forget(session)
        session.shown = session.attention = None
        session.reading = object()
        return session.reading

    def _state(self, session: Session, error: str | None = None, view: str | None = None) -> tuple:
        """Values of session, viewer, view (None: it stays), facts, chat, choice and upload, which takes the next files."""
        shown, names = session.shown, [path.name for path in session.files]
        value = {} if view is None else {"value": view}
        views = gr.Radio([CLOUD, SURFACE, ATTENTION] if _has_surface(shown) else [CLOUD, ATTENTION], **value)
        choice = gr.Dropdown(names, value=session.path and session.path.name, visible=len(names) > 1)
        return session, object_to_show(shown, "cloud"), views, facts_about(shown, error), [], choice, None

    # ---- View ----

    def prefer_surface(self, session: Session):
        """The value of the view: a mesh is shown as a surface, when the cloud is there already."""
        return SURFACE if _has_surface(session.shown) else CLOUD

    def draw(self, session: Session, view: str, query: int, missing_color: str) -> tuple:
        """Values of viewer and facts."""
        shown = session.shown
        if shown is None:
            return gr.skip(), gr.skip()
        content, error = object_to_show(shown, "cloud"), None
        try:
            if view == SURFACE:
                content = object_to_show(shown, "surface", surface=self._objects.surface(shown, missing_color))
            elif view == ATTENTION:
                content = object_to_show(shown, "heat", heat=self._heat(session, shown, int(query)))
        except ValueError as failure:
            error = str(failure)
        if session.shown is not shown:
            return gr.skip(), gr.skip()
        return content, facts_about(shown, error)

    def _heat(self, session: Session, shown: ShownObject, query: int) -> np.ndarray:
        """Colors (P, 3) uint8 of the attention of a query, counted from 1, or of all (0)."""
        attention = session.attention
        if attention is None:
            with self._lock:
                attention = measure_attention(self._pipeline.model, shown.cloud)
            if session.shown is shown:
                session.attention = attention
        at_points = spread(attention, shown.cloud[:, :3])  # (Q, P)
        values = at_points.mean(0) if query == 0 else at_points[query - 1]
        return heat_colors(values / values.max())

    # ---- Conversation ----

    def ask(self, session: Session, question: str, sample: bool = False):
        """Stream session, chat and the content of the question's box."""
        question = question.strip()
        if session.shown is None or not question:
            note = [{"role": "assistant", "content": NO_OBJECT}] if question else []
            yield session, chat_about(session.turns) + note, gr.skip()
            return
        session.stop = stop = Stop()
        session.unanswered = question
        before, text, problem = list(session.turns), "", NO_ANSWER
        yield session, chat_about([*before, (question, "…")]), ""
        try:
            for text in self._answerer.stream(session.shown.cloud, before, question, stop, sample):
                if session.stop is not stop:
                    break
                yield session, chat_about([*before, (question, text)]), gr.skip()
        except Exception as error:  # out of memory, for example
            text, problem = "", f"{NO_ANSWER}: {one_line(error)}"
        if session.stop is not stop:  # the browser keeps what comes last, so it must be what is said now
            yield session, chat_about(session.turns), gr.skip()
            return
        if text:
            session.turns, session.unanswered = [*before, (question, text)], None
        yield session, chat_about([*before, (question, text or problem)]), gr.skip()

    def retry(self, session: Session):
        """Ask the last question again; if it was answered, the answer is drawn at random, since the likeliest one would be the
        same."""
        was_answered = session.unanswered is None
        if was_answered and not session.turns:
            yield session, gr.skip(), gr.skip()
            return
        question = session.turns.pop()[0] if was_answered else session.unanswered
        yield from self.ask(session, question, sample=was_answered)

    def stop(self, session: Session):
        """End the answer that is being written; what there is of it stays."""
        if session.stop is not None:
            session.stop.asked = True

    def forget(self, session: Session):
        """Forget the conversation, also an answer that is being written."""
        self.stop(session)
        session.turns, session.unanswered, session.stop = [], None, None
        return session, []


def _has_surface(shown: ShownObject | None) -> bool:
    return shown is not None and shown.facts.num_faces is not None
