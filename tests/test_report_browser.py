"""The pages in a real browser: Debian's Chromium, headless. Skipped where it is not installed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from calib.runs.compare.comparison import compare
from calib.runs.find import read_runs
from calib.runs.pages.comparison import comparison_page

import pytest
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from test_compare import sweep_of_copies

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
    pytest.mark.xdist_group("browser"),
]
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1200,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # the driver is here: nothing is to be looked for elsewhere
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def run_page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("page") / "run"))
    plan = json.loads((run / "quantization_config.json").read_text())
    for number, entry in enumerate(plan.values()):  # as analysis=allocate writes them
        entry |= {"sensitivity": 10.0 ** (-2 - number % 5), "bytes": 20_000 + 500 * number}
    (run / "quantization_config.json").write_text(json.dumps(plan))
    return write_page(run)


@pytest.fixture(scope="module")
def comparison(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    sweep = sweep_of_copies(tiny_run, folder / "sweep")
    runs = compare(read_runs([str(sweep)]), baseline="analysis=uniform")
    page = folder / "comparison.html"
    page.write_text(comparison_page(runs, folder))
    return page


def opened(browser: Chrome, page: Path, width: int = 1200, dark: bool = False) -> None:
    """Open ``page``, after what was logged before is forgotten."""
    browser.get_log("browser"), browser.get_log("performance")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(page.as_uri())


def requests(browser: Chrome) -> list[str]:
    """Addresses that were asked for since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [address for address in sent if not address.startswith("data:")]


@pytest.mark.parametrize("which", ["run_page", "comparison"])
def test_a_page_loads_nothing_and_reports_no_error(browser: Chrome, which: str, request: pytest.FixtureRequest) -> None:
    page: Path = request.getfixturevalue(which)
    opened(browser, page)
    for button in browser.find_elements(By.CSS_SELECTOR, "button"):
        if button.is_displayed():
            button.click()
    assert browser.get_log("browser") == []
    assert requests(browser) == [page.as_uri()]
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    pictures = sum(len(part.partition('"')[0]) for part in text.split("data:image/")[1:])
    assert len(text) - pictures < 2_000_000


