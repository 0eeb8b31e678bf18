"""A judge says which of two answers is better, in both orders, because judges prefer one of the positions.

Every reply is appended to a file as it comes, under a hash of the question, so that no run repeats a question that
was judged before. (arXiv 2306.05685 measures how much judges prefer the first answer.)
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemma2_post.data.turns import Message, fold_system
from gemma2_post.evaluation.answering.endpoint import Completion, Endpoint, RefusedError, Request
from gemma2_post.evaluation.answering.partly import Sampling
from gemma2_post.evaluation.answering.samples import Answer, PartlyAnswered, sample_answers
from gemma2_post.evaluation.judging.rubrics import Question, comparison, safety
from gemma2_post.evaluation.judging.verdicts import Verdict, grade, is_violation, verdict
from gemma2_post.evaluation.judging.winrate import versus
from gemma2_post.stage import contract, digests
from gemma2_post.stage.errors import UserError

ATTEMPTS = 3
"""Number of times that a judge without a verdict is asked before its judgment counts as missing."""
SHORTEST_REPLY = 64
"""Tokens that a question must leave a local judge for its reply."""


@dataclass(frozen=True)
class Reply:
    """What a judge replied."""

    text: str
    is_cut: bool
    """Whether it reached its length limit."""
    is_out_of_room: bool = False
    """Whether it was cut earlier than `judge_max_tokens`, because the judge's context was full."""
    tokens: tuple[int, int] = (0, 0)
    """Tokens of the question and of the reply."""


@dataclass(frozen=True)
class Refusal:
    """Why a question got no reply; the next run asks it again."""

    reason: str


Write = Callable[[Question, Reply | Refusal], None]
"""Takes each question and its reply as it comes."""
Ask = Callable[[list[Question], int, Write], None]
"""Asks questions, given the number of the attempt."""
_RECORD: contract.Keys = {"key": str, "reply": str}
T = TypeVar("T")
Both = tuple[Verdict | None, Verdict | None]
"""Verdicts on two answers, in the given order and in the other; each is from its reader's view, the first answer."""


@dataclass
class Judged:
    """Verdicts on pairs of answers."""

    wins: list[float | None]
    """For each prompt, over both orders: 1 if the answer is better than the other, 0 if worse; in between if the judge
    sees a tie or changes its mind with the order; None if a verdict is missing."""
    num_asked: int
    """Number of the prompts that the judge was asked about; equal answers are a tie without asking."""
    disagreement: float
    """Share of the prompts with two verdicts whose verdicts contradict each other."""

    def versus(self, key: str, lengths: list[int], other_lengths: list[int]) -> dict[str, float]:
        """The win rate under `key`, also at equal lengths, with intervals; disagreement, and what is missing.

        Args:
            lengths: Lengths of the judged answers, in tokens or characters.
        """
        rows = [i for i, win in enumerate(self.wins) if win is not None]
        wins = [win for win in self.wins if win is not None]
        return versus(key, wins, [lengths[i] for i in rows], [other_lengths[i] for i in rows]) | {
            f"{key}/disagreement": self.disagreement,
            f"{key}/missing": len(self.wins) - len(rows),
            f"{key}/asked": self.num_asked,
        }


