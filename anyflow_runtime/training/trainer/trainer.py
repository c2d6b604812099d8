"""Training runs: from a config to model directories, resumable to the same bits.

A run's directory holds `config.json`, `metrics.jsonl`, `checkpoints/`, on request `samples/` and `loss.png`, after each
phase `phase-N-OBJECTIVE/` with the averaged weights as a model directory, and at the end the same under `model/`.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ...files import write_json
from ...parallel import process_group
from ...signals import StopRequest
from .. import distributed
from ..config import TrainConfig, config_from_dict, config_to_dict
from ..data.open import open_source
from ..progress import MetricsFile, Progress, Trackers, is_loss
from .checkpoint import latest_checkpoint, load_tensors, save_checkpoint, tensor_names
from .networks import Networks
from .parallel import use_fsdp
from .phase import NonFiniteLoss, TrainingPhase
from .samples import open_samples, plot_losses

FREE_TO_CHANGE = ("log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_vae", "plot", "trackers")


def train(config: TrainConfig, out: str | Path, stream: TextIO | None = None) -> Path:
    """Run, or continue the run in `out`; alone or in every process of torchrun.

    Args:
        stream: for progress lines; stderr if None.

    Returns: the directory of the trained model.

    Raises:
        ValueError: if `out` holds a run of another config, naming what differs.
        NonFiniteLoss: naming step and batch; the last checkpoint stays.
    """
    with process_group() as device:
        return _Run(config, Path(out), device, stream or sys.stderr).run()


class _Run:
    def __init__(self, config: TrainConfig, out: Path, device: torch.device, stream: TextIO) -> None:
        self.config, self.out, self.device, self.stream = config, out, device, stream
        self.sharded = use_fsdp(config.sharding, device)
        self.leads = distributed.rank() == 0
        self.checkpoints = out / "checkpoints"
        config.micro_steps(distributed.world_size())  # raises if the global batch does not divide
        if config.plot and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("plot needs matplotlib: pip install 'anyflow-kernels[bench]', or plot=false")
        self.source = open_source(config.data, config.seed, device, stream)
        self.samples = open_samples(config, self.source, out / "samples")

    def run(self) -> Path:
        latest = latest_checkpoint(self.checkpoints)
        directory, content = (None, None) if latest is None else latest
        self._claim_directory(content)
        networks = Networks(self.config, self.device, self.sharded)
        self._check_data(networks.student)
        done, phase = 0, self._phase(0 if content is None else content["phase"], networks)
        if directory is not None and content is not None:
            done = content["step"]
            self._load(directory, phase)
            self._say(f"continuing after step {done}")
            if self._ends_phase(done) and not self._phase_directory(phase.index).is_dir():
                self._export(phase)
        stop = StopRequest(lambda: self._say("stopping after this step; once more stops at once and loses it"))
        names = self.config.trackers if self.leads else ()
        trackers = Trackers(names, self.config.name, self.out / "trackers", config_to_dict(self.config))
        with closing(trackers), stop.taken():
            phase = self._steps(done, phase, networks, trackers, stop)
        model = self.out / "model"
        with phase.trained["student"].averaged():
            networks.export(model)
        self._say(f"model: {model}")
        return model

    def _steps(
        self, done: int, phase: TrainingPhase, networks: Networks, trackers: Trackers, stop: StopRequest
    ) -> TrainingPhase:
        """All steps from `done` on; the last phase. A wish to stop is granted after a checkpoint."""
        metrics = MetricsFile(self.out / "metrics.jsonl", done) if self.leads else None
        progress = Progress(done, self.config.iterations, self.stream)
        for step in range(done, self.config.iterations):
            index, local = self.config.phase_at(step)
            if index != phase.index:
                phase.trained["student"].keep_average()
                phase = self._phase(index, networks)
            values = self._step(phase, step, local)
            done = step + 1
            if metrics is not None and (done % self.config.log_every == 0 or self._ends_phase(done)):
                metrics.write({"step": step, "phase": index, **values})
                trackers.log(step, values)
                progress.show(done, {key: value for key, value in values.items() if is_loss(key)})
            if done % self.config.checkpoint_every == 0 or self._ends_phase(done):
                self._save(phase, done)
            if self.samples is not None and self.config.sample_every and done % self.config.sample_every == 0:
                with phase.trained["student"].averaged():
                    self.samples.write(networks, f"step-{done:08}", phase.phase.objective)
            if self._ends_phase(done):
                self._export(phase)
            if distributed.anywhere(stop.error is not None) and done < self.config.iterations:
                self._save(phase, done)
                self._say(f"stopped after step {done}; the same command goes on from there")
                raise stop.error or KeyboardInterrupt
        return phase

    def _step(self, phase: TrainingPhase, step: int, local: int) -> dict[str, float]:
        try:
            return phase.step(step, local)
        except NonFiniteLoss as error:
            kept = sorted(path.name for path in self.checkpoints.glob("step-*"))
            last = f"the last checkpoint is {self.checkpoints / kept[-1]}" if kept else "there is no checkpoint yet"
            raise NonFiniteLoss(f"{error}; {last}") from error

    def _phase(self, index: int, networks: Networks) -> TrainingPhase:
        return TrainingPhase(self.config, index, networks, self.source, self.device, self.sharded)

    def _save(self, phase: TrainingPhase, done: int) -> None:
        run = {"step": done, "phase": phase.index, "config": config_to_dict(self.config)}
        save_checkpoint(self.checkpoints, done, run, _tensors(phase), self.config.keep_checkpoints)

    def _load(self, directory: Path, phase: TrainingPhase) -> None:
        names = tensor_names(directory)
        for network, trained in phase.trained.items():
            own = f"{network}/"
            trained.expect_state({name.removeprefix(own) for name in names if name.startswith(own)})
        load_tensors(directory, _tensors(phase))
        for trained in phase.trained.values():
            trained.publish()

    def _export(self, phase: TrainingPhase) -> None:
        with phase.trained["student"].averaged():
            phase.networks.export(self._phase_directory(phase.index))
        if self.config.plot and self.leads:
            plot_losses(self.out / "metrics.jsonl", self.out / "loss.png")

    def _phase_directory(self, index: int) -> Path:
        return self.out / f"phase-{index}-{self.config.phases[index].objective}"

    def _ends_phase(self, done: int) -> bool:
        index, local = self.config.phase_at(max(0, done - 1))
        return done > 0 and local + 1 == self.config.phases[index].iterations

    def _claim_directory(self, content: dict[str, Any] | None) -> None:
        own = config_to_dict(self.config)
        if content is not None:
            # Keys that the config did not have yet when the run began stand at their defaults.
            stored = config_to_dict(config_from_dict(content["config"]))
            differing = [key for key in own if key not in FREE_TO_CHANGE and own[key] != stored[key]]
            if differing:
                raise ValueError(f"{self.out}: holds a run with another {differing}; expected the same config to go on")
        if self.leads:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", own)

    def _check_data(self, student: Any) -> None:
        """Raise ValueError, naming what differs, unless the student takes the samples of the source."""
        (frames, channels, *_), text = self.source.shapes
        far, model = self.config.far, student.config
        if far is not None and frames != sum(far.chunk_partition):
            expected = f"sum(far.chunk_partition) = {sum(far.chunk_partition)}"
            raise ValueError(f"data: got latents with {frames} frames, expected {expected}")
        if channels != model.in_channels:
            raise ValueError(f"data: got latents with {channels} channels, expected the model's {model.in_channels}")
        if text is not None and text[1] != model.text_dim:
            raise ValueError(f"data: got prompt embeddings of {text[1]} values, expected the model's {model.text_dim}")

    def _say(self, text: str) -> None:
        if self.leads:
            print(text, file=self.stream, flush=True)


def _tensors(phase: TrainingPhase) -> dict[str, Tensor]:
    return {
        f"{network}/{name}": tensor
        for network, trained in phase.trained.items()
        for name, tensor in trained.state_dict().items()
    }
