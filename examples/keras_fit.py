"""A small U-Net by Keras' `fit`, on the CPU: trained on all patients but one, Dice on that one, whom it never saw.

python examples/keras_fit.py                          # the real studies under SCANFEED_DATA, else synthetic ones
KERAS_BACKEND=torch python examples/keras_fit.py      # jax (default here), torch or tensorflow
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from keras import layers, ops
from studies import train_and_held_out

import loaderd

SIZE = (128, 128)  # px of the middle of the images, where the heart is
STEPS = 90


def main() -> None:
    """Ingest, train, and say how good it became."""
    train, held_out = train_and_held_out()
    varied = [{"name": "rotate", "limit": 180}, {"name": "scale", "limit": 0.25}, {"name": "flip"}, {"name": "gamma", "limit": 0.5}]
    shared = {"structures": ["inner"], "batch_size": 6, "size": SIZE, "fit": "crop"}
    with (
        loaderd.Feed(**shared, where=train, seed=7, tail="drop", transforms=[*varied, {"name": "zscore"}]) as feed,
        loaderd.Feed(**shared, where=held_out, shuffle=False, transforms=[{"name": "zscore"}]) as validation,
    ):
        keras.utils.set_random_seed(0)
        model = unet()
        epochs = -(-STEPS // len(feed))
        rate = keras.optimizers.schedules.CosineDecay(0.01, epochs * len(feed))
        model.compile(optimizer=keras.optimizers.AdamW(rate), loss=loss, metrics=[dice])
        model.fit(feed.keras(), epochs=epochs, validation_data=validation.keras(), verbose=2)
        found = model.evaluate(validation.keras(), return_dict=True, verbose=0)
        print(f"Dice on the held-out patient: {found['dice']:.3f} (mean of {validation.num_samples} images)", flush=True)


def unet(width: int = 8) -> keras.Model:
    """Three levels, the first at a quarter of the images' resolution: (B, H, W, 1) to logits of that shape."""
    images = keras.Input((*SIZE, 1))
    x = layers.AveragePooling2D(4)(images)
    kept = []
    for level in range(3):
        x = block(layers.MaxPooling2D(2)(x) if level else x, width << level)
        kept.append(x)
    for level in (1, 0):
        x = block(layers.Concatenate()([layers.UpSampling2D(2)(x), kept[level]]), width << level)
    return keras.Model(images, layers.UpSampling2D(4, interpolation="bilinear")(layers.Conv2D(1, 1)(x)))


def block(x: keras.KerasTensor, channels: int) -> keras.KerasTensor:
    """Two convolutions, normalised without looking at the other samples of the batch."""
    for _ in range(2):
        x = layers.ReLU()(layers.GroupNormalization(4)(layers.Conv2D(channels, 3, padding="same")(x)))
    return x


def loss(drawn: keras.KerasTensor, logits: keras.KerasTensor) -> keras.KerasTensor:
    """Return cross-entropy and 1 - Dice of the probabilities, of each image."""
    p = ops.sigmoid(logits)
    overlap = (2 * ops.sum(p * drawn, (1, 2, 3)) + 1) / (ops.sum(p, (1, 2, 3)) + ops.sum(drawn, (1, 2, 3)) + 1)
    return ops.mean(ops.binary_crossentropy(drawn, logits, from_logits=True), (1, 2, 3)) + 1 - overlap


def dice(drawn: keras.KerasTensor, logits: keras.KerasTensor) -> keras.KerasTensor:
    """Return 2 |A ∩ B| / (|A| + |B|) of each image."""
    predicted = ops.cast(logits > 0, "float32")
    drawn = ops.cast(drawn, "float32")
    return 2 * ops.sum(predicted * drawn, (1, 2, 3)) / (ops.sum(predicted, (1, 2, 3)) + ops.sum(drawn, (1, 2, 3)))


if __name__ == "__main__":
    main()
