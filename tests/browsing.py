"""Pages looked at in a headless Chromium: what tests of reports and cards share."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REASON = "chromium is not installed (REQUIRE=1 makes this a failure)"
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
# Behind the load event, when every picture has been decoded or given up.
_MEASURE = """
<script>addEventListener("load", () => { const said = document.createElement("pre");
said.id = "widths"; said.textContent = [...document.images].map(i => i.naturalWidth).join(" ");
document.body.append(said); });</script></body>
"""


@dataclass(frozen=True)
class Seen:
    """What the browser has made of a page."""

    dom: str
    widths: list[int]
    """Of its pictures, in pixels, in their order; 0 for one that could not be shown."""
    pixels_N3: np.ndarray
    """Colours of a screenshot, 0 to 255."""

    def count(self, colour, tolerance=4):
        """How many pixels have about this colour."""
        return int((np.abs(self.pixels_N3 - colour).max(axis=1) < tolerance).sum())


def look(page: Path, folder: Path, size="1300,2600"):
    """Open a page; fails without a browser where REQUIRE is set, and skips elsewhere.

    A copy of the page that measures its pictures is opened, from beside it.
    """
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("REQUIRE") else pytest.skip)(REASON)
    measured = page.with_name(f"measured-{page.name}")
    text = page.read_text(encoding="utf-8")
    assert "</body>" in text
    measured.write_text(text.replace("</body>", _MEASURE), encoding="utf-8")
    picture = folder / "screenshot.png"
    options = (
        *(f"--user-data-dir={folder}/profile", f"--window-size={size}"),
        *("--virtual-time-budget=2000", "--dump-dom", f"--screenshot={picture}"),
    )
    try:
        dom = subprocess.run(
            [CHROMIUM, *_OPTIONS, *options, measured.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
    finally:
        measured.unlink()
    said = re.search(r'<pre id="widths">(.*?)</pre>', dom)
    assert said, dom[-1000:]
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
    return Seen(dom, [int(width) for width in said[1].split()], pixels.reshape(-1, 3))
