"""Where compiled programs are kept, and for how long."""

import os
import platform

import jax
import pytest

from vlmae.parallel import compile_cache


@pytest.fixture
def no_folder():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("accelerator", [False, True])
def test_old_programs_go_and_others_stay(no_folder, monkeypatch, tmp_path, accelerator):
    monkeypatch.setattr(compile_cache, "may_have_accelerator", lambda: accelerator)
    own = tmp_path if accelerator else tmp_path / platform.node()
    own.mkdir(exist_ok=True)
    for name in ("jit_old-cache", "jit_new-cache", "notes"):
        (own / name).touch()
    for name in ("jit_old-cache", "notes"):
        os.utime(own / name, (0, 0))
    compile_cache.keep_programs(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == str(own)
    assert {path.name for path in own.iterdir()} == {"jit_new-cache", "notes"}


def test_a_folder_that_is_set_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before  # of the tests
    compile_cache.keep_programs(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == before
