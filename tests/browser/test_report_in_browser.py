"""The HTML report in a real browser, from disk: what a person sees, with nothing fetched, run or cut off.

Needs Chromium and its driver (Debian: chromium, chromium-driver). Set LEANPLAN_SCREENSHOTS to a folder to keep the
pictures the tests take.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic_answers

from planner.reports import html

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

SIZES = (400, 900, 1600)  # px: a phone, half a screen, a whole one
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-default-apps", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip

# Every visible piece of text: its box, colour, and the colours behind it, nearest first.
TEXTS = """
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, holder = node.parentElement;
  if (!node.data.trim() || holder.closest("script, style, .skip, #card") || !holder.checkVisibility({checkVisibilityCSS: true})) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const behind = [];
  for (let e = holder; e; e = e.parentElement) behind.push(getComputedStyle(e).backgroundColor);
  const style = getComputedStyle(holder);
  const frame = holder.closest(".wide, .gantt")?.getBoundingClientRect();
  const scrolledOut = (box) => frame && (box.bottom > frame.bottom + 1 || box.top < frame.top - 1 || box.right > frame.right + 1);
  for (const box of range.getClientRects()) if (box.width > 1 && box.height > 1 && !scrolledOut(box)) found.push({
    text: node.data.trim().slice(0, 60), class: holder.className.toString(), color: style.color, size: parseFloat(style.fontSize), behind,
    x: box.x, y: box.y, w: box.width, h: box.height, wide: !!frame, graphic: !!holder.closest(".dot, .fail, option"),
  });
}
return found;
"""


class Browser:
    """A headless Chromium that remembers what pages asked for and complained about."""

    def __init__(self, profile: Path) -> None:
        webdriver = pytest.importorskip(
            "selenium.webdriver", reason="selenium is not installed (pip install -e '.[dev]')"
        )
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))

    def open(self, page: Path, *, width: int = 900, dark: bool = False, script: bool = True) -> None:
        """Load a file from disk at a width and colour scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.command("Emulation.setScriptExecutionDisabled", value=not script)
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(page.as_uri())

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def requests(self) -> list[str]:
        """Return the addresses asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self, path: Path) -> bytes:
        """Save and return a picture of the whole page."""
        import base64

        height = self.run("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.run("return innerWidth"), "height": height, "scale": 1}
        shot = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        data = base64.b64decode(shot["data"])
        path.write_bytes(data)
        return data


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One report of each kind: few plans, many, only predicted, with hostile names."""
    folder = tmp_path_factory.mktemp("reports")
    answers = {
        "few": synthetic_answers.answer(12), "many": synthetic_answers.answer(200),
        "predicted": synthetic_answers.answer(30, measured=False), "hostile": synthetic_answers.hostile(),
    }  # fmt: skip
    paths = {name: folder / f"{name}.html" for name in answers}
    for name, answer in answers.items():
        paths[name].write_text(html.render(answer), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("LEANPLAN_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------- nothing comes in, nothing goes wrong


@pytest.mark.parametrize("name", ["few", "many", "predicted", "hostile"])
def test_no_request_no_complaint_no_dialog(browser: Browser, pages: dict[str, Path], name: str) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    browser.open(pages[name])
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    with pytest.raises(NoAlertPresentException):
        browser.driver.switch_to.alert  # noqa: B018
    asked = [url for url in browser.requests() if not url.startswith("data:")]
    assert asked == [pages[name].as_uri()]
    assert browser.complaints() == []


@pytest.mark.row(72)
def test_hostile_names_are_shown_literally(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    text = browser.run("return document.body.innerText")
    for piece in (
        "</script><img src=http://127.0.0.1:9/x onerror=alert(1)>",
        "[/bold]",
        "@everyone",
        "::error::",
        "\\x1b[2J",
    ):
        assert piece in text, piece
    assert (
        browser.run(
            "return document.images.length + document.querySelectorAll('iframe, object, embed, link[href^=http]').length"
        )
        == 0
    )
    browser.run("document.querySelector('.point').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    assert "<img src=" in browser.run("return document.getElementById('card').innerText")


def test_many_plans_are_light_and_soon_there(browser: Browser, pages: dict[str, Path]) -> None:
    assert pages["many"].stat().st_size < 6e6
    browser.open(pages["many"])
    browser.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    painted_ms = browser.run("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted_ms < 2000
    assert browser.run("return document.querySelectorAll('.point').length") > 150


# ---------------------------------------------------------------- it can be read


@pytest.mark.parametrize(
    "name", ["hostile", *(pytest.param(name, marks=pytest.mark.slow) for name in ("many", "few", "predicted"))]
)
@pytest.mark.parametrize("width", SIZES)
def test_labels_neither_overlap_nor_leave_the_page(
    browser: Browser, pages: dict[str, Path], pictures: Path, name: str, width: int
) -> None:
    for dark in (False, True):
        browser.open(pages[name], width=width, dark=dark)
        assert len(browser.picture(pictures / f"{name}-{width}-{'dark' if dark else 'light'}.png")) > 20_000
        assert browser.run("return document.documentElement.scrollWidth") <= width
        texts = browser.run(TEXTS)
        assert len(texts) > 100
        outside = [t["text"] for t in texts if not t["wide"] and (t["x"] < -0.5 or t["x"] + t["w"] > width + 0.5)]
        assert outside == []
        assert overlaps([t for t in texts if not t["graphic"]]) == []
        assert faint(texts) == []


def overlaps(texts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return pairs of texts whose boxes share more than a hair: glyphs fill about two thirds of a line box's height."""
    found = []
    texts = sorted(texts, key=lambda t: t["y"])
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            if b["y"] > a["y"] + a["h"]:
                break
            across = min(a["x"] + a["w"], b["x"] + b["w"]) - max(a["x"], b["x"])
            down = min(a["y"] + a["h"], b["y"] + b["h"]) - max(a["y"], b["y"])
            if across > 1 and down > 0.3 * min(a["h"], b["h"]):
                found.append((a["text"], b["text"]))
    return found


def faint(texts: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return texts with less contrast than WCAG AA asks: 4.5, or 3 for marks and large text."""
    found = []
    for t in texts:
        ground = (255.0, 255.0, 255.0)
        for layer in reversed(t["behind"]):
            ground = over(colour(layer), ground)
        ink = over(colour(t["color"]), ground)
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        contrast = (light + 0.05) / (dark + 0.05)
        if contrast < (3 if t["graphic"] or t["size"] >= 24 else 4.5):
            found.append((t["text"], round(contrast, 2)))
    return found


def colour(text: str) -> tuple[float, float, float, float]:
    numbers = [float(x) for x in text[text.index("(") + 1 : -1].replace("/", ",").replace(" ", ",").split(",") if x]
    return (numbers[0], numbers[1], numbers[2], numbers[3] if len(numbers) > 3 else 1.0)


def over(top: tuple[float, float, float, float], ground: tuple[float, float, float]) -> tuple[float, float, float]:
    r, g, b = (top[3] * t + (1 - top[3]) * u for t, u in zip(top[:3], ground))
    return (r, g, b)


def luminance(rgb: tuple[float, float, float]) -> float:
    """Return the relative luminance of sRGB 0..255 (WCAG 2.2)."""
    r, g, b = (x / 255 / 12.92 if x / 255 <= 0.04045 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_contrast_is_computed_rightly() -> None:
    assert faint(
        [{"text": "x", "color": "rgb(119, 119, 119)", "behind": ["rgb(255, 255, 255)"], "graphic": False, "size": 16}]
    ) == [("x", 4.48)]


# ---------------------------------------------------------------- it can be used


@pytest.mark.parametrize("name", ["few", "predicted", "hostile"])
def test_everything_has_a_name_and_headings_are_in_order(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    unnamed = browser.run("""
      const named = (e) => (e.labels && e.labels.length && e.labels[0].innerText.trim()) || e.getAttribute("aria-label") || e.innerText.trim();
      return [...document.querySelectorAll("a, button, select, input, summary, [tabindex], [role=img], [role=region], [role=group]")]
        .filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 120));
    """)
    assert unnamed == []
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) == 10
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = browser.run("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert browser.run("return document.querySelectorAll('th:not([scope])').length") == 0
    assert browser.run("return document.documentElement.lang") == "en"
    links = browser.run("return [...document.querySelectorAll('main a')].map((a) => [a.getAttribute('href'), a.rel])")
    assert all(href.startswith(("https://", "http://")) and "noopener" in rel for href, rel in links)


def test_any_two_metrics_can_be_picked(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["few"])
    pick = """
      const [across, up] = ["across", "up"].map((id) => document.getElementById(id));
      const choose = (select, label) => {
        select.value = [...select.options].find((o) => o.text === label).value;
        select.dispatchEvent(new Event("change"));
      };
      choose(across, arguments[0]);
      choose(up, arguments[1]);
      return [document.querySelector(".across-title").innerText, [...document.querySelectorAll(".ticks-up span")].map((s) => s.innerText),
              document.querySelectorAll(".point").length, document.querySelectorAll(".point .hollow").length];
    """
    labels = browser.run("return [...document.getElementById('across').options].map((o) => o.text)")
    for label in labels:
        title, ticks, points, hollow = browser.run(pick, label, "quality_loss")
        assert label in title and "%" in ticks[-1]
        assert points > 8
        assert hollow == (points if label == "energy" else 0)  # modelled figures are never drawn as measured ones
    browser.run("document.getElementById('was').click()")
    assert browser.run("return document.querySelectorAll('.point.was .hollow').length") >= 0
    assert browser.run(pick, "tpot", "peak_memory")[3] > 5
    assert browser.complaints() == []


def test_size_and_colour_show_two_more_metrics(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["few"])
    pick = """
      const select = document.getElementById(arguments[0]);
      select.value = arguments[1] && [...select.options].find((o) => o.text === arguments[1]).value;
      select.dispatchEvent(new Event("change"));
      const key = document.querySelector(`.key-${arguments[0]}`);
      return [[...document.querySelectorAll(".point:not(.was) .mark")].map((m) => arguments[0] === "size" ? m.style.scale : m.style.color), key.hidden, key.textContent];
    """
    plain, hidden, _ = browser.run(pick, "size", "")
    assert set(plain) == {""} and hidden
    sizes, hidden, key = browser.run(pick, "size", "peak_memory")
    assert len(set(sizes)) > 5 and 0.6 <= min(map(float, sizes)) < max(map(float, sizes)) <= 1.8
    assert not hidden and key.startswith("small ") and key.count("MiB") == 2
    colours, hidden, key = browser.run(pick, "colour", "tpot")
    assert len(set(colours)) > 5 and not hidden and key.count(" ms") == 2
    assert browser.run(pick, "colour", "")[:2] == [[""] * len(colours), True]
    assert browser.complaints() == []


def test_the_figures_can_be_read_back_from_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["few"])
    data = browser.run("return JSON.parse(document.getElementById('data').textContent)")
    names = [metric["name"] for metric in data["metrics"]]
    answer = synthetic_answers.answer(12)
    shown = {plan["id"]: plan["at"] for plan in data["plans"]}
    for result in answer.results:
        assert result.measurement
        for name, figure in result.measurement.figures.items():
            assert shown[result.plan.id][names.index(name)][5:] == [figure.value, figure.low, figure.high]
    assert {metric["name"]: metric["unit"] for metric in data["metrics"]}["tpot_s"] == "s"


def test_the_first_picture_is_the_one_without_a_script(browser: Browser, pages: dict[str, Path]) -> None:
    marks = "return [...document.querySelectorAll('.point')].map((p) => [p.dataset.plan, p.style.left, p.style.bottom]).sort()"
    lines = "return ['.front', '.limits path'].map((s) => document.querySelector(s).getAttribute('d'))"
    browser.open(pages["few"])
    drawn = browser.run(marks), browser.run(lines)
    browser.open(pages["few"], script=False)
    assert (browser.run(marks), browser.run(lines)) == drawn
    assert len(drawn[0]) > 8


def test_without_a_script_every_figure_has_its_table(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["few"], script=False)
    assert browser.run("return document.querySelector('.controls').checkVisibility()") is False
    assert browser.run("return document.getElementById('card').checkVisibility()") is False
    for part in ("scatter", "resources", "timeline", "errors"):
        rows = f"return document.querySelectorAll('#{part} details table tbody tr').length"
        assert browser.run(rows) > 3, part
    assert browser.complaints() == []


def test_the_keyboard_goes_from_plan_to_plan(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["few"])
    here = "return document.activeElement.getAttribute('aria-label') || document.activeElement.id || document.activeElement.tagName"
    browser.run("document.querySelector('.point[tabindex=\"0\"]').focus()")
    seen = [browser.run(here)]
    for _ in range(3):
        ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT).perform()
        seen.append(browser.run(here))
    assert len(set(seen)) == 4 and all("prune_width" in s or "unchanged" in s for s in seen)
    shown = browser.run("return document.getElementById('card').innerText")
    assert shown.split("\n")[0] in seen[-1]
    assert browser.run("return document.querySelectorAll('.line.lit').length") == 1
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
    assert browser.run("return document.getElementById('card').hidden") is True
    stops = browser.run("return document.querySelectorAll('.point[tabindex=\"0\"]').length")
    assert stops == 1  # one stop for the whole plot, the arrow keys do the rest


def test_it_prints_with_everything_unfolded(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["few"], dark=True, script=False)
    browser.command(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return document.querySelector('nav').checkVisibility()") is False
    folded = "return [...document.querySelectorAll('details table')].filter((t) => t.getBoundingClientRect().height < 10).length"
    assert browser.run(folded) == 0
    assert pages_of_paper(browser) >= 3


def test_what_would_fill_pages_of_paper_stays_folded(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["many"])
    assert pages_of_paper(browser) < 40
    assert browser.run("return document.querySelectorAll('details.long').length") >= 3


def pages_of_paper(browser: Browser) -> int:
    import base64

    paper = base64.b64decode(browser.command("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF")
    return paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ")
