"""Several frozen teachers for one student, of which TRL's DistillationTrainer holds one at a time."""

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DistillationTrainer
from trl.models.utils import prepare_deepspeed


class TeachersInTurn(TrainerCallback):
    """Hands the trainer another teacher for each micro-batch, the same one on all processes.

    Whose turn it is follows from the step alone, so a resumed run goes on with the right one.
    """

    def __init__(self, trainer: DistillationTrainer, others: list[PreTrainedModel]):
        """
        Args:
            others: The teachers beside the trainer's, which are prepared as that was.
        """
        self.trainer, self.turn = trainer, 0
        self.teachers = [trainer.teacher_model, *(self._prepared(each) for each in others)]

    def _prepared(self, teacher: PreTrainedModel) -> PreTrainedModel:
        if self.trainer.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.trainer.accelerator)
        return self.trainer.accelerator.prepare_model(teacher, evaluation_mode=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._hand_over(state.global_step * args.gradient_accumulation_steps)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._hand_over(self.turn + 1)

    def _hand_over(self, turn: int) -> None:
        self.turn = turn
        self.trainer.teacher_model = self.teachers[turn % len(self.teachers)]
