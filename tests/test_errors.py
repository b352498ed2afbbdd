"""Errors say everything a person needs, and can be said under other names without becoming another error."""

from __future__ import annotations

import pickle

import pytest

from shearing.errors import CombinedShearingError, ShearingError, key, named

NAMES = {"corpus": "data.corpus", "domains": "data.domains", "lora": "pretrain.lora"}


def _error(field: str = "corpus", **changes: str) -> ShearingError:
    texts = {"allowed": "a corpus", "mend": f"leave it out of {key('domains')}, or of {key('others')}", **changes}
    return ShearingError(field, value="x", **texts)  # type: ignore[arg-type]


def test_the_message_has_all_parts_and_no_marks() -> None:
    error = _error(where="a.yaml:3")
    assert str(error) == "a.yaml:3: corpus = 'x'\n  allowed: a corpus\n  to mend: leave it out of domains, or of others"
    assert error.mend == "leave it out of domains, or of others"


def test_field_and_keys_in_the_text_are_renamed_and_words_are_not() -> None:
    error = _error()
    error.rename(NAMES)
    assert str(error) == "data.corpus = 'x'\n  allowed: a corpus\n  to mend: leave it out of data.domains, or of others"
    assert (error.field, error.allowed, error.mend) == (
        "data.corpus",
        "a corpus",
        "leave it out of data.domains, or of others",
    )


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("corpus (domain a)", "data.corpus (domain a)"),
        ("corpus.domains", "corpus.domains"),
        ("other", "other"),
        ("/data/corpus", "/data/corpus"),
    ],
)
def test_what_is_renamed_of_a_field(field: str, expected: str) -> None:
    error = _error(field)
    error.rename(NAMES)
    assert error.field == expected


def test_of_a_field_that_is_more_than_a_name_the_marked_part_is_renamed() -> None:
    error = _error(f"{key('domains')}.books: {key('others')}")
    assert error.field == "domains.books: others"
    error.rename(NAMES)
    assert error.field == "data.domains.books: others"
    assert str(error).startswith("data.domains.books: others = 'x'\n")


def test_names_can_be_changed_one_after_the_other() -> None:
    later = {"data.corpus": "evaluation.corpus"}
    with pytest.raises(ShearingError, match=r"evaluation\.corpus = ") as caught, named(later), named(NAMES):
        raise _error()
    caught.value.rename({"data.domains": "evaluation.domains"})
    assert "leave it out of evaluation.domains" in str(caught.value)


def test_the_error_stays_the_same_object() -> None:
    error = _error()

    @named(NAMES)
    def component() -> None:
        raise error

    for _ in range(2):
        with pytest.raises(ShearingError) as caught:
            component()
        assert caught.value is error
        assert error.field == "data.corpus"


def test_errors_that_were_found_together_are_all_renamed() -> None:
    found = CombinedShearingError([_error(), _error("lora", mend="install it")])
    found.rename(NAMES)
    assert [error.field for error in found.errors] == ["data.corpus", "pretrain.lora"]
    assert found.field == "data.corpus"
    assert str(found) == "\n".join(map(str, found.errors))
    assert "data.domains" in found.mend


@pytest.mark.parametrize("error", [_error(), CombinedShearingError([_error(), _error("lora")])], ids=["one", "several"])
def test_errors_of_another_process_arrive_whole_and_can_be_renamed(error: ShearingError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert (str(arrived), arrived.__dict__.keys()) == (str(error), error.__dict__.keys())
    arrived.rename(NAMES)
    assert "leave it out of data.domains" in str(arrived)
    assert "leave it out of domains" in str(error)
