"""From what was observed to the report: plain values, with the tests that say which of them are more than chance.

Letters: L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.harness.significance import SIGNIFICANCE
from zoo.inspect.inspection import Observed, Settings, Windows, moe_layers
from zoo.inspect.measures import expected_co_activations
from zoo.inspect.metrics import Agreement, AgreementMetric, Routing
from zoo.inspect.similarity import output_cosines, weight_cosines
from zoo.inspect.specialisation import MINIMUM, PERMUTATIONS, Specialist, domain_tests, pair_tests, specialists
from zoo.inspect.text import Text
from zoo.model import Decoder
from zoo.moe.stats import DEAD, dead_experts, effective_experts, expert_load, load_entropy, max_over_mean
from zoo.tokenizer import Tokenizer

SHOWN = 8
"""Token types listed for each expert."""


def balance(routing: Routing, layers: Sequence[int], limited: bool) -> list[dict[str, Any]]:
    """How the tokens are spread over the experts, and how sure the router is; one entry a MoE layer.

    What is dropped is ``None`` where experts have no ``limited`` capacity.
    """
    load = expert_load(routing.counts)
    return [
        {
            "layer": layer,
            "load": load[i].tolist(),
            "entropy": float(load_entropy(load[i])),
            "effective_experts": float(effective_experts(load[i])),
            "max_over_mean": float(max_over_mean(load[i])),
            "dead": dead_experts(routing.counts[i]),
            "routing_entropy": routing.entropy[i],
            "z": routing.z[i],
            "dropped": routing.dropped[i] if limited else None,
            "untaken": routing.untaken[i] if limited else None,
        }
        for i, layer in enumerate(layers)
    ]


def co_activation(routing: Routing, layers: Sequence[int]) -> list[dict[str, Any]] | None:
    """Which experts are chosen together, against what their loads explain; ``None`` where none are."""
    pairs = routing.pairs.cpu()
    expected = torch.stack([expected_co_activations(of_layer) for of_layer in pairs])
    if not expected.any():
        return None
    tests = pair_tests(pairs.numpy(), expected.numpy(), routing.tokens)
    return [
        {
            "layer": layer,
            "together": pairs[i].tolist(),
            "expected": expected[i].tolist(),
            "told_apart": [
                {"experts": [a, b], "p_holm": float(tests.p_holm[i, a, b])}
                for a, b in combinations(range(len(expected[i])), 2)
                if tests.p_holm[i, a, b] <= SIGNIFICANCE
            ],
        }
        for i, layer in enumerate(layers)
    ]


def stability(agreement: Agreement, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Whether tokens keep their experts."""
    return [
        {
            "layer": layer,
            "equal": agreement.equal[i],
            "jaccard": agreement.jaccard[i],
            "by_chance": agreement.by_chance[i],
        }
        for i, layer in enumerate(layers)
    ]


def token_specialisation(
    counts: Tensor,
    types: Tensor,
    occurrences: Tensor,
    routing: Routing,
    layers: Sequence[int],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Which token types go to which experts more often than chance."""
    ids = types.tolist()
    found = specialists(counts.cpu().numpy(), occurrences.numpy(), routing.counts.cpu().numpy(), routing.tokens)
    by_expert: dict[tuple[int, int], list[Specialist]] = {}
    for specialist in found:
        by_expert.setdefault((specialist.layer, specialist.expert), []).append(specialist)
    experts = range(routing.counts.shape[1])
    return {
        "minimum_occurrences": MINIMUM,
        "types": len(ids),
        "tests": counts.numel(),
        "specialised_types": len({s.type for s in found}),
        "layers": [
            {
                "layer": layer,
                "specialised_types": len({s.type for expert in experts for s in by_expert.get((i, expert), [])}),
                "experts": [
                    [_specialist(s, ids, tokenizer) for s in by_expert.get((i, expert), [])[:SHOWN]]
                    for expert in experts
                ],
            }
            for i, layer in enumerate(layers)
        ],
    }


def _specialist(found: Specialist, ids: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": ids[found.type],
        "token": tokenizer.id_to_token(ids[found.type]),
        "count": found.count,
        "occurrences": found.occurrences,
        "pmi": found.pmi,
        "residual": found.residual,
        "p_holm": found.p_holm,
    }


def domain_specialisation(
    counts: Tensor, windows: Windows, texts: Sequence[Text], layers: Sequence[int], seed: int
) -> dict[str, Any] | None:
    """Which sets of data use other experts than each other; ``None`` where there is one set."""
    if len(texts) == 1:
        return None
    labels = windows.labels
    tests = domain_tests(counts.cpu().numpy(), labels.numpy(), seed)
    load = [expert_load(counts[labels == number].sum(dim=0)) for number in range(len(texts))]
    return {
        "permutations": PERMUTATIONS,
        "windows": [int((labels == number).sum()) for number in range(len(texts))],
        "layers": [
            {
                "layer": layer,
                "information": float(tests.information[i]),
                "by_chance": float(tests.by_chance[i]),
                "p_holm": float(tests.p_holm[i]),
                "load": {text.name: load[number][i].tolist() for number, text in enumerate(texts)},
            }
            for i, layer in enumerate(layers)
        ],
    }


def similarity(model: Decoder, samples: Sequence[Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """How alike the experts of each layer are, in weights and in what they compute."""
    modules = moe_layers(model)
    return {
        "tokens": len(samples[0]),
        "layers": [
            {
                "layer": layer,
                "weights": weight_cosines(module).tolist(),
                "outputs": output_cosines(module, x).tolist(),
            }
            for layer, module, x in zip(layers, modules, samples, strict=True)
        ],
    }


def gather(
    name: str,
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    windows: Windows,
    settings: Settings,
    frequent: tuple[Tensor, Tensor],
    observed: Observed,
    noisy: AgreementMetric,
    others: Mapping[str, AgreementMetric],
) -> dict[str, Any]:
    """The report, without its headline: ``report.schema.json`` says what is in it."""
    config, routing = model.config, observed.routing.compute()
    assert config.moe is not None
    layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    types, occurrences = frequent
    return {
        "model": name,
        "num_experts": config.moe.num_experts,
        "top_k": config.moe.top_k,
        "num_shared_experts": config.moe.num_shared_experts,
        "layers": layers,
        "data": [
            {
                "name": text.name,
                "source": text.source,
                "tokens": len(text.ids),
                "documents": len(np.unique(text.documents)),
            }
            for text in texts
        ],
        "tokens": routing.tokens,
        "settings": {
            "sequence_length": settings.sequence_length,
            "batch_size": settings.batch_size,
            "noise": settings.noise,
            "seed": settings.seed,
            "dead_below": DEAD,
            "significance": SIGNIFICANCE,
        },
        "balance": balance(routing, layers, observed.limited),
        "co_activation": co_activation(routing, layers),
        "stability": {
            "noise": stability(noisy.compute(), layers),
            "checkpoints": {other: stability(metric.compute(), layers) for other, metric in others.items()},
        },
        "token_specialisation": token_specialisation(
            observed.types.compute(), types, occurrences, routing, layers, tokenizer
        ),
        "domain_specialisation": domain_specialisation(
            observed.windows.compute(), windows, texts, layers, settings.seed
        ),
        "similarity": similarity(model, observed.samples, layers),
        "shared": [
            {"layer": layer, "share": float(share.compute())}
            for layer, share in zip(layers, observed.shared, strict=True)
        ]
        if observed.shared
        else None,
    }
