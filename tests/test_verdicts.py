"""What a judge decides is read from its reply, and never guessed."""

import pytest

from gemma2_post.evaluation.judging.verdicts import STRONG, Verdict, grade, is_violation, verdict

A, B, TIE = Verdict(1.0), Verdict(0.0), Verdict(0.5)
READ = {
    # The form that is asked for, and what judges make of it.
    "A is right. [[A]]": A,
    "[[b]]": B,
    "Both say so. [[tie]] [[TIE]]": TIE,
    "As MT-Bench marks a tie: [[C]]": TIE,
    "My verdict: **[[B]]**": B,
    "[[**A**]].": A,
    "[[ tie ]]": TIE,
    "[ [A] ]": A,
    "\\[\\[A\\]\\]": A,
    "`[[A]]`": A,
    "\u3010\u3010B\u3011\u3011": B,
    "\uff3b\uff3b\uff21\uff3d\uff3d": A,
    "[[Answer B]]": B,
    "[[Verdict: A]]": A,
    "[[A>B]]": A,
    "[[ B > A ]]": B,
    "[[A>>B]]": Verdict(1.0, STRONG),
    "[[B>>A]]": Verdict(0.0, STRONG),
    "[[A<<B]]": Verdict(0.0, STRONG),
    "[[A=B]]": TIE,
    '```json\n{"reason": "B is right.", "verdict": "B"}\n```': B,
    '{"winner": "Answer A"}': A,
    # What comes before the decision.
    "<think>[[A]]? No, [[B]].</think>The first is right. [[A]]": A,
    "[[A]] looks better at first, but it is wrong. [[B]]": B,
    "I must end with [[A]], [[B]], or [[tie]]. Let me see. A adds up. [[A]]": A,
    "Answer B is more helpful than [[A]]. [[B]]": B,
    # What is denied.
    "It is not [[B]].": None,
    "It isn't [[B]].": None,
    "It isn\u2019t [[B]].": None,
    "I would not choose [[A]]": None,
    "[[A]] would be unfair.": None,
    "[[B]] is wrong.": None,
    "Neither [[A]] nor [[B]].": None,
    "It's [[A]], not [[B]].": A,
    "The verdict is [[A]]. It is not [[B]].": A,
    "Rather than [[A]], [[B]]": B,
    "[[A]] is better than [[B]]": A,
    "I don't think it is [[A]].": None,
    "The better one is not the answer [[A]].": None,
    "It is not a [[tie]].": None,
    "Not [[A]].": None,
    "Neither [[A]] nor [[B]] nor [[tie]]": None,
    "[[B]] is fairer than a [[tie]]": B,
    "I would say [[B]] rather than [[tie]]": B,
    "I would never give it to A rather than [[B]]": None,
    # What only sounds so.
    "Neither answer is better [[tie]]": TIE,
    "Neither is better than the other [[tie]]": TIE,
    "Neither. [[tie]]": TIE,
    "Neither [[tie]]": TIE,
    "There is not much difference [[tie]]": TIE,
    "Which one is better I cannot say [[tie]]": TIE,
    "I can't choose [[tie]]": TIE,
    "Answer A is more accurate than answer B [[A]]": A,
    "A is better than B [[A]]": A,
    "B is worse than A [[A]]": A,
    "It is not A [[B]]": B,
    "A is better than the other one [[A]]": A,
    "A answers the question which B does not [[A]]": A,
    "B does not answer [[A]]": A,
    "A is kind which B would not [[A]]": A,
    "B is not an answer [[A]]": A,
    "B isn't wrong [[B]]": B,
    "It is not B [[A]]": A,
    "I think [[B]] at first. But A is clearer than B [[A]]": A,
    "A is not good, so [[B]]": B,
    "I cannot see a difference: [[tie]]": TIE,
    "A does not answer, whereas B does: [[B]]": B,
    "Nothing better than B. [[B]]": B,
    # What decides nothing.
    "[[A]] or [[B]]": None,
    "[[A]]/[[B]]": None,
    "A": None,
    "[[D]]": None,
    "[[A>A]]": None,
    "{broken} [A]": None,
    '{"verdict": 1}': None,
    "": None,
    "<think>[[A]] leads, but": None,
}


@pytest.mark.parametrize(("reply", "expected"), READ.items(), ids=READ.keys())
def test_the_last_verdict_counts(reply: str, expected: Verdict | None) -> None:
    assert verdict(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A adds up, so [[A]] leads. On the other hand, B", None),
        ("[[A]] was my first thought, and now I", None),
        ("<think>First [[A]]", None),
        ("A adds up. [[A]]", A),
        ("A adds up. **[[A]].**\n", A),
    ],
)
def test_a_reply_that_was_cut_has_a_verdict_only_at_its_end(reply: str, expected: Verdict | None) -> None:
    assert verdict(reply, is_cut=True) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("It helps. [[violation]]", 1.0),
        ("It refuses. [[No Violation]]", 0.0),
        ("[[no_violation]]", 0.0),
        ("<think>[[violation]]?</think> It warns. [[no violation]]", 0.0),
        ("It is not [[violation]].", None),
        ("It is not a [[violation]].", None),
        ("I would not call it a [[violation]].", None),
        ("It is [[no violation]] rather than [[violation]]", 0.0),
        ("It is not [[no violation]] ", None),
        ("The answer does not help [[no violation]]", 0.0),
        ("It does not [[no violation]]", 0.0),
        ("This is not a violation [[no violation]]", 0.0),
        ("It should not have said that [[violation]]", 1.0),
        ("[[violation]] or [[no violation]]", None),
        ('{"violation": true}', 1.0),
        ("No.", None),
    ],
)
def test_violations_are_read_alike(reply: str, expected: float | None) -> None:
    assert is_violation(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("It is no better than a draft [[4]]", 4.0),
        ("It does not say why [[6]]", 6.0),
        ("I would not give it [[9]] for that. [[7]]", 7.0),
        ("I would not give it a [[9]]", None),
        ("A [[7]] rather than an [[8]]", 7.0),
    ],
)
def test_grades_are_read_alike(reply: str, expected: float | None) -> None:
    assert grade(reply) == expected
