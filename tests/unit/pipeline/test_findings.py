"""The wording of findings."""

from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from data_prep.errors import UserError
from pipeline.findings import describe_error, dotted, model_at, nearest, raise_findings, show


class Inner(BaseModel):
    pair: tuple[int, int] = (1, 2)
    kind: Literal["a", "b"] = "a"
    share: float = Field(0.5, gt=0.0, lt=1.0, allow_inf_nan=False)
    odd: int = Field(1, multiple_of=3)


class Outer(BaseModel):
    inner: Inner | None = None
    name: str = ""


@pytest.mark.parametrize(
    ("name", "ending"),
    [("stag", ", did you mean 'stage'?"), ("qqq", "; valid: stage, steps")],
)
def test_nearest(name, ending):
    assert nearest(name, ["stage", "steps"]) == ending


def test_dotted():
    assert dotted(("optimizer", "betas", 1)) == "optimizer.betas[1]"
    assert dotted(("a",)) == "a"


def test_model_at():
    assert model_at(Outer, ()) is Outer
    assert model_at(Outer, ("inner",)) is Inner
    assert model_at(Outer, ("name",)) is Outer


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("pair", [1, 2, 3], "is [1, 2, 3]; it must be a list of 2"),
        ("pair", 5, "is 5; it must be a list"),
        ("kind", "c", "is \"c\"; it must be 'a' or 'b'"),
        ("share", 1, "is 1; it must be less than 1.0"),
        ("share", 0, "is 0; it must be greater than 0.0"),
        ("share", [], "is []; it must be a number"),
        ("odd", 4, "is 4; Input should be a multiple of 3"),
        ("odd", 1.5, "is 1.5; it must be a whole number, without a decimal point or exponent"),
    ],
)
def test_describe_error(key, value, words):
    with pytest.raises(ValidationError) as caught:
        Inner.model_validate({key: value})
    (error,) = caught.value.errors()
    assert describe_error(error) == words


def test_show_is_short():
    assert show("a" * 100) == '"' + "a" * 76 + "..."
    assert show({"a": None, "b": True}) == '{"a": null, "b": true}'


def test_raise_findings():
    raise_findings("x.json", [])
    with pytest.raises(UserError) as one:
        raise_findings("x.json", ["a is wrong"])
    assert str(one.value) == "x.json: a is wrong"
    with pytest.raises(UserError) as two:
        raise_findings("x.json", ["a is wrong", "b is missing"])
    assert str(two.value) == "x.json has 2 problems:\n  - a is wrong\n  - b is missing"
