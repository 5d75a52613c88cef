"""The page of `minigpt3d demo`, served: through gradio's client, and in a browser."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from hub_double import serve
from repository import ROOT
from tiny_model import make_tiny_model
from ways_in import make_processor


pytest.importorskip("gradio", reason="the page needs gradio")

from minigpt3d import load_point_cloud
from minigpt3d.hub import default_model, load_model
from minigpt3d.page.layout import Settings, launch
from minigpt3d.page.shown import Objects
from minigpt3d.page.space import write_space
from minigpt3d.page.streaming import Stop
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


def test_only_names_of_this_machine_are_served(served):
    """A page elsewhere, whose name is made to lead here, gets nothing (DNS rebinding)."""
    port = urlsplit(served).port
    assert [
        httpx.get(served, headers={"Host": f"{name}:{port}"}).status_code for name in ("127.0.0.1", "evil.example")
    ] == [200, 400]


# ---- A Space --------------------------------------------------------------------------------------------------------


def save_adapter(folder):
    """The files of a tiny model, and those of an adapter for it, which is named org/base."""
    from peft import LoraConfig, get_peft_model

    base = make_tiny_model()
    base.save_pretrained(folder / "base")
    make_processor().save_pretrained(folder / "base")
    get_peft_model(base, LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)).save_pretrained(
        folder / "adapter"
    )
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/base"
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return [
        {
            path.relative_to(folder / name).as_posix(): path.read_bytes()
            for path in (folder / name).rglob("*")
            if path.is_file()
        }
        for name in ("base", "adapter")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", [None, "org/adapter"])
def test_a_space_runs(tmp_path, model):
    """With its own code: the bundled model, and an adapter that is on the Hub, as its base is."""
    from gradio_client import Client

    write_space(tmp_path / "space", model, ["--max-new-tokens", "20"])
    actions = tmp_path / "space" / "minigpt3d" / "page" / "actions.py"
    actions.write_text(actions.read_text().replace("Choose an object first", "Nothing to see in this Space"))
    with serve() as hub:
        for name, files in zip(("base", "adapter"), save_adapter(tmp_path), strict=True):
            hub.add("models", f"org/{name}", files)
        offline = {"HF_HUB_OFFLINE": "1"} if model is None else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address}
        environment = os.environ | offline | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
        with subprocess.Popen(
            [sys.executable, "app.py"], cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, text=True
        ) as running:
            try:
                url = next((line.split()[4] for line in running.stdout if line.startswith("The page is at")), None)
                assert url is not None, f"it ended with {running.wait()}"
                client = Client(url.replace("0.0.0.0", "127.0.0.1"), verbose=False)
                assert "in this Space" in ask(client, "What is this?")[-1][0], "it runs its own code"
                open_files(client, TABLE)
                answer = ask(client, "What is this?")[-1][1]
                assert "table" in answer if model is None else not answer.startswith("No answer")
            finally:
                running.terminate()


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

    def open_page(init_script="", **settings):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings))
        contexts[-1].add_init_script(init_script)
        page = contexts[-1].new_page()
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if is_local(request.url, served) else problems.append(request.url))
        page.on("requestfailed", lambda request: problems.remove(request.url) if "csp" in request.failure else None)
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


@pytest.fixture
def slow_answers(monkeypatch):
    """Half a second for each token."""
    look = Stop.__call__

    def wait(self, *arguments, **more):
        time.sleep(0.5)
        return look(self, *arguments, **more)

    monkeypatch.setattr(Stop, "__call__", wait)


def read_messages(page):
    return page.locator('[aria-label="chatbot conversation"] .message').all_inner_texts()


@pytest.mark.slow
def test_stop_keeps_what_there_is_of_an_answer(visit, slow_answers):
    page = visit()
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    page.get_by_role("button", name="Caption this 3D model in detail.").click()
    page.wait_for_function(
        "document.querySelectorAll('[data-testid=bot]').length && !document.querySelector('[data-testid=bot]').innerText.includes('…')"
    )
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(3000)
    stopped = read_messages(page)
    page.wait_for_timeout(3000)
    assert read_messages(page) == stopped and 0 < len(stopped[-1].split()) < 8, "ten words take longer"


@pytest.mark.slow
@pytest.mark.parametrize("button", ["New object", "Clear"])
def test_an_answer_that_is_no_longer_wanted_does_not_come(visit, slow_answers, button):
    page = visit()
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    page.get_by_role("button", name="Caption this 3D model in detail.").click()
    page.wait_for_selector("[data-testid=bot]")
    page.get_by_role("button", name=button).first.click()
    if button == "New object":
        wait_for_view(page, "empty")
    page.wait_for_timeout(4000)
    assert read_messages(page) == []


@pytest.mark.slow
def test_texts_of_a_chat_are_no_markup(visit):
    page = visit()
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    text = "<img src=x onerror='window.ran = 1'><b>bold</b> & so on"
    page.fill("#question textarea", text)
    page.keyboard.press("Enter")
    read_chat(page, text)
    assert page.locator("[data-testid=user] :is(img, b)").count() == 0 and not page.evaluate("window.ran")


@pytest.mark.slow
def test_the_browser_sends_nothing_elsewhere(visit):
    page = visit()
    script = """async () => {
      const violated = [];
      document.addEventListener("securitypolicyviolation", (event) => violated.push(event.effectiveDirective));
      await fetch("http://127.0.0.1:9/").catch(() => {});
      const form = document.createElement("form");
      form.action = "http://127.0.0.1:9/";
      const image = new Image(), base = document.createElement("base");
      image.src = "http://127.0.0.1:9/", base.href = "http://127.0.0.1:9/";
      document.head.prepend(base), document.body.append(form, image), form.submit();
      await new Promise((done) => setTimeout(done, 1000));
      return violated;
    }"""
    assert {"connect-src", "form-action", "img-src", "base-uri"} <= set(page.evaluate(script))


@pytest.mark.slow
def test_controls_have_their_effect(visit, tmp_path):
    cloud = np.random.default_rng(0).uniform(-1, 1, (1000, 3))
    np.savetxt(tmp_path / "scan.xyz", np.concatenate([cloud, cloud[:3] + 50]))
    page = visit()
    drop(page, tmp_path / "scan.xyz")
    wait_for_view(page, "cloud")
    before = pixels(page)
    picture(page, "outliers")
    choose(page, "Remove", "outliers")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('removed 3 of 1,003 points')")
    cleaned = pixels(page)
    picture(page, "cleaned")
    black = (0, 0, 0)
    assert share_of(cleaned, black, 60) > 2 * share_of(before, black, 60), (
        "without outliers, the object fills the view"
    )
    choose(page, "Missing color", "white")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('all points are white')")
    assert share_of(pixels(page), black, 60) < share_of(cleaned, black, 60) / 2


def choose(page, label, value):
    page.get_by_label(label).click()
    page.get_by_role("option", name=value, exact=True).click()


@pytest.mark.slow
def test_several_objects_are_dropped(visit, tmp_path):
    xyz = np.random.default_rng(0).uniform(-1, 1, (2000, 3))
    colors = {"red": (1, 0, 0), "blue": (0, 0, 1)}
    for name, color in colors.items():
        np.save(
            tmp_path / f"{name}.npy",
            np.concatenate([xyz, np.tile(color, (2000, 1))], axis=1),
        )
    page = visit()
    drop(page, *(tmp_path / f"{name}.npy" for name in colors))
    wait_for_view(page, "cloud")
    red, blue = (np.multiply(color, 255) for color in colors.values())
    first = pixels(page)
    assert share_of(first, red, 80) > 0.05 and share_of(first, blue, 80) == 0
    choose(page, "Object", "blue.npy")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('blue.npy')")
    assert share_of(pixels(page), blue, 80) > 0.05
    drop(page, tmp_path / "red.npy")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('red.npy')")
    page.locator("#viewer canvas").press("ArrowLeft")
    turned = pixels(page)
    (tmp_path / "red.npy").write_bytes((tmp_path / "blue.npy").read_bytes())
    drop(page, tmp_path / "red.npy")
    end = time.monotonic() + LONG / 1000
    while share_of(again := pixels(page), blue, 80) < 0.05:
        assert time.monotonic() < end, "the second file of this name is not shown"
    assert share_of(turned, blue, 80) == 0
    points = [mask_of(image, color) for image, color in ((first, red), (turned, red), (again, blue))]
    as_first, as_turned = ((mask != points[2]).mean() for mask in points[:2])
    assert as_first < as_turned / 2, "another file of the same name is seen from the first direction"


def mask_of(image, color):
    """Which pixels (H, W, 3) have about this color."""
    return np.abs(image.astype(int) - color).max(-1) <= 80


COUNT_TEXTURES = """
window.textures = 0;
const { createTexture, deleteTexture } = WebGL2RenderingContext.prototype;
WebGL2RenderingContext.prototype.createTexture = function () { window.textures += 1; return createTexture.call(this); };
WebGL2RenderingContext.prototype.deleteTexture = function (texture) { window.textures -= 1; deleteTexture.call(this, texture); };
"""


@pytest.mark.slow
def test_a_surface_of_any_name_is_loaded_and_its_textures_are_freed(visit, tmp_path):
    chair = (OBJECTS / "osakaChair.obj").read_text()
    (tmp_path / "50% #1 chair.obj").write_text(chair)
    page = visit(init_script=COUNT_TEXTURES)
    drop(page, tmp_path / "50% #1 chair.obj", OBJECTS / "osakaChair.mtl", OBJECTS / "Wood_013_COLOR.jpg")
    wait_for_view(page, "surface")
    counts = []
    for label, state in (("Cloud", "cloud"), ("Surface", "surface")) * 3:
        page.locator("#viewer ~ *").get_by_label(label, exact=True).or_(
            page.get_by_label(label, exact=True)
        ).first.click()
        wait_for_view(page, state)
        pixels(page)
        counts.append(page.evaluate("window.textures"))
    assert counts[-1] == counts[1] and counts[-1] > counts[-2]


@pytest.mark.slow
def test_a_surface_that_cannot_be_loaded_is_told(visit):
    page = visit()
    page.route("**/*.glb", lambda route: route.abort())
    page.get_by_role("button", name="osakaChair.obj").click()
    wait_for_view(page, "failed")
    assert "cloud" in page.locator("#viewer [role=alert]").inner_text()
    assert len(np.unique(pixels(page).reshape(-1, 3), axis=0)) > 100, "the cloud is seen"
    page.get_by_role("button", name="New object").click()
    wait_for_view(page, "empty")
    assert page.locator("#viewer [role=alert]").inner_text() == ""


@pytest.mark.slow
def test_everything_is_reached_with_the_keyboard(visit):
    page = visit()
    page.get_by_role("button", name="osakaChair.obj").press("Enter")
    wait_for_view(page, "surface")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(50):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "((e) => e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || e.tagName)(document.activeElement)"
            ).strip()
        )
    wanted = [
        "oakTable.ply",
        "osakaChair.obj in 3D",
        "Surface",
        "Remove",
        "Missing color",
        "Up axis",
        "Question",
        "Stop",
        "New object",
    ]
    missing = [name for name in (*wanted, "What is this?") if not any(name in text for text in reached)]
    assert missing == [], reached


COUNT_FRAMES = """
window.frames_drawn = 0;
const { drawArrays } = WebGL2RenderingContext.prototype;
WebGL2RenderingContext.prototype.drawArrays = function (...rest) { window.frames_drawn += 1; return drawArrays.apply(this, rest); };
"""


@pytest.mark.slow
@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_by_itself_if_the_system_asks_for_it(visit, motion):
    page = visit(reduced_motion=motion, init_script=COUNT_FRAMES)
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    pixels(page)
    box = page.locator("#viewer canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 320, box["y"] + 260, steps=3)
    script = """async () => {
      const canvas = document.querySelector("#viewer canvas");
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
      const before = window.frames_drawn;
      await new Promise((done) => setTimeout(done, 1500));
      return [window.frames_drawn - before, getComputedStyle(document.querySelector("button")).transitionProperty];
    }"""
    frames, transition = page.evaluate(script)
    page.mouse.up()
    assert (frames == 0, transition == "none") == ((motion == "reduce"),) * 2


@pytest.mark.slow
def test_a_narrow_dark_screen(visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.get_by_role("button", name="oakTable.ply").click()
    wait_for_view(page, "cloud")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is cut off"
    assert pixels(page).mean() < 90, "it is dark"
    picture(page, "narrow")
    page.fill("#question textarea", "What color is it?")
    page.keyboard.press("Enter")
    read_chat(page, "brown")
