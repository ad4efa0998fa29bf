"""The official files of AlpacaEval 2.0: the 805 instructions with the baseline's responses, and the rows that the
length-controlled fit needs. They are not part of this package (CC BY-NC 4.0): they come from the hub, with their hash
checked, or from a folder.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.length_controlled import Gamed
from jaxsi.runs.records import LFS_POINTER, RecordError, opened, shown

REPOSITORY = "tatsu-lab/alpaca_eval"  # a data set on the Hugging Face hub
BASELINE, JUDGE = "gpt4_1106_preview", "weighted_alpaca_eval_gpt4_turbo"  # those that the fit is calibrated for
BASELINE_FILE, GAMED_FILE = "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"
SHA256 = {
    BASELINE_FILE: "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    GAMED_FILE: "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
}
# Other names of the files in a folder. The rows of the last two are reconstructed from published results.
_NAMES = {
    BASELINE_FILE: (BASELINE_FILE, f"{BASELINE_FILE}.gz"),
    GAMED_FILE: (GAMED_FILE, f"{GAMED_FILE}.gz", "df_gamed_reconstructed.csv", "df_gamed_reconstructed.csv.gz"),
}
TEMPLATE_NAMES = ("alpaca_eval_clf.txt", "judge_prompt_alpaca_eval_clf.txt")  # of the official judge, in a folder


class AssetError(EvaluationError):
    """An official file that is not there, or is another one; the message names it and says where it comes from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """A model's response to an instruction, a row of a model_outputs.json."""

    instruction: str
    output: str
    generator: str
    dataset: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assets:
    """``baseline``: the baseline's outputs in the official order. ``difficulty_I``: float64, of each of them.
    ``official`` is false if a file is not, by its hash, the official one; ``files`` names them."""

    baseline: Sequence[Output]
    gamed: Gamed
    difficulty_I: np.ndarray
    official: bool
    files: Mapping[str, str]

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """The number of each instruction."""
        return {output.instruction: i for i, output in enumerate(self.baseline)}


def read_assets(folder: Path | None = None, *, offline: bool = False) -> Assets:
    """The official files, from ``folder`` or from the hub (or its cache, if ``offline``).

    Raises: AssetError: if a file is missing, cannot be read, or has another hash than the one on the hub must have.
    """
    paths = {name: find(name, folder, offline=offline) for name in SHA256}
    contents = {name: _content(path) for name, path in paths.items()}
    same = {name: hashlib.sha256(content).hexdigest() == SHA256[name] for name, content in contents.items()}
    renamed = [name for name in SHA256 if not same[name] and paths[name].name in (name, f"{name}.gz")]
    if renamed:
        name = renamed[0]
        raise AssetError(
            f"{paths[name]} is not the official {name}: its sha256 begins with "
            f"{hashlib.sha256(contents[name]).hexdigest()[:12]}, not {SHA256[name][:12]}; fetch it again"
        )
    baseline = outputs_of(_json(paths[BASELINE_FILE], contents[BASELINE_FILE]), paths[BASELINE_FILE])
    gamed, difficulty_I = _gamed(paths[GAMED_FILE], contents[GAMED_FILE])
    if len(difficulty_I) != len(baseline):
        raise AssetError(
            f"{paths[GAMED_FILE]} has the difficulty of {len(difficulty_I)} instructions, and {paths[BASELINE_FILE]} "
            f"has {len(baseline)}; they are from different sets"
        )
    return Assets(
        baseline=baseline,
        gamed=gamed,
        difficulty_I=difficulty_I,
        official=all(same.values()),
        files={name: str(path) for name, path in paths.items()},
    )


def find(name: str, folder: Path | None, *, offline: bool = False) -> Path:
    """The path of an official file. Raises: AssetError: if it is not there."""
    if folder is not None:
        found = next((folder / other for other in _NAMES[name] if (folder / other).is_file()), None)
        if found is None:
            raise AssetError(
                f"{folder} has no {' or '.join(_NAMES[name])}; it is a file of the data set {REPOSITORY} on the hub"
            )
        return found
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, name, repo_type="dataset", local_files_only=offline))
    except Exception as error:  # the hub client raises a dozen types; to the user all of them mean this
        raise AssetError(
            f"{name} of the data set {REPOSITORY} is not in the local cache"
            + (" (offline)" if offline else f", and could not be downloaded ({type(error).__name__}: {error})")
            + "; put it into a folder and give --assets FOLDER"
        ) from error


