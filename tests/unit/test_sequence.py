"""Masks and positions for padding, packing, caches and windows, against a rule written per pair of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.layers.sequence import positions_in_runs, sequence_layout

NONE = {"attention_mask": None, "document_ids": None, "past": 0, "past_valid": None}


def brute_force(segments: list[list[int]], past: int, window: int | None) -> torch.Tensor:
    """The rule; a window is as wide as so many tokens, padding (segment -1) left out."""
    rows, keys = len(segments), len(segments[0])
    mask = torch.zeros(rows, 1, keys - past, keys, dtype=torch.bool)
    for b in range(rows):
        for q in range(past, keys):
            for k in range(q + 1):
                near = window is None or sum(segment != -1 for segment in segments[b][k + 1 : q + 1]) < window
                mask[b, 0, q - past, k] = near and segments[b][q] == segments[b][k]
    return mask


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3),
    past=st.integers(0, 4),
    new=st.integers(1, 5),
    window=st.none() | st.integers(1, 6),
)
def test_padding_mask_is_the_rule(rows: list[list[bool]], past: int, new: int, window: int | None) -> None:
    keys = past + new
    valid = torch.tensor(rows)[:, :keys]
    layout = sequence_layout(
        torch.zeros(len(rows), new, dtype=torch.long),
        **{
            **NONE,
            "attention_mask": valid[:, past:].long(),
            "past": past,
            "past_valid": valid[:, :past] if past else None,
        },
    ).within(window)
    segments = [[0 if v else -1 for v in row] for row in valid.tolist()]
    real = valid[:, past:]  # what padding sees does not matter, as long as it is something
    assert torch.equal(layout.mask[:, 0][real], brute_force(segments, past, window)[:, 0][real])
    assert layout.mask.any(-1).all()
    for row in range(len(rows)):
        expected = [int(valid[row, : k + 1].sum()) - 1 for k in range(past, keys) if valid[row, k]]
        assert layout.positions[row][valid[row, past:]].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.none() | st.integers(1, 4))
def test_documents_never_see_each_other(lengths: list[int], window: int | None) -> None:
    ids = torch.tensor([[d for d, n in enumerate(lengths) for _ in range(n)]])
    layout = sequence_layout(ids, **{**NONE, "document_ids": ids}).within(window)
    assert torch.equal(layout.visible, brute_force(ids.tolist(), 0, window))
    assert (layout.mask is None) == (len(lengths) == 1 and (window is None or lengths[0] <= window))
    assert layout.positions.tolist() == [[i for n in lengths for i in range(n)]]
    assert layout.run_offsets.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]


def test_layers_with_the_same_window_share_a_mask() -> None:
    layout = sequence_layout(torch.zeros(1, 6, dtype=torch.long), **NONE)
    assert layout.within(None) is layout
    assert layout.within(3) is layout.within(3)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 6),
    left=st.booleans(),
    past=st.integers(0, 4),
    new=st.integers(1, 5),
    size=st.integers(1, 6),
)
def test_row_20_chunks_are_of_neighbouring_positions(length: int, left: bool, past: int, new: int, size: int) -> None:
    keys = past + new
    length = min(length, keys)
    valid = torch.zeros(1, keys, dtype=torch.bool)
    valid[0, keys - length :] = left
    valid[0, :length] |= not left
    layout = sequence_layout(
        torch.zeros(1, new, dtype=torch.long),
        **{
            **NONE,
            "attention_mask": valid[:, past:].long(),
            "past": past,
            "past_valid": valid[:, :past] if past else None,
        },
    )
    position = (valid.cumsum(1) - 1).clamp(min=0)[0].tolist()
    same = [[position[q] // size == position[k] // size for k in range(keys)] for q in range(past, keys)]
    expected = layout.visible[0, 0] & torch.tensor(same)
    assert torch.equal(layout.in_chunks(size).visible[0, 0], expected)


def test_row_20_chunks_of_documents_begin_anew() -> None:
    ids = torch.tensor([[0] * 5 + [1] * 3])
    layout = sequence_layout(ids, **{**NONE, "document_ids": ids}).in_chunks(2)
    assert layout.run_offsets.tolist() == [0, 2, 4, 5, 7, 8]
    plain = sequence_layout(torch.zeros(2, 5, dtype=torch.long), **NONE)
    assert plain.in_chunks(2).run_offsets.tolist() == [0, 2, 4, 5, 7, 9, 10]
    assert plain.in_chunks(5) is plain


def test_plain_causality_needs_no_mask() -> None:
    layout = sequence_layout(torch.zeros(3, 4, dtype=torch.long), **NONE)
    assert layout.mask is None and layout.is_causal
    assert torch.equal(layout.visible, brute_force([[0] * 4], 0, None))
    assert layout.run_offsets.tolist() == [0, 4, 8, 12]
    step = sequence_layout(torch.zeros(3, 1, dtype=torch.long), **{**NONE, "past": 9})
    assert step.mask is None and not step.is_causal and step.positions.tolist() == [[9]]


def test_runs_restart_positions_even_where_an_id_returns() -> None:
    assert positions_in_runs(torch.tensor([[3, 3, 1, 3, 3, 3]])).tolist() == [[0, 1, 0, 0, 1, 2]]


def test_bad_shapes_and_cached_documents_are_named() -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\).*\(2, 4\)"):
        sequence_layout(ids, **{**NONE, "attention_mask": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="packed documents cannot be continued"):
        sequence_layout(ids, **{**NONE, "document_ids": ids, "past": 2})
