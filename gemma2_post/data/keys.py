"""The keys of recipes that describe the data."""

from dataclasses import dataclass

from gemma2_post.stage.bounds import FILLED, NOT_NEGATIVE, POSITIVE, SHARE, Bounds
from gemma2_post.stage.paths import DataPath
from gemma2_post.stage.recipe import Effect, key


@dataclass
class Source:
    """One data set of a mixture."""

    path: DataPath = key(
        help="A file (JSON, JSON lines, CSV, Parquet, also .gz and .zst), a folder or a glob of such files, a Hub "
        "data set, or module:function, which is called with the split."
    )
    split: str = key("train", "Split of a Hub data set; argument of a function.")
    name: str | None = key(None, "Configuration of a Hub data set.")
    revision: str | None = key(None, "Branch, tag or commit of a Hub data set.")
    weight: float | None = key(
        None,
        "Share of the mixture, relative to the others; no row is used twice. None: every row of every source.",
        bounds=POSITIVE,
    )


@dataclass
class DataArguments:
    """The data that is read."""

    datasets: list[Source] = key(help="Sources to train on: path, split, name, revision, weight.", bounds=FILLED)
    held_out_datasets: list[Source] | None = key(
        None,
        "Sources to evaluate on; without it, held_out_share of the training rows.",
        effect=Effect.MEASUREMENTS,
        bounds=FILLED,
    )
    columns: list[str] | None = key(
        None, "Columns kept beside the conversation, for graders and group_by.", effect=Effect.MEASUREMENTS
    )
    held_out_share: float = key(
        0.02, "Share of the rows kept for evaluation, at random.", bounds=Bounds(above=0, below=1)
    )
    max_too_long_share: float = key(
        0.05, "Rows over max_length are dropped; a larger share of them than this is an error.", bounds=SHARE
    )
    max_invalid_share: float = key(
        0.0, "Rows that are no valid chat are dropped; a larger share of them than this is an error.", bounds=SHARE
    )


@dataclass
class PreferenceArguments:
    """How preference pairs are read."""

    score_margin: float = key(
        0.0,
        "Margin in the loss for each point between score_chosen and score_rejected; 0 for none.",
        bounds=NOT_NEGATIVE,
    )
    multi_turn_share: float | None = key(
        None,
        "Share of training pairs with more than one user turn; surplus pairs are left out.",
        bounds=Bounds(above=0, below=1),
    )
