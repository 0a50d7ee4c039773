"""SAEs by the names of published releases, which sae-lens keeps a registry of.

sae-lens itself is not imported (that takes seconds): its registry is a file, and our own readers
know its formats. A name with a slash that is not registered is a repository on the hub, and the
id a folder in it. Only naming a release reaches for the network, and only its own files are
fetched.
"""

from __future__ import annotations

import difflib
import glob
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from holdfast.errors import SAEError
from holdfast.saes.formats import FORMATS, layout_of, transcoder
from holdfast.saes.formats.gemma_scope import place_of
from holdfast.saes.formats.saelens import layout_under
from holdfast.saes.formats.single_file import RELEASES
from holdfast.saes.formats.single_file import layout as single_file
from holdfast.saes.layout import Layout
from holdfast.saes.sources import SAESource, Shape

READERS = {
    None: "saelens",
    "sae_lens": "saelens",
    "gemma_2": "gemma_scope",
    "gemma_3": "gemma_scope",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
}
"""sae-lens' converter of a release → our format."""

REFUSED = {
    "connor_rob_hook_z": "it reads the heads of an attention layer, not the residual stream",
    "temporal": "its codes depend on earlier tokens, so no direction of the residual is a feature",
}
ELSEWHERE = re.compile(r"/Llama3_1-8B-Base-LX(?P<point>A|M|TC)-")
"""Llama Scope's repositories of other points than the residual."""

WIDTH = re.compile(r"width_(?P<n>\d+)(?P<unit>[km])")
"""How Gemma Scope's ids name a width: the power of two is rounded (131k is 131,072)."""

TOP_LEVEL = re.compile(r"^([^\s#:][^:\n]*):", re.M)
N_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """An SAE of a release: where its files are, and what the registry says of it.

    format: how its files are read; None lets the files tell. conversion: sae-lens' converter.
    """

    repository: str
    path: str
    format: str | None = None
    conversion: str | None = None
    model: str | None = None
    l0: float | None = None
    scale: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


class Release(SAESource):
    """An SAE by the name of its release and its id there.

    The release may be a repository on the hub, and the id a folder in it (`.` for all of it).
    revision: a branch, tag or commit of the repository; a study that should mean the same next year
    names a commit. What was loaded is hashed into the trial either way.
    """

    kind: Literal["release"] = "release"
    release: str
    sae_id: str
    revision: str | None = None

    @property
    def label(self) -> str:
        return f"{self.release} {self.sae_id}"

    def shape(self) -> Shape | None:
        """By the width that published ids name (`layer_3/width_16k/…`); whether it is a TopK they
        do not say."""
        found = WIDTH.search(self.sae_id)
        if found is None:
            return None
        about = int(found["n"]) * {"k": 1e3, "m": 1e6}[found["unit"]]
        return Shape(self.n_features or 2 ** round(math.log2(about)))

    def layout(self) -> Layout:
        entry = entry_of(self.release, self.sae_id)
        if entry.conversion in RELEASES:
            root = _fetch(entry.repository, self.revision, (entry.path,))
            found = single_file(root, entry.path, entry.repository, str(entry.conversion))
        else:
            forms = FORMATS.values() if entry.format is None else [FORMATS[entry.format]]
            files = tuple(str(PurePosixPath(entry.path) / n) for form in forms for n in form.files)
            folder = _fetch(entry.repository, self.revision, files) / entry.path
            if not folder.is_dir():
                raise SAEError(
                    f"the hub's repository {entry.repository} has no folder {entry.path} at "
                    f"revision {self.revision or 'main'} (or the hub is out of reach and it was "
                    "never fetched)"
                )
            if entry.overrides and entry.format == "saelens":
                found = layout_under(folder, entry.overrides)
            else:
                found = layout_of(folder, entry.format)
        facts = found.facts
        facts = replace(facts, model=entry.model or facts.model, l0=entry.l0 or facts.l0)
        inputs = found.inputs
        if math.isnan(inputs.scale) and entry.scale is not None:
            inputs = replace(inputs, scale=entry.scale)
        return replace(found, facts=facts, inputs=inputs)


def entry_of(release: str, sae_id: str) -> Entry:
    """What the names mean. Raises SAEError with near names; reaches for no network."""
    names = _releases()
    if release in names:
        return _entry(_block(names[release]), release, sae_id)
    if "/" not in release:
        raise SAEError(f"unknown release {release!r}: {close(release, names, 'releases')}")
    # A repository that is registered under another name: what the registry knows of it holds.
    registered = re.compile(rf"^  repo_id: ['\"]?{re.escape(release)}['\"]?$", re.M)
    for text in names.values():
        block = _block(text) if registered.search(text) else {"saes": []}
        for own in block["saes"]:
            if str(own["path"]) == sae_id:
                return _entry(block, release, own["id"])
    return Entry(release, _inside(sae_id))


