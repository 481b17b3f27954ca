"""skills.py: answers are right, and nothing held out, item or phrasing, stands in any training text."""
import inspect
import pydoc
import random
import re
from collections import defaultdict

import pytest

import skills
from corpus import DOMAINS, embedded_corpus


@pytest.fixture(scope="module")
def corpus():
    return embedded_corpus()


@pytest.fixture(scope="module")
def by_kind(corpus) -> dict[str, list[tuple[str, str]]]:
    """{kind: (question, reply) of all that is taught or tested}."""
    found = defaultdict(list)
    for pair in corpus.sft_train + corpus.sft_heldout:
        texts = [message["content"] for message in pair["messages"]]
        if len(texts) == 2:                     # a second turn may be of another kind
            found[pair["kind"]].append(tuple(texts))
    return found


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def answer(reply: str) -> str:
    return reply.split("The answer is ")[1].removesuffix(".")


def test_steps_and_answers_are_right(by_kind):
    for question, reply in by_kind["sum of two"] + by_kind["sum of three"]:
        *steps, final = re.split(r"\. |, ", reply)
        assert all(eval(step.replace("=", "==")) for step in steps)
        assert numbers(steps[-1])[-1] == numbers(final)[0]
        if not re.search("[a-z] has|[a-z] had|There were", question, re.I):
            assert eval(re.search(r"\d+( [+-] \d+)+", question)[0]) == numbers(final)[0]
    for question, reply in by_kind["comparison"]:
        choose = max if re.search("larger|bigger|greater", question) else min
        assert choose(numbers(question)) == int(answer(reply))
    for question, reply in by_kind["sequence"]:
        a, b, *_, last = numbers(question)
        assert int(answer(reply)) == last + b - a and f"are {b - a}, {last} + {b - a} = " in reply
    for question, reply in by_kind["sort"]:
        assert sorted(numbers(question)) == numbers(answer(reply))
    for question, reply in by_kind["reverse"]:
        words = answer(reply).split(", ")
        assert ", ".join(reversed(words)) in question
    for question, reply in by_kind["letters"]:
        letter, word = re.search(r"(?:many|letters|the|is) (\w) .*?(\w+)\W*$", question, re.I).groups()
        assert word.count(letter) == int(answer(reply)) and reply.replace(", ", "").startswith(word[0])
    for question, reply in by_kind["clock"]:
        hour, minute = map(int, re.search(r"(\d+):(\d\d)", question).groups())
        [n] = numbers(question.replace(f"{hour}:{minute:02d}", ""))
        later = hour * 60 + minute + n
        assert answer(reply) == f"{(later // 60 - 1) % 12 + 1}:{later % 60:02d}"
    for question, reply in by_kind["weekday"]:
        day, way = re.search(f"({'|'.join(skills.DAYS)})", question)[1], -1 if "before" in question else 1
        assert skills.DAYS[(skills.DAYS.index(day) + way * numbers(question)[0]) % 7] == answer(reply)
    assert all(len(pairs) >= 5 for pairs in by_kind.values()) and len(by_kind) == 17


def test_facts_are_those_of_the_living_objects(by_kind):
    for name in ("len", "json.loads", "textwrap.dedent", "os.path.join"):
        question = f"Explain what {name} does."
        reply = dict(by_kind["summary of"])[question]
        assert reply in " ".join(inspect.getdoc(pydoc.locate(name)).split())
    modules = dict(by_kind["module of"])
    assert modules["In which module is dedent?"] == "`dedent` is in the module `textwrap`."
    assert modules["In which module is Path.exists?"] == "`Path.exists` is in the module `pathlib`."
    signatures = dict(by_kind["signature of"])
    assert signatures["Show the signature of textwrap.dedent."] == "`textwrap.dedent(text)`"
    invented = {re.search("`(.*)`", reply)[1] for _, reply in by_kind["unknown"]}
    assert len(invented) > 500 and not any(name in skills.ENCYCLOPAEDIA for name in invented)


def test_nothing_held_out_stands_in_any_training_text(corpus):
    """Items by their own numbers or words, phrasings as patterns, in documents and conversations."""
    chats = [m["content"] for pair in corpus.sft_train for m in pair["messages"]]
    text = "\n".join([*chats, *corpus.train["maths"]])
    lines = {line.removeprefix("Question: ").lower().rstrip("?.!") for line in text.splitlines()}
    shown = defaultdict(set)            # what a question is about, whatever its phrasing
    about = {"sum": r"\d+(?: [+-] \d+)+", "list": r"\w+(?:, \w+){2,}"}
    for kind, pattern in about.items():
        shown[kind] = {" ".join(sorted(re.findall(r"\w+|[+-]", found))) if kind == "list" else found
                       for found in re.findall(pattern, text)}
    tested = defaultdict(int)
    for pair in corpus.sft_heldout:
        question = pair["messages"][0]["content"]
        assert question.lower().rstrip("?.!") not in lines
        for kind, pattern in about.items():
            if kind == "list" and pair["kind"] not in ("sort", "reverse"):
                continue
            for found in re.findall(pattern, question):
                found = " ".join(sorted(re.findall(r"\w+|[+-]", found))) if kind == "list" else found
                assert found not in shown[kind], (pair["kind"], found)
                tested[kind] += 1
    assert min(tested.values()) > 50
    for row in [*skills.PHRASINGS.values(), skills.STORIES, *skills.MANNERS]:
        unseen = row.split(" | ")[-1].lower().rstrip("?.!")
        pattern = re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(unseen)))
        assert not any(pattern.fullmatch(line) for line in lines)


def test_every_domain_and_skill_is_there_and_own_data_gets_none_of_it(corpus):
    assert all(corpus.train[domain] and corpus.heldout[domain] for domain in DOMAINS)
    kinds = {pair["kind"] for pair in corpus.sft_heldout}
    assert set(skills.SHOWN) | {"quiz"} <= kinds
    taught, unseen = skills.skill_items(random.Random(0), lambda key: key.startswith("1"))
    assert {item.key[:1] == "1" for item in unseen} == {True} and not any(i.key[:1] == "1" for i in taught)


@pytest.mark.parametrize("said, right", [
    ("7 + 5 = 12, 12 - 3 = 9. The answer is 9.", True), ("The answer is 9", True), ("9.", True),
    ("9 apples.", False), ("The answer is 12.", False), ("7 + 5 = 12, 12 - 3 = 9.", False), ("", False)])
def test_an_answer_is_right_if_its_last_words_are(said, right):
    assert skills.is_right("7 + 5 = 12, 12 - 3 = 9. The answer is 9.", said) == right


def test_a_sentence_is_right_if_its_first_six_words_are():
    reply = "Return a list of the words in the string."
    assert skills.is_right(reply, "Return a list of the words, perhaps.") is False
    assert skills.is_right(reply, "Return a list of the words that it has.")
    assert not skills.is_right("I do not know `foo.bar`.", "I do not know `foo.baz`.")
