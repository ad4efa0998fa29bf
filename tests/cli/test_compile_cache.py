"""Compiled programs on disk: who may write there, what a second process finds, what a killed one leaves."""

import json
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from jaxsi.cli import compile_cache, main as cli
from jaxsi.cli.compile_cache import UnsafeFolderError, made, sweep

ROOT = Path(__file__).parents[2]
# Prints the folder, the programs compiled and written, those loaded, and a result that shows each bit.
PROGRAM = """
import json, os
from jaxsi import compile_cache
compile_cache.keep_programs()
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/")[-1]))
step = jax.jit(jax.value_and_grad(lambda w, x: jnp.tanh(x @ w).sum()), donate_argnums=0)
value, gradient = step(jnp.linspace(-1, 1, 64).reshape(8, 8), jnp.linspace(0, 2, 64).reshape(8, 8))
bits = [float(x).hex() for x in (value, *gradient.ravel())]
folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
made, hits = (events.count(f"cache_{what}") for what in ("misses", "hits"))
print(json.dumps({"folder": folder, "made": made, "hits": hits, "bits": bits}))
"""
OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def environment(tmp_path):
    """As a user's, whose cache directory is new; every program is kept, however fast it compiles."""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN}
    return inherited | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def before_jax(monkeypatch, tmp_path):
    """This process, as if it had not imported JAX yet and its user had set nothing."""
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    for name in OWN:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxsi" / "programs" / compile_cache.host()


def start(environment, *options):
    command = [sys.executable, *options, "-c", PROGRAM]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """(what it printed, what it said on stderr)"""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def entries(folder):
    return sorted(Path(folder).glob("*-cache"))


def test_a_second_process_loads_what_the_first_compiled(environment, tmp_path):
    first, said = ended(start(environment, "-W", "error"))
    assert said == ""
    folder = Path(first["folder"])
    assert folder.parent == tmp_path / "cache" / "jaxsi" / "programs"
    assert first["hits"] == 0 and len(entries(folder)) == first["made"] > 0
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    second, said = ended(start(environment, "-W", "error"))
    assert said == ""
    assert (second["made"], second["hits"]) == (0, first["made"])
    assert second["bits"] == first["bits"]


def test_half_written_programs_are_compiled_again(environment):
    """Also when two processes write them at once."""
    first, _ = ended(start(environment))
    for number, path in enumerate(entries(first["folder"])):
        whole = path.read_bytes()
        path.write_bytes(whole[: (0, len(whole) // 2, len(whole) - 1)[number % 3]])
    # JAX alone warns, compiles, and leaves the entry as it is.
    alone, said = ended(start(environment | {"JAX_COMPILATION_CACHE_DIR": first["folder"]}))
    assert said.count("Error reading persistent compilation cache entry") == first["made"] > 3
    assert alone["bits"] == first["bits"]
    for again, said in [ended(process) for process in [start(environment, "-W", "error") for _ in range(2)]]:
        assert said == ""
        assert (again["made"] + again["hits"], again["bits"]) == (first["made"], first["bits"])
    last, said = ended(start(environment, "-W", "error"))
    assert (last["made"], last["hits"], said, last["bits"]) == (0, first["made"], "", first["bits"])


@pytest.mark.parametrize(
    "own",
    [
        {"JAX_COMPILATION_CACHE_DIR": "elsewhere"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        {"JAX_ENABLE_COMPILATION_CACHE": "False"},
    ],
    ids=str,
)
def test_the_users_own_settings_win(own, before_jax, monkeypatch):
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    compile_cache.keep_programs()
    assert {name: os.environ[name] for name in OWN if name in os.environ} == own
    assert not before_jax.exists()


def test_other_settings_of_the_user_stay(before_jax, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    compile_cache.keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(before_jax)
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "3"


def test_a_program_that_has_imported_jax_keeps_its_own_settings(before_jax, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    compile_cache.keep_programs()
    assert not before_jax.exists() and not set(OWN) & set(os.environ)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(mode, before_jax, capsys):
    for path in (made(before_jax), before_jax.parent, before_jax.parent.parent):
        path.chmod(mode)
        compile_cache.keep_programs()
        assert capsys.readouterr().err.splitlines() == [
            f"jaxsi: compiled programs are not kept: others may write to {path} (mode {mode:04o}); empty it, then "
            "chmod 700 it; JAX_COMPILATION_CACHE_DIR may name another folder"
        ]
        assert not set(OWN) & set(os.environ)
        path.chmod(0o700)
    compile_cache.keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(before_jax)


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    me = os.geteuid()
    folder = made(tmp_path / "jaxsi" / "programs" / "host")
    assert made(folder) == folder
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(UnsafeFolderError, match=rf"jaxsi belongs to user {me}, and this is user {me + 1}"):
        made(folder)


def test_a_folder_that_cannot_be_swept_is_not_used(before_jax, capsys):
    (made(before_jax) / "strange-cache").mkdir()
    compile_cache.keep_programs()
    assert "compiled programs are not kept: [Errno 21] Is a directory" in capsys.readouterr().err
    assert not set(OWN) & set(os.environ)


def test_where_no_folder_can_be_made_the_command_goes_on(environment, tmp_path):
    (tmp_path / "cache").write_text("a file")
    value, said = ended(start(environment))
    assert (value["folder"], value["made"]) == (None, 0) and len(value["bits"]) == 65
    assert "compiled programs are not kept" in said and "Not a directory" in said


def test_the_oldest_programs_of_all_versions_make_room(tmp_path):
    def used(names):
        for age, name in enumerate(names):
            os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))

    left = lambda: {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}  # noqa: E731
    for name in ("old/c", "new/a", "old/b", "new/d", "new/half"):
        path = tmp_path / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zlib.compress(os.urandom(900)))
    path.write_bytes(path.read_bytes()[:-1])
    size = (tmp_path / "old" / "c-cache").stat().st_size
    sweep(tmp_path)
    assert left() == {"old/c-cache", "new/a-cache", "old/b-cache", "new/d-cache"}
    used(("old/c", "new/a", "old/b", "new/d"))
    sweep(tmp_path, limit=2 * size)
    assert left() == {"old/c-cache", "new/a-cache"}
    sweep(tmp_path, limit=2 * size - 1)
    assert left() == {"old/c-cache"}


def test_a_command_that_may_compile_keeps_its_programs(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(compile_cache, "keep_programs", lambda: calls.append(1))
    cli.main(["status", str(tmp_path)])
    assert calls == [1]
    cli.main(["--help"])
    cli.main(["status", "--help"])
    cli.main(["run", "absent.py", "--distributed"])
    assert calls == [1]
    capsys.readouterr()
