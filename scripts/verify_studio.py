"""The studio in a real headless Chromium, with every request to another host blocked.

python scripts/verify_studio.py [PART ...]

Draws, repaints, generates under two controls, cancels, reloads, watches a real training that was started beside it, edits
a note, copies a picture as Python and as a command and runs both. Screenshots are written to outputs/studio/, to be looked
at. Prints JSON.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from PIL import Image, ImageDraw
from verify_load import call, free_port

from diffusion_kit.adapters.detectors import detect
from diffusion_kit.evaluation.measures import MEASURES
from diffusion_kit.ledger import Ledger, pictures
from diffusion_kit.recipes import Recipe, read

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "outputs" / "studio"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
).split()
HOUSE = [
    [(0.3, 0.45), (0.3, 0.8), (0.7, 0.8), (0.7, 0.45), (0.3, 0.45)],
    [(0.25, 0.45), (0.5, 0.2), (0.75, 0.45)],
]
INKED = """() => {
  const pad = document.querySelector("#doodle-pad .easel-paint");
  const bytes = pad.getContext("2d").getImageData(0, 0, pad.width, pad.height).data;
  return bytes.filter((value, k) => k % 4 === 3 && value > 128).length;
}"""
MANY = 10_000
ALL_THERE = """() => {
  const pictures = [...document.querySelectorAll("#history-gallery img")];
  return pictures.length >= 24 && pictures.every((own) => own.complete && own.naturalWidth > 0);
}"""
TRAINING = """
target: t2i_adapter
output: runs/live
base: {model: default}
steps: 4000
batch: 2
log_every: 1
data:
  sources: [{path: data}]
  resolution: 64
  workers: 0
  holdout: 2
  condition: {detector: canny}
