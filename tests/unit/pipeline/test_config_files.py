"""Reading TOML and JSON: readable errors, and keys written twice."""

import pytest

from data_prep.errors import UserError
from pipeline.config_files import JsonObject, read_json, read_toml


def message_of(read, path):
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_no_such_file(read, tmp_path):
    path = tmp_path / "missing"
    assert message_of(read, path) == f"{path}: no such file"


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_not_text(read, tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b'{"a": "\xff"}')
    assert message_of(read, path) == f"{path}: not UTF-8 text (byte 7)"


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_a_folder(read, tmp_path):
    assert message_of(read, tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


def test_json_syntax_error_has_line_and_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n  "a": 1,\n  // why\n}')
    message = message_of(read_json, path)
    assert message.startswith(f"{path}, line 3, column 3: not JSON: ")
    assert message.endswith("(comments, trailing commas and single quotes are not JSON)")


def test_json_must_be_an_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert message_of(read_json, path) == f"{path}: the top level must be an object {{...}}"


def test_json_duplicates_are_remembered_and_a_byte_order_mark_is_borne(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": {"b": 1, "b": 2, "c": 3}}', encoding="utf-8")
    document = read_json(path)
    assert document == {"a": {"b": 2, "c": 3}}
    assert isinstance(document["a"], JsonObject)
    assert (document.duplicates, document["a"].duplicates) == ([], ["b"])


def test_toml_syntax_error_has_line_and_column(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[run]\nseed = \n")
    assert message_of(read_toml, path) == (f"{path}: not TOML: Invalid value (at line 2, column 8)")


def test_toml(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[schedule]\nmax_steps = 500_000\n")
    assert read_toml(path) == {"schedule": {"max_steps": 500_000}}
