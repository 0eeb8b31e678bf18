"""What the detectors of personal information, self-identification, refusals and hedging find in real text; times.

    GEMMA2_POST_DATA=... python benchmarks/detectors.py             # counts of each kind, time of 300-token texts
    GEMMA2_POST_DATA=... python benchmarks/detectors.py --show      # each finding with what is around it, to read
    GEMMA2_POST_DATA=... python benchmarks/detectors.py --secrets   # and detect-secrets on the same text, if installed

Personal information is looked for in everything, the others in what assistants say.
"""

import argparse
import inspect
import json
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from gemma2_post.curation import manners, personal_information, self_identification

CHARACTERS = 1300
"""Of 300 tokens of English."""
NUM_CONVERSATIONS = 1500


def texts(data: Path) -> Iterator[tuple[str, bool, str]]:
    """Source, whether an assistant says it, and the text of each turn or document."""
    for line in (data / "preference/hh-rlhf/harmless-base-test.first1156.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        for side in ("chosen", "rejected"):
            for speaker, text in re.findall(
                r"(?s)\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|$)", row[side]
            ):
                yield "HH pairs", speaker == "Assistant", text
    for row in json.loads((data / "preference/llamafactory/dpo_en_demo.json").read_text(encoding="utf-8")):
        turns = [*row["conversations"], row["chosen"], row["rejected"]]
        yield from (("DPO pairs", turn["from"] == "gpt", turn["value"]) for turn in turns)
    for line in (data / "sft/tulu-1/eval_instances_tulu_1.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        for value in row.values():
            for each in value if isinstance(value, list) else [value]:
                yield "Tulu", isinstance(each, dict), each["completion"] if isinstance(each, dict) else str(each)
    for line in (data / "sft/self-instruct/seed_tasks.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        yield "self-instruct", False, row["instruction"]
        for instance in row["instances"]:
            yield from (("self-instruct", key == "output", value) for key, value in instance.items())
    for row in json.loads((data / "sft/fastchat/dummy_conversation.json").read_text(encoding="utf-8")):
        yield from (("FastChat", turn["from"] == "gpt", turn["value"]) for turn in row["conversations"])
    for row in json.loads((data / "sft/llamafactory/glaive_toolcall_en_demo.json").read_text(encoding="utf-8")):
        yield from (("tool calls", turn["from"] == "gpt", turn["value"]) for turn in row["conversations"])
    for line in (data / "benchmarks/gsm8k/train.first2000.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        yield from (("GSM8K", key == "answer", row[key]) for key in ("question", "answer"))
    for line in (data / "text/wikitext-2/valid.txt").open(encoding="utf-8"):
        yield "WikiText", True, line
    for text in (data / "text/tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n\n"):
        yield "Shakespeare", True, text


def measure(name: str, function: Callable[[str], object], conversations: list[str]) -> None:
    for text in conversations[:100]:
        function(text)
    microseconds = []
    for text in conversations:
        began = time.process_time_ns()
        function(text)
        microseconds.append((time.process_time_ns() - began) / 1000)
    mean, worst = statistics.mean(microseconds), statistics.quantiles(microseconds, n=100)[-1]
    print(f"{name}: mean {mean:.0f} us, median {statistics.median(microseconds):.0f}, 99% below {worst:.0f}")


def other_secrets() -> Callable[[str], list[str]]:
    """detect-secrets' patterns, without its entropy of every word."""
    import detect_secrets.plugins
    from detect_secrets.plugins.base import RegexBasedDetector

    modules = [
        import_module(f"detect_secrets.plugins.{path.stem}")
        for path in Path(detect_secrets.plugins.__path__[0]).glob("[a-z]*.py")
    ]
    classes = {each for module in modules for each in vars(module).values() if inspect.isclass(each)}
    plugins = [each() for each in classes if issubclass(each, RegexBasedDetector) and not inspect.isabstract(each)]
    return lambda text: [
        secret.type for plugin in plugins for line in text.splitlines() for secret in plugin.analyze_line("", line, 0)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--secrets", action="store_true")
    args = parser.parse_args()
    num_texts: Counter[str] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    pieces = []
    for source, is_assistant, text in texts(Path(os.environ["GEMMA2_POST_DATA"])):
        num_texts[source] += 1
        pieces.append(text)
        for finding in personal_information.find(text):
            found[finding.kind, source] += 1
            if args.show:
                around = text[max(0, finding.start - 50) : finding.end + 30]
                print(finding.kind, source, repr(finding.text), repr(around), sep=" | ")
        if is_assistant:
            if sentence := self_identification.find(text, "Gemma", "Google"):
                found["self_identification", source] += 1
                if args.show:
                    print("self_identification", source, repr(sentence), sep=" | ")
            if manner := manners.manner(text):
                found[manner, source] += 1
                if args.show:
                    print(manner, source, repr(text[:300]), sep=" | ")
    print(dict(num_texts))
    for (kind, source), count in sorted(found.items()):
        print(f"{kind} in {source}: {count}")
    random.Random(0).shuffle(pieces)
    joined = "\n".join(pieces)
    conversations = [
        joined[start : start + CHARACTERS] for start in range(0, CHARACTERS * NUM_CONVERSATIONS, CHARACTERS)
    ]
    measure("personal information", personal_information.find, conversations)
    measure("self-identification", lambda text: self_identification.find(text, "Gemma", "Google"), conversations)
    if args.secrets:
        find = other_secrets()
        print(Counter(kind for text in conversations for kind in find(text)))
        measure("detect-secrets", find, conversations)


if __name__ == "__main__":
    main()
