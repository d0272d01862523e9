"""The page, opened from disk in headless Chromium and operated as a reader would."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hasten.report import write_report
from tests.report.builders import make_results
from tests.report.test_html import HOSTILE

selenium = pytest.importorskip("selenium", reason="install selenium (the dev extra)")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="install chromium and chromium-driver (apt-get install chromium chromium-driver)",
    ),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

Open = Callable[..., Chrome]


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(chrome: Chrome, folder: Path) -> Open:
    """Open a report (the shared one by default) at a width in CSS pixels, light or dark."""

    def open_(page: Path | None = None, *, width: int = 1280, dark: bool = False) -> Chrome:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        chrome.get_log("browser")
        chrome.get_log("performance")
        chrome.get((page or folder / "report.html").as_uri())
        return chrome

    return open_


def all_of(driver: Chrome, selector: str) -> list[WebElement]:
    return list(driver.find_elements(By.CSS_SELECTOR, selector))


def one(driver: Chrome, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def recipes_in_table(driver: Chrome) -> list[str]:
    return [row.get_attribute("data-recipe") or "" for row in all_of(driver, "#results tbody tr")]


def press_heading(driver: Chrome, title: str) -> WebElement:
    heading = next(
        found for found in all_of(driver, "#results thead th") if found.text.strip() == title
    )
    heading.find_element(By.TAG_NAME, "button").click()
    return heading


def clip(driver: Chrome) -> str:
    return str(
        driver.execute_script(
            "return getComputedStyle(document.querySelector('.scene .after')).clipPath"
        )
    )


def split(driver: Chrome) -> float:
    """Percent of the picture that shows the baseline, as the browser really clips it."""
    return float(clip(driver).removesuffix("%)").split(" ")[-1])


def choose(driver: Chrome, name: str, text: str) -> None:
    Select(one(driver, f"select[name={name}]")).select_by_visible_text(text)


def scene_order(driver: Chrome) -> list[str]:
    return [number.text for number in all_of(driver, ".scene .number")]


def test_the_page_loads_without_errors_and_without_the_network(open_page: Open) -> None:
    driver = open_page()
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    addresses = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert addresses, "the log must at least hold the page itself"
    assert {address.split(":")[0] for address in addresses} <= {"file", "data"}
    assert sum(address.startswith("file:") for address in addresses) == 1


def test_every_picture_is_decoded(open_page: Open) -> None:
    driver = open_page()
    sizes = driver.execute_async_script(
        "const done = arguments[0], images = [...document.images];"
        "Promise.all(images.map(i => i.decode())).then(() => done(images.map(i => i.naturalWidth)))"
    )
    shots, stages = 4 * 7, 4 * 2
    assert sizes == [96] * (shots + stages)


def test_hostile_text_runs_nothing(open_page: Open, tmp_path: Path) -> None:
    results = make_results(tmp_path, count=3, size=(16, 16), captions=HOSTILE)
    driver = open_page(write_report(results, tmp_path))
    assert driver.get_log("browser") == []
    assert [scene.text for scene in all_of(driver, ".scene h3")] == [
        f"{index}{text}seed {index}" for index, text in enumerate(HOSTILE)
    ]


def test_a_script_that_slipped_in_would_be_stopped(open_page: Open) -> None:
    driver = open_page()
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s);"
    )
    assert driver.execute_script("return window.ran") is None
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


def test_the_table_sorts_both_ways_and_back(open_page: Open) -> None:
    driver = open_page()
    original = recipes_in_table(driver)
    heading = press_heading(driver, "speed-up")
    assert heading.get_attribute("aria-sort") == "descending"
    fastest_first = recipes_in_table(driver)
    assert fastest_first[:2] == ["max", "cache-compile"]
    assert fastest_first[-1] == "tensorrt-fp8"
    press_heading(driver, "speed-up")
    slowest_first = recipes_in_table(driver)
    assert slowest_first[0] == "baseline-again"
    assert slowest_first[-1] == "tensorrt-fp8"
    press_heading(driver, "speed-up")
    assert recipes_in_table(driver) == original
    assert heading.get_attribute("aria-sort") is None


def test_the_table_sorts_by_keyboard_and_lower_is_first_for_lpips(open_page: Open) -> None:
    driver = open_page()
    button = next(
        found for found in all_of(driver, "#results thead button") if found.text.strip() == "LPIPS"
    )
    button.send_keys(Keys.ENTER)
    assert recipes_in_table(driver)[:3] == ["baseline-again", "compile", "cache"]


def test_the_divider_follows_a_mouse_drag(open_page: Open) -> None:
    driver = open_page()
    assert split(driver) == 50
    stage = one(driver, ".stage")
    quarter = stage.size["width"] // 4
    ActionChains(driver).move_to_element(stage).click_and_hold().move_by_offset(
        quarter, 0
    ).release().perform()
    assert split(driver) == pytest.approx(75, abs=1.5)
    assert float(one(driver, ".compare input").get_attribute("value") or 0) == split(driver)
    ActionChains(driver).move_by_offset(-quarter, 0).perform()
    assert split(driver) == pytest.approx(75, abs=1.5), "a hover without a button moves nothing"


def test_the_divider_follows_a_finger(open_page: Open) -> None:
    driver = open_page(width=375)
    stage = one(driver, ".stage")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    box: dict[str, Any] = driver.execute_script(
        "return arguments[0].getBoundingClientRect().toJSON()", stage
    )
    finger = ActionBuilder(driver, mouse=PointerInput("touch", "finger"))
    y = int(box["y"] + box["height"] / 2)
    finger.pointer_action.move_to_location(int(box["x"] + box["width"] * 0.5), y).pointer_down()
    finger.pointer_action.move_to_location(int(box["x"] + box["width"] * 0.35), y)
    finger.pointer_action.move_to_location(int(box["x"] + box["width"] * 0.2), y).pointer_up()
    finger.perform()
    assert split(driver) == pytest.approx(20, abs=2)


def test_the_divider_moves_by_keyboard_and_says_where_it_is(open_page: Open) -> None:
    driver = open_page()
    slider = one(driver, ".compare input")
    assert slider.get_attribute("aria-label") == ("Prompt 0: divider between baseline and max")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert split(driver) == 52
    assert slider.get_attribute("aria-valuetext") == "52 % baseline"
    slider.send_keys(Keys.HOME)
    all_candidate = one(driver, ".stage").screenshot_as_png
    slider.send_keys(Keys.END)
    assert split(driver) == 100
    assert one(driver, ".stage").screenshot_as_png != all_candidate


def test_another_recipe_changes_the_picture_everywhere(open_page: Open) -> None:
    driver = open_page()
    before = [image.get_attribute("src") for image in all_of(driver, ".stage .after")]
    choose(driver, "b", "cache")
    after = [image.get_attribute("src") for image in all_of(driver, ".stage .after")]
    shots = all_of(driver, ".shot[data-recipe=cache] img")
    assert after == [image.get_attribute("src") for image in shots]
    assert not set(before) & set(after)
    assert {tag.text for tag in all_of(driver, ".tag.right")} == {"cache"}


def test_the_baseline_and_the_fastest_are_compared_at_first(open_page: Open) -> None:
    driver = open_page()
    assert {tag.text for tag in all_of(driver, ".tag.left")} == {"baseline"}
    assert {tag.text for tag in all_of(driver, ".tag.right")} == {"max"}


def test_any_two_recipes_are_compared(open_page: Open) -> None:
    driver = open_page()
    choose(driver, "a", "compile")
    assert {tag.text for tag in all_of(driver, ".tag.left")} == {"compile"}
    shown = [image.get_attribute("src") for image in all_of(driver, ".stage .before")]
    shots = all_of(driver, ".shot[data-recipe=compile] img")
    assert shown == [image.get_attribute("src") for image in shots]
    label = one(driver, ".compare input").get_attribute("aria-label")
    assert label == "Prompt 0: divider between compile and max"


def test_the_difference_is_eight_times_that_of_the_pixels(open_page: Open, folder: Path) -> None:
    driver = open_page()
    choose(driver, "view", "difference × 8")
    assert not one(driver, ".compare input").is_displayed()
    stage = one(driver, ".stage")
    # As large as the files, so that no pixel is resampled.
    driver.execute_script("arguments[0].style.width = '96px'", stage)
    with Image.open(io.BytesIO(stage.screenshot_as_png)) as image:
        drawn = np.asarray(image.convert("RGB"), float)
    pair = []
    for recipe in ("baseline", "max"):
        with Image.open(folder / f"images/{recipe}/000.png") as image:
            pair.append(np.asarray(image.convert("RGB"), float))
    wanted = np.minimum(8 * np.abs(pair[0] - pair[1]), 255)
    middle = slice(40, 90)  # below the tags
    assert np.mean(np.abs(drawn - wanted)[middle, 6:90]) < 3
    choose(driver, "b", "baseline")
    with Image.open(io.BytesIO(stage.screenshot_as_png)) as image:
        assert np.asarray(image.convert("RGB"))[middle, 6:90].max() == 0


def test_a_pressed_picture_is_compared(open_page: Open) -> None:
    driver = open_page()
    one(driver, ".scene .shot[data-recipe=cache] button").click()
    assert {tag.text for tag in all_of(driver, ".tag.right")} == {"cache"}
    assert Select(one(driver, "select[name=b]")).first_selected_option.text == "cache"
    pressed = all_of(driver, ".scene:first-child button[aria-pressed=true] img")
    assert [image.get_attribute("alt") for image in pressed] == [
        "cache: a 3D render of a rocket on a blue background"
    ]


def test_equal_pictures_borrow_their_pixels(open_page: Open, tmp_path: Path) -> None:
    results = make_results(tmp_path, count=1, size=(16, 16))
    shutil.copy(tmp_path / "images/max/000.png", tmp_path / "images/cache/000.png")
    driver = open_page(write_report(results, tmp_path))
    assert "same pixels as cache" in one(driver, ".shot[data-recipe=max]").text
    borrowed = one(driver, ".shot[data-recipe=max] img").get_attribute("src")
    assert borrowed == one(driver, ".shot[data-recipe=cache] img").get_attribute("src")
    assert not all_of(driver, ".shot[data-recipe=baseline-again]"), "it has the baseline's pixels"


def test_worst_first_puts_the_largest_lpips_on_top(open_page: Open) -> None:
    driver = open_page()
    assert scene_order(driver) == ["0", "1", "2", "3"]
    choose(driver, "order", "worst LPIPS first")
    assert scene_order(driver) == ["3", "2", "1", "0"]
    choose(driver, "order", "by number")
    assert scene_order(driver) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_overflows_sideways(open_page: Open, width: int) -> None:
    driver = open_page(width=width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of "rgb(r, g, b)"."""
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_light_and_dark(open_page: Open, dark: bool) -> None:
    driver = open_page(dark=dark)

    def colour(selector: str, which: str) -> str:
        return one(driver, selector).value_of_css_property(which).replace("rgba", "rgb")

    paper = luminance(colour("body", "background-color"))
    assert (paper < 0.1) is dark
    for selector in ("body", ".aside", "th .flag", "tr.absent th", ".scores"):
        ink = luminance(colour(selector, "color"))
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast >= 4.5, selector


def test_every_control_has_a_name(open_page: Open) -> None:
    driver = open_page()
    # Off screen the browser has not worked the names out yet.
    driver.execute_script(
        "for (const s of document.querySelectorAll('.scene')) s.style.contentVisibility = 'visible'"
    )
    controls = all_of(driver, "button, select, input, summary, a")
    assert controls
    nameless = [found for found in controls if not found.accessible_name.strip()]
    assert [found.get_attribute("outerHTML") for found in nameless if found.is_displayed()] == []


def test_missing_pictures_leave_their_reason_and_no_error(open_page: Open, tmp_path: Path) -> None:
    results = make_results(tmp_path, count=2, size=(16, 16))
    (tmp_path / "images/compile/000.png").unlink()
    (tmp_path / "images/baseline/001.png").unlink()
    driver = open_page(write_report(results, tmp_path))
    assert driver.get_log("browser") == []
    assert "000.png is missing" in one(driver, ".hole").text
    choose(driver, "b", "compile")
    first, second = all_of(driver, ".compare")
    assert not second.is_displayed()
    assert not first.is_displayed(), "compile has no picture of this prompt"
    choose(driver, "b", "max")
    assert first.is_displayed()
    assert not second.is_displayed()
