"""The replay: every step played, in memory for sampling and on disk for resumption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rem_atari.errors import RunError
from rem_atari.replay.batch import SequenceBatch
from rem_atari.replay.episodes import NONE, Episodes
from rem_atari.replay.shards import Rows, ShardEntry, find_shards, has_shards, read_shard, write_shard

MEDIAN_SAMPLE = 256
"""Number of frames for `Replay.median_frame`."""


class ReplayFullError(RunError):
    """The replay holds as many rows as it has room for."""


class Replay:
    """Steps of several environments in order of arrival, sampled without ever crossing an episode's edge.

    Memory is reserved for `capacity` rows but used only as rows arrive; frames stay uint8. No row is ever
    overwritten: the schedule knows the number of steps, so a full replay is an error.

    Args:
        frame_shape: (S, S, 3).
        capacity: the largest number of rows.
        folder: where `flush` writes, or None for a replay in memory only. It must hold no shards yet: `load`
            opens one that does.
        seed: seed of the sampling.

    Raises:
        ValueError: `frame_shape` or `capacity` is invalid.
        FileExistsError: there are shards in `folder`.
    """

    def __init__(
        self, frame_shape: tuple[int, ...], capacity: int, *, folder: Path | None = None, seed: int
    ) -> None:
        _check_sizes(frame_shape, capacity)
        if folder is not None and has_shards(folder):
            raise FileExistsError(f"There is a replay in {folder} already; Replay.load() opens it.")
        self._rows = Rows.allocate(capacity, frame_shape)
        self._episodes = Episodes(capacity)
        self._folder = folder
        self._num_shards = 0
        self._shards: list[ShardEntry] = []
        self._num_flushed = 0
        self._cut_rows: list[int] = []  # flushed rows that were truncated since the last flush
        self._generator = np.random.default_rng(seed)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        frame_shape: tuple[int, ...] | None = None,
        capacity: int | None = None,
        seed: int = 0,
        entries: Sequence[ShardEntry] | None = None,
    ) -> Replay:
        """The replay whose shards lie in `folder`, as it was at its last flush, open episodes included.

        The state of the sampling is not in the shards: see `sampling_state`. Rows that were lost keep their
        place and count as steps, but are never sampled; episodes that lost rows end, truncated, before them.

        Args:
            folder: the shards' folder, to which later flushes also write.
            frame_shape: (S, S, 3); None: read from the shards, of which there must be one.
            capacity: rows there is room for; None: as many as there are.
            seed: seed of the sampling.
            entries: what `shards` returned for them; None if `shards` will not be called after loading.

        Raises:
            ReplayCorruptError: a shard cannot be read, or one is missing; the message names it.
            ReplayFullError: there are more rows than `capacity`.
            ValueError: the frames' shape is unknown, or another than `frame_shape`.
        """
        shards = find_shards(folder)
        if not shards and frame_shape is None:
            raise ValueError(f"Replay.load(): there are no shards in {folder}, and frame_shape is not given.")
        shape = tuple(frame_shape or shards[0].frame_shape)
        if shards and shards[0].frame_shape != shape:
            raise ValueError(
                f"Replay.load(): frames in {folder} are {shards[0].frame_shape}; wanted {shape}."
            )
        num_rows = sum(shard.num_rows + shard.lost_rows for shard in shards)
        replay = cls(shape, max(num_rows, 1) if capacity is None else capacity, seed=seed)
        if num_rows > replay.capacity:
            raise ReplayFullError(
                f"The replay in {folder} holds {num_rows} rows; its capacity is {capacity}."
            )
        for shard in shards:
            replay._take_in(*read_shard(shard))
            if shard.lost_rows > 0:
                replay._pass_over(shard.lost_rows)
        replay._folder, replay._num_shards = folder, len(shards)
        replay._shards = list(entries) if entries is not None else []
        return replay

    @property
    def capacity(self) -> int:
        """The largest number of rows."""
        return len(self._rows)

    @property
    def room(self) -> int:
        """The number of rows that can still be stored."""
        return self.capacity - self.num_steps

    @property
    def num_steps(self) -> int:
        """Rows stored: environment steps."""
        return self._episodes.num_rows

    @property
    def num_episodes(self) -> int:
        """Episodes begun, open ones included."""
        return self._episodes.num_episodes

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of a frame, (S, S, 3)."""
        return self._rows.frames.shape[1:]

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """The shards on disk, oldest first, for a checkpoint.

        Raises:
            RuntimeError: the replay was loaded without their entries.
        """
        if len(self._shards) != self._num_shards:
            raise RuntimeError("Replay.shards: the replay was loaded without entries, so they are not known.")
        return tuple(self._shards)

    def append(
        self, env_index: int, frame: np.ndarray, action: int, reward: float, terminated: bool, truncated: bool
    ) -> None:
        """Store one step of environment `env_index`.

        Args:
            env_index: the environment, from 0; its steps arrive in order.
            frame: the frame that was acted on, (S, S, 3) uint8.
            action: the action that was taken, from 0.
            reward: the raw reward that followed.
            terminated: the episode ended of itself with this step.
            truncated: the episode was cut short after this step.

        Raises:
            ReplayFullError: there is no room.
            ValueError: the frame is of another shape or type, or an index is negative.
        """
        if self.room == 0:
            raise ReplayFullError(f"The replay is full: its capacity is {self.capacity} steps.")
        if frame.shape != self.frame_shape or frame.dtype != np.uint8:
            got = f"{frame.dtype} {frame.shape}"
            raise ValueError(f"Replay.append(): frame is {got}; wanted uint8 {self.frame_shape}.")
        if env_index < 0 or action < 0:
            raise ValueError(f"Replay.append(): env_index is {env_index}, action is {action}; both are >= 0.")
        row = self.num_steps
        self._rows.frames[row] = frame
        self._rows.env_indices[row] = env_index
        self._rows.actions[row] = action
        self._rows.rewards[row] = reward
        self._rows.terminated[row] = terminated
        self._rows.truncated[row] = truncated
        self._episodes.add(env_index, is_last=terminated or truncated)

    def columns(self) -> dict[str, np.ndarray]:
        """Copies of the rows stored, column by column, for `extend`."""
        return {name: column[: self.num_steps].copy() for name, column in self._rows.columns().items()}

    def extend(self, columns: Mapping[str, np.ndarray]) -> None:
        """Store rows that `columns` gave, as if they arrived now.

        Raises:
            ReplayFullError, ValueError: as `append`.
        """
        names = ("env_indices", "frames", "actions", "rewards", "terminated", "truncated")
        for row in zip(*(columns[name] for name in names), strict=True):
            env_index, frame, action, reward, terminated, truncated = row
            self.append(int(env_index), frame, int(action), float(reward), bool(terminated), bool(truncated))

    def cut(self, env_index: int | None = None) -> None:
        """End an open episode as truncated: its environment was restarted, and no step follows.

        To be called when environments are started anew, or the next episode would be taken for the open one's
        continuation.

        Args:
            env_index: the environment that was restarted; None: all of them.
        """
        for index in self._episodes.open_in() if env_index is None else [env_index]:
            row = self._episodes.close(index)
            if row == NONE:
                continue
            self._rows.truncated[row] = True
            if row < self._num_flushed:
                self._cut_rows.append(row)

    def ready(self, min_real: int) -> bool:
        """Whether some episode has `min_real` steps and can be sampled."""
        return len(self.segment_ends(min_real)) > 0

    def sample_frames(self, n: int) -> Tensor:
        """n frames, uniform over all stored ones, with replacement: (n, S, S, 3) uint8.

        Raises:
            ValueError: the replay is empty.
        """
        return torch.from_numpy(self._rows.frames[self._draw(n, min_real=1)])

    def stored_frames(self, start: int) -> Tensor:
        """All frames from row `start` on except lost ones, oldest first: (n, S, S, 3) uint8."""
        return self.frames_at(self._episodes.rows(start))

    def frames_at(self, rows: np.ndarray) -> Tensor:
        """Copies of the frames of rows (n,): (n, S, S, 3) uint8."""
        return torch.from_numpy(self._rows.frames[rows])

    def rows_by_episode(self) -> np.ndarray:
        """All rows except lost ones, episode after episode, each in the order of its steps: (n,) int64."""
        return self._episodes.in_order()

    def sample_sequences(self, n: int, length: int, *, min_real: int) -> SequenceBatch:
        """n sequences of `length` steps, uniform over their first steps, padded on the right.

        A step is a possible start if at least `min_real` steps of its episode begin with it.

        Raises:
            ValueError: no episode has `min_real` steps, or 1 <= min_real <= length does not hold.
        """
        _check_lengths(length, min_real)
        # Steps with min_real - 1 others before them correspond one to one to the possible starts.
        starts = self._episodes.walk_back(self._draw(n, min_real), min_real)[:, -1]
        return self.sequences_at(starts, length)

    def sequences_at(self, starts: np.ndarray, length: int) -> SequenceBatch:
        """The sequences of `length` steps that begin at rows `starts` (n,), padded on the right."""
        return self._gather(self._episodes.walk_on(starts, length))

    def sequence_starts(self, min_real: int) -> np.ndarray:
        """All rows with which at least `min_real` steps of their episode begin, ascending, (n,) int64."""
        return np.sort(self._episodes.walk_back(self.segment_ends(min_real), min_real)[:, -1])

    def events_after(self, starts: np.ndarray, skip: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether a reward, and whether an end, lies in steps `skip` to `length - 1` from each row on.

        Args:
            starts: the rows, (n,).
            skip, length: the steps looked at, within the row's episode.

        Returns:
            (n,) bool each.
        """
        # The last entries belong to NONE: nothing happens beyond an episode's edge.
        pays, ends = np.append(self._rows.rewards != 0, False), np.append(self._rows.terminated, False)
        rows = self._episodes.walk_on(starts, length)[:, skip:]
        return pays[rows].any(axis=1), ends[rows].any(axis=1)

    def choose(self, rows: np.ndarray, n: int, chances: np.ndarray | None = None) -> np.ndarray:
        """n of the rows (m,) with replacement, in proportion to `chances` (m,) or, without them, uniform."""
        if chances is None:
            return rows[self._generator.integers(len(rows), size=n)]
        return self._generator.choice(rows, size=n, p=chances / chances.sum())

    def allot(self, n: int, chances: np.ndarray) -> np.ndarray:
        """The number of n draws for each of k kinds with these `chances` (k,): (k,) int64.

        Its mean is n times the chance, and it differs from that by less than 1 (systematic sampling). n may
        be 0.
        """
        ticks = (self._generator.random() + np.arange(n)) / max(n, 1)
        kinds = np.searchsorted(np.cumsum(chances) / chances.sum(), ticks, side="right")
        return np.bincount(kinds, minlength=len(chances))

    def sample_segments(self, n: int, length: int, *, min_real: int) -> SequenceBatch:
        """n segments of `length` steps, uniform over their last steps, padded on the left.

        A step is a possible end if at least `min_real` steps of its episode end with it.

        Raises:
            ValueError: no episode has `min_real` steps, or 1 <= min_real <= length does not hold.
        """
        _check_lengths(length, min_real)
        return self.segments_at(self._draw(n, min_real), length)

    def segments_at(self, ends: np.ndarray, length: int) -> SequenceBatch:
        """The segments of `length` steps that end at rows `ends` (n,), padded on the left."""
        return self._gather(self._episodes.walk_back(ends, length)[:, ::-1])

    def segment_ends(self, min_real: int) -> np.ndarray:
        """All rows that at least `min_real` steps of their episode end with, ascending, (n,) int64."""
        return self._episodes.rows_with(min_real)

    def median_frame(self) -> Tensor:
        """Each pixel's median over a sample of the stored frames, evenly spaced in time: (S, S, 3) uint8.

        It is the background if the camera stands still. For an even number of frames it is the upper median.

        Raises:
            ValueError: the replay is empty.
        """
        if self.num_steps == 0:
            raise ValueError("Replay.median_frame(): the replay is empty.")
        stored = self._episodes.rows()
        if len(stored) == 0:
            raise ValueError("Replay.median_frame(): every stored row was lost.")
        count = min(len(stored), MEDIAN_SAMPLE)
        chosen = stored[np.linspace(0, len(stored) - 1, count).round().astype(np.int64)]
        return torch.from_numpy(np.partition(self._rows.frames[chosen], count // 2, axis=0)[count // 2])

    def flush(self) -> Path | None:
        """Write the rows since the last flush as one new shard; None if there are none.

        A replay without a folder writes nothing.

        Raises:
            OSError: the shard could not be written; the next flush tries again.
        """
        if self._folder is None or (self.num_steps == self._num_flushed and not self._cut_rows):
            return None
        rows = self._rows.view(self._num_flushed, self.num_steps)
        entry = write_shard(self._folder, self._num_shards, self._num_flushed, rows, self._cut_rows)
        self._shards.append(entry)
        self._num_shards += 1
        self._num_flushed = self.num_steps
        self._cut_rows = []
        return self._folder / entry.name

    def sampling_state(self) -> dict[str, Any]:
        """The state of the sampling's random numbers, plain JSON data."""
        return dict(self._generator.bit_generator.state)

    def set_sampling_state(self, state: Mapping[str, Any]) -> None:
        """Restore a `sampling_state`."""
        self._generator.bit_generator.state = dict(state)

    def _take_in(self, rows: Rows, cut_rows: np.ndarray) -> None:
        """Replay the rows and cuts between two flushes. Cuts of flushed rows came before the new rows."""
        for row in cut_rows:
            if self._episodes.is_lost(row):
                continue  # and with it all episodes open at the time
            self._rows.truncated[row] = True
            self._episodes.close(int(self._rows.env_indices[row]))
        start = self.num_steps
        self._rows.view(start, start + len(rows)).copy_from(rows)
        for env_index, is_last in zip(rows.env_indices, rows.terminated | rows.truncated, strict=True):
            self._episodes.add(int(env_index), is_last=bool(is_last))
        self._num_flushed = self.num_steps

    def _pass_over(self, num_rows: int) -> None:
        """Leave room for lost rows. Episodes open before them end there, because their course is unknown."""
        for env_index in self._episodes.open_in():
            self._rows.truncated[self._episodes.close(env_index)] = True
        self._episodes.lose(num_rows)
        self._num_flushed = self.num_steps

    def _draw(self, n: int, min_real: int) -> np.ndarray:
        """n rows (n,), uniform over those that at least `min_real` steps of their episode end with."""
        candidates = self.segment_ends(min_real)
        if len(candidates) == 0:
            raise ValueError(
                f"Replay: nothing to sample; no episode of {self.num_episodes} has {min_real} steps."
            )
        return self.choose(candidates, n)

    def _gather(self, rows: np.ndarray) -> SequenceBatch:
        """The steps at `rows` (n, T), where NONE is padding."""
        mask = rows != NONE
        columns = self._rows.columns()
        found = {name: columns[name][rows] for name in ("actions", "rewards", "terminated", "truncated")}
        for column in found.values():
            column[~mask] = 0
        return SequenceBatch(
            actions=torch.from_numpy(found["actions"].astype(np.int64)),
            rewards=torch.from_numpy(found["rewards"]),
            ended=torch.from_numpy(found["terminated"]),
            truncated=torch.from_numpy(found["truncated"]),
            mask=torch.from_numpy(mask),
            rows=torch.from_numpy(rows.copy()),
            stored=torch.from_numpy(self._rows.frames),
        )


def _check_sizes(frame_shape: tuple[int, ...], capacity: int) -> None:
    if len(frame_shape) != 3 or frame_shape[2] != 3 or min(frame_shape) < 1:
        raise ValueError(f"Replay: frame_shape is {frame_shape}; wanted (height, width, 3).")
    if capacity < 1:
        raise ValueError(f"Replay: capacity is {capacity}; it must be at least 1.")


def _check_lengths(length: int, min_real: int) -> None:
    if not 1 <= min_real <= length:
        raise ValueError(
            f"Replay: min_real is {min_real}, length is {length}; wanted 1 <= min_real <= length."
        )
