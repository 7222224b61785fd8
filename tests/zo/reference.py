"""Plain MeZO: the whole model in memory, an ordinary forward for each loss, weights by name. And a noise of one's own.

Nothing here knows how Horizon streams. What the comparison fixes from outside is the noise: either the sequential
generator of the original (`sequential_noise`), or `horizon.zo.noise`, which `counter_noise` cuts into parameters.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import horizon
from horizon.zo import noise
from horizon.zo.perturb import Perturber
from tests.parity.reference import Batch, num_trained

Noise = Callable[[int, int], dict[str, Tensor]]  # (step, query) -> z by parameter name


def sequential_noise(model, seed: int = 0) -> Noise:
    """As princeton-nlp/MeZO draws it: torch's generator, seeded once a query, parameter after parameter."""
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}

    def draw(step: int, query: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + 101 * step + query)
        return {name: torch.normal(0.0, 1.0, shape, generator=generator) for name, shape in shapes.items()}

    return draw


def block_normals(key: noise.Key, num_elements: int) -> np.ndarray:
    """The noise of a block's first `num_elements` elements, whole groups, fp32."""
    pairs = np.arange(num_elements // 2, dtype=np.uint32)
    return np.stack([half.reshape(-1, noise.HALF) for half in noise.normals(key, pairs)], axis=1).reshape(-1)


def counter_noise(layouts, seed: int) -> Noise:
    """Horizon's noise, by parameter."""

    def draw(step: int, query: int) -> dict[str, Tensor]:
        found = {}
        for layout in layouts:
            flat = block_normals(noise.noise_key(seed, step, query, layout.index), layout.num_trainable)
            for p in layout.trainable:
                found[p.name] = torch.from_numpy(flat[p.offset : p.end].copy()).view(p.spec.shape)
        return found

    return draw


def two_roundings(coefficient: float, z: Tensor, w: Tensor) -> Tensor:
    """w + coefficient z as any torch program would have it."""
    return w + z * torch.tensor(coefficient, dtype=torch.float32)


def one_rounding(coefficient: float, z: Tensor, w: Tensor) -> Tensor:
    """w + coefficient z as Horizon's kernels have it."""
    return torch.from_numpy(noise.fma(np.float32(coefficient), z.numpy(), w.numpy()))


class PlainMezo:
    """One model, fine-tuned step by step.

    Args:
        add: how a multiple of the noise is added.
        decays: parameters that weight decay applies to.
    """

    def __init__(self, model, settings: horizon.ZerothOrder, draw: Noise, add=two_roundings, decays=None):
        self.model = copy.deepcopy(model).eval()
        self.settings, self.draw, self.add, self.decays = settings, draw, add, decays or (lambda name: False)
        self.named = dict(self.model.named_parameters())
        self.weights = {name: p.detach().clone() for name, p in self.named.items()}
        self.history: list[tuple[int, list[float]]] = []  # step, projected gradients

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch], step: int) -> list[float]:
        found = []
        for query in range(self.settings.queries):
            z = self.draw(step, query)
            for eps in (self.settings.eps, -self.settings.eps):
                for name, value in z.items():
                    self.named[name].copy_(self.add(eps, value, self.weights[name]))
                found.append(sum(float(self._loss_sum(batch)) for batch in batches) / num_trained(batches))
        return found

    def _loss_sum(self, batch: Batch) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self.model(**inputs, use_cache=False).logits
        targets = torch.full_like(batch["labels"], -100)
        targets[:, :-1] = batch["labels"][:, 1:]
        rows = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return rows.sum(dtype=torch.float64)

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, list[float]]:
        """(loss, projected gradients); the weights take the step."""
        settings, step = self.settings, len(self.history) + 1
        losses = self.losses(batches, step)
        projected = [(p - m) / (2 * settings.eps) for p, m in zip(losses[::2], losses[1::2], strict=True)]
        self.history.append((step, projected))
        decay = torch.tensor(1 - lr * settings.weight_decay, dtype=torch.float32)
        for name in self.draw(step, 0):
            if self.decays(name):
                self.weights[name] = self.weights[name] * decay
        for age, (past, gradients) in enumerate(reversed(self.history[-settings.momentum_steps :])):
            for query, gradient in enumerate(gradients):
                coefficient = np.float32(-lr * settings.momentum**age * gradient / settings.queries)
                for name, z in self.draw(past, query).items():
                    self.weights[name] = self.add(float(coefficient), z, self.weights[name])
        return sum(losses) / len(losses), projected


class PlainPerturber(Perturber):
    """The arithmetic of `two_roundings` with any noise, in fp32 masters: what stands in for the kernels in a test."""

    def __init__(self, layouts, settings, draw: Noise):
        self._layouts, self._settings, self._draw = layouts, settings, draw

    def begin(self, works) -> None:
        self._works = works

    def __call__(self, block, states, copies, query, updates) -> None:
        from horizon.store.split import join_master, split_master

        w, work = join_master(*states), self._works[block]
        for update in work.updates if updates else ():
            for param in self._layouts[block].trainable:
                if param.spec.decay:
                    w[param.offset : param.end] *= torch.tensor(update.decay, dtype=torch.float32)
            for term in update.terms:
                w = two_roundings(term.coefficient, self._flat(block, term.step, term.query), w)
        if updates:
            split_master(w, out=tuple(states))
        if len(copies) == 2:
            z = self._flat(block, work.step, query)
            for copy_, eps in zip(copies, (self._settings.eps, -self._settings.eps), strict=True):
                copy_.copy_(two_roundings(eps, z, w))
        elif copies:
            copies[0].copy_(w)

    def _flat(self, block: int, step: int, query: int) -> Tensor:
        flat, z = torch.zeros(self._layouts[block].num_trainable), self._draw(step, query)
        for param in self._layouts[block].trainable:
            flat[param.offset : param.end] = z[param.name].flatten()
        return flat


def engine_for(model, settings: horizon.ZerothOrder, **changes) -> horizon.Engine:
    """A zeroth-order engine on the CPU that computes in fp32."""
    defaults = {"device": "cpu", "compute_dtype": "float32", "self_check": False}
    return horizon.Engine.from_pretrained(model, optimizer=settings, **{**defaults, **changes})


def masters(engine: horizon.Engine) -> dict[str, Tensor]:
    return dict(engine.named_master_parameters())


def layouts_of(engine: horizon.Engine):
    return engine._runtime.model.layouts


def decays_of(engine: horizon.Engine):
    decaying = {p.name for layout in layouts_of(engine) for p in layout.trainable if p.spec.decay}
    return decaying.__contains__
