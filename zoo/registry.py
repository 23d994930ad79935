"""Finding models by name: the YAML files of ``configs/models``, zoo checkpoints and published directories."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from zoo.config import CONFIG_FILE, ModelSpec, load_spec
from zoo.families import family_of


def configs_dir() -> Path:
    """``configs/`` of the source checkout, or the copy that the wheel carries."""
    return _data_dir("configs")


def evaluation_dir() -> Path:
    """``evaluation/`` of the source checkout, or the copy that the wheel carries."""
    return _data_dir("evaluation")


def checkpoint_dirs() -> list[Path]:
    """Where named checkpoints are looked for: ``checkpoints/`` of the working directory and of the source checkout."""
    return [Path("checkpoints"), _package().parent / "checkpoints"]


def model_names() -> list[str]:
    """Names of all models of the zoo, sorted."""
    return sorted(path.stem for path in (configs_dir() / "models").glob("*.yaml"))


def find_spec(name_or_path: str | Path) -> ModelSpec:
    """The model that ``name_or_path`` means.

    Args:
        name_or_path: a name of ``configs/models``, a YAML file, a zoo checkpoint directory, or a directory with a
            published ``config.json``.

    Raises:
        ValueError: it is none of these (naming the nearest name), or the file in it is not valid.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return _spec_of_directory(path)
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(f"{path}: not a model; give a YAML file, a checkpoint directory or a name of `zoo list`")
        return load_spec(path)
    names = model_names()
    if str(name_or_path) in names:
        return load_spec(configs_dir() / "models" / f"{name_or_path}.yaml")
    close = difflib.get_close_matches(str(name_or_path), names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"{str(name_or_path)!r}: no such model, file or directory; {hint}`zoo list` shows all names")


def published_spec(directory: Path) -> ModelSpec:
    """The model that the published ``config.json`` of ``directory`` describes, named after the directory."""
    where = str(directory / "config.json")
    hf = read_json(directory / "config.json")
    family = family_of(hf, where)
    return ModelSpec(name=directory.resolve().name, family=family.name, model=family.from_hf(hf, where))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the file is missing, is not UTF-8, is not JSON, or is not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # nested too deep; or a number too long
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _spec_of_directory(path: Path) -> ModelSpec:
    if (path / CONFIG_FILE).is_file():
        return load_spec(path / CONFIG_FILE)
    if (path / "config.json").is_file():
        return published_spec(path)
    raise ValueError(f"{path}: neither {CONFIG_FILE} nor config.json is in it; give a checkpoint directory")


def _package() -> Path:
    return Path(__file__).resolve().parent


def _data_dir(name: str) -> Path:
    packaged = _package() / "_data" / name  # only in an installed wheel
    return packaged if packaged.is_dir() else _package().parent / name
