"""What a judge decides is read from its reply, and never guessed."""

import pytest

from gemma2_post.evaluation.judging.verdicts import STRONG, Verdict, is_violation, verdict

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
    # What only sounds so.
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
        ("[[violation]] or [[no violation]]", None),
        ('{"violation": true}', 1.0),
        ("No.", None),
    ],
)
def test_violations_are_read_alike(reply: str, expected: float | None) -> None:
    assert is_violation(reply) == expected