@dataclass
class Judge:
    """A judge and the file that keeps its replies."""

    ask: Ask
    name: str
    """Its name, with everything else that affects its verdicts."""
    max_tokens: int
    """Longest reply, in tokens."""
    replies: Path
    """File with all its replies."""

    silent: Counter[str] = field(default_factory=Counter)
    """Why the questions that were asked last have no verdict, by number of questions."""
    close: Callable[[], None] = lambda: None
    """Frees what a local judge holds; it is asked no more after that."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Tokens of all questions that were asked, and of all replies, those of earlier runs included."""

    def compare(self, prompts: list[list[Message]], answers: list[str], others: list[str]) -> Judged:
        """Compares answers with others to the same prompts; equal answers are a tie without asking."""
        return summarize(
            self.in_both_orders(
                [
                    None if answer == other else (comparison(prompt, answer, other), comparison(prompt, other, answer))
                    for prompt, answer, other in zip(prompts, answers, others, strict=True)
                ]
            )
        )

    def in_both_orders(self, pairs: list[tuple[Question, Question] | None]) -> list[Both | None]:
        """The verdicts on pairs, each asked with one answer first and with the other; None stays None."""
        found = self.read([text for pair in pairs if pair for text in pair], verdict)
        return [(found[pair[0]], found[pair[1]]) if pair else None for pair in pairs]

    def grades(self, questions: list[Question]) -> list[float | None]:
        """The grade from 1 to 10 that each question asks for; None if the judge gives none."""
        found = self.read(questions, grade)
        return [found[each] for each in questions]

    def violations(self, prompts: list[list[Message]], answers: list[str]) -> list[float | None]:
        """Whether each answer helps with something harmful, 1 or 0; None if the judge does not say."""
        questions = [safety(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found = self.read(questions, is_violation)
        return [found[each] for each in questions]

    def read(self, questions: list[Question], parse: Callable[[str, bool], T | None]) -> dict[Question, T | None]:
        """What each question's reply says, as `parse` reads it; None if the judge never says it.

        A reply that was cut at a lower limit does not count as an attempt.
        """
        replies: dict[str, list[Reply | Refusal]] = defaultdict(list)
        for record in contract.read_lines(self.replies, _RECORD):
            cut_at = record.get("cut_at")
            if cut_at is None or cut_at >= self.max_tokens:
                tokens, is_out_of_room = tuple(record.get("tokens", (0, 0))), record.get("is_out_of_room", False)
                replies[record["key"]].append(Reply(record["reply"], cut_at is not None, is_out_of_room, tokens))
        key_of = {each: digests.of_text("\n".join([self.name, *_texts(each)])) for each in questions}

        def found(asked: Question) -> T | None:
            said = [parse(each.text, each.is_cut) for each in replies[key_of[asked]] if isinstance(each, Reply)]
            return next((each for each in said if each is not None), None)

        self.replies.parent.mkdir(parents=True, exist_ok=True)

        def write(asked: Question, reply: Reply | Refusal) -> None:
            replies[key_of[asked]].append(reply)
            if isinstance(reply, Reply):
                cut = {"cut_at": self.max_tokens, "is_out_of_room": reply.is_out_of_room} if reply.is_cut else {}
                record = {"key": key_of[asked], "reply": reply.text, "tokens": reply.tokens} | cut
                contract.append_lines(self.replies, [record])

        for attempt in range(ATTEMPTS):
            missing = [each for each in key_of if found(each) is None and len(replies[key_of[each]]) <= attempt]
            if missing:
                self.ask(missing, attempt, write)
        values = {each: found(each) for each in key_of}
        self.silent = Counter(self._why(replies[key_of[each]][-1]) for each, value in values.items() if value is None)
        for each in key_of.values():
            for reply in replies[each]:
                if isinstance(reply, Reply):
                    self.tokens.update(questions=reply.tokens[0], replies=reply.tokens[1])
        return values

    def _why(self, last: Reply | Refusal) -> str:
        """Why a question has no verdict, and what to do; from its last reply."""
        if isinstance(last, Refusal):
            return f"were refused ({last.reason})"
        if last.is_out_of_room:
            return "left no room in the judge's context; take a judge with a longer one, or compare shorter answers"
        if last.is_cut:
            return f"had replies that were cut at judge_max_tokens {self.max_tokens}; raise it"
        return f"had replies without one; read them in {self.replies}, or choose a stronger judge"

    def check_most(self, num_missing: int, num_asked: int, what: str = "pairs") -> None:
        """Refuses to report a judge that has not judged at least half of what it was asked about last.

        Args:
            what: What it was asked about, for the error.
        """
        if num_missing > num_asked / 2:
            reasons = ". ".join(f"Of its questions, {count} {why}" for why, count in self.silent.most_common())
            raise UserError(f"the judge gave no verdict on {num_missing} of {num_asked} {what}. {reasons}")


def _texts(asked: Question) -> list[str]:
    return [asked.system, asked.text] if asked.system else [asked.text]


def summarize(verdicts: list[Both | None]) -> Judged:
    """Combines the verdicts of both orders; a strong verdict weighs as `verdicts.STRONG` others.

    Args:
        verdicts: For each prompt, the verdict with the judged answer first, then with the other one first; None for
            equal answers.
    """
    tie = Verdict(0.5)
    wins: list[float | None] = []
    disagreements = []
    for pair in verdicts:
        one, two = pair or (tie, tie)
        if one is None or two is None:
            wins.append(None)
            continue
        wins.append((one.weight * one.win + two.weight * (1 - two.win)) / (one.weight + two.weight))
        if pair:
            disagreements.append(one.win != 1 - two.win)
    return Judged(
        wins=wins,
        num_asked=sum(pair is not None for pair in verdicts),
        disagreement=sum(disagreements) / len(disagreements) if disagreements else 0.0,
    )


def ask_endpoint(judge: Endpoint, max_tokens: int, concurrency: int) -> Ask:
    """A judge behind an OpenAI-compatible endpoint: greedy at first, at temperature 1 when asked again."""

    def ask(questions: list[Question], attempt: int, write: Write) -> None:
        requests = [
            Request("a judgment", each.messages, float(attempt > 0), max_tokens, seed=attempt) for each in questions
        ]

        def write_one(number: int, said: Completion | RefusedError) -> None:
            if isinstance(said, RefusedError):
                write(questions[number], Refusal(str(said)))
                return
            tokens = said.prompt_tokens, said.completion_tokens
            write(questions[number], Reply(said.text, said.finish_reason == "length", tokens=tokens))

        judge.answer_all(requests, concurrency, write_one)

    return ask


def ask_model(
    loaded: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, max_tokens: int, batch_size: int = 8
) -> Ask:
    """A local model as judge, asked in batches: greedy at first, at temperature 1 when asked again.

    A question that leaves it fewer than `SHORTEST_REPLY` tokens for its reply gets no verdict.
    """

    def ask(questions: list[Question], attempt: int, write: Write) -> None:
        positions = loaded().config.max_position_embeddings
        fitting = _fitting(questions, tokenizer, positions, max_tokens, write)
        for start in range(0, len(fitting), batch_size):
            batch, temperature = fitting[start : start + batch_size], float(attempt > 0)
            longest = min(max_tokens, positions - max(each.num_tokens for each in batch))
            conversations = [each.conversation for each in batch]
            replies = sample_answers(
                loaded(), tokenizer, conversations, longest, temperature, batch_size, seed=attempt
            )
            for each, reply in zip(batch, replies, strict=True):
                write(each.question, _reply(reply, longest < max_tokens))

    return ask


def ask_vllm(
    served: Callable[[], Sampling], tokenizer: PreTrainedTokenizerBase, positions: int, max_tokens: int
) -> Ask:
    """A local model as judge, asked by vLLM; otherwise as `ask_model`.

    Args:
        served: Starts vLLM when it is first called.
        positions: Tokens that the judge reads at most, its reply included.
    """

    def ask(questions: list[Question], attempt: int, write: Write) -> None:
        fitting = _fitting(questions, tokenizer, positions, max_tokens, write)

        def write_some(replies: dict[int, Answer], _: list[str]) -> None:
            for number, reply in replies.items():
                each = fitting[number]
                write(each.question, _reply(reply, positions - each.num_tokens < max_tokens))

        partly = PartlyAnswered(write=write_some)
        served()([each.conversation for each in fitting], float(attempt > 0), partly)

    return ask


@dataclass(frozen=True)
class _Fitting:
    """A question that leaves a local judge room for a reply."""

    question: Question
    conversation: list[Message]
    num_tokens: int


def _fitting(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, positions: int, max_tokens: int, write: Write
) -> list[_Fitting]:
    """The questions that leave room for a reply; the others are refused."""
    conversations = [fold_system(each.messages) for each in questions]
    ids = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]
    found = []
    for each in (_Fitting(*each) for each in zip(questions, conversations, map(len, ids), strict=True)):
        if each.num_tokens <= positions - min(SHORTEST_REPLY, max_tokens):
            found.append(each)
        else:
            reason = f"{each.num_tokens} tokens, and the judge reads {positions} with its reply"
            write(each.question, Refusal(reason))
    return found


def _reply(answer: Answer, has_little_room: bool) -> Reply:
    """The reply of a local judge.

    Args:
        has_little_room: Whether the judge's context allowed fewer tokens than `judge_max_tokens`.
    """
    is_cut = not answer.stopped
    return Reply(answer.text, is_cut, is_cut and has_little_room, (len(answer.prompt_ids), answer.num_tokens))
