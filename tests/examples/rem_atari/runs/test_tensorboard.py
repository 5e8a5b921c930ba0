"""Pictures and films for TensorBoard: the very files of the report, at their epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rem_atari.runs.metrics import MetricsLog
from rem_atari.runs.tensorboard import show_pictures


def test_they_are_shown_as_they_are_and_outlive_a_resumed_log(tmp_path: Path) -> None:
    still, film = tmp_path / "still.png", tmp_path / "film.gif"
    frames = [Image.fromarray(np.full((6, 9, 3), shade, np.uint8)) for shade in (0, 200)]
    frames[0].save(still)
    frames[0].save(film, save_all=True, append_images=frames[1:])
    folder = tmp_path / "tensorboard"
    show_pictures(folder, [still, film, tmp_path / "missing.png"], epoch=7)
    MetricsLog(tmp_path / "metrics.jsonl", folder).close()
    events = EventAccumulator(str(folder / "pictures")).Reload()
    assert events.Tags()["images"] == ["still", "film"]
    for path in (still, film):
        (shown,) = events.Images(path.stem)
        assert (shown.step, shown.width, shown.height) == (7, 9, 6)
        assert shown.encoded_image_string == path.read_bytes()


def test_nothing_is_written_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    show_pictures(tmp_path / "tensorboard", [tmp_path / "missing.png"], epoch=0)
    assert not (tmp_path / "tensorboard").exists()
