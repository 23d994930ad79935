"""Finding models by name: the YAML files of ``configs/models``, zoo checkpoints and published directories."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from zoo.config import CONFIG_FILE, ModelSpec
from zoo.encoder_decoder_config import AnySpec, decoder_spec, load_any_spec, make_spec
from zoo.families import family_of

RELEASE_FILE = "release.json"
"""In a checkpoint of the zoo's own: what it was made from and its scores, written by ``zoo release``."""


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
    """Names of the decoders that a family holds, sorted."""
    return sorted(path.stem for path in (configs_dir() / "models").glob("*.yaml"))


def encoder_decoder_names() -> list[str]:
    """Names of its encoder-decoders, sorted."""
    return sorted(path.stem for path in (configs_dir() / "models" / "encoder_decoder").glob("*.yaml"))


def paper_names() -> list[str]:
    """Names of the other decoders, sorted: papers describe them, and nobody has published weights."""
    return sorted(path.stem for path in (configs_dir() / "models" / "papers").glob("*.yaml"))


def all_names() -> list[str]:
    """Names of all models of ``configs``, sorted."""
    return sorted([*model_names(), *paper_names(), *encoder_decoder_names()])


def checkpoints() -> dict[str, Path]:
    """Directories of the named checkpoints, by name and sorted; those of the working directory go first."""
    found: dict[str, Path] = {}
    for place in checkpoint_dirs():
        for config in place.glob(f"[!.]*/{CONFIG_FILE}"):
            found.setdefault(config.parent.name, config.parent)
    return dict(sorted(found.items()))


def own_checkpoint(name: str | Path) -> Path | None:
    """Directory of the checkpoint that alone has ``name``: weights of a model of its own, not of one of ``configs``."""
    return None if str(name) in (*model_names(), *paper_names()) else checkpoints().get(str(name))


def find_spec(name_or_path: str | Path) -> ModelSpec:
    """The decoder that ``name_or_path`` means.

    Args:
        name_or_path: a name of ``configs/models`` or of a checkpoint, a YAML file, a zoo checkpoint directory, or a
            directory with a published ``config.json``.

    Raises:
        ValueError: it is none of these (naming the nearest name), the file in it is not valid, or it means an
            encoder-decoder.
    """
    return decoder_spec(find_any_spec(name_or_path))


def find_any_spec(name_or_path: str | Path) -> AnySpec:
    """The decoder or encoder-decoder that ``name_or_path`` means; argument and errors as ``find_spec``."""
    path = Path(name_or_path)
    if path.is_dir():
        return _spec_of_directory(path)
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(f"{path}: not a model; give a YAML file, a checkpoint directory or a name of `zoo list`")
        return load_any_spec(path)
    for folder, names in (("", model_names), ("papers", paper_names), ("encoder_decoder", encoder_decoder_names)):
        if str(name_or_path) in names():
            return load_any_spec(configs_dir() / "models" / folder / f"{name_or_path}.yaml")
    named = own_checkpoint(name_or_path)
    if named is None:
        raise unknown(name_or_path)
    return load_any_spec(named / CONFIG_FILE)


def unknown(name: str | Path) -> ValueError:
    """The error that ``name`` is nothing that has a name, with the nearest one and where else to look."""
    close = difflib.get_close_matches(str(name), [*all_names(), *checkpoints()], n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    elsewhere = ""
    if not (_package().parent / "checkpoints").is_dir():  # an installed wheel has none
        elsewhere = (
            "; the zoo's own checkpoints are in checkpoints/ of its source: run zoo there, or give the directory"
        )
    return ValueError(f"{str(name)!r}: no such model, file or directory; {hint}`zoo list` shows all names{elsewhere}")


def published_spec(directory: Path) -> AnySpec:
    """The model that the published ``config.json`` of ``directory`` describes, named after the directory.

    Where weights are there, without optional parts that they leave out whole.
    """
    from zoo.weights.source import tensor_names

    where = str(directory / "config.json")
    hf = read_json(directory / "config.json")
    family = family_of(hf, where)
    config, names = family.from_hf(hf, where), tensor_names(directory)
    return make_spec(directory.resolve().name, family.name, family.stored(config, names) if names else config)


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


def _spec_of_directory(path: Path) -> AnySpec:
    if (path / CONFIG_FILE).is_file():
        return load_any_spec(path / CONFIG_FILE)
    if (path / "config.json").is_file():
        return published_spec(path)
    raise ValueError(f"{path}: neither {CONFIG_FILE} nor config.json is in it; give a checkpoint directory")


def _package() -> Path:
    return Path(__file__).resolve().parent


def _data_dir(name: str) -> Path:
    packaged = _package() / "_data" / name  # only in an installed wheel
    return packaged if packaged.is_dir() else _package().parent / name
