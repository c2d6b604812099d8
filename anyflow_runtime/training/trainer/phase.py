"""One phase of a run: its objective, its optimisers, and a step made of micro-steps."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch

from .. import distributed
from ..config import TrainConfig
from ..data.source import Samples, Source
from ..objectives.dmd import UpdateCadence
from ..objectives.on_policy import OnPolicy
from ..objectives.pretraining import Pretraining, Terms, TrainingBatch
from ..objectives.rebalance import DiffusionMean
from ..objectives.timesteps import GlobalBatch
from ..progress import is_loss
from .networks import Networks, input_dtype
from .trained_network import TrainedNetwork

TermsOf = Callable[[TrainingBatch, GlobalBatch, DiffusionMean], Terms]


class NonFiniteLoss(FloatingPointError, RuntimeError):
    """A loss or gradient that is not a number; the message names step, batch and samples."""


class TrainingPhase:
    """A phase and the networks it trains: "student", and on-policy also "fake".

    All randomness of a step follows from (seed, batch number, place in the global batch), so there is no generator
    state to save, and a micro-step draws what a process of a larger run would draw in its place.
    """

    def __init__(
        self, config: TrainConfig, index: int, networks: Networks, source: Source, device: torch.device, sharded: bool
    ) -> None:
        self.config, self.index, self.phase = config, index, config.phases[index]
        self.source, self.device, self.networks = source, device, networks
        self.micro_steps = config.micro_steps(distributed.world_size())
        self.shared, self.generator = torch.Generator(), torch.Generator()
        networks.train_text_encoder(index == 0 and not config.on_policy_stage and config.model.path is None)
        modules = {"transformer": networks.student}
        if networks.text_encoder is not None:
            modules["text_encoder"] = networks.text_encoder
        save_frozen = config.lora is None
        self.trained = {
            "student": TrainedNetwork(modules, config.optimiser, self.phase, config.ema, save_frozen=save_frozen)
        }
        if networks.fake is not None:
            fake = {"fake": networks.fake}
            if networks.heads is not None:
                fake["heads"] = networks.heads
            self.trained["fake"] = TrainedNetwork(fake, config.optimiser, self.phase, None, save_frozen=save_frozen)
        loss = config.pretrain.flow_map
        pretrain = replace(
            config.pretrain,
            objective="flow_matching" if self.phase.objective == "flow_matching" else "flow_map",
            flow_map=replace(loss, equal_forwards=loss.equal_forwards or sharded),
            input_dtype=input_dtype(config),
        )
        self.pretraining = Pretraining(networks.student, pretrain, self.shared, self.generator)
        self.cadence = UpdateCadence(config.on_policy.student_every)
        self.on_policy: OnPolicy | None = None
        if networks.real is not None and networks.fake is not None:
            on_policy = replace(
                config.on_policy,
                shift=loss.shift,
                chunk_partition=None if config.far is None else config.far.chunk_partition,
                input_dtype=pretrain.input_dtype,
            )
            scores = networks.real, networks.fake, on_policy, self.pretraining, networks.heads
            self.on_policy = OnPolicy(networks.student, *scores, shared=self.shared, generator=self.generator)

    def step(self, step: int, local: int) -> dict[str, float]:
        """Optimiser step `step` of the run, `local` of the phase; returns what is to be logged. A collective.

        Raises:
            NonFiniteLoss: before any weight of the network has changed.
        """
        if self.on_policy is None:
            return self._update("student", step, step, local, self.pretraining.terms)
        on_policy, values = self.on_policy, {}
        if self.cadence.updates_student(local):
            values = self._update("student", step, 2 * step, local, on_policy.student_terms)
        fake = self._update("fake", step, 2 * step + 1, local, lambda batch, *_: on_policy.fake_terms(batch))
        return values | {f"fake/{name}": value for name, value in fake.items()}

    def _update(self, name: str, step: int, draw: int, local: int, terms_of: TermsOf) -> dict[str, float]:
        network, running = self.trained[name], DiffusionMean()
        logged: dict[str, list[float]] = defaultdict(list)
        rank, world = distributed.rank(), distributed.world_size()
        for micro in range(self.micro_steps):
            position = GlobalBatch(self.config.batch_size, rank, world, micro, self.micro_steps)
            samples = self.source.samples(draw, position)
            # The decisions that ranks share are also shared by micro-steps: accumulated, they are one large batch.
            self.shared.manual_seed(_seed(self.config.seed, "shared", draw))
            self.generator.manual_seed(_seed(self.config.seed, "own", draw, micro * world + rank))
            batch, leaves = self._batch(samples)
            for term, result in terms_of(batch, position, running):
                loss = result.loss.item()
                if not math.isfinite(loss):
                    raise NonFiniteLoss(f"step {step}, batch {draw}: loss {term!r} is {loss}; {_list(samples)}")
                network.backward(result.loss / self.micro_steps)
                for key, value in result.log.items():
                    logged[f"{term}/{key}"].append(value)
            _backward_through(leaves)
            network.gather()
        try:
            values = network.step(local)
        except FloatingPointError as error:
            raise NonFiniteLoss(f"step {step}, batch {draw}: {error}; last {_list(samples)}") from error
        return _means(logged) | values

    def _batch(self, samples: Samples) -> tuple[TrainingBatch, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The batch, and pairs (embedding with graph, its leaf) where a text encoder learns.

        Every loss of a step has a graph of its own that ends at the leaves; their summed gradient then goes through the
        text encoder once.
        """
        latents, encoder = samples.latents.to(self.device), self.networks.text_encoder
        negative = self.source.negative
        if encoder is None:
            if samples.text is None:
                raise ValueError(f"data: got captions alone ({samples.names[0]}), expected prompt embeddings")
            text = samples.text.to(self.device)
            return TrainingBatch(latents, text, None if negative is None else negative.to(self.device)), []
        if samples.captions is None:
            raise ValueError(
                f"data: got embeddings ({samples.names[0]}), expected captions for the demo's text encoder"
            )
        learns = any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(learns):
            embedded = encoder([*samples.captions, ""])
        leaf = embedded.detach().requires_grad_(learns)
        return TrainingBatch(latents, leaf[:-1], leaf[-1]), [(embedded, leaf)] if learns else []


def _backward_through(leaves: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for embedded, leaf in leaves:
        if leaf.grad is not None:
            embedded.backward(leaf.grad)


def _means(logged: dict[str, list[float]]) -> dict[str, float]:
    """Means over micro-steps and, for the losses, over ranks; every rank has the same terms."""
    means = {key: sum(values) / len(values) for key, values in logged.items()}
    losses = sorted(key for key in means if is_loss(key))
    if losses and distributed.world_size() > 1:
        total = distributed.all_reduce_sum(torch.tensor([means[key] for key in losses], dtype=torch.float64))
        means |= dict(zip(losses, (total / distributed.world_size()).tolist(), strict=True))
    return means


def _list(samples: Samples) -> str:
    """Names of those whose own values are not finite, or else of some of all."""
    finite = samples.latents.flatten(1).isfinite().all(1)
    if samples.text is not None:
        finite &= samples.text.flatten(1).isfinite().all(1)
    spoilt = [name for name, good in zip(samples.names, finite.tolist(), strict=True) if not good]
    names = spoilt or samples.names
    shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    return f"samples that are not finite: {shown}" if spoilt else f"samples: {shown}"


def _seed(*parts: object) -> int:
    """A well mixed 63-bit seed; neighbouring numbers would give related streams."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
