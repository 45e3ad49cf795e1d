"""Start the app, use each tab in a headless Chromium, and save what it shows to model_card/space_*.png.

pip install selenium        # and a Chromium with its driver
MODEL_ID=outputs/demo CLIP_MODEL_ID=outputs/clip python space/screenshots.py [FOLDER] [WIDTH]
"""

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait


HERE = Path(__file__).parent
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync hide-scrollbars"
).split()
SECONDS = 120
os.environ["SE_AVOID_STATS"] = "true"  # Selenium reports its use otherwise
PICKED = 9  # which of the images offered for zero-shot classification is taken


@contextmanager
def running_app() -> Iterator[str]:
    """Run the app; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    app = subprocess.Popen([sys.executable, str(HERE / "app.py")], env={**os.environ, "GRADIO_SERVER_PORT": port})
    try:
        for _ in range(SECONDS):
            if app.poll() is not None:
                sys.exit("screenshots.py: the app did not start, see above.")
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait()


@contextmanager
def browser(width: int) -> Iterator[webdriver.Chrome]:
    """A headless Chromium whose window is `width` pixels wide."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for flag in [*FLAGS, f"user-data-dir={profile}", f"window-size={width},900"]:
            options.add_argument(f"--{flag}")
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        # Named, it is not looked for on the network.
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        try:
            yield driver
        finally:
            driver.quit()


def shown(driver: webdriver.Chrome, selector: str, text: str = "") -> WebElement:
    """Wait for a visible element of this selector that holds the text; gives the first one."""

    def find(_) -> WebElement | None:
        found = driver.find_elements(By.CSS_SELECTOR, selector)
        return next((element for element in found if element.is_displayed() and text in element.text), None)

    return WebDriverWait(driver, SECONDS).until(find, f"{selector} with {text!r} did not show")


def type_into(driver: webdriver.Chrome, selector: str, text: str) -> None:
    """Replace the text in a field."""
    field = shown(driver, selector)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def act(driver: webdriver.Chrome, button: WebElement, panel: str) -> None:
    """Click a button, and wait until the panel shows something else."""
    before = shown(driver, panel).get_attribute("innerHTML")
    button.click()
    changed = WebDriverWait(driver, SECONDS)
    changed.until(lambda _: shown(driver, panel).get_attribute("innerHTML") != before, f"{panel} stayed as it was")
    time.sleep(2)  # bars grow, images load


def save(driver: webdriver.Chrome, path: Path) -> None:
    """Save a screenshot of the whole page in 256 colours, which takes a quarter of the bytes."""
    size = driver.execute_script("return [document.documentElement.clientWidth, document.body.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "model_card")
    folder.mkdir(parents=True, exist_ok=True)
    with running_app() as address, browser(int(sys.argv[2]) if len(sys.argv) > 2 else 1280) as driver:
        driver.get(address)
        type_into(driver, "#query textarea", "Frontal chest radiograph with a right pleural effusion.")
        act(driver, shown(driver, "#ask"), "#found")
        save(driver, folder / "space_search.png")

        shown(driver, "button[role=tab]", "Zero-shot").click()
        shown(driver, ".picks .grid-container")
        buttons = driver.find_elements(By.CSS_SELECTOR, ".picks .grid-container button")
        act(driver, [button for button in buttons if button.is_displayed()][PICKED], ".scores")
        type_into(driver, "#labels textarea", "chest radiograph, chest CT, brain MR, abdominal ultrasound, mammogram")
        act(driver, shown(driver, "#classify"), ".scores")
        save(driver, folder / "space_zero_shot.png")

        shown(driver, "button[role=tab]", "The space").click()
        type_into(driver, "#map_query textarea", "Axial chest CT showing a pulmonary nodule.")
        act(driver, shown(driver, "#show"), ".map")
        save(driver, folder / "space_map.png")


if __name__ == "__main__":
    main()
