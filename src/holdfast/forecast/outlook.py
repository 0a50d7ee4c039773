"""The forecast of a trial beside what it took: for records, where both stand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.batching import MOST
from holdfast.errors import HoldfastError
from holdfast.executor import Done, Runtime, threads_for
from holdfast.forecast import forecast
from holdfast.forecast.architecture import Architecture
from holdfast.forecast.device import Device, probe
from holdfast.forecast.memory import Memory, memory_of
from holdfast.forecast.prompts import Prompts
from holdfast.forecast.scene import Scene, among
from holdfast.forecast.sizing import one_device_bytes
from holdfast.saes.sae import SAE
from holdfast.saes.sources import Shape
from holdfast.saes.stored import StoredSAE
from holdfast.trial import Lab, SubjectIdentity, Trial, setting_key

PROBE_SECONDS = 0.02
"""Of each of a probe's measurements: a run is not to wait for its forecast."""


@dataclass(frozen=True)
class Outlook:
    """Forecasts for the trials of a run, as they could have been made before it.

    The device is probed once for every precision and width, with as many threads as trials have.
    """

    lab: Lab
    runtime: Runtime
    _devices: dict[tuple[str, int], Device] = field(default_factory=dict)
    _scenes: dict[str, Scene | HoldfastError] = field(default_factory=dict)

    @classmethod
    def before(cls, lab: Lab, runtime: Runtime, trials: Sequence[Trial]) -> Outlook:
        """Everything that forecasts need, read before a trial begins.

        A config's model is put together under its own dtype, which torch then has for every thread:
        beside a search, the search's tensors would come out in it.
        """
        outlook = cls(lab, runtime)
        for trial in trials:
            for identity in (trial.subject, trial.twin):
                if identity is not None:
                    outlook._look(trial, identity)
        return outlook

    def of(self, done: Done) -> dict[str, Any]:
        """Plain JSON; only a reason where nothing can be said of the trial's kinds."""
        trial = done.trial
        try:
            scene = self._scene(trial, trial.subject)
            unprepared = [self._scene(trial, identity) for identity in done.unprepared]
            device = self._devices[scene.dtype, scene.model.d_model]
            scene = among(scene, done.stack)
            own = [replace(each, sizes=done.begun_with) for each in (scene, *unprepared)]
            return forecast(own[0], device, own[1:]).as_dict()
        except HoldfastError as error:
            return {"reason": str(error)}

    def memories(self, stacks: Sequence[Sequence[Trial]]) -> list[Memory]:
        """What the trials of stacks hold, each in its batch, of those that can be forecast."""
        found = []
        own = one_device_bytes(self.runtime.device)
        for stack in stacks:
            for trial in stack:
                with suppress(HoldfastError):  # the forecast of its record says why
                    scene = among(self._scene(trial, trial.subject), stack)
                    found.append(memory_of(scene, own))
        return found

    def _scene(self, trial: Trial, identity: SubjectIdentity) -> Scene:
        scene = self._scenes[setting_key(trial, identity)]
        if isinstance(scene, HoldfastError):
            raise scene
        return replace(scene, trial=trial)

    def _look(self, trial: Trial, identity: SubjectIdentity) -> None:
        """Of the subject as it is loaded, of which only shapes and the tokenizer are looked at."""
        key = setting_key(trial, identity)
        if key in self._scenes:
            return
        subject = self.lab.subject(identity)
        try:
            scene = Scene(
                trial=trial,
                model=Architecture.of(subject.model.config),
                dtype=identity.dtype,
                quantization=identity.quantization,
                eager=identity.attention == "eager",
                saes={site: _shape(sae) for site, sae in subject.saes.items()},
                prompts=Prompts.counted(
                    subject.tokenizer, trial.behavior, trial.data, trial.seed, subject.prepend_bos
                ),
                sizes=MOST,
            )
        except HoldfastError as error:
            self._scenes[key] = error
            return
        self._scenes[key] = scene
        at = scene.dtype, scene.model.d_model
        if at not in self._devices:
            with threads_for(self.lab, self.runtime):
                self._devices[at] = probe(self.runtime.device, *at, PROBE_SECONDS)


def _shape(sae: SAE | StoredSAE) -> Shape:
    if isinstance(sae, StoredSAE):
        return Shape.of(sae.layout)
    return Shape(sae.n_features, sae.k, sae.W_enc.dtype.itemsize)
