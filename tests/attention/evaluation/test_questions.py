"""Questions about hidden sentences: the answers are in the sentences, and kinds never share a place."""

from __future__ import annotations

import itertools

import pytest

from lowtide.attention.evaluation.questions import HARD_KINDS, KINDS, Reply, ask


@pytest.mark.parametrize("kind", [*KINDS, "paraphrase", "two questions", "question first"])
def test_the_answer_is_in_the_sentences(kind: str) -> None:
    for seed in range(30):
        question = ask(kind, seed)
        assert question == ask(kind, seed) and question.kind == kind
        assert len(question.replies) == len(question.sentences)
        for sentence, reply in zip(question.sentences, question.replies, strict=True):
            assert reply.is_in(sentence)
            assert not reply.is_in(reply.lead) and not reply.is_in(question.text)
        assert question.comes_first == (kind == "question first")


def test_an_aside_repeats_the_answer() -> None:
    question = ask("pass key", 3)
    assert question.replies[0].is_in(question.aside)
    assert not any(ask(kind, 3).aside for kind in (*KINDS[1:], *HARD_KINDS))


def test_another_seed_asks_another_question() -> None:
    for kind in KINDS:
        assert len({ask(kind, seed).sentences for seed in range(12)}) > 8


def test_two_facts_share_a_wording_and_have_two_places() -> None:
    for seed in range(20):
        first, second = ask("two facts", seed).sentences
        assert first.split()[:2] == second.split()[:2] and first != second


def test_the_count_is_the_number_of_sentences() -> None:
    numbers = {"two": 2, "three": 3, "four": 4}
    for seed in range(20):
        question = ask("counting", seed)
        word, figure = question.replies[0].accepted
        assert numbers[word] == int(figure) == len(set(question.sentences))


def test_questions_of_all_kinds_can_share_a_text() -> None:
    for seeds in itertools.product(range(5), repeat=2):
        sentences = [
            sentence
            for index, kind in enumerate((*KINDS, *HARD_KINDS))
            for sentence in ask(kind, seeds[index % 2]).sentences
        ]
        words = [word.strip(".") for sentence in sentences for word in sentence.split()[1:]]
        places = [
            word for word in words if word[0].isupper() and word not in ("Mondays", "Remember")
        ]
        assert len(places) == len(set(places)) >= 8


def test_a_reply_must_be_a_whole_word() -> None:
    reply = Reply("The number is", ("two", "2"))
    assert reply.is_in(" two.") and reply.is_in("it is 2, I think")
    assert not reply.is_in("12 or twofold")
