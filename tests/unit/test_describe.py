"""Tables and drawings of architectures: nothing is left out of them, and what they show is true."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from random_configs import model_configs

from zoo.config import ModelConfig
from zoo.describe.block import block_drawing
from zoo.describe.diff import as_markdown, as_text, diff
from zoo.describe.rows import LABELS, describe, number
from zoo.describe.svg import svg_drawing
from zoo.describe.text_drawing import text_drawing
from zoo.registry import find_spec, model_names, paper_names


def differing(a: str, b: str) -> dict[str, tuple[Any, Any]]:
    return {p.label: (p.a, p.b) for p in diff(find_spec(a).model, find_spec(b).model) if p.differs}


def changes(config: Any, prefix: str = "") -> Any:
    """(path, config with this one field changed), for every field that a valid change was found for."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = changes(value, f"{prefix}{field.name}.")
            others: list[tuple[str, Any]] = list(inner)
        elif isinstance(value, bool):
            others = [(prefix + field.name, not value)]
        elif isinstance(value, int | float):
            others = [
                (prefix + field.name, other) for other in (value * 2, value // 2 or 1, value + 1) if other != value
            ]
        else:
            continue
        for path, other in others:
            try:
                yield path, dataclasses.replace(config, **{field.name: other})
            except ValueError:
                continue


class TestDiff:
    def test_two_well_known_models(self) -> None:
        rows = differing("mixtral-8x7b", "deepseek-v3")
        assert rows["layers"] == (32, 61)
        assert rows["kind"] == ("grouped-query", "latent (MLA)")
        assert rows["key/value latent"] == (None, 512)
        assert rows["layers with experts"] == ("32 of 32", "58 of 61")
        assert rows["parameters"] == (46_702_792_704, 671_026_404_352)
        assert rows["KV cache per token in bf16, bytes"] == (2 * 32 * 2 * 8 * 128, 2 * 61 * 576)
        assert "FFN" not in rows and "weights renormalised" not in rows

    @pytest.mark.parametrize("name", [name for name in model_names() if name.endswith("-tiny")])
    def test_every_field_that_changes_the_model_is_a_row(self, name: str) -> None:
        """A field that somebody adds to the config is in the table without anybody's thinking of it."""
        config = find_spec(name).model
        unused = {"intermediate_size"} if describe(config)["Feed-forward", "dense width"].value is None else set()
        for path, other in changes(config):
            if path not in unused:
                assert any(pair.differs for pair in diff(config, other)), path

    @settings(max_examples=30, deadline=None)
    @given(model_configs(), model_configs())
    def test_any_two_models(self, a: ModelConfig, b: ModelConfig) -> None:
        assert not any(pair.differs for pair in diff(a, a))
        forth, back = diff(a, b), diff(b, a)
        assert [(p.section, p.label, p.b, p.a) for p in forth] == [(p.section, p.label, p.a, p.b) for p in back]
        sections = [pair.section for pair in forth]
        assert sections == sorted(sections, key=sections.index)
        for pair in forth:
            assert not pair.differs or pair.texts[0] != pair.texts[1], pair
        text = as_text(("a", "b"), forth)
        assert {line.count("|") for line in as_markdown(("a", "b"), forth).splitlines()} == {4}
        assert all(pair.label in text for pair in forth)

    def test_every_label_is_used(self) -> None:
        """The table of labels has no field that was renamed or removed."""
        hints: dict[str, Any] = {}

        def collect(block: Any, prefix: str) -> None:
            for field in dataclasses.fields(block):
                hints[prefix + field.name] = field
                value = getattr(block, field.name)
                if dataclasses.is_dataclass(value):
                    collect(value, f"{prefix}{field.name}.")

        for name in (*model_names(), *paper_names()):
            collect(find_spec(name).model, "")
        derived = {"mixer", "mamba_layers", "moe_layers", "total", "active", "flops", "cache"}
        assert set(LABELS) - set(hints) == derived

    @pytest.mark.parametrize(
        ("value", "text"), [(10000.0, "10,000"), (1e-6, "1e-06"), (2.5, "2.5"), (1 / 3, repr(1 / 3))]
    )
    def test_numbers_keep_their_digits(self, value: float, text: str) -> None:
        assert number(value) == text


@pytest.mark.parametrize("name", [*model_names(), *paper_names()])
class TestDrawings:
    def test_lines_meet(self, name: str) -> None:
        """Every vertical line goes on in the line below it, or ends at a text or a box."""
        *lines, note = text_drawing(block_drawing(find_spec(name).model)).rsplit("\n\n", 1)
        assert str(find_spec(name).model.num_layers) in note
        rows = lines[0].splitlines()
        width = max(map(len, rows))
        rows = [row.ljust(width) for row in rows]
        for above, below in pairwise(rows):
            for column in range(width):
                if above[column] in "┬┌┐╷┤":
                    assert below[column] not in " ─", (above, below)
                if below[column] in "┴└┘":
                    assert above[column] not in " ─", (above, below)

    def test_what_the_model_is(self, name: str) -> None:
        config = find_spec(name).model
        text = text_drawing(block_drawing(config))
        assert f"{config.hidden_size:,} wide" in text
        if config.moe:
            if config.moe.routing and config.moe.routing.capacity_factor:
                assert f"capacity factor {config.moe.routing.capacity_factor:g} in training" in text
            assert f"{config.moe.top_k} of {config.moe.num_experts} experts" in text
            assert ("shared" in text) == (config.moe.num_shared_experts > 0)
            assert f"{config.moe.moe_intermediate_size:,} wide" in text
            if config.moe.dense_ffn:
                assert f"{config.intermediate_size:,} wide" in text.partition("Σ")[2].split("\n\n")[0]
        norms = (4 if config.norm_placement == "both" else 2) + (config.moe is not None and config.moe.dense_ffn)
        assert sum("Norm" in line and "of q" not in line for line in text.splitlines()) == norms

    def test_svg_is_well_formed_and_says_the_same(self, name: str) -> None:
        drawing = block_drawing(find_spec(name).model)
        root = ElementTree.fromstring(svg_drawing(drawing, "a < b & c"))
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert texts[0] == "a < b & c"
        for sub_block in drawing.sub_blocks:
            for part in (*sub_block.before, sub_block.main, *sub_block.after):
                assert {part.title, *part.lines} <= set(texts)
        height = int(root.attrib["height"])
        assert all(0 < float(element.attrib["y"]) < height for element in root.iter() if "y" in element.attrib)
