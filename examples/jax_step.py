"""A small U-Net in JAX alone, on the CPU or whatever JAX finds: trained on all patients but one, Dice on that one, whom it never saw.

python examples/jax_step.py          # the real studies under SCANFEED_DATA, else synthetic ones
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from studies import train_and_held_out

import loaderd

SIZE = (128, 128)  # px of the middle of the images, where the heart is
STEPS = 90
WIDTHS = (8, 16, 32)  # channels of the levels, the first at a quarter of the images' resolution
Parameters = dict[str, Array]


def main() -> None:
    """Ingest, train, and say how good it became."""
    train, held_out = train_and_held_out()
    varied = [{"name": "rotate", "limit": 180}, {"name": "scale", "limit": 0.25}, {"name": "flip"}, {"name": "gamma", "limit": 0.5}]
    shared = {"structures": ["inner"], "batch_size": 8, "size": SIZE, "fit": "crop"}
    with (
        loaderd.Feed(**shared, where=train, seed=7, tail="pad", transforms=[*varied, {"name": "zscore"}]) as feed,
        loaderd.Feed(**shared, where=held_out, tail="pad", shuffle=False, transforms=[{"name": "zscore"}]) as validation,
    ):
        parameters = created(np.random.default_rng(0))
        moments = {name: (np.zeros_like(x), np.zeros_like(x)) for name, x in parameters.items()}
        # On all devices that the batches are sharded over, as the step returns them: else its second call compiles it once more.
        everywhere = NamedSharding(Mesh(np.array(jax.local_devices()), ("batch",)), PartitionSpec())
        parameters, moments = jax.device_put((parameters, moments), everywhere)
        # With (images, masks, valid) the padding of the last batch can be left out, and all batches are of one shape: one compilation.
        batches, checked = (one.jax(fields=("images", "masks", "valid")) for one in (feed, validation))
        epochs = -(-STEPS // len(feed))
        for epoch in range(epochs):
            for number, batch in enumerate(batches, epoch * len(feed)):
                loss, parameters, moments = step(parameters, moments, number, epochs * len(feed), *batch)
            if epoch % max(1, epochs // 6) == 0 or epoch == epochs - 1:
                found = np.concatenate([np.asarray(dice(parameters, images, masks))[valid] for images, masks, valid in checked])
                print(
                    f"epoch {epoch:2}: loss {float(loss):.3f}, Dice on the held-out patient {found.mean():.3f} ({len(found)} images)",
                    flush=True,
                )


@jax.jit
def step(parameters: Parameters, moments: Any, number: int, steps: int, images: Array, masks: Array, valid: Array) -> tuple[Any, ...]:
    """Take one step of Adam; returns the loss before it, the parameters and the moments."""
    loss, slope = jax.value_and_grad(loss_of)(parameters, images, masks, valid)
    rate = 0.01 * (1 - number / steps)
    corrections = 1 - 0.9 ** (number + 1), 1 - 0.99 ** (number + 1)

    def moved(x: Array, g: Array, of_x: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        mean, square = 0.9 * of_x[0] + 0.1 * g, 0.99 * of_x[1] + 0.01 * g**2
        return x - rate * (mean / corrections[0]) / (jnp.sqrt(square / corrections[1]) + 1e-8), (mean, square)

    both = {name: moved(x, slope[name], moments[name]) for name, x in parameters.items()}
    return loss, {name: x for name, (x, _) in both.items()}, {name: of_x for name, (_, of_x) in both.items()}


def loss_of(parameters: Parameters, images: Array, masks: Array, valid: Array) -> Array:
    """Return cross-entropy and 1 - Dice of the probabilities, the mean over what is a sample."""
    logits, drawn = logits_of(parameters, images), masks.astype(jnp.float32)
    p = jax.nn.sigmoid(logits)
    entropy = (jax.nn.softplus(logits) - drawn * logits).mean((1, 2))
    overlap = (2 * (p * drawn).sum((1, 2)) + 1) / (p.sum((1, 2)) + drawn.sum((1, 2)) + 1)
    return jnp.where(valid, entropy + 1 - overlap, 0).sum() / valid.sum()


@jax.jit
def dice(parameters: Parameters, images: Array, masks: Array) -> Array:
    """Return 2 |A ∩ B| / (|A| + |B|) of each image."""
    predicted = logits_of(parameters, images) > 0
    return 2 * (predicted & masks).sum((1, 2)) / (predicted.sum((1, 2)) + masks.sum((1, 2)))


def logits_of(parameters: Parameters, images: Array) -> Array:
    """Return the logits, (B, H, W)."""
    x, kept = resized(images[..., None], 4, "mean"), []
    for level in range(len(WIDTHS)):
        x = block(parameters, f"down{level}", resized(x, 2, "max") if level else x)
        kept.append(x)
    for level in (1, 0):
        x = block(parameters, f"up{level}", jnp.concatenate([jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kept[level]], -1))
    x = x @ parameters["last"] + parameters["bias"]
    return jax.image.resize(x, (len(x), *images.shape[1:], 1), "bilinear")[..., 0]


def resized(x: Array, factor: int, how: str) -> Array:
    """Return (B, H, W, C) at 1/`factor` of the resolution."""
    batch, rows, columns, channels = x.shape
    cells = x.reshape(batch, rows // factor, factor, columns // factor, factor, channels)
    return cells.mean((2, 4)) if how == "mean" else cells.max((2, 4))


def block(parameters: Parameters, name: str, x: Array) -> Array:
    """Two convolutions, normalised without looking at the other samples of the batch."""
    for layer in "ab":
        x = lax.conv_general_dilated(x, parameters[name + layer], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        groups = x.reshape(*x.shape[:3], 4, -1)
        groups = (groups - groups.mean((1, 2, 4), keepdims=True)) / jnp.sqrt(groups.var((1, 2, 4), keepdims=True) + 1e-5)
        x = jax.nn.relu(groups.reshape(x.shape) * parameters[name + layer + "scale"] + parameters[name + layer + "shift"])
    return x


def created(draw: np.random.Generator) -> dict[str, Any]:
    """Return random parameters, drawn by NumPy: JAX would compile its generator for each shape, which takes longer than the training."""
    first, second, third = WIDTHS
    blocks = {
        "down0": (1, first),
        "down1": (first, second),
        "down2": (second, third),
        "up1": (second + third, second),
        "up0": (first + second, first),
    }
    # Few pixels are in a mask: begun at a probability of a half, all channels that speak for one may die before they learn anything.
    parameters = {"last": normal(draw, (first, 1), first**-0.5), "bias": np.full(1, -2, np.float32)}
    for name, (before, after) in blocks.items():
        for layer, channels in (("a", before), ("b", after)):
            parameters[name + layer] = normal(draw, (3, 3, channels, after), (2 / (9 * channels)) ** 0.5)
            parameters[name + layer + "scale"], parameters[name + layer + "shift"] = np.ones(after, np.float32), np.zeros(after, np.float32)
    return parameters


def normal(draw: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Any:
    """Return normally distributed numbers around 0."""
    return draw.standard_normal(shape, np.float32) * np.float32(deviation)


if __name__ == "__main__":
    main()
