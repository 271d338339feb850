"""A run that asks for compiled layers learns before its first step that there is no compiler."""

import shutil

import pytest
import torch

from data_prep.errors import UserError
from pipeline.compilation import require_compiler

CPU = torch.device("cpu")


@pytest.fixture
def fresh():
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_one_message_says_what_to_do(monkeypatch, tmp_path):
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name in ("get_cpp_compiler", "is_gcc", "is_clang"):
        if hasattr(getattr(cpp_builder, name), "cache_clear"):
            getattr(cpp_builder, name).cache_clear()
    no_compiler = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(UserError) as raised:
        require_compiler(CPU)
    message = str(raised.value)
    assert message.startswith('model.compile = "layer" needs a C++ compiler for kernels on cpu')
    assert "InvalidCxxCompiler" in message
    assert message.endswith("set model.compile=none; the run then computes the same, more slowly")
    assert "\n" not in message


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("fresh")
def test_with_a_compiler_nothing_is_said():
    require_compiler(CPU)
