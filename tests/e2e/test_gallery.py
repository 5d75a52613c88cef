"""The page of `minigpt3d describe --out FILE.html` in a browser: its script searches, filters and orders."""

import base64
import io

import pytest
from browsers import chromium
from PIL import Image

from minigpt3d.catalog.gallery import write_gallery
from minigpt3d.catalog.rows import NOT_SURE, Question, columns


LONG = 60_000  # ms


def picture() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 40, 40)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def row(file: str, kind: str | None, confidence: float | None, color: str, **more) -> dict:
    facts = {
        "num_points": 50,
        "num_faces": None,
        "has_color": True,
        "up_axis": None,
        "sides": dict.fromkeys("xyz", 1.0),
    }
    texts = {"answer": f"This is a {color} {kind}.", "warnings": [], "thumbnail": None, "error": None}
    return {"file": file, "kind": kind, "confidence": confidence, "colors": {color: 0.9}} | facts | texts | more


ROWS = [
    row("attic/chair10.ply", "chair", 0.9, "red", picture=picture()),
    row("attic/chair2.ply", "chair", 0.6, "blue", warnings=["chair2.ply: it has no color"]),
    row("Étagère.ply", "shelf", 0.8, "red"),
    row("odd.ply", NOT_SURE, 0.2, "gray"),
    row("broken.ply", None, None, "red", colors=None, answer=None, error="broken.ply: it is empty (0 bytes)."),
]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "gallery.html"
    write_gallery(path, ROWS, columns([Question("answer", "What is this?")], has_nodes=False), "My objects")
    problems = []
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url),
        )
        page.goto(path.as_uri())
        yield page
        assert problems == []


def shown(page) -> list[str]:
    """The names of the cards that are seen, in their order."""
    return page.evaluate(
        "[...document.querySelectorAll('.card')].filter(c => c.offsetHeight).map(c => c.dataset.name)"
    )


def test_a_gallery_is_searched_filtered_and_ordered(page):
    names = ["chair10.ply", "chair2.ply", "Étagère.ply", "odd.ply", "broken.ply"]
    assert shown(page) == names and page.inner_text("#count") == "5 objects"
    assert page.evaluate("document.querySelector('.card img').naturalWidth") == 8
    kinds = page.locator("#kind option").all_inner_texts()
    assert kinds == ["every kind", "chair (2)", f"{NOT_SURE} (1)", "shelf (1)"]

    searches = {
        "etagere": names[2:3], "RED chair": names[:1], "attic": names[:2], "red": [names[0], names[2]], "no color": names[1:2],
        "empty": names[4:], "unicorn": [], "": names,
    }  # fmt: skip
    for text, found in searches.items():
        page.fill("#search", text)
        assert shown(page) == found, text
        assert page.is_visible("#nothing") == (not found)
        assert page.inner_text("#count").startswith(f"{len(found)} of 5" if found != names else "5 objects")

    for field, value, found in (
        ("kind", "chair", names[:2]), ("color", "red", [names[0], names[2]]), ("state", "warned", names[1:2]),
        ("state", "failed", names[4:]),
    ):  # fmt: skip
        page.select_option(f"#{field}", value)
        assert shown(page) == found
        page.fill("#search", "chair")  # together with a search
        assert shown(page) == [name for name in found if name.startswith("chair")]
        page.fill("#search", "")
        page.select_option(f"#{field}", "")

    orders = {
        "name": ["broken.ply", "chair2.ply", "chair10.ply", "Étagère.ply", "odd.ply"],
        "unsure": ["odd.ply", "chair2.ply", "Étagère.ply", "chair10.ply", "broken.ply"],
        "kind": ["broken.ply", "chair2.ply", "chair10.ply", "odd.ply", "Étagère.ply"],
        "": names,
    }
    for order, expected in orders.items():
        page.select_option("#order", order)
        assert shown(page) == expected, order

    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search" and page.input_value("#search") == ""
    page.keyboard.type("odd/")
    page.keyboard.press("Enter")
    assert page.input_value("#search") == "odd/" and shown(page) == []
