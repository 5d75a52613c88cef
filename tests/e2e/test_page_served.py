"""The page of `minigpt3d demo`, served: through gradio's client, and in a browser."""

import io
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from repository import ROOT


pytest.importorskip("gradio", reason="the page needs gradio")

from minigpt3d import load_point_cloud
from minigpt3d.hub import default_model, load_model
from minigpt3d.page.layout import Settings, launch
from minigpt3d.page.shown import Objects
from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline


OBJECTS = ROOT / "demo" / "objects"
TABLE = OBJECTS / "oakTable.ply"
CONTROLS = ("y", "none", "black")
LONG = 60_000  # milliseconds; these machines have few cores


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page with the bundled model; afterwards it is checked that nothing left this machine."""
    addresses, is_watched = set(), [True]

    def watch(event, arguments):
        if is_watched[0] and event == "socket.connect" and isinstance(arguments[1], tuple):
            addresses.add(arguments[1][0])

    sys.addaudithook(watch)  # it cannot be removed
    model, processor = load_model(default_model())
    pipeline, lock = PointCloudToTextPipeline(model=model, processor=processor, device="cpu"), threading.Lock()
    with pytest.MonkeyPatch.context() as patch, Objects(pipeline, lock) as objects:
        patch.setenv("GRADIO_TEMP_DIR", "")  # restored afterwards
        settings = Settings("household", {}, 60)
        app, url, _ = launch(pipeline, objects, lock, settings, prevent_thread_lock=True)
        yield url
        app.blocks.close()
    is_watched[0] = False
    assert addresses <= {"127.0.0.1", "localhost", "::1"}


# ---- Through gradio's client ----------------------------------------------------------------------------------------


@pytest.fixture
def client(served):
    from gradio_client import Client

    return Client(served, verbose=False)


def open_files(client, *paths):
    """The text about what was opened."""
    from gradio_client import handle_file

    _, _, facts, *_ = client.predict([handle_file(path) for path in paths], *CONTROLS, api_name="/open")
    return facts


def ask(client, question):
    """The texts of the chat, in each of its states."""
    job = client.submit(question, api_name="/ask")
    job.result(timeout=LONG / 1000)
    return [[content_of(message) for message in chat] for chat, _ in job.outputs()]


def content_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_a_client_asks_about_a_file(client):
    assert "8,192 points" in open_files(client, TABLE)
    states = ask(client, "What is this?")
    assert states[-1][0] == "What is this?" and "table" in states[-1][1]
    assert len({state[-1] for state in states}) > 2, "the answer is streamed"
    states = ask(client, "What color is it?")
    assert len(states[-1]) == 4 and "brown" in states[-1][3]


def test_a_mesh_comes_with_its_textures(client):
    assert "with color" in open_files(
        client, *(OBJECTS / f"osakaChair.{suffix}" for suffix in ("obj", "mtl")), OBJECTS / "Wood_013_COLOR.jpg"
    )
    assert "chair" in ask(client, "What is this?")[-1][1]


def test_a_client_gets_the_sentence_about_a_broken_file(client, tmp_path):
    (tmp_path / "broken.ply").write_bytes(TABLE.read_bytes()[:3000])
    facts = open_files(client, tmp_path / "broken.ply")
    assert "broken.ply: " in facts and "Traceback" not in facts and str(tmp_path) not in facts
    assert "object first" in ask(client, "What is this?")[-1][-1]


def test_two_visitors_have_objects_of_their_own(served):
    from gradio_client import Client

    first, second = (Client(served, verbose=False) for _ in range(2))
    open_files(first, TABLE)
    open_files(second, OBJECTS / "drawersCabinet.npy")
    jobs = [client.submit("What is this?", api_name="/ask") for client in (first, second)]
    answers = [content_of(job.result(timeout=LONG / 1000)[0][-1]) for job in jobs]
    assert "table" in answers[0] and "cabinet" in answers[1]


# ---- In a browser ---------------------------------------------------------------------------------------------------

SHADERS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox")  # WebGL without a GPU


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SHADERS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, served):
    """`visit(**settings)` opens the page in a new window; what goes wrong in it, or leaves this machine, fails the test."""
    problems, contexts = [], []

    def open_page(**settings):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if is_local(request.url, served) else problems.append(request.url))
        page.goto(served)
        page.wait_for_selector("#viewer canvas")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def is_local(url, served):
    return url.startswith((served, "data:", "blob:"))


def drop(page, *paths):
    """Drop files as a mouse would do it."""
    page.set_input_files("#upload input[type=file]", [str(path) for path in paths])


def wait_for_view(page, state):
    page.wait_for_selector(f'#viewer [data-state="{state}"]', state="attached")


def pixels(page):
    """What the view shows, (H, W, 3) uint8, once it stands still."""
    from PIL import Image

    before = None
    for _ in range(50):
        image = np.asarray(Image.open(io.BytesIO(page.locator("#viewer canvas").screenshot())).convert("RGB"))
        if before is not None and np.array_equal(image, before):
            return image
        before = image
        time.sleep(0.2)
    raise AssertionError("the view does not come to rest")


def share_of(image, color, within=12):
    """The share of pixels (H, W, 3) of about this color, (3,) or one for each pixel."""
    return (np.abs(image.astype(int) - color).max(-1) <= within).mean()


def read_chat(page, word):
    page.wait_for_function(
        "word => document.querySelector('[aria-label=\"chatbot conversation\"]').innerText.includes(word)", arg=word
    )


def picture(page, name):
    """Keep a screenshot if PICTURES says where, to look at."""
    if folder := os.environ.get("PICTURES"):
        page.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.slow
def test_an_object_is_seen_turned_and_asked_about(visit):
    page = visit()
    empty = pixels(page)
    drop(page, TABLE)
    wait_for_view(page, "cloud")
    cloud = pixels(page)
    rgb = np.round(255 * load_point_cloud(TABLE)[:, 3:]).astype(int)
    common = np.median(rgb, axis=0)
    assert share_of(cloud, common, 20) > share_of(empty, common, 20) + 0.01, "the points have their color"
    page.fill("#question textarea", "What is this?")
    page.keyboard.press("Enter")
    read_chat(page, "table")
    picture(page, "asked")
    box = page.locator("#viewer canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 320, box["y"] + 260, steps=4)
    page.mouse.up()
    turned = pixels(page)
    assert (turned != cloud).any(-1).mean() > 0.02
    page.locator("#viewer canvas").focus()
    page.keyboard.press("ArrowLeft")
    assert (pixels(page) != turned).any(-1).mean() > 0.01, "keys turn it too"
    page.keyboard.press("Home")
    inside = slice(10, -10), slice(10, -10)  # of the frame around what has the focus
    assert share_of(pixels(page)[inside], cloud[inside], within=40) > 0.99, "and back"


@pytest.mark.slow
def test_surface_and_attention_are_shown(visit):
    page = visit()
    page.get_by_role("button", name="osakaChair.obj").click()
    wait_for_view(page, "surface")
    surface = pixels(page)
    picture(page, "surface")
    page.get_by_label("Attention").click()
    wait_for_view(page, "heat")
    heat = pixels(page)
    picture(page, "attention")
    assert (heat != surface).any(-1).mean() > 0.02
    page.get_by_label("Query (0: all)").first.fill("3")
    page.keyboard.press("Enter")
    page.wait_for_timeout(3000)
    assert (pixels(page) != heat).any(-1).mean() > 0.002, "each query has its own colors"
    page.get_by_label("Up axis of the file").click()
    page.get_by_role("option", name="z").click()
    page.wait_for_function("document.querySelector('#facts').innerText.includes('z up')")
    wait_for_view(page, "heat")


@pytest.mark.slow
def test_a_broken_file_gives_its_sentence_and_the_page_goes_on(visit, tmp_path):
    (tmp_path / "broken.ply").write_bytes(TABLE.read_bytes()[:3000])
    page = visit()
    drop(page, tmp_path / "broken.ply")
    page.wait_for_selector("#facts .error")
    text = page.locator("#facts").inner_text()
    assert "broken.ply" in text and "Traceback" not in text and str(tmp_path) not in text
    picture(page, "broken")
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    assert page.locator("#facts .error").count() == 0


@pytest.mark.slow
def test_two_tabs_at_the_same_time(visit):
    pages, names = [visit(), visit()], ["oakTable.ply", "drawersCabinet.npy"]
    for page, name in zip(pages, names, strict=True):
        page.get_by_role("button", name=name).click()
    for page in pages:
        wait_for_view(page, "cloud")
        page.get_by_role("button", name="Caption this 3D model in detail.").click()
    for page, word in zip(pages, ("table", "cabinet"), strict=True):
        read_chat(page, word)


@pytest.mark.slow
def test_an_answer_is_stopped_and_a_new_object_begins_anew(visit):
    page = visit()
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    page.get_by_role("button", name="What is this?").click()
    read_chat(page, "table")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="New object").click()
    wait_for_view(page, "empty")
    assert "table" not in page.locator('[aria-label="chatbot conversation"]').inner_text()


@pytest.mark.slow
def test_a_narrow_dark_screen_without_motion(visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark", reduced_motion="reduce")
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is cut off"
    assert pixels(page).mean() < 90, "it is dark"
    picture(page, "narrow")
    page.fill("#question textarea", "What color is it?")
    page.keyboard.press("Enter")
    read_chat(page, "brown")
