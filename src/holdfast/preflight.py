"""Preflight: mistakes that make every later number wrong, looked for before any claim."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from holdfast.batch import Batch, check_disjoint
from holdfast.canonical import digest
from holdfast.edits import Capture
from holdfast.errors import HoldfastError
from holdfast.executor import Runtime, load_lab
from holdfast.finding import Finding
from holdfast.replay import Replay
from holdfast.sites import Site
from holdfast.study import Plan
from holdfast.subject import Subject
from holdfast.trial import Trial

N_PROMPTS = 32
MIN_EXPLAINED = 0.5
PARITY = 1e-5


def preflight(plan: Plan) -> list[Finding]:
    """Every check of every audit, on its own fit prompts. Loads the subjects, runs no search.

    Raises HoldfastError only for what keeps a check from being made at all.
    """
    lab = load_lab(plan, plan.trials, Runtime())
    first: dict[str, Trial] = {}
    for trial in plan.trials:
        for identity in (trial.subject, trial.twin):
            if identity is not None:
                key = f"{trial.audit} on {identity.name}"
                first.setdefault(key, trial.model_copy(update={"subject": identity}))
    findings = []
    for key, trial in first.items():
        for finding in _checks(trial, lab.subjects[digest(trial.subject.model_dump(mode="json"))]):
            findings.append(finding.model_copy(update={"check": f"{key}: {finding.check}"}))
    return findings


def _checks(trial: Trial, subject: Subject) -> Iterator[Finding]:
    splits = {
        name: subject.batch(
            trial.behavior.examples(subject.tokenizer, name, getattr(trial.data, name), trial.seed)
        )
        for name in ("fit", "tune", "test")
    }
    try:
        check_disjoint(splits)
        overlap = "disjoint"
    except HoldfastError as error:
        overlap = str(error)
    yield Finding(
        check="splits",
        passed=overlap == "disjoint",
        expected="fit, tune and test share no prompt and no cluster",
        measured=overlap,
        remedy="draw them from other prompts",
    )
    batch = splits["fit"].rows(torch.arange(min(N_PROMPTS, len(splits["fit"]))))
    yield _bos(subject, batch)
    yield _padding(subject, batch)
    yield _behavior(subject, splits["test"])
    for site in subject.saes:
        yield from _sae(subject, site, batch)
        yield _replay(subject, site, batch)


def _bos(subject: Subject, batch: Batch) -> Finding:
    bos = subject.tokenizer.bos_token_id
    starts = bool(batch.bos.all()) if bos is not None else True
    return Finding(
        check="beginning of sequence",
        passed=starts,
        expected="every prompt begins with one BOS token, if the tokenizer has one",
        measured="it does" if starts else f"{int((~batch.bos).sum())} of {len(batch)} do not",
        remedy="models trained with BOS are off-distribution without it; add it to the prompts",
    )


def _padding(subject: Subject, batch: Batch) -> Finding:
    together = subject.outputs(batch)[:, -1]
    single = torch.cat([subject.outputs(batch.rows([i]))[:, -1] for i in range(len(batch))])
    scale = float(single.abs().max())
    worst = float((together - single).abs().max()) / scale
    return Finding(
        check="padding",
        passed=worst <= PARITY,
        expected=f"a padded batch equals single prompts to {PARITY:g} relative",
        measured=f"{worst:.1e}",
        remedy='try attention = "eager"; the model may mishandle left padding',
    )


def _behavior(subject: Subject, test: Batch) -> Finding:
    n_clean = int((test.margin(subject.outputs(test)[:, -1]) > 0).sum())
    return Finding(
        check="behavior",
        passed=n_clean > 0,
        expected="some test prompts show the behavior without an intervention",
        measured=f"{n_clean} of {len(test)}",
        remedy="check model, prompts and answer tokens: there is nothing to suppress",
    )


def _sae(subject: Subject, site: Site, batch: Batch) -> Iterator[Finding]:
    capture = Capture(site)
    subject.outputs(batch, (capture,))
    tokens = torch.cat(
        [
            x[(frame.positions >= 0) & ~((frame.positions == 0) & frame.bos[:, None])]
            for frame, x in capture.seen
        ]
    ).float()
    sae = subject.sae(site).full()
    z = sae.encode(tokens)
    left = (tokens - sae.decode(z, tokens)).square().sum()
    explained = 1 - float(left / (tokens - tokens.mean(0)).square().sum())
    yield Finding(
        check=f"reconstruction at {site}",
        passed=explained >= MIN_EXPLAINED,
        expected=f"the SAE explains at least {MIN_EXPLAINED:g} of the variance on these prompts",
        measured=f"{explained:.3f}",
        remedy="wrong base model, wrong site, a missing scale or centering: check the SAE's origin",
    )
    l0 = float((z > 0).float().sum(-1).mean())
    yield Finding(
        check=f"active features at {site}",
        passed=0 < l0 < sae.n_features / 4,
        expected=f"between 0 and a quarter of {sae.n_features} features fire on a token",
        measured=f"{l0:.1f}",
        remedy="a TopK or JumpReLU SAE read as ReLU fires far too often; check its architecture",
    )


def _replay(subject: Subject, site: Site, batch: Batch) -> Finding:
    positions = batch.prompt_length[:, None] - 1
    full = subject.outputs(batch)[:, -1]
    zero = torch.zeros(len(batch), 1, subject.model.config.hidden_size, device=subject.device)
    with torch.no_grad():
        again = Replay.record(subject, batch, site, positions).logits(zero)
    worst = float((full - again).abs().max() / full.abs().max())
    return Finding(
        check=f"replay from {site}",
        passed=worst <= PARITY,
        expected=f"recomputing only what a perturbation can change equals the full pass to "
        f"{PARITY:g} relative",
        measured=f"{worst:.1e}",
        remedy="the family caches keys in a way replay does not know; report it",
    )