def close(name: str, known: Collection[str], what: str) -> str:
    """The end of a message about an unknown name among too many to list."""

    def shared(other: str) -> int:
        """Letters that both begin with."""
        return sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, other, strict=False))
        )

    # Ids are paths: what begins alike is nearer than what has the same letters.
    alike = sorted((k for k in known if 2 * shared(k) >= len(name)), key=lambda k: (-shared(k), k))
    near = [*alike[:N_SHOWN], *difflib.get_close_matches(name, known, n=N_SHOWN, cutoff=0.5)]
    near = list(dict.fromkeys(near))[:N_SHOWN]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}? {len(known)} {what} are known"
    return f"{len(known)} {what} are known, for example {', '.join(sorted(known)[:N_SHOWN])}"


def _entry(block: dict[str, Any], release: str, sae_id: str) -> Entry:
    saes = {str(own["id"]): own for own in block["saes"]}
    if sae_id not in saes:
        raise SAEError(f"unknown sae_id {sae_id!r}: {close(sae_id, saes, f'SAEs of {release}')}")
    own, conversion = saes[sae_id], block.get("conversion_func")
    path, repository = _inside(str(own["path"])), block["repo_id"]
    if conversion in REFUSED:
        raise SAEError(REFUSED[conversion])
    if "transcoder" in str(conversion):
        raise transcoder(str(conversion))
    if conversion not in READERS and conversion not in RELEASES:
        raise SAEError(
            f"sae-lens converts it by {conversion!r}, which this version cannot; known: "
            f"{', '.join(sorted({*filter(None, READERS), *RELEASES}))}"
        )
    if READERS.get(conversion) == "gemma_scope":
        site = place_of(PurePosixPath(repository) / path).site
        if site is not None and "resid" not in site:
            raise SAEError(f"it was trained at {site}, which is no point of the residual stream")
    if (other := ELSEWHERE.search(repository)) is not None:
        if other["point"] == "TC":
            raise transcoder("Llama Scope transcoder")
        point = {"A": "attention's output", "M": "the MLP's output"}[other["point"]]
        raise SAEError(f"it was trained at {point}, which is no point of the residual stream")
    return Entry(
        repository=repository,
        path=path,
        format=READERS.get(conversion),
        conversion=conversion,
        model=block.get("model"),
        l0=own.get("l0") or None,
        scale=own.get("norm_scaling_factor"),
        overrides=block.get("config_overrides") or {},
    )


def _inside(path: str) -> str:
    """A path inside a repository. Raises SAEError if it leads out of it."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts:
        raise SAEError(f"{path!r} is no path inside a repository")
    return str(pure)


@cache
def _releases() -> dict[str, str]:
    """Name → its part of sae-lens' registry, as text: parsing all of it takes half a second."""
    spec = find_spec("sae_lens")
    if spec is None or spec.origin is None:
        raise SAEError(
            "releases are looked up in sae-lens, which is not installed: pip install sae-lens"
        )
    file = Path(spec.origin).with_name("pretrained_saes.yaml")
    try:
        text = file.read_text()
    except OSError as error:
        raise SAEError(f"sae-lens' registry of releases cannot be read: {error}") from None
    starts = list(TOP_LEVEL.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return {s[1].strip("'\""): text[s.start() : end] for s, end in zip(starts, ends, strict=True)}


def _block(text: str) -> dict[str, Any]:
    """A release's part of the registry. Raises SAEError if it is not as it is meant to be."""
    import yaml  # type: ignore[import-untyped]

    try:
        (block,) = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)).values()
        if all(key in block for key in ("repo_id", "saes")):
            return dict(block)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        pass
    raise SAEError("sae-lens' registry of releases is not in the form this version knows")


@cache
def _fetch(repository: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """The folder of a repository's snapshot in the hub's cache, with these files if it has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The hub's errors are those of its HTTP library too, which differs by version.
    unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    patterns = [glob.escape(name) for name in files]
    at = f"{repository} at revision {revision or 'main'}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise SAEError(
            f"{at} is gated: accept its terms on the hub, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise SAEError(f"the hub has no repository {repository}, or it is private") from None
    except RevisionNotFoundError:
        raise SAEError(f"the hub's repository {repository} has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        raise SAEError(
            f"{at} is not in the hub's cache, and the hub is out of reach; where it is not: "
            f"hf download {repository}{f' --revision {revision}' if revision else ''} "
            f"{' '.join(f'--include {name!r}' for name in files)}"
        ) from None
    except HFValidationError as error:
        raise SAEError(f"{repository!r} is no name of a repository: {error}") from None
    except unreachable as error:
        raise SAEError(f"fetching {at} failed: {type(error).__name__}: {error}") from None
