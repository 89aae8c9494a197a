"""BDNet: the blurred pixels of a photo. One photo at a time; never imports ray.

>>> import bdnet
>>> detection = bdnet.load("bdnet-topdown").detect("photo.jpg")
>>> detection.blurred_fraction, detection.blur_kind, detection.focus
"""

from bdnet.detect import Detection
from bdnet.model import Model, load

__all__ = ["Detection", "Model", "load"]
