"""The report in a real browser: every control works, nothing overflows, nothing is fetched, nobody is left out."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from tiny_pipelines import build

from diffusers_searched_solver import solver_from_scheduler
from diffusers_searched_solver.rivals import diffusers_schedulers
from diffusers_searched_solver.serialization import SOLVER_FILE
from search import measure
from search.results.charts import LABEL_HEIGHT, Axis, Chart, Line
from search.results.images import SampleImages, strip
from search.results.report import write_report
from search.run import main


ROOT = Path(__file__).parent.parent
INJECTIONS = ('"><img src=x onerror=attack()>', "</script><script>attack()</script>", "</title><svg onload=attack()>")
# Colours of all text that is shown, and of the backgrounds behind it, as [r, g, b] from 0 to 1.
TEXT_COLOURS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return Array.from(canvas.getImageData(0, 0, 1, 1).data, (v) => v / 255);
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor);
    if (colour[3] === 1) return colour;
  }
};
const texts = [...document.body.querySelectorAll("*")].filter((e) => e.checkVisibility()
  && [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim()));
const marks = [...document.querySelectorAll(".chart g")].filter((e) => e.checkVisibility());
return [...texts.map((e) => [4.5, e]), ...marks.map((e) => [3, e])].map(([least, e]) =>
  [least, rgba(getComputedStyle(e).color), behind(e), e.textContent.trim() || e.dataset.line]);
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a small search wrote."""
    out = tmp_path_factory.mktemp("report") / "out"
    options = "--num-steps 2 4 --num-eval-samples 8 --teacher-steps 8 --guidance-scale 2"
    metrics = ["--image-metrics", "8", "--feature-network", str(ROOT / "examples" / "digits_features.py")]
    main(["--pipeline", str(ROOT / "examples" / "digits-sit"), *options.split(), *metrics, "--output-dir", str(out)])
    return out


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture()
def page(browser, folder):
    """Opens the report, or another, at a width and in a colour scheme; in the end nothing was said or fetched."""

    def open_page(width=1280, scheme="light", media="screen", of=folder):
        device = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        browser.get((of / "report.html").as_uri())
        return browser

    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    yield open_page
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
    assert len({url for url in urls if url.startswith("file:")}) == 1


def shown_steps(browser):
    blocks = browser.find_elements(By.CSS_SELECTOR, "[data-steps]")
    return {block.get_attribute("data-steps") for block in blocks if block.is_displayed()}


