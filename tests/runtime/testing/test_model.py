"""The model of the chaos soak finds what it is there for, and nothing where all is well."""

from __future__ import annotations

from .model import ROOT, MeshModel, Rule


def fed(*numbers: int, open_numbers: tuple[int, ...] = ()) -> MeshModel:
    """A mesh of one rank to which these messages were sent."""
    model = MeshModel("mesh", 1)
    for number in numbers:
        model.on_send(number, [0], is_open=number in open_numbers)
    return model


def entries(*numbers: int, sender: str = ROOT) -> list[tuple[str, int]]:
    return [(sender, number) for number in numbers]


def rules(model: MeshModel) -> list[Rule]:
    return [violation.rule for violation in model.check()]


def test_everything_handled_in_order_is_right() -> None:
    model = fed(1, 2, 3, 4, open_numbers=(2,))
    model.on_answer(1, "0/a", 1)
    model.on_answer(3, "0/a", 3)
    model.on_answer(4, "0/a", 4)
    model.on_log(4, "0/a", entries(1, 2, 3, 4))

    assert rules(model) == []


def test_open_message_between_two_answers_of_a_life_must_be_there() -> None:
    model = fed(1, 2, 3, open_numbers=(2,))
    model.on_answer(1, "0/a", 1)
    model.on_answer(3, "0/a")
    model.on_log(3, "0/a", entries(1, 3))

    assert rules(model) == [Rule.LOST]


def test_open_message_around_a_death_may_be_missing() -> None:
    model = fed(1, 2, 3, open_numbers=(2,))
    model.on_answer(1, "0/a", 1)
    model.on_answer(3, "0/b", 1)
    model.on_log(3, "0/b", entries(3))

    assert rules(model) == []


def test_message_that_failed_may_have_been_handled_or_not() -> None:
    for handled in (entries(1, 2, 3), entries(1, 3)):
        model = fed(1, 2, 3)
        model.on_answer(1, "0/a", 1)
        model.on_answer(3, "0/a")
        model.on_log(3, "0/a", handled)

        assert rules(model) == []


def test_message_handled_twice_in_one_life_is_found() -> None:
    model = fed(1, 2)
    model.on_answer(2, "0/a")
    model.on_log(2, "0/a", entries(1, 1, 2))

    assert rules(model) == [Rule.TWICE]


def test_message_handled_in_two_lives_is_found() -> None:
    model = fed(1, 2)
    model.on_answer(1, "0/a")
    model.on_answer(2, "0/b")
    model.on_log(2, "0/b", entries(1, 2))

    assert Rule.TWICE in rules(model)


def test_messages_out_of_order_are_found() -> None:
    model = fed(1, 2, 3)
    model.on_answer(3, "0/a")
    model.on_log(3, "0/a", entries(2, 1, 3))

    assert rules(model) == [Rule.ORDER]


def test_life_that_had_ended_does_not_answer_again() -> None:
    model = fed(1, 2, 3)
    for number, life in ((1, "0/a"), (2, "0/b"), (3, "0/a")):
        model.on_answer(number, life)

    assert rules(model) == [Rule.ORDER]


def test_place_in_the_log_has_to_grow_and_to_be_true() -> None:
    model = fed(1, 2, 3)
    model.on_answer(1, "0/a", 2)
    model.on_answer(2, "0/a", 1)
    model.on_answer(3, "0/a")
    model.on_log(3, "0/a", entries(1, 2, 3))

    assert rules(model) == [Rule.ORDER, Rule.WRONG, Rule.WRONG]


def test_message_that_was_never_sent_is_found() -> None:
    model = fed(1)
    model.on_answer(1, "0/a")
    model.on_log(1, "0/a", entries(1, 9))

    assert Rule.WRONG in rules(model)


def test_message_of_another_actor_must_be_there_once_its_answer_was() -> None:
    model = fed(1)
    model.on_relayed(1, "1/x", "0/a", 1)
    model.on_send(3, [0])
    model.on_answer(3, "0/a")
    model.on_log(3, "0/a", entries(3))

    assert rules(model) == [Rule.LOST]


def test_two_senders_may_come_in_any_order() -> None:
    model = fed(1, 2, 3)
    model.on_relayed(2, "1/x", "0/a", 1)
    model.on_answer(1, "0/a", 2)
    model.on_answer(3, "0/a")
    model.on_log(3, "0/a", [("1/x", 2), (ROOT, 1), (ROOT, 3)])

    assert rules(model) == []
