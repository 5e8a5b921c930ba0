"""The agent beside rivals that need no learning: which measures are compared, and who wins."""

from __future__ import annotations

from dataclasses import dataclass

from rem_atari.report.analysis import FrameErrors, TokenScores, psnr
from rem_atari.report.horizon import HorizonErrors


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure of the agent beside a rival that needs no learning, and whether the agent wins.

    Attributes:
        measure: name of the measure.
        ours: the agent's value.
        rival: name of what it is compared with.
        theirs: the rival's value.
        higher_is_better: direction of the measure.
        explanation: one sentence on what the measure means.
        percent: the values are shares, shown in percent.
    """

    measure: str
    ours: float
    rival: str
    theirs: float
    higher_is_better: bool
    explanation: str
    percent: bool = False

    @property
    def passed(self) -> bool:
        """Whether the agent is strictly better; False where a value is not a number."""
        return self.ours > self.theirs if self.higher_is_better else self.ours < self.theirs


def compare_frames(ours: FrameErrors, mean_frame: FrameErrors) -> list[Comparison]:
    """Reconstructions beside the mean training frame."""
    rows = [
        Comparison(
            measure="Reconstruction error (MSE)",
            ours=ours.mse,
            rival="mean frame",
            theirs=mean_frame.mse,
            higher_is_better=False,
            explanation="Mean squared error over all pixels of frames scaled to [−1, 1]; the mean frame is"
            " the average of the training frames, shown whatever the game does.",
        ),
        Comparison(
            measure="Reconstruction PSNR, dB",
            ours=ours.psnr,
            rival="mean frame",
            theirs=mean_frame.psnr,
            higher_is_better=True,
            explanation="The same error on a logarithmic scale: 10 dB more is a tenth of the error.",
        ),
    ]
    if ours.foreground_mse is not None and mean_frame.foreground_mse is not None:
        foreground = Comparison(
            measure="Foreground error (MSE)",
            ours=ours.foreground_mse,
            rival="mean frame",
            theirs=mean_frame.foreground_mse,
            higher_is_better=False,
            explanation="The error on pixels that differ from the median frame alone: the ball, the paddle,"
            " the enemies, which the error over all pixels hardly sees.",
        )
        rows.append(foreground)
    if ours.moving_mse is not None and mean_frame.moving_mse is not None:
        moving = Comparison(
            measure="Error on moving pixels (MSE)",
            ours=ours.moving_mse,
            rival="mean frame",
            theirs=mean_frame.moving_mse,
            higher_is_better=False,
            explanation="The error on pixels that changed since the frame before alone.",
        )
        rows.append(moving)
    return rows


def compare_tokens(
    ours: TokenScores,
    *,
    unigram: TokenScores,
    place_unigram: TokenScores,
    copy: TokenScores,
    copy_weight: float,
) -> list[Comparison]:
    """The world model's next-frame tokens beside three predictors that only count."""
    rivals = [
        ("unigram", unigram, "how often each code occurs in training, whatever its place"),
        ("unigram per place", place_unigram, "how often each code occurs at its place in training"),
        (
            "copy the last frame",
            copy,
            "the token of the frame before, mixed with the unigram by a weight fitted on training frames so"
            f" that a change is never impossible (here {copy_weight:.2f} to copy)",
        ),
    ]
    rows = [
        Comparison(
            measure="Token cross-entropy, nats",
            ours=ours.cross_entropy,
            rival=name,
            theirs=scores.cross_entropy,
            higher_is_better=False,
            explanation="Mean −ln of the chance given to each token of the real next frame; the rival knows"
            f" {knows}.",
        )
        for name, scores, knows in rivals
    ]
    return rows + _compare_accuracies(ours, place_unigram, copy)


def _compare_accuracies(ours: TokenScores, place_unigram: TokenScores, copy: TokenScores) -> list[Comparison]:
    """Accuracy of all tokens, and of those that changed if any did."""
    rows = [
        Comparison(
            measure="Token accuracy",
            ours=ours.accuracy,
            rival="copy the last frame",
            theirs=copy.accuracy,
            higher_is_better=True,
            percent=True,
            explanation="Share of all tokens of the next frame that the most likely guess hits.",
        )
    ]
    if ours.changed_accuracy is not None and place_unigram.changed_accuracy is not None:
        changed = Comparison(
            measure="Accuracy where tokens changed",
            ours=ours.changed_accuracy,
            rival="unigram per place",
            theirs=place_unigram.changed_accuracy,
            higher_is_better=True,
            percent=True,
            explanation=f"The same over the {ours.changed_share:.1%} of tokens that differ from the frame"
            " before, where copying is always wrong: motion, and the flicker of the tokenizer.",
        )
        rows.append(changed)
    return rows


def compare_rewards(ours: TokenScores, base_rate: TokenScores) -> list[Comparison]:
    """The world model's reward signs beside how often each sign occurs."""
    return [
        Comparison(
            measure="Reward cross-entropy, nats",
            ours=ours.cross_entropy,
            rival="base rate",
            theirs=base_rate.cross_entropy,
            higher_is_better=False,
            explanation="Mean −ln of the chance given to the sign of each real reward; the rival knows how"
            f" often each sign occurs in training, and {ours.changed_share:.1%} of these rewards are not 0.",
        )
    ]


def compare_horizon(errors: HorizonErrors) -> list[Comparison]:
    """Imagined frames beside the frame from which imagination began, over all steps at once."""
    return [
        Comparison(
            measure="PSNR of imagined frames, dB",
            ours=psnr(errors.mean("imagined")),
            rival="copy the last frame",
            theirs=psnr(errors.mean("copied")),
            higher_is_better=True,
            explanation=f"Of the mean error over the {len(errors.steps)} steps of the controller's horizon,"
            " under the actions that were really taken; the rival shows the last real frame, unchanged.",
        )
    ]
