"""``zoo fit --find``: what it says, and that it leaves nothing but a picture."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from zoo.training.finders import relative_losses, suggestions
from zoo.training.fit import fit


def test_a_learning_rate_is_found_and_nothing_is_trained(
    fit_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(["--config", str(fit_config), "--find", "lr"]) == 0
    said = re.fullmatch(
        r"model.optimizer.lr: (\S+), where the loss falls fastest; it is lowest at (\S+): (\S+)\n",
        capsys.readouterr().out,
    )
    assert said
    # Adam on a model of 32 features.
    assert 1e-4 < float(said[1]) <= float(said[2]) < 1
    run = tmp_path / "run"
    assert Path(said[3]) == run / "lr_finder.png"
    assert (run / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run.iterdir()} == {".lock", "lr_finder.png"}


def test_a_batch_size_is_doubled_until_the_data_has_no_more(
    fit_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(["--config", str(fit_config), "--find", "batch_size", "--data.batch_size", "100"]) == 0
    found = re.fullmatch(r"data.batch_size: (\d+) fits, and the data has no more\n", capsys.readouterr().out)
    assert found
    assert int(found[1]) % 100 == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_nothing_is_looked_for_on_several_devices(fit_config: Path) -> None:
    with pytest.raises(ValueError, match=r"--find lr: it needs trainer.strategy = auto and one device"):
        fit(["--config", str(fit_config), "--find", "lr", "--trainer.strategy", "ddp"])


def test_the_steepest_and_the_lowest_point_of_a_curve() -> None:
    rates = [10 ** (-6 + step / 10) for step in range(60)]
    # Falls around 1e-3 over half a decade, and rises after 1e-2.
    losses = [4 - math.tanh(4 * (math.log10(r) + 3)) + 5 * max(math.log10(r) + 2, 0) ** 2 for r in rates]
    steepest, lowest = suggestions(list(zip(rates, losses, strict=True)))
    assert steepest == pytest.approx(1e-3, rel=0.3)
    assert lowest == pytest.approx(1e-2, rel=0.3)
    with pytest.raises(ValueError, match="the loss grew within 5 of 100 steps"):
        suggestions([(rate, 1.0) for rate in rates[:5]])


def test_a_constant_loss_is_constant_in_the_curve() -> None:
    # As the Tuner smooths it.
    average, smoothed = 0.0, []
    for step in range(1, 31):
        average = 0.98 * average + 0.02 * 7.0
        smoothed.append(average / (1 - 0.98 ** (step + 1)))
    curve = relative_losses([float(i) for i in range(31)], [*smoothed, math.nan])
    assert len(curve) == 30
    assert all(loss == pytest.approx(1.0) for _, loss in curve)
