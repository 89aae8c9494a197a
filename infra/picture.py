"""Make the README's picture from an audit of the sample archive: ``python -m infra.picture OUT FILE``.

Each column is one photo, as it is and with the pixels tinted that the audit's mask calls blurred.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bdnet.photo import decode
from pipeline.delta import read_table, scan
from pipeline.layout import AuditLayout
from pipeline.report import overlay

# Free to show: NASA and SpaceX gave theirs to the public domain, the coffee is CC0.
SHOWN = (
    "studio/astronaut-background-defocused.jpg",
    "café/espresso-table-defocused.jpg",
    "launch/rocket-shaken.jpg",
)
CELL = (440, 300)
CAPTION = 30
GAP = 8


def main(out: str, picture: str) -> int:
    """Write the picture."""
    sql = "SELECT uri, mask, blurred_fraction, blur_kind, focus FROM delta"
    rows = [row for part in scan(read_table(AuditLayout(out).table), sql) for row in part.to_pylist()]
    width = len(SHOWN) * (CELL[0] + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * CELL[1] + GAP + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(17)
    for column, name in enumerate(SHOWN):
        row = next(row for row in rows if row["uri"].endswith(name))
        pixels = decode(Path(row["uri"]).read_bytes(), 640).pixels
        assert pixels is not None
        mask = np.asarray(Image.open(io.BytesIO(row["mask"])))
        left = column * (CELL[0] + GAP)
        for line, content in enumerate((pixels, overlay(pixels, mask))):
            sheet.paste(_fill(Image.fromarray(content)), (left, line * (CELL[1] + GAP)))
        kind = f", {row['blur_kind']}" if row["blur_kind"] else ""
        text = f"{row['blurred_fraction']:.0%} blurred{kind}: {row['focus'].replace('_', ' ')}"
        draw.text((left + 4, 2 * CELL[1] + GAP + 5), text, "black", font)
    sheet.save(picture, quality=88)
    return 0


def _fill(image: Image.Image) -> Image.Image:
    """Scale and cut to the middle of a cell."""
    scale = max(CELL[0] / image.width, CELL[1] / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - CELL[0]) // 2, (image.height - CELL[1]) // 2
    return image.crop((left, top, left + CELL[0], top + CELL[1]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
