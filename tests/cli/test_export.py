"""`jaxsi export`: the model card, and the hub, which no test reaches."""

import json

import huggingface_hub
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli.main import main


class Hub:
    """In place of HfApi: keeps what it was asked for."""

    asked: list = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, repository, **settings):
        if Hub.error is not None:
            raise Hub.error
        Hub.asked.append(("create", repository, settings))
        return f"https://hub/{repository}"

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        Hub.asked.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    Hub.asked, Hub.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    lmlib.export(tiny.make_lm(), folder, dtype="float32")
    return folder


def exported(model, out, *further):
    return main(["export", str(model), str(out), "--mesh.fsdp", "-1", *further, "--json"])


def test_nothing_is_pushed_unless_asked(model, tmp_path, hub, capsys):
    assert exported(model, tmp_path / "out") == 0
    assert hub.asked == [] and "pushed" not in json.loads(capsys.readouterr().out)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "# out" in card and "parameters" in card


def test_push_creates_a_private_repository_and_uploads_the_folder(model, tmp_path, hub, capsys):
    assert exported(model, tmp_path / "out", "--push", "me/out") == 0
    assert json.loads(capsys.readouterr().out)["pushed"] == "https://hub/me/out"
    (create, repository, settings), (_, uploaded, files) = hub.asked
    assert (create, repository, uploaded) == ("create", "me/out", "me/out")
    assert settings == {"private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert exported(model, tmp_path / "open", "--push", "me/open", "--public") == 0
    assert hub.asked[2][2]["private"] is False


def test_a_hub_that_refuses_leaves_the_folder_and_says_how_to_go_on(model, tmp_path, hub, capsys):
    hub.error = OSError("401 Unauthorized\nmore")
    assert exported(model, tmp_path / "out", "--push", "me/out") == 1
    err = capsys.readouterr().err
    assert "me/out: cannot be pushed (401 Unauthorized)" in err and f"hf upload me/out {tmp_path / 'out'}" in err
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push", "no owner"], "--push no owner"),
        (["--push", "name"], "give the owner as well"),
        (["--public"], "--push REPO"),
    ],
)
def test_a_wrong_repository_is_refused_before_the_work(model, tmp_path, hub, capsys, words, message):
    assert exported(model, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
