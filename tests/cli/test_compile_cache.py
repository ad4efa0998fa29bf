"""Compiled programs on disk: who may write there, what a second process loads, what a killed process leaves."""

import json
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from jaxsi.cli import compile_cache
from jaxsi.cli.compile_cache import UnsafeFolderError, private_folder, sweep
from jaxsi.cli.main import main

ROOT = Path(__file__).parents[2]
# Prints the folder, the number of programs compiled and loaded, and every bit of a result.
PROGRAM = """
import json, os
from jaxsi.cli import compile_cache
compile_cache.keep_programs()
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/")[-1]))
step = jax.jit(jax.value_and_grad(lambda w, x: jnp.tanh(x @ w).sum()), donate_argnums=0)
value, gradient = step(jnp.linspace(-1, 1, 64).reshape(8, 8), jnp.linspace(0, 2, 64).reshape(8, 8))
bits = [float(x).hex() for x in (value, *gradient.ravel())]
folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
misses, hits = (events.count(f"cache_{event}") for event in ("misses", "hits"))
print(json.dumps({"folder": folder, "misses": misses, "hits": hits, "bits": bits}))
"""
VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def environment(tmp_path):
    """The environment of a user with a new cache directory; every program is kept, however fast it compiles."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return inherited | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def before_jax(monkeypatch, tmp_path):
    """The folder for programs; this process looks as if it had not imported JAX and its user had set nothing."""
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxsi" / "programs" / compile_cache.host()


def start(environment, *options):
    command = [sys.executable, *options, "-c", PROGRAM]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """(the object that it printed, its stderr)"""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def entries(folder):
    return sorted(Path(folder).glob("*-cache"))


def test_a_second_process_loads_what_the_first_compiled(environment, tmp_path):
    first, stderr = ended(start(environment, "-W", "error"))
    assert stderr == ""
    folder = Path(first["folder"])
    assert folder.parent == tmp_path / "cache" / "jaxsi" / "programs"
    assert first["hits"] == 0 and len(entries(folder)) == first["misses"] > 0
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    second, stderr = ended(start(environment, "-W", "error"))
    assert stderr == ""
    assert (second["misses"], second["hits"]) == (0, first["misses"])
    assert second["bits"] == first["bits"]


@pytest.mark.slow
def test_half_written_programs_are_compiled_again(environment):
    """Even if two processes write them at the same time."""
    first, _ = ended(start(environment))
    for number, path in enumerate(entries(first["folder"])):
        whole = path.read_bytes()
        path.write_bytes(whole[: (0, len(whole) // 2, len(whole) - 1)[number % 3]])
    # Without our sweep JAX warns, compiles, and leaves the entry as it is.
    alone, stderr = ended(start(environment | {"JAX_COMPILATION_CACHE_DIR": first["folder"]}))
    assert stderr.count("Error reading persistent compilation cache entry") == first["misses"] > 3
    assert alone["bits"] == first["bits"]
    for again, stderr in [ended(process) for process in [start(environment, "-W", "error") for _ in range(2)]]:
        assert stderr == ""
        assert (again["misses"] + again["hits"], again["bits"]) == (first["misses"], first["bits"])
    last, stderr = ended(start(environment, "-W", "error"))
    assert (last["misses"], last["hits"], stderr, last["bits"]) == (0, first["misses"], "", first["bits"])


@pytest.mark.parametrize(
    "settings",
    [
        {"JAX_COMPILATION_CACHE_DIR": "elsewhere"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        {"JAX_ENABLE_COMPILATION_CACHE": "False"},
    ],
    ids=str,
)
def test_settings_of_the_user_win(settings, before_jax, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    compile_cache.keep_programs()
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == settings
    assert not before_jax.exists()


def test_other_settings_of_the_user_stay(before_jax, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    compile_cache.keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(before_jax)
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "3"


def test_process_that_imported_jax_keeps_its_settings(before_jax, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    compile_cache.keep_programs()
    assert not before_jax.exists() and not set(VARIABLES) & set(os.environ)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_writable_for_others_is_not_used(mode, before_jax, capsys):
    for path in (private_folder(before_jax), before_jax.parent, before_jax.parent.parent):
        path.chmod(mode)
        compile_cache.keep_programs()
        assert capsys.readouterr().err.splitlines() == [
            f"jaxsi: compiled programs are not kept: others may write to {path} (mode {mode:04o}); empty it, then "
            "chmod 700 it; or set JAX_COMPILATION_CACHE_DIR to another folder"
        ]
        assert not set(VARIABLES) & set(os.environ)
        path.chmod(0o700)
    compile_cache.keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(before_jax)


def test_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    me = os.geteuid()
    folder = private_folder(tmp_path / "jaxsi" / "programs" / "host")
    assert private_folder(folder) == folder
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(UnsafeFolderError, match=rf"jaxsi belongs to user {me}, but this is user {me + 1}"):
        private_folder(folder)


def test_folder_that_cannot_be_swept_is_not_used(before_jax, capsys):
    (private_folder(before_jax) / "strange-cache").mkdir()
    compile_cache.keep_programs()
    assert "compiled programs are not kept: [Errno 21] Is a directory" in capsys.readouterr().err
    assert not set(VARIABLES) & set(os.environ)


def test_command_goes_on_if_folder_cannot_be_created(environment, tmp_path):
    (tmp_path / "cache").write_text("a file")
    value, stderr = ended(start(environment))
    assert (value["folder"], value["misses"]) == (None, 0) and len(value["bits"]) == 65
    assert "compiled programs are not kept" in stderr and "Not a directory" in stderr


def test_sweep_removes_oldest_programs_of_all_versions(tmp_path):
    def set_ages(names):
        for age, name in enumerate(names):
            os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))

    def entries_left():
        return {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}

    for name in ("old/c", "new/a", "old/b", "new/d", "new/half"):
        path = tmp_path / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zlib.compress(os.urandom(900)))
    path.write_bytes(path.read_bytes()[:-1])
    size = (tmp_path / "old" / "c-cache").stat().st_size
    sweep(tmp_path)
    assert entries_left() == {"old/c-cache", "new/a-cache", "old/b-cache", "new/d-cache"}
    set_ages(("old/c", "new/a", "old/b", "new/d"))
    sweep(tmp_path, limit=2 * size)
    assert entries_left() == {"old/c-cache", "new/a-cache"}
    sweep(tmp_path, limit=2 * size - 1)
    assert entries_left() == {"old/c-cache"}


def test_only_commands_that_may_compile_keep_programs(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(compile_cache, "keep_programs", lambda: calls.append(1))
    main(["status", str(tmp_path)])
    assert calls == [1]
    main(["--help"])
    main(["status", "--help"])
    main(["run", "absent.py", "--distributed"])
    assert calls == [1]
    capsys.readouterr()
