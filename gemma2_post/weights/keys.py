"""Recipe keys that say what to merge, and how."""

from dataclasses import dataclass
from typing import Literal

from gemma2_post.stage.bounds import COUNT, FILLED
from gemma2_post.stage.paths import ModelPath
from gemma2_post.stage.recipe import key

Rule = Literal["slerp", "spherical_mean", "linear"]
Angles = Literal["layer", "tensor", "model"]


@dataclass
class MergeArguments:
    """What to merge, and how."""

    init: ModelPath = key(help="The model that the policies were trained from; a folder or a Hub model.")
    policies: list[ModelPath] | ModelPath = key(
        help="Models, or LoRA adapters on init; folders or Hub models.", bounds=FILLED
    )
    eta: list[float] | float = key(
        0.3, "How far from the start; 0 is the start, 1 the merge; several values make a sweep.", bounds=FILLED
    )
    towards: ModelPath | None = key(
        None, "The start that eta goes back to, if not init: WARP's sweep goes back to the very first one."
    )
    interpolation: Rule = key(
        "slerp", "slerp (the paper's), spherical_mean (symmetric in more than two policies) or linear."
    )
    angles: Angles = key("layer", "One angle for each layer, for each tensor, or for the model.")
    save_dtype: Literal["float32", "bfloat16"] = key(
        "bfloat16", "Type of the output, rounded to once; float32 if it is trained again."
    )
    greedy: str | None = key(
        None,
        "Merge only the best policy and those that do not lower this measure on the selection prompts: reward, or a "
        "grader's name (greedy soup).",
    )
    compare_with: list[Rule] | None = key(
        None, "Additional interpolations whose points are written as well, as RULE-eta-ETA."
    )
    rank: int | None = key(
        None, "Compress merged adapters to this rank; None for the sum of their ranks.", bounds=COUNT
    )
    adapter_only: bool = key(False, "For adapters: write the merged adapter without its sum with init.")
    force: bool = key(False, "Also merge models that do not record init as their start.")
    device: str | None = key(None, "Device that computes; None for a GPU if there is one.")

    @property
    def names(self) -> list[str]:
        """The policies, as a list even if there is only one."""
        return [self.policies] if isinstance(self.policies, str) else self.policies

    @property
    def etas(self) -> list[float]:
        """The points of the sweep, as a list even if there is only one."""
        return self.eta if isinstance(self.eta, list) else [self.eta]

    @property
    def sweeps(self) -> dict[Rule, list[float]]:
        """The etas to write, by interpolation; eta 0, which is the start in all of them, is written once."""
        others = {rule: [eta for eta in self.etas if eta] for rule in self.compare_with or []}
        return {self.interpolation: self.etas, **others}