validation: {every: 5, pictures: 2, steps: 4}
"""


class Studio:
    """A studio in a process of its own, and pages of a browser on it.

    Args:
        line: of its command. ready: a part of the page that is there when it can be used.

    Attributes:
        outside: what pages asked of other hosts.
        errors: of the pages' scripts.
    """

    def __init__(self, folder: Path, browser: Any, *line: str, ready: str = "#create-prompt textarea") -> None:
        self.folder, self.browser, self.line, self.ready, self.port = folder, browser, line, ready, free_port()
        self.home = folder / "home"
        self.environment = {**os.environ, "DIFFUSION_KIT_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}
        self.outside, self.errors = list[str](), list[str]()
        self.server: Any = None
        self.begin()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self) -> None:
        line = [sys.executable, "-m", "diffusion_kit.cli", "studio", *self.line]
        line += ["--port", str(self.port)]
        self.server = subprocess.Popen(line, env=self.environment, cwd=self.folder)
        for _ in range(300):
            time.sleep(0.2)
            try:
                call(self.url)
                return
            except OSError:
                if self.server.poll() is not None:
                    sys.exit("the studio ended")

    def end(self) -> None:
        self.server.terminate()
        self.server.wait(60)

    def page(self, context: Any = None, width: int = 1280, height: int = 1000, *, guarded: bool = True) -> Any:
        context = context or self.browser.new_context(viewport={"width": width, "height": height})
        if guarded:
            context.route("**/*", self.guard)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        page.goto(self.url)
        page.wait_for_selector(self.ready)
        return page

    def guard(self, route: Any) -> None:
        """Lets through what is asked of the studio."""
        if route.request.url.startswith((f"{self.url}/", "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def shot(self, page: Any, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(SHOTS / f"{name}.png"), full_page=True)

    def pictures(self) -> list[Path]:
        return sorted((self.home / "studio" / "pictures").glob("*/*.png"), key=lambda file: file.stat().st_mtime_ns)

    def run(self, *line: str) -> None:
        done = subprocess.run(line, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(line)}\n{done.stderr}")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.wait_for_timeout(500)


def state(page: Any, where: str) -> str:
    if error := page.query_selector(f"#{where}-progress .studio-error"):
        return f"error: {error.inner_text()}"
    found = page.query_selector(f"#{where}-progress .studio-bar")
    return found.get_attribute("data-state") if found else ""


def until(page: Any, true: Callable[[], Any], what: str, seconds: float = 120) -> None:
    for _ in range(round(seconds / 0.1)):
        if true():
            return
        page.wait_for_timeout(100)
    sys.exit(f"{what}: not in {seconds:.0f} s")


def finished(page: Any, where: str, before: int, studio: Studio) -> Path:
    """Waits until the tab has made another picture; its file."""
    until(
        page,
        lambda: len(studio.pictures()) > before or state(page, where).startswith("error"),
        f"{where} makes a picture",
    )
    if state(page, where).startswith("error"):
        sys.exit(state(page, where))
    until(page, lambda: state(page, where) == "done", f"{where} is done")
    page.wait_for_timeout(800)
    return studio.pictures()[-1]


def settle(page: Any) -> None:
    """Waits until a page that makes itself ready asks for nothing more."""
    asked = -1
    while asked != (now := page.evaluate("performance.getEntriesByType('resource').length")):
        asked = now
        page.wait_for_timeout(2000)


def stroke(page: Any, selector: str, points: list[tuple[float, float]], steps: int = 4) -> None:
    page.locator(selector).first.scroll_into_view_if_needed()
    box = page.locator(selector).first.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=steps)
    page.mouse.up()


def give(page: Any, selector: str, file: Path) -> None:
    page.wait_for_timeout(3000)  # the editor makes itself ready
    page.set_input_files(f"{selector} input[type=file]", str(file))
    page.wait_for_timeout(1500)


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


# Parts


def doodle(studio: Studio) -> dict[str, Any]:
    """A house is drawn: its edges are where the strokes are; a reload finds drawing and job again."""
    page = studio.page()
    tab(page, "Doodle")
    page.fill("#doodle-prompt textarea", "a house")
    before = len(studio.pictures())
    stroke(page, "#doodle-pad canvas", HOUSE[0])
    until(page, lambda: state(page, "doodle") in ("queued", "running", "done"), "the pen lifts, and a picture begins")
    finished(page, "doodle", before, studio)
    before = len(studio.pictures())
    stroke(page, "#doodle-pad canvas", HOUSE[1])
    file = finished(page, "doodle", before, studio)
    strokes = Image.open(file.parent / "controls" / f"{file.stem}-1.png")
    made = Image.open(file)
    (measure, *_) = MEASURES["sketch"]
    comparison = measure.compare(detect("sketch", made), strokes.resize(made.size).convert("RGB"))
    f1 = float(measure.figure(np.array([[comparison]])))
    studio.shot(page, "doodle")
    page.reload()
    page.wait_for_selector("#create-prompt textarea")
    tab(page, "Doodle")
    until(page, lambda: page.evaluate(INKED) > 500, "the drawing is there after a reload", 20)
    return {"edge_f1": round(f1, 3), "passed": {"edges follow the strokes (F1 at least .5)": f1 >= 0.5}}


def inpaint(studio: Studio) -> dict[str, Any]:
    """What is painted over is made anew; the rest stays."""
    page = studio.page()
    given = studio.folder / "given.png"
    picture = Image.new("RGB", (64, 64), (250, 245, 235))
    ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), fill=(200, 60, 40))
    picture.resize((256, 256)).save(given)
    tab(page, "Inpaint")
    give(page, "#inpaint-canvas", given)
    page.fill("#inpaint-prompt textarea", "a green tree")
    for y in (0.3, 0.4, 0.5):
        stroke(page, "#inpaint-canvas canvas", [(0.25, y), (0.6, y)])
    page.wait_for_timeout(1000)
    before = len(studio.pictures())
    page.click("#inpaint-go")
    file = finished(page, "inpaint", before, studio)
    studio.shot(page, "inpaint")
    recipe = read(file)
    assert isinstance(recipe, Recipe)
    assert recipe.mask is not None
    mask = np.asarray(Image.open(recipe.mask.path).convert("L").resize((recipe.width, recipe.height))) > 0
    shown = np.asarray(Image.open(recipe.image.path).convert("RGB").resize((recipe.width, recipe.height))).astype(int)
    change = np.abs(pixels(file) - shown).mean(-1)
    inside, outside = float(change[mask].mean()), float(change[~mask].mean())
    return {
        "painted_share": round(float(mask.mean()), 3),
        "change_inside": round(inside, 1),
        "change_outside": round(outside, 1),
        "passed": {"a part is repainted": 0.01 < mask.mean() < 0.6 and inside > 2 * outside},
    }


def controls(studio: Studio) -> dict[str, Any]:
    """Two controls at once; the picture copied as a command and as Python has the same pixels."""
    page = studio.page()
    edges, colours = studio.folder / "edges.png", studio.folder / "colours.png"
    drawing = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(drawing).polygon([(40, 220), (128, 40), (216, 220)], fill=(60, 110, 200), outline="black")
    drawing.save(edges)
    drawing.save(colours)
    page.fill("#create-prompt textarea", "a mountain")
    give(page, "#create-control-1-image", edges)
    page.click("#create-control-1-preview")
    page.wait_for_selector("#create-control-1-seen img")
    seen = page.evaluate("document.querySelector('#create-control-1-seen img').naturalWidth")
    page.click("#create-more")
    page.click("#create-control-2-kind input")
    page.get_by_role("option", name="palette", exact=True).click()
    give(page, "#create-control-2-image", colours)
    before = len(studio.pictures())
    page.keyboard.press("Control+Enter")
    file = finished(page, "create", before, studio)
    recipe = read(file)
    assert isinstance(recipe, Recipe)
    page.get_by_text("How it was made").first.click()
    page.wait_for_timeout(500)
    studio.shot(page, "create")
    command, python = (page.locator(f"#create-{what} .cm-content").inner_text() for what in ("command", "python"))
    (studio.folder / "copied.py").write_text(python.replace("\u00a0", " "))
    studio.run(sys.executable, "copied.py")
    line = shlex.split(command.replace("\\\n", " ").replace("\u00a0", " "))
    studio.run(sys.executable, "-m", "diffusion_kit.cli", *line[1:], "--out", "copied.png")
    same = [np.array_equal(pixels(studio.folder / name), pixels(file)) for name in ("picture.png", "copied.png")]
    return {
        "controls": [own.kind for own in recipe.controls],
        "passed": {
            "the preview is what the network sees": seen == recipe.width,
            "two controls": len(recipe.controls) == 2,
            "as Python, the same pixels": same[0],
            "as a command, the same pixels": same[1],
        },
    }


def kept(studio: Studio) -> dict[str, Any]:
    """A page that is loaded again makes the same: both controls, the region, the picture to start from."""
    page = studio.page()
    given = studio.folder / "kept.png"
    drawing = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(drawing).rectangle((60, 60, 200, 200), fill=(90, 160, 60), outline="black")
    drawing.save(given)
    page.fill("#create-prompt textarea", "a house")
    page.get_by_text("Start from a picture").first.click()
    page.wait_for_timeout(500)
    give(page, "#create-image", given)
    give(page, "#create-control-1-image", given)
    stroke(page, "#create-control-1-image canvas", [(0.3, 0.3), (0.6, 0.6)])
    page.click("#create-more")
    page.wait_for_selector("#create-control-2-image canvas")
    page.click("#create-control-2-kind input")
    page.get_by_role("option", name="palette", exact=True).click()
    give(page, "#create-control-2-image", given)
    page.wait_for_timeout(1000)
    page.reload()
    page.wait_for_selector("#create-prompt textarea")
    for what in ("image", "control-1-image", "control-2-image"):
        until(
            page,
            lambda what=what: page.is_visible(f"#create-{what} .easel-paint"),
            f"{what} is there after a reload",
            20,
        )
    page.wait_for_timeout(1000)
    studio.shot(page, "kept")
    before = len(studio.pictures())
    page.click("#create-go")
    recipe = read(finished(page, "create", before, studio))
    assert isinstance(recipe, Recipe)
    made = [(own.kind, own.mask is not None) for own in recipe.controls]
    same = recipe.image is not None and recipe.image.open() == given.read_bytes()
    return {
        "controls": made,
        "passed": {
            "a reload finds pictures and regions, and makes the same of them": same
            and made == [("canny", True), ("palette", False)],
        },
    }


def cancel(studio: Studio) -> dict[str, Any]:
    """In the middle, by the Esc key; the preview stays. A reload in the middle goes on with the job."""
    page = studio.page()
    page.fill("#create-prompt textarea", "a slow horse")
    page.get_by_text("Settings", exact=True).first.click()
    page.fill("#create-steps input[type=number]", "150")
    for side in ("width", "height"):  # large for this model, so that there is a middle
        page.fill(f"#create-{side} input", "192")
    page.keyboard.press("Control+Enter")
    until(page, lambda: state(page, "create") == "running", "it runs")
    page.wait_for_selector("#create-picture img")
    page.wait_for_timeout(1000)
    page.reload()
    page.wait_for_selector("#create-prompt textarea")
    until(page, lambda: state(page, "create") == "running", "a page that is loaded again follows its job", 30)
    page.wait_for_selector("#create-picture img")
    page.keyboard.press("Escape")
    until(page, lambda: state(page, "create") == "cancelled", "it is cancelled")
    words = page.inner_text("#create-progress .studio-words")
    kept = page.query_selector("#create-picture img") is not None
    studio.shot(page, "cancelled")
    return {"said": words, "passed": {"cancelled in the middle, with its preview": "cancelled at" in words and kept}}


def runs(studio: Studio) -> dict[str, Any]:
    """A real training that was started beside the studio grows its curve; a note that is edited is there after a reload."""
    data = studio.folder / "data"
    data.mkdir(exist_ok=True)
    for k in range(6):
        own = Image.new("RGB", (64, 64), (40 * k, 200 - 30 * k, 120))
        ImageDraw.Draw(own).ellipse((10, 10, 54, 54), fill=(255 - 40 * k, 60, 30 * k))
        own.save(data / f"{k}.png")
        (data / f"{k}.txt").write_text(f"a ball {k}")
    (studio.folder / "live.yaml").write_text(TRAINING)
    line = [sys.executable, "-m", "diffusion_kit.cli", "train", "live.yaml"]
    training = subprocess.Popen(line, env=studio.environment, cwd=studio.folder, stdout=subprocess.DEVNULL)
    try:
        page = studio.page()
        until(page, lambda: (studio.folder / "runs/live/metrics.jsonl").is_file(), "the training runs", 180)
        tab(page, "Runs")
        step = cell_of_runs(3)
        page.wait_for_selector(step)
        first = int(page.inner_text(step))
        until(page, lambda: int(page.inner_text(step) or 0) > first + 10, "its step grows on the page", 90)
        grown = int(page.inner_text(step))
        until(page, lambda: page.query_selector("#runs-loss canvas, #runs-loss svg"), "its curve is drawn", 30)
        until(page, lambda: page.query_selector_all("#runs-sheets img"), "its last validation is shown", 60)
        until(page, lambda: page.inner_text(cell_of_runs(6)).strip(), "its fidelity is told", 60)
        note = cell_of_runs(9)
        page.dblclick(note)
        page.keyboard.type("promising")
        page.keyboard.press("Enter")
        page.wait_for_timeout(4000)
        studio.shot(page, "runs")
        page.reload()
        page.wait_for_selector("#create-prompt textarea")
        tab(page, "Runs")
        page.wait_for_selector(note)
        until(page, lambda: "promising" in page.inner_text(note), "the note is there after a reload", 20)
        page.click(cell_of_runs(0))
        page.wait_for_timeout(1500)
        page.click("#runs-stop")
        code = training.wait(120)
        until(page, lambda: "stopped" in page.inner_text(cell_of_runs(1)), "it says stopped", 30)
    finally:
        training.terminate()
    return {
        "steps_seen": [first, grown],
        "exit_code": code,
        "passed": {"the curve grows, the note stays": grown > first},
    }


def cell_of_runs(column: int) -> str:
    return f"#runs-table [data-testid='cell-0-{column}']"


def history(studio: Studio) -> dict[str, Any]:
    """Pictures are found by words; one that is dropped on the page restores its settings."""
    page = studio.page()
    if not studio.pictures():
        page.fill("#create-prompt textarea", "a red horse")
        page.click("#create-go")
        finished(page, "create", 0, studio)
    tab(page, "History")
    until(page, lambda: page.query_selector_all("#history-gallery img"), "pictures are shown", 30)
    file = studio.pictures()[-1]
    recipe = read(file)
    assert isinstance(recipe, Recipe)
    page.fill("#history-words textarea, #history-words input", "nothing-of-this-name")
    until(page, lambda: "0 pictures" in page.inner_text("#history-count"), "nothing fits", 20)
    page.fill("#history-words textarea, #history-words input", recipe.prompt.split()[-1])
    until(page, lambda: "0 pictures" not in page.inner_text("#history-count"), "the words are found", 20)
    page.wait_for_timeout(1000)
    page.click("#history-gallery button.thumbnail-item, #history-gallery .grid-container button")
    page.wait_for_selector("#history-picture img")
    page.wait_for_timeout(1000)
    studio.shot(page, "history")
    page.set_input_files("#restore input[type=file]", str(file))
    page.wait_for_timeout(3000)
    page.get_by_text("Settings", exact=True).first.click()
    shown = page.input_value("#create-prompt textarea")
    seed = page.input_value("#create-seed input")
    return {"passed": {"a picture's settings come back": (shown, int(seed or -1)) == (recipe.prompt, recipe.seed)}}


def examples(studio: Studio) -> dict[str, Any]:
    """Every example fills the form and is made by one click."""
    page = studio.page()
    thumbs = "#create-examples button.thumbnail-item, #create-examples .grid-container button"
    page.wait_for_selector(thumbs)
    count, made = page.locator(thumbs).count(), list[str]()
    for k in range(count):
        before = len(studio.pictures())
        page.locator(thumbs).nth(k).click()
        recipe = read(finished(page, "create", before, studio))
        assert isinstance(recipe, Recipe)
        made += [recipe.prompt] if page.input_value("#create-prompt textarea") == recipe.prompt else []
        studio.shot(page, f"example-{k + 1}")
    return {"made": made, "passed": {"all run, and show their settings": len(made) == count >= 4}}


def compare(studio: Studio) -> dict[str, Any]:
    """A grid over scale and seed, the fidelity under each picture. A reload in the middle follows it, and finds what was
    written and given: the next comparison is of the same picture."""
    page = studio.page()
    tab(page, "Compare")
    page.fill("#compare-prompt textarea", "a brown horse on a blue background")
    page.set_input_files("#compare-image input[type=file]", str(ROOT / "examples" / "horse.png"))
    page.wait_for_timeout(1500)
    before = len(studio.pictures())
    page.click("#compare-go")
    until(page, lambda: page.inner_text("#compare-progress")[:1] in tuple("12345"), "it begins", 60)
    page.reload()
    page.wait_for_selector("#create-prompt textarea")
    tab(page, "Compare")
    until(page, lambda: "6 of 6" in page.inner_text("#compare-progress"), "six pictures are made", 180)
    kept = page.input_value("#compare-prompt textarea")
    page.wait_for_timeout(1500)
    studio.shot(page, "compare")
    captions = page.locator("#compare-grid .caption-label").all_inner_texts()
    page.get_by_role("radio", name="adapters side by side").click()
    page.click("#compare-go")
    until(page, lambda: "6 of 6" not in page.inner_text("#compare-progress"), "it begins anew", 20)
    until(page, lambda: "6 of 6" in page.inner_text("#compare-progress"), "three adapters are compared", 180)
    page.wait_for_timeout(1500)
    studio.shot(page, "compare-kinds")
    kinds = page.locator("#compare-grid .caption-label").all_inner_texts()
    figures = {scale: [float(own.split()[-1]) for own in captions if f"scale {scale}," in own] for scale in ("0", "1")}
    return {
        "captions": captions,
        "kinds": kinds,
        "passed": {
            "a page that is loaded again has what was written": kept == "a brown horse on a blue background",
            "six pictures, each with its figure": len(studio.pictures()) - before == 12 and len(captions) == 6,
            "three adapters side by side, each with its figure": sum("not measured" not in own for own in kinds) == 6,
            "a control of scale 1 is followed more than one of 0": min(figures["1"]) > max(figures["0"]),
        },
    }


def many(studio: Studio) -> dict[str, Any]:
    """10,000 pictures open in less than a second, from the click on History to the last thumbnail's pixels. Without the
    guard over outside requests, which asks Python about each picture and turns the browser's cache off."""
    folder = studio.home / "studio" / "pictures" / "many"
    folder.mkdir(parents=True)
    made = sorted((ROOT / "diffusion_kit" / "studio" / "examples").glob("*.png"))
    recipes = [(own, read(own)) for own in made]
    ledger = Ledger(f"sqlite:///{studio.home / 'ledger.db'}")
    for start in range(0, MANY, 1000):
        with ledger.writing() as session:
            for k in range(start, start + 1000):
                source, recipe = recipes[k % len(recipes)]
                file = folder / f"{k:05}.png"
                shutil.copy(source, file)
                pictures.add(session, file, replace(recipe, seed=k), "studio", datetime.now(UTC))
    ledger.close()
    page, seconds = studio.page(guarded=False), list[float]()
    for _ in range(7):
        page.reload()
        page.wait_for_selector(studio.ready)
        settle(page)
        begin = time.perf_counter()
        page.get_by_role("tab", name="History").click()
        page.wait_for_function(ALL_THERE)
        seconds.append(time.perf_counter() - begin)
    words = page.inner_text("#history-count")
    begin = time.perf_counter()
    page.fill("#history-words textarea, #history-words input", "horse")
    until(page, lambda: found_on(page) < MANY // 2, "the words are found", 20)
    searched = time.perf_counter() - begin
    return {
        "pictures": words,
        "of_a_search": found_on(page),
        "first_seconds": round(seconds[0], 2),
        "median_seconds": round(statistics.median(seconds), 2),
        "search_seconds": round(searched, 2),
        "passed": {"10,000 pictures open in less than a second": statistics.median(seconds) < 1},
    }


def grid(studio: Studio) -> dict[str, Any]:
    """The dashboard of a table: two charts; a grid whose rows and columns are added and deleted, cells pasted, CSV taken
    and given; rows that are written stand in the table and on the charts."""
    shop = f"sqlite:///{studio.folder / 'shop.db'}"
    engine = sa.create_engine(shop)
    with engine.begin() as connection:
        columns = "product_id INTEGER PRIMARY KEY, product_name TEXT, inventory_count INTEGER, price REAL"
        connection.execute(sa.text(f"CREATE TABLE Product ({columns})"))
        for k in range(10):
            connection.execute(sa.text(f"INSERT INTO Product VALUES ({k}, 'Item {k}', {10 * k + 5}, {99.5 - 9 * k})"))
    line = ("dashboard", "--table", "Product", "--x", "product_id", "--y", "price,inventory_count", "--every", "2")
    own = Studio(studio.folder, studio.browser, *line, "--source", shop, ready="#plot-price canvas, #plot-price svg")
    try:
        context = studio.browser.new_context(viewport={"width": 1280, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=own.url)
        page = own.page(context)
        page.wait_for_selector("#plot-inventory_count canvas, #plot-inventory_count svg")
        page.get_by_text("Write rows").click()
        steps = {"it is empty at first": rows(page) == 0}
        page.click("#grid [aria-label='Add row']")
        page.wait_for_selector(cell(0, 0))
        steps["columns are the table's"] = headers(page) == ["product_id", "product_name", "inventory_count", "price"]
        of_menu(page, cell(0, 0), "Add row below")
        steps["a row is added"] = rows(page) == 2
        of_menu(page, cell(0, 0), "Add column to the right")
        steps["a column is added"] = len(headers(page)) == 5
        of_menu(page, cell(0, 1), "Delete column")
        of_menu(page, cell(1, 0), "Delete row")
        steps["both are deleted"] = (rows(page), len(headers(page))) == (1, 4)
        page.evaluate("(text) => navigator.clipboard.writeText(text)", "10\tItem 10\t7\t1.5\n11\tItem 11\t8\t2.5\n")
        page.click(cell(0, 0))
        page.keyboard.press("Control+V")
        until(page, lambda: rows(page) == 2 and "Item 11" in page.inner_text(cell(1, 1)), "cells are pasted", 20)
        own.shot(page, "dashboard")
        with page.expect_download() as given:
            page.click("#to-csv")
        text = Path(given.value.path()).read_text()
        steps["CSV out"] = text.splitlines()[1:] == ["10,Item 10,7,1.5", "11,Item 11,8,2.5"]
        page.click("#write")
        until(page, lambda: count(engine) == 12, "pasted rows are written", 20)
        file = studio.folder / "more.csv"
        file.write_text(text.replace("10,Item 10", "20,Item 20").replace("11,Item 11", "21,Item 21"))
        with page.expect_file_chooser() as chooser:
            page.click("#from-csv")
        chooser.value.set_files(str(file))
        until(page, lambda: rows(page) == 2 and "Item 21" in page.inner_text(cell(1, 1)), "CSV in", 20)
        page.click("#write")
        until(page, lambda: count(engine) == 14, "rows of the file are written", 20)
        until(page, lambda: "14 rows" in page.inner_text("#words"), "the dashboard shows them", 20)
        page.wait_for_timeout(2500)
        own.shot(page, "dashboard-written")
    finally:
        own.end()
        studio.outside += own.outside
        studio.errors += own.errors
        engine.dispose()
    return {"passed": steps}


def cell(row: int, column: int) -> str:
    return f"#grid [data-testid='cell-{row}-{column}']"


def headers(page: Any) -> list[str]:
    shown = page.locator("#grid thead th").all_inner_texts()
    return list(dict.fromkeys(text.strip() for text in shown if text.strip()))


def rows(page: Any) -> int:
    return page.locator("#grid [data-testid^='cell-'][data-testid$='-0']").count()


def of_menu(page: Any, selector: str, entry: str) -> None:
    page.click(selector, button="right")
    page.get_by_role("menuitem", name=entry).click()
    page.wait_for_timeout(700)


def count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text("SELECT count(*) FROM Product")).scalar() or 0)


