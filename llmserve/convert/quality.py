"""Quality: a quantised model against the one it was made from, on the same held-out tokens.

Both run a layer at a time and their logits are compared a few rows at a time, so that neither a
whole model nor tokens x vocabulary is ever held. What is compared is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import torch_dtype
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.quality_file import Measurement
from llmserve.config import QualityConfig
from llmserve.convert.artifact import Artifact
from llmserve.convert.samples import RenderChat, Samples, load_samples
from llmserve.errors import CheckpointError, QualityError
from llmserve.runtime.torch.layerwise import (
    LayerwiseModel,
    TokenIds,
    row_chunks,
    token_groups,
)
from llmserve.runtime.torch.runner import resolve_device

# Hidden states of both models that are held at a time.
_MAX_HIDDEN_BYTES = 2**31
# Logits of one model that are held at a time: 32 MiB in float64.
_MAX_LOGITS = 2**22


def measure(
    reference: Artifact,
    candidate: Artifact,
    samples: Samples,
    *,
    device: str = "auto",
    report: Report = no_report,
) -> Measurement:
    """Run both models over samples and compare what they predict.

    Args:
        reference: The model before quantisation, or any other to compare with.
        candidate: The model that is judged.
        samples: Token sequences; all tokens but the first of each are predicted.
        device: As the runtime's: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        report: Told after every layer, as stages 'reference' and 'candidate'.

    Raises:
        ConfigError: A sequence is longer than a model's context, or there is no such device.
        CheckpointError: A tensor cannot be read, or the vocabularies differ.
        QualityError: A model computes NaN or infinity, or no token is predicted.
    """
    configs = (reference.config, candidate.config)
    if configs[0].vocab_size != configs[1].vocab_size:
        raise CheckpointError(
            f"the reference has a vocab_size of {configs[0].vocab_size} and the candidate one of "
            f"{configs[1].vocab_size}; only models with the same vocabulary can be compared"
        )
    sequences = [ids for ids in samples.sequences if len(ids) > 1]
    if not sequences:
        raise QualityError(f"{samples.name} has no sequence of two tokens: nothing is predicted")
    place = resolve_device(device)
    models = [LayerwiseModel(a.source, a.config, device=place) for a in (reference, candidate)]
    token_bytes = sum(c.hidden_size * torch_dtype(c.dtype).itemsize for c in configs)
    totals = Totals()
    for group in token_groups(sequences, _MAX_HIDDEN_BYTES // token_bytes):
        _compare(models, group, totals, place, report)
    return Measurement(
        reference=reference.weights,
        candidate=candidate.weights,
        text=samples.name,
        tokens_sha256=samples.sha256,
        num_samples=len(sequences),
        num_tokens=totals.tokens,
        reference_perplexity=_perplexity(totals.reference_loss / totals.tokens, "reference"),
        perplexity=_perplexity(totals.candidate_loss / totals.tokens, "candidate"),
        mean_kl=totals.kl / totals.tokens,
        max_kl=totals.max_kl,
        top1_agreement=totals.agreeing / totals.tokens,
    )


def held_out_samples(
    settings: QualityConfig,
    tokenizer_dir: Path,
    config: PretrainedConfig,
    render_chat: RenderChat | None = None,
) -> Samples:
    """The samples that ``settings`` ask for.

    Args:
        settings: Of the measurement.
        tokenizer_dir: Where the reference's tokenizer is.
        config: Of the reference.
        render_chat: Writes messages as a text; None joins their contents.

    Raises:
        ConfigError: The text cannot be read, or has none.
        CheckpointError: The tokenizer is missing or damaged.
    """
    return load_samples(
        settings.text,
        tokenizer_dir,
        default="held_out",
        samples=settings.samples,
        # A small model may take less than the default.
        seq_len=min(settings.seq_len, config.max_position_embeddings),
        seed=settings.seed,
        vocab_size=config.vocab_size,
        render_chat=render_chat,
    )


def check_limits(measurement: Measurement, max_kl: float | None, min_top1: float | None) -> None:
    """Raise QualityError if a limit is missed.

    Args:
        measurement: What was measured.
        max_kl: Largest mean KL divergence that passes, in nats a token; None: any.
        min_top1: Smallest top-1 agreement that passes, from 0 to 1; None: any.
    """
    missed = []
    if max_kl is not None and measurement.mean_kl > max_kl:
        missed.append(
            f"the mean KL divergence is {measurement.mean_kl:.6g} nats a token, above the limit of "
            f"{max_kl:g} (--max-kl)"
        )
    if min_top1 is not None and measurement.top1_agreement < min_top1:
        missed.append(
            f"the top-1 agreement is {measurement.top1_agreement:.6g}, below the limit of "
            f"{min_top1:g} (--min-top1)"
        )
    if missed:
        raise QualityError(f"{measurement.candidate}: {'; '.join(missed)}")


@dataclass(slots=True)
class Totals:
    """Sums over predicted tokens.

    Attributes:
        tokens: Their number.
        reference_loss: Of the reference's negative log-likelihoods, in nats.
        candidate_loss: Of the candidate's.
        kl: Of KL(reference || candidate), in nats.
        max_kl: The largest of these.
        agreeing: Tokens for which both have the same likeliest one.
    """

    tokens: int = 0
    reference_loss: float = 0.0
    candidate_loss: float = 0.0
    kl: float = 0.0
    max_kl: float = 0.0
    agreeing: int = 0

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, next_ids: torch.Tensor) -> None:
        """Add rows of logits.

        Args:
            reference: float32 (rows, vocab).
            candidate: Likewise.
            next_ids: int64 (rows,): the tokens that came.

        Raises:
            QualityError: NaN or infinity.
        """
        p = _log_probabilities(reference, "reference")
        q = _log_probabilities(candidate, "candidate")
        kl = (p.exp() * (p - q)).sum(-1).clamp_(min=0.0)  # rounding can take a zero below it
        columns = next_ids[:, None]
        self.tokens += len(next_ids)
        self.reference_loss -= float(p.gather(1, columns).sum())
        self.candidate_loss -= float(q.gather(1, columns).sum())
        self.kl += float(kl.sum())
        self.max_kl = max(self.max_kl, float(kl.max()))
        self.agreeing += int((reference.argmax(-1) == candidate.argmax(-1)).sum())


def _log_probabilities(logits: torch.Tensor, which: str) -> torch.Tensor:
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(logits)):
        raise QualityError(f"the {which} computes NaN or infinity on the held-out text")
    return logits.double().log_softmax(-1)


def _compare(
    models: Sequence[LayerwiseModel],
    sequences: Sequence[TokenIds],
    totals: Totals,
    device: torch.device,
    report: Report,
) -> None:
    """Add the predictions of both models, reference first, to ``totals``."""
    stages = ("reference", "candidate")
    hidden = [
        model.hidden_states(sequences, stage=stage, report=report)
        for model, stage in zip(models, stages, strict=True)
    ]
    predicting: list[int] = []
    next_ids: list[int] = []
    start = 0
    for ids in sequences:
        predicting += range(start, start + len(ids) - 1)
        next_ids += ids[1:]
        start += len(ids)
    rows, following = torch.tensor(predicting), torch.tensor(next_ids)
    heads = [model.head() for model in models]
    with torch.inference_mode():
        for chunk in row_chunks(len(rows), heads[0].vocab_size, _MAX_LOGITS):
            logits = [
                head(states[rows[chunk]].to(device))
                for head, states in zip(heads, hidden, strict=True)
            ]
            totals.add(logits[0], logits[1], following[chunk].to(device))


def _perplexity(mean_loss: float, which: str) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        raise QualityError(
            f"the {which}'s perplexity is beyond any number: a token costs {mean_loss:.0f} nats"
        ) from None