def official_template(folder: Path | None) -> Path | None:
    """The template of the official judge in a folder of assets; None if it is not there."""
    places = [] if folder is None else [folder / name for name in TEMPLATE_NAMES]
    return next((path for path in places if path.is_file()), None)


def read_outputs(path: Path) -> list[Output]:
    """A model_outputs.json, or .json.gz: a list of {"instruction", "output", "generator"}.

    Raises: EvaluationError: if the file is not one; it names the row.
    """
    return outputs_of(_json(path, _content(path)), path)


def outputs_of(rows: Any, path: Path) -> list[Output]:
    """The rows of a model_outputs.json. Raises: EvaluationError: if they are not; it names the row."""
    if not isinstance(rows, list) or not rows:
        raise EvaluationError(f"{path}: a file of outputs is a JSON list of objects that is not empty")
    found = []
    for number, row in enumerate(rows):
        wrong = [
            name
            for name in ("instruction", "output")
            if not isinstance(row, dict) or not isinstance(row.get(name), str)
        ]
        if wrong:
            raise EvaluationError(f"{path}: row {number} has no text {wrong[0]!r}: {shown(row)}")
        found.append(
            Output(
                instruction=row["instruction"],
                output=row["output"],
                generator=str(row.get("generator") or path.name.partition(".")[0]),
                dataset=str(row.get("dataset") or ""),
            )
        )
    return found


def read_list(path: Path) -> list[Any]:
    """A JSON list, or JSON lines, from a file, plain or .gz. NaN and infinities, which some programs write, become
    None.

    Raises: EvaluationError: if it is not one.
    """
    rows = _json(path, _content(path))
    if not isinstance(rows, list):
        raise EvaluationError(f"{path}: this is {shown(rows)}, not a JSON list of rows")
    return rows


def _content(path: Path) -> bytes:
    try:
        with opened(path) as file:
            return file.read()
    except RecordError as error:
        raise AssetError(str(error)) from error


def _json(path: Path, content: bytes) -> Any:
    if content.startswith(LFS_POINTER):
        raise EvaluationError(f"{path}: a Git LFS pointer, not the data themselves; run `git lfs pull` in its folder")
    try:
        text = content.decode("utf-8-sig")
        try:
            return _parsed(text)
        except json.JSONDecodeError:
            lines = [line for line in text.split("\n") if line.strip()]  # never at U+2028 inside a text
            if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
                raise
            return [_parsed(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: not a JSON file: {error}") from None


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: None)


def _gamed(path: Path, content: bytes) -> tuple[Gamed, np.ndarray]:
    """The rows of the gamed baselines, and the difficulty of each instruction, which their rows repeat."""
    names = ("index", "std_delta_len", "instruction_difficulty", "preference")
    table = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace")))
    if missing := [name for name in names if name not in (table.fieldnames or ())]:
        raise AssetError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(table.fieldnames or ())}")
    columns: dict[str, list[float]] = {name: [] for name in names}
    for line, row in enumerate(table, start=2):
        for name in names:
            try:
                value = float(row[name])
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise AssetError(f"{path}:{line}: {name} is {row[name]!r}; it must be a number")
            columns[name].append(value)
    difficulty: dict[int, float] = {}
    for index, value in zip(columns["index"], columns["instruction_difficulty"], strict=True):
        difficulty.setdefault(int(index), value)
    if sorted(difficulty) != list(range(len(difficulty))):
        raise AssetError(f"{path}: the column index does not count the instructions from 0 without a gap")
    gamed = Gamed(
        differences_G=np.asarray(columns["std_delta_len"]),
        difficulty_G=np.asarray(columns["instruction_difficulty"]),
        labels_G=np.asarray(columns["preference"]),
    )
    if not ((gamed.labels_G >= 0) & (gamed.labels_G <= 1)).all():
        raise AssetError(f"{path}: a preference lies outside of 0 to 1; this is not the file {GAMED_FILE}")
    return gamed, np.asarray([difficulty[i] for i in range(len(difficulty))])


def as_json(outputs: Sequence[Output]) -> bytes:
    """Outputs in the official format."""
    rows = [
        {name: value for name, value in dataclasses.asdict(o).items() if value or name != "dataset"} for o in outputs
    ]
    return (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