@pytest.mark.parametrize("which", ["run_page", "comparison"])
@pytest.mark.parametrize("width", [375, 1200])
def test_nothing_scrolls_sideways_but_figures_and_tables_in_their_own_frames(
    browser: Chrome, which: str, width: int, request: pytest.FixtureRequest
) -> None:
    opened(browser, request.getfixturevalue(which), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for text in browser.find_elements(By.CSS_SELECTOR, "p, h1, h2, .tile"):
        if text.is_displayed():
            assert text.rect["x"] + text.rect["width"] <= width


def test_light_and_dark_follow_the_system_until_the_reader_chooses(browser: Chrome, run_page: Path) -> None:
    colours = {}
    for dark in (False, True):
        opened(browser, run_page, dark=dark)
        colours[dark] = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert colours[False] != colours[True]
    browser.find_element(By.CSS_SELECTOR, "[data-theme-toggle]").click()
    assert browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color") == colours[False]
    label = browser.find_element(By.CSS_SELECTOR, "figure svg text")
    assert label.value_of_css_property("fill") == "rgb(93, 99, 107)", "figures are drawn in the page's colours"


def cut_of(browser: Chrome, number: int = 0) -> str:
    script = f"return getComputedStyle(document.querySelectorAll('.stage .over')[{number}]).clipPath"
    return str(browser.execute_script(script))


def test_the_slider_moves_by_keys_by_pointer_and_by_the_buttons(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    assert "50%" in cut_of(browser)
    slider = browser.find_element(By.CSS_SELECTOR, ".stage input")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "52%" in cut_of(browser)
    assert slider.get_attribute("aria-valuetext") == "52% full precision"
    quarter = -slider.rect["width"] // 4
    ActionChains(browser).move_to_element(slider).click_and_hold().move_by_offset(quarter, 0).release().perform()
    place = float(slider.get_attribute("value") or 0)
    assert 15 < place < 35 and f"{place:.0f}%" in cut_of(browser)
    full, quantized, _ = browser.find_elements(By.CSS_SELECTOR, "[data-cut]")
    full.click()
    assert "100%" in cut_of(browser) and "100%" in cut_of(browser, 1)
    quantized.click()
    assert "100%" not in cut_of(browser) and quantized.get_attribute("aria-pressed") == "true"


def test_bits_of_inputs_are_shown_in_place_of_those_of_weights(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    cells = browser.find_elements(By.CSS_SELECTOR, ".bits td span")
    assert [cell.text for cell in cells] == [cell.get_attribute("data-w") for cell in cells]
    browser.find_element(By.CSS_SELECTOR, "[data-bits=a]").click()
    assert [cell.text for cell in cells] == [cell.get_attribute("data-a") for cell in cells]
    assert {cell.text for cell in cells} <= {"4", "6", "8"}


def test_a_heat_map_reads_out_the_value_under_the_pointer(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    figure = browser.find_element(By.CSS_SELECTOR, "figure[data-heat=range-data]")
    data = json.loads(browser.execute_script("return document.getElementById('range-data').textContent"))
    image = figure.find_element(By.CSS_SELECTOR, "svg image")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    rows, columns = len(data["rows"]), len(data["steps"])
    box = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.width, b.height]", image)
    right, up = (0.5 - 0.5 / columns) * box[0], (0.5 - (rows // 2 + 0.5) / rows) * box[1]
    ActionChains(browser).move_to_element_with_offset(image, int(right), -int(up)).perform()
    readout = browser.find_element(By.CLASS_NAME, "readout")
    assert readout.text == f"{data['rows'][rows // 2]}, step {data['steps'][-1]}: {data['values'][rows // 2][-1]:g}"


def test_dots_have_tooltips(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    script = "return [...document.querySelectorAll('svg g > title')].map((t) => t.textContent)"
    tips = browser.execute_script(script)
    assert len(tips) == 2 * 61 and all("S = " in tip and "kB" in tip for tip in tips)


def names(browser: Chrome) -> list[str]:
    """Runs that the table shows."""
    rows = browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")
    return [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows if row.is_displayed()]


def test_the_table_is_sorted_narrowed_and_shows_differences(browser: Chrome, comparison: Path) -> None:
    opened(browser, comparison)
    headings = browser.find_elements(By.CSS_SELECTOR, "#runs thead th")
    psnr = next(heading for heading in headings if heading.text.startswith("PSNR"))
    for direction in ("ascending", "descending"):
        psnr.find_element(By.TAG_NAME, "button").click()
        assert psnr.get_attribute("aria-sort") == direction
        place = headings.index(psnr)
        script = f"return [...document.querySelectorAll('#runs tbody tr')].map((r) => r.cells[{place}].dataset.value)"
        values = [float(value) for value in browser.execute_script(script) if value]
        assert values == sorted(values, reverse=direction == "descending") and len(values) >= 3
    box = browser.find_element(By.CSS_SELECTOR, "input[data-filter=runs]")
    box.send_keys("sqnr")
    assert names(browser) == ["sqnr"]
    box.clear()
    box.send_keys(" ")
    assert len(names(browser)) == 3
    deltas = browser.find_elements(By.CSS_SELECTOR, "#runs .delta")
    assert any(delta.is_displayed() for delta in deltas)
    browser.find_element(By.CSS_SELECTOR, "[data-deltas]").click()
    assert not any(delta.is_displayed() for delta in deltas)


@pytest.mark.parametrize("which", ["run_page", "comparison"])
def test_a_phone_gets_figures_of_its_own_width(browser: Chrome, which: str, request: pytest.FixtureRequest) -> None:
    for width, other in ((375, ".wide"), (1200, ".narrow")):
        opened(browser, request.getfixturevalue(which), width)
        figures = browser.find_elements(By.CSS_SELECTOR, "figure svg")
        shown = [figure for figure in figures if figure.is_displayed()]
        assert len(shown) * 2 == len(figures)
        assert not any(figure.is_displayed() for figure in browser.find_elements(By.CSS_SELECTOR, other))
        for figure in shown:
            assert figure.rect["x"] >= 0 and figure.rect["x"] + figure.rect["width"] <= width
            script = "return arguments[0].getBoundingClientRect().width / arguments[0].viewBox.baseVal.width"
            assert browser.execute_script(script, figure) > 0.9, "letters of seven points stay legible"


def test_on_paper_everything_is_open(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    closed = "return document.querySelectorAll('details:not([open])').length"
    before = browser.execute_script(closed)
    assert before >= 2
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(closed) == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(closed) == before


def test_pages_print_in_light_without_controls(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page, dark=True)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    ground = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert ground == "rgba(255, 255, 255, 1)"
    assert not any(button.is_displayed() for button in browser.find_elements(By.TAG_NAME, "button"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