def found_on(page: Any) -> int:
    """How many pictures History says that it found; all while it looks."""
    said = re.search(r"(\d+) pictures", page.inner_text("#history-count"))
    return int(said[1]) if said else MANY


def attack(studio: Studio) -> dict[str, Any]:
    """HTML in a prompt is text wherever it is shown."""
    page = studio.page()
    hostile = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script> <b>fox</b>"
    page.fill("#create-prompt textarea", hostile)
    before = len(studio.pictures())
    page.click("#create-go")
    finished(page, "create", before, studio)
    page.get_by_text("How it was made").first.click()
    tab(page, "History")
    until(page, lambda: page.query_selector_all("#history-gallery img"), "pictures are shown", 30)
    page.click("#history-gallery button.thumbnail-item, #history-gallery .grid-container button")
    page.wait_for_selector("#history-picture img")
    page.wait_for_timeout(2000)
    told = page.input_value("#history-about textarea")
    quiet = page.evaluate("() => window.hacked === undefined")
    return {"passed": {"HTML in a prompt is shown as text": quiet and "<b>fox</b>" in told}}


def phone(studio: Studio) -> dict[str, Any]:
    """At the width of a phone nothing stands beside the page."""
    page = studio.page(width=390, height=844)
    page.wait_for_timeout(1000)
    studio.shot(page, "phone")
    over = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
    return {"passed": {"it fits a phone's width": over <= 1}}


PARTS: dict[str, Callable[[Studio], dict[str, Any]]] = {
    own.__name__: own
    for own in (examples, doodle, inpaint, controls, kept, compare, cancel, history, attack, runs, grid, phone, many)
}


def main(names: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    figures: dict[str, Any] = {}
    passed: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as player:
        browser = player.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        studio = Studio(Path(folder), browser)
        try:
            for name in names or list(PARTS):
                found = PARTS[name](studio)
                passed |= {f"{name}: {what}": bool(own) for what, own in found.pop("passed").items()}
                figures[name] = found
                print(name, json.dumps(found), file=sys.stderr, flush=True)
                for context in browser.contexts:  # a page that follows a run is work for the next
                    context.close()
        finally:
            browser.close()
            studio.end()
    figures["requests_to_other_hosts"] = studio.outside
    figures["errors_of_scripts"] = studio.errors
    passed["works with every outside request blocked, and asks for none"] = not studio.outside
    print(json.dumps(figures | {"passed": passed}))


if __name__ == "__main__":
    main(sys.argv[1:])
