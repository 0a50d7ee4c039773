"""The known-answer pair: two subjects that differ in one thing, whether there is a second route.

Both read the residual of one site through an orthogonal projection, and their layers above were
trained behind it. The *bottleneck* sees the span of the clamped features' encoder columns and
nothing else, so what is orthogonal to them cannot matter: a clamp on these features holds, and a
search that keeps them exactly still must find nothing. The *second route* sees as many further
directions, which carry the behavior as well: there the clamp does not hold, and a search must find
it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from holdfast.behaviors.ioi import IOI
from holdfast.discovery.attribution import Attribution
from holdfast.edits import Capture
from holdfast.features import FeatureSet
from holdfast.loading import SubjectSpec
from holdfast.organism.projected import project, save_projection
from holdfast.saes.sources import Folder, SAESpec
from holdfast.setting import Data
from holdfast.sites import Site
from holdfast.spans import orthonormal_basis
from holdfast.subject import Subject

SITE = Site(2)
N_FEATURES = 24
FEATURES = "features.json"


def train_pair(
    organism: Path, out: Path, seed: int, steps: int = 300, progress: Progress | None = None
) -> None:
    """Write out/bottleneck and out/second_route, made from the organism in folder `organism`.

    The SAE is the organism's: layers up to the site are left as they are.
    """
    source = Folder(path=str(organism / "saes" / str(SITE.layer)))
    spec = SubjectSpec(model=str(organism), saes=(SAESpec(site=str(SITE), source=source),))
    subject = Subject.load(spec)
    fit = subject.batch(IOI().examples(subject.tokenizer, "fit", Data().fit, seed))
    features = Attribution(n_features=N_FEATURES).find(subject, fit, {})
    ids = list(features.at(SITE)[0].ids)
    clamped = orthonormal_basis(subject.sae(SITE).full().W_enc[:, ids])
    extra = _further_directions(subject, fit_tokens(subject, fit), clamped)
    for name, basis in (
        ("bottleneck", clamped),
        ("second_route", torch.cat([clamped, extra], 1)),
    ):
        folder = out / name
        task = progress.add_task(name, total=steps) if progress else None
        _train_behind(organism, folder, basis, features, seed, steps, progress, task)


def fit_tokens(subject: Subject, batch: object) -> Tensor:
    """Residuals [n d_model] at the site on the prompts of `batch`, BOS and padding left out."""
    capture = Capture(SITE)
    subject.outputs(batch, (capture,))  # type: ignore[arg-type]
    return torch.cat([x[frame.positions > 0] for frame, x in capture.seen])


def _further_directions(subject: Subject, resid: Tensor, clamped: Tensor) -> Tensor:
    """As many directions as `clamped` [d r] has, orthogonal to it: where the rest varies most."""
    rest = resid - resid.mean(0)
    rest = rest - (rest @ clamped) @ clamped.T
    _, _, directions = torch.linalg.svd(rest.double(), full_matrices=False)
    extra = directions[: clamped.shape[1]].T.float()
    extra = extra - clamped @ (clamped.T @ extra)
    return torch.linalg.qr(extra.double()).Q.float()


def _train_behind(
    organism: Path,
    folder: Path,
    basis: Tensor,
    features: FeatureSet,
    seed: int,
    steps: int,
    progress: Progress | None,
    task: object,
) -> None:
    """Fine-tune what lies above the site, behind the projection, on sentences with two names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from holdfast.organism.corpus import documents
    from holdfast.organism.train import batches

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(organism)
    model = AutoModelForCausalLM.from_pretrained(organism, dtype=torch.float32)
    plain = model.model.layers[SITE.depth]
    project(model, basis, SITE.depth)
    model.requires_grad_(False)
    above = [*model.model.layers[SITE.depth :].parameters(), *model.model.norm.parameters()]
    above += list(model.lm_head.parameters())
    for parameter in above:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(above, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
    )
    all_documents = documents("full", 12 * 64 * steps, seed=seed + 7, curriculum=False)
    sentences = (document for document in all_documents if document.kind == "ioi")
    model.train()
    for step, (tokens, weights) in enumerate(batches(sentences, tokenizer, 64)):
        if step == steps:
            break
        logits = model(tokens[:, :-1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(above, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress is not None:
            progress.update(task, advance=1)  # type: ignore[arg-type]
    model.model.layers[SITE.depth] = plain  # the projection is saved beside the plain weights
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_projection(folder, basis, SITE.depth)
    (folder / FEATURES).write_text(
        json.dumps(features.model_dump(mode="json")["entries"], indent=1) + "\n"
    )
