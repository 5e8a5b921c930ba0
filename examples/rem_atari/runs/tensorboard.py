"""Pictures and films for TensorBoard, beside the curves that `MetricsLog` writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

RGB = 3
"""TensorBoard's number for the colours of a picture."""


def show_pictures(folder: Path, pictures: Iterable[Path], epoch: int) -> None:
    """Show files under *Images*, as they are at an epoch; a GIF moves there.

    They lie in a folder of their own, so that a resumed run, which writes its curves anew, leaves them alone.

    Args:
        folder: the run's folder of event files.
        pictures: PNG and GIF files; those that are not there are left out.
        epoch: the epoch, from 0.
    """
    there = [path for path in pictures if path.is_file()]
    if not there:
        return
    with SummaryWriter(str(folder / "pictures")) as writer:
        for path in there:
            with Image.open(path) as image:
                width, height = image.size
            # The file itself: SummaryWriter.add_video would need moviepy to make the same GIF again.
            shown = Summary.Image(
                height=height, width=width, colorspace=RGB, encoded_image_string=path.read_bytes()
            )
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=path.stem, image=shown)]), epoch)
