"""The pages in a real browser: Debian's Chromium, headless. Skipped where it is not installed.

One test is in the fast tier: a page that works at all. The others are slow.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from calib.runs.compare.comparison import compare
from calib.runs.find import read_runs
from calib.runs.pages.comparison import comparison_page
from calib.runs.pages.run import write_page

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
    steps = json.loads((run / "timestep_config.json").read_text())
    reach = {"latent": [10.0 ** (i / 10 - 4) for i in range(41)], "output": [10.0 ** (i / 10 - 7) for i in range(40)]}
    steps["predicted"] = {"of": "picture", "plan": "", "psnr": 31.0, "reach": reach}
    (run / "timestep_config.json").write_text(json.dumps(steps))
    return write_page(run)


@pytest.fixture(scope="module")
def dit_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan for a network of another family, alone in its directory."""
    run = tmp_path_factory.mktemp("dit")
    entry = {"suggested_weight_bits": 4, "suggested_activation_bits": 8, "use_percentile_clipping": False}
    layers = [f"blocks.{i}.{kind}" for i in range(12) for kind in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    plan = {name: entry | {"clip_percentile": [0, 100]} for name in ["patch.proj", *layers, "head.linear"]}
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


@pytest.mark.parametrize("which", ["run_page", pytest.param("comparison", marks=pytest.mark.slow)])
def test_works_alone(browser: Chrome, which: str, request: pytest.FixtureRequest) -> None:
    """Every button pressed, a page reports no error and asks for nothing."""
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


@pytest.mark.slow
@pytest.mark.parametrize("which", ["run_page", "comparison"])
@pytest.mark.parametrize("width", [375, 1200])
def test_no_sideways_scroll(browser: Chrome, which: str, width: int, request: pytest.FixtureRequest) -> None:
    opened(browser, request.getfixturevalue(which), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for text in browser.find_elements(By.CSS_SELECTOR, "p, h1, h2, .tile"):
        if text.is_displayed():
            assert text.rect["x"] + text.rect["width"] <= width


@pytest.mark.slow
def test_theme(browser: Chrome, run_page: Path) -> None:
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


@pytest.mark.slow
def test_slider(browser: Chrome, run_page: Path) -> None:
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


@pytest.mark.slow
def test_bits_of_inputs(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    cells = browser.find_elements(By.CSS_SELECTOR, ".bits td span")
    assert [cell.text for cell in cells] == [cell.get_attribute("data-w") for cell in cells]
    browser.find_element(By.CSS_SELECTOR, "[data-bits=a]").click()
    assert [cell.text for cell in cells] == [cell.get_attribute("data-a") for cell in cells]
    assert {cell.text for cell in cells} <= {"4", "6", "8"}


@pytest.mark.slow
def test_heat_readout(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    figure = browser.find_element(By.CSS_SELECTOR, "figure[data-heat=range-data]")
    data = json.loads(browser.execute_script("return document.getElementById('range-data').textContent"))
    image = figure.find_element(By.TAG_NAME, "img")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    rows, columns = len(data["rows"]), len(data["steps"])
    box = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.width, b.height]", image)
    right, up = (0.5 - 0.5 / columns) * box[0], (0.5 - (rows // 2 + 0.5) / rows) * box[1]
    ActionChains(browser).move_to_element_with_offset(image, int(right), -int(up)).perform()
    readout = browser.find_element(By.CLASS_NAME, "readout")
    assert readout.text == f"{data['rows'][rows // 2]}, step {data['steps'][-1]}: {data['values'][rows // 2][-1]:g}"


@pytest.mark.slow
def test_tooltips(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    script = "return [...document.querySelectorAll('svg use > title')].map((t) => t.textContent)"
    tips = browser.execute_script(script)
    assert len(tips) == 61 and all("S = " in tip and "kB" in tip for tip in tips)


def names(browser: Chrome) -> list[str]:
    """Runs that the table shows."""
    rows = browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")
    return [row.find_elements(By.TAG_NAME, "td")[1].text for row in rows if row.is_displayed()]


@pytest.mark.slow
def test_table(browser: Chrome, comparison: Path) -> None:
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


#: Of every figure: what it shows, whether it lies in the page, its smallest letters in pixels; texts that touch others
#: or stick out.
FIGURES = """
return [...document.querySelectorAll("figure svg")].map((svg) => {
  const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
  const texts = [...svg.querySelectorAll("text")].filter((text) => text.textContent.trim());
  const places = texts.map((text) => text.getBoundingClientRect());
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top + 3 || b.bottom <= a.top + 3;
  const inside = ({ left, right, top, bottom }) =>
    left > box.left - 1 && right < box.right + 1 && top > box.top - 3 && bottom < box.bottom + 3;
  return {
    label: svg.getAttribute("aria-label"), inside: box.width > 0 && box.left >= 0 && box.right <= innerWidth,
    letters: Math.min(...texts.map((text) => parseFloat(getComputedStyle(text).fontSize) * scale)),
    wrong: texts.filter((t, i) => !inside(places[i]) || places.some((p, j) => j !== i && !apart(places[i], p)))
      .map((text) => text.textContent),
  };
});
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["run_page", "comparison"])
@pytest.mark.parametrize("width", [375, 480, 700, 1200])
def test_figures_drawn_once(browser: Chrome, which: str, width: int, request: pytest.FixtureRequest) -> None:
    """One drawing of each figure serves every width: whole, with legible letters that do not touch."""
    opened(browser, request.getfixturevalue(which), width)
    figures = browser.execute_script(FIGURES)
    assert len({figure["label"] for figure in figures}) == len(figures) >= (4 if which == "run_page" else 2)
    for figure in figures:
        assert figure["inside"] and figure["letters"] > 8.5 and figure["wrong"] == [], figure
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids)), "figures share one namespace"


@pytest.mark.slow
def test_heat_map_fits(browser: Chrome, run_page: Path) -> None:
    for width in (375, 1200):
        opened(browser, run_page, width)
        for heat in browser.find_elements(By.CLASS_NAME, "heat"):
            image, names = heat.find_element(By.TAG_NAME, "img"), heat.find_elements(By.CSS_SELECTOR, ".names span")
            assert image.rect["width"] > 0.45 * heat.rect["width"]
            assert image.rect["height"] == pytest.approx(sum(name.rect["height"] for name in names), abs=2)
            assert all(name.rect["height"] >= 12 for name in names)


@pytest.mark.slow
def test_any_network_has_tables(browser: Chrome, dit_page: Path) -> None:
    opened(browser, dit_page)
    blocks, others = browser.find_elements(By.CLASS_NAME, "bits")
    assert blocks.find_element(By.TAG_NAME, "caption").text == "Blocks"
    columns = [heading.text for heading in blocks.find_elements(By.CSS_SELECTOR, "thead th[scope]")]
    assert columns == [str(number) for number in range(12)]
    rows = [row.text for row in blocks.find_elements(By.CSS_SELECTOR, "tbody th")]
    assert rows == ["attn.qkv", "mlp.fc1", "mlp.fc2"]
    assert len(blocks.find_elements(By.CSS_SELECTOR, "td span")) == 36
    assert [row.text for row in others.find_elements(By.CSS_SELECTOR, "tbody th")] == ["patch.proj", "head.linear"]


@pytest.mark.slow
def test_print_opens(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page)
    closed = "return document.querySelectorAll('details:not([open])').length"
    before = browser.execute_script(closed)
    assert before >= 2
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(closed) == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(closed) == before


@pytest.mark.slow
def test_print_light(browser: Chrome, run_page: Path) -> None:
    opened(browser, run_page, dark=True)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    ground = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert ground == "rgba(255, 255, 255, 1)"
    assert not any(button.is_displayed() for button in browser.find_elements(By.TAG_NAME, "button"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
