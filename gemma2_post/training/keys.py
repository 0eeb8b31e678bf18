"""The keys that the recipes of all training stages share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gemma2_post.data.keys import DataArguments
from gemma2_post.evaluation.keys import SampleArguments
from gemma2_post.stage.recipe import key, part

if TYPE_CHECKING:
    from trl import ModelConfig


@dataclass(kw_only=True)
class TrainingRecipe:
    """The recipe of a training stage; in `training`, each stage names its own config class of TRL."""

    trains_score_head: ClassVar[bool] = False
    """Whether a score head is trained in addition to the model."""

    training: Any = part("transformers:TrainingArguments")
    model: "ModelConfig" = part("trl:ModelConfig")
    data: DataArguments = part(DataArguments)
    samples: SampleArguments = part(SampleArguments)
    global_batch_size: int = key(help="Rows per optimizer step over all processes; accumulation follows from it.")
    save_dtype: Literal["float32", "bfloat16"] = key(
        "bfloat16", "Type of the saved weights; they are rounded to it once, at the end."
    )

    @property
    def quantization(self) -> str | None:
        """How the base is quantized: `4bit`, `8bit` or None."""
        return "4bit" if self.model.load_in_4bit else "8bit" if self.model.load_in_8bit else None