def shown_images(browser, kind):
    return [image for image in browser.find_elements(By.CSS_SELECTOR, f".tiles {kind}") if image.is_displayed()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows_and_all_text_can_be_read(page, width, scheme):
    browser = page(width, scheme)
    for _ in range(2):
        right_edges = "return [...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right)"
        # Dots at the edge of a plot stand out by their radius, 3 pixels, into the margin of 16.
        assert max(browser.execute_script(right_edges)) <= width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for least, text, background, content in browser.execute_script(TEXT_COLOURS):
            assert contrast(text, background) >= least, content
        browser.find_element(By.ID, "steps").send_keys(Keys.ARROW_RIGHT)


def contrast(first, second):
    """Source: Web Content Accessibility Guidelines 2.2, contrast ratio."""

    def luminance(colour):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_every_control_works_from_the_keyboard_alone(page):
    browser = page()
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("href").endswith(SOLVER_FILE)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "steps"
    for key, steps in ((Keys.ARROW_RIGHT, "4"), (Keys.ARROW_LEFT, "2"), (Keys.END, "4"), (Keys.HOME, "2")):
        browser.switch_to.active_element.send_keys(key)
        assert shown_steps(browser) == {steps}
        assert browser.find_element(By.ID, "steps-shown").text == steps
        assert browser.switch_to.active_element.get_attribute("aria-valuetext") == f"{steps} steps"

    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "show-errors"
    assert shown_images(browser, ".error") and not shown_images(browser, ".sample")
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert shown_images(browser, ".sample") and not shown_images(browser, ".error")

    browser.switch_to.active_element.send_keys(Keys.TAB)
    select = browser.switch_to.active_element
    assert select.get_attribute("id") == "rival"
    chosen = select.get_attribute("value")
    select.send_keys(Keys.END)
    assert select.get_attribute("value") != chosen
    for mark in ("g.rival", ".leaders .rival", ".labels .rival"):
        highlighted = browser.find_elements(By.CSS_SELECTOR, f"#errors {mark}")
        assert [line.get_attribute("data-line") for line in highlighted] == [select.get_attribute("value")]


def test_assistive_technology_finds_a_name_for_every_control_image_and_chart(page):
    browser, roles = page(), {"slider", "checkbox", "combobox", "image", "table"}

    def named_nodes():
        nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
        return [(role, name) for role, name in named if role in roles]

    # The tree follows what the script shows a little later.
    WebDriverWait(browser, 10).until(lambda _: {role for role, _ in named_nodes()} == roles)
    named = named_nodes()
    assert all(name for role, name in named if role != "table")
    assert ("image", "class 0: difference between searched in 2 steps and the teacher") in named
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"


def test_paper_has_no_controls_and_shows_every_step_count_with_errors(page, browser):
    page(720, "dark", "print")
    assert shown_steps(browser) == {"2", "4"}
    assert not any(control.is_displayed() for control in browser.find_elements(By.CSS_SELECTOR, "input, select"))
    assert shown_images(browser, ".error") and shown_images(browser, ".sample")
    style = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    assert browser.execute_script(style) == ["rgb(30, 29, 27)", "rgb(253, 252, 250)"]


def test_without_scripts_everything_is_there_and_no_control_is_dead(page, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page()
        assert shown_steps(browser) == {"2", "4"}
        controls = browser.find_elements(By.CSS_SELECTOR, "input, select")
        # The one that is left works by style sheet.
        assert [control.get_attribute("id") for control in controls if control.is_displayed()] == ["show-errors"]
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_tables_hold_the_numbers_of_the_report(page, report):
    browser = page()
    for num_steps, rows in report["evaluation"]["results"].items():
        table = browser.find_element(By.CSS_SELECTOR, f"#errors [data-steps='{num_steps}'] tbody")
        shown = table.find_elements(By.TAG_NAME, "tr")
        for row, line in zip(rows, shown, strict=True):
            text = line.get_attribute("textContent")
            assert row["error_interval"][0] <= row["endpoint_error"] <= row["error_interval"][1]
            for value in (row["endpoint_error"], *row["error_interval"], row["median_error"]):
                assert f"{value:#.3g}" in text
            assert row["solver"] in text and row["setting"] in text
    for num_steps, rows in report["evaluation"]["image_metrics"]["results"].items():
        text = browser.find_element(By.CSS_SELECTOR, f"#metrics [data-steps='{num_steps}']").get_attribute(
            "textContent"
        )
        assert rows[-1]["solver"] == "teacher"
        for row in rows:
            assert row["solver"] in text
            assert all(f"{value:#.3g}".removesuffix(".") in text for value in row["metrics"].values())
    text = browser.find_element(By.TAG_NAME, "main").get_attribute("textContent")
    assert report["search"]["command"] in text
    assert f"{report['search']['costs']['4']['network_calls']:,}" in text


@pytest.mark.parametrize("attack", INJECTIONS)
def test_what_others_wrote_is_text_and_nothing_else(page, folder, tmp_path, attack):
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    report = json.loads((evil / "report.json").read_text())
    for rows in report["evaluation"]["results"].values():
        next(row for row in rows if row["from_diffusers"]).update(solver=attack, setting=attack)
    report.update(pipeline=attack, pipeline_class=attack)
    report["search"].update(command=f"run.py --prompts {attack}", fitter=attack)
    report["versions"][attack] = attack
    report["evaluation"]["image_metrics"].update(feature_network=attack, reference=attack)
    for rows in report["evaluation"]["image_metrics"]["results"].values():
        rows[0].update(solver=attack)
    (evil / "report.json").write_text(json.dumps(report))
    black = [(Image.new("RGB", (300, 200)),)]
    images = SampleImages([attack], 16, black, {2: {attack: black, "searched": black}})
    write_report(evil, "out", images)
    browser = page(360, of=evil)
    assert browser.find_element(By.TAG_NAME, "h1").text == attack
    assert browser.find_elements(By.TAG_NAME, "code")[1].get_attribute("textContent") == f"run.py --prompts {attack}"
    assert browser.find_element(By.CSS_SELECTOR, ".tiles img").get_attribute("alt").startswith(attack)
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_videos_move_in_the_report(tmp_path, page):
    case = build("animatediff")
    schedulers = diffusers_schedulers(case.pipe.scheduler.config)["UniPC 3"]
    solver = solver_from_scheduler(next(iter(schedulers.values())), 3)
    condition = {key: value for key, value in case.inputs.items() if key != "output_type"}
    measure(case.pipe, solver, [condition], tmp_path, measure="full", num_eval_samples=4, teacher_steps=8)
    browser = page(390, of=tmp_path)
    tiles = browser.find_elements(By.CSS_SELECTOR, ".tiles img")
    assert len(tiles) > 2 and all(tile.get_property("naturalWidth") == 16 for tile in tiles)
    films = [Image.open(io.BytesIO(base64.b64decode(tile.get_attribute("src").split(",")[1]))) for tile in tiles]
    assert [film.n_frames for film in films] == [2] * len(films)
    assert (tmp_path / "images.png").exists()


def test_of_a_video_four_frames_are_side_by_side_from_the_first_to_the_last():
    frames = tuple(Image.new("L", (16, 8), shade) for shade in range(10))
    assert [strip(frames).convert("L").getpixel((16 * k, 0)) for k in range(4)] == [0, 3, 6, 9]
    assert strip(frames[:1]) is frames[0]


class Attributes(HTMLParser):
    """All (tag, attribute, value) of a page."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, *attribute) for attribute in attrs]


def test_the_file_refers_to_nothing_outside_itself(folder):
    html = (folder / "report.html").read_text()
    references = [v for _, name, v in Attributes(html).found if name in ("src", "href", "srcset", "data", "action")]
    assert len(references) > 8
    # But for the solver, beside it.
    assert all(value.startswith("data:image/webp;base64,") for value in references if value != SOLVER_FILE)
    assert not re.search(r"url\(|@import", html)


def test_a_pipeline_that_makes_no_images_still_has_a_report(page, folder, tmp_path):
    for name in ("report.json", "solver"):
        (shutil.copytree if name == "solver" else shutil.copy)(folder / name, tmp_path / name)
    write_report(tmp_path, "out")
    browser = page(of=tmp_path)
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert browser.find_elements(By.CSS_SELECTOR, ".chart")


def test_a_rival_that_diverges_is_in_the_table_but_not_in_the_chart(page, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    report = json.loads((folder / "report.json").read_text())
    row = report["evaluation"]["results"]["4"][-1]
    row.update(endpoint_error=None, error_interval=[0.1, None])
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    write_report(tmp_path / "out", "out")
    browser = page(of=tmp_path / "out")
    chart = browser.find_element(By.CSS_SELECTOR, "#errors .chart").get_attribute("aria-label")
    assert "searched: " in chart and f"{row['solver']}: " not in chart
    assert "0.100 to inf" in browser.find_element(By.ID, "errors").get_attribute("textContent")


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis(1000, 0), ["0", "200", "400", "600", "800", "1000"]),
        (Axis(0, 0.07), ["0", "0.02", "0.04", "0.06"]),
        (Axis(0.004, 0.3, log=True), ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"]),
    ],
    ids=["time", "error", "logarithmic error"],
)
def test_ticks_are_round_values_in_their_places(axis, labels):
    assert [label for _, label in axis.ticks()] == labels
    for place, label in axis.ticks():
        assert place == axis.at(float(label))
        assert 0 <= place <= 100


def test_labels_keep_their_distance_and_their_order():
    ends = [0.5, 0.5, 0.49, 0.0, 0.01, 1.0, 0.51]
    lines = [Line(str(end), "other", [(0, 0.5), (1, end)]) for end in ends]
    chart = Chart("", Axis(0, 1), Axis(0, 1), "", "", lines, height=20)
    tops = chart.label_tops()
    order = sorted(range(len(ends)), key=lambda k: tops[k])
    assert [ends[k] for k in order] == sorted(ends, reverse=True)
    gaps = [tops[b] - tops[a] for a, b in zip(order, order[1:], strict=False)]
    # Places are rounded to a hundredth.
    assert min(gaps) >= 100 * LABEL_HEIGHT / 20 - 0.02
    assert (tops[5], tops[3]) == (0, 100)
