"""What a study would cost, before it is run: operations, memory, time, and the batch that fits.

From configs alone, in closed form: `scene` (what is known of a trial), `stages` (what is done),
`passes` (what that costs), `memory`, and a `device` to do it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from holdfast.batching import MOST, WORK, Sizes
from holdfast.canonical import digest
from holdfast.executor import check_device
from holdfast.forecast.device import Device, Range, gpu, probe
from holdfast.forecast.memory import Memory, memory_of
from holdfast.forecast.preparing import preparing
from holdfast.forecast.prompts import Prompts
from holdfast.forecast.scene import Scene, among
from holdfast.forecast.searching import STARTS
from holdfast.forecast.stages import stages_of
from holdfast.forecast.subject import (
    architecture_of,
    described_spec,
    outlined,
    shapes_of,
    tokenizer_of,
)
from holdfast.forecast.work import Stage, Work, total
from holdfast.grid import Point
from holdfast.loading import SubjectSpec
from holdfast.planning import sketch
from holdfast.positions import check_fits
from holdfast.stacked import stacked
from holdfast.study import Study
from holdfast.trial import Trial, setting_key

__all__ = ["Forecast", "forecast", "forecast_study", "on_device", "on_gpu", "scene_of"]

PROMPT_TOKENS = 64
"""Tokens of a prompt where neither the tokenizer is at hand nor a length is given."""


@dataclass(frozen=True)
class Forecast:
    """What one trial takes on a device.

    prepared: whether another trial has prepared its setting, so that this one does not; point:
    where on its audit's grid it lies.
    """

    scene: Scene
    device: Device
    stages: tuple[Stage, ...]
    memory: Memory
    prepared: bool
    point: Point = field(default_factory=dict)

    @property
    def found(self) -> Work:
        """The work if every prompt is recovered."""
        return total([stage.found for stage in self.stages])

    @property
    def not_found(self) -> Work:
        """The work if none is."""
        return total([stage.not_found for stage in self.stages])

    @property
    def if_found(self) -> Range:
        """Seconds if every prompt is recovered, on a device as fast and as slow as expected."""
        return self._seconds("found")

    @property
    def if_not_found(self) -> Range:
        """Seconds if none is."""
        return self._seconds("not_found")

    def _seconds(self, which: str) -> Range:
        times = [self.device.seconds(getattr(stage, which)) for stage in self.stages]
        return sum(t[0] for t in times), sum(t[1] for t in times)

    @property
    def lanes(self) -> int:
        """Most lanes of a step of the batch that it is searched in, if it could hold them all."""
        return (STARTS + 1) * self.scene.searched

    @property
    def peak(self) -> float:
        """Bytes at the scene's batch size, of all that is searched together."""
        rows = max(self.scene.prompts.n.values())
        return self.memory.peak(rows, self.scene.searched, self.lanes, self.scene.sizes)

    @property
    def sizes_that_fit(self) -> Sizes:
        """The largest sizes that fit into the device's memory, 0 where not one row does."""
        return self.memory.fit(self.device.memory, self.device.count)

    @property
    def fits(self) -> bool:
        """Whether a row of every kind of work does."""
        return min(self.sizes_that_fit.of(work) for work in WORK) > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: what goes into a record's run part."""
        prompts, fit = self.scene.prompts, self.sizes_that_fit
        return {
            "device": self.device.name,
            "source": self.device.source,
            "prepared": self.prepared,
            "prompts": prompts.n | {"neighbors": sum(prompts.neighbors.values())},
            "prompt_tokens": prompts.width,
            "prompts_counted": prompts.measured,
            "flops_if_found": self.found.all_flops,
            "flops_if_not_found": self.not_found.all_flops,
            "stages": {
                stage.name: {
                    "flops_if_found": stage.found.all_flops,
                    "flops_if_not_found": stage.not_found.all_flops,
                }
                for stage in self.stages
            },
            "seconds_if_found": list(self.if_found),
            "seconds_if_not_found": list(self.if_not_found),
            "rows_at_once": {work: self.scene.sizes.of(work) for work in WORK},
            "rows_searched_together": self.scene.searched,
            "memory_bytes": self.peak,
            "rows_that_fit": {work: fit.of(work) for work in WORK},
        }


