"""What the parts of an evaluation found; a part that fails, such as a judge, does not stop the others."""

from collections.abc import Callable, Iterable
from pathlib import Path

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError, located

_REWARD_MODEL = "the reward model"


class PartsFailedError(UserError):
    """Some parts of an evaluation could not be measured; the others are written."""

    status = 4

    def __init__(self, output_dir: Path, failed: dict[str, str]):
        reasons = "; ".join(f"{part}: {reason}" for part, reason in failed.items())
        super().__init__(
            f"{reasons} (what else was measured is in {output_dir / contract.MODELS}, and is kept: the same command, "
            "also with another judge, measures only what is missing)"
        )


class Findings:
    """The metrics of each model and of the reward model, written to a folder after each part.

    Attributes:
        models: By model, in the order in which they are compared.
        reward_model: What was found about the reward model itself.
        failed: By part, why it failed.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        self.models: dict[str, dict[str, float]] = {name: {} for name in names}
        self.reward_model: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        (folder / contract.FAILED).unlink(missing_ok=True)

    def add(self, part: str, measure: Callable[[], dict[str, dict[str, float]]]) -> None:
        """Measures a part that is about the models."""
        for name, each in self._measured(part, measure).items():
            self.models[name] |= each
        contract.write_json(self.folder / contract.MODELS, self.models)

    def add_of_reward_model(self, part: str, measure: Callable[[], dict[str, float]]) -> None:
        """Measures a part that is about the reward model."""
        self.reward_model |= self._measured(part, lambda: {_REWARD_MODEL: measure()}).get(_REWARD_MODEL, {})

    def _measured(self, part: str, measure: Callable[[], dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
        """What a part found; if it fails, nothing, and a file says why."""
        try:
            found = measure()
            for name, each in found.items():
                with located(name):
                    contract.check_finite(each)
        except UserError as error:
            self.failed[part] = str(error)
            contract.write_json(self.folder / contract.FAILED, self.failed)
            return {}
        return found

    def check(self) -> None:
        """Raises a `PartsFailedError` if a part has failed."""
        if self.failed:
            raise PartsFailedError(self.folder, self.failed)
