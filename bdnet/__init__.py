"""BDNet: the blurred pixels of a photo. One photo at a time; never imports ray.

>>> import bdnet
>>> detection = bdnet.load("bdnet-topdown").detect("photo.jpg")
>>> detection.blurred_fraction, detection.blur_kind, detection.focus
"""

from typing import TYPE_CHECKING, Any

from bdnet.detect import Detection

if TYPE_CHECKING:
    from bdnet.model import Model, load

__all__ = ["Detection", "Model", "load"]


def __getattr__(name: str) -> Any:
    """Import torch with the first model: it takes seconds and hundreds of MB; decoding does without it."""
    if name in ("Model", "load"):
        from bdnet import model

        return getattr(model, name)
    raise AttributeError(f"module 'bdnet' has no attribute {name!r}")