def forecast(scene: Scene, device: Device, unprepared: Sequence[Scene]) -> Forecast:
    """One trial. unprepared: those of its settings (its own, its twin's) that no trial before it
    has prepared."""
    stages = [*map(preparing, unprepared), *stages_of(scene)]
    memory = memory_of(scene, device.memory / device.count)
    return Forecast(scene, device, tuple(stages), memory, not unprepared)


def scene_of(
    trial: Trial,
    spec: SubjectSpec,
    batch_size: int,
    prompt_tokens: int | None = None,
    sae_width: int | None = None,
) -> Scene:
    """Everything known of a trial. batch_size: 0 for as many rows as are worth it; prompt_tokens:
    of its longest prompt, instead of its own.

    Raises SubjectError or SAEError where a shape is not known, ContextError for prompts that are
    too long.
    """
    spec = described_spec(spec)
    folder = spec.folder()
    tokenizer = None if prompt_tokens is not None else tokenizer_of(folder)
    if tokenizer is None:
        prompts = Prompts.assumed(trial.data, prompt_tokens or PROMPT_TOKENS)
    else:
        prompts = Prompts.counted(
            tokenizer, trial.behavior, trial.data, trial.seed, spec.prepend_bos
        )
    shapes, model = shapes_of(spec, sae_width), architecture_of(folder)
    if prompts.measured:
        longest, new = (prompts.longest,), trial.behavior.answer_tokens
        check_fits(trial.subject.name, model.context, longest, (prompts.width,), new)
    return Scene(
        trial, model, spec.dtype, spec.quantization,
        spec.attention_used() == "eager", shapes, prompts,
        Sizes.every(batch_size) if batch_size else MOST,
    )  # fmt: skip


def forecast_study(
    study: Study,
    device: Callable[[Scene], Device],
    batch_size: int,
    prompt_tokens: int | None = None,
    sae_width: int | None = None,
) -> list[Forecast]:
    """Every trial of a study, in the order in which they run, one after the other.

    device: where the trial of a scene would run. batch_size: what is asked for, 0 for what a run
    would begin with: the most that fits for all of its trials. Where less than was asked for fits,
    a trial is forecast with what does.
    """
    planned = sketch(study, outlined)
    stack_of = {trial.id: stack for stack in stacked(planned.trials) for trial in stack}
    known: dict[str, Scene] = {}
    asked = []
    for trial in planned.trials:
        unprepared = []
        for identity in (trial.subject, trial.twin):
            if identity is not None and (key := setting_key(trial, identity)) not in known:
                spec = planned.specs[digest(identity.model_dump(mode="json"))]
                known[key] = scene_of(trial, spec, batch_size, prompt_tokens, sae_width)
                unprepared.append(known[key])
        scene = replace(known[setting_key(trial, trial.subject)], trial=trial)
        scene = among(scene, stack_of[trial.id])
        one = forecast(scene, device(scene), unprepared)
        asked.append((replace(one, point=planned.points[trial.id]), unprepared))
    together = MOST.at_most(*(one.sizes_that_fit for one, _ in asked if one.fits))
    made = []
    for one, unprepared in asked:
        sizes = one.scene.sizes.at_most(one.sizes_that_fit if batch_size else together)
        if one.fits and sizes != one.scene.sizes:
            smaller = [replace(each, sizes=sizes) for each in (one.scene, *unprepared)]
            one = replace(forecast(smaller[0], one.device, smaller[1:]), point=one.point)
        made.append(one)
    return made


def on_gpu(name: str) -> Callable[[Scene], Device]:
    """Every trial on a GPU of the table. Raises DeviceError for an unknown one."""
    gpu(name, "float32")
    return lambda scene: gpu(name, scene.dtype)


def on_device(device: str) -> Callable[[Scene], Device]:
    """Every trial on this device, probed once for each precision and width. Raises DeviceError."""
    check_device(device)
    probed = cache(lambda dtype, d_model: probe(device, dtype, d_model))
    return lambda scene: probed(scene.dtype, scene.model.d_model)
