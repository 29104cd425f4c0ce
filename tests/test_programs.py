"""Compiled programs on disk: what a later process takes from there, and what it does not."""

import functools
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax import programs
from tora_jax.diffusion import guidance, sampler
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.diffusion.solvers import SOLVERS
from tora_jax.models.motion_fuser import MotionAttention

PASSES, ONE = jnp.arange(8, dtype=jnp.float32).reshape(2, 1, 1, 1, 1, 4), jnp.ones(())
WANT = np.float32([-8, -7, -6, -5]).reshape(1, 1, 1, 1, 4)  # 4 + 3 (0 - 4) = -8 ...


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Calls a fresh `Program` in what is a new process to it: what came out, and which functions were traced."""
    monkeypatch.setattr(programs, "_wanted", True)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))

    def call(*args, function=guidance.guide, **options):
        jax.clear_caches()
        for known in (programs._folder, programs._surroundings):
            known.cache_clear()
        program, traced = programs.Program(function, **options), []
        args = args or (PASSES, 3 * ONE, ONE)

        def listen(event, _, fun_name=None, **__):
            if event.endswith("jaxpr_trace_duration"):
                traced.append(fun_name)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            return program(*args), [name for name in traced if name == function.__name__]
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    yield call
    jax.config.update("jax_compilation_cache_dir", before)
    for known in (programs._folder, programs._surroundings):
        known.cache_clear()


def kept(folder):
    return sorted((folder / "programs").iterdir())


def test_the_next_process_traces_nothing(process, tmp_path):
    out, traced = process()
    np.testing.assert_array_equal(out, WANT)
    assert traced == ["guide"]
    out, traced = process()
    np.testing.assert_array_equal(out, WANT)
    assert traced == []
    assert len({path.stat().st_ino for path in kept(tmp_path)}) == 1


def structs(*args):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)


def test_a_prepared_program_is_the_one_that_runs(process, monkeypatch):
    """Of shapes alone, in another thread: the call that comes meanwhile waits for it, and compiles nothing."""
    compiled, program = [], programs.Program(guidance.guide)
    begun, compile_ = threading.Event(), programs._compile

    def slowly(lowered):
        compiled.append(lowered)
        begun.set()
        return compile_(lowered)

    monkeypatch.setattr(programs, "_compile", slowly)
    thread = threading.Thread(target=program.prepare, args=structs(PASSES, ONE, ONE))
    thread.start()
    assert begun.wait(60)
    np.testing.assert_array_equal(program(PASSES, 3 * ONE, ONE), WANT)
    thread.join()
    assert program.prepare(PASSES, ONE, ONE) is program.prepare(*structs(PASSES, ONE, ONE)) is not None
    assert len(compiled) == 1
    assert process()[1] == []  # the next process finds it


def test_nothing_is_prepared_where_nothing_is_kept(process, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_wanted", False)
    program = programs.Program(guidance.guide)
    assert program.prepare(*structs(PASSES, ONE, ONE)) is None
    np.testing.assert_array_equal(program(PASSES, 3 * ONE, ONE), WANT)
    assert not (tmp_path / "programs").exists()


def test_what_decides_a_program(process, tmp_path, monkeypatch):
    """Shapes, dtypes, static values, JAX's settings, flags of the compiler and the code: each has its own."""
    step = functools.partial(process, function=guidance.guide)
    step()
    assert step(PASSES[..., :3], 3 * ONE, ONE)[1]
    assert step(PASSES.astype(jnp.bfloat16), 3 * ONE, ONE)[1]
    assert step(PASSES, 3.0 * ONE, ONE, static_argnums=())[1] == []
    with jax.default_matmul_precision("float32"):
        assert step()[1]
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math=false")
        assert step()[1]
    assert step()[1] == []
    assert len({path.stat().st_ino for path in kept(tmp_path)}) == 5


def test_an_edit_that_changes_no_program(process, tmp_path, monkeypatch):
    """It is traced again, once, and not compiled."""
    process()
    monkeypatch.setattr(programs, "code", lambda: "another line")
    monkeypatch.setattr(programs, "_compile", None)
    assert process()[1]
    assert process()[1] == []
    assert len({path.stat().st_ino for path in kept(tmp_path)}) == 1


def test_nothing_is_kept_where_no_command_asks(process, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_wanted", False)
    assert process()[1]
    assert process()[1]
    assert not (tmp_path / "programs").exists()


@pytest.mark.parametrize("setting", ["jax_debug_nans", "jax_debug_infs", "jax_disable_jit"])
def test_nothing_is_kept_where_jax_looks_into_what_runs(process, tmp_path, setting):
    process()
    before = kept(tmp_path)
    jax.config.update(setting, True)
    try:
        if setting == "jax_disable_jit":
            np.testing.assert_array_equal(process()[0], WANT)
        else:
            with pytest.raises(FloatingPointError):
                process(PASSES / 0, 3 * ONE, ONE)
    finally:
        jax.config.update(setting, False)
    assert kept(tmp_path) == before


def test_code_that_is_not_of_the_package_is_traced(process, tmp_path):
    def guide(predictions, *weights):
        return guidance.guide(predictions, *weights)

    np.testing.assert_array_equal(process(function=guide)[0], WANT)
    assert process(function=guide)[1]
    assert kept(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_program_is_compiled_again(process, tmp_path, damage):
    process()
    path, _ = kept(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"is damaged \(another checksum\); its program is compiled again"):
        out, traced = process()
    np.testing.assert_array_equal(out, WANT)
    assert traced
    assert process()[1] == []


def test_a_folder_that_others_may_write_to_is_not_read(process, tmp_path):
    process()
    (tmp_path / "programs").chmod(0o777)
    with pytest.warns(UserWarning, match=r"programs: others may write there, so no program is taken from it"):
        out, traced = process()
    np.testing.assert_array_equal(out, WANT)
    assert traced


def test_a_folder_that_cannot_be_made(process, tmp_path):
    (tmp_path / "programs").write_text("")
    np.testing.assert_array_equal(process()[0], WANT)


def test_the_oldest_go(process, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 4)
    for size in (1, 2, 3):
        process(PASSES[..., :size], ONE, ONE)
    assert len(kept(tmp_path)) == 4
    assert process(PASSES[..., :3], ONE, ONE)[1] == []
    assert process(PASSES[..., :1], ONE, ONE)[1]


def test_descriptions():
    """The same in each process: no addresses; another for another field."""
    method = sampler.Method(guidance.guide, RectifiedFlow(), SOLVERS["euler"])
    said = programs.description(method)
    assert said == programs.description(sampler.Method(guidance.guide, RectifiedFlow(), SOLVERS["euler"]))
    assert "0x" not in said
    assert said != programs.description(sampler.Method(guidance.guide, RectifiedFlow(), SOLVERS["ab2"]))
    module = MotionAttention(2)
    assert programs.description(module) != programs.description(module.clone(num_heads=4))
    assert "0x" not in programs.description(functools.partial(guidance.guide, module))
    for foreign in (kept, lambda: None, object(), np.ones(3), sampler.Method(kept, RectifiedFlow(), SOLVERS["euler"])):
        assert programs.description(foreign) is None
