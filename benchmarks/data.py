"""The photos, masks and maps behind the figures: where they are, and what must be known of them."""

import os
import sys
from pathlib import Path

# Published maps of BlurRaw's test photos, in BDNET_DATA's peer_maps/.
PUBLISHED = ("EFPN", "EHS", "JNB")
# By split the photos of BlurRaw whose masks mark what is sharp as blurred: seen by eye, among those of which
# every network that didn't learn them has at most a sixth of the pixels right.
INVERTED_MASKS = {"test": ("motion0281",), "train": ("motion0142", "out_of_focus0508", "out_of_focus0509")}


def data_folder() -> Path:
    """The folder that BDNET_DATA names. Exits with a remedy where it isn't set."""
    folder = os.environ.get("BDNET_DATA")
    if not folder:
        sys.exit("set BDNET_DATA to the folder that holds blurraw/, archive/ and peer_maps/")
    return Path(folder)
